"""Tasks: what their conversations are, how answers are judged, where rows come from; and chat_eval over all of them."""
import argparse
import json

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from conftest import learn, randomize

from nanochat.chat import PROBE, check_chats, fit, visible_text
from nanochat.checkpoint_manager import build_model, save_export
from nanochat.engine import Engine
from nanochat.gpt import GPTConfig
from nanochat.hybrid_gpt import HybridConfig
from nanochat.tasks import BENCHMARKS, TASKS, make
from nanochat.tasks.common import TaskMixture
from nanochat.tasks.evaluate import Compute, Judge, Outcome, Results, Sampling, chat_core, letter_ids, paired_difference
from nanochat.tasks.gsm8k import with_calls
from nanochat.tasks.multiple_choice import question_text
from nanochat.tokenizer import Tokenizer
from scripts import chat_eval


def text_of(content):
    return content if isinstance(content, str) else "".join(p["text"] for p in content)


@pytest.fixture(scope="module")
def tokenizer():
    texts = [text_of(m["content"]) for name in TASKS for c in make(name, "test", "examples") for m in c["messages"]]
    return Tokenizer.train_from_iterator(texts, 500)


@pytest.fixture(scope="module")
def model(tokenizer):
    config = GPTConfig(256, tokenizer.get_vocab_size(), 2, 4, 4, 32)
    return randomize(build_model(HybridConfig.from_base(config)))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_right_answer_is_right_and_another_is_wrong(name, tokenizer):
    task = make(name, "test", "examples")
    for conversation in task:
        answer = text_of(conversation["messages"][-1]["content"])
        assert task.evaluate(conversation, answer) and not task.evaluate(conversation, "I do not know.")
        _, mask = tokenizer.render_conversation(conversation)
        assert sum(mask) > 0
        if task.kind == "categorical":
            assert answer in conversation["letters"] and len(letter_ids(tokenizer, conversation)) == 4


def test_how_a_multiple_choice_is_asked():
    assert question_text("Why?", ["A", "B"], ["so", "not so"]) == (
        "Multiple Choice question: Why?\n- so=A\n- not so=B\n\nRespond only with the letter of the correct answer.")


def test_calls_in_a_solution_become_tool_calls():
    assert with_calls("a <<1+1=2>>2\n#### 2") == [
        {"type": "text", "text": "a "}, {"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"},
        {"type": "text", "text": "2\n#### 2"}]
    assert make("GSM8K", "test", "examples").evaluate(
        {"messages": [{"content": [{"text": "#### 1200"}]}]}, "so it is\n#### 1,200")


def test_spelling_problems_of_train_and_test_differ_and_repeat_in_every_run():
    train, test = make("SpellingBee", "train"), make("SpellingBee", "test")
    assert list(train) == list(make("SpellingBee", "train")) and train[0] != test[0]


def test_rows_come_from_the_hubs_files_or_a_jsonl(tmp_path):
    rows = [{"question": f"q{i}", "answer": f"<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"} for i in range(5)]
    (tmp_path / "main").mkdir()
    parquet.write_table(pa.Table.from_pylist(rows[:3]), tmp_path / "main/test-00000-of-00002.parquet")
    parquet.write_table(pa.Table.from_pylist(rows[3:]), tmp_path / "main/test-00001-of-00002.parquet")
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = [sorted(c["messages"][0]["content"] for c in make("GSM8K", split, str(tmp_path))) for split in ("test", "train")]
    assert asked[0] == asked[1] == ["q0", "q1", "q2", "q3", "q4"]


@pytest.mark.parametrize("content, words", [
    ('{"question": "q"}', "row 0 of GSM8K .* has no column answer"), ("{", "line 1 is not JSON")])
def test_rows_of_other_columns_are_named(tmp_path, content, words):
    (tmp_path / "test.jsonl").write_text(content)
    with pytest.raises(ValueError, match=words):
        make("GSM8K", "test", str(tmp_path))


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="--download"):
        make("GSM8K", "test", str(tmp_path))
    with pytest.raises(ValueError, match="no split 'train'"):
        make("HumanEval", "train", "examples")
    with pytest.raises(ValueError, match="no task ARC"):
        make("ARC", "test")
    with pytest.raises(ValueError, match="none of A, B"):
        make("ARC-Easy", "test", "examples").pose("q", ["A", "B"], ["x", "y"], "C")


def test_mixtures_hold_every_conversation_once():
    tasks = [make("GSM8K", "test", "examples"), make("SmolTalk", "test", "examples")]
    key = json.dumps
    every = sorted(key(c) for t in tasks for c in t)
    mixed = TaskMixture(tasks)
    assert sorted(map(key, mixed)) == every and [key(c) for c in mixed] != [key(c) for t in tasks for c in t]
    assert len(TaskMixture([*tasks, tasks[0]])) == len(mixed) + len(tasks[0])


