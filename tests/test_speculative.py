"""Lossless decoding: the same tokens as plain decoding, or the same distribution, whatever is drafted; state; policy."""
import itertools
import math

import pytest
import torch
from conftest import randomize

from nanochat import speculative
from nanochat.cache import MatryoshkaKVCache
from nanochat.checkpoint_manager import build_model
from nanochat.engine import Engine, Trace, prepare_inference
from nanochat.gpt import GPTConfig
from nanochat.hybrid_gpt import HybridConfig
from nanochat.matryoshka import block_cost
from nanochat.sampling import accept_by_rejection, accept_greedily
from nanochat.speculative import Draft, Record, Round, candidates, expected_tokens

PROMPTS = [[5, 17, 250, 3], [9], [7, 7, 7, 1, 2, 3, 4, 5, 6, 8, 200], [4] * 20]


def near_tie(model, ids):
    """Whether the two likeliest next tokens are within 1e-4, where rounding may decide."""
    top = model(torch.tensor([ids])).detach()[0, -1].topk(2).values
    return float(top[0] - top[1]) < 1e-4


def check_equal(model, prompts, got, want):
    for prompt, a, b in zip(prompts, got, want, strict=True):
        at = next((i for i, (x, y) in enumerate(itertools.zip_longest(a, b)) if x != y), None)
        assert at is None or near_tie(model, prompt + b[:at]), (prompt, a, b)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("draft", candidates(HybridConfig.from_base(GPTConfig(64, 300, 3, 4, 4, 64))))
def test_every_draft_gives_the_tokens_of_plain_greedy_decoding(hybrid, draft, rows):
    engine, prompts = Engine(hybrid, None), PROMPTS[:rows]
    want, kept = engine.answers(prompts, 20, temperature=0), 0
    for k in (1, 3, 8):
        got = engine.answers(prompts, 20, temperature=0, lossless=True, mode=draft.width, depth=draft.depth, draft=k)
        check_equal(hybrid, prompts, got, want)
        rounds = [r for t in engine.traces for r in t.rounds if r.draft]
        assert rounds and {r.draft for r in rounds} == {draft} and max(r.drafted for r in rounds) == k
        kept += sum(r.accepted for r in rounds)
        assert all(len(t.steps) == 20 and {d for d, _ in t.steps} == {6} for t in engine.traces)
    assert kept > 0


def test_base_models_and_bf16_draft_too(base, hybrid):
    base_engine = Engine(base, None)
    want = base_engine.answers(PROMPTS, 20, temperature=0)
    got = base_engine.answers(PROMPTS, 20, temperature=0, lossless=True, depth=1, mode=64, draft=4)
    check_equal(base, PROMPTS, got, want)
    prepare_inference(hybrid, "cpu", torch.bfloat16)
    engine = Engine(hybrid, None)
    want = engine.answers(PROMPTS, 20, temperature=0)
    got = engine.answers(PROMPTS, 20, temperature=0, lossless=True, depth=2, mode=64, draft=4)
    assert sum(a == b for x, y in zip(got, want) for a, b in zip(x, y)) > 60  # of 80: bf16 rounds, and may go elsewhere


def test_the_policy_may_choose_anything(hybrid):
    engine = Engine(hybrid, None)
    want = engine.answers(PROMPTS, 40, temperature=0)
    for mode in ("auto", None, "think"):
        check_equal(hybrid, PROMPTS, engine.answers(PROMPTS, 40, temperature=0, lossless=True, mode=mode), want)


# --- drafts of known quality, ends of answers ------------------------------------------------------------------------

def scripted(monkeypatch, prompts, want, pattern):
    """Replaces what is drafted: round j of row r drafts pattern[(j + r) % len] tokens right, then wrong ones."""
    draft, rounds = speculative.Speculation._draft, {}

    def oracle(self, cache, config, token, generators):
        start = cache._saved_pos
        rounds.setdefault(tuple(start), len(rounds))
        out = draft(self, cache, config, token, generators)
        for i, p in enumerate(cache.pos):
            row = next(r for r, prompt in enumerate(prompts) if prompt == ROWS[id(self)][i])
            at, good = p - len(prompts[row]), pattern[(rounds[tuple(start)] + row) % len(pattern)]
            right = want[row][at] if at < len(want[row]) else 0
            out[0][i, 0] = right if p - start[i] <= good else (right + 1) % 300
        return out
    ROWS = {}
    call = speculative.Speculation.__call__

    def remember(self, cache, live, *rest):
        ROWS[id(self)] = [prompts[r] for r in live]
        return call(self, cache, live, *rest)
    monkeypatch.setattr(speculative.Speculation, "_draft", oracle)
    monkeypatch.setattr(speculative.Speculation, "__call__", remember)


