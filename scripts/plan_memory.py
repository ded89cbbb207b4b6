"""
Peak memory of a training step of each stage, for scripts/plan.py: the real model, sharding, step and optimizers, rank 0 of
8 on a process group that exchanges nothing, traced with fake tensors (nanochat/memory_trace.py); and the same trace of a
small model against what that model really allocates, on a CPU, by torch's profiler.
"""
import contextlib
import gc
import os
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from nanochat.distributed import shard_model
from nanochat.hybrid_gpt import HybridConfig
from nanochat.loss_eval import GATE_TOKENS, matryoshka_backward, sample_students, tokens_of_rows
from nanochat.matryoshka import cost_table
from nanochat.memory_trace import CATEGORIES, MemoryTrace, traced
from nanochat.optim import setup_optimizers

RANKS, LIMIT_GB = 8, 80
# Small enough for any CPU, large enough that tensors, and not the bookkeeping of small ones, are what is measured.
SMALL = HybridConfig(sequence_len=512, vocab_size=2048, n_layer=2, n_head=4, n_kv_head=4, n_embd=256, d_ref=256, top_width=256,
                     mamba_headdim=64, mamba_d_state=64, mamba_group_width=192)
SMALL_ROWS = 4


@contextlib.contextmanager
def fake_ranks(world: int):
    """A mesh of `world` ranks of which this process is the first and the others do not exist."""
    before = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (world,), mesh_dim_names=("shard",))
    finally:
        dist.destroy_process_group()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def dearest_students(model, rows: int, world: int, draws: int = 200) -> list:
    """Of many draws of student passes the one with the most FLOPs: a step that takes as much memory as any, or nearly."""
    c, generator = model.config, torch.Generator().manual_seed(0)
    table, _ = cost_table(model, c.sequence_len / 2)
    levels, best = torch.tensor(c.levels), (-1.0, [])
    for _ in range(draws):
        starts = torch.full((rows * world,), c.sequence_len // 4)
        students = sample_students(c, rows, c.sequence_len, starts, generator, rank=0, world=world)
        flops = sum(float(table[torch.arange(c.n_block), torch.searchsorted(levels, torch.as_tensor(s.widths))]
                          .sum(-1).mean()) for s in students)
        if flops > best[0]:
            best = flops, students
    return best[1]


def prepare_step(stage, mesh, rows: int, dtype: torch.dtype, world: int):
    """(run one optimizer step on random tokens, the optimizers) of a stage's model that is on the meta device."""
    model, T = stage.model, stage.model.config.sequence_len
    shard_model(model, mesh, dtype, gradient_checkpointing=True)
    model.to_empty(device="cpu")
    optimizers = setup_optimizers(model, frozen=stage.boxes)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randint(model.config.vocab_size, (2, rows, T), generator=generator)
    students = dearest_students(model, rows, world)
    at = tokens_of_rows(y >= 0, GATE_TOKENS, generator)

    def step():
        matryoshka_backward(model, x, y, students, 1.0, at)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
    return step, optimizers


def trace_step(stage, rows: int, dtype: torch.dtype = torch.bfloat16, world: int = RANKS,
               gpu_forms: bool = True) -> MemoryTrace:
    """The trace of a stage's second optimizer step on rank 0 of `world`: the first one makes the optimizers' state."""
    with fake_ranks(world) if world > 1 else contextlib.nullcontext() as mesh, traced(gpu_forms) as trace:
        step, optimizers = prepare_step(stage, mesh, rows, dtype, world)
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


def measured_peak(make, dtype: torch.dtype, mesh=None, world: int = 1) -> int:
    """
    The most bytes that are allocated at once while the same step really runs: torch's profiler sees each allocation of the
    CPU's allocator, those inside operators too.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        stage = make()
        step, _ = prepare_step(stage, mesh, SMALL_ROWS, dtype, world)
        with torch.no_grad():
            for p in stage.model.parameters():
                p.zero_()
        step()
        step()
    live = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def check(make_stage) -> dict[str, float]:
    """Peak MB of the small model's stage-1 step, traced and measured, in fp32 and one process."""
    def make():
        return make_stage(1, SMALL)
    trace = trace_step(make(), SMALL_ROWS, torch.float32, world=1, gpu_forms=False)
    measured = measured_peak(make, torch.float32)
    return {"traced_mb": trace.peak / 1e6, "measured_mb": measured / 1e6, "ratio": trace.peak / measured}


def show_memory(stages, args) -> dict:
    from scripts.plan import make_stage, parameters, show
    small = check(make_stage)
    print(f"a small model's step in one process on this CPU: {small['traced_mb']:.1f} MB traced, {small['measured_mb']:.1f} MB "
          f"measured by torch's profiler, {small['ratio'] - 1:+.1%}", flush=True)
    result, rows = {"check": small}, []
    for stage in stages:
        count, since = parameters(stage)["total"], time.perf_counter()
        print(f"{stage.phase}: {count / 1e9:.3f} B parameters over {RANKS} ranks, {args.device_batch_size} x "
              f"{stage.model.config.sequence_len} tokens each; tracing takes a minute or two", flush=True)
        trace = trace_step(stage, args.device_batch_size)
        gb = {k: v / 1e9 for k, v in trace.at_peak.items()}
        result[stage.phase] = {"params": count, "peak_gb": trace.peak / 1e9, "at_peak_gb": gb,
                               "fits": trace.peak < LIMIT_GB * 1e9, "seconds": time.perf_counter() - since}
        rows.append([stage.phase, f"{count / 1e9:.3f}", f"{trace.peak / 1e9:.1f}", *(f"{gb[k]:.1f}" for k in CATEGORIES),
                     "yes" if trace.peak < LIMIT_GB * 1e9 else "NO"])
    show(f"peak of a training step, GB per rank of {RANKS}", ["stage", "B parameters", "peak", *CATEGORIES,
                                                           f"below {LIMIT_GB} GB"], rows)
    print("gathered: whole parameters of the units that run; gradients with the buffers that reduce them; not counted: the "
          "CUDA context, NCCL's and cuBLAS's buffers, fragmentation: some 3-5 GB")
    return result
