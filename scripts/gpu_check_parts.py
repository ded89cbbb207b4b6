"""
The parts of `scripts.gpu_check`. Each is a function of a Setting that returns a Finding: whether it passed, a line with the
figure, and the figures by name. What a part cannot do it raises.
"""
import contextlib
import copy
import gc
import importlib.util
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from nanochat.checkpoint_manager import build_model
from nanochat.common import get_rank
from nanochat.distributed import (
    everyone,
    gradient_norm,
    load_shards,
    local,
    make_mesh,
    reduce_whole,
    shard_model,
)
from nanochat.elastic_step import ElasticStep
from nanochat.engine import Engine, prepare_inference
from nanochat.gpt import GPTConfig
from nanochat.growing import grow
from nanochat.hybrid_gpt import HybridConfig
from nanochat.loss_eval import matryoshka_backward
from nanochat.mamba_block import Mamba2
from nanochat.mamba_kernels import why_no_cuda
from nanochat.monitor import peak_flops, timer
from nanochat.optim import setup_optimizers
from nanochat.stages import set_trained
from nanochat.step_parts import shares
from nanochat.surgery import MAX_DELTA, insert, prove, unchanged

# Largest relative error of the kernels against the PyTorch form in fp64. Triton multiplies fp32 as TF32 (10 bits).
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 3e-2}
ROOT = Path(__file__).parents[1]


class Finding(NamedTuple):
    """What a part found. passed: None where it could not run here; text: a line with the figure; figures: for --json."""
    passed: bool | None
    text: str
    figures: dict


@dataclass(frozen=True)
class Setting:
    """
    Where the parts run, and how large. config: of the parts that train and decode; base: of surgery, which grows it to
    `grown`; small: of those that compare whole runs; tokens: generated per row and mode; steps: timed training steps.
    """
    device: torch.device
    dtype: torch.dtype
    config: HybridConfig
    base: GPTConfig
    grown: int
    small: HybridConfig
    mixer: dict
    rows: tuple[int, ...] = (8, 4, 2)
    batches: tuple[int, ...] = (1, 32)
    tokens: int = 32
    steps: int = 5
    dry: bool = False

    @classmethod
    def on_gpu(cls, device: torch.device, dtype: torch.dtype) -> "Setting":
        """The sizes of nanochat-d32: its blocks are trained and decoded with eight at a time."""
        eight, small = replace(HybridConfig.preset("d32"), n_layer=4), GPTConfig(512, 8192, 4, 8, 8, 1024)
        return cls(device, dtype, eight, GPTConfig(512, 8192, 2, 16, 16, 2048), 2560, HybridConfig.from_base(small),
                   {"d_model": 2048, "expand": 3, "ngroups": 8})

    @classmethod
    def on_cpu(cls) -> "Setting":
        """Sizes at which every part runs in seconds on a CPU: for --dry, which proves the command and not the machine."""
        small = HybridConfig.from_base(GPTConfig(32, 300, 4, 4, 4, 64))
        return cls(torch.device("cpu"), torch.float32, small, GPTConfig(32, 300, 2, 4, 4, 64), 128, small,
                   {"d_model": 32, "d_state": 16, "headdim": 16, "chunk_size": 16, "expand": 3, "ngroups": 2},
                   rows=(2,), batches=(1, 2), tokens=4, steps=1, dry=True)


