"""The three sources become one layout; what is half-made never looks whole; every wrong input is one line with a remedy."""
import collections
import errno
import http.server
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
import tokenize
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from nanochat import dataset
from nanochat.dataset import (
    iter_shard,
    iter_texts,
    list_shards,
    open_shard,
    prepare,
    split_text,
)


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


# --- (c) embedded

@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    base = tmp_path_factory.mktemp("embedded")
    return base, prepare("embedded", base_dir=base)


def test_embedded_is_real_text_of_this_interpreter(embedded):
    _, folder = embedded
    assert sys.version.split()[0] in folder.name and folder.parent.name == "base_data"
    train, val = both_splits(folder)
    total = sum(map(len, train)) + sum(map(len, val))
    assert total > dataset.EMBEDDED_MIN_CHARS
    assert 0.03 < sum(map(len, val)) / total < 0.12
    texts = set(train) | set(val)
    assert len(texts) == len(train) + len(val)  # no duplicates, none on both sides
    with tokenize.open(json.__file__) as f:
        assert f.read().strip() + "\n" in texts
    assert any(text.startswith('The "with" statement') or "Compound statements" in text[:60] for text in texts)
    assert not any("class PytestPluginManager" in text for text in texts)  # no site-packages


def test_embedded_splits_share_little(embedded):
    train, val = both_splits(embedded[1])

    def shingles(text, n=13):
        words = text.split()
        return [hash(tuple(words[i:i + n])) for i in range(len(words) - n + 1)]
    seen = {s for text in train for s in shingles(text)}
    held = [s for text in val for s in shingles(text)]
    assert sum(s in seen for s in held) / len(held) < 0.06  # measured: 2.0 % with Python 3.11, mostly licence headers


def test_embedded_is_idempotent_and_repeatable(embedded, tmp_path, monkeypatch):
    base, folder = embedded
    again = prepare(base_dir=tmp_path)
    assert again.name == folder.name
    assert both_splits(again) == both_splits(folder)
    monkeypatch.setattr(dataset, "_stdlib_documents", lambda root: pytest.fail("made twice"))
    start = time.perf_counter()
    assert prepare("embedded", base_dir=base) == folder
    assert time.perf_counter() - start < 2


