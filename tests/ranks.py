"""
Several processes that train together through gloo, for tests: started as torchrun starts them, but forked from a server that
has imported everything already, since importing torch costs more than the tests do.
"""
import contextlib
import multiprocessing
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

import torch

from nanochat import distributed, stages
from nanochat.checkpoint_manager import build_model, load_state
from nanochat.elastic_step import ElasticStep
from nanochat.growing import Init, grow
from nanochat.hybrid_gpt import HybridConfig
from nanochat.optim import setup_optimizers
from nanochat.training import Share, set_rates, shares

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["ranks", "scripts.fractal_train", "scripts.base_train", "conftest"])

TINY = HybridConfig(sequence_len=32, vocab_size=64, n_layer=2, n_head=4, n_kv_head=4, n_embd=32, d_ref=32, top_width=32,
                    mamba_expand=2, mamba_headdim=8, mamba_d_state=8, mamba_group_width=16)
ROWS, T, STEPS = 8, 24, 20  # the global batch


def start(world: int, fn, *args, out: Path, env=()) -> list:
    """Processes that run fn(*args) as ranks 0 to world - 1; what rank r prints goes to out/r.log."""
    out.mkdir(parents=True, exist_ok=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for rank in range(world):
        e = dict(os.environ, RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
                 MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", **dict(env))
        processes.append(context.Process(target=_child, args=(e, out / f"{rank}.log", fn, args)))
        processes[-1].start()
    return processes


def finish(processes: list, seconds: float = 120) -> list[int]:
    """Their exit codes, negative for a signal."""
    for p in processes:
        p.join(seconds)
        if p.is_alive():
            p.kill()
            p.join()
    return [p.exitcode for p in processes]


def together(world: int, fn, *args, out: Path, env=()) -> None:
    codes = finish(start(world, fn, *args, out=out, env=env))
    assert codes == [0] * world, (codes, *((out / f"{r}.log").read_text()[-2000:] for r in range(world)))


def _child(env, log, fn, args):
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(1)
    with open(log, "w", buffering=1) as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
        with contextlib.suppress(BrokenPipeError):
            fn(*args)


# ---------------------------------------------------------------------------------------------------------------------
# What the ranks do

def start_model(phase: str):
    """A small hybrid whose every weight is non-zero, and what is old in it, for a phase."""
    from conftest import randomize
    model = randomize(build_model(TINY))
    if phase != "stage 2":
        return model, None
    grown = grow(model, 48, Init("copy"))
    old = {k: getattr(TINY, k) for k in HybridConfig.__dataclass_fields__}
    return grown, stages.frozen_boxes(grown.config, {"surgery": "grow", "old_config": old})


def train(phase: str, recipe, sample: bool, path, steps: int = STEPS, nodes: int = 1, passes: int = 1, masked: bool = False,
          **options) -> dict:
    """
    Trains on the same global batches on any number of ranks; {'losses': of each step, 'state': whole weights at the end},
    into `path` on rank 0 and returned.
    """
    distributed.init_processes("cpu")
    rank, world = distributed.get_rank()
    source, boxes = start_model(phase)
    model = build_model(source.config, "meta")
    stages.set_trained(model, phase, gate=recipe not in (None, "single"), boxes=boxes)
    distributed.shard_model(model, distributed.make_mesh("cpu", nodes), torch.float32, **options)
    model.to_empty(device="cpu")
    if world > 1:
        distributed.load_shards(model, source.state_dict())
    else:
        load_state(model, source.state_dict(), "the test's model")
    optimizers = setup_optimizers(model, weight_decay=0.1, frozen=boxes)
    step_of, history = ElasticStep(model, 5, steps, recipe, sample), []
    for step in range(steps):
        set_rates(optimizers, step, steps, 0.0, 0.5)
        g = torch.Generator().manual_seed(step)
        tokens = torch.randint(64, (ROWS, T + 1), generator=g)
        x, y = tokens[:, :-1], tokens[:, 1:].clone()
        if masked:  # as conversations are: some rows hold little that is supervised, one nothing
            y[torch.rand(ROWS, T, generator=g) < torch.linspace(0, 1, ROWS)[:, None]] = -1
        n = ROWS // passes
        batches = [(x[i * n:][:n][rank::world], y[i * n:][:n][rank::world]) for i in range(passes)]
        losses = {}
        for (a, b), share in zip(batches, shares(batches)):
            for k, v in step_of(step, a, b, share).items():
                losses[k] = losses.get(k, 0) + float(v)
        distributed.reduce_whole(model.parameters())
        losses["norm"] = float(distributed.gradient_norm(model.parameters())) / world
        for opt in optimizers:
            opt.step()
        model.zero_grad(set_to_none=True)
        history.append(dict(zip(losses, distributed.all_sum(torch.tensor(list(losses.values()))).tolist())))
    result = {"losses": history, "state": distributed.full_state(model)}
    if rank == 0 and path is not None:
        torch.save(result, path)
    distributed.leave()
    return result


def run_script(main, argv) -> None:
    main(argv)


__all__ = ["ROWS", "STEPS", "TINY", "Share", "T", "context", "finish", "replace", "run_script", "start", "start_model",
           "together", "train"]
