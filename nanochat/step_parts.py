"""
What a training step needs beside its losses: which part of the batch each pass is, its FLOPs, the learning rates. Apart
from the loop (training.py), so that a step can run without a tokenizer and without data, as `scripts.gpu_check` does.
"""
from typing import NamedTuple

import torch

from nanochat.distributed import all_sum
from nanochat.loss_eval import PROBED
from nanochat.matryoshka import block_cost

GPU_TOKENS = 524288  # per optimizer step on GPUs, as nanochat


class Share(NamedTuple):
    """
    What part one pass of one rank has of a step's supervised tokens, of those that gate and exits learn from, of its passes;
    number: which of the step's passes it is, on all ranks. live: which of the pass's targets are supervised, (B, T) bool on
    the CPU (None: whoever needs it computes it from the targets, and waits for the device that holds them).
    """
    tokens: float
    probed: float
    passes: float
    number: int = 0
    live: torch.Tensor | None = None


def shares(live: list[torch.Tensor]) -> list[Share]:
    """
    Of this rank's passes in a step of all ranks. live: which targets of each pass are supervised, (B, T) bool on the CPU.
    Tokens and probed add up to 1 over passes and ranks.
    """
    of_rows = [mask.sum(1) for mask in live]
    counts = torch.stack([torch.stack((n.sum(), n.clamp(max=PROBED).sum())) for n in of_rows]).double()
    total = all_sum(counts.sum(0)).clamp(min=1)
    return [Share(*row, 1 / len(live), i, mask) for i, (row, mask) in enumerate(zip((counts / total).tolist(), live))]


def pass_flops(model, widths=None, context: float = 0) -> float:
    """
    FLOPs per token of a forward and backward pass at one width, or a width per block: every product once forward and once
    for its input's gradient, and for its weight's only where that is trained; attention and scan twice backward.
    """
    def both(cost, module):
        trained = [p.requires_grad for p in module.parameters() if p.ndim == 2 and min(p.shape) > 32]
        return cost.matmul * (2 + sum(trained) / max(1, len(trained))) + 3 * (cost.attention + cost.scan)
    blocks = sum(both(cost, block) for block, d in zip(model.transformer.h, model.resolve_widths(widths))
                 for cost in block_cost(block, d, context))
    return blocks + both(model.cost()["head"], model.lm_head)


def lr_multiplier(step: int, total: int, warmup_ratio: float, warmdown_ratio: float) -> float:
    """Linear warm-up, constant, linear warm-down to zero after the last step."""
    warmup, warmdown = round(warmup_ratio * total), round(warmdown_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    return min(1.0, (total - step) / warmdown) if warmdown else 1.0


def muon_momentum(step: int) -> float:
    """0.85 rising to 0.95 over the first 300 steps, as in nanochat."""
    return 0.85 + 0.10 * min(step / 300, 1)


def set_rates(optimizers, step: int, total: int, warmup_ratio: float, warmdown_ratio: float) -> float:
    """Learning rates and Muon's momentum of a step, of `total`. Returns the multiplier of the rates."""
    scale = lr_multiplier(step, total, warmup_ratio, warmdown_ratio)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * scale
            if "momentum" in group:
                group["momentum"] = muon_momentum(step)
    return scale