def sync_and_free(device: torch.device) -> None:
    """Gives back what the last part held."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@torch.no_grad()
def randomized(model):
    """Initialises a model from a fixed seed, and what begins as zero at random, so that no part of it is a no-op."""
    torch.manual_seed(0)
    model.init_weights()
    for p in model.parameters():
        if p.numel() and not bool(p.any()):
            p.normal_(std=0.3 * p.size(-1) ** -0.5 if p.ndim > 1 else 0.1)
    model.lm_head.weight.normal_(std=0.05)  # logits of order one
    return model


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want|, over all entries, in fp64."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


# ---------------------------------------------------------------------------------------------------------------------
# The parts

def kernels(s: Setting) -> Finding:
    """The Mamba-2 mixer in the form that runs here against its PyTorch form in fp64: forward, backward, decoding."""
    if not s.dry and (why := why_no_cuda()):
        raise why
    figures = {}
    for dtype in TOLERANCE:
        torch.manual_seed(0)
        mixer = Mamba2(backend="torch" if s.dry else "cuda", **s.mixer).to(s.device)
        mixer.init_weights()
        exact = Mamba2(backend="torch", **s.mixer).to(s.device).double()
        exact.load_state_dict(mixer.state_dict())
        name = str(dtype).removeprefix("torch.")
        figures |= {f"{name} {k}": v for k, v in _mixer_errors(mixer, exact, dtype).items()}
    worst = {dtype: max(v for k, v in figures.items() if k.startswith(str(dtype).removeprefix("torch.")))
             for dtype in TOLERANCE}
    text = ", ".join(f"{str(d).removeprefix('torch.')} within {v:.1e} of fp64 (at most {TOLERANCE[d]:.0e})"
                     for d, v in worst.items())
    return Finding(all(v <= TOLERANCE[d] for d, v in worst.items()), text, figures)


def _mixer_errors(mixer: Mamba2, exact: Mamba2, dtype: torch.dtype) -> dict[str, float]:
    """Relative errors of 'forward', 'backward' (of the worst gradient) and 'decode' (ten tokens behind a prefill)."""
    rows, T, new = 2, 300 if mixer.d_model > 100 else 30, 10  # a chunk of the scan and a part of one
    device = mixer.in_proj.weight.device
    u, g = (torch.randn(rows, T, mixer.d_model, device=device).to(dtype) for _ in range(2))
    results = []
    for m, kind in ((mixer, dtype), (exact, torch.float64)):
        x = u.to(kind).requires_grad_()
        y = m(x)
        grads = torch.autograd.grad(y, [x, *m.parameters()], g.to(kind))
        state, steps = m.new_state(rows, device, kind), []
        with torch.no_grad():
            m(x[:, :-new], state)
            steps = [m(x[:, t:t + 1], state) for t in range(T - new, T)]
        results.append((y, grads, torch.cat(steps, 1)))
    (y, grads, steps), (want_y, want_grads, want_steps) = results
    return {"forward": error(y, want_y), "backward": max(map(error, grads, want_grads)), "decode": error(steps, want_steps)}


def surgery(s: Setting) -> Finding:
    """Inserts Mamba blocks into a base GPT, then grows the hybrid, and proves on the device that logits stay as they are."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # as `scripts.surgery` runs
    try:
        base = randomized(build_model(s.base, s.device))
        hybrid = insert(base, 0)
        inserted = prove(base, hybrid, device=s.device)
        hybrid = randomized(hybrid)
        grown = prove(hybrid, grow(hybrid, s.grown), device=s.device)
    finally:
        torch.set_float32_matmul_precision(precision)
    figures = {"insert": inserted["max_delta_logit"], "grow": grown["max_delta_logit"]}
    text = f"max |delta logit| {figures['insert']:.1e} inserting, {figures['grow']:.1e} growing (at most {MAX_DELTA:.0e})"
    return Finding(unchanged(inserted) and unchanged(grown), text, figures)


def training(s: Setting) -> Finding:
    """Steps of stage 1 with the default recipe, eager and compiled: speed, and peak memory against the estimate."""
    choice, estimated = everyone(_what_fits(s) if get_rank()[0] == 0 else None)[0]
    figures, texts, passed = {"choice": str(choice), "estimated_gb": estimated / 1e9}, [], True
    for name, compiled in (("eager", False), ("compiled", True)):
        sync_and_free(s.device)
        one = _timed_steps(s, choice, compiled)
        figures[name] = one
        said = f"{name} {one['tok_per_s']:,.0f} tok/s"
        said += f", MFU {one['mfu']:.1%}" if one["mfu"] else ""
        if one["peak_gb"]:
            said += f", {one['peak_gb']:.1f} GB of {estimated / 1e9:.1f} estimated"
            passed &= one["peak_gb"] <= 1.1 * estimated / 1e9
        passed &= math.isfinite(one["loss"]) and math.isfinite(one["grad_norm"])
        texts.append(said)
    off = abs(figures["compiled"]["loss"] / figures["eager"]["loss"] - 1)
    texts.append(f"losses apart by {off:.1e} (at most 1e-02)")
    passed &= off <= 1e-2
    return Finding(passed, f"{'; '.join(texts)} ({s.config.n_block} blocks, {choice})", figures)


def _what_fits(s: Setting):
    """(step_estimate.Choice, bytes at the peak) of the first rows that fit on this device, by a trace in another process."""
    from nanochat.step_estimate import Choice, usable
    memory = torch.cuda.get_device_properties(s.device).total_memory if s.device.type == "cuda" else math.inf
    options = [Choice(rows, checkpointing) for rows in s.rows for checkpointing in (False, True)]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # tracing replaces parts of torch
        for choice in options:
            peak = pool.submit(_traced_peak, s.config, choice, get_rank()[1]).result()
            if peak <= usable(memory):
                return choice, peak
    raise ValueError(f"not even {options[-1]} fits into {memory / 1e9:.1f} GB ({peak / 1e9:.1f} estimated)")


def _traced_peak(config: HybridConfig, choice, world: int) -> float:
    from nanochat.step_estimate import Ranks, Workload, trace_step
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    return trace_step(Workload(config, "stage 1", recipe="lean").build(), choice, Ranks(world)).peak


