r"""
Rows of one source: documents packed into rows of a fixed number of tokens, from a position that a few numbers describe.

As in nanochat every row begins with a document's <|bos|> and is filled with the longest buffered documents that fit whole.
When none fits, text is cropped to fill the row exactly: no padding. Different from nanochat, for corpora smaller or with
longer documents than its web pages:
- nothing is thrown away (nanochat drops what it crops, about 35 % of the tokens at 2048): the rest of a cropped
  document goes back into the buffer as a document of its own, so an epoch is every token once;
- a document longer than a row is cut into pieces of a row, and a row's first piece is drawn at random from the buffer:
  always the longest would put the pieces of one document next to each other in a batch.
A conversation that fits into a row is never cropped, or its question would be lost to its answer: the row is padded.

A row's entry v >= 0 is a token that is learnt, ~v < 0 one that is only read: all of text is learnt, of a conversation what
Tokenizer.render_conversation says.
"""
import hashlib
import json
import os
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator

import numpy as np

from nanochat import conversations
from nanochat.shards import iter_shard, list_shards, open_shard, shard_kind, split_text
from nanochat.tokenizer import Tokenizer

BUFFER_TOKENS = 8_000_000  # bound of the buffer beside the number of pieces; 4 bytes each
REFILL_UNITS, REFILL_CHARS = 64, 1_000_000  # what is tokenised at a time
SEED = 0x5DEECE66D


