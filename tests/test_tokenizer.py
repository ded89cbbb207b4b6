"""Encoding against a naive BPE, training against its own definition, pickles that attack, conversations by hand."""
import base64
import collections
import io
import itertools
import json
import os
import pickle
import pickletools
import random
import struct
import sys

import pytest
import regex
import tiktoken
import torch

import nanochat.tokenizer as tokenizer_module
from nanochat.dataset import prepare
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer
from scripts import tok_train

TRICKY = ["", " ", "a", "\n\n\n", "don't I'LL we've", "1234567890", "x  y   z", "tab\tend ",
          "naïve Δ 漢字 🙂👩‍👩‍👧", "\r\n\r\n x",
          "<|bos|> is <|assistant_start|>text", "\u200d\u0301", "code: if(x!=1){y+=2;}//ok\n", "a" * 1000, "\x00\x7f"]


def corpus():
    rng = random.Random(0)
    words = ["the", "then", "there", "therefore", "of", "offer", "naïve", "漢字", "12345", "don't", "x!=y", "🙂"]
    words += ["".join(rng.choices(["ka", "lo", "mi", "nu", "re", "st"], k=rng.randrange(1, 5))) for _ in range(100)]
    return [" ".join(rng.choices(words, weights=range(len(words), 0, -1), k=200)) + "\n" for _ in range(60)]


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train_from_iterator(iter(corpus()), 400)


def random_texts(n, seed=0):
    rng = random.Random(seed)
    ranges = [(32, 127), (9, 14), (0xA0, 0x250), (0x4E00, 0x4F00), (0x1F600, 0x1F650), (0x300, 0x370)]
    texts = []
    for _ in range(n):
        kinds = rng.choices(ranges, weights=[8, 2, 2, 1, 1, 1], k=rng.randrange(80))
        texts.append("".join(chr(rng.randrange(*kind)) for kind in kinds))
    return texts


# --- training and encoding

def naive_encode(tok, text):
    """BPE from its definition: split by the pattern, then merge the adjacent pair of lowest rank until there is none."""
    ranks = {tok.id_to_bytes(i): i for i in range(tok.get_vocab_size() - 9)}
    ids = []
    for piece in regex.findall(SPLIT_PATTERN, text):
        parts = [bytes([b]) for b in piece.encode()]
        while True:
            pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
            if not pairs:
                break
            _, i = min(pairs)
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def test_encode_equals_naive_bpe(tok):
    for text in TRICKY + random_texts(150) + corpus()[:3]:
        assert tok.encode(text) == naive_encode(tok, text)


def test_every_merge_was_the_most_frequent_pair(tok):
    words = collections.Counter(piece.encode() for text in corpus() for piece in regex.findall(SPLIT_PATTERN, text))
    split = {word: [bytes([b]) for b in word] for word in words}
    ids = {bytes([b]) for b in range(256)}
    for i in range(256, tok.get_vocab_size() - 9):
        counts = collections.Counter()
        for word, parts in split.items():
            for pair in itertools.pairwise(parts):
                counts[pair] += words[word]
        new = tok.id_to_bytes(i)
        count = max(n for (a, b), n in counts.items() if a + b == new)
        assert count == max(counts.values())
        pair = next(p for p, n in counts.items() if p[0] + p[1] == new and n == count)
        for parts in split.values():
            at = 0
            while at < len(parts) - 1:
                if (parts[at], parts[at + 1]) == pair:
                    parts[at:at + 2] = [new]
                at += 1
        assert new not in ids
        ids.add(new)


def test_training_is_repeatable(tok):
    again = Tokenizer.train_from_iterator(iter(corpus()), 400)
    assert again.fingerprint == tok.fingerprint
    assert Tokenizer.train_from_iterator(iter(corpus()), 399).fingerprint != tok.fingerprint


