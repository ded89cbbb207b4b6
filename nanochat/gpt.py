"""
The base GPT, in the architecture of nanochat-d32: rotary positions, QK-norm, relu^2 MLP, untied head, a norm without
parameters also after the embedding, logits softly capped at 15. What later nanochats compute differently are fields of the
config, each with d32's value as its default. Its blocks are the elastic ones of matryoshka.py, so it runs at any nested
width, and the hybrid (hybrid_gpt.py) is this class with Mamba blocks put between.
"""
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.loss_eval import head_logits, head_loss
from nanochat.matryoshka import AttentionBlock, Cost, add_prefix, block_cost, mode_levels, norm, resolve_level, rope_tables

MAX_SOFTCAP = 60  # the head's loss sums exp(logit) in fp32 without subtracting a maximum


@dataclass(frozen=True)
class GPTConfig:
    """
    The fields of nanochat's `model_config`, then what later nanochats changed (docs/checkpoints.md), with d32's values as
    defaults. Layers are the base's, whatever stands between them.
    qk_scale: q and k are multiplied by it after QK-norm. windows: per layer, how many keys before its own a token sees (0:
    all); () for all layers whole. x0_lambdas: per layer, how much of the token's first state is added to its state before
    the layer. smear_gate and smear_lambda: the first state gets smear_lambda * sigmoid(smear_gate . x[:24]) times that of
    the token before. backout_lambda: how much of the state in the middle is taken away before the head. value_embeds: the
    base has value embeddings (a hybrid always has; then they are old, and stage 1 of training keeps them).
    """
    sequence_len: int = 2048
    vocab_size: int = 65536
    n_layer: int = 32
    n_head: int = 16
    n_kv_head: int = 16
    n_embd: int = 2048
    rope_base: float = 10000.0
    softcap: float = 15.0
    qk_scale: float = 1.0
    windows: tuple[int, ...] = ()
    x0_lambdas: tuple[float, ...] = ()
    smear_gate: tuple[float, ...] = ()
    smear_lambda: float = 0.0
    backout_lambda: float = 0.0
    value_embeds: bool = False

    norm_eps = 2.0 ** -23  # not a field: that of torch's rms_norm in fp32, the same in every nanochat

    def __post_init__(self):
        for name, value in asdict(self).items():
            if type(value) is int and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"width {self.n_embd} is no multiple of the {self.n_head} heads: "
                             "choose a width that is a whole number of heads")
        if self.head_dim % 2:
            raise ValueError(f"head dim {self.head_dim} is odd, and rotary positions need pairs: choose an even one")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"{self.n_head} heads cannot share {self.n_kv_head} key/value heads evenly")
        self._check_later()

    def _check_later(self):
        """ValueError for values of the later nanochats' fields that no model can have."""
        for name in ("rope_base", "softcap", "qk_scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.softcap > MAX_SOFTCAP:
            raise ValueError(f"softcap is {self.softcap}; it must be at most {MAX_SOFTCAP}, or the softmax overflows")
        for name in ("windows", "x0_lambdas"):
            if len(getattr(self, name)) not in (0, self.n_layer):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries; it must have one for each of the "
                                 f"{self.n_layer} layers, or none")
        if min(self.windows, default=0) < 0:
            raise ValueError(f"a window is {min(self.windows)}; it must be at least 0 (0: all keys)")
        if len(self.smear_gate) > self.n_embd:
            raise ValueError(f"smear_gate has {len(self.smear_gate)} entries, more than the width {self.n_embd}")

    @cached_property
    def later_features(self) -> list[str]:
        """What this model has that nanochat-d32 has not and that only the PyTorch forms of the layers compute, in words."""
        has = {"a factor on q and k": self.qk_scale != 1, "attention windows": any(self.windows),
               "x0 lambdas": any(self.x0_lambdas), "smear": bool(self.smear_gate), "backout": self.backout_lambda != 0}
        return [name for name, present in has.items() if present]

    def window_of(self, layer: int) -> int | None:
        """How many keys before its own a token of this layer sees; None where that is all there can be."""
        window = self.windows[layer] if self.windows else 0
        return window if 0 < window < self.sequence_len - 1 else None

    @cached_property
    def x0_factors(self) -> tuple[float, ...]:
        """Per block, how much of a token's first state is added before it; () where that is 0 for all."""
        per_layer = self.n_block // self.n_layer
        factors = [0.0] * self.n_block
        factors[::per_layer] = self.x0_lambdas or [0.0] * self.n_layer
        return tuple(factors) if any(factors) else ()

    def has_value_table(self, layer: int) -> bool:
        """Whether a model with value embeddings has some in this layer: in every second, and in the last."""
        return (self.n_layer - 1 - layer) % 2 == 0

    @property
    def backout_block(self) -> int:
        """After how many blocks the state is kept that backout takes away; beyond the last block where there is none."""
        if not self.backout_lambda:
            return self.n_block + 1
        return self.n_block // self.n_layer * min(self.n_layer // 2 + 1, self.n_layer)

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def d_ref(self) -> int:
        """Width of the base model: what the norm divides by at every width."""
        return self.n_embd

    @property
    def top_width(self) -> int:
        """The widest level: size of the attention and MLP matrices. In a hybrid the residual stream may be wider."""
        return self.n_embd

    @cached_property
    def modes(self) -> dict[str, int]:
        """Mode name -> width."""
        return mode_levels(self.top_width, self.d_ref, self.head_dim)

    @property
    def distinct_modes(self) -> dict[str, int]:
        """The modes without 'god' where another name stands for the full width already; the last one is the full width."""
        others = {name: d for name, d in self.modes.items() if name != "god"}
        return others if self.modes["god"] in others.values() else self.modes

    @cached_property
    def levels(self) -> tuple[int, ...]:
        """The allowed widths, ascending."""
        return tuple(sorted(set(self.modes.values())))

    @property
    def n_block(self) -> int:
        return self.n_layer

    @cached_property
    def exit_points(self) -> tuple[int, ...]:
        """Numbers of blocks after which a token may exit: 2/8, 3/8 ... 7/8 of them, in whole (attention, Mamba) pairs."""
        per_layer = self.n_block // self.n_layer
        return tuple(sorted({per_layer * max(1, round(self.n_layer * i / 8)) for i in range(2, 8)} - {self.n_block}))

    @classmethod
    def from_depth(cls, depth: int, vocab_size: int, sequence_len: int, aspect_ratio: int = 64,
                   head_dim: int | None = None) -> "GPTConfig":
        """
        One dial: the width is depth * aspect_ratio, rounded up to whole heads; a head has 128 dims, or as few as 32
        where that is needed for eight heads (a small model, too, wants several widths to choose from).
        Raises ValueError when a given head dim does not divide the width.
        """
        width = depth * aspect_ratio
        if head_dim is None:
            head_dim = next((hd for hd in (128, 64) if width >= 8 * hd), 32)
            width = -(-width // head_dim) * head_dim
        elif head_dim < 1 or width % head_dim:
            raise ValueError(f"width {width} (depth {depth} x aspect ratio {aspect_ratio}) is no multiple of the "
                             f"head dim {head_dim}: choose another --head-dim or --aspect-ratio")
        n_head = width // head_dim
        return cls(sequence_len, vocab_size, depth, n_head, n_head, width)


class Head(nn.Linear):
    """
    lm_head. Whoever needs its matrix calls it: where the model is sharded, a call is what makes the matrix whole.
    """
    def __init__(self, config: GPTConfig):
        super().__init__(config.n_embd, config.vocab_size, bias=False)
        self.softcap = config.softcap

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Hidden states (..., D) -> logits (..., vocab), fp32."""
        return head_logits(h, self.weight, self.softcap)

    def loss(self, h, targets, teacher=None, reduction="mean", text=0.0, teacher_head=None) -> torch.Tensor:
        """See loss_eval.head_loss."""
        return head_loss(h, self.weight, targets, self.softcap, teacher, reduction, text, teacher_head)


class GPT(nn.Module):
    """
    Parameter names are nanochat's: transformer.wte, transformer.h.{i}.{attn,mlp}.*, lm_head. Master weights are fp32;
    activations and matrix products run in the dtype of `self.compute_dtype`. Safe to build on the meta device; call
    `init_weights` (or load a checkpoint) after materialising.
    """
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "h": nn.ModuleList(self._make_blocks(config)),
        })
        assert len(self.transformer.h) == config.n_block
        self.lm_head = Head(config)
        if config.value_embeds:
            self.value_embeds = self._make_value_embeds()

    def _make_blocks(self, config):
        return [AttentionBlock(config, config.value_embeds and config.has_value_table(i), config.window_of(i))
                for i in range(config.n_layer)]

    def _make_value_embeds(self) -> nn.ModuleDict:
        """Block's number -> table, of every block that has value embeddings."""
        return nn.ModuleDict({str(i): nn.Embedding(self.config.vocab_size, block.attn.c_v.out_features)
                              for i, block in enumerate(self.transformer.h)
                              if block.kind == "attention" and block.attn.ve_gate is not None})

    @torch.no_grad()
    def init_weights(self):
        """
        nanochat's initialisation: embedding N(0, 1); matrices that read the residual stream uniform with standard
        deviation n_embd^-0.5; those that write to it zero, so that every block starts as the identity; head N(0, 0.001^2);
        value embeddings zero.
        """
        nn.init.normal_(self.transformer.wte.weight)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        bound = (3 / self.config.n_embd) ** 0.5
        for block in self.transformer.h:
            for module in (m for m in (getattr(block, "attn", None), block.mlp) if m is not None):
                for name, p in module.named_parameters():
                    if name.startswith(("c_proj", "ve_gate")):
                        nn.init.zeros_(p)
                    else:
                        nn.init.uniform_(p, -bound, bound)
        for table in getattr(self, "value_embeds", {}).values():
            nn.init.zeros_(table.weight)

    @property
    def device(self) -> torch.device:
        return self.transformer.wte.weight.device

    def resolve_widths(self, widths) -> list[int | torch.Tensor]:
        """
        None (full), a mode name, a width, one of these per block, or an int64 tensor on the CPU of levels per row and
        block (B, n_block) or per token and block (B, T, n_block) -> per block a width, or (B, T or 1) where rows differ.
        A list of soft prefix masks (matryoshka.soft_masks), one per block, stays what it is.
        ValueError if a level is not allowed.
        """
        modes, levels, n = self.config.modes, self.config.levels, len(self.transformer.h)
        if widths is None:
            return [self.config.top_width] * n
        if isinstance(widths, (str, int)):
            return [resolve_level(widths, modes, levels)] * n
        if type(widths) is list and len(widths) == n and all(type(w) is int and w in levels for w in widths):
            return widths[:]
        if isinstance(widths, torch.Tensor):
            if widths.dim() not in (2, 3) or widths.size(-1) != n:
                raise ValueError(f"widths of shape {tuple(widths.shape)} do not fit: give (rows, {n}) or "
                                 f"(rows, tokens, {n})")
            if len(widths) == 1 and widths.dim() == 2:
                return self.resolve_widths(widths[0].tolist())
            for level in widths.unique().tolist():
                resolve_level(level, modes, levels)
            each = (widths if widths.dim() == 3 else widths[:, None]).unbind(-1)
            least, most = (w.tolist() for w in widths.flatten(0, -2).aminmax(dim=0))
            return [low if low == high else w for low, high, w in zip(least, most, each)]
        if len(widths) != n:
            raise ValueError(f"{len(widths)} widths were given for {n} blocks")
        return [w if isinstance(w, torch.Tensor) else resolve_level(w, modes, levels) for w in widths]

    def hidden(self, idx: torch.Tensor, widths=None, exits=None, cache=None, lengths=None, control=None,
               resume=None) -> torch.Tensor:
        """
        idx (B, T) int64 -> the normed final hidden states (B, T, D). widths: see `resolve_widths`.
        exits: (B, T) int64 on the CPU, or a number for all, how many blocks update each token; the blocks behind only write
        its memory (keys, values, Mamba state), as decoding does (DESIGN 6). None: all blocks.
        cache: continue from it, and advance it by T tokens, or by lengths[r] in row r, whose other tokens are padding;
        without one, a sequence starts at position 0.
        control: decides on the way. At every exit point that some token reaches, control(i, x, exits, levels) sees the
        states x (B, T, D) that the head would get after i blocks, not normed yet (see `leaving`), and returns exits (B, T)
        and the levels of all blocks, changed only from i on. A control with a `bar` (see Controls) is not asked where a
        single token's gate leaves it nothing to decide, and is told the gate's answer otherwise; its exits may be a number.
        resume: of a single token, what BlockRun.greedy has left undecided. ValueError for a cache of another number of rows.
        """
        c, (B, T) = self.config, idx.shape
        if cache is not None:
            if B != len(cache.pos):
                raise ValueError(f"the cache holds {len(cache.pos)} rows, but the tokens are of {B}: give one of as many")
            cache.begin(T, lengths)
            rope = None  # the cache knows
        elif T > c.sequence_len:
            raise ValueError(f"{T} tokens do not fit the model's context of {c.sequence_len}: give a shorter text")
        else:
            rope = rope_tables(torch.arange(T, device=idx.device), c.head_dim, c.rope_base)
        bar = getattr(control, "bar", None) if idx.numel() == 1 and cache is not None and not cache.records else None
        if exits is None:
            exits = c.n_block
        if control is not None and bar is None and isinstance(exits, int):
            exits = torch.full((B, T), exits)

        def ends():
            return (exits, exits) if isinstance(exits, int) else tuple(int(n) for n in exits.aminmax())

        def next_point(i):
            return next((p for p in c.exit_points if p > i), c.n_block)
        first, deepest = ends()
        if first < 1 or not (isinstance(exits, int) or exits.shape == idx.shape):
            raise ValueError(f"exits must be a number, or (rows, tokens) = ({B}, {T}), and at least 1")
        levels, x, middle = self.resolve_widths(widths), None, None
        i, sure, going = 0, (), -1  # the gate's answer, where it is known; the exit point where the token is known to go on
        if resume is not None:
            i, x, *sure = resume
        while i < c.n_block:
            if i == c.backout_block:
                middle = x
            if control is not None and i in c.exit_points and i < deepest and i != going:
                exits, levels = control(i, self.leaving(x, middle, i), exits, levels, *sure)
                sure = ()
                first, deepest = ends()
            active, stop = None, i + 1
            if i >= deepest:
                if cache is None:
                    break  # nobody is left to be updated, and there is no memory to write
                if lengths is None:
                    cache.defer(i, idx, x, levels, middle)
                    break
                active = False
            elif i >= first:
                active = (exits > i).to(idx.device)
            elif bar is not None and first == c.n_block and (run := cache.compiled_run(idx, levels[i:])):
                stop = cache.settled(i)
                if stop == i:  # what owes something catches up as far as the token surely goes
                    stop = next_point(i)
                    cache.catch_up(i, stop)
                x, i, asked, sure = run.ahead(i, stop, idx, x, levels, cache, bar(levels[i:]))
                sure, going = ((sure,), -1) if asked else ((), i)
                continue
            else:
                stop = min(first, c.n_block if control is None else next_point(i))
                if i < c.backout_block:
                    stop = min(stop, c.backout_block)
            x = self.run(i, stop, idx, x, levels, rope, cache, active)
            i = stop
        if cache is not None:
            cache.advance()
        return norm(self.leaving(x, middle, exits), c.d_ref, c.norm_eps)

    def leaving(self, x: torch.Tensor, middle: torch.Tensor | None, exits: torch.Tensor | int) -> torch.Tensor:
        """
        What the final norm gets of states x (B, T, D) of tokens that leave after `exits` blocks, (B, T) or a number for all.
        middle: their states after backout_block blocks, of which those that went further take their share away. The others'
        state would be that in the middle, and to take a share of 1 or more away would turn it round.
        """
        share, block = self.config.backout_lambda, self.config.backout_block
        if not share or middle is None or (isinstance(exits, int) and exits <= block):
            return x
        if not isinstance(exits, int):
            middle = middle * (exits > block).to(x.device).unsqueeze(-1)
        return x - share * middle

    def finish(self, cache) -> torch.Tensor:
        """
        Takes back the exit of the tokens that the cache has deferred: the blocks that they left out update them after all,
        at full width, in one pass -> their normed final hidden states (B, T, D). They must have exited at one block.
        """
        c = self.config
        first, idx, x, middle = cache.reopen()
        levels = [c.top_width] * c.n_block
        if first <= c.backout_block < c.n_block:
            x = middle = self.run(first, c.backout_block, idx, x, levels, None, cache)
            first = c.backout_block
        x = self.run(first, c.n_block, idx, x, levels, None, cache)
        return norm(self.leaving(x, middle, c.n_block), c.d_ref, c.norm_eps)

    def run(self, first: int, last: int, idx, x, levels: list, rope, cache=None, active=None) -> torch.Tensor:
        """
        Blocks first, ..., last - 1 on the tokens idx (B, T) with states x (B, T, D), unless first is 0 -> their states
        behind. levels: of all blocks, as `resolve_widths` gives them; rope, cache and active as in AttentionBlock, but a
        cache knows the rope of the tokens that it expects.
        """
        if cache is not None:
            cache.catch_up(first, last)
        return self.through(first, last, idx, x, levels, rope, cache, active)

    def through(self, first: int, last: int, idx, x, levels: list, rope, cache=None, active=None) -> torch.Tensor:
        """`run` where these blocks of the cache owe nothing that must come before, as the caller has seen to."""
        if cache is not None:
            if not isinstance(active, torch.Tensor) and (run := cache.compiled_run(idx, levels[first:last])):
                return run(first, last, idx, x, levels, cache, write_only=active is False)
            rope = cache.chunk.rope
        start, x0_factors = None, self.config.x0_factors
        if first == 0:
            x = start = self.first_state(idx, cache)
        elif x0_factors and active is not False:
            start = self.first_state(idx, cache)
        for i, block in enumerate(self.transformer.h[first:last], first):
            level = levels[i]
            if isinstance(level, torch.Tensor) and not level.is_floating_point():
                level = int(level) if idx.numel() == 1 else level.expand(idx.shape)
            if x0_factors and x0_factors[i] and active is not False:
                x = add_prefix(x, x0_factors[i] * start, active)
            x = block(x, level, rope, self.value(i, idx), None if cache is None else cache[i], active)
        return x

    def first_state(self, idx: torch.Tensor, cache=None) -> torch.Tensor:
        """
        The states (B, T, D) of tokens idx (B, T) before the first block: their normed embeddings, each with its share of the
        one before (smear), at position 0 alone. cache: as in `run`; it knows the tokens before these.
        """
        c = self.config
        x = self.normed_embedding(idx)
        if not c.smear_gate:
            return x
        if cache is None:
            before = F.pad(x[:, :-1], (0, 0, 1, 0))
        else:
            ids, there = cache.tokens_before(idx)
            before = self.normed_embedding(ids) * there.unsqueeze(-1)
        gate = c.smear_lambda * torch.sigmoid(x[..., :len(c.smear_gate)] @ _vector(c.smear_gate, x.dtype, x.device))
        return x + gate.unsqueeze(-1) * before

    def normed_embedding(self, idx: torch.Tensor) -> torch.Tensor:
        """(B, T, D), of tokens idx (B, T)."""
        return norm(self.embed(self.transformer.wte, idx), self.config.d_ref, self.config.norm_eps)

    def embed(self, table: nn.Embedding, idx: torch.Tensor) -> torch.Tensor:
        return table(idx).to(self.compute_dtype)

    def value(self, i: int, idx: torch.Tensor):
        """Value embeddings of the tokens for block i, (B, T, kv width), or None where it has none."""
        table = self.value_table(i)
        return None if table is None else self.embed(table, idx)

    def value_table(self, i: int) -> nn.Embedding | None:
        """Block i's value embeddings, or None where it has none."""
        tables, key = self._modules.get("value_embeds"), str(i)
        return tables[key] if tables is not None and key in tables else None

    def forward(self, idx, targets=None, widths=None, exits=None, cache=None, lengths=None, control=None, teacher=None,
                reduction="mean", text=0.0, teacher_head=None):
        """
        idx (B, T) int64; widths, exits, cache, lengths, control: see `hidden`.
        Without targets: logits (B, T, vocab) fp32. With targets (B, T) int64 (-1 = not supervised):
        cross-entropy in nats, the mean or ("none") per token (B*T,), and the hidden states (B, T, D) detached.
        With `teacher` (B, T, D) hidden states too: KL(teacher || this pass), likewise; text, teacher_head: see
        loss_eval.head_loss.
        """
        h = self.hidden(idx, widths, exits, cache, lengths, control)
        if targets is None:
            assert teacher is None, "distillation needs targets: they say which positions are supervised"
            return self.logits(h)
        return self.lm_head.loss(h, targets, teacher, reduction, text, teacher_head), h.detach()

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """Hidden states (..., D) -> logits (..., vocab), fp32."""
        return self.lm_head(h)

    def cost(self, widths=None, context: float = 0, depth: int | None = None) -> dict[str, Cost]:
        """
        What one token costs that exits after `depth` blocks (None: all), at a mode, a width or a width per block, when
        attention sees `context` positions, in three parts: 'dynamic' (shrinks with width), 'static' (Mamba mixers),
        'head' (lm_head). Works on the meta device.
        """
        parts = [block_cost(block, d, context, depth is not None and i >= depth)
                 for i, (block, d) in enumerate(zip(self.transformer.h, self.resolve_widths(widths)))]
        head = self.config.n_embd * self.config.vocab_size
        return {"dynamic": sum((a for a, _ in parts), Cost()), "static": sum((b for _, b in parts), Cost()),
                "head": Cost(matmul=2 * head, weights=head)}

    def num_params(self) -> dict[str, int]:
        """Parameters by part, counted from the modules."""
        parts = {"embedding": self.transformer.wte, "lm_head": self.lm_head, "blocks": self.transformer.h}
        if self.config.value_embeds:
            parts["value_embeds"] = self.value_embeds
        counts = {name: sum(p.numel() for p in m.parameters()) for name, m in parts.items()}
        return counts | {"total": sum(p.numel() for p in self.parameters())}


@lru_cache(8)
def _vector(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """These numbers as a tensor, which is made once."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)
