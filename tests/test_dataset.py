"""The three sources become one layout; what is half-made never looks whole; every wrong input is one line with a remedy."""
import collections
import errno
import json
import re
import subprocess
import sys
import threading
import time
import tokenize

import pyarrow.parquet as pq
import pytest
from test_shards import all_documents, both_splits, make_texts, nothing_made, write_shard

from nanochat import dataset, shards
from nanochat.dataset import prepare
from nanochat.shards import list_shards

# --- embedded

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


# --- local

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
    monkeypatch.setattr(shards, "GROUP_CHARS", 2000)
    monkeypatch.setattr(shards, "SHARD_CHARS", 8000)
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
    calls, original = [], dataset.write_layout

    def slow(*args):
        calls.append(1)
        time.sleep(0.2)
        return original(*args)
    monkeypatch.setattr(dataset, "write_layout", slow)
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(prepare(tmp_path / "src", base_dir=tmp_path / "base")))
               for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1 and len(folders) == 4 and len(calls) == 1

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
