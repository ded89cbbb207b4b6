"""The calculator, and its results forced into rows: alone, in batches, in every mode, losslessly, across a slide."""
import threading

import pytest
import torch
from test_confidence_probe import controls

from nanochat.engine import Engine
from nanochat.execution import calculate
from nanochat.tokenizer import Tokenizer
from nanochat.tool_use import ToolUse

PROMPTS = [[5, 17, 250, 3], [9], [7, 7, 7, 1, 2, 3, 4, 5, 6, 8, 200], [4] * 20]
RESULT = [41, 42, 43]  # what the stand-in's tool answers, brackets apart


@pytest.mark.parametrize("expression, result", [
    ("12/60", "0.2"), ("0.2*50", "10"), ("2,000*3/4", "1500"), (" 3 * (2 + 1) - -4 ", "13"), ("7//2", "3"), (".5+.5", "1"),
    ("'strawberry'.count('r')", "3"), ('"a,b,c".count(",")', "2"),
    ("1/0", None), ("2**3", None), ("1e5", None), ("(" * 200, None), ("", None), ("1 2", None), ("1_000", None),
    ("9" * 300, None), ("9" * 60 + "*" + "9" * 60, None),
    ("__import__('os').system('ls')", None), ("'a'*9", None), ("'a'.count('a', 0)", None), ("open('x')", None),
    ("(1).real", None)])
def test_calculator(expression, result):
    assert calculate(expression) == result


