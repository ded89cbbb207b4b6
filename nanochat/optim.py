"""
Optimizers: Muon for the matrices of the blocks, torch's AdamW for the rest, in nanochat's groups.

Every trainable parameter has exactly one owner, found by the first rule whose pattern matches its name.
"""
import re

import torch

from nanochat.common import has_native_bf16

# (pattern of the parameter's name, group). First match wins. Embeddings, head, gates, convolutions, and the SSM's
# A_log, dt_bias, D and norm are never given to Muon: they are no linear maps of the residual stream.
RULES = (
    (r"^lm_head\.", "unembedding"),
    (r"^(transformer\.wte|value_embeds)\.", "embedding"),
    (r"^(gate|predictor)\.", "control"),
    (r"\.(A_log|dt_bias|D|conv1d\.weight|conv1d\.bias|norm\.weight|ve_gate\.weight)$", "scalar"),
    (r"^transformer\.h\.\d+\.(attn|mlp|mamba)\.\w+\.weight$", "matrix"),
)


def group_of(name: str) -> str:
    """Group of a parameter by the first matching rule; a name without one is a bug, not a default."""
    for pattern, group in RULES:
        if re.search(pattern, name):
            return group
    raise AssertionError(f"no optimizer rule covers the parameter {name}")


def orthogonalize(G: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """
    The nearest (semi-)orthogonal matrix of each G (n, rows, cols), roughly: five Newton-Schulz steps with the quintic
    of Keller Jordan's Muon (2024), whose singular values end between about 0.7 and 1.2. In bf16 where that is native.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.to(torch.bfloat16 if has_native_bf16(G.device.type) else torch.float32)
    tall = G.size(-2) > G.size(-1)
    if tall:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return (X.mT if tall else X).to(G.dtype)


class Muon(torch.optim.Optimizer):
    """
    Momentum, then orthogonalised (Jordan et al. 2024), with Nesterov. Matrices of one shape are stacked and go through
    Newton-Schulz together. An update is scaled by sqrt(max(1, rows / cols)), as nanochat does.
    """
    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                assert p.ndim == 2, "Muon takes matrices"
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                buffers = []
                for p in params:
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(p)
                    buffers.append(state["momentum_buffer"])
                grads = [p.grad for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                update = orthogonalize(torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"])))
                lr = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                torch._foreach_add_(params, update.to(params[0].dtype).unbind(0), alpha=-lr)


def setup_optimizers(model, matrix_lr=0.02, embedding_lr=0.2, unembedding_lr=0.004, scalar_lr=0.004,
                     control_lr=0.002) -> list:
    """
    [AdamW, Muon] over the model's trainable parameters (an optimizer without any is left out). AdamW's learning rates
    are given for width 768 and scaled by (width / 768)^-0.5, except the controls', whose size hardly varies; weight decay
    is zero, nanochat-d32's choice. Each group carries its name and `initial_lr`, which the schedule multiplies.
    """
    members = {"embedding": [], "unembedding": [], "scalar": [], "control": [], "matrix": []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            members[group_of(name)].append((name, p))  # a state dict then says whose moments it holds
    owned = [id(p) for params in members.values() for _, p in params]
    trainable = [id(p) for p in model.parameters() if p.requires_grad]
    assert len(owned) == len(set(owned)) and set(owned) == set(trainable), "a parameter has no owner, or two"

    scale = (model.config.n_embd / 768) ** -0.5
    lrs = {"embedding": embedding_lr * scale, "unembedding": unembedding_lr * scale, "scalar": scalar_lr * scale,
           "control": control_lr}
    optimizers = []
    adam_groups = [{"params": members[k], "lr": lr, "initial_lr": lr, "name": k} for k, lr in lrs.items() if members[k]]
    if adam_groups:
        optimizers.append(torch.optim.AdamW(adam_groups, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True))
    if members["matrix"]:
        optimizers.append(Muon([{"params": members["matrix"], "lr": matrix_lr, "initial_lr": matrix_lr, "name": "matrix"}]))
    return optimizers
