"""
Memory for scripts/plan.py: which rows per pass, gradient checkpointing and optimizer fit each stage's training step on
so many GPUs of so much memory (nanochat/step_estimate.py); and the trace of a small model against what that model really
allocates, on a CPU, by torch's profiler.
"""
import gc
import os
import sys
import tempfile
import time
from bisect import bisect_left

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from nanochat.distributed import make_mesh
from nanochat.hybrid_gpt import HybridConfig
from nanochat.memory_trace import CATEGORIES
from nanochat.step_estimate import (
    Choice,
    Estimate,
    Ranks,
    Workload,
    choose,
    estimate,
    possible_rows,
    preferences,
    prepare_step,
    trace_step,
    usable,
)
from scripts.plan_tables import make_stage, show

TOLERANCE = 0.1  # of the trace against the small model that really runs
# Small enough for any CPU, large enough that tensors, and not the bookkeeping of small ones, are what is measured.
SMALL = HybridConfig(sequence_len=256, vocab_size=2048, n_layer=2, n_head=4, n_kv_head=4, n_embd=256, d_ref=256,
                     top_width=256, mamba_headdim=64, mamba_d_state=64, mamba_group_width=192)
SMALL_CHOICE = Choice(rows=4, checkpointing=True)


def measured_peak(workload: Workload, mesh, dtype: torch.dtype) -> int:
    """
    The most bytes that are allocated at once while the same step really runs, twice: torch's profiler reports what the
    CPU's allocator hands out, to operators' insides too. It does not see what other threads (gloo's) give back, which shows
    only when that memory is handed out again: the figure is an upper bound, and exact in one process.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        built = workload.build()
        passes, update, _ = prepare_step(built, mesh, SMALL_CHOICE, dtype)
        with torch.no_grad():
            for p in built.model.parameters():
                p.zero_()
        for part in (passes, update) * 2:
            part()
    events, open_events = [], list(profiler.profiler.kineto_results.experimental_event_tree())
    while open_events:
        event = open_events.pop()
        open_events += event.children
        if event.tag.name == "Allocation":
            events.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    ends: dict[int, int] = {}  # of what is live: first address -> the one behind the last
    starts: list[int] = []  # sorted
    total = peak = 0
    for _, address, size in sorted(events):
        stop = address + max(size, 1)
        at = bisect_left(starts, address)
        if at and ends[starts[at - 1]] > address:
            at -= 1
        while at < len(starts) and starts[at] < stop:  # freed now, or it was before, unseen
            start = starts.pop(at)
            total -= ends.pop(start) - start
        if size > 0:
            starts.insert(at, address)
            ends[address] = stop
            total += size
            peak = max(peak, total)
    return peak


def _measure_rank(rank: int, world: int, store: str, dtype: torch.dtype, results) -> None:
    """A process of `measure`."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    results.put(measured_peak(make_stage(1, SMALL).workload, make_mesh("cpu"), dtype))
    dist.barrier()
    dist.destroy_process_group()


def measure(world: int, dtype: torch.dtype) -> int:
    """measured_peak of the small model's stage-1 step over `world` processes: the least of their upper bounds."""
    if world == 1:
        return measured_peak(make_stage(1, SMALL).workload, None, dtype)
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(_measure_rank, (world, f"{folder}/store", dtype, results), nprocs=world)
    return min(results.get() for _ in range(world))


def check(world: int, dtype: torch.dtype) -> dict[str, float]:
    """Peak MB of the small model's stage-1 step over `world` ranks, in the forms that a CPU runs: traced and measured."""
    built = make_stage(1, SMALL).workload.build()
    traced_bytes = trace_step(built, SMALL_CHOICE, Ranks(world), dtype, gpu_forms=False).peak
    measured = measure(world, dtype)
    return {"traced_mb": traced_bytes / 1e6, "measured_mb": measured / 1e6, "ratio": traced_bytes / measured}


