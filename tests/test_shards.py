"""The layout: shards, their rows and errors, texts and how they are cut."""
import os
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.shards import iter_shard, iter_texts, list_shards, open_shard, split_text


def write_shard(path, texts, rows=3, name="text", kind=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: pa.array(texts, kind)}), path, row_group_size=rows)
    return path


def make_texts(n, seed=0):
    rng = random.Random(seed)
    return [f"{i} " + " ".join(rng.choice(["one", "zwei", "três", "четыре", "五"]) for _ in range(rng.randrange(1, 30)))
            for i in range(n)]


def both_splits(folder):
    return list(iter_texts(folder, "train")), list(iter_texts(folder, "val"))


def all_documents(folder):
    train, val = both_splits(folder)
    return train + val


def nothing_made(base_dir):
    """Only lock files may be left of a failed preparation."""
    return not [p for p in Path(base_dir).rglob("*") if p.is_file() and p.suffix != ".lock"]


# --- reading the layout

def test_list_shards_last_is_validation(tmp_path):
    for i in range(4):
        write_shard(tmp_path / f"shard_{i:05d}.parquet", [str(i)])
    (tmp_path / "hub.json").write_text("{}")
    assert [p.name for p in list_shards(tmp_path, "train")] == [f"shard_{i:05d}.parquet" for i in range(3)]
    assert [p.name for p in list_shards(tmp_path, "val")] == ["shard_00003.parquet"]
    with pytest.raises(ValueError, match="use train or val"):
        list_shards(tmp_path, "test")


def test_list_shards_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no dataset folder .*python -m nanochat.dataset"):
        list_shards(tmp_path / "none", "train")
    with pytest.raises(FileNotFoundError, match=r"no \.parquet shard .*python -m nanochat.dataset"):
        list_shards(tmp_path, "train")
    write_shard(tmp_path / "a.parquet", ["x"])
    with pytest.raises(ValueError, match=r"holds one shard.*--data .*a\.parquet"):
        list_shards(tmp_path, "val")


def test_open_shard_names_what_is_wrong(tmp_path):
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"PAR1 this is no parquet file at all")
    with pytest.raises(ValueError, match=r"bad\.parquet is not a readable parquet file.*remove or replace"):
        open_shard(bad)
    whole = write_shard(tmp_path / "whole.parquet", make_texts(50)).read_bytes()
    bad.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match=r"bad\.parquet is not a readable"):
        open_shard(bad)
    with pytest.raises(ValueError, match=r"other\.parquet has no column 'text' \(it has: content\).*rename"):
        open_shard(write_shard(tmp_path / "other.parquet", ["x"], name="content"))
    with pytest.raises(ValueError, match=r"numbers\.parquet: column 'text' holds int64, not strings"):
        open_shard(write_shard(tmp_path / "numbers.parquet", [1, 2]))
    with pytest.raises(FileNotFoundError):
        open_shard(tmp_path / "none.parquet")


def test_damaged_pages_are_named(tmp_path):
    path = write_shard(tmp_path / "a.parquet", [os.urandom(500).hex() for _ in range(40)], rows=10)
    data = bytearray(path.read_bytes())
    data[200:len(data) // 2] = bytes(len(data) // 2 - 200)  # the footer stays whole
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet is damaged in row group 0"):
        list(iter_shard(path))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_iter_shard_from_any_row_and_any_rows(tmp_path, kind):
    texts = [*make_texts(20), None, "", *make_texts(5, seed=1)]
    path = write_shard(tmp_path / "a.parquet", texts, rows=4, kind=kind)
    oracle = [(i, text or "") for i, text in enumerate(texts)]
    for start in (0, 1, 3, 4, 13, 26, 27, 99):
        assert list(iter_shard(path, start)) == oracle[start:]
    for only in (set(), {0}, {26}, {3, 4, 5, 21}, {0, 26}, {99}):
        assert list(iter_shard(path, only=only)) == [oracle[i] for i in sorted(only) if i < len(oracle)]


def test_iter_shard_reads_no_row_group_in_vain(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "a.parquet", make_texts(20), rows=4)
    read, original = [], pq.ParquetFile.iter_batches

    def spy(self, *args, **kwargs):
        read.append(kwargs["row_groups"])
        return original(self, *args, **kwargs)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    list(iter_shard(path, start=13))
    assert read == [[3], [4]]
    read.clear()
    next(iter_shard(path))
    assert read == [[0]]
    read.clear()
    list(iter_shard(path, only={5, 18}))
    assert read == [[1], [4]]


def test_iter_texts_max_chars(tmp_path):
    for i in range(3):
        write_shard(tmp_path / f"{i}.parquet", make_texts(7, seed=i))
    whole = "".join(iter_texts(tmp_path, "train"))
    assert whole == "".join(make_texts(7, 0) + make_texts(7, 1))
    for n in (0, 1, 100, len(whole), len(whole) + 5):
        assert "".join(iter_texts(tmp_path, "train", n)) == whole[:n]


def test_split_text_covers_and_prefers_blank_lines():
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choices(["a", " ", "\n", "\n\n", "word", "ü"], weights=[9, 3, 1, 1, 3, 1], k=rng.randrange(300)))
        size = rng.randrange(1, 80)
        spans = split_text(text, size)
        assert "".join(text[a:b] for a, b in spans) == text
        assert all(0 < b - a <= size for a, b in spans)
    assert split_text("aaaaaa\n\nbb\ncccc", 12) == [(0, 8), (8, 15)]
    assert split_text("", 5) == []
