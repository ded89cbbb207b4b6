"""
What training's stages cost, for scripts/bench.py: a stage-1 step and a student pass against what their FLOPs predict, and
the optimizer shared out among two processes: the bytes it moves, and its time against one that has the whole model.
"""
import copy
import os
import socket
import statistics
import time

import torch
import torch.multiprocessing as mp

from nanochat import distributed, optim
from nanochat.checkpoint_manager import build_model
from nanochat.common import get_compute_dtype
from nanochat.elastic_step import ElasticStep
from nanochat.gpt import GPTConfig
from nanochat.hybrid_gpt import HybridConfig
from nanochat.loss_eval import Student, matryoshka_backward
from nanochat.stages import set_trained
from scripts.bench_tools import median_ratio, paired_times


def muon_flops(model) -> float:
    """Of one step: five Newton-Schulz steps, each X X^T, its square, and a product with X, for every trained matrix."""
    shapes = [sorted(p.shape) for name, p in model.named_parameters()
              if p.requires_grad and optim.group_of(name) == "matrix"]
    return sum(5 * (4 * m * m * n + 2 * m ** 3) for m, n in shapes)


def bench_stages(model, rounds: int) -> dict:
    """model: a hybrid, all of it trained, on 8 x 512 tokens."""
    x, y = torch.randint(model.config.vocab_size, (2, 8, 512))
    first = copy.deepcopy(model)
    set_trained(first, "stage 1")
    set_trained(model, "unfrozen")
    optimizers = {id(m): optim.setup_optimizers(m) for m in (model, first)}

    def step(m, students=()):
        matryoshka_backward(m, x, y, list(students), 1.0)
        for o in optimizers[id(m)]:
            o.step()
        m.zero_grad(set_to_none=True)
    whisper = model.config.modes["whisper"]
    times = paired_times({"full": lambda: step(model), "stage 1": lambda: step(first),
                          "student": lambda: step(model, [Student(whisper)])}, rounds)
    counts = {k: ElasticStep(m, seed=0, steps=1, recipe="both") for k, m in (("full", model), ("stage 1", first))}
    flops = {k: count.flops(None, x.numel()) + muon_flops(count.model) for k, count in counts.items()}
    flops["student"] = flops["full"] + counts["full"].student_flops([Student(whisper)], x)
    out = {}
    for kind, name in (("stage 1", "a stage-1 step"), ("student", "a step with a student pass at whisper")):
        measured, predicted = median_ratio(times, kind, "full"), flops[kind] / flops["full"]
        out[kind.replace(" ", "")] = {"time": measured, "flops": predicted, "time_over_flops": measured / predicted}
        print(f"{name} takes {measured:.2f} of a full step, FLOPs predict {predicted:.2f}: {measured / predicted:.2f}x",
              flush=True)
    return out


def bench_sharded(rounds: int) -> dict:
    """Muon's and AdamW's step of a hybrid d512 x 8+8 on two processes, gloo, a core each, against one with both cores."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with mp.get_context("spawn").Pool(2) as pool:  # each worker takes one rank: both wait for the other
        alone = pool.apply(_sharded_step, (0, 1, 0, rounds))
        shared, _ = pool.starmap(_sharded_step, [(rank, 2, port, rounds) for rank in range(2)], chunksize=1)
    ratio = alone["seconds"] / shared["seconds"]
    print(f"optimizer step on 2 processes: {shared['sent'] / 1e6:.1f} MB sent, {shared['sent'] / shared['ideal']:.3f}x of "
          f"one gather and one scatter of each matrix, {shared['exchanges']} exchanges for {shared['matrices']} matrices; "
          f"{shared['seconds'] * 1e3:.0f} ms, {ratio:.2f}x as fast as one process on both cores", flush=True)
    return {**shared, "speedup": ratio}


def _sharded_step(rank: int, world: int, port: int, rounds: int) -> dict:
    torch.set_num_threads(2 // world)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_processes("cpu")
    model = build_model(HybridConfig.from_base(GPTConfig.from_depth(8, 8192, 512)))
    torch.manual_seed(0)
    model.init_weights()
    distributed.shard_model(model, distributed.make_mesh("cpu"), get_compute_dtype("cpu"))
    optimizers = optim.setup_optimizers(model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    sent, exchange, times = [], optim.dist.all_to_all_single, []

    def counted(out, data, out_sizes, in_sizes, group):
        sent.append(data.element_size() * sum(n for r, n in enumerate(in_sizes) if r != rank))
        return exchange(out, data, out_sizes, in_sizes, group=group)
    optim.dist.all_to_all_single = counted
    for _ in range(rounds + 1):
        sent.clear()
        start = time.perf_counter()
        for o in optimizers:
            o.step()
        times.append(time.perf_counter() - start)
    optim.dist.all_to_all_single = exchange
    matrices = [p for g in optimizers[1].param_groups for p in g["params"]]
    # half of each matrix is at home on the rank that computes it; the other half comes, and its result goes back
    ideal = sum(p.numel() for p in matrices) * get_compute_dtype("cpu").itemsize * (world - 1) / world * 2
    total = distributed.all_sum(torch.tensor(float(sum(sent)))).item()
    result = {"seconds": statistics.median(times[1:]), "sent": total, "ideal": ideal, "exchanges": len(sent),
              "matrices": len(matrices)}
    distributed.leave()
    return result