def _timed_steps(s: Setting, choice, compiled: bool) -> dict:
    """Figures of optimizer steps on random tokens and weights, after two that warm up."""
    model = build_model(s.config, "meta")
    set_trained(model, "stage 1")
    shard_model(model, make_mesh(s.device.type), s.dtype, choice.checkpointing, compiled,
                "eager" if s.dry else "inductor")
    model.to_empty(device=s.device)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            local(p).normal_(std=0.02)
    optimizers = setup_optimizers(model, optimizer=choice.optimizer)
    backward = ElasticStep(model, 0, 1, "lean", levels=s.config.levels[-2:])
    x, y = torch.randint(s.config.vocab_size, (2, choice.rows, s.config.sequence_len), device=s.device)
    live = torch.ones(y.shape, dtype=torch.bool)

    def step() -> tuple[dict, float]:
        losses = backward(0, x, y, shares([live])[0])  # step 0 each time: the same widths, compiled once
        reduce_whole(model.parameters())
        norm = float(gradient_norm(model.parameters()))
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        return losses, norm
    for _ in range(2):
        losses, norm = step()
    start = timer(s.device)
    for _ in range(s.steps):
        step()
    seconds = (timer(s.device) - start) / s.steps
    gpu = s.device.type == "cuda"
    peak = peak_flops(torch.cuda.get_device_name(s.device)) if gpu else None
    return {"tok_per_s": get_rank()[1] * x.numel() / seconds, "seconds": seconds, "loss": float(losses["loss"]),
            "grad_norm": norm, "mfu": losses["flops"] / seconds / peak if peak else None,
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if gpu else None}


def resuming(s: Setting) -> Finding:
    """A run is killed with SIGKILL and started again; it must end as one that was never interrupted."""
    steps = 6
    with tempfile.TemporaryDirectory() as folder:
        whole = _run_worker(s, Path(folder) / "whole", steps)
        _run_worker(s, Path(folder) / "cut", steps, kill_after=3)
        resumed = _run_worker(s, Path(folder) / "cut", steps)
    began, last, want = resumed[0]["resumed"], resumed[-1]["loss"], whole[-1]["loss"]
    off = abs(last - want) / abs(want)
    return Finding(1 <= began < steps and off <= 1e-3, f"killed in step 4, went on after step {began}, last loss {last:.6f} "
                   f"against {want:.6f} uninterrupted", {"resumed": began, "loss": last, "uninterrupted": want})