def check_trace() -> dict:
    """check() of one process and of two, printed; SystemExit (1) where the trace is not what a step really takes."""
    result = {}
    for world, dtype in ((1, torch.float32), (2, torch.bfloat16)):
        name = f"{world} process{'es' * (world > 1)}, {str(dtype).removeprefix('torch.')}"
        result[name] = small = check(world, dtype)
        print(f"check, a small model's step really run here, {name}: {small['traced_mb']:.1f} MB traced, "
              f"{small['measured_mb']:.1f} MB measured by torch's profiler: {small['ratio'] - 1:+.1%}", flush=True)
        if abs(small["ratio"] - 1) > TOLERANCE:
            sys.exit(f"error: the trace is off by more than {TOLERANCE:.0%} here, with torch {torch.__version__}: what it "
                     "says of the real stages cannot be relied on")
    return result


def show_memory(stages, args) -> dict:
    """
    Estimates and prints what each stage takes on args.gpus GPUs of args.gpu_memory GB and what fits there, with the flags
    of fractal_train that choose it; returns the figures, by stage and 'check'.
    """
    result = {"check": check_trace()}
    for stage in stages:
        since, count = time.perf_counter(), sum(p.numel() for p in stage.model.parameters())
        print(f"{stage.phase}: {count / 1e9:.3f} B parameters over {args.gpus} GPUs; a minute or two", flush=True)
        estimated = estimate(stage.workload, Ranks(args.gpus))
        result[stage.phase] = {"params": count, **show_stage(stage, estimated, args),
                               "seconds": time.perf_counter() - since}
    print("\n  gathered: whole matrices of the units that run. gradients: with the buffers that sum them over the ranks. "
          "Beside the\n  peak, CUDA's context, NCCL's and cuBLAS's buffers and fragmentation are counted as "
          f"{args.gpu_memory - usable(args.gpu_memory * 1e9) / 1e9:.1f} GB. The optimizer's state cannot be moved to\n  the "
          "CPU. Blocks are counted as they run without --compile, which keeps less.")
    return result


def show_stage(stage, estimated: Estimate, args) -> dict:
    """Prints a stage's table and which choice fits best; returns both."""
    config, memory = stage.model.config, args.gpu_memory * 1e9
    rows = possible_rows(stage.workload, -1, args.gpus)
    peaks = {c: estimated.peak(c) for c in preferences(rows, 1)}
    ways = dict.fromkeys(c._replace(rows=0) for c in peaks)
    show(f"{stage.phase}: peak of a training step, GB (10^9) per GPU, by rows of {config.sequence_len} tokens per pass",
         ["", *(str(r) for r in rows)],
         [[str(way).partition(", ")[2], *(f"{peaks[way._replace(rows=r)] / 1e9:.1f}" for r in rows)] for way in ways])
    found = choose(estimated.peak, memory, rows, config.sequence_len,
                   {} if args.device_batch_size is None else {"rows": args.device_batch_size})
    out = {"gpu_memory_gb": args.gpu_memory, "peaks_gb": {c.flags(): p / 1e9 for c, p in peaks.items()}, "choice": None}
    if found is None:
        least = min(peaks.values()) / 1e9
        print(f"  does not fit on {args.gpus} x {args.gpu_memory:g} GB: it takes at least {least:.1f} GB, and "
              f"{usable(memory) / 1e9:.1f} GB are usable")
        return out
    best, peak = found
    parts = {k: v / 1e9 for k, v in estimated.at_peak(best).items()}
    print(f"  fits on {args.gpus} x {args.gpu_memory:g} GB: {best.flags()}\n  {peak / 1e9:.1f} GB: "
          + ", ".join(f"{k} {parts[k]:.1f}" for k in CATEGORIES))
    return out | {"choice": best._asdict(), "flags": best.flags(), "peak_gb": peak / 1e9, "at_peak_gb": parts}
