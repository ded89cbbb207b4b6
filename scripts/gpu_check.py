"""
Checks a machine with GPUs before days are spent on it: does everything run there, right, and how fast?

    python -m scripts.gpu_check                                          one GPU, about 8 minutes
    python -m scripts.gpu_check --minutes 2 --json check.json            what matters most, and the figures to keep
    torchrun --standalone --nproc_per_node=8 -m scripts.gpu_check        all GPUs of a machine

In the order of what matters, each with PASS or FAIL and a figure, and going on after a failure: the Mamba-2 kernels against
the PyTorch form; a surgery's proof; training of eight d32 blocks in stage 1, eager and compiled; a run that is killed and
resumed; FSDP2 with NCCL; decoding in every mode; the tiny experiment. Exit code 0 if nothing failed, else 1.

It runs from a source tree with torch 2.10 or later, triton, numpy and einops, and the kernels that
`python -m scripts.get_kernels` puts into it; the tiny experiment alone needs more, and is left out without it.
--dry runs every part, small, on a CPU.
"""
import argparse
import importlib
import importlib.metadata
import os
import sys
import time
from pathlib import Path

import torch

from nanochat.checkpoint_manager import save_json
from nanochat.common import cli, describe_error, get_compute_dtype, get_rank, has_native_bf16, print0, why_no_gpu
from nanochat.distributed import barrier, everyone, init_processes, leave
from scripts.gpu_check_parts import PARTS, Finding, Part, Setting, sync_and_free

OLDEST_TORCH = (2, 10)


def describe_machine(device: torch.device) -> dict:
    """What the figures were measured on."""
    versions = {}
    for name in ("torch", "triton", "numpy", "einops"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    gpu = device.type == "cuda"
    out = {"device": torch.cuda.get_device_name(device) if gpu else "cpu", "processes": get_rank()[1], "versions": versions,
           "python": sys.version.split()[0]}
    if gpu:
        out |= {"memory_gb": torch.cuda.get_device_properties(device).total_memory / 1e9, "cuda": torch.version.cuda,
                "capability": ".".join(map(str, torch.cuda.get_device_capability(device)))}
    return out


def run_part(part: Part, s: Setting) -> Finding:
    """A part's finding; an error is a failure with its line, except where other ranks would wait for this one forever."""
    try:
        sync_and_free(s.device)
        return part.run(s)
    except Exception as e:
        if part.together and get_rank()[1] > 1:
            raise
        if os.environ.get("NANOCHAT_DEBUG"):
            raise
        return Finding(False, describe_error(e).removeprefix("error: "), {})


def check(s: Setting, minutes: float, path: Path | None) -> dict:
    """Runs the parts and prints a line for each; after each the result is written to `path`, so that a crash keeps it."""
    result, began = {"machine": describe_machine(s.device), "dry": s.dry, "parts": {}}, time.perf_counter()
    for number, part in enumerate(PARTS, 1):
        start = time.perf_counter()
        late = start - began > 60 * minutes  # by the first rank's clock: parts together must be run by all
        if part.together and get_rank()[1] > 1:
            late = everyone(late)[0]
        if late:
            finding = Finding(None, f"the {minutes:g} minutes are over: give more --minutes", {})
        else:
            finding = run_part(part, s) if part.together or get_rank()[0] == 0 else Finding(None, "", {})
            barrier()
        seconds = time.perf_counter() - start
        verdict = {True: "PASS", False: "FAIL", None: "SKIP"}[finding.passed]
        print0(f"[{number}/{len(PARTS)}] {verdict}  {part.name}: {finding.text} ({seconds:.0f} s)")
        result["parts"][part.name] = {"verdict": verdict, "text": finding.text, "seconds": seconds, **finding.figures}
        if path is not None and get_rank()[0] == 0:
            save_json(result, path)
    return result


@cli
def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m scripts.gpu_check", description=__doc__.split("\n\n")[0],
                                epilog="NANOCHAT_DEBUG=1 stops at the first error and shows where it came from")
    p.add_argument("--json", type=Path, default=None, metavar="PATH", help="also write the figures there")
    p.add_argument("--minutes", type=float, default=8.0,
                   help="no part begins after so many minutes; the first ones take about two (default: 8)")
    p.add_argument("--dry", action="store_true", help="run every part, small, on the CPU: it proves the command only")
    args = p.parse_args(argv)
    if not args.minutes > 0:
        raise ValueError(f"--minutes is {args.minutes:g}; it must be above 0")
    if not args.dry and (fault := why_no_gpu()):
        raise ValueError(f"there is nothing to check: {fault}; --dry runs every part, small, on the CPU")
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        print0(f"warning: torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}: parts may fail for it")
    if not args.dry and not has_native_bf16("cuda"):
        print0(f"warning: {torch.cuda.get_device_name()} has no bf16: everything is computed in fp32, several times slower")
    device = init_processes("cpu" if args.dry else "cuda")
    s = Setting.on_cpu() if args.dry else Setting.on_gpu(device, get_compute_dtype("cuda"))
    machine = describe_machine(device)
    print0(f"{machine['processes']} x {machine['device']}, " + ", ".join(f"{k} {v}" for k, v in machine["versions"].items()))
    result = check(s, args.minutes, args.json)
    failed = [name for name, part in result["parts"].items() if part["verdict"] == "FAIL"]
    done = sum(part["verdict"] == "PASS" for part in result["parts"].values())
    print0(f"{done} of {len(PARTS)} parts passed" + (f"; failed: {', '.join(failed)}" if failed else ""))
    leave()
    if failed:
        sys.exit(1)
    return result


if __name__ == "__main__":
    main()
