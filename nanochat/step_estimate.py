"""
What a training step takes, before it runs. Memory: how much on each of several GPUs, and which rows per pass,
gradient checkpointing and optimizer fit there. For that the real step is traced on tensors without data
(memory_trace.py), on rank 0 of a process group that exchanges nothing, so no GPU is needed. Time: of a step
that is run once for it, on a CPU.

A deep model is traced at 8 and at 12 layers, each with 4 and with 8 rows, and the result is extended
linearly: every block and every row adds the same bytes again. tests/test_step_estimate.py compares that with
whole traces.
"""
import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from nanochat.checkpoint_manager import build_model
from nanochat.common import Progress, get_rank, print0
from nanochat.distributed import Gpu, everyone, gradient_norm, make_mesh, reduce_whole, shard_model
from nanochat.elastic_step import ElasticStep
from nanochat.gpt import GPTConfig
from nanochat.hybrid_gpt import HybridConfig
from nanochat.loss_eval import EXIT_WEIGHT
from nanochat.memory_trace import CATEGORIES, MemoryTrace, traced
from nanochat.optim import OPTIMIZERS, setup_optimizers
from nanochat.stages import frozen_boxes, set_trained
from nanochat.step_parts import GPU_TOKENS, shares

# Traced of a deeper model. Multiples of 4 have the same number of exit points and value embeddings per layer.
LAYERS = (8, 12)
ROWS = (4, 8)  # traced; even numbers, because recipe lean halves them
# What the trace does not see: the CUDA context, cuBLAS's and NCCL's buffers; and the allocator's losses to
# fragments.
RESERVE_BYTES, RESERVE_SHARE = 3e9, 0.05
# Shorter passes lose more to launching kernels and to gathering weights than recomputing activations costs (a
# third).
FAST_PASS_TOKENS = 8192
MAX_ROWS = 32  # per pass, where they are derived: more bring no speed


class Choice(NamedTuple):
    """
    How a step is run: rows per pass, whether activations are recomputed, and which of optim.OPTIMIZERS
    updates the blocks' matrices.
    """
    rows: int
    checkpointing: bool
    optimizer: str = "muon"

    def __str__(self) -> str:
        return (f"{self.rows} row{'s' * (self.rows > 1)} per pass, "
                f"{'' if self.checkpointing else 'no '}gradient checkpointing, "
                f"{'Muon + AdamW' if self.optimizer == 'muon' else 'AdamW only'}")

    def flags(self) -> str:
        """The command line flags that choose it."""
        return (f"--device-batch-size {self.rows} "
                f"--{'' if self.checkpointing else 'no-'}gradient-checkpointing --optimizer {self.optimizer}")


class Ranks(NamedTuple):
    """How many processes train together, and on how many machines; see distributed.make_mesh."""
    world: int = 1
    nodes: int = 1


class Built(NamedTuple):
    """
    A model on the meta device with requires_grad set, its frozen boxes (stages.frozen_boxes) and its step.
    """
    model: torch.nn.Module
    boxes: dict | None
    backward: ElasticStep


@dataclass(frozen=True)
class Workload:
    """
    What a training step computes. phase: of stages.set_trained, None for a base GPT, all of which is trained;
    old_config: of the model that this one was grown from, in stages 2 and 3; the other fields: see
    ElasticStep.
    """
    config: GPTConfig
    phase: str | None = None
    old_config: HybridConfig | None = None
    gate: bool = False
    recipe: str | None = None
    sample: bool = True
    draft_exit: int | None = None
    exit_weight: float = EXIT_WEIGHT

    def with_layers(self, layers: int) -> "Workload":
        """The same step of a model of so many layers."""
        old = self.old_config and replace(self.old_config, n_layer=layers)
        config = replace(self.config, n_layer=layers)
        draft = None if self.draft_exit is None else config.exit_points[-1]  # the deepest: an upper bound
        return replace(self, config=config, old_config=old, draft_exit=draft)

    @property
    def least_rows(self) -> int:
        """Rows that a pass needs: two where some are for the full pass and the others for the narrow one."""
        return 2 if self.recipe in ("lean", "split") else 1

    def build(self) -> Built:
        model, boxes = build_model(self.config, "meta"), None
        if self.old_config is not None:
            boxes = frozen_boxes(self.config, {"surgery": "grow", "old_config": asdict(self.old_config)})
        if self.phase is not None:
            set_trained(model, self.phase, gate=self.gate, boxes=boxes)
        # A narrow pass is traced at full width, which is as wide as sampling ever makes it.
        levels = (self.config.top_width,) if self.sample else None
        step = ElasticStep(model, seed=0, steps=1, recipe=self.recipe, sample=self.sample, student_every=1,
                           levels=levels, draft_exit=self.draft_exit, exit_weight=self.exit_weight)
        return Built(model, boxes, step)


