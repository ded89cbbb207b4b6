"""Data that is wrong late, changed in between, named like a split, packed, or no data at all."""
import gzip
import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_hub import StubHub
from test_mixture import chat
from test_shards import all_documents, both_splits, make_texts, write_shard

from nanochat.data import check
from nanochat.data.splits import choose, side_of
from nanochat.dataloader import DataLoader
from nanochat.dataset import prepare
from nanochat.shards import iter_texts
from nanochat.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train_from_iterator(["some text"], 265)


BAD = '[{"role": "user", "content": "?"}]'
SILENT = json.dumps([{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}])


def chats(folder, shards, rows=4, suffix="parquet"):
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in shards.items():
        pq.write_table(pa.table({"messages": lines}), folder / f"{name}.{suffix}", row_group_size=rows)
    return folder


def lines(n, start=0):
    return [json.dumps(chat(i)) for i in range(start, start + n)]


# --- late faults

@pytest.mark.parametrize("bad, why", [(BAD, "no message is the assistant's"), (SILENT, "the assistant says nothing"),
                                      ("{oops", "not JSON"), ("3", "at least one message")])
def test_a_bad_conversation_deep_in_parquet_is_found_before_training(tmp_path, tok, bad, why):
    good = lines(20)
    folder = chats(tmp_path / "src", {"0": good[:10], "1": [*good[10:17], bad, None, ""], "2": good[17:]})
    with pytest.raises(ValueError, match=rf"1\.parquet, row 7: .*{why}.*1 of 23 rows.*--skip-bad-rows") as info:
        prepare(folder, base_dir=tmp_path / "base")
    assert "\n" not in str(info.value)
    clean = prepare(folder, base_dir=tmp_path / "base", skip_bad_rows=True)
    assert [t for t in all_documents(clean) if t] == [t for t in _plain(good) if t]
    assert prepare(folder, base_dir=tmp_path / "base", skip_bad_rows=True) == clean
    loader = DataLoader(tok, clean, "train", 2, 64)
    while loader.epoch < 2:
        next(loader)
    assert os.path.islink(clean / "0.parquet")  # only what holds a bad row is written anew


def _plain(documents):
    from nanochat.conversations import plain_text
    return [plain_text(d, "") for d in documents]


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_damaged_pages_deep_in_parquet_are_found_and_skipped(tmp_path, kind):
    words = [os.urandom(300).hex() for _ in range(40)]
    if kind == "chat":
        words = [json.dumps([{"role": "user", "content": "?"}, {"role": "assistant", "content": w}]) for w in words]
    column = "text" if kind == "text" else "messages"
    path = write_shard(tmp_path / "src/0.parquet", words, rows=10, name=column)
    write_shard(tmp_path / "src/1.parquet", words[:5], name=column)
    with pq.ParquetFile(path) as file:
        at = file.metadata.row_group(2).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[at:at + 200] = bytes(200)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"0\.parquet, row 20: row group 2 is damaged.*10 of 45 rows.*--skip-bad-rows"):
        prepare(tmp_path / "src", base_dir=tmp_path / "base")
    clean = prepare(tmp_path / "src", base_dir=tmp_path / "base", skip_bad_rows=True)
    assert len(list(iter_texts(clean, "train"))) == 30


def test_what_was_checked_is_remembered_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "REMEMBER_SECONDS", 0)
    folder, seen, look = chats(tmp_path / "src", {str(i): lines(5, i) for i in range(3)}), [], check._look_through
    monkeypatch.setattr(check, "_look_through", lambda path, bar: seen.append(path.name) or look(path, bar))
    for expected in (["0.parquet", "1.parquet", "2.parquet"], []):
        assert prepare(folder, base_dir=tmp_path / "base") == folder and seen == expected
        seen.clear()
    chats(folder, {"1": [*lines(5, 50), BAD]})
    for expected in (["1.parquet"], []):
        with pytest.raises(ValueError, match=r"1\.parquet, row 5"):
            prepare(folder, base_dir=tmp_path / "base")
        assert seen == expected
        seen.clear()
    (memory,) = (tmp_path / "base/base_data/checked").glob("*.json")
    memory.write_text('{"version": 1, "shards": {"0.parquet": 3}}')  # a damaged memory is none
    with pytest.raises(ValueError, match=r"1\.parquet, row 5"):
        prepare(folder, base_dir=tmp_path / "base")
    assert len(seen) == 3


