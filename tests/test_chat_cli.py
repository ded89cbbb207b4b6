"""nanochat's interface of the engine, and chat_cli: conversations longer than the context, commands, models by tag."""
import os
import random

import pytest
from conftest import learn, randomize
from test_tool_use import PROMPTS, RESULT, calls_of, recomputed

from nanochat import checkpoint_manager as ckpt
from nanochat.chat import answer_parts, stop_tokens, visible_text
from nanochat.checkpoint_manager import build_model, save_export
from nanochat.engine import Compute, Engine, _columns
from nanochat.gpt import GPTConfig
from nanochat.hybrid_gpt import HybridConfig
from nanochat.tasks import make
from nanochat.tasks.evaluate import Judge, Sampling
from nanochat.tokenizer import Tokenizer
from scripts import chat_cli


def with_ends(tokenizer, end, bos=299):
    """A stand-in tokenizer of test_tool_use whose answers end with these tokens."""
    tokenizer.special |= {"<|assistant_end|>": end}
    tokenizer.get_bos_token_id = lambda: bos
    return tokenizer


@pytest.mark.parametrize("compute", [Compute(), Compute("ghost"), Compute(lossless=True)])
def test_generate_is_nanochats_interface(hybrid, compute):
    """Columns of one token per sample; masks are 0 where the tool's result was forced. Against decoding without a cache."""
    tokenizer = with_ends(calls_of(hybrid, PROMPTS[0], widths=compute.mode), 298)
    want = recomputed(hybrid, PROMPTS[0], 24, tokenizer, compute.mode)
    assert 298 not in want and 299 not in want
    steps = list(Engine(hybrid, tokenizer).generate(PROMPTS[0], 2, 24, temperature=0, compute=compute))
    assert [column for column, _ in steps] == [[t, t] for t in want]
    forced = {i + j for i in range(24) for j in range(5) if want[i:i + 5] == [40, *RESULT, 44]}
    assert forced and [masks for _, masks in steps] == [[int(i not in forced)] * 2 for i in range(24)]


def test_samples_end_each_for_itself(hybrid):
    """Rows of different lengths, each as it is alone; an ended one is filled up until all have ended."""
    alone = [list(Engine(hybrid, None).tokens([5, 17], 30, temperature=1.0, seed=7 + r)) for r in range(4)]
    end = alone[0][9]  # ends sample 0 after at most 9 tokens
    engine = Engine(hybrid, with_ends(calls_of(hybrid, [5, 17]), end))
    engine.tokenizer.special["<|python_start|>"] = 297  # no tool here
    want = [row[:min(row.index(t) if t in row else 30 for t in (end, 299))] for row in alone]
    assert len({len(row) for row in want}) > 1
    results, masks = engine.generate_batch([5, 17], 4, max_tokens=30, temperature=1.0, seed=7)
    assert results == [[5, 17, *row] for row in want] and masks == [[0, 0] + [1] * len(row) for row in want]
    columns = list(engine.generate([5, 17], 4, max_tokens=30, temperature=1.0, seed=7))
    for r, row in enumerate(want):
        tokens, mask = [c[r] for c, _ in columns], [m[r] for _, m in columns]
        assert tokens == row + [end] * (len(columns) - len(row)) and sum(mask) == min(len(columns), len(row) + 1)


@pytest.mark.parametrize("most", [1, 9])
def test_columns_of_rounds_that_give_rows_different_numbers_of_tokens(most):
    """As lossless rounds do, 1 to MAX_DRAFT + 1 of them: no row's tokens are lost, put off beyond its end, or mixed."""
    rng = random.Random(most)
    for _ in range(200):
        rows = [[rng.randrange(1000) for _ in range(rng.choice([0, 1, 5, 30]))] for _ in range(3)]
        left, steps = [list(row) for row in rows], []
        while any(left):
            taken = [[row.pop(0) for _ in range(min(len(row), rng.randint(1, most)))] for row in left]
            steps += [[(r, tokens[j]) for r, tokens in enumerate(taken) if j < len(tokens)]
                      for j in range(max(map(len, taken)))]
        columns = list(_columns(steps, 3, most))
        assert [[t for t in column if t is not None] for column in zip(*columns)] == rows or not columns
        assert len(columns) == max(map(len, rows))
        for r, row in enumerate(rows):
            assert [c[r] for c in columns[len(row):]] == [None] * (len(columns) - len(row))