def fake_stdlib(tmp_path, monkeypatch, filler=40):
    root = tmp_path / "lib"
    for i in range(filler):
        path = root / f"mod{i}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# module {i}\n\n" + f"def f{i}():\n    return '{i:04d}'\n\n" * 10)
    monkeypatch.setattr(dataset.sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    monkeypatch.setattr(dataset, "EMBEDDED_MIN_CHARS", 1000)
    return root


def test_embedded_selection(tmp_path, monkeypatch):
    root = fake_stdlib(tmp_path, monkeypatch)
    for skipped in ("test/a.py", "email/tests/b.py", "site-packages/c.py", "encodings/cp1.py", "x/__pycache__/d.py"):
        (root / skipped).parent.mkdir(parents=True, exist_ok=True)
        (root / skipped).write_text(f"# SKIPPED {skipped}\n" * 20)
    (root / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n# caf\xe9 is written with an accent\n")
    (root / "broken.py").write_bytes(b"# -*- coding: no-such-codec -*-\n# SKIPPED\n")
    (root / "raw.py").write_bytes(b"# SKIPPED \xff\xfe\n")
    (root / "notes.txt").write_text("Notes on the library.\n")
    paragraph = "A paragraph that is long enough to be compared, as it has more than 120 characters. " * 2
    (root / "long.py").write_text(paragraph + "\n\n" + paragraph.upper() + "\n\n" + paragraph.title())
    (root / "copy.py").write_text(paragraph.upper() + "\n\nshort line of its own\n")
    (root / "pydoc_data").mkdir()
    topic = "The pass statement does nothing. " * 10
    (root / "pydoc_data/topics.py").write_text(f"topics = {{'pass': {topic!r}, 'with': 'With is a statement.'}}\n")
    train, val = both_splits(prepare(base_dir=tmp_path / "base"))
    texts = set(train + val)
    assert "SKIPPED" not in "".join(texts)
    assert any("café" in text for text in texts)
    assert {"Notes on the library.\n", topic.strip() + "\n", "With is a statement.\n"} <= texts
    assert sum("short line of its own" in text for text in texts) == 0  # most of it stands in long.py
    assert sum(paragraph.title().strip() in text for text in texts) == 1


def test_embedded_too_little_text(tmp_path, monkeypatch):
    fake_stdlib(tmp_path, monkeypatch, filler=1)
    with pytest.raises(ValueError, match=r"too little text.*local folder"):
        prepare(base_dir=tmp_path / "base")
    assert nothing_made(tmp_path / "base")


# --- (b) local

def write_sources(folder, texts):
    """The texts spread over .txt, .jsonl and .parquet files, in subfolders too."""
    folder.mkdir(parents=True, exist_ok=True)
    a, b, c = texts[::3], texts[1::3], texts[2::3]
    for i, text in enumerate(a):
        path = folder / f"sub{i % 3}" / f"{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (folder / "b.jsonl").write_text("".join(json.dumps({"id": 1, "text": t}) + "\n\n" for t in b))
    write_shard(folder / "c.parquet", c)
    (folder / "README.md").write_text("not a source")
    (folder / ".hidden.txt").write_text("not a source")


def test_local_keeps_every_document_once(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "GROUP_CHARS", 2000)
    monkeypatch.setattr(dataset, "SHARD_CHARS", 8000)
    texts = make_texts(300)
    write_sources(tmp_path / "src", texts)
    folder = prepare(tmp_path / "src", base_dir=tmp_path / "base")
    train, val = both_splits(folder)
    assert collections.Counter(train + val) == collections.Counter(texts)
    assert 0 < len(val) < 60
    assert len(list_shards(folder, "train")) > 1
    for shard in list_shards(folder, "train"):  # what a reader holds at once is bounded
        with pq.ParquetFile(shard) as file:
            for group in range(file.num_row_groups):
                assert sum(map(len, file.read_row_group(group)["text"].to_pylist())) < 2000 + 300
    assert folder == prepare(str(tmp_path / "src"), base_dir=tmp_path / "base")
    assert both_splits(prepare(tmp_path / "src", base_dir=tmp_path / "base2")) == (train, val)


def test_local_follows_its_source(tmp_path):
    write_sources(tmp_path / "src", make_texts(50))
    old = prepare(tmp_path / "src", base_dir=tmp_path / "base")
    (tmp_path / "src/new.txt").write_text("a new document")
    new = prepare(tmp_path / "src", base_dir=tmp_path / "base")
    assert new != old and "a new document" in all_documents(new)


def test_equal_documents_stand_on_one_side(tmp_path):
    texts = make_texts(100) * 3
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    train, val = both_splits(prepare(path, base_dir=tmp_path / "base"))
    assert val and not set(train) & set(val) and len(train + val) == 300


def test_two_documents_are_enough_and_both_splits_have_one(tmp_path):
    for i in range(6):
        path = tmp_path / f"{i}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{i} {j}"}) + "\n" for j in range(2)))
        train, val = both_splits(prepare(path, base_dir=tmp_path / "base"))
        assert sorted(train + val) == [f"{i} 0", f"{i} 1"] and len(val) == 1


def test_long_txt_is_cut_at_blank_lines_without_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "DOCUMENT_CHARS", 500)
    text = "\n\n".join(f"Paragraph {i} " + "wörter " * (i % 20) for i in range(2000))
    (tmp_path / "long.txt").write_text("\ufeff" + text, encoding="utf-8")
    train, val = both_splits(prepare(tmp_path / "long.txt", base_dir=tmp_path / "base"))
    pieces = train + val
    assert len(val) > 5 and max(map(len, pieces)) <= 500
    assert all(piece.startswith("Paragraph") for piece in pieces)
    pieces.sort(key=lambda piece: int(piece.split()[1]))
    assert "".join(pieces) == text


def test_lone_surrogates_of_json_do_not_stop_it(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "bad \\ud800 half"}\n{"text": "good"}\n')
    assert sorted(all_documents(prepare(tmp_path / "a.jsonl", base_dir=tmp_path / "base"))) == ["bad ? half", "good"]


def test_layout_is_used_in_place(tmp_path):
    for i in range(3):
        write_shard(tmp_path / "src" / f"{i}.parquet", make_texts(4, i))
    assert prepare(tmp_path / "src", base_dir=tmp_path / "base") == tmp_path / "src"
    assert not (tmp_path / "base").exists()
    write_shard(tmp_path / "src" / "1.parquet", ["x"], name="content")
    with pytest.raises(ValueError, match=r"1\.parquet has no column 'text'"):
        prepare(tmp_path / "src", base_dir=tmp_path / "base")


