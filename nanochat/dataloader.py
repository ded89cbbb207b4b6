"""
Batches of tokens from the shards: BOS-aligned best-fit packing, sharded by rank, resumable to the token.

    loader = DataLoader(tokenizer, prepare("embedded"), "train", batch_size=8, seq_len=512)
    x, y = next(loader); state = loader.state()        # DataLoader(..., state=state) goes on where this one stands

As in nanochat every row begins with a document's <|bos|>, is filled with the longest buffered documents that fit whole,
and when none fits one is cropped to fill it exactly: no padding. Different from nanochat, for corpora smaller or with
longer documents than its web pages:
- nothing is thrown away (nanochat drops what it crops, about 35 % of the tokens at 2048): the rest of a cropped
  document goes back into the buffer as a document of its own, so an epoch is every token once;
- a document longer than a row is cut into pieces of a row, and a row's first piece is drawn at random from the buffer:
  always the longest would put the pieces of one document next to each other in a batch.
"""
import hashlib
import json
import os
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator

import numpy as np
import torch

from nanochat.dataset import iter_shard, list_shards, open_shard, split_text
from nanochat.tokenizer import Tokenizer

STATE_VERSION = 1
BUFFER_TOKENS = 8_000_000  # bound of the buffer beside the number of pieces; 4 bytes each
REFILL_UNITS, REFILL_CHARS = 64, 1_000_000  # what is tokenised at a time
SEED = 0x5DEECE66D