@pytest.mark.parametrize("draft", [Draft(2, 64), Draft(4, 16), Draft(6, 32)])
@pytest.mark.parametrize("pattern", [[5, 0, 0, 2], [1, 3, 5], [0], [4, 0]])
def test_rounds_that_keep_all_some_or_nothing(hybrid, monkeypatch, draft, pattern):
    """None kept behind a round that kept some; a part, so that conv windows span rounds; rows that keep unlike numbers."""
    engine = Engine(hybrid, None)
    want = engine.answers(PROMPTS[:3], 24, temperature=0)
    scripted(monkeypatch, PROMPTS[:3], want, pattern)
    got = engine.answers(PROMPTS[:3], 24, temperature=0, lossless=True, mode=draft.width, depth=draft.depth, draft=5)
    check_equal(hybrid, PROMPTS[:3], got, want)
    assert got == want
    for r, trace in enumerate(engine.traces):
        kept = [x.accepted for x in trace.rounds if x.drafted == 5]
        assert kept == [pattern[(j + r) % len(pattern)] for j in range(len(kept))]


def test_a_stop_token_inside_a_draft(hybrid, monkeypatch):
    engine, prompts = Engine(hybrid, None), PROMPTS[:2]
    whole = engine.answers(prompts, 20, temperature=0)
    at = next(i for i in range(3, 20) if whole[0][i] not in whole[0][:i] + whole[1])
    want = [whole[0][:at], whole[1]]
    scripted(monkeypatch, prompts, whole, [8])
    for i in range(at):  # wherever in the draft the stop lies
        stopped = [whole[0][:i + 1] if whole[0][i + 1] not in whole[0][:i + 1] + whole[1] else None, whole[1]]
        if stopped[0] is not None:
            assert engine.answers(prompts, 20, temperature=0, lossless=True, depth=2, mode=64, draft=8,
                                  stop=[whole[0][i + 1]]) == stopped
    assert engine.answers(prompts, 20, temperature=0, lossless=True, depth=2, mode=64, draft=8, stop=[whole[0][at]]) == want


@pytest.mark.parametrize("draft", [Draft(2, 64), Draft(6, 16)])
def test_the_contexts_end_and_the_answers_end_inside_a_draft(hybrid, monkeypatch, draft):
    engine, options = Engine(hybrid, None), {"temperature": 0}
    lossless = {"lossless": True, "depth": draft.depth, "mode": draft.width, "draft": 8} | options
    prompts = [[3] * 52, [1, 2]]  # the first fills the context of 64 in the midst of a draft, the other goes on
    want = engine.answers(prompts, 30, **options)
    assert len(want[0]) == 64 - 52 + 1
    slid = engine.answers(prompts, 30, overflow="slide", **options)
    scripted(monkeypatch, prompts, want, [8])
    assert engine.answers(prompts, 30, **lossless) == want
    for n in (1, 2, 7, 8, 9, 10, 11):
        assert engine.answers(prompts, n, **lossless) == [a[:n] for a in want]
    monkeypatch.undo()
    assert engine.answers(prompts, 30, overflow="slide", **lossless) == slid


# --- state -----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_finishing_exited_tokens_is_never_having_exited(hybrid, tokens):
    prepare_inference(hybrid, "cpu", torch.float32)
    plain, exited = (MatryoshkaKVCache(hybrid, 2, 48) for _ in range(2))
    for cache in (plain, exited):
        hybrid.hidden(tokens[:, :20], cache=cache)
    want = torch.cat([hybrid.hidden(tokens[:, t:t + 1], cache=plain) for t in range(20, 26)], 1)
    for t in range(20, 26):
        hybrid.hidden(tokens[:, t:t + 1], exits=torch.full((2, 1), 2), cache=exited)
    got = hybrid.finish(exited)
    assert (got - want).abs().max() < 1e-5 and exited.pos == plain.pos and not any(exited.behind)
    a, b = (hybrid(tokens[:, 26:27], cache=cache) for cache in (plain, exited))
    assert (a - b).abs().max() < 1e-5


