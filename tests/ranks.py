"""
Several processes that train together through gloo, for tests: started as torchrun starts them, but forked from a server that
has imported everything already, since importing torch costs more than the tests do.
"""
import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from nanochat import distributed, optim, stages, step_checkpoint
from nanochat.checkpoint_manager import build_model, load_state
from nanochat.elastic_step import TAUGHT, ElasticStep
from nanochat.growing import Init, grow
from nanochat.hybrid_gpt import HybridConfig
from nanochat.optim import setup_optimizers
from nanochat.step_parts import set_rates, shares

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


def finish(processes: list, seconds: float = 900) -> list[int]:
    """Their exit codes, negative for a signal."""
    for p in processes:
        p.join(seconds)
        if p.is_alive():
            p.kill()
            p.join()
    return [p.exitcode for p in processes]


def evaluated(file: Path) -> None:
    """Whether passes gather a sharded model's units once in gathered_once, and change nothing: rank 0 writes what it saw."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group
    distributed.init_processes("cpu")
    torch.manual_seed(0)
    model = build_model(TINY)
    model.init_weights()
    distributed.shard_model(model, distributed.make_mesh("cpu"), torch.float32)
    x, gathers, gather = torch.randint(TINY.vocab_size, (2, T)), [], _fsdp_param_group.foreach_all_gather
    _fsdp_param_group.foreach_all_gather = lambda *args: gathers.append(1) or gather(*args)
    seen = []

    def run():
        gathers.clear()
        with torch.no_grad():
            loss = float(model(x, x, widths=16)[0])
        seen.append((loss, len(gathers)))
    run()
    with distributed.gathered_once(model):
        run()
        run()
    run()
    model(x, x)[0].backward()  # as training goes on
    trained = [p for name, p in model.named_parameters() if name.endswith("mlp.c_fc.weight")]
    assert all(isinstance(p, DTensor) and p.grad is not None for p in trained)
    if distributed.get_rank()[0] == 0:
        torch.save(seen, file)
    distributed.leave()


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
          draft_exit: int | None = None, student_every: int = 1, **options) -> dict:
    """
    Trains on the same global batches on any number of ranks; {'losses': of each step, 'state': whole weights at the end},
    into `path` on rank 0 and returned.
    """
    distributed.init_processes("cpu")
    rank, world = distributed.get_rank()
    source, boxes = start_model(phase)
    model = build_model(source.config, "meta")
    stages.set_trained(model, phase, gate=recipe in TAUGHT, boxes=boxes)
    distributed.shard_model(model, distributed.make_mesh("cpu", nodes), torch.float32, **options)
    model.to_empty(device="cpu")
    if world > 1:
        distributed.load_shards(model, source.state_dict())
    else:
        load_state(model, source.state_dict(), "the test's model")
    optimizers = setup_optimizers(model, weight_decay=0.1, frozen=boxes)
    step_of, history = ElasticStep(model, 5, steps, recipe, sample, None, student_every, draft_exit=draft_exit), []
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
        for (a, b), share in zip(batches, shares([b >= 0 for _, b in batches])):
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
    return result


def several(cases: dict, folder: Path) -> None:
    """train(**case) for each, into folder/<name>.pt."""
    for name, case in cases.items():
        train(**case, path=folder / f"{name}.pt")
    distributed.leave()


def fractal(argv: list[str], fault=None) -> None:
    """scripts.fractal_train as one rank. fault: (kind, rank, step), what happens where in that step."""
    from scripts import fractal_train
    if fault is not None:
        inject(*fault)
    fractal_train.main(argv)


def inject(kind: str, rank: int, at: int) -> None:
    if int(os.environ["RANK"]) != rank:
        return
    call, check = ElasticStep.__call__, step_checkpoint._sum

    def step(self, number, *args):
        if number == at and kind in ("SIGKILL", "SIGTERM", "SIGINT"):
            os.kill(os.getpid(), getattr(signal, kind))
        return call(self, number, *args)

    def killed_in_save(path):
        if path.parent.name == f".step_{at:06d}.tmp":
            os.kill(os.getpid(), signal.SIGKILL)
        return check(path)
    ElasticStep.__call__ = step
    if kind == "kill in save":
        step_checkpoint._sum = killed_in_save


def waits(path) -> None:
    """
    Writes to `path` how long, in seconds, the groups of a run wait for a rank, and when, by rank 1's clock, a barrier let it
    go on whose last rank came after two seconds.
    """
    distributed.init_processes("cpu")
    saver, cpu, since = step_checkpoint.Saver(path.parent, keep=1), torch.device("cpu"), time.perf_counter()
    groups = torch.distributed.group.WORLD, saver.group
    if distributed.get_rank()[0] == 0:
        time.sleep(2)
    distributed.barrier()
    if distributed.get_rank()[0] == 1:
        timeouts = [g._get_backend(cpu).options._timeout.total_seconds() for g in groups]
        torch.save([timeouts, time.perf_counter() - since], path)
    distributed.leave()


def orthogonalized(world: int, nodes: int, path) -> None:
    """Muon's updates of sharded matrices, the elements that each exchange sends to others, and the updates of the same
    matrices where every rank holds them whole, into `path`."""
    distributed.init_processes("cpu")
    mesh, moved = distributed.make_mesh("cpu", nodes), []
    exchange = optim.dist.all_to_all_single

    def counted(out, sent, out_sizes, in_sizes, group):
        moved.append(sum(n for r, n in enumerate(in_sizes) if r != group.rank()))
        return exchange(out, sent, out_sizes, in_sizes, group=group)
    optim.dist.all_to_all_single = counted
    results = {}
    for shape in ((12, 8), (7, 16), (2, 4)):
        whole = torch.randn(5, *shape, generator=torch.Generator().manual_seed(1))
        placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
        shards = [distribute_tensor(m, mesh, placements) for m in whole]
        moved.clear()
        done = optim.orthogonalize_shards([s.to_local() for s in shards], shape[0], mesh)
        full = [DTensor.from_local(d, mesh, placements, shape=s.shape, stride=s.stride()).full_tensor()
                for d, s in zip(done, shards)]
        alike = torch.stack(optim.orthogonalize_whole(list(whole)))
        assert torch.equal(distributed.all_sum(alike.double()), alike.double() * world)  # on every rank
        results[shape] = torch.stack(full), distributed.all_sum(torch.tensor(moved)).tolist(), alike
    if distributed.get_rank()[0] == 0:
        torch.save(results, path)
    distributed.leave()