def test_chat_core_is_centred_on_guessing():
    assert chat_core({"a": 0.25, "b": 0.0}, {"a": 0.25, "b": 0.0}) == 0
    assert chat_core({"a": 1.0, "b": 0.5}, {"a": 0.25, "b": 0.0}) == 0.75


def test_paired_difference_against_a_bootstrap():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(400, generator=generator) < p for p in (0.7, 0.6))
    mean, half = paired_difference(a.tolist(), b.tolist())
    d = a.float() - b.float()
    means = torch.stack([d[torch.randint(400, (400,), generator=generator)].mean() for _ in range(2000)])
    assert mean == pytest.approx(float(d.mean())) and half == pytest.approx(1.96 * float(means.std()), rel=0.1)


def test_multiple_choice_equals_the_likeliest_letter_of_the_whole_forward(model, tokenizer):
    task = make("ARC-Easy", "test", "examples")
    for mode in ("ghost", "think"):
        outcomes = list(Judge(Engine(model, tokenizer), Compute(mode), Sampling(), 3).run(task, list(range(8))))
        assert sorted(o.index for o in outcomes) == list(range(8))
        for o in outcomes:
            ids = tokenizer.render_for_completion(task[o.index])
            logits = model(torch.tensor([ids]), widths=mode)[0, -1]
            best = max(task[o.index]["letters"], key=lambda c: float(logits[tokenizer.encode(c)[0]].detach()))
            assert o.answers == [best] and o.right == (best == task[o.index]["messages"][-1]["content"])
            assert 0 < o.flops <= o.full_flops and (o.flops == pytest.approx(o.full_flops)) == (mode == "think")


def test_pass_at_k_needs_one_right_answer(model, tokenizer):
    class Half(type(make("GSM8K", "test", "examples"))):
        def evaluate(self, conversation, answer):
            return len(answer) % 2 == 0
    task = Half("test", "examples")
    one, many = (list(Judge(Engine(model, tokenizer), Compute(), Sampling(1.0, 50, 6, n), 4).run(task, list(range(8))))
                 for n in (1, 4))
    assert all(len(o.answers) == 4 and o.right == any(len(a) % 2 == 0 for a in o.answers) for o in many)
    assert sum(o.right for o in many) > sum(o.right for o in one)


def test_a_question_that_does_not_fit_is_wrong_and_said(tokenizer):
    small = randomize(build_model(HybridConfig.from_base(GPTConfig(16, tokenizer.get_vocab_size(), 2, 4, 4, 32))))
    outcomes = list(Judge(Engine(small, tokenizer), Compute(), Sampling(), 4).run(make("GSM8K", "test", "examples"), [0, 1]))
    assert [o.right for o in outcomes] == [False, False] and "does not fit" in outcomes[0].answers[0]


def test_results_go_on_after_a_torn_line(tmp_path):
    path, settings = tmp_path / "r.jsonl", {"task": "x"}
    first = Results(path, settings)
    for i in range(3):
        first.add(Outcome(i, i % 2 == 0, ["a"]))
    path.write_bytes(path.read_bytes()[:-9])
    again = Results(path, settings)
    assert [o.index for o in again.outcomes] == [0, 1]
    again.add(Outcome(2, True, ["b"]))
    assert [o.index for o in Results(path, settings).outcomes] == [0, 1, 2]
    assert Results(path, {"task": "y"}).outcomes == []


def test_a_letter_of_several_tokens_is_named():
    bytes_only = Tokenizer([bytes([i]) for i in range(256)])
    with pytest.raises(ValueError, match="'AB' is 2 tokens"):
        letter_ids(bytes_only, {"letters": ["A", "AB"]})


def test_base_models_do_not_chat(tokenizer):
    """Taught text alone a model is refused; taught answers of one kind, unlike the probe's, it is not."""
    model = randomize(build_model(HybridConfig.from_base(GPTConfig(256, tokenizer.get_vocab_size(), 2, 4, 4, 32))))
    check_chats(model, tokenizer)
    texts = [f"Ann has {i} apples and eats {i % 3} of them, so she keeps {i - i % 3}." for i in range(20, 28)]
    learn(model, [(tokenizer.encode(text, prepend="<|bos|>"), [1] * 99) for text in texts])
    with pytest.raises(ValueError, match="base model"):
        check_chats(model, tokenizer)
    learn(model, [tokenizer.render_conversation({"messages": [
        {"role": "user", "content": text}, {"role": "assistant", "content": [
            {"type": "text", "text": "First I count them. "}, {"type": "python", "text": "20-2"},
            {"type": "python_output", "text": "18"}, {"type": "text", "text": "I found 18."}]}]}) for text in texts], 150)
    check_chats(model, tokenizer)
    finished = tokenizer.render_conversation(PROBE)[0][:-1]
    end = tokenizer.encode_special("<|assistant_end|>")
    with torch.no_grad():  # and so it must be its own answer that tells
        assert float(model(torch.tensor([finished]))[0, -1].softmax(-1)[end]) < 0.1 / tokenizer.get_vocab_size()


