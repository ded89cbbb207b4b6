"""
What sequences leave behind for their next tokens: keys and values of every attention block, and the convolution and
SSM state of every Mamba block, in one object of bounded size, allocated once.

Rows may stand at different positions. A position keeps the heads it was computed with, and a query head sees the
positions that have that head (DESIGN 7); while a block's width never changes there is no mask for that.
"""
import torch


class KVView:
    """One attention block's keys and values, (rows, kv heads, length, head_dim)."""
    def __init__(self, owner, k, v):
        self.owner, self.k, self.v = owner, k, v
        self.width = None   # query heads of every position so far, while that is one number
        self.heads = None   # (rows, length) int16 once it is not

    def write(self, k: torch.Tensor, v: torch.Tensor, heads: int | torch.Tensor) -> None:
        """k, v (B, h, T, head_dim) of the tokens announced by `begin`; heads: query heads they have, int or (B, T)."""
        o, h, T = self.owner, k.size(1), k.size(2)
        if self.heads is None:
            if isinstance(heads, int) and self.width in (None, heads):
                self.width = heads
            else:
                self._differ()
        if o.slots is None:
            at = slice(o.start, o.start + T)
            self.k[:, :h, at], self.v[:, :h, at] = k, v
            if self.heads is not None:
                self.heads[:, at] = heads if isinstance(heads, int) else heads.to(self.heads)
        else:
            row, t, s = o.slots  # of the valid tokens
            self.k[row, :h, s], self.v[row, :h, s] = k[row, :, t], v[row, :, t]
            if self.heads is not None:
                self.heads[row, s] = heads if isinstance(heads, int) else heads.to(self.heads)[row, t]

    def read(self, n_kv: int, n_head: int):
        """
        (k, v, mask, is_causal) for the queries of the tokens just written: the first n_kv heads of all positions, and
        mask (1 or B, 1 or n_head, T, positions) bool, None where queries see all, or all up to themselves (is_causal).
        """
        o = self.owner
        k, v = self.k[:, :n_kv, :o.stop], self.v[:, :n_kv, :o.stop]
        if self.heads is None or bool((self.heads[:, :o.stop] >= n_head).all()):
            return k, v, o.mask, o.is_causal
        have = self.heads[:, None, :o.stop] > torch.arange(n_head, device=k.device)[:, None]  # (B, n_head, positions)
        return k, v, have.unsqueeze(2) & o.causal(), False

    def _differ(self) -> None:
        """From here on positions differ in their heads."""
        self.heads = torch.full((self.k.size(0), self.owner.length), self.width or 0, dtype=torch.int16,
                                device=self.k.device)
        self.width = None

    def tensors(self):
        return [t for t in (self.k, self.v, self.heads) if t is not None]


class MambaView:
    """One Mamba block's conv and SSM state."""
    def __init__(self, owner, state):
        self.owner, self.state = owner, state

    def run(self, mixer, u: torch.Tensor, write_only: bool):
        """The mixer's output for u (B, T, D), or None if write_only; the state advances by the valid tokens."""
        return mixer(u, self.state, write_only=write_only, lengths=self.owner.lengths)

    def tensors(self):
        return [self.state.conv_state, self.state.ssm_state]


