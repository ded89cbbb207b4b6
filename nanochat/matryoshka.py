"""
The elastic layers: a norm that does not change with width, attention and MLP that run at any leading width `d` of the
residual stream, the levels a model allows, and what a block costs at each (the one owner of cost).

Widths are nested (Matryoshka, Kusupati et al. 2022, arXiv 2205.13147): width d uses the first d residual dims, the
first d / head_dim heads and the first 4 d hidden units, so that every smaller model is a corner of the larger one.
The sliced matrices are multiplied, never masked full ones: matrix-product FLOPs fall as (d / D)^2.
"""
import functools
import math
import weakref
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from nanochat import cpu_decode
from nanochat.cpu_attention import causal_attention

# ---------------------------------------------------------------------------------------------------------------------
# Levels

def mode_levels(top: int, d_ref: int, head_dim: int) -> dict[str, int]:
    """
    The uniform level each mode name stands for, in a model cut from a base of width `d_ref` whose attention and MLP
    have at most width `top`. For nanochat-d32 (2048, heads of 128): ghost 128, whisper 512, normal 1024, think 2048,
    god = `top`. A smaller model scales them in whole heads: one head, a quarter, a half and all of `d_ref`. Modes wider
    than `top` (an extracted sub-model has lost them) are left out.
    """
    def whole_heads(d):
        return max(head_dim, d // head_dim * head_dim)
    modes = {"ghost": head_dim, "whisper": whole_heads(d_ref // 4), "normal": whole_heads(d_ref // 2), "think": d_ref}
    return {name: d for name, d in modes.items() if d <= top} | {"god": top}


def resolve_level(mode: str | int, modes: dict[str, int], levels: tuple[int, ...]) -> int:
    """
    A mode name or a number -> an allowed width. Raises ValueError that lists what is allowed.
    """
    if isinstance(mode, str) and not mode.isdigit():
        if mode not in modes:
            raise ValueError(f"unknown mode '{mode}': choose one of {', '.join(modes)} or a width among "
                             f"{', '.join(map(str, levels))}")
        return modes[mode]
    if int(mode) not in levels:
        raise ValueError(f"width {mode} is not a level of this model: choose one of {', '.join(map(str, levels))}")
    return int(mode)


def sample_levels(levels: tuple[int, ...], n_block: int, generator: torch.Generator) -> list[int]:
    """
    A level per block for one student pass. Half the time one uniform level below the full one (that is the teacher),
    since the named modes are uniform and independent draws over many blocks never come near them; half the time levels
    scattered around a random mean.
    `generator` is seeded alike on all ranks, so that all ranks run the same shapes.
    """
    def draw(n):
        return int(torch.randint(n, (), generator=generator))
    if draw(2) == 0:
        return [levels[draw(max(1, len(levels) - 1))]] * n_block
    mean = torch.rand((), generator=generator) * (len(levels) - 1)
    at = (mean + torch.randn(n_block, generator=generator)).round().clamp(0, len(levels) - 1)
    return [levels[int(i)] for i in at]


def sample_exits(exit_points: tuple[int, ...], n_block: int, starts: torch.Tensor, T: int,
                 generator: torch.Generator) -> torch.Tensor:
    """
    (B, T) int64 exit depths for one student pass: each token from starts[row] on leaves at a random exit point or runs to
    the end, those before it, the prompt, run all blocks, as in decoding.
    """
    choices = torch.tensor([*exit_points, n_block])
    exits = choices[torch.randint(len(choices), (len(starts), T), generator=generator)]
    return torch.where(torch.arange(T) < starts[:, None], n_block, exits)


def expand_from(widths: list[int], levels: tuple[int, ...], starts: torch.Tensor, T: int,
                generator: torch.Generator) -> torch.Tensor:
    """
    Widths (B, T, n_block) int64 as decoding leaves them in its mixed cache when rows expand: one level up, in the blocks
    from a random one of the second half on, from a random position behind starts[row] on.
    """
    n, table = len(widths), torch.tensor(levels)
    at = torch.searchsorted(table, torch.tensor(widths)).expand(len(starts), T, n)
    where = starts + (torch.rand(len(starts), generator=generator) * (T - starts)).long()
    block = torch.randint(n // 2, n, (len(starts),), generator=generator)
    up = (torch.arange(T)[:, None] >= where[:, None, None]) & (torch.arange(n) >= block[:, None, None])
    return table[(at + up).clamp(max=len(levels) - 1)]


# ---------------------------------------------------------------------------------------------------------------------
# Layers

class _Norm(torch.autograd.Function):
    """
    Written out because autograd's version of the plain formula takes 8.2 ms where this takes 1.4 (forward and backward
    of (8, 512, 256) in bf16 on two cores); torch's fused rms_norm takes 9.3 there. The arithmetic is fp32 (fp64 for
    fp64 input), the input and output keep their dtype.
    """
    @staticmethod
    def forward(ctx, x, d_ref, eps):
        wide = torch.promote_types(x.dtype, torch.float32)
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square().div(d_ref).add(eps).rsqrt()
        y = (x * r).to(x.dtype)
        ctx.save_for_backward(y, r)
        ctx.d_ref = d_ref
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        y, r = ctx.saved_tensors
        s = (g * y).sum(-1, keepdim=True, dtype=r.dtype).div(-ctx.d_ref)
        return (torch.addcmul(g, y, s) if g.dtype == r.dtype else g + y * s).mul(r).to(g.dtype), None, None


def norm(x: torch.Tensor, d_ref: int, eps: float) -> torch.Tensor:
    """
    x * rsqrt(sum(x^2) / d_ref + eps) over the last dim, in fp32, without parameters, whatever the length of x. At
    length d_ref this is RMSNorm. Dividing by d_ref and not by the length gives a slice x[..., :d] the length of the
    whole vector (pre-activations keep their scale at every width) and lets zero dims be appended without any change.
    """
    if cpu_decode.serves(x):
        return cpu_decode.norm(x, d_ref, eps)
    return _Norm.apply(x, d_ref, eps)


class _CornerLinear(torch.autograd.Function):
    """
    Written out because autograd's backward of a slice fills a whole matrix with zeros and copies into it, once for each
    of the two slicings and also where they cut nothing, and so costs a narrow pass as much as a wide one.
    """
    @staticmethod
    def forward(ctx, x, weight, d_out):
        w = weight[:d_out, :x.size(-1)].to(x.dtype)
        ctx.save_for_backward(x, w)
        ctx.whole = weight.shape, weight.dtype
        return F.linear(x, w)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x, w), (shape, dtype) = ctx.saved_tensors, ctx.whole
        dx = g @ w if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None, None
        corner = g.flatten(0, -2).mT @ x.flatten(0, -2)
        if corner.shape == shape:
            return dx, corner.to(dtype), None
        dw = w.new_zeros(shape, dtype=dtype)
        dw[:w.size(0), :w.size(1)] = corner
        return dx, dw, None


def sliced_linear(x: torch.Tensor, weight: torch.Tensor, d_out: int) -> torch.Tensor:
    """x (..., d_in) times the leading corner weight[:d_out, :d_in]^T, in the dtype of x -> (..., d_out)."""
    if cpu_decode.serves(x, weight):
        return cpu_decode.linear(x, weight[:d_out, :x.size(-1)])
    return _CornerLinear.apply(x, weight, d_out)


def add_prefix(x: torch.Tensor, y: torch.Tensor, active: torch.Tensor | None = None) -> torch.Tensor:
    """
    x (B, T, D) with y (B, T, d) added to its first d dims, the rest passing through. Only `active` tokens (B, T) bool
    are updated where it is given: the others have exited.
    """
    if active is not None:
        y = torch.where(active.unsqueeze(-1), y, 0)
    d = y.size(-1)
    if d == x.size(-1):
        return x + y
    return torch.cat((x[..., :d] + y, x[..., d:]), dim=-1)


def rope_tables(positions: torch.Tensor, head_dim: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, fp32, (*positions.shape, head_dim / 2), of the rotary embedding (Su et al. 2021, arXiv 2104.09864)."""
    inv_freq = base ** -(torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angle = positions[..., None].float() * inv_freq
    return angle.cos(), angle.sin()


def apply_rope(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotates x (B, T, H, head_dim) by -theta, as nanochat does: the halves are (x1 cos + x2 sin, x2 cos - x1 sin)."""
    cos, sin = (t.to(x.dtype).unsqueeze(-2) for t in rope)  # (T, 1, head_dim/2) or (B, T, 1, head_dim/2)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def per_level(level: int | torch.Tensor, fn, *tensors: torch.Tensor) -> torch.Tensor:
    """
    fn(d, *tensors), (B, T, ...) -> (B, T, n), where all tokens run at one level d. Where `level` is a (B, T) tensor of
    levels, the tokens of each are gathered, run through fn as (1, tokens, ...), and put back, zero behind their own n.
    """
    if isinstance(level, int):
        return fn(level, *tensors)
    flat, parts, places = level.flatten(), [], []
    for d in flat.unique().tolist():
        at = (flat == d).nonzero()[:, 0].to(tensors[0].device)
        parts.append(fn(d, *(t.flatten(0, 1)[at].unsqueeze(0) for t in tensors))[0])
        places.append(at)
    n = max(p.size(-1) for p in parts)
    rows = torch.cat([F.pad(p, (0, n - p.size(-1))) for p in parts])
    order = torch.cat(places).argsort()
    return rows[order].view(*level.shape, n)


def split_level(level: int | torch.Tensor, top: int) -> tuple[int | torch.Tensor, torch.Tensor | None]:
    """
    A block's level as (level, soft prefix mask or None). A float tensor (B, 1, top) is a soft mask of the leading dims:
    the block then runs whole, with what lies behind the mask's ones zero. That costs full width; it is for training
    the predictor, whose gradient comes through the mask, and equals the slice where the mask is hard.
    """
    soft = isinstance(level, torch.Tensor) and level.is_floating_point()
    return (top, level) if soft else (level, None)


class Attention(nn.Module):
    """
    Causal self-attention at any width d: h = d / head_dim heads read and write the first d residual dims.
    RoPE, then an ordinary RMSNorm of q and k over head_dim (QK-norm). head_dim is never sliced.
    With `value_embedding` (nanochat, January 2026) each kv head adds gate * table[token] to v; a zero table is an
    exact no-op.
    window: how many keys before its own a token sees (None: all of them).
    """
    def __init__(self, config, value_embedding: bool, window: int | None = None):
        super().__init__()
        self.head_dim, self.group = config.head_dim, config.n_head // config.n_kv_head
        self.d_ref, self.eps = config.d_ref, config.norm_eps
        self.window, self.qk_scale = window, config.qk_scale
        self.native = window is None and config.qk_scale == 1  # whether cpu_decode computes it
        D = config.top_width
        D_kv = self.n_kv(D) * self.head_dim
        self.c_q = nn.Linear(D, D, bias=False)
        self.c_k = nn.Linear(D, D_kv, bias=False)
        self.c_v = nn.Linear(D, D_kv, bias=False)
        self.c_proj = nn.Linear(D, D, bias=False)
        self.ve_gate = nn.Linear(min(32, self.head_dim), self.n_kv(D), bias=False) if value_embedding else None

    def n_kv(self, d: int) -> int:
        """Key/value heads in use at width d: those that the first d / head_dim query heads read."""
        return -(-(d // self.head_dim) // self.group)

    def _queries(self, d, u):
        return sliced_linear(u[..., :d], self.c_q.weight, d)

    def _keys(self, d, u):
        return sliced_linear(u[..., :d], self.c_k.weight, self.n_kv(d) * self.head_dim)

    def _values(self, d, u, value=None, mask=None):
        n = self.n_kv(d) * self.head_dim
        v = sliced_linear(u[..., :d], self.c_v.weight, n)
        if self.ve_gate is None:
            return v
        # u grows as a slice shrinks; sqrt(d / d_ref) undoes it, so the gate sees one scale at every width. Not above d_ref:
        # there growth appends zero dims, which leave u as it was
        c = self.ve_gate.in_features
        scale = min(1.0, d / self.d_ref) ** 0.5 if mask is None else \
            (mask.sum(-1, keepdim=True) / self.d_ref).clamp(max=1).sqrt()
        gate = 2 * torch.sigmoid(sliced_linear(u[..., :c] * scale, self.ve_gate.weight, self.n_kv(d)))
        return v + gate.repeat_interleave(self.head_dim, dim=-1) * value[..., :n]

    def forward(self, x, level, rope, value=None, cache=None, write_only=False):
        """
        x (B, T, D) -> the update of its first d dims, (B, T, d), where d is the level, or the largest if `level` is a
        (B, T) tensor of them. A query head sees the positions that have that head (DESIGN 7).
        rope: tables of the tokens' positions. value: (B, T, kv width) embeddings of the tokens, where this block has
        them. cache: this block's KVView; it takes the new keys and values and gives all that the queries may see.
        write_only: keys and values are written to the cache, nothing else is computed, and None is returned.
        """
        B, T, _ = x.shape
        hd = self.head_dim
        level, mask = split_level(level, self.c_q.out_features)
        heads = level // hd  # query heads that a position has: an int, or (B, T)
        if cache is not None:
            cache.mark(heads)
            if isinstance(level, int) and mask is None and self.native and cpu_decode.serves(x, self.c_q.weight):
                return cpu_decode.attention(self, x, level, rope, value, cache, write_only)
        if mask is not None:
            x = x[..., :level] * mask
        u = per_level(level, lambda d, x: norm(x[..., :d], self.d_ref, self.eps), x)
        d = u.size(-1)
        k = per_level(level, self._keys, u).view(B, T, -1, hd)
        if mask is None:
            v = per_level(level, self._values, u, *(() if value is None else (value,))).view(B, T, -1, hd)
        else:  # a kv head is on if the first of its query heads is; q and k then need no mask
            v = self._values(level, u, value, mask).view(B, T, -1, hd) * mask.unflatten(-1, (-1, hd))[:, :, ::self.group]
        k = norm(apply_rope(k, rope), hd, self.eps)
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, kv heads, T, head_dim)
        if cache is not None:
            cache.write(k, v)
        if write_only:
            return None
        q = per_level(level, self._queries, u).view(B, T, -1, hd)
        q = norm(apply_rope(q, rope), hd, self.eps).transpose(1, 2)  # (B, heads, T, head_dim)
        if self.qk_scale != 1:
            q = q * self.qk_scale ** 2  # of q and of k
        window = self.window
        seen, is_causal = None, True
        if cache is not None:
            k, v, seen, is_causal = cache.read(k.size(1), d // hd, window)
        elif not isinstance(level, int):
            seen, is_causal = head_mask(heads.to(x.device), d // hd, window), False
        elif window is not None and window < T - 1:
            seen, is_causal = causal_mask(T, window, x.device), False
        if d // hd != k.size(1):
            k, v = (t.repeat_interleave(self.group, dim=1)[:, :d // hd] for t in (k, v))
        if is_causal:
            y = causal_attention(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        y = y.transpose(1, 2).reshape(B, T, d)
        y = per_level(level, lambda d, y: sliced_linear(y[..., :d], self.c_proj.weight, d), y)
        return y if mask is None else y * mask


class MLP(nn.Module):
    """relu(u W_fc)^2 W_proj at any width d: the first 4 d hidden units read and write the first d residual dims."""
    def __init__(self, config):
        super().__init__()
        self.d_ref, self.eps = config.d_ref, config.norm_eps
        D = config.top_width
        self.c_fc = nn.Linear(D, 4 * D, bias=False)
        self.c_proj = nn.Linear(4 * D, D, bias=False)

    def _update(self, d, x, mask=None):
        if mask is None and cpu_decode.serves(x, self.c_fc.weight):
            return cpu_decode.mlp(x, self.c_fc.weight, self.c_proj.weight, d, self.d_ref, self.eps)
        u = norm(x[..., :d], self.d_ref, self.eps)
        hidden = F.relu(sliced_linear(u, self.c_fc.weight, 4 * d)).square()
        if mask is not None:
            hidden = hidden * mask.repeat_interleave(4, dim=-1)
        return sliced_linear(hidden, self.c_proj.weight, d)

    def forward(self, x, level):
        """x (B, T, D) -> the update of its first d dims, (B, T, d); level: see AttentionBlock."""
        level, mask = split_level(level, self.c_fc.in_features)
        if mask is not None:
            return self._update(level, x[..., :level] * mask, mask) * mask
        return per_level(level, self._update, x)


def causal_mask(T: int, window: int | None, device) -> torch.Tensor:
    """(T, T) bool: query t sees key s <= t, and at most `window` keys before its own."""
    seen = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    return seen if window is None else seen.triu(-window)


def head_mask(heads: torch.Tensor, n: int, window: int | None = None) -> torch.Tensor:
    """
    (B, n, T, T) bool: query t of head j may see a key s that causal_mask allows if position s has head j (heads (B, T) > j).
    A position always sees itself, lest a row of the softmax be empty; heads it does not have are not read afterwards.
    """
    T = heads.size(1)
    have = heads[:, None, :] > torch.arange(n, device=heads.device)[:, None]  # (B, n, T) by key
    causal = causal_mask(T, window, heads.device)
    itself = torch.eye(T, dtype=torch.bool, device=heads.device)
    return (have.unsqueeze(2) & causal) | itself


class AttentionBlock(nn.Module):
    """
    One residual unit: attention, then MLP, both at one level (an int), or each token at its own ((B, T) int64 on the CPU),
    or under a soft prefix mask (see split_level).
    active: None (all tokens are updated), (B, T) bool, or False: all have exited and only write their memory.
    """
    kind = "attention"

    def __init__(self, config, value_embedding: bool, window: int | None = None):
        super().__init__()
        self.attn = Attention(config, value_embedding, window)
        self.mlp = MLP(config)

    def forward(self, x, level, rope, value=None, cache=None, active=None):
        if active is False:
            self.attn(x, level, rope, value, cache, write_only=True)
            return x
        x = add_prefix(x, self.attn(x, level, rope, value, cache), active)
        return add_prefix(x, self.mlp(x, level), active)


# ---------------------------------------------------------------------------------------------------------------------
# Cost

class Cost(NamedTuple):
    """
    What one token costs. FLOPs (a multiply-add is 2): `matmul` weight matrix products, `attention` scores and values,
    `scan` the Mamba mixer's convolution and recurrence. Elements: `weights` read when a single token is decoded, `kv`
    keys and values appended to the cache, `kv_read` those attended to, `state` SSM state (each read and written), `conv`
    convolution state likewise.
    Costs add up with `+`.
    """
    matmul: float = 0
    attention: float = 0
    scan: float = 0
    weights: float = 0
    kv: float = 0
    kv_read: float = 0
    state: float = 0
    conv: float = 0

    def __add__(self, other):
        return Cost(*(a + b for a, b in zip(self, other)))

    @property
    def flops(self) -> float:
        return self.matmul + self.attention + self.scan

    def bytes_read(self, weight_size: int, kv_size: int) -> float:
        """Bytes read to decode one token, weights and activations' dtype (keys, values, conv) of these sizes; SSM fp32."""
        return self.weights * weight_size + (self.kv_read + self.conv) * kv_size + self.state * 4


def most_seen(block: nn.Module) -> float:
    """The most positions that a token's attention sees in a block, its own included; infinite where there is no window."""
    window = block.attn.window if block.kind == "attention" else None
    return math.inf if window is None else window + 1


def block_cost(block: nn.Module, d: int, context: float, exited: bool = False) -> tuple[Cost, Cost]:
    """
    (dynamic, static) cost of one token in `block` at width d when attention sees `context` positions: dynamic is what
    shrinks with d (attention, MLP), static is the Mamba mixer, which always runs whole. An exited token only writes its
    memory: keys and values, or the Mamba state.
    """
    mlp = Cost() if exited else Cost(matmul=2 * 8 * d * d, weights=8 * d * d)
    if block.kind == "attention":
        attn = block.attn
        d_kv = attn.n_kv(d) * attn.head_dim
        weights = 2 * d * d_kv + (0 if exited else 2 * d * d)
        if attn.ve_gate is not None:
            weights += attn.ve_gate.in_features * attn.n_kv(d)
        # the table's row of a value embedding is read too, but not multiplied
        table = d_kv if attn.ve_gate is not None else 0
        own = Cost(matmul=2 * weights, weights=weights + table, kv=2 * d_kv)
        context = min(context, most_seen(block))
        return own + mlp + (Cost() if exited else Cost(attention=4 * context * d, kv_read=2 * context * d_kv)), Cost()
    flops = block.mamba.flops_per_token(write_only=exited)
    matmul = flops["in_proj"] + flops["out_proj"]
    return mlp, Cost(matmul=matmul, scan=flops["conv"] + flops["scan"], weights=matmul / 2,
                     state=block.mamba.d_inner * block.mamba.d_state, conv=block.mamba.conv_dim * block.mamba.d_conv)


def cost_table(model, context: float) -> tuple[torch.Tensor, float]:
    """
    FLOPs of one token's dynamic part, by block and level, (n_block, n_levels) fp64 with levels ascending, and those of all
    that does not shrink with width (Mamba mixers, head): what a choice of levels costs, as a sum.
    """
    table = torch.tensor([[block_cost(block, d, context)[0].flops for d in model.config.levels]
                          for block in model.transformer.h], dtype=torch.float64)
    parts = model.cost(context=context)
    return table, parts["static"].flops + parts["head"].flops


def once_per_model(function):
    """function(model), computed once for each model: its costs do not change, and every answer asks for them."""
    known = weakref.WeakKeyDictionary()

    @functools.wraps(function)
    def look_up(model):
        if model not in known:
            known[model] = function(model)
        return known[model]
    return look_up


@once_per_model
def _token_table(model) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """
    FLOPs of one token by block, level and whether it has exited, (n_block, n_levels, 2) fp64, behind no other token; what
    each position that it sees adds; how many it sees at most, (n_block,) fp64; and the head's.
    """
    table, one = (torch.tensor([[[sum(c.flops for c in block_cost(block, d, n, exited)) for exited in (False, True)]
                                 for d in model.config.levels] for block in model.transformer.h], dtype=torch.float64)
                  for n in (0, 1))
    most = torch.tensor([most_seen(block) for block in model.transformer.h], dtype=torch.float64)
    return table, one - table, most, model.cost()["head"].flops


def token_flops(model, depth: torch.Tensor, widths: torch.Tensor, context: torch.Tensor,
                per_point: float = 0.0) -> torch.Tensor:
    """
    What each of N tokens costs that runs `depth` (N,) blocks at `widths` (N, n_block) int64 and then only writes its memory,
    when attention sees `context` (N,) positions: FLOPs (N,) fp64, head included. The same as model.cost, for many tokens.
    per_point: FLOPs of a decision at each exit point that a token reaches.
    """
    base, more, most, head = _token_table(model)
    b = torch.arange(model.config.n_block)
    at = b, torch.searchsorted(torch.tensor(model.config.levels), widths.contiguous()), (b >= depth[:, None]).long()
    spent = base[at] + more[at] * torch.minimum(context[:, None].double(), most)  # linear in the positions that it sees
    points = (depth[:, None] >= torch.tensor(model.config.exit_points)).sum(1) if per_point else 0
    return spent.sum(1) + head + per_point * points


def prompt_flops(model, tokens: int, widths) -> float:
    """Of a text's first `tokens` tokens in the first len(widths) blocks, at a width each; no logits are made of them."""
    base, more, most, _ = _token_table(model)
    at = torch.arange(len(widths)), torch.searchsorted(torch.tensor(model.config.levels), torch.tensor(widths)), 0
    most = most[:len(widths)].clamp(max=tokens)
    seen = most * (most + 1) / 2 + (tokens - most) * most  # the first tokens see 1, 2, ..., the others `most`
    return float(base[at].sum()) * tokens + float((more[at] * seen).sum())


def energy(choice: torch.Tensor, table: torch.Tensor, fixed: float = 0.0) -> torch.Tensor:
    """
    The expected cost of `choice` (B, n_block, n_levels), probabilities or one-hot, as a share of full width: (B,) in
    (0, 1], differentiable in `choice`. table (n_block, n_levels) and fixed are FLOPs (cost_table), or seconds measured.
    """
    spent = (choice * table.to(choice)).sum((-2, -1))
    return (spent + fixed) / (float(table[:, -1].sum()) + fixed)


def soft_masks(choice: torch.Tensor, levels: tuple[int, ...], top: int) -> list[torch.Tensor]:
    """
    choice (B, n_block, n_levels), probabilities or one-hot -> a soft prefix mask (B, 1, top) for each block: residual dim j
    is on by the probability that the level is above j.
    """
    prefix = torch.arange(top, device=choice.device) < torch.tensor(levels, device=choice.device)[:, None]
    return list((choice @ prefix.to(choice)).unsqueeze(2).unbind(1))