def test_bad_lines_of_jsonl_are_skipped_and_counted(tmp_path, capsys):
    for name, good, bad in (("t", [json.dumps({"text": t}) for t in make_texts(30)], ["{oops", '{"content": "x"}']),
                            ("c", lines(30), [BAD, "{oops", '{"text": "x"}'])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join([*good[:10], *bad, *good[10:]]))
        with pytest.raises(ValueError, match=rf"{name}\.jsonl, line 11.*--skip-bad-rows"):
            prepare(path, base_dir=tmp_path / "base")
        folder = prepare(path, base_dir=tmp_path / "base", skip_bad_rows=True)
        assert len(all_documents(folder)) == 30
        assert f"left out {len(bad)} rows" in capsys.readouterr().out


# --- data that changed since the checkpoint

@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    for i in range(5):
        write_shard(folder / f"{i}.parquet", [f"{i}.{r} " + "x" * 40 for r in range(40)], rows=8)
    return folder


def loaded(tok, folder, **options):
    return DataLoader(tok, folder, "train", 1, 50, buffer_size=4, **options)


def read_until(loader, epoch=1):
    """The documents that a loader begins until its epoch ends, as 'shard.row'."""
    begun = set()
    while (row := next(loader)[0][0].tolist()) and loader.epoch < epoch:
        text = bytes(t if t < 256 else 10 for t in row).decode()
        begun |= {line.split(" ")[0] for line in text.split("\n") if "." in line and " " in line}
    return begun


@pytest.mark.parametrize("change", ["grown", "shorter", "gone", "before", "all"])
def test_changed_data_says_what_changed_and_goes_on_nearby(tmp_path, tok, shards, change, monkeypatch, capsys):
    monkeypatch.setattr("nanochat.packing.REFILL_UNITS", 4)
    loader = loaded(tok, shards)
    while loader.streams[0]._next[:2] < (1, 20):
        next(loader)
    state = json.loads(json.dumps(loader.state()))
    shard, row, _ = state["sources"][0]["next"]
    if change == "grown":
        write_shard(shards / "3.parquet", ["3.new " + "y" * 70], rows=8)
        words, start = r"3\.parquet had [\d,]+ bytes and has [\d,]+", (shard, row)
    elif change == "shorter":
        write_shard(shards / "1.parquet", [f"1.{r} z" for r in range(5)])
        words, start = r"1\.parquet had", (2, 0)
    elif change == "gone":
        (shards / "1.parquet").unlink()
        words, start = r"1\.parquet is gone", (1, 0)  # what was 2.parquet
    elif change == "before":
        write_shard(shards / "00.parquet", make_texts(3))
        words, start = r"00\.parquet is new", (shard + 1, row)  # its name comes behind 0.parquet's
    else:
        for i in range(5):
            (shards / f"{i}.parquet").rename(shards / f"a{i}.parquet")
        words, start = r"0\.parquet is gone, 1\.parquet is gone.* and \d more", (0, 0)
    with pytest.raises(ValueError, match=rf"another dataset .*{words}.*--accept-changed-data.*start anew"):
        loaded(tok, shards, state=state)
    again = loaded(tok, shards, state=state, accept_changed=True)
    assert again.streams[0]._next[:2] == start and again.rows == loader.rows and again.epoch == 0
    assert "goes on at the nearest position" in capsys.readouterr().out
    saved = json.loads(json.dumps(again.state()))
    assert loaded(tok, shards, state=saved).state() == saved  # from then on as always
    begun = read_until(again)
    assert not any(name.startswith("0.") for name in begun if change != "all")  # nothing of what was read before