def test_one_parquet_file_is_split(tmp_path):
    path = write_shard(tmp_path / "src/only.parquet", [*make_texts(40), None, ""])
    for source in (path, tmp_path / "src"):
        train, val = both_splits(prepare(source, base_dir=tmp_path / "base"))
        assert sorted(train + val) == sorted(make_texts(40)) and train and val


def _local_error(kind, tmp_path):
    src = tmp_path / "src"
    src.mkdir()
    if kind == "empty":
        return src, FileNotFoundError, "no .parquet, .jsonl, .txt file in .*embedded"
    if kind == "extension":
        (src / "a.csv").write_text("x")
        return src / "a.csv", ValueError, r"a\.csv is none of .parquet, .jsonl, .txt: convert"
    if kind == "json":
        (src / "a.jsonl").write_text('{"text": "x"}\n' * 50 + "{broken\n")
        return src, ValueError, r"a\.jsonl, line 51 is not JSON"
    if kind == "field":
        (src / "a.jsonl").write_text('{"text": "x"}\n{"content": "y"}\n')
        return src, ValueError, r"a\.jsonl, line 2 has no string in a field 'text'.*rename"
    if kind == "utf8":
        (src / "a.txt").write_bytes(b"fine text and " * 10 + "caf\xe9".encode("latin1"))
        return src, ValueError, r"a\.txt is not UTF-8.*convert it"
    if kind == "one":
        (src / "a.txt").write_text("a single document")
        return src, ValueError, "holds only one document.*add text"
    if kind == "same":
        (src / "a.jsonl").write_text('{"text": "x"}\n' * 9)
        return src, ValueError, "holds only one document.*add text"
    if kind == "blank":
        (src / "a.txt").write_text("\n \n")
        return src, ValueError, "holds no document.*add text"
    if kind == "parquet":
        (src / "a.parquet").write_bytes(b"nope")
        (src / "b.txt").write_text("text")
        return src, ValueError, r"a\.parquet is not a readable parquet file"
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["empty", "extension", "json", "field", "utf8", "one", "same", "blank", "parquet"])
def test_local_errors_leave_nothing(tmp_path, kind):
    source, error, message = _local_error(kind, tmp_path)
    with pytest.raises(error, match=message) as info:
        prepare(source, base_dir=tmp_path / "base")
    assert "\n" not in str(info.value)
    assert nothing_made(tmp_path / "base")


@pytest.mark.parametrize("source, error, message", [
    ("./none", FileNotFoundError, "no such file or folder: ./none.*embedded"),
    ("~/none/at/all", FileNotFoundError, "no such file or folder.*embedded"),
    ("some/corpus.jsonl", FileNotFoundError, "no such file or folder.*embedded"),
    ("imdb", ValueError, "neither an existing path nor a hub dataset owner/name.*embedded"),
    ("a/b/c", ValueError, "neither an existing path nor a hub dataset owner/name.*embedded"),
])
def test_sources_that_are_nothing(tmp_path, source, error, message):
    with pytest.raises(error, match=message):
        prepare(source, base_dir=tmp_path)


def test_an_existing_path_wins_over_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_sources(tmp_path / "owner/name", make_texts(30))
    assert prepare("owner/name", base_dir=tmp_path / "base").name.startswith("name-")


def test_a_killed_conversion_is_not_taken_for_a_whole_one(tmp_path):
    write_sources(tmp_path / "src", make_texts(60))
    whole = prepare(tmp_path / "src", base_dir=tmp_path / "base1")
    # The same conversion, killed in its middle: the reader of the second file never returns.
    code = (f"import os, signal\nfrom nanochat import dataset\n"
            f"dataset._READERS['.parquet'] = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
            f"dataset.prepare({str(tmp_path / 'src')!r}, base_dir={str(tmp_path / 'base2')!r})")
    assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == -9
    left = [p.name for p in (tmp_path / "base2/base_data").iterdir()]
    assert whole.name not in left and any(name.endswith(".tmp") for name in left)
    again = prepare(tmp_path / "src", base_dir=tmp_path / "base2")
    assert both_splits(again) == both_splits(whole)
    assert [p.name for p in again.parent.iterdir() if p.is_dir()] == [whole.name]


def test_full_disk_while_converting(tmp_path, monkeypatch):
    write_sources(tmp_path / "src", make_texts(60))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "write_table", full)
        with pytest.raises(OSError, match=r"no room left to write .*free some disk space"):
            prepare(tmp_path / "src", base_dir=tmp_path / "base")
    assert nothing_made(tmp_path / "base")
    prepare(tmp_path / "src", base_dir=tmp_path / "base")