# -----------------------------------------------------------------------------------------------------------
# Tracing

@contextlib.contextmanager
def fake_ranks(ranks: Ranks) -> Iterator:
    """
    The mesh of several ranks of which this process is the first and the others do not exist; None for a
    single one.
    """
    if ranks.world == 1:
        yield None
        return
    before = dict(os.environ)
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(ranks.world),
                   "LOCAL_WORLD_SIZE": str(ranks.world // ranks.nodes)}
    dist.init_process_group("fake", rank=0, world_size=ranks.world, store=FakeStore())
    try:
        yield make_mesh("cpu")
    finally:
        dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)


def prepare_step(built: Built, mesh, how: Choice, dtype: torch.dtype):
    """
    (passes, update, optimizers): the two halves of an optimizer step on random tokens, as Run.train makes it,
    of a built model, which gets empty weights on the CPU: backpropagation with all that sums gradients; and
    the optimizers' part.
    """
    model = built.model
    shard_model(model, mesh, dtype, gradient_checkpointing=how.checkpointing)
    model.to_empty(device="cpu")
    optimizers = setup_optimizers(model, frozen=built.boxes, optimizer=how.optimizer)
    generator = torch.Generator().manual_seed(0)
    shape = 2, how.rows, model.config.sequence_len
    x, y = torch.randint(model.config.vocab_size, shape, generator=generator)

    def passes():
        built.backward(0, x, y, shares([y >= 0])[0])
        reduce_whole(model.parameters())
        float(gradient_norm(model.parameters()))

    def update():
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
    return passes, update, optimizers


class Traced(NamedTuple):
    """Bytes by category at the peak of each half of a step: the passes, and the optimizers' update."""
    passes: dict[str, float]
    update: dict[str, float]

    @property
    def at_peak(self) -> dict[str, float]:
        return max(self, key=lambda part: sum(part.values()))

    @property
    def peak(self) -> float:
        return sum(self.at_peak.values())


def trace_step(built: Built, how: Choice, ranks: Ranks, dtype: torch.dtype = torch.bfloat16,
               gpu_forms: bool = True) -> Traced:
    """Traces a model's second optimizer step on rank 0: the first one makes the optimizers' state."""
    with fake_ranks(ranks) as mesh, traced(gpu_forms) as trace:
        passes, update, optimizers = prepare_step(built, mesh, how, dtype)
        _make_state(built.model, optimizers, trace)
        trace.reset_peak()
        passes()
        at_passes = dict(trace.at_peak)
        trace.reset_peak()
        update()
        return Traced(at_passes, dict(trace.at_peak))


def _make_state(model, optimizers: list, trace: MemoryTrace) -> None:
    """
    Runs an update on empty gradients, which makes the optimizers' state, and tells the trace which tensors are
    of which category.
    """
    trace.mark(model.parameters(), "parameters")
    for p in model.parameters():
        if p.requires_grad:  # what a backward pass would leave
            p.grad = torch.zeros_like(p)
            p.register_post_accumulate_grad_hook(lambda p: trace.mark([p.grad], "gradients"))
    for optimizer in optimizers:
        optimizer.step()
        optimizer.register_step_pre_hook(lambda *_: setattr(trace, "phase", "temporary"))
        optimizer.register_step_post_hook(lambda *_: setattr(trace, "phase", None))
        values = [v for state in optimizer.state.values() for v in state.values()]
        trace.mark([v for v in values if isinstance(v, torch.Tensor)], "optimizer")
    model.zero_grad(set_to_none=True)


