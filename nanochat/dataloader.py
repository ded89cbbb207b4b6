r"""
Batches from one source or a weighted mixture of several, one process per rank, from a position that can be saved.

    loader = DataLoader(tokenizer, folder, "train", batch_size=8, seq_len=1024, rank=0, world_size=1)
    x, y = next(loader)             # int64 (8, 1024) each; y is x one token later, -1 where nothing is to be learnt
    state = loader.state()          # DataLoader(..., state=state) goes on exactly where this one stands

How documents fill a row is in packing.py. Each row is of one source, drawn by weight, so that a source's share of the tokens
is its weight's share.
"""
import json
import os
from collections.abc import Sequence

import torch

from nanochat.common import print0
from nanochat.mixture import Part
from nanochat.packing import RowStream, splitmix
from nanochat.tokenizer import Tokenizer

STATE_VERSION = 3


class DataLoader:
    """
    Endless iterator of (x, y), int64 (batch_size, seq_len) on `device`; y is x one token later, or -1 where the token is
    not to be learnt (a conversation's user, its tools' output, padding).

    tokenizer; data: a folder of shards (nanochat.shards), or the parts of a mixture; split: "train" or "val".
    rank, world_size: rank r reads the documents whose row + shard number is r modulo world_size.
    state: what `state()` gave, to go on exactly there: this rank's, or a list of all ranks'. A list of another number
        of ranks than world_size is gone on behind: each source at its furthest rank's position. batch_size is free: a
        position is a number of rows. A state for other data, weights, another tokenizer, sequence length, buffer size,
        seed, rank or world size is refused; with accept_changed one for other data or weights is gone on behind, too, at
        the nearest position that these data have.
    buffer_size: how many pieces of documents are there to choose from, in each source. seed: of the draws of sources.

    `epoch` is the number of times the split was read to its end (of a mixture: its least read source), `tokens_read` how
    many tokens this rank's batches so far had.
    iter() of the training split goes on where it stands; iter() of the validation split starts anew, so that each
    evaluation sees the same batches (and next() alone goes on).

    Raises ValueError for a share without documents, sizes below 1, malformed conversations, or a state that does not
    belong here.
    """

    def __init__(self, tokenizer: Tokenizer, data: str | os.PathLike | Sequence[Part], split: str, batch_size: int,
                 seq_len: int, rank: int = 0, world_size: int = 1, device: str | torch.device = "cpu",
                 state: dict | list[dict] | None = None, buffer_size: int = 1000, num_threads: int = 2, seed: int = 0,
                 accept_changed: bool = False):
        if min(batch_size, seq_len, buffer_size) < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch_size={batch_size}, seq_len={seq_len} and buffer_size={buffer_size} must be "
                             f"positive and rank={rank} one of world_size={world_size}")
        parts = [Part(1.0, data)] if isinstance(data, (str, os.PathLike)) else list(data)
        self.split, self.batch_size, self.seq_len = split, batch_size, seq_len
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.device = torch.device(device)
        self.weights = [part.weight / sum(part.weight for part in parts) for part in parts]
        self.streams = [RowStream(tokenizer, part.folder, split, seq_len, rank, world_size, buffer_size, num_threads)
                        for part in parts]
        self.identity = {"version": STATE_VERSION, "split": split, "data": [s.data for s in self.streams],
                         "weights": self.weights, "vocab_size": tokenizer.get_vocab_size(),
                         "tokenizer": tokenizer.fingerprint, "seq_len": seq_len,
                         "buffer_size": buffer_size, "seed": seed, "rank": rank, "world_size": world_size}
        self._rows = torch.empty((batch_size, seq_len + 1), dtype=torch.int64)
        # Two staging buffers: the copy to the GPU of one may still run while the next batch is packed.
        self._staging = [torch.empty((2, batch_size, seq_len), dtype=torch.int64, pin_memory=True)
                         for _ in range(2 if self.device.type == "cuda" else 0)]
        self._copied = [None] * len(self._staging)
        self.live = None  # which targets of the last batch are supervised, (B, T) bool on the CPU, whatever the device
        self.reset()
        if state is not None:
            self._load_state(state, accept_changed)

    def reset(self) -> None:
        """Back to the first documents of epoch 0."""
        self.rows = 0  # yielded so far
        self._draws = 0  # of sources so far: the whole state of that generator
        for stream in self.streams:
            stream.reset()

    @property
    def epoch(self) -> int:
        return min(stream.epoch for stream in self.streams)

    @property
    def tokens_read(self) -> int:
        return self.rows * self.seq_len

    # --- iteration

    def __iter__(self) -> "DataLoader":
        if self.split == "val":
            self.reset()
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        for row in self._rows.numpy():
            self._draw_source().fill(row)
        self.rows += self.batch_size
        x, y = self._rows[:, :-1], self._rows[:, 1:]
        x, y = x ^ (x >> 63), y.clamp(min=-1)  # ~v where v < 0; see packing.py
        self.live = y >= 0
        if self.device.type != "cuda":
            return x.to(self.device), y.to(self.device)
        slot = self.rows // self.batch_size % 2
        if self._copied[slot] is not None:
            self._copied[slot].synchronize()
        staging = self._staging[slot]
        staging[0].copy_(x)
        staging[1].copy_(y)
        x, y = staging.to(self.device, non_blocking=True)
        self._copied[slot] = torch.cuda.Event()
        self._copied[slot].record(torch.cuda.current_stream(self.device))
        return x, y

    def _draw_source(self) -> RowStream:
        if len(self.streams) == 1:
            return self.streams[0]
        self._draws += 1
        at = splitmix(splitmix(self.seed, self.rank + 1, 2**64), self._draws, 2**53) / 2**53
        for stream, weight in zip(self.streams, self.weights):
            at -= weight
            if at < 0:
                return stream
        return self.streams[-1]  # the weights' rounding

    # --- position

    def state(self) -> dict:
        """What resumes exactly behind the batches so far, JSON-serialisable: of this rank, each source's position."""
        return {"identity": self.identity, "rows": self.rows, "draws": self._draws,
                "sources": [stream.state() for stream in self.streams]}

    def _load_state(self, state: dict | list[dict], accept_changed: bool = False) -> None:
        states = state if isinstance(state, list) else [state]
        if not states or not all(isinstance(s, dict) and isinstance(s.get("identity"), dict) for s in states):
            raise ValueError("this is no data loader state: start without one")
        if isinstance(state, list):
            ranks = [s["identity"].get("rank") for s in states]
            if ranks != list(range(len(states))) or states[0]["identity"].get("world_size") != len(states):
                raise ValueError(f"the data position is that of ranks {ranks} and not of all ranks once: start without one")
        try:
            changed = accept_changed and self._changes(states[0])
            moved = bool(changed) or (isinstance(state, list) and len(states) != self.world_size)
            if isinstance(state, list) and not moved:
                states = [states[self.rank]]
            for s in states:
                self._check_identity(s, ({"rank", "world_size"} if moved and isinstance(state, list) else set())
                                     | ({"data", "weights"} if changed else set()))
            if moved:
                self.rows = sum(s["rows"] for s in states) // (self.world_size if isinstance(state, list) else 1)
                self._draws = max(s["draws"] for s in states)
                for i, stream in enumerate(self.streams):
                    sources = [s["sources"][i] for s in states]
                    stream.go_behind([stream.nearest(source) for source in sources] if changed else sources)
            else:
                self.rows, self._draws = states[0]["rows"], states[0]["draws"]
                for stream, source in zip(self.streams, states[0]["sources"], strict=True):
                    stream.load_state(source)
        except (KeyError, TypeError, IndexError, AttributeError) as e:
            raise ValueError(f"the data loader state is incomplete ({e!r}): start without one") from e
        if changed:
            print0(f"the data changed ({changed}): it goes on at the nearest position")

    def _changes(self, state: dict) -> str:
        """What of the data differs from those that a state was saved for, in words; empty where nothing does."""
        identity, sources = state["identity"], state["sources"]
        if len(sources) != len(self.streams):
            raise ValueError(f"the data position was saved for another mixture, of {len(sources)} sources and not "
                             f"{len(self.streams)}: resume with these, or start anew")
        words = [stream.changes(source) for stream, source, data in zip(self.streams, sources, identity.get("data", ()))
                 if stream.data != data]
        if (before := identity.get("weights")) != self.weights:
            words.append(f"the weights of the mixture were {before} and are {self.weights}")
        return "; ".join(words)

    def _check_identity(self, state: dict, free: set[str]) -> None:
        words = {"data": "dataset (its shards' names or sizes)", "vocab_size": "vocabulary size", "weights": "mixture"}
        here, identity = json.loads(json.dumps(self.identity)), state["identity"]  # as a saved one was
        for key in here:
            if key not in free and identity.get(key) != here[key]:
                what = f"{identity.get(key)}, here {here[key]}"
                if key in ("data", "weights"):
                    what = self._changes(state) + "; --accept-changed-data goes on at the nearest position"
                raise ValueError(f"the data position was saved for another {words.get(key, key)} ({what}): resume with what "
                                 "it was saved with, or start anew")
