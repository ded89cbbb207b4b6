"""
Growth: a hybrid gets a wider residual stream, with more heads, hidden units and Mamba groups, and computes what it did.

The rule, for every tensor: old entries keep their value and their place within their segment (in_proj's z, x, B, C and dt
are segments, so old heads are never scrambled). Of the new entries, those that *write* into the residual stream are zero:
new dims of the stream stay zero, and new heads, units and groups are not heard. Those that *read* are random: their input
is zero, or their output goes unheard, so they change nothing, and since they are not zero all that is new gets gradient
(zero on both sides would be exact and dead: relu^2 has no slope at 0, and QK-norm too much). The norm divides by d_ref at
every width, so zero dims change it by nothing and no weight is rescaled. Net2Net (Chen et al. 2016, arXiv 1511.05641)
and its followers copy units and split their outgoing weights; here those are zero, so copies need no splitting.
"""
import itertools
import math
from dataclasses import dataclass, replace

import torch

from nanochat.checkpoint_manager import build_model, optimizer_names
from nanochat.confidence_probe import CLOSED
from nanochat.hybrid_gpt import HybridConfig, HybridGPT
from nanochat.mamba_block import Mamba2
from nanochat.streaming import Leaf, State, seed_of, seeded, shapes_of

INITS = ("lora", "copy", "svd", "zero")
CHUNK = 1 << 22  # entries that are drawn at a time: temporaries stay in cache

READERS = (".c_q.weight", ".c_k.weight", ".c_v.weight", ".c_fc.weight", ".in_proj.weight", "lm_head.weight")
# The controls' hidden layers, whose sizes may depend on the width too. Their new units are always drawn.
CONTROL_READERS = ("gate.c_fc.weight", "predictor.c_in.weight", "predictor.c_mid.weight")
SSM = (".dt_bias", ".A_log", ".mamba.D", ".conv1d.weight", ".conv1d.bias", ".mamba.norm.weight")


@dataclass(frozen=True)
class Init:
    """
    How readers are drawn. lora: the product of two Gaussian matrices of rank `rank`. copy: old rows and columns over again,
    times `scale`. svd: the old matrix's leading `rank` singular directions, mixed anew. zero: not at all.
    std: of the new entries (lora, svd); None: that of the old ones of the same matrix, times `scale`.
    """
    kind: str = "svd"  # by a little the best, and the least disturbing at first (dev/LOG.md)
    rank: int = 64
    std: float | None = None
    scale: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.kind not in INITS:
            raise ValueError(f"--init {self.kind} is not known: choose one of {', '.join(INITS)}")
        if self.rank < 1:
            raise ValueError(f"--rank is {self.rank}; it must be at least 1")
        for name, value in (("std", self.std), ("scale", self.scale)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name} is {value}; it must be above 0 (for new weights of zero use --init zero)")