def splitmix(seed: int, count: int, n: int) -> int:
    """A number below n: the count-th of the splitmix64 generator, whose whole state is how often it was asked."""
    z = (seed + count * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return ((z ^ (z >> 31)) * n) >> 64


class RowStream:
    """
    The endless rows of `seq_len` + 1 tokens of one rank's share of a split: rank r reads the documents whose row + shard
    number is r modulo world_size. `epoch` is how often the split was read to its end. buffer_size: how many pieces of
    documents are there to choose from.
    Raises ValueError for a share without documents, and for malformed conversations.
    """
    def __init__(self, tokenizer: Tokenizer, folder: str | os.PathLike, split: str, seq_len: int, rank: int, world_size: int,
                 buffer_size: int, num_threads: int):
        self.tokenizer, self.split, self.num_threads = tokenizer, split, num_threads
        self.seq_len, self.buffer_size, self.rank, self.world_size = seq_len, buffer_size, rank, world_size
        self.shards = list_shards(folder, split)
        self.kind = shard_kind(self.shards[0])
        self.row_tokens = seq_len + 1
        # A text is tokenised in spans of so many characters: more than a row takes, whatever the text's size.
        self.span_chars = max(65_536, 8 * self.row_tokens)
        self.bos = tokenizer.get_bos_token_id()
        self.listing = [[p.name, p.stat().st_size] for p in self.shards]
        self.data = hashlib.blake2b(json.dumps(self.listing).encode(), digest_size=16).hexdigest()  # which shards these are
        self._check_share(folder)
        self.reset()

    def reset(self) -> None:
        """Back to the first document of epoch 0."""
        self.epoch = 0
        self._draws = 0  # random draws so far
        self._next = (0, 0, 0)  # shard, row, span: what the buffer takes next
        self._source = None
        self._serial = 0
        self._order: list[tuple[int, int]] = []  # sorted (tokens of the piece with its <|bos|>, serial number)
        self._pieces: dict[int, tuple[tuple[int, ...], np.ndarray]] = {}  # serial -> address, tokens without <|bos|>
        self._buffered = 0  # tokens in _pieces

    def fill(self, row: np.ndarray) -> None:
        """Packs the next row into `row`, int64 (seq_len + 1,), in place."""
        at, bos = 0, self.bos if self.kind == "text" else ~self.bos
        while at < len(row):
            self._refill()
            room = len(row) - at
            if at == 0:
                index = self._draw(len(self._order))  # its length is at most a row's
            else:
                # The longest that fits, of equally long ones the oldest; if none fits, the shortest is cropped.
                fits = bisect_right(self._order, (room, self._serial))
                if not fits and self.kind == "chat":
                    row[at:] = bos
                    return
                index = bisect_left(self._order, (self._order[fits - 1][0],)) if fits else 0
            length, serial = self._order.pop(index)
            address, tokens = self._pieces.pop(serial)
            self._buffered -= len(tokens)
            used = min(length, room)
            row[at] = bos
            row[at + 1:at + used] = tokens[:used - 1]
            at += used
            if used < length:
                shard, document, span, start, stop = address
                self._add((shard, document, span, start + used - 1, stop), tokens[used - 1:])

    def _draw(self, n: int) -> int:
        self._draws += 1
        return splitmix(SEED, self._draws, n)

    # --- the buffer

    def _add(self, address: tuple[int, ...], tokens: np.ndarray) -> None:
        """Into the buffer: tokens[start:stop] of a span of a document; address = (shard, row, span, start, stop)."""
        self._pieces[self._serial] = (address, tokens)
        insort(self._order, (len(tokens) + 1, self._serial))
        self._serial += 1
        self._buffered += len(tokens)

    def _refill(self) -> None:
        """
        Reads on until the buffer is full. At the end of an epoch it is emptied first, so that an epoch has each token
        exactly once.
        """
        empty_epochs = 0
        limit = max(BUFFER_TOKENS, 2 * self.row_tokens)
        while len(self._order) < self.buffer_size and self._buffered < limit:
            if self._next[0] == len(self.shards):
                if self._order:
                    return
                self.epoch += 1
                self._next, self._source = (0, 0, 0), None
                empty_epochs += 1
                if empty_epochs > 1:
                    raise ValueError(f"rank {self.rank} of {self.world_size} finds only empty documents in the "
                                     f"{self.split} split of {self.shards[0].parent}: use fewer ranks or more text")
            self._read_on()

    def _read_on(self) -> None:
        """Tokenises the next few spans into the buffer; the stream's position is behind them afterwards."""
        if self._source is None:
            self._source = self._spans(*self._next)
        units, chars = [], 0
        while len(units) < REFILL_UNITS and chars < REFILL_CHARS:
            try:
                address, text, self._next = next(self._source)
            except StopIteration:
                self._next = (len(self.shards), 0, 0)
                break
            units.append((address, text))
            chars += len(text)
        for (address, _), ids in zip(units, self._encode(units)):
            for start in range(0, len(ids), self.seq_len):
                piece = ids[start:start + self.seq_len].copy()  # a view would keep the whole span in memory
                self._add((*address, start, start + len(piece)), piece)

    def _encode(self, units: list[tuple[tuple[int, ...], str]]) -> list[np.ndarray]:
        """Entries (see above) of each (address, text), int32, without the first <|bos|>."""
        if self.kind == "text":
            ids = self.tokenizer.encode([text for _, text in units], num_threads=self.num_threads) if units else []
            return [np.array(row, dtype=np.int32) for row in ids]
        rows = []
        for (shard, row, *_), text in units:
            conversation = conversations.parse(text, f"{self.shards[shard]}, row {row}")
            ids, mask = (np.array(v[1:], dtype=np.int32) for v in self.tokenizer.render_conversation(conversation, 2**62))
            rows.append(np.where(mask > 0, ids, ~ids))
        return rows

    def _split(self, text: str) -> list[tuple[int, int]]:
        """The spans of a document that are tokenised apart: a conversation is one."""
        return split_text(text, self.span_chars) if self.kind == "text" else [(0, len(text))] if text else []

    def _spans(self, shard: int, row: int, span: int) -> Iterator[tuple[tuple, str, tuple]]:
        """(address (shard, row, span), text, position behind it) of this rank's share, from a position to the end."""
        for s in range(shard, len(self.shards)):
            for r, text in iter_shard(self.shards[s], start=row if s == shard else 0):
                if (r + s) % self.world_size != self.rank:
                    continue
                ends = self._split(text)
                for i, (start, stop) in enumerate(ends):
                    if (s, r) == (shard, row) and i < span:
                        continue
                    yield (s, r, i), text[start:stop], (s, r, i + 1) if i + 1 < len(ends) else (s, r + 1, 0)

    # --- where it stands

    def state(self) -> dict:
        """
        The position, JSON-serialisable: some 25 bytes for each buffered piece (where it stands, not its tokens), and the
        shards, by which a later one can tell what has changed.
        """
        return {"epoch": self.epoch, "draws": self._draws, "next": list(self._next), "shards": self.listing,
                "pieces": [list(address) for address, _ in self._pieces.values()]}

    def load_state(self, state: dict) -> None:
        """Goes on where `state` was taken, of this rank and world size. Raises ValueError where the text is not there."""
        self.reset()
        try:
            self.epoch, self._draws = state["epoch"], state["draws"]
            self._next = tuple(state["next"])
            addresses = [tuple(address) for address in state["pieces"]]
        except (KeyError, TypeError) as e:
            raise ValueError(f"the data loader state is incomplete ({e!r}): start without one") from e
        pieces = self._read_pieces(addresses)
        for address in addresses:  # in the order in which they came: among equal lengths the oldest goes first
            tokens = pieces.get(address)
            if tokens is None or len(tokens) != address[4] - address[3]:
                raise ValueError("the data position points to text that is not there: the shards were changed since it "
                                 "was saved; restore them or start anew")
            self._add(address, tokens)

    def go_behind(self, states: list[dict]) -> None:
        """
        Goes on behind the furthest of `states`, those of other ranks of another world size, with an empty buffer: what was
        buffered there comes again in the next epoch, and nothing is read twice.
        """
        self.reset()
        self.epoch, *at = max((s["epoch"], *s["next"]) for s in states)
        self._next, self._draws = tuple(at), max(s["draws"] for s in states)

    def changes(self, state: dict) -> str:
        """What differs between the shards of a saved state and these, in words; empty where nothing does."""
        if not isinstance(state.get("shards"), list):
            return "the position is an earlier version's and does not say which shards it was saved for"
        before, now = dict(map(tuple, state["shards"])), dict(map(tuple, self.listing))
        words = [f"{name} is gone" for name in before if name not in now]
        words += [f"{name} is new" for name in now if name not in before]
        words += [f"{name} had {before[name]:,} bytes and has {now[name]:,}" for name in now
                  if name in before and before[name] != now[name]]
        return ", ".join(words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")

    def nearest(self, state: dict) -> dict:
        """
        A state of other shards as one of these, as near as can be: the same row of the shard of the same name, or its end
        where it is shorter now; where that shard is gone, the beginning of the next one by name.
        """
        shard, row, span = state["next"]
        names = [name for name, _ in self.listing]
        before = [name for name, _ in state["shards"]] if isinstance(state.get("shards"), list) else names
        if shard >= len(before):  # the end
            return {**state, "next": [len(names), 0, 0]}
        at = bisect_left(names, before[shard])
        if at == len(names) or names[at] != before[shard]:
            return {**state, "next": [at, 0, 0]}
        file = open_shard(self.shards[at])
        rows = file.metadata.num_rows
        file.close()
        return {**state, "next": [at, row, span] if row < rows else [at + 1, 0, 0]}

    def _read_pieces(self, addresses: list[tuple[int, ...]]) -> dict[tuple[int, ...], np.ndarray]:
        """Address -> tokens, reading each row group that holds one of them once, tokenising a few spans at a time."""
        spans: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        rows: dict[int, set[int]] = {}
        for address in addresses:
            spans.setdefault(address[:3], []).append(address)
            rows.setdefault(address[0], set()).add(address[1])
        pieces: dict[tuple[int, ...], np.ndarray] = {}
        units: list[tuple[tuple[int, ...], str]] = []

        def encode() -> None:
            for (span, _), ids in zip(units, self._encode(units)):
                for address in spans[span]:
                    start, stop = address[3:]
                    pieces[address] = ids[start:stop].copy()
            units.clear()

        for shard, only in rows.items():
            for row, text in iter_shard(self.shards[shard], only=only):
                for i, (start, stop) in enumerate(self._split(text)):
                    if (shard, row, i) in spans:
                        units.append(((shard, row, i), text[start:stop]))
                        if len(units) == REFILL_UNITS:
                            encode()
        encode()
        return pieces

    def _check_share(self, folder: str | os.PathLike) -> None:
        rows = 0
        for s, path in enumerate(self.shards):
            file = open_shard(path)
            count = file.metadata.num_rows
            file.close()
            rows += count
            # Rows r of 0 .. count-1 with (r + s) % world_size == rank: the first is at (rank - s) % world_size.
            if (self.rank - s) % self.world_size < count:
                return
        raise ValueError(f"rank {self.rank} of {self.world_size} has no document in the {self.split} split of {folder} "
                         f"({rows} documents): use fewer ranks or more text")
