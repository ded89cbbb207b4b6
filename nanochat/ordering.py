"""
Order before cutting widths: a base GPT is turned so that its leading dims, heads and hidden units carry most.

The norm has no parameters, so the residual stream may be rotated by any orthogonal matrix, as in SliceGPT (Ashkboos et al.
2024, arXiv 2401.15024): here to the principal axes of what the blocks read. Heads and hidden units are then sorted by how
much they write. At full width the function is the same; a width cut from the front loses the least.

Both need the second moments C = E[u u^T] of the normed stream u before each layer: measured on text (`data`), or
propagated through the layers from the weights alone (`weights`), as if activations were Gaussian of mean zero, and
attention looked at one position.
"""
from collections.abc import Callable

import torch

from nanochat.gpt import GPTConfig
from nanochat.matryoshka import norm
from nanochat.streaming import State, streamed

ORDERS = ("none", "weights", "data")
CHUNK = 1 << 13  # rows of an embedding table at a time


class Order:
    """
    rotation (D, D) fp64, whose columns are the axes, heaviest first; heads and units: per layer, the old numbers in their
    new order, int64.
    """
    def __init__(self, config: GPTConfig):
        self.config = config
        self.moments = torch.zeros(config.n_embd, config.n_embd, dtype=torch.float64)
        self.heads, self.units = [], []

    def see(self, C: torch.Tensor) -> torch.Tensor:
        self.moments += C.double()
        return C

    def rank_heads(self, C, c_v, c_proj):
        """A head that attends to one position writes W_o W_v u: its mean square is tr(W_v C W_v^T W_o^T W_o)."""
        hd = self.config.head_dim
        v, o = c_v.unflatten(0, (-1, hd)), c_proj.unflatten(1, (-1, hd)).transpose(0, 1)  # (heads, hd, D), (heads, D, hd)
        self.heads.append(((v @ C @ v.mT) * (o.mT @ o)).sum((1, 2)).argsort(descending=True, stable=True))

    def rank_units(self, C, c_fc, c_proj) -> torch.Tensor:
        """A unit's mean square, for a Gaussian input: E[relu(z)^4] = 3/2 Var(z)^2. Returns it per unit."""
        power = 1.5 * ((c_fc @ C) * c_fc).sum(1).square()
        self.units.append((power * c_proj.square().sum(0)).argsort(descending=True, stable=True))
        return power

    @property
    def rotation(self) -> torch.Tensor:
        axes = torch.linalg.eigh(self.moments).eigenvectors.flip(1)
        return axes * axes.sum(0).sign().where(axes.sum(0) != 0, 1)  # a sign that does not depend on the library


@torch.no_grad()
def order_by_data(config: GPTConfig, state: State, tokens: torch.Tensor, device="cpu",
                  report: Callable = lambda: None) -> Order:
    """The order for a base on these tokens (rows, T) int64: one pass of the base, streamed."""
    order = Order(config)
    model = streamed(config, state, device, report=report)

    def moments(x):
        u = norm(x, config.d_ref, config.norm_eps).flatten(0, 1)
        return order.see((u.T @ u / len(u)).cpu()).to(x.device)

    def attention(module, args):
        order.rank_heads(moments(args[0]), module.c_v.weight, module.c_proj.weight)

    def mlp(module, args):
        order.rank_units(moments(args[0]), module.c_fc.weight, module.c_proj.weight)
    for block in model.transformer.h:
        block.attn.register_forward_pre_hook(attention)
        block.mlp.register_forward_pre_hook(mlp)
    h = model.hidden(tokens.to(device)).flatten(0, 1)
    order.see((h.T @ h / len(h)).cpu())
    return order


@torch.no_grad()
def order_by_weights(config: GPTConfig, state: State, report: Callable = lambda: None) -> Order:
    """The order for a base from its weights alone."""
    order, D = Order(config), config.n_embd

    def normed(C):
        return order.see(C * (D / C.trace()))
    C = torch.zeros(D, D)
    for rows in state.get("transformer.wte.weight", torch.float32).split(CHUNK):
        e = norm(rows, config.d_ref, config.norm_eps)
        C += e.T @ e / config.vocab_size
    for i in range(config.n_layer):
        v, o, fc, p = (state.get(f"transformer.h.{i}.{k}.weight", torch.float32)
                       for k in ("attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"))
        U = normed(C)
        order.rank_heads(U, v, o)
        write = o @ v
        C = C + write @ U @ write.T
        C = C + (p * order.rank_units(normed(C), fc, p)) @ p.T
        report()
    normed(C)
    return order


def cannot_order(config: GPTConfig) -> str | None:
    """Why a base cannot be ordered, or None: heads need key/value heads of their own, and the smear reads leading dims."""
    if config.n_kv_head != config.n_head:
        return f"its {config.n_head} heads share {config.n_kv_head} key/value heads"
    if config.value_embeds or config.smear_gate:
        return "the gates of its value embeddings and of its smear read the leading dims as they are"
    return None


@torch.no_grad()
def order_state(config: GPTConfig, state: State, order: Order) -> State:
    """The base in that order: the same function, up to rounding."""
    assert cannot_order(config) is None
    Q, hd = order.rotation, config.head_dim

    def make(name, dtype):
        wide = torch.promote_types(state.dtype, torch.float32)
        w, q = state.get(name, wide), Q.to(wide)
        if name.startswith("transformer.h."):
            _, _, i, part, matrix, _ = name.split(".")
            if part == "attn":
                perm = (order.heads[int(i)].cpu()[:, None] * hd + torch.arange(hd)).flatten()
            else:
                perm = order.units[int(i)].cpu()
            w = q.T @ w[:, perm] if matrix == "c_proj" else w[perm] @ q
        else:
            w = torch.cat([rows @ q for rows in w.split(CHUNK)])
        return w.to(dtype)
    return State(state.shapes, make, state.dtype)
