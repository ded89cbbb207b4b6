"""
Does adaptive compute work? A small hybrid learns easy, medium and hard tasks; its controls must then spend less on easy
ones at no loss of accuracy, on instances that were never trained on, and beat simpler ways to spend less.

    python -m tiny_experiment                one seed
    python -m tiny_experiment --seeds 3      the full report
    python -m tiny_experiment --quick        every part, much too short to learn: for CI

It runs on one GPU where there is one (--device-type cpu keeps it on the CPU), on a CPU in two processes.

Writes report.json, report.md, plots and the models (`python -m scripts.chat_cli --checkpoint .../model_0 --mode auto
--trace -p "copy qzkf="`), and prints a verdict for each claim: PASS or FAIL with the figure.
"""
import argparse
from dataclasses import asdict, replace
from pathlib import Path

import torch

from nanochat.common import cli, find_device_type, get_base_dir, print0
from nanochat.owner import gives_back, own
from tiny_experiment import report, run


def where(device_type: str) -> str:
    """The device in words: the GPU's name, or the CPU with torch's threads."""
    if device_type == "cuda":
        return torch.cuda.get_device_name()
    return f"a CPU, {torch.get_num_threads()} threads"


@cli
@gives_back
def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m tiny_experiment",
                                description="Show on small tasks that easy inputs use less compute than hard ones.")
    p.add_argument("--seeds", type=int, default=1, help="independent runs; the report gives their means (default: 1)")
    p.add_argument("--seed", type=int, default=0, help="the first one's (default: 0)")
    p.add_argument("--quick", action="store_true", help="run every part in about a minute, without learning the tasks")
    p.add_argument("--steps", type=int, default=None, help="training steps of the model (default: 1100; 40 with --quick)")
    p.add_argument("--device-type", choices=["cpu", "cuda"], default=None,
                   help="where the model runs (default: cuda where there is one)")
    p.add_argument("--processes", type=int, default=None,
                   help="processes that train together; on a GPU they share it (default: 2 on a CPU, 1 on a GPU)")
    p.add_argument("--out", default=None, help="folder for the report (default: tiny_experiment in NANOCHAT_BASE_DIR)")
    args = p.parse_args(argv)
    if args.seeds < 1 or (args.steps is not None and args.steps < 1):
        raise ValueError("--seeds and --steps must be at least 1")
    if args.processes is not None and not 1 <= args.processes <= run.Settings.pieces:
        raise ValueError(f"--processes is {args.processes}; it must be 1 or {run.Settings.pieces}, since a step has "
                         f"{run.Settings.pieces} pieces")
    device_type = find_device_type(args.device_type)
    processes = args.processes or (run.Settings.processes if device_type == "cpu" else 1)
    settings = run.Settings.quick() if args.quick else run.Settings()
    settings = replace(settings, device_type=device_type, processes=processes)
    if args.steps is not None:
        settings = replace(settings, steps=args.steps, students_from=settings.students_from * args.steps // settings.steps)
    folder = own(Path(args.out).expanduser() if args.out else get_base_dir() / "tiny_experiment")
    print0(f"{args.seeds} seed{'s' if args.seeds > 1 else ''}, {settings.steps} steps of {settings.rows} rows each, "
           f"{settings.processes} process{'es' * (settings.processes > 1)} on {where(device_type)}")
    runs = []
    for seed in range(args.seed, args.seed + args.seeds):
        runs.append(run.run_seed(seed, settings, folder / f"model_{seed}"))
        result = report.write(runs, asdict(settings), args.quick, folder)  # after each seed: nothing is lost in a crash
        print0(f"seed {seed} took {runs[-1]['seconds']['all']:.0f} s")
    print0("\nexact match, %  " + "".join(f"{d:>8}" for d in ("all", "easy", "medium", "hard")))
    for name, values in result["exact_match"].items():
        print0(f"{name:<16}" + "".join(f"{100 * values[d]:8.1f}" for d in ("all", "easy", "medium", "hard")))
    print0()
    for c in result["claims"]:
        print0(f"{'PASS' if c['pass'] else 'FAIL'}  {c['claim']}: {c['shown']}")
    if args.quick:
        print0("(a quick run learns nothing: its verdicts mean nothing)")
    print0(f"\nwrote {folder / 'report.md'}")
    return result


if __name__ == "__main__":
    main()