def _run_worker(s: Setting, folder: Path, steps: int, kill_after: int | None = None) -> list[dict]:
    """What `gpu_check_worker` prints, a dict a line; it is killed once it has printed that step."""
    command = [sys.executable, "-m", "scripts.gpu_check_worker", str(folder), str(steps), *(["--dry"] if s.dry else [])]
    process = subprocess.Popen(command, cwd=ROOT, env=_alone(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    lines = []
    try:
        for line in process.stdout:
            if line.startswith("{"):
                lines.append(json.loads(line))
                if kill_after is not None and lines[-1].get("step") == kill_after:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    return lines
        if process.wait():
            raise RuntimeError(f"the training process ended with code {process.returncode}: "
                               f"{(process.stderr.read().strip().splitlines() or ['nothing was printed'])[-1][:300]}")
        return lines
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.stdout.close()
        process.stderr.close()


def _alone() -> dict[str, str]:
    """This environment without what torchrun put there."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "ROLE_RANK")
    return {k: v for k, v in os.environ.items() if k not in names and not k.startswith("TORCHELASTIC")}


def sharding(s: Setting) -> Finding:
    """A full pass under FSDP2, over all ranks or a single one, against the same pass of a model that is whole."""
    kind, (rank, world) = s.device.type, get_rank()
    single = not dist.is_initialized()
    if single:
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", store=dist.HashStore(), rank=0,
                                world_size=1)
    try:
        torch.manual_seed(0)
        source = randomized(build_model(s.small, "cpu"))
        x, y = torch.randint(s.small.vocab_size, (2, 2 * world, s.small.sequence_len)).to(s.device)
        one, many = copy.deepcopy(source).to(s.device), build_model(s.small, "meta")
        one.compute_dtype = s.dtype
        whole = _loss_and_norm(one, x, y, 1.0)
        shard_model(many, init_device_mesh(kind, (world,), mesh_dim_names=("shard",)), s.dtype)
        many.to_empty(device=s.device)
        load_shards(many, source.state_dict())
        part = _loss_and_norm(many, x[rank::world], y[rank::world], 1 / world)
        part = part[0] if world == 1 else sum(everyone(part[0])), part[1]
    finally:
        if single:
            dist.destroy_process_group()
    off = max(abs(a - b) / abs(b) for a, b in zip(part, whole))
    text = (f"{world} rank{'s' * (world > 1)} with {'NCCL' if kind == 'cuda' else 'gloo'}: loss {part[0]:.5f} against "
            f"{whole[0]:.5f}, gradient norm {part[1]:.4g} against {whole[1]:.4g}")
    return Finding(off <= 0.01, text, {"sharded": part, "whole": whole})


def _loss_and_norm(model, x, y, scale: float) -> tuple[float, float]:
    """This rank's part of the loss, and the norm of all ranks' gradients, of a full pass."""
    loss = matryoshka_backward(model, x, y, [], scale)["loss"] * scale
    if get_rank()[1] > 1 and scale < 1:
        reduce_whole(model.parameters())
    return float(loss), float(gradient_norm(model.parameters()))


def decoding(s: Setting) -> Finding:
    """Tokens per second of every mode at each batch size, and which share of the memory's bandwidth reading them takes."""
    model = randomized(build_model(s.config, s.device))
    prepare_inference(model, s.device.type, s.dtype)
    engine, speed = Engine(model, None), memory_bandwidth(s.device, 1 << (24 if s.dry else 31))
    figures, texts = {"bandwidth": speed}, []
    prompt = min(64, s.config.sequence_len // 2)
    for rows in s.batches:
        said = []
        prompts = torch.randint(s.config.vocab_size, (rows, prompt), generator=torch.Generator().manual_seed(0)).tolist()
        for mode in (*s.config.distinct_modes, "auto"):
            _seconds(engine, prompts, 2, mode, s.device)  # kernels are compiled
            first, whole = (_seconds(engine, prompts, n, mode, s.device) for n in (1, s.tokens + 1))
            rate = rows * s.tokens / max(whole - first, 1e-9)
            figures[f"{mode} x {rows}"] = one = {"tok_per_s": rate}
            said.append(f"{mode} {rate:,.0f}")
            if mode != "auto":
                one["bandwidth_share"] = rate / rows * _bytes_of_step(model, mode, rows, prompt) / speed
                said[-1] += f" ({one['bandwidth_share']:.0%})"
        texts.append(f"batch {rows}: {', '.join(said)}")
    passed = all(0 < v["tok_per_s"] < math.inf for v in figures.values() if isinstance(v, dict))
    text = f"tok/s of {s.config.n_block} blocks (share of {speed / 1e12:.2f} TB/s), {'; '.join(texts)}"
    return Finding(passed, text, figures)


def _seconds(engine: Engine, prompts: list, tokens: int, mode: str, device: torch.device) -> float:
    """Of greedy answers of so many tokens."""
    start = timer(device)
    engine.answers(prompts, tokens, mode=mode, temperature=0.0)
    return timer(device) - start


def _bytes_of_step(model, mode: str, rows: int, context: int) -> float:
    """Bytes read to decode one token of each row: weights once, keys, values and states of each row."""
    size = model.transformer.wte.weight.element_size()
    parts = list(model.cost(mode, context).values())
    weights = sum(p.weights for p in parts) * size
    return weights + rows * (sum(p.bytes_read(size, size) for p in parts) - weights)


def memory_bandwidth(device: torch.device, size: int) -> float:
    """Bytes per second, read and written, of copying `size` bytes within the device's memory."""
    a = torch.zeros(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    b.copy_(a)
    start = timer(device)
    for _ in range(5):
        b.copy_(a)
    return 2 * 5 * size / (timer(device) - start)


def tiny(s: Setting) -> Finding:
    """`tiny_experiment --quick`: every part of elastic compute, end to end, on the device."""
    missing = [name for name in ("tiktoken", "rustbpe", "pyarrow", "filelock", "tqdm", "matplotlib")
               if importlib.util.find_spec(name) is None]
    if missing:
        return Finding(None, f"it needs a tokenizer and plots: run `pip install {' '.join(missing)}`", {})
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tiny_experiment", "--quick", "--out", folder, "--device-type", s.device.type]
        start = timer(s.device)
        done = subprocess.run(command + (["--steps", "2", "--processes", "1"] if s.dry else []), cwd=ROOT, env=_alone(),
                              capture_output=True, text=True)
        seconds = timer(s.device) - start
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["it printed nothing"])[-1][:300])
        report = json.loads((Path(folder) / "report.json").read_text())
    return Finding(len(report["claims"]) > 0, f"ran to its report in {seconds:.0f} s", {"seconds": seconds})


class Part(NamedTuple):
    """A part of the check. together: all ranks run it, and not the first one alone."""
    name: str
    run: Callable[[Setting], Finding]
    together: bool = False


PARTS = (Part("kernels", kernels), Part("surgery", surgery), Part("training", training, True), Part("resuming", resuming),
         Part("sharding", sharding, True), Part("decoding", decoding), Part("tiny experiment", tiny))