def test_unchanged_data_are_gone_on_with_exactly_whatever_is_accepted(tok, shards):
    loader = loaded(tok, shards)
    for _ in range(30):
        next(loader)
    again = loaded(tok, shards, state=loader.state(), accept_changed=True)
    assert all(torch.equal(next(loader)[0], next(again)[0]) for _ in range(30))


def test_an_earlier_versions_position_can_be_gone_on_with(tok, shards):
    loader = loaded(tok, shards)
    for _ in range(30):
        next(loader)
    state = json.loads(json.dumps(loader.state()))
    for source in state["sources"]:
        del source["shards"]
    assert loaded(tok, shards, state=state).state() == loader.state()
    write_shard(shards / "9.parquet", ["val"])
    with pytest.raises(ValueError, match="does not say which shards"):
        loaded(tok, shards, state=state)
    assert loaded(tok, shards, state=state, accept_changed=True).streams[0]._next[:2] == tuple(loader.streams[0]._next[:2])


def test_changed_data_on_all_ranks_go_on_at_one_place(tok, shards, monkeypatch):
    monkeypatch.setattr("nanochat.packing.REFILL_UNITS", 4)
    loaders = [loaded(tok, shards, rank=r, world_size=2) for r in range(2)]
    for _ in range(10):
        [next(loader) for loader in loaders]
    states = [loader.state() for loader in loaders]
    (shards / "3.parquet").unlink()
    furthest = max(tuple(s["sources"][0]["next"]) for s in states)
    for world in (1, 2, 3):
        for r in range(world):
            again = loaded(tok, shards, rank=r, world_size=world, state=states, accept_changed=True)
            assert tuple(again.streams[0]._next) == furthest


# --- splits

def test_words_that_name_a_split():
    for name, side in {"data/train-00000-of-00004.parquet": "train", "data--test-00000-of-00001.parquet": "test",
                       "validation/0.jsonl": "val", "dev.txt": "val", "alpaca_eval.jsonl": "test", "Train1.parquet": "train",
                       "latest/trainers-guide.txt": None, "shard_00001.parquet": None, "contest.txt": None,
                       "test/train.jsonl": "train"}.items():
        assert side_of(name) == side, name


def test_configurations_are_never_mixed():
    names = [f"data/{c}/{s}-0.parquet" for c in ("all", "a", "b") for s in ("train", "test")]
    card = [{"config_name": c, "data_files": [{"split": s, "path": f"data/{c}/{s}-*"} for s in ("train", "test")]}
            for c in ("all", "a", "b")]
    for known in (None, card):
        assert choose(names, known)[:2] == (["data/all/train-0.parquet"], ["data/all/test-0.parquet"])
        assert choose(names, known, "b")[:2] == (["data/b/train-0.parquet"], ["data/b/test-0.parquet"])
        with pytest.raises(ValueError, match="no configuration 'c'"):
            choose(names, known, "c")
    with pytest.raises(ValueError, match="configurations a, b: name one"):
        choose(names, card[1:])
    flagged = [*card[1:2], {**card[2], "default": True}]
    assert choose(names, flagged).train == ["data/b/train-0.parquet"]
    assert set(choose(names, card).left_out.values()) == {"another configuration"}


def test_of_a_cards_splits_one_pair_is_read():
    names = [f"data/{s}-0.parquet" for s in ("train_sft", "test_sft", "train_gen", "test_gen")]
    card = [{"config_name": "default", "data_files": [{"split": s, "path": f"data/{s}-*"}
                                                      for s in ("train_sft", "test_sft", "train_gen", "test_gen")]}]
    assert choose(names, card)[:2] == (["data/train_sft-0.parquet"], ["data/test_sft-0.parquet"])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    return StubHub(tmp_path / "remote", monkeypatch)


