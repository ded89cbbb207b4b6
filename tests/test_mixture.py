"""Mixtures: what --data means, whose tokens are learnt, shares, ranks, and resuming on the same and other ranks."""
import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_shards import make_texts

from nanochat import mixture, packing
from nanochat.conversations import parse
from nanochat.dataloader import DataLoader
from nanochat.dataset import prepare
from nanochat.mixture import Part, prepare_mixture
from nanochat.shards import iter_texts, list_shards, shard_kind
from nanochat.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train_from_iterator(["some text"], 265)


def chat(i, turns=1, words=3):
    said = [{"role": role, "content": f"{role[0]}{i}.{t} " + "w" * (i * 7 % (words * 5))}
            for t in range(turns) for role in ("user", "assistant")]
    return [{"role": "system", "content": f"s{i}"}, *said] if i % 5 == 0 else said


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A file of texts and one of conversations in both forms, and their folders of shards."""
    base = tmp_path_factory.mktemp("mixture")
    chats = [chat(i, 1 + i % 3) for i in range(80)]
    lines = [json.dumps(c if i % 2 else {"messages": c, "source": "x"}) for i, c in enumerate(chats)]
    (base / "chat.jsonl").write_text("\n\n".join(lines) + "\n")
    (base / "text.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in make_texts(90)))
    return base, chats, prepare(base / "text.jsonl", base_dir=base), prepare(base / "chat.jsonl", base_dir=base)


def test_conversations_are_rendered_packed_and_masked(tok, sources):
    """Every conversation stands whole in a row, ids and targets as render_conversation says, the rest is padding."""
    _, chats, _, folder = sources
    assert shard_kind(list_shards(folder, "train")[0]) == "chat"
    rendered = [tok.render_conversation({"messages": c}) for c in chats]
    # targets[j] answers ids[j]: the next token where it is learnt, else -1; the last token's is not the conversation's.
    expected = {tuple(ids): [t if m else -1 for t, m in zip(ids[1:], mask[1:])] for ids, mask in rendered}
    assert len(expected) == len(chats)
    seen, bos = set(), tok.get_bos_token_id()
    for split in ("train", "val"):
        loader = DataLoader(tok, folder, split, 2, 400)
        while loader.epoch == 0:
            x, y = next(loader)
            for ids, targets in zip(x.tolist(), y.tolist()):
                starts = [i for i, t in enumerate(ids) if t == bos]
                for a, b in itertools.pairwise([*starts, len(ids)]):
                    whole = tuple(ids[a:b])
                    if whole == (bos,):
                        assert targets[a] == -1  # padding
                        continue
                    if targets[b - 1] >= 0:  # its last token is the row's last target
                        assert b == len(ids)
                        whole += (targets[b - 1],)
                    assert targets[a:a + len(whole) - 1] == expected[whole]
                    seen.add(whole)
    assert seen == expected.keys()


def test_a_conversation_longer_than_a_row_comes_in_pieces(tok, tmp_path):
    long = [{"role": "user", "content": "q" * 50}, {"role": "assistant", "content": "abcdefghij" * 30}]
    (tmp_path / "c.jsonl").write_text(json.dumps(long) + "\n" + json.dumps(chat(1)) + "\n")
    folder = prepare(tmp_path / "c.jsonl", base_dir=tmp_path)
    text = ""
    for split in ("train", "val"):
        loader = DataLoader(tok, folder, split, 1, 100)
        learnt = []
        while loader.epoch == 0:
            learnt += [t for t in next(loader)[1][0].tolist() if 0 <= t < 256]
        text += bytes(learnt).decode()
    assert text.count("abcdefghij") >= 29 and "qq" not in text  # one may be cut where pieces meet


def test_the_hub_form_is_the_same(tok, sources, tmp_path):
    """Parquet with a list of structs, as hub conversation sets have it, used where it lies."""
    _, chats, _, _ = sources
    for i, part in enumerate((chats[:40], chats[40:])):
        structs, lines = tmp_path / "structs", tmp_path / "lines"
        structs.mkdir(exist_ok=True)
        lines.mkdir(exist_ok=True)
        pq.write_table(pa.table({"messages": pa.array(part), "source": ["a"] * 40}), structs / f"{i}.parquet")
        pq.write_table(pa.table({"messages": [json.dumps(c) for c in part]}), lines / f"{i}.parquet")
    a, b = (DataLoader(tok, prepare(p, base_dir=tmp_path / "x"), "train", 2, 200) for p in (structs, lines))
    for _ in range(20):
        assert all(torch.equal(u, v) for u, v in zip(next(a), next(b)))
    said = "".join(iter_texts(structs, "train"))
    assert said == "".join(iter_texts(lines, "train")) and "u1.0" in said and "role" not in said


GOOD = json.dumps(chat(1))


@pytest.mark.parametrize("line, message", [
    ("{oops", r"line 3 is not JSON"), ('{"text": "x"}', r"line 3 is no conversation: give a list"),
    ('{"messages": []}', r"line 3: a conversation is .* at least one message"),
    ('[{"role": "user"}]', r"line 3: message 0 is not"),
    (json.dumps([{"role": "assistant", "content": "hi"}]), r"line 3: message 0 is of role 'assistant'.*'user' is due"),
    (json.dumps([{"role": "user", "content": "hi"}]), r"line 3: no message is the assistant's"),
    (json.dumps([{"role": "user", "content": 5}, {"role": "assistant", "content": "x"}]), r"line 3: message 0: the content"),
])
def test_malformed_conversations_name_file_and_line(tmp_path, line, message):
    (tmp_path / "c.jsonl").write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(ValueError, match=r"c\.jsonl, " + message) as info:
        prepare(tmp_path / "c.jsonl", base_dir=tmp_path / "base")
    assert "\n" not in str(info.value)


def test_malformed_rows_of_parquet_and_mixed_folders(tok, tmp_path):
    for i in range(2):
        pq.write_table(pa.table({"messages": [GOOD, '[{"role": "user", "content": "?"}]']}), tmp_path / f"{i}.parquet")
    with pytest.raises(ValueError, match=r"0\.parquet, row 1: no message is the assistant's"):
        next(DataLoader(tok, prepare(tmp_path, base_dir=tmp_path / "base"), "train", 1, 64))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"holds conversations and .*a\.txt does not.*WEIGHT\*FILE"):
        prepare(tmp_path, base_dir=tmp_path / "base")
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n' + GOOD + "\n")
    with pytest.raises(ValueError, match=r"t\.jsonl, line 2 has no string in a field 'text'.*a conversation goes"):
        prepare(tmp_path / "t.jsonl", base_dir=tmp_path / "base")
    with pytest.raises(ValueError, match="x is no conversation"):
        parse("3", "x")


def test_specs(tmp_path, monkeypatch):
    assert mixture.parse("embedded") == [(1.0, "embedded")]
    assert mixture.parse("0.8*a/b, 3*c.jsonl") == [(0.8, "a/b"), (3.0, "c.jsonl")]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd, 2*name.txt").write_text("x")
    assert mixture.parse("odd, 2*name.txt") == [(1.0, "odd, 2*name.txt")]
    assert mixture.parse(mixture.DEFAULT_MIXTURE)[0] == (0.8, mixture.DEFAULT_HUB)
    many = ",".join(f"1*owner/dataset-{i:03}" for i in range(300))  # longer than any path may be
    assert [source for _, source in mixture.parse(many)] == [f"owner/dataset-{i:03}" for i in range(300)]
    for bad, part in (("a,b", "a"), ("0.5*a,b", "b"), ("0*a,1*b", "0*a"), ("-1*a", "-1*a"), ("nan*a", "nan*a"), ("1*a,", ""),
                      ("inf*a", "inf*a"), ("1*", "1*")):
        with pytest.raises(ValueError, match=r"is no WEIGHT\*SOURCE with a positive weight: write WEIGHT") as info:
            mixture.parse(bad)
        assert f"'{part}'" in str(info.value)
    with pytest.raises(ValueError, match="names a source twice"):
        mixture.parse("1*a,2*a")


def test_default_follows_the_device(capsys):
    assert mixture.default_data("cpu") == "embedded"
    assert mixture.default_data("cuda") == mixture.DEFAULT_MIXTURE
    assert "without a network: --data embedded" in capsys.readouterr().out


def kinds(batches):
    """Of each row whether it is of the conversations: there something is not learnt."""
    return [bool((row < 0).any()) for _, y in batches for row in y]


def test_shares_ranks_and_seeds(tok, sources, capsys, monkeypatch):
    base, _, text, chats = sources
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    parts = prepare_mixture(f"3*{base / 'text.jsonl'},1*{base / 'chat.jsonl'}")
    assert [p.folder for p in parts] == [text, chats]
    assert "75.0%" in capsys.readouterr().out

    def rows(n=100, **kwargs):
        return kinds(itertools.islice(DataLoader(tok, parts, "train", 4, 60, **kwargs), n))
    first = rows()
    assert 0.18 < sum(first) / len(first) < 0.32  # 400 draws at 0.25: three standard deviations
    assert rows() == first
    assert rows(seed=1) != first
    assert rows(rank=0, world_size=2) != rows(rank=1, world_size=2)


def mixed(tok, sources, **kwargs):
    return DataLoader(tok, [Part(0.6, sources[2]), Part(0.4, sources[3])], "train", 2, 60, buffer_size=9, seed=3, **kwargs)


def test_resume_is_exact_from_one_state_and_from_all(tok, sources):
    loaders = [mixed(tok, sources, rank=r, world_size=2) for r in range(2)]
    for _ in range(3):
        for _ in range(17):
            [next(loader) for loader in loaders]
        states = json.loads(json.dumps([loader.state() for loader in loaders]))
        resumed = [mixed(tok, sources, rank=r, world_size=2, state=states if r else states[0]) for r in range(2)]
        assert [r.state() for r in resumed] == states
        for a, b in zip(loaders, resumed):
            for _ in range(12):
                assert all(torch.equal(u, v) for u, v in zip(next(a), next(b)))


@pytest.mark.parametrize("world", [1, 3])
def test_on_other_ranks_it_goes_on_behind_the_furthest(tok, tmp_path, monkeypatch, world):
    monkeypatch.setattr(packing, "REFILL_UNITS", 3)  # else everything is buffered at once, and nothing left to go on with
    folders, rows = [tmp_path / "text", tmp_path / "chat"], 30
    for folder, column in zip(folders, ("text", "messages")):
        folder.mkdir()
        for shard in range(4):
            numbers = range(shard * rows, (shard + 1) * rows)
            documents = make_texts(rows, shard) if column == "text" else [json.dumps(chat(i)) for i in numbers]
            pq.write_table(pa.table({column: documents}), folder / f"{shard}.parquet", row_group_size=7)
    parts = [None, None, *folders]  # as `sources` above
    loaders = [mixed(tok, parts, rank=r, world_size=2) for r in range(2)]
    for _ in range(5):
        [next(loader) for loader in loaders]
    states = json.loads(json.dumps([loader.state() for loader in loaders]))
    positions = [sorted(tuple(s["sources"][i]["next"]) for s in states) for i in range(2)]
    assert all(loader.epoch == 0 for loader in loaders)
    assert all((0, 0, 0) < before < furthest < (3, 0, 0) for before, furthest in positions)

    read, add = {folder.name: [] for folder in folders}, packing.RowStream._add

    def watched(self, address, tokens):
        read[self.shards[0].parent.name].append(address[:3])
        add(self, address, tokens)
    monkeypatch.setattr(packing.RowStream, "_add", watched)
    again = [mixed(tok, parts, rank=r, world_size=world, state=states) for r in range(world)]
    assert [a.tokens_read for a in again] == [2 * 5 * 2 // world * 60] * world
    for _ in range(3):
        [next(loader) for loader in again]
    assert all(stream.epoch == 0 for loader in again for stream in loader.streams)
    for (_, (shard, row, span)), addresses in zip(positions, read.values()):
        assert min(addresses) == ((shard, row, span) if row < rows else (shard + 1, 0, 0))  # nothing left out, nothing again
    with pytest.raises(ValueError, match=r"that of ranks \[1\] and not of all ranks once"):
        mixed(tok, parts, rank=0, world_size=2, state=states[1:])
    with pytest.raises(ValueError, match="another mixture"):
        DataLoader(tok, [Part(0.5, parts[2]), Part(0.5, parts[3])], "train", 2, 60, buffer_size=9, seed=3, state=states)