def test_two_at_once_make_it_once(tmp_path, monkeypatch):
    write_sources(tmp_path / "src", make_texts(60))
    calls, original = [], dataset._write_layout

    def slow(*args):
        calls.append(1)
        time.sleep(0.2)
        return original(*args)
    monkeypatch.setattr(dataset, "_write_layout", slow)
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(prepare(tmp_path / "src", base_dir=tmp_path / "base")))
               for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1 and len(folders) == 4 and len(calls) == 1


# --- (a) hub

class StubHub:
    """Stands for the hub: a folder of shards; counts requests, fails on demand."""

    def __init__(self, root, monkeypatch):
        self.root, self.fail, self.requests, self.down = root, collections.Counter(), [], False
        self.running = self.most = 0
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)
        monkeypatch.setattr(dataset, "RETRY_SECONDS", 0.001)

    def dataset_info(self, repo, files_metadata, timeout):
        self.requests.append(repo)
        if self.down:
            raise RuntimeError("Name or service not known\nsecond line")
        names = sorted(p.relative_to(self.root).as_posix() for p in self.root.rglob("*") if p.is_file())
        sibling = collections.namedtuple("Sibling", "rfilename size")
        info = collections.namedtuple("Info", "sha siblings")
        return info("cafe", [sibling(n, (self.root / n).stat().st_size) for n in names])

    def download(self, repo, name, repo_type, revision, local_dir):
        assert (repo_type, revision) == ("dataset", "cafe")
        self.requests.append(name)
        self.running += 1
        self.most = max(self.most, self.running)
        time.sleep(0.02)
        self.running -= 1
        if self.down or self.fail[name] > 0:
            self.fail[name] -= 1
            raise RuntimeError("connection reset")
        target = Path(local_dir) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((self.root / name).read_bytes())
        return str(target)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    for i in range(7):
        write_shard(tmp_path / "remote/data" / f"shard_{i:05d}.parquet", make_texts(5, i))
    (tmp_path / "remote/README.md").write_text("card")
    return StubHub(tmp_path / "remote", monkeypatch)


def test_hub_fetches_what_is_asked_and_the_last(tmp_path, hub):
    folder = prepare("own/set", num_shards=3, workers=3, base_dir=tmp_path / "base")
    assert folder == tmp_path / "base/base_data/own--set"
    train, val = both_splits(folder)
    assert train == [text for i in range(3) for text in make_texts(5, i)] and val == make_texts(5, 6)
    assert hub.most > 1  # several at once
    assert hub.requests[1] == "data/shard_00006.parquet"  # validation before everything else
    assert not (folder / ".download").exists()


def test_hub_needs_no_network_for_what_is_there_and_extends(tmp_path, hub):
    folder = prepare("own/set", num_shards=2, base_dir=tmp_path / "base")
    hub.down, hub.requests = True, []
    assert prepare("own/set", num_shards=2, base_dir=tmp_path / "base") == folder and not hub.requests
    assert prepare("own/set", num_shards=1, base_dir=tmp_path / "base") == folder and not hub.requests
    hub.down = False
    prepare("own/set", num_shards=4, base_dir=tmp_path / "base")
    assert sorted(hub.requests) == ["data/shard_00002.parquet", "data/shard_00003.parquet"]
    prepare("own/set", num_shards=10**6, base_dir=tmp_path / "base")
    assert len(list_shards(folder, "train")) == 6 and len(list_shards(folder, "val")) == 1


def test_hub_retries_and_goes_on_after_an_interruption(tmp_path, hub):
    hub.fail.update({"data/shard_00000.parquet": 2, "data/shard_00002.parquet": 99})
    with pytest.raises(ConnectionError, match=r"shard_00002.parquet could not be fetched.*connection reset.*embedded"):
        prepare("own/set", num_shards=3, workers=1, base_dir=tmp_path / "base")
    folder = tmp_path / "base/base_data/own--set"
    assert [p.name for p in sorted(folder.glob("*.parquet"))] == [f"data--shard_0000{i}.parquet" for i in (0, 1, 6)]
    hub.fail.clear()
    hub.requests.clear()
    prepare("own/set", num_shards=3, base_dir=tmp_path / "base")
    assert hub.requests == ["data/shard_00002.parquet"]


