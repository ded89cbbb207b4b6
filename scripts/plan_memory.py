"""
Peak memory of a training step of each stage, for scripts/plan.py: the real model, sharding, step and optimizers, rank 0 of
--gpus on a process group that exchanges nothing, traced with fake tensors (nanochat/memory_trace.py); and the same trace of
a small model against what that model really allocates, on a CPU, by torch's profiler.
"""
import contextlib
import gc
import os
import sys
import tempfile
import time
from bisect import bisect_left

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from nanochat.distributed import gradient_norm, make_mesh, reduce_whole, shard_model
from nanochat.elastic_step import DEFAULT_RECIPE, ElasticStep
from nanochat.hybrid_gpt import HybridConfig
from nanochat.memory_trace import CATEGORIES, MemoryTrace, traced
from nanochat.optim import setup_optimizers
from nanochat.training import shares
from scripts.plan_tables import make_stage, show

LIMIT_GB = 80
TOLERANCE = 0.1  # of the trace against the small model that really runs
# Small enough for any CPU, large enough that tensors, and not the bookkeeping of small ones, are what is measured.
SMALL = HybridConfig(sequence_len=256, vocab_size=2048, n_layer=2, n_head=4, n_kv_head=4, n_embd=256, d_ref=256,
                     top_width=256, mamba_headdim=64, mamba_d_state=64, mamba_group_width=192)
SMALL_ROWS = 4


@contextlib.contextmanager
def fake_ranks(world: int):
    """The mesh of `world` ranks of which this process is the first and the others do not exist; None of one."""
    if world == 1:
        yield None
        return
    before = dict(os.environ)
    set_rank(0, world)
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield make_mesh("cpu")
    finally:
        dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)


def set_rank(rank: int, world: int) -> None:
    """What torchrun sets in the environment."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}


def prepare_step(stage, mesh, rows: int, dtype: torch.dtype):
    """(one optimizer step on random tokens, as Run.train makes it; the optimizers) of a stage's model on the meta device."""
    model = stage.model
    shard_model(model, mesh, dtype, gradient_checkpointing=True)
    model.to_empty(device="cpu")
    optimizers = setup_optimizers(model, frozen=stage.boxes)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randint(model.config.vocab_size, (2, rows, model.config.sequence_len), generator=generator)
    backward = ElasticStep(model, seed=0, steps=1, recipe=DEFAULT_RECIPE if rows > 1 else "both")

    def step():
        backward(0, x, y, shares([(x, y)])[0])
        reduce_whole(model.parameters())
        float(gradient_norm(model.parameters()))
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
    return step, optimizers


def trace_step(stage, rows: int, dtype: torch.dtype = torch.bfloat16, world: int = 8,
               gpu_forms: bool = True) -> MemoryTrace:
    """The trace of a stage's second optimizer step on rank 0 of `world`: the first one makes the optimizers' state."""
    with fake_ranks(world) as mesh, traced(gpu_forms) as trace:
        step, optimizers = prepare_step(stage, mesh, rows, dtype)
        parameters = list(stage.model.parameters())
        trace.mark(parameters, "parameters")
        for p in parameters:
            if p.requires_grad:  # what a backward pass would leave
                p.grad = torch.zeros_like(p)
                p.register_post_accumulate_grad_hook(lambda p: trace.mark([p.grad], "gradients"))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.register_step_pre_hook(lambda *_: setattr(trace, "phase", "temporary"))
            optimizer.register_step_post_hook(lambda *_: setattr(trace, "phase", None))
            trace.mark([v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)], "optimizer")
        stage.model.zero_grad(set_to_none=True)
        trace.reset_peak()
        step()
    return trace


def measured_peak(stage, mesh, dtype: torch.dtype) -> int:
    """
    The most bytes that are allocated at once while the same step really runs, twice: torch's profiler reports what the
    CPU's allocator hands out, to operators' insides too. It does not see what other threads (gloo's) give back, which shows
    only when that memory is handed out again: the figure is an upper bound, and exact in one process.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step, _ = prepare_step(stage, mesh, SMALL_ROWS, dtype)
        with torch.no_grad():
            for p in stage.model.parameters():
                p.zero_()
        step()
        step()
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
    set_rank(rank, world)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    results.put(measured_peak(make_stage(1, SMALL), make_mesh("cpu"), dtype))
    dist.barrier()
    dist.destroy_process_group()


def measure(world: int, dtype: torch.dtype) -> int:
    """measured_peak of the small model's stage-1 step over `world` processes: the least of their upper bounds."""
    if world == 1:
        return measured_peak(make_stage(1, SMALL), None, dtype)
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(_measure_rank, (world, f"{folder}/store", dtype, results), nprocs=world)
    return min(results.get() for _ in range(world))


def check(world: int, dtype: torch.dtype) -> dict[str, float]:
    """Peak MB of the small model's stage-1 step over `world` ranks, in the forms that a CPU runs: traced and measured."""
    traced_bytes = trace_step(make_stage(1, SMALL), SMALL_ROWS, dtype, world, gpu_forms=False).peak
    measured = measure(world, dtype)
    return {"traced_mb": traced_bytes / 1e6, "measured_mb": measured / 1e6, "ratio": traced_bytes / measured}


def show_memory(stages, args) -> dict:
    """
    Traces and prints the peak of each stage on args.gpus ranks of one machine; returns the figures, by stage and 'check'.
    SystemExit (1) where the trace of a small model is not what it really takes.
    """
    result, rows = {"check": {}}, []
    for world, dtype in ((1, torch.float32), (2, torch.bfloat16)):
        name = f"{world} process{'es' * (world > 1)}, {str(dtype).removeprefix('torch.')}"
        result["check"][name] = small = check(world, dtype)
        print(f"check, a small model's step really run here, {name}: {small['traced_mb']:.1f} MB traced, "
              f"{small['measured_mb']:.1f} MB measured by torch's profiler: {small['ratio'] - 1:+.1%}", flush=True)
        if abs(small["ratio"] - 1) > TOLERANCE:
            sys.exit(f"error: the trace is off by more than {TOLERANCE:.0%} here, with torch {torch.__version__}: what it "
                     "says of the real stages cannot be relied on")
    for stage in stages:
        c, since = stage.model.config, time.perf_counter()
        count = sum(p.numel() for p in stage.model.parameters())
        print(f"{stage.phase}: {count / 1e9:.3f} B parameters over {args.gpus} ranks, {args.device_batch_size} x "
              f"{c.sequence_len} tokens each; a minute or two", flush=True)
        trace = trace_step(stage, args.device_batch_size, world=args.gpus)
        gb = {k: v / 1e9 for k, v in trace.at_peak.items()}
        result[stage.phase] = {"params": count, "peak_gb": trace.peak / 1e9, "at_peak_gb": gb,
                               "fits": trace.peak < LIMIT_GB * 1e9, "seconds": time.perf_counter() - since}
        rows.append([stage.phase, f"{count / 1e9:.3f}", f"{trace.peak / 1e9:.1f}", *(f"{gb[k]:.1f}" for k in CATEGORIES),
                     "yes" if trace.peak < LIMIT_GB * 1e9 else "NO"])
    show(f"peak of a training step, GB (10^9) per rank of {args.gpus}",
         ["stage", "B parameters", "peak", *CATEGORIES, f"below {LIMIT_GB}"], rows)
    print("  gathered: whole matrices of the units that run. gradients: with the buffers that sum them over the ranks. Not "
          "counted:\n  the CUDA context, NCCL's and cuBLAS's buffers, fragmentation")
    return result