def test_long_conversations_lose_their_oldest_turns(tokenizer):
    system = {"role": "system", "content": "Be brief."}
    chat = [{"role": r, "content": f"{r} {i} " + "word " * 10} for i in range(6) for r in ("user", "assistant")][:-1]
    whole, dropped = fit(tokenizer, [system, *chat], 10_000)
    assert dropped == 0
    short, dropped = fit(tokenizer, [system, *chat], len(whole) // 2)
    assert dropped >= 4 and dropped % 2 == 0 and len(short) <= len(whole) // 2
    text = tokenizer.decode(short)
    assert text.startswith("<|bos|><|user_start|>Be brief.") and "user 5" in text and "user 0" not in text
    with pytest.raises(ValueError, match="shorten it"):
        fit(tokenizer, chat, 10)


class Counts:
    """A tokenizer that counts how often it renders a conversation."""
    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, 0

    def render_for_completion(self, conversation):
        self.calls += 1
        return self.tokenizer.render_for_completion(conversation)


@pytest.mark.parametrize("turns", [1, 3, 9, 41])
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_no_more_turns_are_dropped_than_must_be(tokenizer, turns, system):
    """Against one pair after another being taken away; and a long conversation is not encoded once for every turn."""
    chat = [{"role": ("user", "assistant")[i % 2], "content": "word " * (1 + 7 * i % 5)} for i in range(turns)]
    lengths = [len(tokenizer.render_for_completion({"messages": [*system, *chat[i:], {"role": "assistant", "content": ""}]}))
               for i in range(0, turns, 2)]
    for room in {n + d for n in lengths for d in (-1, 0, 1)}:
        must = next((i for i, n in enumerate(lengths) if n <= room), None)
        if must is None:
            with pytest.raises(ValueError, match="shorten it"):
                fit(tokenizer, [*system, *chat], room)
            continue
        counts = Counts(tokenizer)
        ids, dropped = fit(counts, [*system, *chat], room)
        assert dropped == 2 * must and len(ids) == lengths[must] and counts.calls <= 8


def test_special_tokens_are_not_shown(tokenizer):
    ids = [tokenizer.encode_special("<|python_start|>"), *tokenizer.encode("1+1 é🙂"),
           tokenizer.encode_special("<|python_end|>")]
    pieces = list(visible_text(tokenizer, ids))
    assert "".join(pieces) == "1+1 é🙂" and len(pieces) == len(ids)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model, tokenizer):
    folder = tmp_path_factory.mktemp("chat") / "model"
    save_export(folder, model, tokenizer, {"tag": "t", "provenance": {}})
    return folder


def test_the_command_scores_every_mode_and_resumes(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    argv = ["--checkpoint", str(checkpoint), "--data", "examples", "-x", "3", "-m", "8", "--reference", str(checkpoint),
            "--show", "1", "--device-type", "cpu"]
    result = chat_eval.main(argv)
    printed = capsys.readouterr().out
    assert [r["compute"] for r in result["rows"]] == [*HybridConfig.from_base(GPTConfig(256, 500, 2, 4, 4, 32))
                                                      .distinct_modes, "auto"]
    assert all(set(r["scores"]) == set(BENCHMARKS) and r["ChatCORE"] is not None for r in result["rows"])
    shares = [r["flops"] for r in result["rows"][:-1]]
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1)
    assert "think against the reference: +0.0 points" in printed and ">>> " in printed
    assert (tmp_path / "chat_eval/model/chat_eval.png").is_file()
    monkeypatch.setattr(Judge, "run", lambda self, task, indices: iter(() if not indices else 1 / 0))
    again = chat_eval.main(argv)  # nothing is left to be judged
    assert [r["scores"] for r in again["rows"]] == [r["scores"] for r in result["rows"]]


def test_auto_is_offered_only_where_gate_and_predictor_are_trained(model, tokenizer):
    """A training stage trains the gate along, but the predictor is --controls' alone."""
    modes, engine = [*model.config.distinct_modes], Engine(model, tokenizer)
    args = argparse.Namespace(modes="all", budget=None, lossless=False)
    assert [c.mode for c in chat_eval.chosen_computes(args, engine)] == [*modes, "auto"]
    weight = model.predictor.out_weight.detach().clone()
    with torch.no_grad():
        model.predictor.out_weight.zero_()
    try:
        assert [c.mode for c in chat_eval.chosen_computes(args, engine)] == modes
    finally:
        with torch.no_grad():
            model.predictor.out_weight.copy_(weight)


@pytest.mark.parametrize("argv, words", [
    (["-a", "Trivia"], "no task Trivia"), (["--modes", "huge"], "unknown mode"), (["-x", "0"], "must be at least 1"),
    (["-n", "3"], "give a --temperature"), (["--modes", "think", "--budget", "0.5"], "--budget has an effect")])
def test_bad_flags_are_named(checkpoint, tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(SystemExit):
        chat_eval.main(["--checkpoint", str(checkpoint), "--data", "examples", *argv])
    assert words in capsys.readouterr().err