def grown_config(config: HybridConfig, width: int) -> HybridConfig:
    """The config at a larger width. ValueError with the widths that are possible."""
    if config.top_width != config.n_embd:
        raise ValueError(f"this is an extracted sub-model (attention and MLP of width {config.top_width}, residual stream "
                         f"of {config.n_embd}): grow the model that it was extracted from")
    per_head = config.head_dim * (config.n_head // config.n_kv_head)
    group = config.mamba_group_width // math.gcd(config.mamba_group_width, config.mamba_expand)
    step = width_step(config)
    if width <= config.n_embd:
        raise ValueError(f"--new-dim {width} is not above the present width {config.n_embd}: surgery only widens; "
                         "a narrower model is made by `python -m scripts.extract`")
    if width % step:
        up = -(-width // step) * step
        near = ", ".join(str(w) for w in (up - step, up) if w > config.n_embd)
        raise ValueError(f"--new-dim {width} is not in whole heads ({per_head}) and whole Mamba groups ({group}): choose a "
                         f"multiple of {step}, such as {near}")
    n_head = width // config.head_dim
    return replace(config, n_embd=width, top_width=width, n_head=n_head,
                   n_kv_head=n_head * config.n_kv_head // config.n_head)


def width_step(config: HybridConfig) -> int:
    """Widths come in multiples of it: whole heads, whole groups of them that share a kv head, and whole Mamba groups."""
    per_head = config.head_dim * (config.n_head // config.n_kv_head)
    return math.lcm(per_head, config.mamba_group_width // math.gcd(config.mamba_group_width, config.mamba_expand))


def widths_ahead(config: HybridConfig) -> list[int]:
    """
    The widths of stages 2 and 3 that are still ahead: the possible width nearest to 1.25 times that of the base, and twice
    that of the base.
    """
    step, base = width_step(config), config.d_ref
    first = max(base + step, round(1.25 * base / step) * step)
    return [w for w in sorted({first, -(-2 * base // step) * step}) if w > config.n_embd]


def next_width(config: HybridConfig) -> int:
    """The width that a hybrid grows to where none is given. ValueError for one that has grown to twice its base's."""
    ahead = widths_ahead(config)
    if not ahead:
        raise ValueError(f"width {config.n_embd} is twice the base's or more already: say how wide with --new-dim")
    return ahead[0]


def segments(name: str, shape: torch.Size, c: HybridConfig) -> list[list[int]]:
    """The lengths of the segments that each axis of a tensor consists of; all but a few axes are one segment."""
    out = [[n] for n in shape]
    groups = c.d_inner // c.mamba_group_width * c.mamba_d_state
    if name.endswith(".in_proj.weight"):
        out[0] = [c.d_inner, c.d_inner, groups, groups, c.d_inner // c.mamba_headdim]  # z, x, B, C, dt
    elif ".conv1d." in name:
        out[0] = [c.d_inner, groups, groups]
    elif name == "predictor.c_mid.weight":
        out[1] = [shape[0], shape[0], shape[1] - 2 * shape[0]]  # mean, maximum, length and budget
    assert [sum(s) for s in out] == list(shape), name
    return out


def _spans(old: list[int], new: list[int]) -> list[tuple[slice, slice, slice]]:
    """Per segment: where it was, where its old entries are now, and where its new entries are."""
    out, a, b = [], 0, 0
    for n, m in zip(old, new):
        out.append((slice(a, a + n), slice(b, b + n), slice(b + n, b + m)))
        a, b = a + n, b + m
    return out


def place(old: torch.Tensor, out: torch.Tensor, before: list[list[int]], after: list[list[int]]) -> torch.Tensor:
    """Copies old entries to where they belong in `out`; segments: see `segments`."""
    for spans in itertools.product(*(_spans(a, b) for a, b in zip(before, after))):
        out[tuple(now for _, now, _ in spans)] = old[tuple(was for was, _, _ in spans)]
    return out


def old_boxes(old: HybridConfig, new: HybridConfig) -> dict[str, list[tuple[slice, ...]]]:
    """Name -> where, in a tensor of the grown model, the entries are that the one before had: a box for each segment."""
    before, after = shapes_of(old), shapes_of(new)
    return {name: [tuple(now for _, now, _ in spans) for spans in itertools.product(
        *(_spans(a, b) for a, b in zip(segments(name, was, old), segments(name, after[name], new))))]
        for name, was in before.items()}


def draw(old: torch.Tensor, out: torch.Tensor, init: Init, fallback_std: float, generator: torch.Generator) -> None:
    """
    Fills what is new in one segment of a reader: old (r, c), out (R, C), whose corner [:r, :c] is left alone. The old
    corner sets the scale; where it is all zero (a fresh table) there is nothing to copy or extend, and entries are drawn
    at `fallback_std`.
    """
    (r, c), (R, C) = old.shape, out.shape
    assert r <= R and c <= C
    if init.kind == "zero" or (r, c) == (R, C):
        return
    wide = torch.promote_types(old.dtype, torch.float32)
    rms = float(torch.linalg.vector_norm(old, dtype=wide)) / math.sqrt(old.numel())
    if init.kind == "copy" and rms:
        rows, columns = torch.arange(R) % r, torch.arange(C) % c

        def product(at, cols):
            return init.scale * old[rows[at]][:, columns[cols]]
    else:
        std = init.std or (rms or fallback_std) * init.scale
        if init.kind == "svd" and rms:
            left, right = _extend(old.float(), R, C, min(init.rank, r, c), generator)
            left = left * (std / rms)
        else:
            k = min(init.rank, R, C)
            left = torch.empty(R, k).normal_(std=std / math.sqrt(k), generator=generator)
            right = torch.empty(k, C).normal_(generator=generator)

        def product(at, cols):
            return left[at] @ right[:, cols]
    for top, bottom, cols in ((0, r, slice(c, C)), (r, R, slice(0, C))):
        step = max(1, CHUNK // max(1, cols.stop - cols.start))
        for a in range(top, bottom, step):
            at = slice(a, min(a + step, bottom))
            out[at, cols] = product(at, cols).to(out.dtype)


def _extend(old, R, C, k, generator):
    """
    Factors (R, k), (k, C) whose product continues `old` (r, c): new rows are random mixtures of its k leading right singular
    vectors, weighted as in its own rows, new columns likewise; the product's rms is that of `old`. By a randomised SVD
    (Halko, Martinsson & Tropp 2011, arXiv 0909.4061).
    """
    r, c = old.shape
    basis = torch.linalg.qr(old @ (old.T @ (old @ torch.randn(c, min(k + 8, r, c), generator=generator)))).Q
    U, S, Vh = torch.linalg.svd(basis.T @ old, full_matrices=False)
    U, S, Vh = (basis @ U)[:, :k], S[:k], Vh[:k]
    S = S * (torch.linalg.vector_norm(old) / torch.linalg.vector_norm(S))  # what the other directions held
    left = torch.cat((U, torch.randn(R - r, k, generator=generator) / math.sqrt(r)))
    right = torch.cat((Vh, torch.randn(k, C - c, generator=generator) / math.sqrt(c)), 1)
    return left * S, right


class Growth:
    """What `grow_state` does to each tensor: name, old -> new. `old` config to `new` config."""
    def __init__(self, old: HybridConfig, new: HybridConfig, init: Init):
        self.old, self.new, self.init = old, new, init
        self.shapes = {"before": shapes_of(old), "after": shapes_of(new)}
        self._fresh = None, None

    def tensor(self, name: str, old: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The grown tensor: old entries exactly, new ones drawn in fp32, both then in `dtype`."""
        was, now = self.shapes["before"][name], self.shapes["after"][name]
        before, after = segments(name, was, self.old), segments(name, now, self.new)
        out = torch.zeros(now, dtype=dtype)
        place(old, out, before, after)
        generator = torch.Generator().manual_seed(seed_of(self.init.seed, name))
        if name in CONTROL_READERS:
            # new units listen to what the old ones did; old units do not listen to what is new
            c = now[1] if name == "predictor.c_mid.weight" else was[1]
            out[was[0]:, :c] = torch.empty(now[0] - was[0], c).normal_(std=now[1] ** -0.5, generator=generator)
        elif name.endswith(READERS) or name.startswith("value_embeds."):
            for rows, place_of_old, new in _spans(before[0], after[0]):
                draw(old[rows], out[place_of_old.start:new.stop], self.init, self.new.n_embd ** -0.5, generator)
        elif name.endswith(SSM):
            self._reference(name, out, before[0], after[0])
        elif name in ("predictor.out_bias", "gate.point.weight"):
            out[:, was[1]:] = CLOSED  # a new level gains nothing over the old full width, a new unit is off
        return out

    def _reference(self, name, out, before, after):
        """New Mamba heads and channels start as mamba-ssm's do: those of a mixer that has the new groups only."""
        prefix, _, own = name.rpartition(".mamba.")
        if self._fresh[0] != prefix:
            c = self.new
            extra = c.n_embd - self.old.n_embd
            with seeded(self.init.seed, prefix):
                mixer = Mamba2(extra, c.mamba_d_state, c.mamba_d_conv, c.mamba_expand, c.mamba_headdim,
                               ngroups=c.mamba_expand * extra // c.mamba_group_width)
                mixer.init_weights()
            self._fresh = prefix, mixer.requires_grad_(False)
        start = 0
        for _, _, new in _spans(before, after):
            n = new.stop - new.start
            out[new] = self._fresh[1].get_parameter(own)[start:start + n].to(out.dtype)
            start += n


@torch.no_grad()
def grow_state(config: HybridConfig, state: State, width: int, init: Init) -> tuple[HybridConfig, State]:
    """The config and the state of the grown model. ValueError for a width that it cannot have."""
    growth = Growth(config, grown_config(config, width), init)

    def make(name, dtype):
        # old entries need no more digits than either side has
        stored = state.stored(name, state.dtype)
        return growth.tensor(name, state.get(name, stored), dtype)
    return growth.new, State(growth.shapes["after"], make, state.dtype)


@torch.no_grad()
def grow(model: HybridGPT, width: int, init: Init | None = None) -> HybridGPT:
    """A grown copy of a model, in memory, in its dtypes and on its device."""
    config, state = grow_state(model.config, State.of(model), width, init or Init())
    grown = build_model(config, "meta")
    grown.load_state_dict({name: state.get(name, p.dtype).to(model.device) for name, p in model.named_parameters()},
                          assign=True)
    grown.compute_dtype = model.compute_dtype
    return grown


def grow_optimizers(states: list[dict], old: HybridConfig, new: HybridConfig) -> list:
    """
    Optimizer state dicts for the grown model, as a tree for save_lazy: the moments of old entries stay where their entries
    are, those of new ones are zero. Re-warm the learning rate. ValueError for states that do not name their parameters.
    """
    growth = Growth(old, new, Init())

    def leaf(name, moment):
        was, now = growth.shapes["before"][name], growth.shapes["after"][name]
        if moment.shape != was:
            return Leaf(moment.shape, moment.dtype, lambda: moment)  # a count of steps
        return Leaf(now, moment.dtype, lambda: place(moment, torch.zeros(now, dtype=moment.dtype),
                                                     segments(name, was, old), segments(name, now, new)))
    out = []
    for state in states:
        names = optimizer_names(state)
        if unknown := sorted(set(names.values()) - set(growth.shapes["before"])):
            raise ValueError(f"the optimizer's state is of another model (it has {unknown[0]}): leave out --with-optimizer")
        out.append({**state, "state": {i: {k: leaf(names[i], v) for k, v in moments.items()}
                                       for i, moments in state["state"].items()}})
    return out