def test_vocabulary_layout(tok):
    assert tok.get_vocab_size() == 400
    assert [tok.encode_special(name) for name in SPECIAL_TOKENS] == list(range(391, 400))
    assert tok.get_bos_token_id() == 391 and tok.get_special_tokens()["<|output_end|>"] == 399
    assert [tok.id_to_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    assert len({tok.id_to_bytes(i) for i in range(400)}) == 400
    assert SPECIAL_TOKENS == ("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
                              "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")


def test_split_pattern_has_at_most_two_digits_in_a_token(tok):
    assert regex.findall(SPLIT_PATTERN, "in 12345 I'll go\n\n x") == \
        ["in", " ", "12", "34", "5", " I", "'ll", " go", "\n\n", " x"]
    digits = Tokenizer.train_from_iterator(["1234 " * 1000], 300)
    assert all(len(digits.id_to_bytes(i)) <= 2 for i in digits.encode("123412341234"))


@pytest.mark.parametrize("size", [264, 256, 0, -1])
def test_vocabulary_too_small(size):
    with pytest.raises(ValueError, match=rf"vocabulary of {size} is too small: give at least 265"):
        Tokenizer.train_from_iterator(["text"], size)


def test_smallest_vocabulary_is_bytes():
    tok = Tokenizer.train_from_iterator(["text " * 99], 265)
    assert tok.encode("héllo") == list("héllo".encode()) and tok.get_bos_token_id() == 256


def test_text_too_short_for_the_vocabulary():
    tok = Tokenizer.train_from_iterator(["abab"], 5000)
    assert 265 < tok.get_vocab_size() < 300 and tok.decode(tok.encode("ababab")) == "ababab"


def test_roundtrip_and_token_bytes(tok):
    table = tok.token_bytes()
    assert table.dtype == torch.int32 and table.shape == (400,) and not table[391:].any() and table[:391].min() == 1
    for text in TRICKY + random_texts(200, seed=1):
        ids = tok.encode(text)
        assert tok.decode(ids) == text
        assert tok.decode_bytes(ids) == b"".join(tok.id_to_bytes(i) for i in ids) == text.encode()
        assert table[ids].sum() == len(text.encode())
    assert tok.decode([tok.get_bos_token_id(), *tok.encode("hi"), 0x80]) == "<|bos|>hi\ufffd"


def test_special_looking_text_is_ordinary(tok):
    for name in SPECIAL_TOKENS:
        assert max(tok.encode(f"say {name} now")) < 391
        assert max(tok.encode([name])[0]) < 391


def test_encode_lists_prepend_append(tok):
    texts = TRICKY + random_texts(50)
    assert tok.encode(texts) == [tok.encode(t) for t in texts]
    assert tok.encode(texts, num_threads=1) == tok(texts)
    assert tok.encode("hi", prepend="<|bos|>", append=399) == [391, *tok.encode("hi"), 399]
    assert tok.encode(["hi", ""], prepend=391, append="<|output_end|>") == [[391, *tok.encode("hi"), 399], [391, 399]]
    assert tok.encode("\ud83d") == tok.encode("\ufffd")  # half a surrogate pair does not crash


def test_encode_errors(tok):
    with pytest.raises(ValueError, match=r"no special token '<\|eos\|>'.*<\|bos\|>"):
        tok.encode("x", prepend="<|eos|>")
    with pytest.raises(ValueError, match="token id 400 is outside the vocabulary of 400"):
        tok.encode("x", append=400)
    for bad in (None, b"bytes", ["x", 1], ("x",)):
        with pytest.raises(ValueError, match="can only encode a string or a list of strings"):
            tok.encode(bad)
    for bad in (-1, 400):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            tok.decode([bad])


# --- files

def same(a, b):
    return a.fingerprint == b.fingerprint and all(a.encode(t) == b.encode(t) for t in TRICKY)


def test_save_and_load(tok, tmp_path):
    tok.save(tmp_path / "t")
    assert sorted(os.listdir(tmp_path / "t")) == ["chat_template.jinja", "token_bytes.pt", "tokenizer.json",
                                                  "tokenizer_config.json"]
    assert same(Tokenizer.from_directory(tmp_path / "t"), tok)
    assert same(Tokenizer.from_directory(str(tmp_path / "t")), tok)
    (tmp_path / "run").mkdir()
    os.rename(tmp_path / "t", tmp_path / "run/tokenizer")
    assert same(Tokenizer.from_directory(tmp_path / "run"), tok)
    assert torch.equal(torch.load(tmp_path / "run/tokenizer/token_bytes.pt", weights_only=True), tok.token_bytes())


def test_missing_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json or tokenizer.pkl in .*scripts.tok_train --out"):
        Tokenizer.from_directory(tmp_path)


def test_damaged_json(tok, tmp_path):
    tok.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    text = path.read_text()

    def damaged(change):
        parts = json.loads(text)
        change(parts)
        return json.dumps(parts)
    model_changes = [lambda m: m["vocab"].pop("a"), lambda m: m["vocab"].update(a=7), lambda m: m["vocab"].update(zz=391),
                     lambda m: m["vocab"].update(a="x"), lambda m: m["merges"].reverse(), lambda m: m.update(merges=7),
                     lambda m: m.update(merges=[*m["merges"][:-1], ["a"]]), lambda m: m.update(merges=[]),
                     lambda m: m.update(type="WordPiece"), lambda m: m.update(dropout=0.1), lambda m: m.pop("vocab"),
                     lambda m: m.update(vocab=[1]), lambda m: m["vocab"].update({"\u4e00": m["vocab"].pop("a")})]
    cases = [text[:1000], "[]", "[" * 100_000, "{}",
             *(damaged(lambda p, c=c: c(p["model"])) for c in model_changes),
             damaged(lambda p: p["added_tokens"].pop()), damaged(lambda p: p.update(added_tokens=None)),
             damaged(lambda p: p["added_tokens"][0].update(content="<|other|>")),
             damaged(lambda p: p.update(normalizer={"type": "NFC"})), damaged(lambda p: p.update(pre_tokenizer=None)),
             damaged(lambda p: p["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="(unclosed")),
             damaged(lambda p: p["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=3)),
             damaged(lambda p: p["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True)),
             damaged(lambda p: p["pre_tokenizer"]["pretokenizers"].reverse())]
    for case in cases:
        path.write_text(case)
        with pytest.raises(ValueError, match=r"tokenizer\.json.*make one with python -m scripts\.tok_train"):
            Tokenizer.from_directory(tmp_path)


# --- our files until November 2026

def old_form(tok):
    n = tok.get_vocab_size() - 9
    return {"format": "adamba-bpe-1", "pattern": tok.pattern, "special_tokens": list(SPECIAL_TOKENS),
            "tokens_base64": [base64.b64encode(tok.id_to_bytes(i)).decode() for i in range(n)]}


def test_the_old_form_is_read_before_a_pickle(tok, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(old_form(tok), indent=0))
    (tmp_path / "tokenizer.pkl").write_bytes(b"rubbish")
    assert same(Tokenizer.from_directory(tmp_path), tok)


def test_a_damaged_old_form(tok, tmp_path):
    good, path = old_form(tok), tmp_path / "tokenizer.json"
    tokens = good["tokens_base64"]
    for changes in ({"format": "other"}, {"tokens_base64": ["!"]}, {"tokens_base64": tokens[1:]}, {"tokens_base64": 7},
                    {"tokens_base64": [*tokens, "YQ=="]}, {"special_tokens": ["<|bos|>"]}, {"special_tokens": None},
                    {"pattern": 3}, {"pattern": "(unclosed"}):
        path.write_text(json.dumps({**good, **changes}))
        with pytest.raises(ValueError, match=r"tokenizer\.json.*make one with python -m scripts\.tok_train"):
            Tokenizer.from_directory(tmp_path)


# --- Hugging Face reads our files, and we theirs

def hostile_vocabulary(seed):
    """Tokens of few letters, so that many pairs lead to one token and some tokens come of no pair."""
    rng = random.Random(seed)
    tokens = [bytes([b]) for b in range(256)]
    return tokens + list({bytes(rng.choices(b"ab ", k=rng.randrange(2, 6))): 0 for _ in range(40)})


def test_hugging_face_encodes_alike(tok, tmp_path):
    """The same ids from its own library, on text made to differ: for a trained vocabulary, and for hostile ones."""
    tokenizers = pytest.importorskip("tokenizers")
    cases = [(tok, TRICKY + random_texts(300, seed=2) + [f"{a}{chr(c)}b 1{chr(c)}2 '{chr(c)}" for a in "a1 "
                                                         for c in range(0x300)])]
    rng = random.Random(3)
    for seed in range(20):
        made = Tokenizer(hostile_vocabulary(seed))
        cases.append((made, ["".join(rng.choices("ab ", k=rng.randrange(30))) for _ in range(100)]))
    compared = unequal = 0
    for i, (ours, texts) in enumerate(cases):
        ours.save(tmp_path / str(i))
        theirs = tokenizers.Tokenizer.from_file(str(tmp_path / str(i) / "tokenizer.json"))
        theirs.encode_special_tokens = True  # text that looks like a special token is text
        for text in texts:
            ids = theirs.encode(text, add_special_tokens=False).ids
            compared, unequal = compared + 1, unequal + (ids != ours.encode(text))
            assert theirs.decode(ids, skip_special_tokens=False) == text
        assert i or not unequal
    assert compared > 4000 and unequal == 0


def test_auto_tokenizer_reads_the_folder(tok, tmp_path):
    transformers = pytest.importorskip("transformers")
    tok.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    bos = tok.get_bos_token_id()
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (bos, tok.encode_special("<|assistant_end|>"), 400)
    assert theirs("some text").input_ids == tok.encode("some text", prepend=bos)
    assert theirs("<|user_end|>", add_special_tokens=False).input_ids == [tok.encode_special("<|user_end|>")]
    for text in TRICKY:
        assert theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids == tok.encode(text)
    assert theirs.decode([bos, *tok.encode("hi")], skip_special_tokens=True) == "hi"


def test_the_chat_template_renders_what_we_render(tok, tmp_path):
    transformers = pytest.importorskip("transformers")
    tok.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    plain = {"messages": [{"role": "user", "content": " hi {{ x }} <b>\n"}, {"role": "assistant", "content": "Oh.\n\n"}]}
    # a special token's name in a message is that token there, as with every model's template, and text here
    for conversation in (json.loads(json.dumps(CONVERSATION).replace("<|", "<!")), plain):
        ids = theirs.apply_chat_template(conversation["messages"], return_dict=False)
        assert ids == tok.render_conversation(conversation)[0]
        ids = theirs.apply_chat_template(conversation["messages"][:-1], add_generation_prompt=True, return_dict=False)
        assert ids == tok.render_for_completion(conversation)
    with pytest.raises(Exception, match="take turns"):
        theirs.apply_chat_template([{"role": "assistant", "content": "x"}])


def test_another_programs_file_is_read_where_there_is_no_pickle(tok, tmp_path):
    """With each token's own pair alone, as text in one string, as the converters of others write it."""
    tok.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    parts = json.loads((tmp_path / "tokenizer.json").read_text())
    made = {"".join(pair): " ".join(pair) for pair in parts["model"]["merges"]}
    parts["model"]["merges"] = list(made.values())
    parts["model"]["vocab"] |= {t["content"]: t["id"] for t in parts["added_tokens"]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    assert same(Tokenizer.from_directory(tmp_path), tok)


# --- nanochat's pickle

def nanochat_encoding(tok):
    """What nanochat pickles: the tiktoken Encoding itself."""
    ranks = {tok.id_to_bytes(i): i for i in range(tok.get_vocab_size() - 9)}
    return tiktoken.Encoding("rustbpe", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks,
                             special_tokens=tok.get_special_tokens())


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("where", ["", "tokenizer"])
def test_reads_nanochats_pickle(tok, tmp_path, protocol, where):
    (tmp_path / where).mkdir(exist_ok=True)
    (tmp_path / where / "tokenizer.pkl").write_bytes(pickle.dumps(nanochat_encoding(tok), protocol))
    read = Tokenizer.from_directory(tmp_path)
    assert same(read, tok)
    read.save(tmp_path)  # from now on the safe form is read
    (tmp_path / where / "tokenizer.pkl").write_bytes(b"rubbish")
    assert same(Tokenizer.from_directory(tmp_path), tok)


def test_reads_a_pickle_of_d32s_size(tmp_path):
    rng = random.Random(0)
    tokens = [bytes([b]) for b in range(256)]
    tokens += list({rng.randbytes(rng.randrange(3, 9)): 0 for _ in range(65536)})[:65536 - 9 - 256]
    encoding = nanochat_encoding(Tokenizer(tokens))
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    tok = Tokenizer.from_directory(tmp_path)
    assert tok.get_vocab_size() == 65536
    assert tok.get_bos_token_id() == 65527 and tok.encode_special("<|output_end|>") == 65535
    assert tok.encode("any text") == encoding.encode_ordinary("any text")


class Calls:
    """Pickles as a call of function(*arguments)."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def state_of(tok, **changes):
    encoding = nanochat_encoding(tok)
    state = {**encoding.__getstate__(), **changes}
    return {key: value for key, value in state.items() if value is not ...}


def pickled_state(state):
    """An Encoding with this state, as pickle writes it."""
    blank = tiktoken.Encoding.__new__(tiktoken.Encoding)
    buffer = io.BytesIO()

    class Pickler(pickle.Pickler):
        def reducer_override(self, obj):
            import copyreg
            return (copyreg.__newobj__, (tiktoken.Encoding,), state) if obj is blank else NotImplemented
    Pickler(buffer).dump(blank)
    return buffer.getvalue()


def hostile_pickles(tok, marker):
    touch = f"open({str(marker)!r}, 'w').close()"
    yield "system", pickle.dumps(Calls(os.system, f"touch {marker}"))
    for protocol in range(6):
        yield f"eval {protocol}", pickle.dumps(Calls(eval, touch), protocol)
    yield "exec text", f"cbuiltins\nexec\n(V{touch}\ntR.".encode()
    yield "inst", f"(V{touch}\nibuiltins\nexec\n.".encode()
    yield "obj", f"(cbuiltins\nexec\nV{touch}\no.".encode()
    yield "nested in the state", pickled_state(state_of(tok, name=Calls(eval, touch)))
    yield "nested in a table", pickled_state(state_of(tok, special_tokens={"<|bos|>": Calls(eval, touch)}))
    yield "state is a call", pickled_state(Calls(eval, touch))
    yield "getattr of the class", pickle.dumps(Calls(getattr, tiktoken.Encoding, "__init__"))
    yield "dotted name", b"\x80\x04\x8c\x0dtiktoken.core\x8c\x11Encoding.__init__\x93."
    yield "other part of tiktoken", b"\x80\x04\x8c\x0dtiktoken.load\x8c\x09read_file\x93."
    yield "the class itself", b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93."
    yield "state for the class", b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93}b."
    yield "state for a dict", b"\x80\x04}}\x8c\x01a\x4b\x01sb."
    yield "persistent id", b"Pabc\n."
    yield "extension registry", b"\x80\x04\x82\x01."
    yield "memo bomb", b"\x80\x04}r\xff\xff\xff\x7f."
    yield "allocation", b"\x80\x04B" + struct.pack("<I", 2**31 - 1) + b"x."
    yield "allocation in a frame", b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}."
    yield "eight-byte length", b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x."
    yield "deep", b"\x80\x04" + b"(" * 10**5 + b"."
    yield "empty file", b""
    yield "no pickle", b"PK\x03\x04 a zip"
    yield "truncated", pickle.dumps(nanochat_encoding(tok))[:-100]
    yield "by name", pickled_state("gpt2")
    yield "a plain dict", pickle.dumps(state_of(tok))
    yield "more state", pickled_state(state_of(tok, extra=1))
    yield "less state", pickled_state(state_of(tok, pat_str=...))
    yield "ids with a hole", pickled_state(state_of(tok, special_tokens={n: 392 + i for i, n in enumerate(SPECIAL_TOKENS)}))
    yield "ids twice", pickled_state(state_of(tok, special_tokens=dict.fromkeys(SPECIAL_TOKENS, 391)))
    yield "ids of bool", pickled_state(state_of(tok, mergeable_ranks={b"a": False, b"b": True}))
    yield "text for bytes", pickled_state(state_of(tok, mergeable_ranks={"a": 0}))
    yield "tables are lists", pickled_state(state_of(tok, mergeable_ranks=[1]))
    yield "pattern is bytes", pickled_state(state_of(tok, pat_str=b"."))
    ranks = state_of(tok)["mergeable_ranks"]
    ranks = {b"not a" if token == b"a" else token: i for token, i in ranks.items()}
    yield "without a byte", pickled_state(state_of(tok, mergeable_ranks=ranks))
    yield "other special tokens", pickled_state(state_of(tok, special_tokens={f"<|{i}|>": 391 + i for i in range(9)}))


def test_hostile_pickles_are_refused_and_do_not_run(tok, tmp_path):
    marker = tmp_path / "marker"
    path = tmp_path / "tokenizer.pkl"
    cases = list(hostile_pickles(tok, marker))
    assert not marker.exists()
    for name, data in cases:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"tokenizer\.pkl.*python -m scripts\.tok_train") as info:
            Tokenizer.from_directory(tmp_path)
        assert "\n" not in str(info.value), name
        assert not marker.exists(), name
    # The attacks are real: the plain unpickler runs them.
    pickle.loads(dict(cases)["eval 4"])
    assert marker.exists()


def test_the_restricted_unpickler_holds_without_the_scan(tok, tmp_path, monkeypatch):
    """Two walls: with the look at the opcodes switched off, the second still lets no foreign name in."""
    monkeypatch.setattr(pickletools, "genops", lambda data: iter(()))
    marker = tmp_path / "marker"
    for name, data in hostile_pickles(tok, marker):
        if "bomb" in name or "allocation" in name:
            continue  # what the scan is for
        (tmp_path / "tokenizer.pkl").write_bytes(data)
        with pytest.raises(ValueError, match=r"tok_train"):
            Tokenizer.from_directory(tmp_path)
        assert not marker.exists(), name


def test_oversized_pickle(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_PICKLE_MAX_BYTES", 1 << 20)
    (tmp_path / "tokenizer.pkl").write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(ValueError, match="larger than 1 MB"):
        Tokenizer.from_directory(tmp_path)


# --- conversations

def render_by_hand(tok, *pieces):
    """Pieces: (text or special name, mask)."""
    ids, mask = [], []
    for text, learn in pieces:
        part = [tok.encode_special(text)] if text in SPECIAL_TOKENS else tok.encode(text)
        ids += part
        mask += [learn] * len(part)
    return ids, mask


CONVERSATION = {"messages": [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2+2? <|assistant_start|>"},
    {"role": "assistant", "content": [{"type": "text", "text": "Let me see."}, {"type": "python", "text": "2+2"},
                                      {"type": "python_output", "text": "4"}, {"type": "text", "text": "It is 4."}]},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Gladly."},
]}


def test_render_conversation(tok):
    before = json.dumps(CONVERSATION)
    expected = render_by_hand(
        tok, ("<|bos|>", 0),
        ("<|user_start|>", 0), ("Be brief.\n\nWhat is 2+2? <|assistant_start|>", 0), ("<|user_end|>", 0),
        ("<|assistant_start|>", 0), ("Let me see.", 1), ("<|python_start|>", 1), ("2+2", 1), ("<|python_end|>", 1),
        ("<|output_start|>", 0), ("4", 0), ("<|output_end|>", 0), ("It is 4.", 1), ("<|assistant_end|>", 1),
        ("<|user_start|>", 0), ("Thanks", 0), ("<|user_end|>", 0),
        ("<|assistant_start|>", 0), ("Gladly.", 1), ("<|assistant_end|>", 1))
    assert tok.render_conversation(CONVERSATION) == expected
    assert json.dumps(CONVERSATION) == before
    ids, mask = tok.render_conversation(CONVERSATION, max_tokens=17)
    assert (ids, mask) == (expected[0][:17], expected[1][:17])
    assert ids.count(tok.encode_special("<|assistant_start|>")) <= 1  # the user cannot write one


def test_render_for_completion(tok):
    ids = tok.render_for_completion(CONVERSATION)
    whole, _ = tok.render_conversation(CONVERSATION)
    reply = [*tok.encode("Gladly."), tok.encode_special("<|assistant_end|>")]
    assert ids == whole[:-len(reply)] and ids[-1] == tok.encode_special("<|assistant_start|>")
    long = {"messages": [{"role": "user", "content": "word " * 5000}, {"role": "assistant", "content": "x"}]}
    assert len(tok.render_for_completion(long)) > 5000  # a prompt is never cut silently


def messages(*pairs):
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize("conversation, message", [
    (None, "with at least one message"),
    ({"messages": []}, "with at least one message"),
    ({"messages": "hi"}, "with at least one message"),
    ({"messages": [{"role": "user"}]}, "message 0 is not"),
    ({"messages": [{"role": "user", "content": "x"}, "hi"]}, "message 1 is not"),
    (messages(("assistant", "x")), "message 0 is of role 'assistant'.*'user' is due"),
    (messages(("user", "x"), ("user", "y")), "message 1 is of role 'user'.*'assistant' is due"),
    (messages(("user", "x"), ("assistant", "y"), ("tool", "z")), "message 2 is of role 'tool'"),
    (messages(("user", "x"), ("system", "y")), "message 1 is of role 'system'"),
    (messages(("system", "x")), "message 0 is the system's, so message 1 must be the user's"),
    (messages(("system", "x"), ("assistant", "y")), "message 1 must be the user's"),
    (messages(("system", ["x"]), ("user", "y")), "message 0: the content of a system message must be a string"),
    (messages(("user", ["x"])), "message 0: the content of a user message must be a string, not list"),
    (messages(("user", "x"), ("assistant", 3)), "message 1: .*a string or a list of parts, not int"),
    (messages(("user", "x"), ("assistant", [{"type": "text", "text": "a"}, {"type": "image", "text": "b"}])),
     "message 1, part 1 is not"),
    (messages(("user", "x"), ("assistant", [{"type": "text"}])), "message 1, part 0 is not"),
])
def test_malformed_conversations_say_which_message(tok, conversation, message):
    with pytest.raises(ValueError, match=message):
        tok.render_conversation(conversation)


def test_completion_needs_a_reply_to_complete(tok):
    with pytest.raises(ValueError, match="message 0 is the last and must be the assistant's"):
        tok.render_for_completion(messages(("user", "x")))
    with pytest.raises(ValueError, match="at least one message"):
        tok.render_for_completion(messages(("assistant", "x")))


# --- the command

def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["tok_train", *map(str, arguments)])
    tok_train.main()


def test_tok_train(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus()))
    run(monkeypatch, "--data", tmp_path / "a.jsonl", "--vocab-size", 300)
    out = capsys.readouterr().out
    assert "trained 300 ids" in out and "bytes per token" in out
    tok = Tokenizer.from_directory(tmp_path / "base/tokenizer")
    assert tok.get_vocab_size() == 300
    run(monkeypatch, "--data", tmp_path / "a.jsonl", "--vocab-size", 2000, "--max-chars", 50, "--out", tmp_path / "out")
    assert "2000 ids were asked for" in capsys.readouterr().out
    assert Tokenizer.from_directory(tmp_path / "out").get_vocab_size() < 300
    folder = prepare(tmp_path / "a.jsonl", base_dir=tmp_path / "base")
    assert folder.is_dir()
    run(monkeypatch, "--data", tmp_path / "a.jsonl", "--vocab-size", 310)  # its own it may replace
    assert Tokenizer.from_directory(tmp_path / "base/tokenizer").get_vocab_size() == 310


@pytest.mark.parametrize("name", ["tokenizer.pkl", "tokenizer.json"])
def test_tok_train_leaves_anothers_tokenizer_alone(tok, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    tok.save(tmp_path / "base/tokenizer")
    for ours in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "base/tokenizer" / ours).unlink()
    (tmp_path / "base/tokenizer" / name).write_text("{}")
    before = {p.name: p.read_bytes() for p in (tmp_path / "base/tokenizer").iterdir()}
    assert "token_bytes.pt" in before
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus()))
    arguments = ["--data", tmp_path / "a.jsonl", "--vocab-size", 300]
    with pytest.raises(SystemExit):
        run(monkeypatch, *arguments)
    assert "another program's tokenizer" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in (tmp_path / "base/tokenizer").iterdir()} == before
    run(monkeypatch, *arguments, "--out", tmp_path / "mine")
    assert Tokenizer.from_directory(tmp_path / "mine").get_vocab_size() == 300


@pytest.mark.parametrize("arguments, message", [
    (["--vocab-size", "264"], "at least 265"),
    (["--max-chars", "0"], "leaves no text"),
    (["--data", "./none.txt"], "no such file or folder"),
])
def test_tok_train_bad_input(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    with pytest.raises(SystemExit) as info:
        run(monkeypatch, *arguments)
    err = capsys.readouterr().err
    assert info.value.code == 2 and message in err and err.count("\n") == 1 and err.startswith("error: ")
    assert not any(p.is_file() for p in (tmp_path / "base").rglob("*"))