def trace_update(built: Built, optimizer: str, ranks: Ranks) -> dict[str, float]:
    """
    Bytes by category at the peak of the optimizers' update alone, which depends on no rows or activations.
    """
    with fake_ranks(ranks) as mesh, traced() as trace:
        _, update, optimizers = prepare_step(built, mesh, Choice(1, False, optimizer), torch.bfloat16)
        _make_state(built.model, optimizers, trace)
        gradients = [torch.zeros_like(p) for p in built.model.parameters() if p.requires_grad]
        for p, gradient in zip((p for p in built.model.parameters() if p.requires_grad), gradients):
            p.grad = gradient
        trace.mark(gradients, "gradients")
        del gradients, gradient
        trace.reset_peak()
        update()
        return dict(trace.at_peak)


def trace_passes(built: Built, rows: int, checkpointing: bool, ranks: Ranks) -> dict[str, float]:
    """Bytes by category at the peak of the passes of a step, without any optimizer's state."""
    with fake_ranks(ranks) as mesh, traced() as trace:
        passes, _, _ = prepare_step(built, mesh, Choice(rows, checkpointing), torch.bfloat16)
        parameters = list(built.model.parameters())
        trace.mark(parameters, "parameters")
        for p in parameters:
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p: trace.mark([p.grad], "gradients"))
        trace.reset_peak()
        passes()
        return dict(trace.at_peak)


def measured_speed(workload: Workload, mesh, rows: int, passes: int, dtype: torch.dtype) -> float:
    """
    Tokens per second of all ranks in a training step of so many passes, by running one pass and one update on
    empty weights, on the CPU, after an untimed warm-up round.
    """
    step, update, _ = prepare_step(built := workload.build(), mesh, Choice(rows, False), dtype)
    with torch.no_grad():
        for p in built.model.parameters():
            p.zero_()
    for _ in range(2):
        times = [time.perf_counter()]
        for part in (step, update):
            part()
            times.append(time.perf_counter())
    tokens = passes * rows * workload.config.sequence_len * get_rank()[1]
    slowest = max(everyone(passes * (times[1] - times[0]) + times[2] - times[1]))
    return tokens / slowest


# -----------------------------------------------------------------------------------------------------------
# The estimate

class Job(NamedTuple):
    """
    One trace, for a process of its own: of the passes (rows and checkpointing given) or of an optimizer's
    update.
    """
    workload: Workload
    ranks: Ranks
    layers: int
    rows: int | None = None
    checkpointing: bool | None = None
    optimizer: str | None = None

    def run(self) -> dict[str, float]:
        torch.set_num_threads(1)
        built = self.workload.with_layers(self.layers).build()
        if self.optimizer is not None:
            return trace_update(built, self.optimizer, self.ranks)
        return trace_passes(built, self.rows, self.checkpointing, self.ranks)