def test_calculator_works_in_a_thread_that_is_not_the_main_one():
    out = []
    thread = threading.Thread(target=lambda: out.append(calculate("1+1")))
    thread.start()
    thread.join()
    assert out == ["2"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer([bytes([i]) for i in range(256)])


def wrote(tool, tokenizer, text, *names):
    for token in [tokenizer.encode_special(names[0]), *tokenizer.encode(text), *map(tokenizer.encode_special, names[1:])]:
        tool.wrote(token)


def test_a_call_forces_its_bracketed_result(tokenizer):
    tool = ToolUse(tokenizer)
    assert tool.next([7]) == [7]
    wrote(tool, tokenizer, "40+2", "<|python_start|>", "<|python_end|>")
    assert tokenizer.decode(tool.forced) == "<|output_start|>42<|output_end|>"
    taken = [tool.next([7, 8])[0] for _ in range(4)]
    assert tokenizer.decode(taken) == "<|output_start|>42<|output_end|>" and tool.next([7, 8]) == [7, 8]


@pytest.mark.parametrize("text", ["import os", "1/0", "1" * 300])
def test_a_call_that_is_refused_forces_nothing(tokenizer, text):
    tool = ToolUse(tokenizer)
    wrote(tool, tokenizer, text, "<|python_start|>", "<|python_end|>")
    assert not tool.forced


def test_an_end_without_a_start_is_no_call(tokenizer):
    tool = ToolUse(tokenizer)
    wrote(tool, tokenizer, "1+1", "<|python_end|>", "<|python_end|>")
    assert not tool.forced


class StandIn:
    """A tokenizer to which any token of a random model can be the tool's: every call is 20+21, its result RESULT."""
    def __init__(self, start, end):
        self.special = {"<|python_start|>": start, "<|python_end|>": end, "<|output_start|>": 40, "<|output_end|>": 44}

    def encode_special(self, name):
        return self.special[name]

    def decode(self, ids):
        return "20+21"

    def encode(self, text):
        assert text == "41"
        return RESULT


@torch.no_grad()
def recomputed(model, prompt, n, tokenizer, widths=None):
    """Greedy decoding with the tool, without a cache: the whole sequence anew for every token."""
    ids, tool = list(prompt), ToolUse(tokenizer)
    for _ in range(n):
        token, = tool.next([int(model(torch.tensor([ids]), widths=widths)[0, -1].argmax())])
        tool.wrote(token)
        ids.append(token)
    return ids[len(prompt):]


def calls_of(model, prompt, n=24, widths=None, at=3):
    """A stand-in whose tool is called by what this model writes: its greedy tokens number `at` and `at` + 2."""
    ids = list(Engine(model, None).tokens(prompt, n, mode=widths, temperature=0))
    return StandIn(ids[at], ids[at + 2])


@pytest.mark.parametrize("mode", ["ghost", "normal", "think"])
def test_forced_tokens_equal_recomputation_in_every_mode(hybrid, mode):
    tokenizer = calls_of(hybrid, PROMPTS[0], widths=mode)
    want = recomputed(hybrid, PROMPTS[0], 24, tokenizer, mode)
    assert any(want[i:i + 5] == [40, *RESULT, 44] for i in range(24))
    assert list(Engine(hybrid, tokenizer).tokens(PROMPTS[0], 24, mode=mode, temperature=0)) == want
    assert Engine(hybrid, tokenizer).answers(PROMPTS, 24, mode=mode, temperature=0)[0] == want


def test_rows_of_a_batch_call_the_tool_each_for_itself(hybrid):
    tokenizer = calls_of(hybrid, PROMPTS[2])
    engine = Engine(hybrid, tokenizer)
    alone = [engine.answers([p], 24, temperature=0)[0] for p in PROMPTS]
    assert engine.answers(PROMPTS, 24, temperature=0) == alone == [recomputed(hybrid, p, 24, tokenizer) for p in PROMPTS]
    sampled = [list(engine.tokens(p, 40, temperature=1.0, seed=3 + r)) for r, p in enumerate(PROMPTS)]
    assert engine.answers(PROMPTS, 40, temperature=1.0, seed=3) == sampled


@pytest.mark.parametrize("draft", [1, 4, 8])
@pytest.mark.parametrize("depth, width", [(2, 64), (6, 32), (4, 16)])
def test_lossless_decoding_with_the_tool_is_plain_decoding_with_it(hybrid, draft, depth, width):
    tokenizer = calls_of(hybrid, PROMPTS[0])
    engine = Engine(hybrid, tokenizer)
    want = engine.answers(PROMPTS, 24, temperature=0)
    assert any(want[0][i:i + 5] == [40, *RESULT, 44] for i in range(24))
    options = {"temperature": 0, "lossless": True, "mode": width, "depth": depth, "draft": draft}
    assert engine.answers(PROMPTS, 24, **options) == want
    assert engine.answers(PROMPTS[:1], 24, **options) == want[:1]


def test_mode_auto_with_the_tool(hybrid):
    plain = [Engine(hybrid, None).answers([p], 24, mode="auto", temperature=0, control=controls(hybrid))[0] for p in PROMPTS]
    tokenizer = StandIn(plain[0][3], plain[0][5])
    engine = Engine(hybrid, tokenizer)
    alone = [engine.answers([p], 24, mode="auto", temperature=0, control=controls(hybrid))[0] for p in PROMPTS]
    assert alone[0][:6] == plain[0][:6] and alone[0][6:11] == [40, *RESULT, 44]
    assert engine.answers(PROMPTS, 24, mode="auto", temperature=0, control=controls(hybrid)) == alone


def test_a_result_is_forced_across_a_slide(hybrid):
    prompt, first = [3] * 56, 64 - 56 + 1  # the context is full after so many tokens
    tokenizer = calls_of(hybrid, prompt, n=first, at=first - 4)
    got = list(Engine(hybrid, tokenizer).tokens(prompt, 30, temperature=0, overflow="slide"))
    at = next(i for i in range(30) if got[i:i + 5] == [40, *RESULT, 44])
    assert at < first < at + 5
    ids = prompt + got[:at + 5]
    # After the slide the model sees the last half of what was the context, and all that came since.
    seen = ids[len(prompt) + first - 32:]
    assert got[at + 5] == int(hybrid(torch.tensor([seen]))[0, -1].argmax())