class MatryoshkaKVCache:
    """
    Memory for `batch` sequences of up to `length` tokens. cache[i] is block i's view; pos[r] counts the tokens that row
    r holds. Keys and values are in the dtype of the model's activations, SSM states in fp32.
    """
    def __init__(self, model, batch: int, length: int):
        c, dtype, device = model.config, model.compute_dtype, model.device
        if length > c.sequence_len:
            raise ValueError(f"a cache of {length} tokens exceeds the model's context of {c.sequence_len}: "
                             "give a shorter prompt or ask for fewer tokens")
        self.pos, self.length, self.device = [0] * batch, length, device
        self.views = []
        for block in model.transformer.h:
            if block.kind == "attention":
                shape = (batch, c.n_kv_head, length, c.head_dim)
                k, v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
                self.views.append(KVView(self, k, v))
            else:
                self.views.append(MambaView(self, block.mamba.new_state(batch, device, dtype)))

    def __getitem__(self, i: int):
        return self.views[i]

    def begin(self, T: int, lengths: list[int] | None = None) -> torch.Tensor:
        """
        Announces a chunk of T tokens a row, of which only the first lengths[r] are valid (all, if None), and returns
        their positions, (T,) where all rows stand at the same, else (B, T). The model calls it, then `advance`.
        ValueError when a row would not fit.
        """
        ends = [p + n for p, n in zip(self.pos, lengths or [T] * len(self.pos))]
        if max(ends) > self.length:
            raise ValueError(f"{max(ends)} tokens do not fit the cache of {self.length}: allocate a longer one, or "
                             "give a shorter prompt")
        self.ends, self.slots, self.lengths = ends, None, None
        if lengths is None and len(set(self.pos)) == 1:
            self.start, self.stop = self.pos[0], ends[0]
            self.is_causal, self.mask = T > 1 and self.start == 0, None
            positions = torch.arange(self.start, self.stop, device=self.device)
            self._positions = positions
            if T > 1 and self.start > 0:
                self.mask = self.causal()
            return positions
        start = torch.tensor(self.pos, device=self.device)[:, None]
        offset = torch.arange(T, device=self.device)
        self._positions = start + offset  # (B, T)
        self.stop, self.is_causal = max(ends), False
        self.mask = self.causal()
        if lengths is not None:
            self.lengths = torch.tensor(lengths, device=self.device)
        row, t = (self._positions < torch.tensor(ends, device=self.device)[:, None]).nonzero(as_tuple=True)
        self.slots = row, t, self._positions[row, t]
        return self._positions.clamp(max=self.length - 1)

    def causal(self) -> torch.Tensor:
        """(1 or B, 1, T, positions) bool: a token sees the positions up to its own."""
        seen = torch.arange(self.stop, device=self.device) <= self._positions.unsqueeze(-1)
        return seen[None, None] if seen.dim() == 2 else seen[:, None]

    def advance(self) -> None:
        """The announced tokens have been written by every block."""
        self.pos = self.ends

    # --- rows

    def keep(self, rows: list[int]) -> None:
        """Keeps these rows, in this order; the others are gone and their memory is freed."""
        index = torch.tensor(rows, dtype=torch.long, device=self.device)
        self._map(lambda t: t[index])
        self.pos = [self.pos[r] for r in rows]

    def append(self, other: "MatryoshkaKVCache") -> None:
        """Adds the rows of another cache of the same model and length."""
        assert other.length == self.length, "caches of different lengths cannot be joined"
        for mine, its in zip(self.views, other.views):
            if isinstance(mine, KVView) and (mine.heads is not None or its.heads is not None or mine.width != its.width):
                for view in (mine, its):
                    if view.heads is None:
                        view._differ()
        pieces = [t for view in other.views for t in view.tensors()]
        self._map(lambda t: torch.cat((t, pieces.pop(0))))
        self.pos = self.pos + other.pos

    def clone(self) -> "MatryoshkaKVCache":
        """A copy that shares no memory."""
        copy = object.__new__(MatryoshkaKVCache)
        copy.pos, copy.length, copy.device = list(self.pos), self.length, self.device
        copy.views = []
        for view in self.views:
            if isinstance(view, KVView):
                twin = KVView(copy, view.k, view.v)
                twin.width, twin.heads = view.width, view.heads
            else:
                twin = MambaView(copy, type(view.state)(view.state.conv_state, view.state.ssm_state))
            copy.views.append(twin)
        copy._map(torch.clone)
        return copy

    def _map(self, fn) -> None:
        """Replaces every tensor by fn of it, in a fixed order."""
        for view in self.views:
            if isinstance(view, KVView):
                view.k, view.v = fn(view.k), fn(view.v)
                view.heads = None if view.heads is None else fn(view.heads)
            else:
                view.state.conv_state, view.state.ssm_state = fn(view.state.conv_state), fn(view.state.ssm_state)