class Estimate:
    """
    Peak memory of a training step on one GPU. made: the result of each of `jobs`. Call `peak` for bytes, `at_peak` for
    their parts.
    """
    def __init__(self, workload: Workload, made: dict[Job, dict[str, float]]):
        self.layers, self.made = workload.config.n_layer, {job[2:]: result for job, result in made.items()}

    def _extended(self, key: str, value, rows: int | None) -> dict[str, float]:
        """
        Of passes (rows given; value: checkpointing) or of an update (value: optimizer), linear in layers and
        rows.
        """
        def linear(points: dict[int, dict], at: int) -> dict[str, float]:
            (a, low), (b, high) = min(points.items()), max(points.items())
            share = (at - a) / (b - a) if b > a else 0.0
            return {k: low[k] + share * (high[k] - low[k]) for k in CATEGORIES}
        by_layers: dict[int, dict] = {}
        for (layers, of_rows, checkpointing, optimizer), result in self.made.items():
            if {"checkpointing": checkpointing, "optimizer": optimizer}[key] == value:
                by_layers.setdefault(layers, {})[of_rows] = result
        at_rows = {n: points[None] if rows is None else linear(points, rows) for n, points in by_layers.items()}
        return linear(at_rows, self.layers)

    def parts(self, how: Choice) -> tuple[dict[str, float], dict[str, float]]:
        """Bytes by category at the peaks of a step's passes and of its update."""
        update = self._extended("optimizer", how.optimizer, None)
        passes = self._extended("checkpointing", how.checkpointing, how.rows)
        return passes | {"optimizer": update["optimizer"]}, update

    def at_peak(self, how: Choice) -> dict[str, float]:
        return max(self.parts(how), key=lambda part: sum(part.values()))

    def peak(self, how: Choice) -> float:
        return sum(self.at_peak(how).values())


def jobs(workload: Workload, ranks: Ranks) -> list[Job]:
    """The traces that an estimate needs, the longest first."""
    layers = LAYERS if workload.config.n_layer > max(LAYERS) else (workload.config.n_layer,)
    passes = [Job(workload, ranks, n, rows, checkpointing)
              for n in reversed(layers) for checkpointing in (True, False) for rows in ROWS]
    return passes + [Job(workload, ranks, n, optimizer=optimizer) for n in layers for optimizer in OPTIMIZERS]


def estimate(workload: Workload, ranks: Ranks, processes: int | None = None) -> Estimate:
    """
    Traces and returns the estimate. processes: how many trace at once, each with a core (None: a core for
    each; 0: in this process, which must have joined no others).
    """
    todo = jobs(workload, ranks)
    if processes == 0:
        return Estimate(workload, {job: job.run() for job in todo})
    made, progress = {}, Progress("estimating the memory of a step", len(todo), "traces", every=10)
    # New processes: tracing replaces parts of torch, and the process group here is the real one.
    with ProcessPoolExecutor(min(len(todo), processes or len(os.sched_getaffinity(0))),
                             multiprocessing.get_context("spawn"), initializer=_hide_gpus) as pool:
        started = {pool.submit(job.run): job for job in todo}
        for future in as_completed(started):
            made[started[future]] = future.result()
            progress.step()
    return Estimate(workload, made)


def _hide_gpus() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


# -----------------------------------------------------------------------------------------------------------
# The choice

def usable(memory: float) -> float:
    """Bytes of a GPU of so many that a step's tensors may take."""
    return memory * (1 - RESERVE_SHARE) - RESERVE_BYTES


def preferences(rows: list[int], fast_rows: int) -> list[Choice]:
    """
    All choices, the best first. rows: those possible. Muon before AdamW; then no checkpointing, if passes
    have at least `fast_rows` rows; then checkpointing; each with as many rows as possible.
    """
    rows = sorted(rows, reverse=True)
    return [choice for optimizer in OPTIMIZERS for choice in (
        *(Choice(r, False, optimizer) for r in rows if r >= fast_rows),
        *(Choice(r, True, optimizer) for r in rows),
        *(Choice(r, False, optimizer) for r in rows if r < fast_rows))]