@torch.no_grad()
def test_what_a_dropped_draft_owed_is_forgotten(hybrid, tokens):
    """Also its narrower heads: the cache is as uniform as before."""
    caches = [MatryoshkaKVCache(hybrid, 2, 48) for _ in range(2)]
    for cache in caches:
        hybrid.hidden(tokens[:, :20], cache=cache)
    caches[1].checkpoint()
    for t in range(20, 23):
        hybrid.hidden(tokens[:, t + 9:t + 10], widths=16, exits=torch.full((2, 1), 4), cache=caches[1])
    assert any(v.heads is not None for v in caches[1].views if hasattr(v, "heads"))
    caches[1].truncate([20, 20])
    assert not any(caches[1].behind) and all(v.heads is None for v in caches[1].views if hasattr(v, "heads"))
    a, b = (torch.cat([hybrid(t, cache=cache) for t in tokens[:, 20:30].split(5, 1)], 1) for cache in caches)
    assert torch.equal(a, b)


def test_a_checkpoint_copies_nothing_and_a_rollback_finds_it(hybrid):
    mixer = hybrid.transformer.h[1].mamba
    with torch.no_grad():
        state = mixer.new_state(1, "cpu", torch.float32)
        u = torch.randn(1, 8, 64)
        mixer(u[:, :4], state)
        before, kept = state.ssm_state, state.ssm_state.clone()
        state.checkpoint()
        assert state.ssm_state is before
        mixer(u[:, 4:], state)
        assert state.ssm_state is not before and torch.equal(before, kept)
        mixer.rollback(state, 0)
        assert state.ssm_state is before and torch.equal(before, kept)


# --- sampling --------------------------------------------------------------------------------------------------------

def chi_square(counts, probs):
    """The statistic over its 99.9 % quantile (Wilson & Hilferty 1931): above 1, the counts are not drawn from probs."""
    n, order = sum(counts), sorted(range(len(probs)), key=lambda i: -probs[i])
    cells, rest = [], [0, 0.0]
    for i in order:
        if n * probs[i] >= 5:
            cells.append((counts[i], n * probs[i]))
        else:
            rest = [rest[0] + counts[i], rest[1] + n * probs[i]]
    cells += [rest] if rest[1] > 0.5 else []
    df = len(cells) - 1
    quantile = df * (1 - 2 / (9 * df) + 3.09 * math.sqrt(2 / (9 * df))) ** 3
    return sum((o - e) ** 2 / e for o, e in cells) / quantile


def test_rejection_sampling_is_exact():
    g = torch.Generator().manual_seed(0)
    p, q = (torch.randn(2, 6, generator=g) * 1.5).softmax(-1), (torch.randn(1, 6, generator=g) * 1.5).softmax(-1)
    counts, drafts, n = [0] * 36, [0] * 6, 6000
    for _ in range(n):
        token = int(torch.multinomial(q[0], 1, generator=g))
        drafts[token] += 1
        out = accept_by_rejection([token], q, p, g)
        counts[out[0] * 6 + out[1] if len(out) == 2 else out[0] * 6 + int(torch.multinomial(p[1], 1, generator=g))] += 1
    assert chi_square(counts, torch.outer(p[0], p[1]).flatten().tolist()) < 1
    assert chi_square(drafts, p[0].tolist()) > 2  # and the test would have seen the drafts


def test_a_draft_equal_to_the_model_is_always_kept():
    g = torch.Generator().manual_seed(0)
    p = torch.randn(4, 6, generator=g).softmax(-1)
    for _ in range(200):
        drafted = torch.multinomial(p[:3], 1, generator=g)[:, 0].tolist()
        out = accept_by_rejection(drafted, p[:3], p, g)
        assert out[:3] == drafted and len(out) == 4


