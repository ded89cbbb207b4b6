"""Runs of blocks in one compiled call: the same as block after block, and the gate that stops them as the model's own."""
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import randomize
from test_confidence_probe import answer, controls
from test_cpu_decode import MODELS, needs_compiler

from nanochat import block_run
from nanochat import cache as cache_module
from nanochat.block_run import BlockRun
from nanochat.cache import MatryoshkaKVCache
from nanochat.checkpoint_manager import build_model
from nanochat.confidence_probe import Controls
from nanochat.engine import Engine, prepare_inference
from nanochat.matryoshka import MLP, norm

pytestmark = needs_compiler
DTYPES = [torch.float32, torch.bfloat16]


def prepared(kind="hybrid", dtype=torch.float32):
    model = randomize(build_model(MODELS[kind]))
    prepare_inference(model, "cpu", dtype)
    return model


def one_by_one(monkeypatch):
    """From here on blocks run one after another, with their layers' own operators."""
    monkeypatch.setattr(BlockRun, "takes", lambda *_: False)


def memory(cache):
    return [t for v in cache.views for t in ((v.k, v.v) if hasattr(v, "k") else (v.state.conv_state, v.state.ssm_state))]


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MODELS)
def test_a_run_is_its_blocks_to_the_last_bit(kind, dtype, monkeypatch):
    """Every block at a level of its own, several rows, exits whose memory is written later, a draft taken back."""
    model = prepared(kind, dtype)
    levels, n = model.config.levels, model.config.n_block
    widths = torch.tensor([levels[i % len(levels)] for i in range(n)])
    calls, run = [], BlockRun._run
    monkeypatch.setattr(BlockRun, "_run", lambda self, *a, **k: calls.append(a[:2]) or run(self, *a, **k))

    def decode():
        g, out, cache = torch.Generator().manual_seed(3), [], MatryoshkaKVCache(model, 2, 40)
        for T, depth in ((6, n), (1, n), (1, 1), (1, 1), (3, n), (1, n)):
            idx = torch.randint(300, (2, T), generator=g)
            out.append(model(idx, widths=widths.expand(2, -1), exits=torch.full((2, T), depth), cache=cache))
        if kind == "hybrid":
            cache.checkpoint()
            model(torch.randint(300, (2, 4), generator=g), cache=cache)
            cache.truncate([14, 15])
            for T in (1, 2):  # rows at different positions
                out.append(model(torch.randint(300, (2, T), generator=g), widths=widths.expand(2, -1), cache=cache))
        return torch.cat(out, 1), memory(cache)
    got, its = decode()
    assert (0, n) in calls and (1, n) in calls  # whole passes, and the memory that exits owed
    one_by_one(monkeypatch)
    calls.clear()
    want, theirs = decode()
    assert not calls and torch.equal(got, want) and all(map(torch.equal, its, theirs))


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gate_on_the_way_is_the_models(hybrid, dtype):
    """Bars that stop a run at every exit point, at none, and, for expansion, only past half; what it says there."""
    model = hybrid
    prepare_inference(model, "cpu", dtype)
    c, points, near = model.config, model.config.exit_points, 1e-5 if dtype == torch.float32 else 2e-2
    idx, seen = torch.tensor([[7]]), []

    def ahead(bar):
        cache = MatryoshkaKVCache(model, 1, 8)
        cache.begin(1)
        levels = [c.levels[1]] * c.n_block
        return cache.compiled_run(idx, levels).ahead(0, c.n_block, idx, None, levels, cache, bar)[1:]

    def look(i, x, exits, levels):
        seen.append(float(torch.sigmoid(model.gate(norm(x, c.d_ref, c.norm_eps), points.index(i)))))
        return exits, levels
    model.hidden(idx, c.levels[1], cache=MatryoshkaKVCache(model, 1, 8), control=look)
    late = next(p for p in points if 2 * p > c.n_block)
    assert len(points) == 2 and late == points[1]
    for bar, where, decided, said in (((0.0, 0.0), points[0], True, seen[0]),  # everybody leaves
                                      ((1.0, 1.0), late, True, seen[1]),  # nobody leaves, everybody is unsure
                                      ((1.0, 0.0), c.n_block, False, seen[1])):
        i, asked, sure = ahead(bar)
        assert (i, asked) == (where, decided) and abs(sure - said) < near


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MODELS)
def test_greedy_decoding_in_one_call_is_token_by_token(kind, dtype):
    """Widths of their own per block, all depths, calls of several lengths: tokens and memory to the last bit."""
    model = prepared(kind, dtype)
    c, prompt = model.config, torch.randint(300, (1, 5), generator=torch.Generator().manual_seed(3))
    levels = [c.levels[i % len(c.levels)] for i in range(c.n_block)]
    for depth in (c.n_block, *c.exit_points, 1):
        caches = [MatryoshkaKVCache(model, 1, 24) for _ in range(2)]
        for cache in caches:
            model(prompt[:, :4], cache=cache)
        want, got = [int(prompt[0, 4])], [int(prompt[0, 4])]
        for _ in range(15):
            h = model.hidden(torch.tensor([want[-1:]]), levels, depth, caches[0])
            want.append(int(model.logits(h).argmax()))
        for limit in (1, 6, 8):
            tokens, depths, undecided = caches[1].greedy(got[-1:], limit, (), levels, depth, None)
            assert depths == [depth] * limit and undecided is None
            got += tokens
        assert got == want
        for cache in caches:
            cache.settle()
        assert caches[0].pos == caches[1].pos == [19]
        assert all(map(torch.equal, memory(caches[0]), memory(caches[1])))
        tokens, *_ = caches[1].greedy(got[:1], 5, set(range(300)), levels, depth, None)
        assert len(tokens) == 1 and caches[1].pos == [20]  # any token is a stop
        caches = [MatryoshkaKVCache(model, 1, 24) for _ in range(2)]  # a prompt in the call, or in a pass of its own before
        model.hidden(prompt[:, :4], levels, cache=caches[0])
        apart = caches[0].greedy(prompt[0, 4:].tolist(), 7, (), levels, depth, None)
        assert caches[1].greedy(prompt[0].tolist(), 7, (), levels, depth, None)[:2] == apart[:2]
        assert caches[0].pos == caches[1].pos == [11] and caches[0].behind == caches[1].behind
        for cache in caches:
            cache.settle()
        assert all(map(torch.equal, *map(memory, caches)))
    with pytest.raises(ValueError, match="token ids from 300 to 300 do not fit"):
        caches[1].greedy([300], 1, (), levels, depth, None)
    caches[1].checkpoint() if kind == "hybrid" else caches[1].append(caches[0])
    assert caches[1].greedy([1], 1, (), levels, depth, None) is None


