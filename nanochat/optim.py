"""
Optimizers: Muon for the matrices of the blocks, torch's AdamW for the rest, in nanochat's groups; or AdamW for all, which
keeps 4 bytes more per matrix entry and needs no buffers beside that.

Every trainable parameter has exactly one owner, found by the first rule whose pattern matches its name. Both optimizers
run on whole or sharded parameters (distributed.py), and both leave the old corner of a grown matrix bit for bit as it is
where stages.py says so.
"""
import re

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from nanochat.common import get_compute_dtype
from nanochat.distributed import local, local_rows

# (pattern of the parameter's name, group). First match wins. Embeddings, head, gates, convolutions, and the SSM's
# A_log, dt_bias, D and norm are never given to Muon: they are no linear maps of the residual stream.
RULES = (
    (r"^lm_head\.", "unembedding"),
    (r"^(transformer\.wte|value_embeds)\.", "embedding"),
    (r"^(gate|predictor)\.", "control"),
    (r"\.(A_log|dt_bias|D|conv1d\.weight|conv1d\.bias|norm\.weight|ve_gate\.weight)$", "scalar"),
    (r"^transformer\.h\.\d+\.(attn|mlp|mamba)\.\w+\.weight$", "matrix"),
)

OPTIMIZERS = ("muon", "adamw")  # what steps the matrices of the blocks
MATRIX_LR = {"muon": 0.02, "adamw": 0.003}  # default learning rates of these; AdamW's at width 768 (dev/LOG.md)
CONTROL_LR = 0.002


def group_of(name: str) -> str:
    """Group of a parameter by the first matching rule; a name without one is a bug, not a default."""
    for pattern, group in RULES:
        if re.search(pattern, name):
            return group
    raise AssertionError(f"no optimizer rule covers the parameter {name}")