def test_sampled_sequences_follow_the_models_distribution():
    """All sequences of three tokens of a small vocabulary, drawn by the engine in many rows."""
    V, n, rounds = 5, 600, 5
    model = randomize(build_model(HybridConfig.from_base(GPTConfig(16, V, 2, 2, 2, 32))))
    model.lm_head.weight.data.mul_(20)
    engine, prompt = Engine(model, None), [1, 3]
    sequences = torch.tensor(list(itertools.product(range(V), repeat=3)))
    with torch.no_grad():
        logits = model(torch.cat((torch.tensor([prompt]).expand(len(sequences), -1), sequences), 1))[:, 1:4]
        exact = (logits / 0.9).log_softmax(-1).gather(2, sequences.unsqueeze(-1)).sum((1, 2)).exp()

    def count(**options):
        out = [0] * V ** 3
        for i in range(rounds):
            for a, b, c in engine.answers([prompt] * n, 3, temperature=0.9, seed=n * i, **options):
                out[(a * V + b) * V + c] += 1
        return out
    assert chi_square(count(lossless=True, depth=2, mode=32, draft=2), exact.tolist()) < 1
    assert chi_square(count(depth=2), exact.tolist()) > 2


def test_greedy_acceptance():
    logits = torch.nn.functional.one_hot(torch.tensor([[4, 5, 6], [1, 2, 3], [7, 8, 9]]), 10).float()
    assert accept_greedily(torch.tensor([[4, 5], [1, 3], [0, 8]]), logits) == [[4, 5, 6], [1, 2], [7]]


# --- policy ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def clocked(hybrid, monkeypatch):
    """An engine for which a plain token takes 1 s, a token drafted by depth 2 at full width 0.1, a check 1; time stands."""
    engine = Engine(hybrid, None)
    engine.record.plain, engine.record.drafts = {1: 1.0}, {(Draft(2, 64), 1): 0.1}
    engine.record.checks = {(Draft(2, 64), 1): dict.fromkeys(range(2, 10), 1.0)}
    monkeypatch.setattr(Record, "timed", lambda *_: None)
    return engine


def options(**more):
    return {"temperature": 0, "lossless": True, "depth": 2, "mode": 64} | more


def test_drafts_that_are_never_right_stop_and_the_trace_says_so(clocked, monkeypatch):
    prompt = PROMPTS[0]
    want = clocked.answers([prompt], 50, temperature=0)
    scripted(monkeypatch, [prompt], want, [0])
    assert clocked.answers([prompt], 50, **options()) == want
    trace = clocked.traces[0]
    assert trace.notes and "drafting pauses for 8" in trace.notes[0]
    drafted = [r.drafted for r in trace.rounds]
    stop = drafted.index(0, 1)
    assert stop < 20 and sum(d > 0 for d in drafted[stop:]) <= 4  # one round is tried behind each pause


def test_drafts_that_are_always_right_grow_long(clocked, monkeypatch):
    prompt = PROMPTS[0]
    want = clocked.answers([prompt], 50, temperature=0)
    scripted(monkeypatch, [prompt], want, [8])
    monkeypatch.setattr(clocked.model.gate, "forward", lambda h, i: torch.full(h.shape[:2], 0.99).logit())
    assert clocked.answers([prompt], 50, **options()) == want
    trace = clocked.traces[0]
    assert not trace.notes and max(r.drafted for r in trace.rounds) == 8 and len(trace.rounds) < 12


def test_doubt_ends_a_draft(clocked, monkeypatch):
    """The gate's answer (all weights of the fixture's are non-zero, as if it were trained), once it has been right."""
    doubt = iter(itertools.cycle([0.99, 0.99, 0.01]))
    for confidence in (0.99, 0.01):
        for _ in range(50):
            clocked.record.learned(Draft(2, 64), confidence, confidence > 0.5)
    clocked.record.counts[Draft(2, 64)] = (90.0, 100.0)
    monkeypatch.setattr(clocked.model.gate, "forward", lambda h, i: torch.full(h.shape[:2], next(doubt)).logit())
    clocked.answers([[5, 17]], 12, **options())
    assert clocked.traces[0].rounds[0].drafted == 3


def test_without_a_trained_gate_the_likeliest_tokens_probability_counts(hybrid, monkeypatch):
    torch.nn.init.zeros_(hybrid.gate.c_proj.weight)
    monkeypatch.setattr(hybrid.gate, "forward", lambda *_: pytest.fail("never trained"))
    engine = Engine(hybrid, None)
    engine.answers([[5, 17]], 4, **options(draft=2))
    with torch.no_grad():
        ids = [5, 17, engine.answers([[5, 17]], 1, temperature=0)[0][0]]
        sure = float(hybrid(torch.tensor([ids]), exits=torch.tensor([[6, 6, 2]]))[0, -1].softmax(-1).max())
    assert (Draft(2, 64), Record.bin(sure)) in engine.record.sure