@torch.no_grad()
@pytest.mark.parametrize("most", [48, 8, 3])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_prompt_waits_from_call_to_call(hybrid, most, fresh, monkeypatch):
    """
    Behind a prompt in the first call or held before it, one that goes on within a call or is too long for that, tokens of
    several depths, some owing more than `most`: memory to the last bit as behind a prompt that went through all blocks.
    """
    prepare_inference(hybrid, "cpu", torch.float32)
    for module in (block_run, cache_module):
        monkeypatch.setattr(module, "MAX_ROWS", most)
    c, prompt = hybrid.config, torch.randint(300, (1, 7), generator=torch.Generator().manual_seed(3))
    levels, n = [c.levels[i % len(c.levels)] for i in range(c.n_block)], c.n_block
    whole, waiting = (MatryoshkaKVCache(hybrid, 1, 40) for _ in range(2))
    hybrid.hidden(prompt[:, :6], levels, cache=whole)
    if not fresh:
        waiting.hold(prompt[:, :6], None, levels)
        assert waiting.greedy([1], 1, (), levels, 2, None) is None  # it must have begun
    want, got, deepest = [int(prompt[0, 6])], [int(prompt[0, 6])], 0
    for depth, limit in ((2, 1), (2, 6), (3, 1), (2, 3), (4, 2), (1, 1), (n, 2)):
        want += whole.greedy(want[-1:], limit, (), levels, depth, None)[0]
        while len(got) < len(want):
            first = prompt[0].tolist() if fresh and len(got) == 1 else got[-1:]
            out = waiting.greedy(first, len(want) - len(got), (), levels, depth, None)
            tokens, _, undecided = out or ([], [], False)
            got += tokens
            if undecided is not None:  # the prompt is elsewhere
                state = hybrid.hidden(torch.tensor([got[-1:]]), levels, depth, waiting, resume=undecided or None)
                got.append(int(hybrid.logits(state).argmax()))
        deepest = max(deepest, depth)
        assert got == want and waiting.pos == whole.pos
        assert not any(t.any() for t in memory(waiting)[2 * deepest:])
    assert all(map(torch.equal, *map(memory, (whole, waiting)))) and waiting.behind == whole.behind == [0] * n