class DataLoader:
    """
    Endless iterator of (x, y), int64 (batch_size, seq_len) on `device`; y is x one token later.

    tokenizer, folder, split: text -> ids, a folder of shards (nanochat.dataset), "train" or "val".
    rank, world_size: rank r reads the documents whose row + shard number is r modulo world_size.
    state: what `state()` gave, to go on exactly there. A state for other data, another tokenizer, batch size, sequence
        length, buffer size, rank or world size is refused.
    buffer_size: how many pieces of documents are there to choose from.

    `epoch` is the number of times the split was read to its end, `tokens_read` how many tokens the batches so far had.
    iter() of the training split goes on where it stands; iter() of the validation split starts anew, so that each
    evaluation sees the same batches (and next() alone goes on).

    Raises ValueError for a share without documents, sizes below 1, or a state that does not belong here.
    """

    def __init__(self, tokenizer: Tokenizer, folder: str | os.PathLike, split: str, batch_size: int, seq_len: int,
                 rank: int = 0, world_size: int = 1, device: str | torch.device = "cpu", state: dict | None = None,
                 buffer_size: int = 1000, num_threads: int = 2):
        if min(batch_size, seq_len, buffer_size) < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch_size={batch_size}, seq_len={seq_len} and buffer_size={buffer_size} must be "
                             f"positive and rank={rank} one of world_size={world_size}")
        self.tokenizer, self.split, self.num_threads = tokenizer, split, num_threads
        self.batch_size, self.seq_len, self.buffer_size = batch_size, seq_len, buffer_size
        self.rank, self.world_size = rank, world_size
        self.device = torch.device(device)
        self.shards = list_shards(folder, split)
        self.row_tokens = seq_len + 1
        # A document is tokenised in spans of so many characters: more than a row takes, whatever the document's size.
        self.span_chars = max(65_536, 8 * self.row_tokens)
        self.bos = tokenizer.get_bos_token_id()
        self.identity = self._identity()
        self._check_share(folder)
        self._rows = torch.empty((batch_size, self.row_tokens), dtype=torch.int64)
        # Two staging buffers: the copy to the GPU of one may still run while the next batch is packed.
        self._staging = [torch.empty((2, batch_size, seq_len), dtype=torch.int64, pin_memory=True)
                         for _ in range(2 if self.device.type == "cuda" else 0)]
        self._copied = [None] * len(self._staging)
        self.reset()
        if state is not None:
            self._load_state(state)

    def reset(self) -> None:
        """Back to the first document of epoch 0."""
        self.epoch = 0
        self.batches = 0  # yielded so far
        self._draws = 0  # random draws so far: the whole state of the generator
        self._next = (0, 0, 0)  # shard, row, span: what the buffer takes next
        self._source = None
        self._serial = 0
        self._order: list[tuple[int, int]] = []  # sorted (tokens of the piece with its <|bos|>, serial number)
        self._pieces: dict[int, tuple[tuple[int, ...], np.ndarray]] = {}  # serial -> address, tokens without <|bos|>
        self._buffered = 0  # tokens in _pieces

    @property
    def tokens_read(self) -> int:
        return self.batches * self.batch_size * self.seq_len

    # --- iteration

    def __iter__(self) -> "DataLoader":
        if self.split == "val":
            self.reset()
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self._rows.numpy()
        for row in rows:
            self._fill(row)
        self.batches += 1
        if self.device.type != "cuda":
            return self._rows[:, :-1].to(self.device, copy=True), self._rows[:, 1:].to(self.device, copy=True)
        slot = self.batches % 2
        if self._copied[slot] is not None:
            self._copied[slot].synchronize()
        staging = self._staging[slot]
        staging[0].copy_(self._rows[:, :-1])
        staging[1].copy_(self._rows[:, 1:])
        x, y = staging.to(self.device, non_blocking=True)
        self._copied[slot] = torch.cuda.Event()
        self._copied[slot].record(torch.cuda.current_stream(self.device))
        return x, y

    def _fill(self, row: np.ndarray) -> None:
        """Packs one row of row_tokens ids in place."""
        at = 0
        while at < len(row):
            self._refill()
            room = len(row) - at
            if at == 0:
                index = self._draw(len(self._order))  # its length is at most a row's
            else:
                # The longest that fits, of equally long ones the oldest; if none fits, the shortest is cropped.
                fits = bisect_right(self._order, (room, self._serial))
                index = bisect_left(self._order, (self._order[fits - 1][0],)) if fits else 0
            length, serial = self._order.pop(index)
            address, tokens = self._pieces.pop(serial)
            self._buffered -= len(tokens)
            used = min(length, room)
            row[at] = self.bos
            row[at + 1:at + used] = tokens[:used - 1]
            at += used
            if used < length:
                shard, document, span, start, stop = address
                self._add((shard, document, span, start + used - 1, stop), tokens[used - 1:])

    def _draw(self, n: int) -> int:
        """A number below n, from a counter: the splitmix64 generator, whose whole state is how often it was asked."""
        self._draws += 1
        z = (SEED + self._draws * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return ((z ^ (z >> 31)) * n) >> 64

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
        for (address, _), ids in zip(units, self._encode([text for _, text in units])):
            for start in range(0, len(ids), self.seq_len):
                piece = ids[start:start + self.seq_len].copy()  # a view would keep the whole span in memory
                self._add((*address, start, start + len(piece)), piece)

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        ids = self.tokenizer.encode(texts, num_threads=self.num_threads) if texts else []
        return [np.array(row, dtype=np.int32) for row in ids]

    def _spans(self, shard: int, row: int, span: int) -> Iterator[tuple[tuple, str, tuple]]:
        """(address (shard, row, span), text, position behind it) of this rank's share, from a position to the end."""
        for s in range(shard, len(self.shards)):
            for r, text in iter_shard(self.shards[s], start=row if s == shard else 0):
                if (r + s) % self.world_size != self.rank:
                    continue
                ends = split_text(text, self.span_chars)
                for i, (start, stop) in enumerate(ends):
                    if (s, r) == (shard, row) and i < span:
                        continue
                    yield (s, r, i), text[start:stop], (s, r, i + 1) if i + 1 < len(ends) else (s, r + 1, 0)

    # --- what the stream is of

    def _identity(self) -> dict:
        """All that decides the stream, as JSON: a state holds for no other."""
        listing = json.dumps([[p.name, p.stat().st_size] for p in self.shards])
        return {"version": STATE_VERSION, "split": self.split,
                "data": hashlib.blake2b(listing.encode(), digest_size=16).hexdigest(),
                "vocab_size": self.tokenizer.get_vocab_size(), "tokenizer": self.tokenizer.fingerprint,
                "seq_len": self.seq_len, "batch_size": self.batch_size, "buffer_size": self.buffer_size,
                "rank": self.rank, "world_size": self.world_size}

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

    def state(self) -> dict:
        """
        What resumes exactly behind the batches so far: JSON-serialisable, some 25 bytes for each buffered piece (where
        it stands in the shards, not its tokens).
        """
        return {"identity": self.identity, "epoch": self.epoch, "batches": self.batches, "draws": self._draws,
                "next": list(self._next), "pieces": [list(address) for address, _ in self._pieces.values()]}

    def _load_state(self, state: dict) -> None:
        identity = state.get("identity") if isinstance(state, dict) else None
        if not isinstance(identity, dict):
            raise ValueError("this is no data loader state: start without one")
        words = {"data": "dataset (its shards' names or sizes)", "vocab_size": "vocabulary size"}
        for key, here in self.identity.items():
            if identity.get(key) != here:
                raise ValueError(f"the data position was saved for another {words.get(key, key)} ({identity.get(key)}, "
                                 f"here {here}): resume with what it was saved with, or start anew")
        try:
            self.epoch, self.batches, self._draws = state["epoch"], state["batches"], state["draws"]
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
            for (span, _), ids in zip(units, self._encode([text for _, text in units])):
                for address in spans[span]:
                    start, stop = address[3:]
                    pieces[address] = ids[start:stop].copy()
            units.clear()

        for shard, only in rows.items():
            for row, text in iter_shard(self.shards[shard], only=only):
                for i, (start, stop) in enumerate(split_text(text, self.span_chars)):
                    if (shard, row, i) in spans:
                        units.append(((shard, row, i), text[start:stop]))
                        if len(units) == REFILL_UNITS:
                            encode()
        encode()
        return pieces