def test_the_best_draft_is_chosen_by_what_it_brings(hybrid):
    engine = Engine(hybrid, None)
    record, drafts = engine.record, [Draft(2, 64), Draft(4, 64)]
    record.plain, record.drafts = {1: 1.0}, {(drafts[0], 1): 0.3, (drafts[1], 1): 0.6}
    record.checks = {(drafts[0], 1): {4: 0.8}, (drafts[1], 1): {4: 0.6}}

    def best(a, b, length=None):
        record.counts = {drafts[0]: (1e4 * a, 1e4), drafts[1]: (1e4 * b, 1e4)}
        plan = speculative.Speculation(record, drafts, length, (0, None, None), [Trace(1, (64,) * 6)])
        return plan.plan([0], 8)[0]
    assert best(0.9, 0.95) == drafts[0] and best(0.3, 0.99) == drafts[1] and best(0, 0) is None
    # at a given length too: there is no pause, and the one that is best at another length may not be
    assert best(0.9, 0.95, 3) == drafts[0] and best(0.3, 0.99, 3) == drafts[1] and best(0, 0, 3) is not None
    record.checks[drafts[1], 1] |= {2: 0.1}
    assert best(0.9, 0.95, 1) == drafts[1]
    record.plain = {}
    assert best(0.9, 0.95, 3) is None  # a plain token comes first, which says what the others cost


def test_a_draft_of_given_length_is_chosen_among_all(hybrid, monkeypatch):
    """Of any depth and width, once the first has been seen to fail."""
    engine = Engine(hybrid, None)
    want = engine.answers(PROMPTS[:1], 40, temperature=0)
    scripted(monkeypatch, PROMPTS[:1], want, [0])
    monkeypatch.setattr(Record, "timed", lambda self, table, key, seconds: table.update({key: 1.0}))
    assert engine.answers(PROMPTS[:1], 40, temperature=0, lossless=True, mode="auto", draft=4) == want
    rounds = engine.traces[0].rounds
    assert rounds[0].draft is None and {r.drafted for r in rounds[1:-4]} == {4} and len({r.draft for r in rounds}) > 2


@pytest.mark.parametrize("a", [0.0, 0.6, 1.0])
def test_expected_tokens(a):
    """Against the definition: the run of right tokens, and one more."""
    for k in (1, 4):
        want = sum((n + 1) * a ** n * (1 - a) for n in range(k)) + (k + 1) * a ** k
        assert abs(expected_tokens(a, k) - want) < 1e-12


def test_flops_count_drafts_and_what_was_checked_in_vain(hybrid):
    engine = Engine(hybrid, None)
    engine.answers([[5, 17]], 6, temperature=0)
    plain = engine.traces[0].flops(hybrid)
    engine.answers([[5, 17]], 6, temperature=0, lossless=True)
    trace = engine.traces[0]
    trace.rounds = [Round(None, 0, 0)] * 5
    assert trace.flops(hybrid)["generated"] == pytest.approx(plain["generated"])
    head = hybrid.cost()["head"].flops
    token = lambda n: sum(c.flops for c in hybrid.cost(context=n).values())  # noqa: E731
    trace.rounds = [Round(Draft(2, 64), 3, 1), Round(Draft(4, 16), 2, 2)]
    narrow = sum(c.flops for b in hybrid.transformer.h[:4] for n in (5, 6) for c in block_cost(b, 16, n)) + 2 * head
    want = token(2) + sum(map(token, (3, 4, 5, 6))) + 3 * head + sum(map(token, (5, 6, 7))) + narrow
    assert trace.flops(hybrid)["generated"] == pytest.approx(want)


@pytest.mark.parametrize("bad, words", [
    ({"draft": 9}, "1 to 8"), ({"draft": 2, "lossless": False, "depth": None, "mode": None}, "with lossless decoding only"),
    ({"depth": 6}, "full compute: choose a narrower mode"), ({"budget": 0.5}, "leave the budget"),
    ({"mode": [64, 16]}, "drafted alike"), ({"mode": "thick"}, "unknown mode"), ({"depth": 9}, "depth 9 is out of range")])
def test_bad_options_are_named(hybrid, bad, words):
    with pytest.raises(ValueError, match=words):
        Engine(hybrid, None).answers([[1], [2]], 3, **options(**bad))