def orthogonalize(G: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """
    The nearest (semi-)orthogonal matrix of each G (n, rows, cols), roughly: five Newton-Schulz steps with the quintic
    of Keller Jordan's Muon (2024), whose singular values end between about 0.7 and 1.2. In the device's compute dtype.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.to(get_compute_dtype(G.device.type))
    tall = G.size(-2) > G.size(-1)
    if tall:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return (X.mT if tall else X).to(G.dtype)


def orthogonalize_shards(shards: list[torch.Tensor], rows: int, mesh) -> list[torch.Tensor]:
    """
    orthogonalize() of matrices of one shape of which each rank holds some rows, (its rows, cols); returns those rows of
    the results. One exchange brings each rank the whole of its share of the matrices, one takes the rows back; no matrix
    is computed twice. Where nodes hold copies of the shards, each computes its part and all learn the results.
    """
    def among_ranks(shards):
        return _among_ranks(shards, rows, mesh.get_group("shard"))
    return among_ranks(shards) if mesh.ndim == 1 else _each_its_part(shards, among_ranks, mesh.get_group("replicate"))


def orthogonalize_whole(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    """
    orthogonalize() of matrices of one shape that every rank holds whole and alike: each computes its part, all learn all.
    All ranks must call it for the same shapes, in one order.
    """
    def compute(some):
        return list(orthogonalize(torch.stack(some)))
    return _each_its_part(matrices, compute, dist.group.WORLD) if dist.is_initialized() else compute(matrices)


def _each_its_part(matrices: list[torch.Tensor], compute, group) -> list[torch.Tensor]:
    """compute(matrices), of what all ranks of the group hold alike: each computes every n-th, and all get all."""
    n, some = group.size(), matrices[group.rank()::group.size()]
    # in orthogonalize's dtype: it has rounded already
    mine = torch.zeros(-(-len(matrices) // n), *matrices[0].shape, dtype=get_compute_dtype(matrices[0].device.type),
                       device=matrices[0].device)
    for out, done in zip(mine, compute(some) if some else ()):
        out.copy_(done)
    each = mine.new_empty(n, *mine.shape)
    dist.all_gather_single(each.flatten(0, 1), mine, group=group)
    return [each[i % n, i // n].to(m.dtype) for i, m in enumerate(matrices)]


def _among_ranks(shards, rows, group):
    world, me = group.size(), group.rank()
    n, (held, cols) = len(shards), shards[0].shape
    share = [n // world + (r < n % world) for r in range(world)]  # matrices that each rank computes
    height = -(-rows // world)
    heights = [max(0, min(height, rows - r * height)) for r in range(world)]  # rows that each rank holds
    assert held == heights[me]
    out_sizes = [count * held * cols for count in share]
    in_sizes = [share[me] * h * cols for h in heights]

    # in the dtype that orthogonalize computes in: rounding before or after the exchange is the same, and bf16 is half
    sent = torch.stack(shards).to(get_compute_dtype(shards[0].device.type)).flatten()
    got = sent.new_empty(sum(in_sizes))
    dist.all_to_all_single(got, sent, in_sizes, out_sizes, group=group)
    if share[me]:
        whole = torch.cat([part.view(share[me], -1, cols) for part, h in zip(got.split(in_sizes), heights) if h], 1)
        done = orthogonalize(whole).split([h for h in heights if h], 1)
        got = torch.cat([part.flatten() for part in done])
    back = torch.empty_like(sent)
    dist.all_to_all_single(back, got, out_sizes, in_sizes, group=group)
    return list(back.view(n, held, cols).to(shards[0].dtype).unbind(0))


def frozen_views(p: torch.Tensor, boxes: list, of: torch.Tensor) -> list[torch.Tensor]:
    """What this rank holds, in `of` (its part of p or of something of p's shape), of the boxes of the whole p."""
    if not isinstance(p, DTensor):
        return [of[box] for box in boxes]
    here = local_rows(p)
    views = []
    for rows, *cols in boxes:
        start, stop = max(rows.start, here.start) - here.start, min(rows.stop, here.stop) - here.start
        if start < stop:
            views.append(of[(slice(start, stop), *cols)])
    return views


class Muon(torch.optim.Optimizer):
    """
    Momentum, then orthogonalised (Jordan et al. 2024), with Nesterov. Matrices of one shape go through Newton-Schulz
    together, shared out among the ranks that hold them or their rows. An update is scaled by sqrt(max(1, rows / cols)), as
    nanochat does. frozen: parameter -> boxes (tuples of slices) of it that no update reaches, nor weight decay.
    """
    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0, frozen=None):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.frozen = frozen or {}

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                assert p.ndim == 2, "Muon takes matrices"
                if p.grad is not None:
                    by_shape.setdefault((p.shape, isinstance(p, DTensor)), []).append(p)
            for (shape, sharded), params in by_shape.items():
                for p in params:
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                weights, grads = [local(p) for p in params], [local(p.grad) for p in params]
                buffers = [local(self.state[p]["momentum_buffer"]) for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                updates = torch._foreach_lerp(grads, buffers, group["momentum"])
                if sharded:
                    updates = orthogonalize_shards(updates, shape[0], params[0].device_mesh)
                else:
                    updates = [u.to(weights[0].dtype) for u in orthogonalize_whole(updates)]
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                if group["weight_decay"]:
                    updates = torch._foreach_add(updates, weights, alpha=group["weight_decay"] / scale)
                for p, update in zip(params, updates):
                    for old in frozen_views(p, self.frozen.get(p, ()), update):
                        old.zero_()
                torch._foreach_add_(weights, updates, alpha=-group["lr"] * scale)


class AdamW(torch.optim.AdamW):
    """torch's, fused. frozen: parameter -> boxes (tuples of slices) of it that keep their values; see Muon."""
    def __init__(self, groups, frozen=None, **options):
        super().__init__(groups, fused=True, **options)
        self.frozen = frozen or {}

    @torch.no_grad()
    def step(self):
        # torch's step makes no update that one could mask: what is frozen is put back
        kept = [(old, old.clone()) for p, boxes in self.frozen.items() if p.grad is not None
                for old in frozen_views(p, boxes, local(p))]
        super().step()
        for old, before in kept:
            old.copy_(before)


def setup_optimizers(model, matrix_lr=0.02, embedding_lr=0.2, unembedding_lr=0.004, scalar_lr=0.004,
                     weight_decay=0.0, frozen: dict | None = None, optimizer: str = "muon") -> list:
    """
    [AdamW, Muon] over the model's trainable parameters (an optimizer without any is left out), or, with optimizer 'adamw',
    AdamW over all of them; matrix_lr is then AdamW's too (MATRIX_LR has both defaults). AdamW's learning rates
    are given for width 768 and scaled by (width / 768)^-0.5, except the controls', whose size hardly varies. weight_decay:
    of matrices, embeddings and head (0 is nanochat-d32's choice). frozen: name -> boxes that stay as they are (stages.py).
    Each group carries its name and `initial_lr`, which the schedule multiplies.
    """
    members, boxes = {}, {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            # whole and sharded tensors do not mix in one fused step
            members.setdefault((group_of(name), isinstance(p, DTensor)), []).append((name, p))
            if frozen and name in frozen:
                boxes[p] = frozen[name]
    owned = [id(p) for params in members.values() for _, p in params]  # a state dict says whose moments it holds
    trainable = [id(p) for p in model.parameters() if p.requires_grad]
    assert len(owned) == len(set(owned)) and set(owned) == set(trainable), "a parameter has no owner, or two"

    assert optimizer in OPTIMIZERS, optimizer
    scale = (model.config.n_embd / 768) ** -0.5
    matrix_lr *= 1.0 if optimizer == "muon" else scale
    rates = {"embedding": (embedding_lr * scale, weight_decay), "unembedding": (unembedding_lr * scale, weight_decay),
             "scalar": (scalar_lr * scale, 0.0), "control": (CONTROL_LR, 0.0), "matrix": (matrix_lr, weight_decay)}
    groups = [{"params": members[kind, sharded], "lr": lr, "initial_lr": lr, "weight_decay": decay, "name": kind}
              for kind, (lr, decay) in rates.items() for sharded in (False, True) if (kind, sharded) in members]
    muon = [g for g in groups if g["name"] == "matrix" and optimizer == "muon"]
    adam = [g for g in groups if g not in muon]
    optimizers = []
    if adam:
        optimizers.append(AdamW(adam, _of(adam, boxes), betas=(0.8, 0.95), eps=1e-10))
    if muon:
        optimizers.append(Muon(muon, frozen=_of(muon, boxes)))
    return optimizers


def _of(groups, boxes):
    own = {p for g in groups for _, p in g["params"]}
    return {p: b for p, b in boxes.items() if p in own}


def state_bytes(model, optimizer: str = "muon") -> tuple[int, int]:
    """Bytes of optimizer state, fp32: of the trainable parameters, and if all were trained. Works on the meta device."""
    each = [(p.numel() * (4 if group_of(name) == "matrix" and optimizer == "muon" else 8), p.requires_grad)
            for name, p in model.named_parameters()]
    return sum(n for n, trained in each if trained), sum(n for n, _ in each)