def test_an_answer_may_be_longer_than_the_context(hybrid):
    engine = Engine(hybrid, with_ends(calls_of(hybrid, [1, 2, 3]), 298))
    results, _ = engine.generate_batch([1, 2, 3], max_tokens=100, temperature=1.0)
    assert len(results[0]) == 103 or results[0][3:] == list(engine.tokens([1, 2, 3], 100, seed=42, overflow="slide",
                                                                          stop={298, 299}))
    results, _ = engine.generate_batch([1, 2, 3], temperature=1.0)
    assert len(results[0]) <= hybrid.config.sequence_len
    with pytest.raises(ValueError, match="num_samples is 0"):
        next(engine.generate([1], 0))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog and runs on"] * 4, 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    config = GPTConfig(128, tokenizer.get_vocab_size(), 2, 4, 4, 32)
    return randomize(build_model(HybridConfig.from_base(config))).requires_grad_(False)


@pytest.fixture
def home(tmp_path, model, tokenizer, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    for name in ("chatsft_checkpoints/d2_32", "fractal_checkpoints/d2_32", "fractal_checkpoints/d2_32_unfrozen"):
        save_export(tmp_path / name, model, tokenizer, {"tag": "d2", "provenance": {}})
    return tmp_path


def enter(monkeypatch, *lines):
    left = iter(lines)

    def entered(prompt):
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None
    monkeypatch.setattr("builtins.input", entered)


def test_a_chat_longer_than_the_context_goes_on_and_says_so_once(home, monkeypatch, capsys):
    enter(monkeypatch, *["the quick brown fox jumps over the lazy dog"] * 9, "x " * 300, "again")
    chat_cli.main(["-i", "sft", "-m", "20", "--device-type", "cpu"])
    out, err = capsys.readouterr()
    assert err.count("its oldest messages are left out") == 1 and err.count(" tok/s") == 10
    assert err.count("shorten it") == 1 and "<|" not in out
    assert "model: " in out and "chatsft_checkpoints/d2_32" in out.splitlines()[0]


def test_what_was_said_is_remembered_until_clear(home, model, tokenizer, monkeypatch, capsys):
    """Greedy answers, against the conversation rendered whole."""
    enter(monkeypatch, "the fox", "the dog", "/clear", "the dog")
    chat_cli.main(["-i", "sft", "-m", "12", "-t", "0", "--device-type", "cpu"])
    printed, want, messages = capsys.readouterr().out.partition("\n")[2], "", []
    engine, stop = Engine(model, tokenizer), stop_tokens(tokenizer)
    for said in ("the fox", "the dog", None, "the dog"):
        if said is None:
            messages = []
            continue
        messages.append({"role": "user", "content": said})
        ids = tokenizer.render_for_completion({"messages": [*messages, {"role": "assistant", "content": ""}]})
        tokens = engine.answers([ids], 12, temperature=0, stop=stop)[0]
        want += "".join(visible_text(tokenizer, tokens))
        messages.append({"role": "assistant", "content": answer_parts(tokenizer, tokens)})
    assert printed == want


def test_commands(home, monkeypatch, capsys):
    enter(monkeypatch, "/help", "/mode huge", "/mode ghost", "the", "/budget x", "/budget 0.5", "/budget", "/nonsense",
          "/mode auto", "/budget 0.9", "the", "/mode think", "/quit", "never reached")
    chat_cli.main(["--checkpoint", str(home / "fractal_checkpoints/d2_32"), "-m", "5", "--device-type", "cpu"])
    out, err = capsys.readouterr()
    assert err.count("/budget SHARE") == 2 and "unknown mode 'huge'" in err and "mode ghost]" in err and "mode auto]" in err
    assert "/budget x: give a share" in err and "mode auto only" in err and "no command /nonsense" in err
    assert out.count("the") >= 2 and "never" not in out


def test_models_are_found_by_source_tag_and_step(home, model, tokenizer, capsys):
    def touch(name, when):
        os.utime(home / name / "config.json", (when, when))
    touch("chatsft_checkpoints/d2_32", 3000)
    touch("fractal_checkpoints/d2_32", 2000)
    touch("fractal_checkpoints/d2_32_unfrozen", 1000)
    assert ckpt.newest(home) == home / "chatsft_checkpoints/d2_32"
    assert ckpt.newest(home, "fractal") == home / "fractal_checkpoints/d2_32"
    assert ckpt.newest(home, "fractal", "d2_32_unfrozen") == home / "fractal_checkpoints/d2_32_unfrozen"
    touch("fractal_checkpoints/d2_32_unfrozen", 4000)
    assert ckpt.newest(home, tag="d2") == home / "fractal_checkpoints/d2_32_unfrozen"
    ckpt.save_step(home / "base_checkpoints/d2", 7, model, [], {"tag": "d2"})
    tokenizer.save(home / "base_checkpoints/d2/tokenizer")
    chat_cli.main(["-i", "base", "-s", "7", "-p", "the", "-m", "3", "--device-type", "cpu"])
    assert "model_000007.pt" in capsys.readouterr().out


@pytest.mark.parametrize("argv, words", [
    (["-i", "rl"], "no model in"), (["-g", "d9"], "no model of tag d9"), (["-i", "sft", "-s", "3"], "no checkpoint file"),
    (["--checkpoint", "x", "-g", "d2"], "drop the one or the others"), (["--mode", "huge"], "unknown mode"),
    (["--budget", "0.5"], "mode auto only"), (["--lossless", "--budget", "0.5"], "drop the budget")])
def test_bad_flags_are_named(home, capsys, argv, words):
    with pytest.raises(SystemExit) as e:
        chat_cli.main([*argv, "-p", "x", "--device-type", "cpu"])
    assert e.value.code == 2 and words in capsys.readouterr().err


def test_a_base_model_does_not_chat(home, model, tokenizer, capsys):
    base = build_model(model.config)
    base.load_state_dict(model.state_dict())
    learn(base, [(tokenizer.encode("the quick brown fox jumps over the lazy dog", prepend="<|bos|>"), [1] * 99)])
    save_export(home / "base", base, tokenizer, {"tag": "d2", "provenance": {}})
    with pytest.raises(SystemExit):
        chat_cli.main(["--checkpoint", str(home / "base"), "--chat", "-p", "x", "--device-type", "cpu"])
    assert "base model" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["GSM8K", "SpellingBee", "SmolTalk"])
def test_parts_of_an_answer_are_those_that_were_rendered(tokenizer, name):
    task = make(name, "train", "examples")
    for conversation in (task[i] for i in range(4)):
        said = [m for m in conversation["messages"] if m["role"] != "system"][:2]
        ids, _ = tokenizer.render_conversation({"messages": said})
        start = ids.index(tokenizer.encode_special("<|assistant_start|>"))
        parts = answer_parts(tokenizer, ids[start + 1:-1])
        again, _ = tokenizer.render_conversation({"messages": [said[0], {"role": "assistant", "content": parts}]})
        assert again == ids and (len(parts) > 1) == (name != "SmolTalk")


def test_a_problems_samples_do_not_depend_on_its_batch(tokenizer, model):
    """What a resumed evaluation draws is what an uninterrupted one draws."""
    task = make("SpellingBee", "test", "examples")
    engine, sampling = Engine(model, tokenizer), Sampling(1.0, 50, 8, 2)
    whole = {o.index: o.answers for o in Judge(engine, Compute(), sampling, 3).run(task, list(range(7)))}
    rest = {o.index: o.answers for o in Judge(engine, Compute(), sampling, 2).run(task, [2, 5, 6])}
    assert rest == {i: whole[i] for i in rest} and len(rest) == 3