def possible_rows(workload: Workload, total: int, world: int) -> list[int]:
    """
    Rows per pass, at most MAX_ROWS, that make whole passes of a step of `total` tokens (-1: of about
    GPU_TOKENS, in powers of two); the fewest that the step can have where none do.
    """
    each, least = workload.config.sequence_len * world, workload.least_rows
    if total > 0:
        found = [r for r in range(least, MAX_ROWS + 1) if total % (each * r) == 0]
    else:
        found = [r for r in (1, 2, 4, 8, 16, 32) if least <= r <= min(MAX_ROWS, GPU_TOKENS // each)]
    return found or [least]


def fit(workload: Workload, total: int, given: dict, gpu: Gpu) -> tuple[Choice, str]:
    """
    The choice for the processes that torchrun started, on GPUs like `gpu`, and a line that says what it takes
    there; total: see possible_rows, given: see choose. ValueError where nothing fits. Where the estimate
    itself fails, a warning with what 8 GPUs of 80 GB hold at every stage of nanochat-d32: 8 rows,
    checkpointing, Muon.
    """
    world = get_rank()[1]
    ranks = Ranks(world, world // int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    rows = possible_rows(workload, total, world)
    print0(f"estimating the memory of a training step on {world} x {gpu.name}, on the CPU: up to a minute")
    try:
        peak = estimate(workload, ranks).peak
    except Exception as e:  # tracing relies on torch's internals
        choice = Choice(**{"rows": max(workload.least_rows, min(8, max(rows))), "checkpointing": True} | given)
        fault = f"{type(e).__name__}: {e}"
        return choice, f"warning: the memory of a step could not be estimated ({fault}): trying {choice}"
    T = workload.config.sequence_len
    found = choose(peak, gpu.memory, rows, T, given)
    if found is None:
        raise refusal(peak, gpu.memory, rows, T, given, f"{world} x {gpu.name}")
    choice, needed = found
    reserve = f"{(gpu.memory - usable(gpu.memory)) / 1e9:.1f} GB"
    beside = f"{reserve} are kept free for CUDA, NCCL and fragmentation"
    if needed > usable(gpu.memory):
        beside = f"warning: less is left than the {reserve} that CUDA, NCCL and fragmentation may take"
    return choice, (f"memory: {choice}: about {needed / 1e9:.1f} of {gpu.memory / 1e9:.1f} GB on each {gpu.name}; "
                    f"{beside}")


def choose(peak, memory: float, rows: list[int], sequence_len: int,
           given: dict) -> tuple[Choice, float] | None:
    """
    The best choice and its peak, of those that have the `given` fields and fit in `memory` bytes of each GPU;
    None where none fits. peak: Estimate.peak or a like function. A choice that needs the reserve is taken
    only where flags gave it.
    """
    rows = [given["rows"]] if "rows" in given else rows
    options = [c for c in preferences(rows, min(max(rows), -(-FAST_PASS_TOKENS // sequence_len)))
               if all(getattr(c, k) == v for k, v in given.items())]
    peaks = [(c, peak(c)) for c in options]
    fitting = [(c, p) for c, p in peaks if p <= usable(memory)]
    if not fitting and given:
        fitting = sorted(((c, p) for c, p in peaks if p <= memory), key=lambda pair: pair[1])
    return fitting[0] if fitting else None


def refusal(peak, memory: float, rows: list[int], sequence_len: int, given: dict, where: str) -> ValueError:
    """
    The error for `given` fields that do not fit: what they take, and which flags would. where: the GPUs, in
    words.
    """
    names = {"rows": "--device-batch-size {}", "optimizer": "--optimizer {}"}
    flags = [f"--{'' if v else 'no-'}gradient-checkpointing" if k == "checkpointing" else names[k].format(v)
             for k, v in given.items()]
    least = min(peak(c) for c in preferences([given["rows"]] if "rows" in given else rows, 1)
                if all(getattr(c, k) == v for k, v in given.items()))
    needs = (f"{' '.join(flags) or 'this model'} takes at least {least / 1e9:.1f} GB on each of {where}, which "
             f"have {memory / 1e9:.1f} GB, {usable(memory) / 1e9:.1f} GB beside what CUDA and NCCL take")
    fits = choose(peak, memory, rows, sequence_len, {}) if given else None
    if fits is None:
        return ValueError(f"{needs}: use more GPUs, or larger ones (`python -m scripts.plan --memory` lists what "
                          "fits)")
    return ValueError(f"{needs}: {fits[0].flags()} would fit ({fits[1] / 1e9:.1f} GB)")