@torch.no_grad()
def test_what_exited_tokens_owe_waits_from_call_to_call(hybrid, monkeypatch):
    """Tokens that leave after two blocks, one in a call: nothing is written until one goes on, then all at once."""
    prepare_inference(hybrid, "cpu", torch.float32)
    ids, n, written, run = torch.randint(300, (1, 5)), hybrid.config.n_block, [], BlockRun._run
    levels = [hybrid.config.top_width] * n
    monkeypatch.setattr(BlockRun, "_run", lambda self, first, last, idx, x, levels, cache, write_only, *a: (
        written.append((first, last, idx.size(1))) if write_only else None) or run(
        self, first, last, idx, x, levels, cache, write_only, *a))
    caches = [MatryoshkaKVCache(hybrid, 1, 24) for _ in range(2)]
    for cache, limits in zip(caches, ((1, 1, 1, 1), (4,))):
        hybrid(ids, cache=cache)
        tokens = [7]
        for limit in limits:
            tokens += cache.greedy(tokens[-1:], limit, (), levels, 2, None)[0]
        assert cache.behind == [0] * 2 + [4] * (n - 2) and not written
    for cache in caches:  # a token through all blocks, and one that changes the levels
        got = cache.greedy(tokens[-1:], 1, (), levels, n, None)
        assert cache.behind == [0] * n and not written  # inside the call
        cache.greedy(got[0][-1:], 2, (), levels, 2, None)
        cache.greedy(got[0][-1:], 1, (), [hybrid.config.levels[0]] * n, 2, None)
        assert written.pop() == (2, n, 2) and not written
    assert all(map(torch.equal, *map(memory, caches)))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"depth": 2}, {"mode": "auto"}, {"mode": "auto", "depth": 4}, {"mode": "ghost"}])
@pytest.mark.parametrize("overflow", ["stop", "slide"])
@pytest.mark.parametrize("prompts", [[[5], [17, 250, 3], [9, 8, 7]], [[5]], [[9, 8, 7]], [list(range(100, 155))]],
                         ids=["three", "one token", "short", "long"])
def test_the_engine_answers_alike_with_and_without_calls_of_several_tokens(hybrid, options, overflow, prompts, monkeypatch):
    """Rows that end until one is left, a context that fills; and a trace never runs ahead of what was given out."""
    prepare_inference(hybrid, "cpu", torch.float32)
    got = []
    for off in (False, True):
        if off:
            monkeypatch.setattr(MatryoshkaKVCache, "greedy", lambda *a: None)
        engine, stops = Engine(hybrid, None), [(40, 41, 42, 43, 44, 45)]
        for most in (70, 1, 70):  # the last time the first token is a stop
            control = {"control": controls(hybrid)} if "mode" in options and options["mode"] == "auto" else {}
            out = [[] for _ in prompts]
            more = {"stop": stops[-1], "overflow": overflow, **options, **control}
            for pairs in engine.stream(prompts, most, temperature=0, **more):
                for r, token in pairs:
                    out[r].append(token)
                    assert len(engine.traces[r].steps) == len(out[r])
            got.append((out, [(t.widths, t.steps) for t in engine.traces]))
            if most == 1:
                stops.append([token for row in out for token in row])
    assert got[:3] == got[3:] and any(got[0][0]) and not any(got[2][0])


