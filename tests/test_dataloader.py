"""Packing against a naive one, epochs against the corpus, resumed streams against unbroken ones, ranks against the whole."""
import collections
import itertools
import json
import random
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat import packing, training
from nanochat.dataloader import DataLoader
from nanochat.packing import RowStream
from nanochat.shards import iter_texts
from nanochat.tokenizer import Tokenizer

BOS = 256  # of the smallest vocabulary, in which a token is a byte: ids read as text


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train_from_iterator(["some text"], 265)


def write(folder, shards, rows=7):
    folder.mkdir(parents=True, exist_ok=True)
    for i, texts in enumerate(shards):
        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), folder / f"{i:05d}.parquet", row_group_size=rows)
    return folder


def documents(n, seed, longest=150):
    """Texts that begin with their number, of very different lengths, some empty."""
    rng = random.Random(seed)

    def body():
        return "".join(rng.choices("abcdefgh ", k=int(longest * rng.random()**3)))
    return ["" if rng.random() < 0.1 else f"{seed}.{i}:{body()}" for i in range(n)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    shards = [documents(23, 0), documents(40, 1, longest=700), documents(1, 2), documents(31, 3), documents(25, 4)]
    shards[1][5] = "giant:" + "".join(random.Random(9).choices("abcdefgh \n", k=5000))
    return write(tmp_path_factory.mktemp("data"), shards)


def rows_of(loader, n):
    """n batches as rows of seq_len + 1 ids; checks shapes, types, the shift, and that a row begins with <|bos|>."""
    rows = []
    for _ in range(n):
        x, y = next(loader)
        assert x.dtype == y.dtype == torch.int64
        assert x.shape == y.shape == (loader.batch_size, loader.seq_len)
        assert x.is_contiguous() and y.is_contiguous()
        assert torch.equal(x[:, 1:], y[:, :-1]) and torch.equal(loader.live, y >= 0)
        assert (x[:, 0] == BOS).all()
        assert 0 <= min(x.min(), y.min()) and max(x.max(), y.max()) <= BOS
        rows += torch.cat([x, y[:, -1:]], 1).tolist()
    return rows


def pieces_of(rows):
    """The rows cut before each <|bos|>, as texts."""
    pieces = []
    for row in rows:
        starts = [i for i, token in enumerate(row) if token == BOS]
        pieces += [bytes(row[a + 1:b]).decode() for a, b in itertools.pairwise([*starts, len(row)])]
    return pieces


# --- packing

def splitmix64(n):
    """Numbers in [0, 2^64), written from the generator's definition."""
    state = packing.SEED
    for _ in range(n):
        state = (state + 0x9E3779B97F4A7C15) & (2**64 - 1)
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        yield z ^ (z >> 31)


def naive_rows(texts, seq_len, buffer_size, n_rows, refill=packing.REFILL_UNITS):
    """The packing in its plainest form: lists, linear scans, one epoch after the other."""
    source, buffer, rows, draws = [], [], [], splitmix64(10**6)

    def read():
        nonlocal source
        if not source:
            source = [text.encode() for text in texts if text]
        while source and len(buffer) < buffer_size:
            for text in source[:refill]:
                buffer.extend(text[i:i + seq_len] for i in range(0, len(text), seq_len))
            source = source[refill:]
    read()
    for _ in range(n_rows):
        row = []
        while len(row) < seq_len + 1:
            if source or not buffer:
                read()
            room = seq_len + 1 - len(row)
            if not row:
                order = sorted(range(len(buffer)), key=lambda i: (len(buffer[i]), i))
                best = order[next(draws) * len(buffer) >> 64]
            else:
                best = None
                for i, piece in enumerate(buffer):
                    if len(piece) + 1 <= room and (best is None or len(piece) > len(buffer[best])):
                        best = i
                if best is None:
                    best = min(range(len(buffer)), key=lambda i: len(buffer[i]))
            piece = buffer.pop(best)
            row += [BOS, *piece[:room - 1]]
            if len(piece) > room - 1:
                buffer.append(piece[room - 1:])
        rows.append(row)
    return rows


@pytest.mark.parametrize("seq_len, buffer_size",
                         [(1, 1), (2, 5), (16, 1), (16, 40), (64, 10), (64, 1000), (300, 30), (2000, 200)])
def test_packing_equals_the_naive_one(tok, folder, seq_len, buffer_size):
    texts = list(iter_texts(folder, "train"))
    total = sum(len(t) + 1 for t in texts)
    n = min(2 * total // seq_len + 3, 300)
    loader = DataLoader(tok, folder, "train", 1, seq_len, buffer_size=buffer_size)
    assert rows_of(loader, n) == naive_rows(texts, seq_len, buffer_size, n)


def test_batches_are_the_rows_in_order(tok, folder):
    one = DataLoader(tok, folder, "train", 1, 32, buffer_size=50)
    four = DataLoader(tok, folder, "train", 4, 32, buffer_size=50)
    assert rows_of(one, 40) == rows_of(four, 10)
    assert four.tokens_read == one.tokens_read == 40 * 32


@pytest.mark.parametrize("seq_len, buffer_size", [(7, 3), (50, 40), (400, 1000)])
def test_an_epoch_is_every_token_once(tok, folder, seq_len, buffer_size):
    corpus = collections.Counter("".join(iter_texts(folder, "train")).encode())
    loader = DataLoader(tok, folder, "train", 1, seq_len, buffer_size=buffer_size)
    counts = collections.Counter()
    for epochs in (1, 2, 3):
        while loader.epoch < epochs:
            (row,) = rows_of(loader, 1)
            counts.update(token for token in row if token != BOS)
        # The row in which the epoch ended may have begun the next one.
        over = counts - collections.Counter({c: epochs * n for c, n in corpus.items()})
        assert all(counts[c] >= epochs * n for c, n in corpus.items())
        assert over.total() <= seq_len


def test_documents_that_fit_come_whole(tok, tmp_path):
    texts = [f"<{i}>" + "x" * (i % 23) for i in range(200)]
    folder = write(tmp_path, [texts, ["val"]])
    loader = DataLoader(tok, folder, "train", 2, 200, buffer_size=64)
    pieces = []
    while loader.epoch == 0:
        pieces += pieces_of(rows_of(loader, 1))
    whole = sum(piece in set(texts) for piece in pieces)
    assert whole > 0.9 * len(texts)  # at most one document of a row is cropped, its rest follows elsewhere
    assert len([p for p in pieces if p]) < 1.2 * len(texts) + 20


def test_pieces_of_a_document_are_spread(tok, tmp_path):
    """A batch must not be one document's neighbouring pieces, as the longest first would make it."""
    texts = [f"{chr(65 + i)}" * 100 * 31 for i in range(20)]
    folder = write(tmp_path, [texts, ["val"]])
    loader = DataLoader(tok, folder, "train", 8, 99, buffer_size=300)
    distinct = [len({row[1] for row in rows_of(loader, 1)}) for _ in range(20)]
    assert np.mean(distinct) > 4.5  # of 8 rows; 8 draws out of about 10 documents in the buffer give 5.7


# --- resume

def cut_points(n):
    return sorted({*range(0, n, 7), 1, 2, n - 1})


@pytest.mark.parametrize("batch_size, seq_len, buffer_size, rank, world_size",
                         [(2, 40, 30, 0, 1), (1, 300, 1000, 0, 1), (3, 16, 5, 1, 3), (2, 1000, 20, 1, 2)])
def test_resume_is_exact_everywhere(tok, folder, batch_size, seq_len, buffer_size, rank, world_size):
    def make(state=None):
        return DataLoader(tok, folder, "train", batch_size, seq_len, rank=rank, world_size=world_size, state=state,
                          buffer_size=buffer_size)
    loader, rows, states, epochs = make(), [], [], []
    while loader.epoch < 3 or len(rows) < 80:
        states.append(json.loads(json.dumps(loader.state())))
        epochs.append((loader.epoch, loader.tokens_read))
        rows.append(rows_of(loader, 1))
    for cut in cut_points(len(states)):
        resumed = make(states[cut])
        assert (resumed.epoch, resumed.tokens_read) == epochs[cut]
        assert resumed.state() == states[cut]
        for expected in rows[cut:cut + 30]:
            assert rows_of(resumed, 1) == expected
    # Resumed again and again, after every batch, through the ends of epochs.
    state = None
    for expected in rows[:60]:
        loader = make(state)
        assert rows_of(loader, 1) == expected
        state = json.loads(json.dumps(loader.state()))


@pytest.mark.parametrize("before, after", [(1, 4), (4, 1), (3, 2)])
def test_resume_with_another_batch_size_goes_on_with_the_next_row(tok, folder, before, after):
    def make(batch_size, **kwargs):
        return DataLoader(tok, folder, "train", batch_size, 40, buffer_size=30, **kwargs)
    rows = rows_of(make(1), 60)
    loader = make(before)
    assert rows_of(loader, 7) == rows[:7 * before]
    for state in (loader.state(), [loader.state()]):
        resumed = make(after, state=json.loads(json.dumps(state)))
        assert resumed.tokens_read == 7 * before * 40
        assert rows_of(resumed, 8) == rows[7 * before:7 * before + 8 * after]


def test_all_ranks_go_on_or_none(tok, folder, monkeypatch, capsys):
    """Where one rank cannot go on behind the phase before, no other may: their shares would be of two readings."""
    before = DataLoader(tok, folder, "train", 2, 40, seed=5)
    next(before)
    run = SimpleNamespace(args=SimpleNamespace(device_batch_size=2, seed=5, accept_changed_data=False),
                          loader=None, meta=None)
    loader = training.Run._open_data(run, tok, folder, 40, "cpu", [before.state()])
    assert loader.rows == 2 and "the data goes on behind the 80 tokens" in capsys.readouterr().out
    monkeypatch.setattr(training, "everyone", lambda value: [value, "rank 1 cannot"])
    loader = training.Run._open_data(run, tok, folder, 40, "cpu", [before.state()])
    assert loader.rows == 0 and "from its beginning, not where the phase before stopped: rank 1 cannot" in \
        capsys.readouterr().out
    run.meta = {}  # its own position is not given up
    with pytest.raises(ValueError, match="rank 1 cannot"):
        training.Run._open_data(run, tok, folder, 40, "cpu", None)


def test_resume_inside_a_giant_document(tok, folder, monkeypatch):
    """Documents that are tokenised in several spans, and a refill that stops in the middle of one."""
    monkeypatch.setattr(packing, "REFILL_UNITS", 3)

    def make(state=None):
        loader = DataLoader(tok, folder, "train", 1, 60, buffer_size=8, state=None)
        loader.streams[0].span_chars = 200
        if state is not None:
            loader._load_state(state)
        return loader
    loader, rows, states = make(), [], []
    while loader.epoch < 2:
        states.append(json.loads(json.dumps(loader.state())))
        rows += rows_of(loader, 1)
    assert any(s["sources"][0]["next"][2] > 3 for s in states)
    assert any(p[2] > 3 for s in states for p in s["sources"][0]["pieces"])
    for cut in range(0, len(states), 5):
        assert rows_of(make(states[cut]), 10)[:len(rows) - cut] == rows[cut:cut + 10]


def test_state_is_small_and_of_addresses(tok, folder):
    loader = DataLoader(tok, folder, "train", 4, 64)
    next(loader)
    text = json.dumps(loader.state())
    assert len(text) < 30 * len(loader.state()["sources"][0]["pieces"]) + 1000
    assert "giant" not in text


def test_foreign_states_are_refused(tok, folder, tmp_path):
    arguments = {"tokenizer": tok, "data": folder, "split": "train", "batch_size": 2, "seq_len": 32, "rank": 0,
                 "world_size": 2, "buffer_size": 50}
    loader = DataLoader(**arguments)
    next(loader)
    state = loader.state()
    DataLoader(**arguments, state=state)
    other = Tokenizer.train_from_iterator(["aaaa bbbb"], 267)
    swapped = Tokenizer([bytes([b]) for b in [1, 0, *range(2, 256)]])
    shorter = write(tmp_path / "shorter", [documents(5, 0), documents(5, 1)])
    for changes, words in [
        ({"tokenizer": other}, "another vocabulary size .265, here 267."), ({"tokenizer": swapped}, "another tokenizer"),
        ({"data": shorter}, "another dataset"), ({"split": "val"}, "another split"), ({"rank": 1}, "another rank"),
        ({"seq_len": 33}, "another seq_len"),
        ({"rank": 0, "world_size": 1}, "another world_size"), ({"buffer_size": 51}, "another buffer_size"),
    ]:
        with pytest.raises(ValueError, match=rf"saved for {words}.*or start anew") as info:
            DataLoader(**{**arguments, **changes}, state=state)
        assert "\n" not in str(info.value)
    for bad in ({}, [], {"identity": None}):
        with pytest.raises(ValueError, match="no data loader state: start without one"):
            DataLoader(**arguments, state=bad)
    with pytest.raises(ValueError, match="incomplete"):
        DataLoader(**arguments, state={"identity": state["identity"]})
    with pytest.raises(ValueError, match="text that is not there"):
        DataLoader(**arguments, state={**state, "sources": [{**state["sources"][0], "pieces": [[0, 10**6, 0, 0, 5]]}]})


# --- ranks and splits

@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_the_documents_out(tok, tmp_path, monkeypatch, world_size):
    shards = [[f"{s}.{r}" for r in range(n)] for s, n in enumerate((13, 2, 20, 5))]
    folder = write(tmp_path, [*shards, ["val"]], rows=4)
    read = collections.defaultdict(set)

    def spy(self, address, tokens):
        read[self.rank].add(address[:2])
        add(self, address, tokens)
    add = RowStream._add
    monkeypatch.setattr(RowStream, "_add", spy)
    for rank in range(world_size):
        loader = DataLoader(tok, folder, "train", 1, 9, rank=rank, world_size=world_size, buffer_size=6)
        while loader.epoch < 2:
            rows_of(loader, 1)
    seen = list(read.values())
    assert len(seen) == world_size
    assert set().union(*seen) == {(s, r) for s, shard in enumerate(shards) for r in range(len(shard))}
    assert sum(map(len, seen)) == 40  # disjoint
    assert max(map(len, seen)) - min(map(len, seen)) <= len(shards)


def test_splits_are_apart_and_val_restarts(tok, folder):
    val_texts = {t for t in iter_texts(folder, "val") if t}
    val = DataLoader(tok, folder, "val", 2, 2000)
    assert {p for p in pieces_of(rows_of(val, 1)) if p in val_texts}
    assert not any(p.startswith(("0.", "1.", "2.", "3.", "giant")) for p in pieces_of(rows_of(val, 3)))
    first = [x.tolist() for x, _ in itertools.islice(val, 3)]
    assert [x.tolist() for x, _ in itertools.islice(val, 3)] == first
    assert next(val)[0].tolist() not in first[:2]  # next() alone goes on
    train = DataLoader(tok, folder, "train", 2, 50)
    a = [x.tolist() for x, _ in itertools.islice(train, 3)]
    assert [x.tolist() for x, _ in itertools.islice(train, 3)] != a
    train.reset()
    assert [x.tolist() for x, _ in itertools.islice(train, 3)] == a


def test_batches_are_not_overwritten(tok, folder):
    loader = DataLoader(tok, folder, "train", 1, 30)
    kept = [next(loader) for _ in range(5)]
    again = DataLoader(tok, folder, "train", 1, 30)
    for x, y in kept:
        x2, y2 = next(again)
        assert torch.equal(x, x2) and torch.equal(y, y2)


# --- bounds and errors

def test_buffer_is_bounded_by_tokens_and_pieces(tok, tmp_path, monkeypatch):
    giant = "".join(random.Random(1).choices("abcdef \n", k=400_000))
    folder = write(tmp_path, [[giant, "small", giant[::-1]] + ["tiny"] * 300, ["val"]], rows=400)
    monkeypatch.setattr(packing, "BUFFER_TOKENS", 30_000)
    monkeypatch.setattr(packing, "REFILL_CHARS", 10_000)
    encoded = []
    encode = tok.encode
    monkeypatch.setattr(tok, "encode", lambda texts, **kw: (encoded.append(sum(map(len, texts))), encode(texts, **kw))[1])
    loader = DataLoader(tok, folder, "train", 4, 100, buffer_size=10**6)
    stream, most = loader.streams[0], 0
    for _ in range(600):
        next(loader)
        most = max(most, stream._buffered)
        assert stream._buffered == sum(len(tokens) for _, tokens in stream._pieces.values())
        held = [tokens if tokens.base is None else tokens.base for _, tokens in stream._pieces.values()]
        assert all(len(tokens) <= 100 for tokens in held)
    assert most <= 30_000 + 65_536 + 10_000 and max(encoded) <= 65_536 + 10_000  # one span over the limit at most
    loader = DataLoader(tok, folder, "train", 4, 100, buffer_size=20)
    stream = loader.streams[0]
    for _ in range(600):
        next(loader)
        assert len(stream._pieces) <= 20 + 700


def test_share_without_documents(tok, tmp_path):
    folder = write(tmp_path, [["a", "b"], ["c"]])
    for rank in range(2):
        DataLoader(tok, folder, "train", 1, 8, rank=rank, world_size=3)
    with pytest.raises(ValueError, match=r"rank 2 of 3 has no document in the train split .*2 documents.*fewer ranks"):
        DataLoader(tok, folder, "train", 1, 8, rank=2, world_size=3)
    with pytest.raises(ValueError, match=r"rank 1 of 2 has no document in the val split"):
        DataLoader(tok, folder, "val", 1, 8, rank=1, world_size=2)
    with pytest.raises(ValueError, match="finds only empty documents in the train split"):
        next(DataLoader(tok, write(tmp_path / "empty", [["", None, ""], ["c"]]), "train", 1, 8))


def test_bad_arguments(tok, folder, tmp_path):
    for changes in ({"batch_size": 0}, {"seq_len": 0}, {"buffer_size": 0}, {"rank": 1}, {"rank": -1}):
        with pytest.raises(ValueError, match="must be"):
            DataLoader(tok, folder, "train", **{"batch_size": 1, "seq_len": 8, **changes})
    with pytest.raises(FileNotFoundError, match="no dataset folder"):
        DataLoader(tok, tmp_path / "none", "train", 1, 8)
    with pytest.raises(ValueError, match="unknown split"):
        DataLoader(tok, folder, "test", 1, 8)
    bad = write(tmp_path / "bad", [["x"] * 9, ["y"], ["z"]])
    (bad / "00001.parquet").write_bytes(b"overwritten")
    loader = DataLoader(tok, bad, "train", 1, 8, buffer_size=1000)
    with pytest.raises(ValueError, match=r"00001\.parquet is not a readable parquet file"):
        next(loader)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_batches_equal_cpu_batches(tok, folder):
    cpu = DataLoader(tok, folder, "train", 4, 64)
    cuda = DataLoader(tok, folder, "train", 4, 64, device="cuda")
    kept = [next(cuda) for _ in range(50)]
    for x, y in kept:
        assert x.is_cuda and x.dtype == torch.int64
        x2, y2 = next(cpu)
        assert torch.equal(x.cpu(), x2) and torch.equal(y.cpu(), y2)