def test_the_hubs_test_split_is_never_trained_on(tmp_path, hub, capsys):
    """smol-smoltalk's listing: data/test-... sorts before data/train-..., and was trained on."""
    for name, i in (("test-00000-of-00001", 9), *((f"train-0000{i}-of-00004", i) for i in range(4))):
        write_shard(tmp_path / "remote/data" / f"{name}.parquet", make_texts(4, i))
    folder = prepare("own/set", num_shards=2, base_dir=tmp_path / "base")
    assert both_splits(folder) == ([t for i in (0, 1) for t in make_texts(4, i)], make_texts(4, 9))
    write_shard(tmp_path / "remote/data/validation-00000-of-00001.parquet", make_texts(4, 8))
    folder = prepare("own/other", num_shards=9, base_dir=tmp_path / "base")
    assert both_splits(folder) == ([t for i in range(4) for t in make_texts(4, i)], make_texts(4, 8))
    assert "own/other: not read are data/test-00000-of-00001.parquet (split test)" in capsys.readouterr().out


def test_what_an_earlier_version_fetched_of_other_configurations_is_not_read(tmp_path, hub):
    for c in ("all", "part"):
        for i, s in enumerate(("test", "train")):
            write_shard(tmp_path / "remote/data" / c / f"{s}-0.parquet", make_texts(4, i))
    old = tmp_path / "base/base_data/own--set"
    write_shard(old / "data--part--train-0.parquet", ["a part, already"])
    folder = prepare("own/set", base_dir=tmp_path / "base")
    assert both_splits(folder) == (make_texts(4, 1), make_texts(4, 0))
    assert (old / "not-read/data--part--train-0.parquet").exists()  # and nothing is deleted
    assert both_splits(prepare("own/set:part", base_dir=tmp_path / "base")) == (make_texts(4, 1), make_texts(4, 0))


def test_a_hub_dataset_of_one_shard_is_cut(tmp_path, hub):
    write_shard(tmp_path / "remote/data/train-00000-of-00001.parquet", make_texts(50))
    train, val = both_splits(prepare("own/set", base_dir=tmp_path / "base"))
    assert sorted(train + val) == sorted(make_texts(50)) and train and val
    hub.down = True
    assert both_splits(prepare("own/set", base_dir=tmp_path / "base")) == (train, val)


def _write_as(path, texts):
    data = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        write_shard(path, texts)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(data[:100]) + gzip.compress(data[100:]))  # as `cat a.gz b.gz` makes it
    elif path.suffix == ".zst":
        path.write_bytes(b"".join(pa.compress(d, codec="zstd", asbytes=True) for d in (data[:100], data[100:])))
    else:
        path.write_bytes(data)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_local_splits_are_read_as_they_are_named(tmp_path, suffix, capsys):
    train, val, test = make_texts(20, 1), make_texts(5, 2), make_texts(5, 3)
    for name, texts in (("test", test), ("train", train), ("validation", val)):
        _write_as(tmp_path / "src" / f"{name}.{suffix}", texts)
    (tmp_path / "src/LICENSE.txt").write_text("You may.")
    (tmp_path / "src/README.txt").write_text("About.")
    (tmp_path / "src/picture.png").write_bytes(b"x")
    folder = prepare(tmp_path / "src", base_dir=tmp_path / "base")
    assert both_splits(folder) == (train, val)
    said = capsys.readouterr().out
    assert f"test.{suffix} (split test)" in said and "LICENSE.txt, README.txt" in said and "picture.png" in said
    (tmp_path / "src" / f"validation.{suffix}").unlink()
    assert both_splits(prepare(tmp_path / "src", base_dir=tmp_path / "base")) == (train, test)
    (tmp_path / "src" / f"train.{suffix}").unlink()
    with pytest.raises(ValueError, match="a split named test and none to train on"):
        prepare(tmp_path / "src", base_dir=tmp_path / "base")


def test_shards_beside_a_licence_are_still_used_where_they_lie(tmp_path):
    for i in range(3):
        write_shard(tmp_path / "src" / f"{i}.parquet", make_texts(4, i))
    (tmp_path / "src/LICENSE.txt").write_text("You may.")
    assert prepare(tmp_path / "src", base_dir=tmp_path / "base") == tmp_path / "src"


