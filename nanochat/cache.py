"""
What sequences leave behind for their next tokens: keys and values of every attention block, and the convolution and
SSM state of every Mamba block, in one object of bounded size, allocated once.

Rows may stand at different positions. A position keeps the heads it was computed with, and a query head sees the
positions that have that head (DESIGN 7); while a block's width never changes there is no mask for that.
"""
import copy
import itertools
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch

from nanochat.block_run import BlockRun
from nanochat.cpu_decode import MAX_ROWS, serves_rows, serves_tokens
from nanochat.mamba_block import WINDOW, MambaState
from nanochat.matryoshka import rope_tables


class Chunk:
    """
    T tokens a row that are about to be written: rows start at `starts`, and only the first lengths[r] tokens of row r are
    valid (all, if None). What the views need to know of it: `positions` (T,) or (B, T); `stop`, the end of the longest
    row; `uniform`, whether all rows stand at one position, `start`; else `slots`, where each valid token goes; and who may
    see what. tables: the rotary tables of all positions.
    """
    def __init__(self, starts: list[int], T: int, lengths: list[int] | None, tables: tuple[torch.Tensor, torch.Tensor]):
        self.ends = [p + n for p, n in zip(starts, lengths or [T] * len(starts))]
        self.starts, self.rows, self.T, self.tables, self.device = starts, len(starts), T, tables, tables[0].device
        self.slots, self.lengths, self.stop = None, None, max(self.ends)
        self.uniform, self.start = lengths is None and starts.count(starts[0]) == len(starts), starts[0]
        self.is_causal = self.uniform and T > 1 and self.start == 0
        if self.uniform:
            return
        if lengths is not None:
            self.lengths = torch.tensor(lengths, device=self.device)
        row, t = (self.positions < torch.tensor(self.ends, device=self.device)[:, None]).nonzero(as_tuple=True)
        self.slots = row, t, self.positions[row, t]  # of the valid tokens

    @cached_property  # a run of blocks does without those of uniform rows
    def positions(self) -> torch.Tensor:
        """(T,) of uniform rows, else (B, T)."""
        if self.uniform:
            return torch.arange(self.start, self.stop, device=self.device)
        return torch.tensor(self.starts, device=self.device)[:, None] + torch.arange(self.T, device=self.device)

    @cached_property
    def mask(self) -> torch.Tensor | None:
        """`causal`, or None where queries see all, or is_causal says it."""
        return None if self.uniform and (self.T == 1 or self.is_causal) else self.causal()

    def causal(self, window: int | None = None) -> torch.Tensor:
        """(1 or B, 1, T, positions) bool: a token sees the positions up to its own, at most `window` before it."""
        keys, own = torch.arange(self.stop, device=self.device), self.positions.unsqueeze(-1)
        seen = keys <= own
        if window is not None:
            seen &= keys >= own.clamp(max=self.stop - 1) - window  # padding too sees something: NaN would spread
        return seen[None, None] if seen.dim() == 2 else seen[:, None]

    @cached_property
    def rope(self) -> tuple[torch.Tensor, torch.Tensor]:
        """These tokens' rotary tables, (T, head_dim / 2) of uniform rows, else (B, T, head_dim / 2)."""
        if self.uniform:
            return tuple(t[self.start:self.stop] for t in self.tables)
        at = self.positions.clamp(max=len(self.tables[0]) - 1)  # of padding, which may stand beyond the end
        return tuple(t[at] for t in self.tables)

    @cached_property
    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and position of each token, two int64 (B * T,); the position of padding is -1."""
        position = self.positions.expand(self.rows, self.T).contiguous().view(-1)
        if self.slots is not None:
            row, t, s = self.slots
            position = torch.full_like(position, -1).index_copy_(0, row * self.T + t, s)
        return torch.arange(self.rows, device=self.device).repeat_interleave(self.T), position


class Prompt(NamedTuple):
    """
    The first tokens idx (B, T) of the rows, which have gone through the first `ran` blocks at these levels and wait for a
    token that goes further; their states x (B, T, D) there (None in front of the first block), and how many of each row are
    valid (all, if None).
    """
    idx: torch.Tensor
    x: torch.Tensor | None
    levels: list
    ran: int
    lengths: list[int] | None


class KVView:
    """One attention block's keys and values, (rows, kv heads, length, head_dim)."""
    def __init__(self, owner, k, v):
        self.owner, self.k, self.v = owner, k, v
        self.width = None   # query heads of every position so far, while that is one number
        self.heads = None   # (rows, length) int16 once it is not
        self._uniform = None  # `width` at the checkpoint

    def mark(self, heads: int | torch.Tensor) -> None:
        """Says how many query heads the tokens announced by `begin` have: an int, or (B, T)."""
        o = self.owner.chunk
        if self.heads is None:
            if isinstance(heads, int) and self.width in (None, heads):
                self.width = heads
                return
            self._differ()
        if o.slots is None:
            self.heads[:, o.start:o.stop] = heads if isinstance(heads, int) else heads.to(self.heads)
        else:
            row, t, s = o.slots
            self.heads[row, s] = heads if isinstance(heads, int) else heads.to(self.heads)[row, t]

    def write(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v (B, h, T, head_dim) of those tokens, for the first h heads."""
        o, h = self.owner.chunk, k.size(1)
        if o.slots is None:
            at = slice(o.start, o.stop)
            self.k[:, :h, at], self.v[:, :h, at] = k, v
        else:
            row, t, s = o.slots
            self.k[row, :h, s], self.v[row, :h, s] = k[row, :, t], v[row, :, t]

    def read(self, n_kv: int, n_head: int, window: int | None = None):
        """
        (k, v, mask, is_causal) for the queries of the tokens just written: the first n_kv heads of all positions, and
        mask (1 or B, 1 or n_head, T, positions) bool, None where queries see all, or all up to themselves (is_causal).
        window: how many positions before its own a query sees (None: all).
        """
        o = self.owner.chunk
        k, v = self.k[:, :n_kv, :o.stop], self.v[:, :n_kv, :o.stop]
        if window is not None and window < o.stop - 1:
            return self._read_window(k, v, n_head, window)
        if self.heads is None:
            return k, v, o.mask, o.is_causal
        have = self.heads[:, None, :o.stop] > torch.arange(n_head, device=k.device)[:, None]  # (B, n_head, positions)
        return k, v, have.unsqueeze(2) & o.causal(), False

    def _read_window(self, k: torch.Tensor, v: torch.Tensor, n_head: int, window: int):
        """`read` of (B, heads, positions, head_dim) where not all queries see all: what none of them sees is cut off."""
        o = self.owner.chunk
        first = max(0, min(o.starts) - window)
        k, v = k[:, :, first:], v[:, :, first:]
        if self.heads is None:
            return k, v, None if o.uniform and o.T == 1 else o.causal(window)[..., first:], False
        have = self.heads[:, None, first:o.stop] > torch.arange(n_head, device=k.device)[:, None]
        return k, v, have.unsqueeze(2) & o.causal(window)[..., first:], False

    def _differ(self) -> None:
        """From here on positions differ in their heads."""
        self.heads = torch.full((self.k.size(0), self.owner.length), self.width or 0, dtype=torch.int16,
                                device=self.k.device)
        self.width = None

    def checkpoint(self, window: int) -> None:
        """Keys and values need none: positions ahead of the cache's are never read."""
        self._uniform = self.width if self.heads is None else None

    def drop_checkpoint(self) -> None:
        self._uniform = None

    def rollback(self, block, keep: torch.Tensor) -> None:
        if self.heads is not None and self._uniform is not None and not bool(keep.any()):
            self.width, self.heads = self._uniform, None  # what had other heads is gone

    def clear(self) -> list[torch.Tensor]:
        """Forgets all; what is to be zeroed. (Heads that a position lacks are read, too, with no weight.)"""
        self.width = self.heads = self._uniform = None
        return [self.k, self.v]

    def keep(self, rows: list[int]) -> None:
        if rows == sorted(set(rows)):  # rows move to the front of their own memory, and only what they hold
            used = max((self.owner.pos[r] for r in rows), default=0)
            for to, r in enumerate(rows):
                if to != r:
                    for t in (self.k, self.v):
                        t[to, :, :used] = t[r, :, :used]
            self.k, self.v = self.k[:len(rows)], self.v[:len(rows)]
        else:
            self.k, self.v = self.k[rows], self.v[rows]
        self.heads = None if self.heads is None else self.heads[rows]

    def append(self, other: "KVView") -> None:
        if self.heads is not None or other.heads is not None or self.width != other.width:
            for view in (self, other):
                if view.heads is None:
                    view._differ()
            self.heads = torch.cat((self.heads, other.heads))
        self.k, self.v = torch.cat((self.k, other.k)), torch.cat((self.v, other.v))

    def clone(self, owner) -> "KVView":
        twin = KVView(owner, self.k.clone(), self.v.clone())
        twin.width, twin.heads = self.width, None if self.heads is None else self.heads.clone()
        return twin


class MambaView:
    """One Mamba block's conv and SSM state."""
    def __init__(self, owner, state):
        self.owner, self.state = owner, state

    def run(self, mixer, u: torch.Tensor, write_only: bool):
        """The mixer's output for u (B, T, D), or None if write_only; the state advances by the valid tokens."""
        return mixer(u, self.state, write_only=write_only, lengths=self.owner.chunk.lengths)

    def checkpoint(self, window: int) -> None:
        self.state.checkpoint(window)

    def drop_checkpoint(self) -> None:
        self.state.drop_checkpoint()

    def rollback(self, block, keep: torch.Tensor) -> None:
        block.mamba.rollback(self.state, keep)

    def clear(self) -> list[torch.Tensor]:
        self.state.drop_checkpoint()
        return [self.state.conv_state, self.state.ssm_state]

    def keep(self, rows: list[int]) -> None:
        self.state = self.state[rows]

    def append(self, other: "MambaView") -> None:
        a, b = self.state, other.state
        self.state = MambaState(torch.cat((a.conv_state.mT, b.conv_state.mT)).mT, torch.cat((a.ssm_state, b.ssm_state)))

    def clone(self, owner) -> "MambaView":
        return MambaView(owner, self.state.clone())


@lru_cache(8)  # making them takes as long as a token of a small model
def _tables(length, head_dim, base, device):
    """rope_tables of the first positions."""
    with torch.inference_mode(False), torch.no_grad():
        return rope_tables(torch.arange(length, device=device), head_dim, base)


class MatryoshkaKVCache:
    """
    Memory for `batch` sequences of up to `length` tokens. cache[i] is block i's view; pos[r] counts the tokens that row
    r holds. Keys and values are in the dtype of the model's activations, SSM states in fp32.

    What an exited token owes the blocks behind its exit (keys, values, Mamba state) may be deferred: block i is then
    behind[i] tokens late, and catches up, in one call, when a later token reaches it (DESIGN 6). Likewise a prompt: one that
    the cache is given to hold goes through a block, all of it at once, when a later token reaches the block, and no deeper
    than its answer ever does.

    The model's weights must stay where they are in memory for as long as the cache is used, or until it is cleared.
    """
    def __init__(self, model, batch: int, length: int):
        c, dtype, device = model.config, model.compute_dtype, model.device
        if length > c.sequence_len:
            raise ValueError(f"a cache of {length} tokens exceeds the model's context of {c.sequence_len}: "
                             "give a shorter prompt or ask for fewer tokens")
        self.pos, self.length, self.dtype, self.device, self.model = [0] * batch, length, dtype, device, model
        self.blocks, self.views, self._saved_pos = model.transformer.h, [], None
        self.chunk, self.behind = None, [0] * c.n_block
        self._late = []  # (tokens, states, levels) of the last steps, oldest first
        self._prompt = None
        self._run, self._native = None, not c.later_features  # which only the layers' PyTorch forms compute
        self._rope = _tables(length, c.head_dim, c.rope_base, device)
        # only the smear looks at earlier tokens themselves
        self.tokens = torch.zeros(batch, length, dtype=torch.int64, device=device) if c.smear_gate else None
        for block in model.transformer.h:
            if block.kind == "attention":
                shape = (batch, block.attn.n_kv(c.top_width), length, c.head_dim)
                k, v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
                self.views.append(KVView(self, k, v))
            else:
                self.views.append(MambaView(self, block.mamba.new_state(batch, device, dtype)))

    def __getitem__(self, i: int):
        return self.views[i]

    def begin(self, T: int, lengths: list[int] | None = None) -> None:
        """
        Announces a chunk of T tokens a row, of which only the first lengths[r] are valid (all, if None). The model calls
        it, then `advance`. ValueError when a row would not fit.
        """
        if lengths is not None and (len(lengths) != len(self.pos) or not 0 <= min(lengths) <= max(lengths) <= T):
            raise ValueError(f"lengths {lengths} do not fit: give one from 0 to {T} for each of {len(self.pos)} rows")
        ends = [p + n for p, n in zip(self.pos, lengths or [T] * len(self.pos))]
        if max(ends) > self.length:
            raise ValueError(f"{max(ends)} tokens do not fit the cache of {self.length}: allocate a longer one, or "
                             "give a shorter prompt")
        self.chunk = Chunk(self.pos, T, lengths, self._rope)

    def tokens_before(self, idx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Of the chunk's tokens idx (B, T), which are remembered: the token before each (B, T), and whether there is one
        (B, T). By positions, so that it does not matter how a text is cut into chunks, or what was taken back.
        """
        o = self.chunk
        if o.slots is None:
            self.tokens[:, o.start:o.stop] = idx
        else:
            row, t, s = o.slots
            self.tokens[row, s] = idx[row, t]
        at = o.positions.expand(idx.shape) - 1
        return self.tokens.gather(1, at.clamp(0, self.length - 1)), at >= 0

    def advance(self) -> None:
        """The announced tokens have been written by every block."""
        self.pos = self.chunk.ends

    def run_alone(self) -> BlockRun | None:
        """What makes a single row's plan in one call, where that can be done."""
        return self._compiled([]) if len(self.pos) == 1 and self.device.type == "cpu" and serves_rows(1) else None

    def compiled_run(self, idx: torch.Tensor, levels: list) -> BlockRun | None:
        """What runs blocks of these levels on the announced tokens idx (B, T) in one call, where that can be done."""
        return self._compiled(levels) if self.chunk.lengths is None and serves_tokens(idx) else None

    def _compiled(self, levels: list) -> BlockRun | None:
        if not self._native:
            return None
        if self._run is None:
            self._run = BlockRun.of(self.model)
        return self._run if self._run.takes(self.model.compute_dtype, levels) else None

    def greedy(self, text: list[int], limit: int, stop, levels: list, depth: int, bar=None):
        """
        BlockRun.greedy of the row that the cache holds, or None where that cannot be done: a row of its own on a CPU, no
        checkpoint, one level for all of a block's tokens, a short text; and where a prompt waits, it has begun, and it and
        what is owed are of these levels.
        """
        if len(self.pos) != 1 or self.records or self.device.type != "cpu" or not serves_rows(len(text)):
            return None
        self.begin(len(text) - 1 + limit)
        if (run := self._compiled(levels)) is None:
            return None
        if len(text) > 1:
            self.settle()
        prompt = self._prompt
        if prompt is not None and (not prompt.ran or prompt.levels != levels):
            return None
        if any(type(a) is not int or a != b for entry in self._late if entry[2] is not levels
               for a, b in zip(entry[2], levels)):
            if prompt is not None:
                return None
            self.settle()
        last = len(self.behind) if prompt is None else prompt.ran
        if max(self.behind[:last]) > MAX_ROWS:
            self.catch_up(0, last)
        owed = max(self.behind)
        return run.greedy(text, limit, stop, levels, depth, self, self._latest(owed) if owed else None, prompt, bar)

    def took(self, n: int, late: tuple[torch.Tensor, torch.Tensor] | None, levels: list, behind: list[int], ran: int,
             prompt: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """
        The first n of the announced tokens were run; behind[i] of the last ones owe block i, and late are the most that owe
        any (1, m), with their states (1, m, D), or None. ran: how many blocks the prompt has gone through; prompt: its
        tokens and states, if that has changed and there are blocks left.
        """
        self.pos, self.behind = [self.pos[0] + n], behind
        self._late = [] if late is None else [(*late, levels, None)]
        if ran == len(behind):
            self._prompt = None
        elif prompt is not None:
            self._prompt = Prompt(*prompt, levels, ran, None)

    # --- a prompt that waits

    def hold(self, idx: torch.Tensor, lengths: list[int] | None, levels: list) -> None:
        """Takes the rows' first tokens idx (B, T), lengths[r] of them valid (all, if None); no block runs on them yet."""
        assert not any(self.pos) and not self.records, "only what comes first can wait, and nothing under a checkpoint"
        assert lengths is None or (max(lengths) == idx.size(1) and len(lengths) > 1), "padding is for rows that differ"
        self.begin(idx.size(1), lengths)
        self._prompt = Prompt(idx, None, levels, 0, lengths)
        self.advance()

    def _run_prompt(self, last: int) -> None:
        """The prompt, which has gone through some blocks before `last`, goes through the others."""
        p = self._prompt
        chunk = Chunk([0] * len(p.idx), p.idx.size(1), p.lengths, self._rope)
        x = self._run_late(chunk, p.ran, last, p.idx, p.x, p.levels)
        self._prompt = p._replace(x=x, ran=last) if last < len(self.blocks) else None

    def _run_late(self, chunk: Chunk, first: int, last: int, idx, x, levels: list, active=None) -> torch.Tensor:
        """Blocks first, ..., last - 1 on tokens that came before the announced ones, whose chunk comes back."""
        now, self.chunk = self.chunk, chunk
        x = self.model.through(first, last, idx, x, levels, None, self, active)
        self.chunk = now
        return x

    # --- what exited tokens owe

    def defer(self, first: int, idx: torch.Tensor, x: torch.Tensor, levels: list, middle: torch.Tensor | None) -> None:
        """
        The announced tokens idx (B, T), with states x (B, T, D), owe blocks first, first + 1, ... their memory. middle: what
        GPT.leaving takes, should they be reopened.
        """
        if not any(self.behind):
            self._late.clear()
        self._late.append((idx, x, levels, middle))
        for i in range(first, len(self.behind)):
            self.behind[i] += idx.size(1)

    def catch_up(self, first: int, last: int) -> None:
        """Blocks first, ..., last - 1 write the memory of the tokens that owe it to them, and of a prompt that waits."""
        if self._prompt is not None and self._prompt.ran < last:
            self._run_prompt(last)
        if not any(self.behind):
            return
        for late, some in itertools.groupby(range(first, last), self.behind.__getitem__):
            if late:
                some = list(some)
                self._catch_up(some[0], some[-1] + 1, late)

    def settled(self, first: int) -> int:
        """The first block from `first` on that owes something or has not seen the prompt, or how many there are."""
        last = len(self.behind) if self._prompt is None else max(first, self._prompt.ran)
        return next((i for i in range(first, last) if self.behind[i]), last)

    @property
    def records(self) -> bool:
        """Whether there is a checkpoint to go back to."""
        return self._saved_pos is not None

    def _latest(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The last n > 0 of the deferred tokens (B, n), and their states (B, n, D)."""
        if len(self._late) == 1:
            return self._late[0][0][:, -n:], self._late[0][1][:, -n:]
        idx, x = (torch.cat([entry[j] for entry in self._late], 1)[:, -n:] for j in (0, 1))
        return idx, x

    def _catch_up(self, first: int, last: int, late: int) -> None:
        """Likewise, where all of them owe `late` tokens."""
        idx, x = self._latest(late)

        def level(i):
            each = [entry[2][i] for entry in self._late]
            if isinstance(each[0], int) and len(set(each)) == 1:
                return each[0]
            return torch.cat([torch.as_tensor(d).expand(entry[0].shape) for d, entry in zip(each, self._late)], 1)[:, -late:]
        levels = [level(i) if first <= i < last else None for i in range(len(self.behind))]
        self.behind[first:last] = [0] * (last - first)
        self._run_late(Chunk([p - late for p in self.pos], late, None, self._rope), first, last, idx, x, levels, False)

    def reopen(self) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """
        Announces the deferred tokens once more, which must all have exited at one block, to be updated after all by it and
        those behind it: that block, the tokens (B, T), their states (B, T, D), and those that `defer` got as `middle`.
        """
        late = max(self.behind)
        first = self.behind.index(late)
        assert late and set(self.behind[first:]) == {late} and not any(self.behind[:first]), "exits at several blocks"
        assert self._prompt is None, "a prompt waits"
        idx, x = self._latest(late)
        middles = [entry[3] for entry in self._late]
        middle = None if middles[0] is None else torch.cat(middles, 1)[:, -late:]
        self.chunk = Chunk([p - late for p in self.pos], late, None, self._rope)
        self._forget()
        return first, idx, x, middle

    def settle(self) -> None:
        """Every block catches up."""
        self.catch_up(0, len(self.behind))
        self._forget()

    def _forget(self) -> None:
        """Nobody owes anything."""
        self.behind, self._late = [0] * len(self.behind), []

    # --- going back

    def checkpoint(self, window: int = WINDOW) -> None:
        """From here on the cache can be truncated to any position of the next `window` tokens of a row."""
        self.settle()
        self._saved_pos = list(self.pos)
        for view in self.views:
            view.checkpoint(window)

    def drop_checkpoint(self) -> None:
        """Ends the recording, and with it the window."""
        self._saved_pos = None
        for view in self.views:
            view.drop_checkpoint()

    def truncate(self, pos: list[int]) -> None:
        """
        Takes each row back to an earlier position, as if it had never gone on. Mamba states go back to the checkpoint
        and replay the tokens since; so ValueError for a position before it, or ahead of the row.
        """
        keep = [p - start for p, start in zip(pos, self._saved_pos or [])]
        if not len(keep) == len(pos) == len(self.pos) or min(keep) < 0 or any(p > at for p, at in zip(pos, self.pos)):
            raise ValueError(f"rows at {self.pos} cannot go back to {pos}: a position must lie between the last "
                             f"checkpoint ({self._saved_pos}) and the row's own")
        if any(keep):
            self.settle()
        else:  # the checkpoint had settled what was owed before
            self._forget()
        index = torch.tensor(keep, device=self.device)
        for block, view in zip(self.blocks, self.views):
            view.rollback(block, index)
        self.pos, self._saved_pos = list(pos), list(pos)

    def clear(self) -> None:
        """Holds nothing, as if it were new: the model's weights may have moved since."""
        self.pos, self._saved_pos, self._prompt = [0] * len(self.pos), None, None
        self._forget()
        torch._foreach_zero_([memory for view in self.views for memory in view.clear()])
        if self._run is not None and self._run.stale():
            self._run = None

    # --- rows

    def keep(self, rows: list[int]) -> None:
        """Keeps these rows, at least one, in this order; the others are gone. A checkpoint is dropped."""
        def of_rows(levels):
            kept = [d if isinstance(d, int) or len(d) == 1 else d[rows] for d in levels]
            return [d if isinstance(d, int) or d.numel() > 1 else int(d) for d in kept]
        self._let_go()
        for view in self.views:
            view.keep(rows)
        self._late = [(idx[rows], x[rows], of_rows(levels), None if middle is None else middle[rows])
                      for idx, x, levels, middle in self._late]
        if self.tokens is not None:
            self.tokens = self.tokens[rows]
        if (p := self._prompt) is not None:
            lengths = [p.lengths[r] for r in rows] if p.lengths else [p.idx.size(1)] * len(rows)
            T = max(lengths)
            self._prompt = Prompt(p.idx[rows, :T], None if p.x is None else p.x[rows, :T], of_rows(p.levels), p.ran,
                                  lengths if min(lengths) < T else None) if T else None
        self.pos, self._saved_pos = [self.pos[r] for r in rows], None

    def append(self, other: "MatryoshkaKVCache") -> None:
        """Adds the rows of another cache of the same model and length. A checkpoint is dropped."""
        assert other.length == self.length, "caches of different lengths cannot be joined"
        self.settle(), other.settle()
        self._let_go()
        for mine, its in zip(self.views, other.views):
            mine.append(its)
        if self.tokens is not None:
            self.tokens = torch.cat((self.tokens, other.tokens))
        self.pos, self._saved_pos = self.pos + other.pos, None

    def _let_go(self) -> None:
        if self._run is not None:
            self._run.let_go()

    def clone(self) -> "MatryoshkaKVCache":
        """A copy that shares no memory, without a checkpoint."""
        twin = copy.copy(self)
        twin.pos, twin._saved_pos = list(self.pos), None
        twin.behind, twin._late, twin._run = list(self.behind), list(self._late), None
        twin.views = [view.clone(twin) for view in self.views]
        twin.tokens = None if self.tokens is None else self.tokens.clone()
        return twin
