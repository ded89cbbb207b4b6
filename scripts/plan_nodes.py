"""
What several nodes exchange in a training step, for scripts/plan.py: the bytes that every collective moves,
counted from the real sharding code (FSDP2, Muon) as rank 0 of a process group that exchanges nothing, and the
step time that links allow.
"""
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat.memory_trace import traced
from nanochat.monitor import PEAK_FLOPS
from nanochat.optim import OPTIMIZERS
from nanochat.step_estimate import Choice, Ranks, Workload, fake_ranks, possible_rows, prepare_step
from nanochat.step_parts import GPU_TOKENS
from scripts.plan_tables import show, step_flops

# c10d's operator -> (name, how often a rank sends each byte that it does not hold, which tensor has all
# bytes)
COLLECTIVES = {"_allgather_base_": ("all-gather", 1, 0), "_reduce_scatter_base_": ("reduce-scatter", 1, 1),
               "allreduce_": ("all-reduce", 2, 0), "alltoall_base_": ("all-to-all", 1, 1)}
SILENT = {"barrier", "monitored_barrier_"}
LAYERS = (4, 8)  # traced; what passes exchange is linear in the number of layers
ROWS = 4  # per pass, where --device-batch-size does not say


class Exchanges(TorchDispatchMode):
    """
    While it is active, adds up in `sent` {(collective, 'node' or 'network'): [calls, bytes]} what rank 0
    sends to others, by rings: of S bytes over n ranks (n - 1) / n S in an all-gather or reduce-scatter, twice
    that in an all-reduce. 'network': some of the ranks are on other nodes than rank 0, which has the first
    `per_node` of them.
    """
    def __init__(self, per_node: int):
        super().__init__()
        self.per_node, self.sent = per_node, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and func.overloadpacket.__name__ not in SILENT:
            self._count(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def _count(self, operator: str, args) -> None:
        assert operator in COLLECTIVES, f"the sharding code calls c10d.{operator}, which is not counted"
        name, times, which = COLLECTIVES[operator]
        group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject)
                     and a._type().name() == "ProcessGroup")
        ranks = dist.get_process_group_ranks(group)
        tensors = args[which] if isinstance(args[which], (list, tuple)) else [args[which]]
        size = sum(t.numel() * t.element_size() for t in tensors)
        if name == "all-to-all" and (splits := args[4]):  # the input's rows for each rank; rank 0 keeps its own
            size = size * (1 - splits[0] / max(1, sum(splits)))
        else:
            size = times * size * (len(ranks) - 1) / len(ranks)
        entry = self.sent.setdefault((name, "node" if max(ranks) < self.per_node else "network"), [0, 0.0])
        entry[0] += 1
        entry[1] += size


def exchanged(workload: Workload, how: Choice, ranks: Ranks, update: bool) -> dict:
    """Exchanges.sent of one pass of a step, gradients summed, or of the optimizers' update."""
    built, count = workload.build(), Exchanges(ranks.world // ranks.nodes)
    with fake_ranks(ranks) as mesh, traced():
        passes, step, _ = prepare_step(built, mesh, how, torch.bfloat16)
        if update:
            for p in built.model.parameters():
                p.grad = torch.zeros_like(p) if p.requires_grad else None
        with count:
            (step if update else passes)()
    return count.sent


def step_exchanges(workload: Workload, how: Choice, ranks: Ranks, passes: int) -> dict:
    """
    Exchanges.sent of an optimizer step of so many passes. Passes are traced at two depths and extended
    linearly; the update, in which ranks share out whole matrices, at full depth. What is exchanged once a
    step, not once a pass (norms, gradients of what every rank holds whole), is counted once a pass: it is
    small.
    """
    n = workload.config.n_layer
    if n > max(LAYERS):
        low, high = (exchanged(workload.with_layers(k), how, ranks, False) for k in LAYERS)
        share = (n - LAYERS[0]) / (LAYERS[1] - LAYERS[0])
        one = {k: [a + share * (b - a) for a, b in zip(low[k], high[k])] for k in high}
    else:
        one = exchanged(workload, how, ranks, False)
    sent = {k: [passes * calls, passes * size] for k, (calls, size) in one.items()}
    for k, (calls, size) in exchanged(workload, how, ranks, True).items():
        before = sent.get(k, [0, 0.0])
        sent[k] = [before[0] + calls, before[1] + size]
    return sent


def show_nodes(stages, args) -> dict:
    """
    Prints and returns, for each stage and each number of nodes, what a step exchanges and how long it takes.
    """
    result = {}
    for stage in stages:
        flops = sum(step_flops(stage.model).values())
        for nodes in args.nodes:
            ranks = Ranks(args.gpus * nodes, nodes)
            print(f"{stage.phase} on {ranks.world} GPUs: tracing, up to a minute", flush=True)
            result[f"{stage.phase}, {ranks.world} GPUs"] = _show_one(stage, ranks, flops, args)
    print("\n  Bytes are those that one GPU sends in an optimizer step. 'node': to GPUs of its own node, at "
          "--nvlink; 'network': where\n  other nodes take part, at --network. A step takes between the compute "
          "alone, if all exchange overlaps with it,\n  and the sum of both. Compute: "
          f"{args.mfu:.0%} of the {args.gpu}'s bf16 peak. Latency is not counted.")
    return result


def _show_one(stage, ranks: Ranks, flops: float, args) -> dict:
    T = stage.model.config.sequence_len
    possible = possible_rows(stage.workload, -1, ranks.world)
    rows = max(r for r in possible if r <= max(possible[0], args.device_batch_size or ROWS))
    one_pass = rows * T * ranks.world
    passes = max(1, GPU_TOKENS // one_pass)
    sent = step_exchanges(stage.workload, Choice(rows, False, OPTIMIZERS[0]), ranks, passes)
    speed = {"node": args.nvlink * 1e9, "network": args.network * 1e9}
    compute = passes * one_pass * flops / ranks.world / (PEAK_FLOPS[args.gpu] * args.mfu)
    seconds = {k: size / speed[k[1]] for k, (_, size) in sent.items()}
    total = sum(seconds.values())
    show(f"{stage.phase} on {ranks.nodes} x {args.gpus} GPUs: {passes} x {rows} rows of {T} tokens each, "
         f"{passes * one_pass:,} tokens per step",
         ["collective", "within", "calls", "GB per GPU", "seconds"],
         [[name, where, f"{calls:,.0f}", f"{size / 1e9:.2f}", f"{seconds[name, where]:.3f}"]
          for (name, where), (calls, size) in sorted(sent.items())])
    print(f"  compute {compute:.2f} s, exchange {total:.2f} s: a step takes {max(compute, total):.2f} to "
          f"{compute + total:.2f} s")
    return {"rows": rows, "passes": passes, "compute_s": compute, "exchange_s": total,
            "sent": {f"{name}, {where}": {"calls": calls, "bytes": size}
                     for (name, where), (calls, size) in sent.items()}}