def test_a_lone_readme_is_a_text_and_a_card_chooses(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one/README.txt").write_text("paragraph\n\n" * 9000)
    assert all_documents(prepare(tmp_path / "one", base_dir=tmp_path / "base"))
    for c, seed in (("en", 1), ("de", 2)):
        _write_as(tmp_path / "two" / c / "part.jsonl", make_texts(20, seed))
    assert len(all_documents(prepare(tmp_path / "two", base_dir=tmp_path / "base"))) == 40
    (tmp_path / "two/README.md").write_text("---\nconfigs:\n- config_name: en\n  data_files: en/*\n  default: true\n"
                                            "- config_name: de\n  data_files: de/*\n---\n# Both\n")
    assert sorted(all_documents(prepare(tmp_path / "two", base_dir=tmp_path / "base"))) == sorted(make_texts(20, 1))


RECORDS = [{"text": "plain"}, {"text": None}, {"text": " \n"}, {"text": "é漢🙂"}, {"text": ""}]
TALKS = [{"messages": chat(1)}, {"messages": json.dumps(chat(2))}, {"messages": None},
         {"text": "rendered", "messages": chat(3)}]


@pytest.mark.parametrize("records", [RECORDS, TALKS])
def test_the_same_record_means_the_same_in_every_container(tmp_path, records):
    found = {}
    data = "".join(json.dumps(r) + "\n" for r in records).encode()
    many = [pa.compress(data, codec="zstd", asbytes=True), gzip.compress(data), data]
    for suffix, content in zip(("jsonl.zst", "jsonl.gz", "jsonl"), many):
        (tmp_path / f"a.{suffix}").write_bytes(content)
        found[suffix] = all_documents(prepare(tmp_path / f"a.{suffix}", base_dir=tmp_path / "base"))
    strings = [{**r, "messages": r["messages"] if isinstance(r.get("messages"), str | None) else json.dumps(r["messages"])}
               if "messages" in r else r for r in records]
    pq.write_table(pa.Table.from_pylist(strings, schema=pa.schema(
        [("text", pa.string()), *([("messages", pa.string())] if records is TALKS else [])])), tmp_path / "a.parquet")
    found["parquet"] = all_documents(prepare(tmp_path / "a.parquet", base_dir=tmp_path / "base"))
    (tmp_path / "layout").mkdir()
    for name in ("0", "1"):
        shutil.copy(tmp_path / "a.parquet", tmp_path / "layout" / f"{name}.parquet")
    found["layout"] = [t for t in iter_texts(prepare(tmp_path / "layout", base_dir=tmp_path / "base"), "train") if t]
    assert all(sorted(f) == sorted(found["jsonl"]) for f in found.values()), found
    assert len(found["jsonl"]) == (2 if records is RECORDS else 3)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_damaged_packed_files_are_named(tmp_path, suffix):
    path = tmp_path / f"a.jsonl.{suffix}"
    _write_as(path, [os.urandom(200).hex() for _ in range(200)])
    data = path.read_bytes()
    for broken in (data[:len(data) // 2], b"garbage" * 10, data[:50] + bytes(200) + data[250:]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=rf"a\.jsonl\.{suffix} is damaged or no \.{suffix} file|not JSON"):
            prepare(path, base_dir=tmp_path / "base")
    (tmp_path / "b.csv.gz").write_bytes(data)
    with pytest.raises(ValueError, match=r"is none of .*\.gz and \.zst are read too"):
        prepare(tmp_path / "b.csv.gz", base_dir=tmp_path / "base")


def test_packed_txt_is_text(tmp_path):
    text = "\n\n".join(f"Paragraph {i} ü" for i in range(9000))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "b.txt").write_text(text)
    a, b = (all_documents(prepare(tmp_path / n, base_dir=tmp_path / "base")) for n in ("a.txt.gz", "b.txt"))
    assert sorted(a) == sorted(b) and len(a) > 1