def test_hub_without_network_names_the_alternatives(tmp_path, hub):
    hub.down = True
    with pytest.raises(ConnectionError, match=r"own/set could not be fetched.*local folder or file.*'embedded'") as info:
        prepare("own/set", base_dir=tmp_path / "base")
    assert "\n" not in str(info.value) and nothing_made(tmp_path / "base")


def test_hub_errors(tmp_path, hub, monkeypatch):
    (hub.root / "data/shard_00001.parquet").write_bytes(b"an error page")
    with pytest.raises(ValueError, match=r"shard_00001\.parquet is not a readable parquet file"):
        prepare("own/set", base_dir=tmp_path / "base")
    assert not (tmp_path / "base/base_data/own--set/data--shard_00001.parquet").exists()
    with pytest.raises(ValueError, match="num_shards=0"):
        prepare("own/set", num_shards=0, base_dir=tmp_path / "base")
    for path in list(hub.root.rglob("*.parquet"))[1:]:
        path.unlink()
    with pytest.raises(ValueError, match=r"own/other holds 1 .parquet files.*choose another"):
        prepare("own/other", base_dir=tmp_path / "base")

    def missing(*args, **kwargs):
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError, "404")
    monkeypatch.setattr(hub, "dataset_info", missing)
    with pytest.raises(ValueError, match=r"own/none: no such dataset on the hub.*embedded"):
        prepare("own/none", base_dir=tmp_path / "base")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(hub, "dataset_info", full)
    with pytest.raises(OSError, match="no room left"):
        prepare("own/none", base_dir=tmp_path / "base")


class _HubHandler(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as its client needs; each file's first transfer breaks off half-way."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        root, broken, ranges = self.server.root, self.server.broken, self.server.ranges
        if self.path.startswith("/api/"):
            body = json.dumps({"id": "own/set", "sha": "c" * 40, "siblings": [
                {"rfilename": p.name, "size": p.stat().st_size} for p in sorted(root.iterdir())]}).encode()
            return self._send(200, body, {"Content-Type": "application/json"})
        data = (root / self.path.rpartition("/")[2]).read_bytes()
        headers = {"ETag": f'"{len(data):040d}"', "X-Repo-Commit": "c" * 40, "Accept-Ranges": "bytes"}
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked:
            start = int(asked[1])
            ranges.append(start)
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self._send(206, data[start:], headers)
        cut = None if self.command == "HEAD" or self.path in broken else len(data) // 2
        if cut:
            broken.add(self.path)
        return self._send(200, data, headers, cut)

    def _send(self, code, body, headers, cut=None):
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        self.close_connection = cut is not None


def test_hub_through_its_real_client(tmp_path):
    """huggingface_hub itself against a local server that breaks every transfer once: the rest is fetched, not the whole."""
    for i in range(3):
        write_shard(tmp_path / "remote" / f"{i}.parquet", [os.urandom(400).hex() for _ in range(2000)], rows=500)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _HubHandler)
    server.root, server.broken, server.ranges = tmp_path / "remote", set(), []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1",
           "NANOCHAT_BASE_DIR": str(tmp_path / "base"), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    try:
        # The client writes whole chunks: with its 10 MB nothing of these small files would be kept.
        code = ("import huggingface_hub.constants as c; c.DOWNLOAD_CHUNK_SIZE = 65536; import sys; "
                "sys.argv[1:] = ['--data', 'own/set']; from nanochat.dataset import main; main()")
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=100)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "base/base_data/own--set"
    for i in range(3):
        assert (folder / f"{i}.parquet").read_bytes() == (tmp_path / "remote" / f"{i}.parquet").read_bytes()
    assert len(server.broken) == 3 and len(server.ranges) == 3 and min(server.ranges) > 0
    assert "fetching 3 shards" in done.stderr and str(folder) in done.stdout


# --- the command

def test_command_line(tmp_path, monkeypatch, capsys):
    write_sources(tmp_path / "src", make_texts(60))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setattr(sys, "argv", ["dataset", "--data", str(tmp_path / "src")])
    dataset.main()
    out = capsys.readouterr().out
    assert re.search(r"train 1 shards, 5\d documents", out) and "dataset folder: " in out
    monkeypatch.setattr(sys, "argv", ["dataset", "--data", str(tmp_path / "none.txt")])
    with pytest.raises(SystemExit) as info:
        dataset.main()
    err = capsys.readouterr().err
    assert info.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and "embedded" in err