@torch.no_grad()
def test_answers_in_mode_auto_are_the_same_either_way(hybrid, monkeypatch):
    """Tokens, depths and widths; exits and expansions both occur, which a call of several tokens leaves undecided."""
    prepare_inference(hybrid, "cpu", torch.float32)
    calls, greedy = [], BlockRun.greedy
    monkeypatch.setattr(BlockRun, "greedy", lambda run, text, *a: calls.append((len(text), *greedy(run, text, *a)))
                        or calls[-1][1:])
    prompts = [torch.randint(300, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(1, 20)]
    got = [answer(hybrid, [prompt], 20) for prompt in prompts]
    assert any(len(depths) > 1 for *_, depths, _ in calls) and any(undecided for n, *_, undecided in calls if n == 1)
    beside = [(depths, undecided) for n, _, depths, undecided in calls if n > 1]  # prompts and what follows from them
    assert any(undecided and not depths for depths, undecided in beside)
    assert {d for depths, _ in beside for d in depths} >= {2, hybrid.config.n_block}
    steps = [(step, trace.widths) for _, (trace,) in got for step in trace.steps]
    assert len({d for (d, _), _ in steps}) > 2 and any(w != planned for (_, w), planned in steps)
    one_by_one(monkeypatch)
    assert [answer(hybrid, [prompt], 20) for prompt in prompts] == got


@torch.no_grad()
def test_a_gate_that_is_sure_is_sure_of_the_same(hybrid):
    """Units far apart: the likeliest one's probability is 1 but for what fp32 hardly shows, and the rest is a feature."""
    prepare_inference(hybrid, "cpu", torch.float32)
    for spread in (1, 20, 60):
        hybrid.gate.c_fc.weight.copy_(torch.randn(hybrid.gate.c_fc.weight.shape, generator=torch.Generator().manual_seed(2)))
        hybrid.gate.c_fc.weight.mul_(spread * hybrid.config.n_embd ** -0.5)
        hybrid.gate.c_proj.weight.fill_(0.0)
        hybrid.gate.c_proj.weight[:, 1] = 0.3  # of the log-probability that it is another unit
        for token in range(0, 300, 30):
            seen, idx = [], torch.tensor([[token]])

            def look(i, x, exits, levels, seen=seen):
                seen.append(hybrid.gate(norm(x, hybrid.config.d_ref, hybrid.config.norm_eps), 0 if i == 2 else 1))
                return exits, levels
            hybrid.hidden(idx, cache=MatryoshkaKVCache(hybrid, 1, 8), control=look)
            cache = MatryoshkaKVCache(hybrid, 1, 8)
            cache.begin(1)
            *_, sure = cache.compiled_run(idx, [64] * 6).ahead(0, 2, idx, None, [64] * 6, cache, (1.0, 0.0))
            assert abs(torch.logit(torch.tensor(sure)) - float(seen[0])) < 2e-2


@torch.no_grad()
def test_deciding_under_a_checkpoint_can_be_taken_back(hybrid):
    """Tokens that exit early, then a rollback behind the first of them: as if the rest had never been."""
    prepare_inference(hybrid, "cpu", torch.float32)
    ids, kept = torch.randint(300, (1, 9), generator=torch.Generator().manual_seed(5)), {}
    for taken in (3, 1):
        cache, control = MatryoshkaKVCache(hybrid, 1, 16), Controls(hybrid, exit_threshold=0.0, expand_threshold=0.0)
        control.plan([[1, 2]])
        hybrid(ids[:, :5], cache=cache)
        cache.checkpoint()
        for t in range(5, 5 + taken):
            control.begin([0], None, None)
            hybrid.hidden(ids[:, t:t + 1], cache=cache, control=control)
            assert control.exits.item() == 2
        cache.truncate([6])
        kept[taken] = hybrid(ids[:, 8:], cache=cache)
    assert torch.equal(kept[3], kept[1])


@torch.no_grad()
def test_what_a_cache_cannot_take_is_refused_and_changes_nothing():
    model, ids = prepared(), torch.randint(300, (1, 9), generator=torch.Generator().manual_seed(5))
    cache = MatryoshkaKVCache(model, 1, 16)
    model(ids[:, :4], cache=cache)
    cache.checkpoint(window=2)
    with pytest.raises(ValueError, match="exceed its window of 2"):
        model(ids[:, 4:7], cache=cache)
    with pytest.raises(ValueError, match="token ids from 3 to 300 do not fit the vocabulary of 300"):
        model(torch.tensor([[3, 300]]), cache=cache)
    cache.truncate([4])
    cache.drop_checkpoint()
    with pytest.raises(ValueError, match="the cache holds 1 rows, but the tokens are of 2"):
        model(ids[:, 4:6].T, cache=cache)
    fresh = MatryoshkaKVCache(model, 1, 16)
    model(ids[:, :4], cache=fresh)
    assert torch.equal(model(ids[:, 4:5].int(), cache=cache), model(ids[:, 4:5], cache=fresh))  # ids of another type too


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types_are_left_to_the_layers(dtype):
    model, idx = prepared(dtype=dtype), torch.randint(300, (1, 6), generator=torch.Generator().manual_seed(5))
    cache = MatryoshkaKVCache(model, 1, 8)
    got = torch.cat([model(t, cache=cache) for t in idx.split(1, 1)], 1)
    torch.testing.assert_close(got, model(idx), atol=0.05 if dtype == torch.float16 else 1e-6, rtol=0, check_dtype=False)
    with pytest.raises((RuntimeError, TypeError), match="Long"):
        prepared()(torch.tensor([[1.7]]), cache=cache)


@torch.no_grad()
def test_what_a_caller_does_with_its_lists_later_changes_nothing():
    """The widths at which an exited token's memory is still to be written."""
    model, idx, out = prepared(), torch.randint(300, (1, 2), generator=torch.Generator().manual_seed(5)), []
    for change in (False, True):
        widths, cache = [model.config.levels[0]] * model.config.n_block, MatryoshkaKVCache(model, 1, 8)
        model(idx[:, :1], widths=widths, exits=1, cache=cache)
        if change:
            widths[:] = [model.config.top_width] * len(widths)
        out.append(model(idx[:, 1:], cache=cache))
    assert torch.equal(*out)


@torch.no_grad()
def test_memory_that_a_cache_has_copied_is_given_back():
    model, idx = prepared(), torch.randint(300, (2, 3), generator=torch.Generator().manual_seed(5))
    caches = [MatryoshkaKVCache(model, 2, 8) for _ in range(2)]
    for cache in caches:
        model(idx, cache=cache)
    held = [weakref.ref(t) for t in memory(caches[0])]
    caches[0].append(caches[1])
    assert not any(ref() is not None for ref in held)
    held = [weakref.ref(t) for t in memory(caches[0])]
    caches[0].keep([3, 1])
    assert not any(ref() is not None for ref in held)


def test_a_cache_made_in_inference_mode_leaves_nothing_behind_that_training_trips_over():
    model = randomize(build_model(MODELS["hybrid"]))
    with torch.inference_mode():
        MatryoshkaKVCache(model, 1, 23)
    model(torch.tensor([[1, 2]]), cache=MatryoshkaKVCache(model, 1, 23)).sum().backward()
    assert model.transformer.h[0].attn.c_q.weight.grad.any()


@torch.no_grad()
def test_an_engine_answers_as_a_new_one_would(monkeypatch):
    """In the memory of its last answer: longer, narrower, in another mode, abandoned, two at once, by moved weights."""
    model = prepared()
    made, make = [], MatryoshkaKVCache.__init__
    monkeypatch.setattr(MatryoshkaKVCache, "__init__", lambda self, *a: made.append(a) or make(self, *a))

    def ask(engine, prompt, n=12, **options):
        options = {"temperature": 0} | options
        control = controls(model) if options.get("mode") == "auto" else None
        return engine.tokens(prompt, n, control=control, **options)
    engine, long, short = Engine(model, None), list(range(20, 60)), [7, 8, 9]
    cases = [(long, {}), (short, {"mode": "auto"}), (long, {"mode": "auto"}), (short, {"mode": "ghost"}),
             (short, {"depth": 1}), (long, {"lossless": True, "draft": 3}), (short, {"temperature": 1.0, "seed": 3}),
             (short, {})]
    for prompt, options in cases:
        assert list(ask(engine, prompt, **options)) == list(ask(Engine(model, None), prompt, **options))
    assert len(made) == 1 + len(cases)  # the engine made one

    want = list(ask(engine, short))
    next(ask(engine, long))  # never finished
    first, second = ask(engine, short), ask(engine, long)
    got = [next(first), next(second), *first]
    assert got[:1] + got[2:] == want and [got[1], *second] == list(ask(Engine(model, None), long))

    h = model.transformer.h
    for owner, name, other in ((h[0], "mlp", h[1].mlp), (h, "3", h[1])):
        setattr(owner, name, other)
        changed = list(ask(engine, short))
        assert changed == list(ask(Engine(model, None), short)) != want
        want = changed
    prepare_inference(model, "cpu", torch.bfloat16)
    assert list(ask(engine, short)) == list(ask(Engine(model, None), short))


@torch.no_grad()
def test_weights_that_moved_are_found(monkeypatch):
    """Between two answers: other memory, another parameter, another dtype; what cannot be read is left to the layers."""
    model, idx = prepared(), torch.tensor([[3, 4, 5]])

    def logits():
        return model(idx, cache=MatryoshkaKVCache(model, 1, 8))
    first, block = logits(), model.transformer.h[0]
    assert model in block_run._runs and BlockRun.of(model).able
    block.mlp.c_fc.weight.data = block.mlp.c_fc.weight.data * 0
    without = logits()
    assert not torch.equal(first, without)
    block.mlp.c_fc.weight = torch.nn.Parameter(torch.ones_like(block.mlp.c_fc.weight), requires_grad=False)
    assert not torch.equal(without, logits())
    first = logits()
    block.mlp = MLP(model.config).requires_grad_(False)
    assert not torch.equal(first, logits())
    block.mlp.c_fc.weight.data = block.mlp.c_fc.weight.data.mT.contiguous().mT
    assert not BlockRun.of(model).able
    want = logits()
    block.mlp.c_fc.weight.data = block.mlp.c_fc.weight.data.contiguous()
    assert BlockRun.of(model).able
    torch.testing.assert_close(logits(), want, atol=1e-5, rtol=0)


@torch.no_grad()
def test_two_caches_of_a_model_keep_apart():
    """Their tokens come in turns, at different widths."""
    model, idx = prepared(), torch.randint(300, (1, 6), generator=torch.Generator().manual_seed(1))
    caches = {mode: MatryoshkaKVCache(model, 1, 8) for mode in ("ghost", "think")}
    got = {mode: [] for mode in caches}
    for t in range(6):
        for mode, cache in caches.items():
            got[mode].append(model(idx[:, t:t + 1], widths=mode, cache=cache))
    for mode, parts in got.items():
        torch.testing.assert_close(torch.cat(parts, 1), model(idx, widths=mode), atol=1e-4, rtol=0)


def test_a_model_wider_than_its_blocks_levels():
    """A grown model, whose residual stream is wider than the base's, and an extracted one, whose top is narrower."""
    for config in (MODELS["grown"], replace(MODELS["hybrid"], top_width=32)):
        model = randomize(build_model(config))
        prepare_inference(model, "cpu", torch.float32)
        idx = torch.randint(300, (2, 5), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            torch.testing.assert_close(model(idx, cache=MatryoshkaKVCache(model, 2, 8)), model(idx), atol=1e-4, rtol=0)
            assert BlockRun.of(model).able
