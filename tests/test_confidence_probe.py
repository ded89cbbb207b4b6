"""
The controls: what they see, what they decide, and that deciding token by token, in a batch, and in one parallel pass is
the same. The fixture's gate and predictor are random, which is enough for that.
"""
import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import language_parameters
from test_cpu_decode import needs_compiler

from nanochat import cpu_decode
from nanochat.cache import MatryoshkaKVCache
from nanochat.confidence_probe import (
    TUNED,
    Controls,
    budget_grid,
    calibrate_prices,
    check_trained,
    choose,
    draw_plans,
    fixed_sequence,
    gumbel_choice,
    level_shares,
    log_odds,
    p_value,
    pad,
    pareto_path,
    predict,
    sequences_needed,
    tune,
)
from nanochat.engine import Engine, prepare_inference
from nanochat.hybrid_gpt import CONTROLS
from nanochat.loss_eval import (
    ANSWER,
    Shadow,
    controls_backward,
    gate_loss,
    head_loss,
    matryoshka_backward,
    mean_over_pairs,
    predictor_loss,
    value_loss,
)
from nanochat.matryoshka import block_cost, cost_table, energy, norm, soft_masks, token_flops

PROMPTS = [[5], [17, 250, 3], [9, 8, 7, 6, 5, 4, 3]]


def controls(model, budget=0.8):
    """Thresholds in the middle of what the random gate answers, so that all its actions occur."""
    with torch.no_grad():
        x = torch.randn(200, model.config.n_embd, generator=torch.Generator().manual_seed(0))
        x = norm(x, model.config.d_ref, model.config.norm_eps)
        sure = torch.cat([torch.sigmoid(model.gate(x, k)) for k in range(len(model.config.exit_points))])
    return Controls(model, budget, exit_threshold=float(sure.quantile(0.7)), expand_threshold=float(sure.quantile(0.5)),
                    calibration={"prices": calibrate_prices(model, PROMPTS, [budget])})


def answer(model, prompts, n=14):
    engine = Engine(model, None)
    out = [[] for _ in prompts]
    for pairs in engine.stream(prompts, n, mode="auto", temperature=0, control=controls(model)):
        for r, token in pairs:
            out[r].append(token)
    return out, engine.traces


@torch.no_grad()
def test_decoding_equals_the_parallel_form_with_the_same_decisions(hybrid):
    """Both with the decisions in the trace, and with the controls deciding anew over the whole text at once."""
    out, traces = answer(hybrid, PROMPTS)
    depths = {d for trace in traces for d, _ in trace.steps}
    assert len(depths) > 2 and any(w != trace.widths for trace in traces for _, w in trace.steps)
    for prompt, got, trace in zip(PROMPTS, out, traces):
        text, n = torch.tensor([prompt + got[:-1]]), len(prompt) - 1
        exits = torch.tensor([[6] * n + [d for d, _ in trace.steps]])
        widths = torch.tensor([[trace.widths] * n + [w for _, w in trace.steps]])
        logits = hybrid(text, widths=widths, exits=exits)
        assert logits.argmax(-1)[0, n:].tolist() == got

        anew = controls(hybrid)
        planned = anew.plan([prompt])
        anew.begin([0], None, None)
        decide = functools.partial(anew, acts=torch.arange(text.size(1))[None] >= n)
        h = hybrid.hidden(text, planned.clone(), control=decide)
        assert anew.exits.tolist() == exits.tolist()
        assert (hybrid.logits(h) - logits).abs().max() <= 1e-4


def test_rows_are_independent(hybrid):
    together, traces = answer(hybrid, PROMPTS)
    for prompt, got, trace in zip(PROMPTS, together, traces):
        alone, (its,) = answer(hybrid, [prompt])
        assert alone == [got] and its == trace


@torch.no_grad()
def test_deferred_memory_survives_what_happens_to_a_cache(hybrid, tokens):
    """Rows kept, cloned, joined and truncated while blocks are behind end where the parallel form does."""
    T = 12
    exits = torch.full((2, T), 2)
    exits[:, 0] = exits[:, -1] = 6  # in between nobody reaches the blocks behind the second
    tokens = tokens[:, :T]
    want = hybrid(tokens, exits=exits)[:, -1]

    def step(cache, rows, s):
        return hybrid(tokens[rows, s], exits=exits[rows, s], cache=cache)[:, -1]
    a, b = MatryoshkaKVCache(hybrid, 1, 64), MatryoshkaKVCache(hybrid, 1, 64)
    for t in range(5):
        step(a, [0], slice(t, t + 1)), step(b, [1], slice(t, t + 1))
    assert a.behind == [0, 0, 4, 4, 4, 4]
    b.append(a)
    assert b.behind == [0] * 6
    for t in range(5, 8):
        step(b, [1, 0], slice(t, t + 1))
    b.checkpoint()
    twin = b.clone()
    for t in range(8, 10):
        step(b, [1, 0], slice(t, t + 1))
        step(twin, [1, 0], slice(t, t + 1))
    b.truncate([8, 8])
    for t in range(8, 11):
        step(b, [1, 0], slice(t, t + 1))
    twin.keep([1])
    step(twin, [0], slice(10, 11))
    assert b.behind[2] == 3 and twin.behind[2] == 3
    torch.testing.assert_close(step(b, [1, 0], slice(11, 12)), want[[1, 0]], atol=1e-4, rtol=0)
    torch.testing.assert_close(step(twin, [0], slice(11, 12)), want[:1], atol=1e-4, rtol=0)


def reached(cache):
    """How many blocks hold anything in their memory."""
    memory = [(v.k, v.v) if hasattr(v, "k") else (v.state.conv_state, v.state.ssm_state) for v in cache.views]
    return sum(any(bool(t.any()) for t in both) for both in memory)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[7], [55], [5, 1, 3]], ids=["short", "long", "rows"])
def test_a_prompt_goes_as_deep_as_what_follows_it_and_no_deeper(hybrid, lengths):
    """Tokens of several depths, one after another, see what they see of a prompt that went through all blocks at once."""
    prepare_inference(hybrid, "cpu", torch.float32)
    g, c, rows = torch.Generator().manual_seed(0), hybrid.config, len(lengths)
    idx = torch.randint(300, (rows, max(lengths)), generator=g)
    levels = [c.levels[i % len(c.levels)] for i in range(c.n_block)]
    at_once, held = (MatryoshkaKVCache(hybrid, rows, 64) for _ in range(2))
    hybrid.hidden(idx, levels, cache=at_once, lengths=lengths)
    held.hold(idx, lengths if rows > 1 else None, levels)
    assert held.pos == lengths and reached(held) == 0 and reached(at_once) == c.n_block
    deepest = 0
    for depth in (2, 1, 4, 2, 3, c.n_block):
        deepest, tokens = max(deepest, depth), torch.randint(300, (rows, 1), generator=g)
        want, got = (hybrid.hidden(tokens, levels, depth, cache) for cache in (at_once, held))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
        assert reached(held) == deepest


@torch.no_grad()
def test_a_prompt_that_waits_survives_what_happens_to_a_cache(hybrid, tokens):
    """Rows kept, cloned and joined, and a checkpoint."""
    lengths = [4, 7, 2]
    texts, exits = tokens[[0, 1, 0], :12], [2, 2, hybrid.config.n_block]
    prompts = [row[:n].tolist() for row, n in zip(texts, lengths)]

    def finish(cache, rows):
        """Three tokens more: what the last says, by the cache and by the parallel form."""
        at = [cache.pos[r] for r in range(len(rows))]
        for j, depth in enumerate(exits):
            last = hybrid(torch.stack([texts[r, n + j:n + j + 1] for r, n in zip(rows, at)]), exits=depth, cache=cache)
        for r, n, got in zip(rows, at, last):
            depths = torch.full((1, n + 3), hybrid.config.n_block)
            depths[0, lengths[r]:n] = 2
            depths[0, n:] = torch.tensor(exits)
            torch.testing.assert_close(got[-1], hybrid(texts[r:r + 1, :n + 3], exits=depths)[0, -1], atol=1e-4, rtol=0)
    a = MatryoshkaKVCache(hybrid, 3, 64)
    a.hold(*pad(prompts, "cpu")[:1], lengths, hybrid.resolve_widths(None))
    hybrid(torch.stack([row[n:n + 1] for row, n in zip(texts, lengths)]), exits=2, cache=a)
    a.keep([1, 0, 2])
    b, alone, checked = a.clone(), a.clone(), a.clone()
    alone.keep([2])
    assert [reached(cache) for cache in (a, b, alone)] == [2, 2, 2]
    finish(alone, [2])
    b.keep([0])
    c = a.clone()
    c.keep([1])
    b.append(c)
    assert reached(b) == hybrid.config.n_block
    finish(b, [1, 0])
    checked.checkpoint()
    finish(checked, [1, 0, 2])
    finish(a, [1, 0, 2])


@torch.no_grad()
def test_a_hard_mask_is_the_slice(hybrid, tokens):
    c = hybrid.config
    at = torch.randint(3, (2, c.n_block), generator=torch.Generator().manual_seed(0))
    masks = soft_masks(F.one_hot(at, 3).float(), c.levels, c.top_width)
    want = hybrid(tokens, widths=torch.tensor(c.levels)[at])
    torch.testing.assert_close(hybrid(tokens, widths=masks), want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_energy_is_the_models_own_cost(hybrid):
    c = hybrid.config
    at = torch.randint(3, (4, c.n_block), generator=torch.Generator().manual_seed(1))
    got = energy(F.one_hot(at, 3).double(), *cost_table(hybrid, 20))
    full = sum(p.flops for p in hybrid.cost(context=20).values())
    for row, share in zip(at, got):
        spent = sum(p.flops for p in hybrid.cost([c.levels[i] for i in row], 20).values())
        assert float(share) == pytest.approx(spent / full)
    milliseconds = torch.tensor([[1.0, 2.0, 4.0]] * c.n_block)  # a measured table serves as well
    assert float(energy(F.one_hot(torch.zeros(1, c.n_block).long(), 3).float(), milliseconds)) == 0.25


@torch.no_grad()
def test_the_cost_of_many_tokens_is_that_of_each(hybrid):
    c, g = hybrid.config, torch.Generator().manual_seed(5)
    depth, context = torch.randint(1, 7, (20,), generator=g), torch.randint(1, 60, (20,), generator=g)
    widths = torch.tensor(c.levels)[torch.randint(3, (20, c.n_block), generator=g)]
    want = [sum(p.flops for p in hybrid.cost(w.tolist(), int(n), int(d)).values())
            for d, w, n in zip(depth, widths, context)]
    assert token_flops(hybrid, depth, widths, context).tolist() == pytest.approx(want)

    def blocks(widths, n):  # so many, of the n-th token
        return sum(part.flops for block, d in zip(hybrid.transformer.h, widths) for part in block_cost(block, d, n))
    ghost, full = [c.levels[0]] * 2, [c.top_width] * c.n_block
    engine = Engine(hybrid, None)
    engine.answers([[1, 2, 3, 4], [5]], 3, mode="ghost", depth=2)  # a prompt goes as deep as its answer
    for trace, n in zip(engine.traces, (3, 0)):
        flops = trace.flops(hybrid)
        assert flops["prompt"] == pytest.approx(sum(blocks(ghost, t + 1) for t in range(n)))
        assert flops["full_prompt"] == pytest.approx(sum(blocks(full, t + 1) for t in range(n)))


def test_gumbel_choice_samples_the_distribution():
    logits = torch.tensor([0.0, 1.0, -1.0]).expand(20000, 2, 3)
    got = gumbel_choice(logits, 1.0, torch.Generator().manual_seed(0))
    assert set(got.unique().tolist()) == {0.0, 1.0} and bool((got.sum(-1) == 1).all())
    p = logits[0, 0].softmax(-1)
    torch.testing.assert_close(got.mean((0, 1)), p, atol=0.015, rtol=0)
    alike = (got[:, 0] * got[:, 1]).sum(-1).mean()  # half the rows by design, the others by chance
    assert float(alike) == pytest.approx(0.5 + 0.5 * float(p.square().sum()), abs=0.015)


def grads(model):
    return {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}


def test_both_losses_train_the_predictor_and_nothing_else(hybrid, tokens):
    for which in (0, 1):
        hybrid.zero_grad()
        losses = predictor_loss(hybrid, tokens, tokens, torch.tensor([20, 30]), 0.7, 1.0, torch.Generator().manual_seed(2))
        losses[which].backward()
        assert grads(hybrid) == {n for n, _ in hybrid.named_parameters() if n.startswith("predictor.")}


def test_the_energy_penalty_makes_plans_cheaper(hybrid, tokens):
    starts, generator = torch.tensor([20, 20]), torch.Generator().manual_seed(3)
    optimizer = torch.optim.Adam(hybrid.predictor.parameters(), lr=0.03)
    shares = []
    for _ in range(30):
        _, share = predictor_loss(hybrid, tokens[:, :24], tokens[:, :24], starts, 0.7, 1.0, generator)
        optimizer.zero_grad()
        share.backward()
        optimizer.step()
        shares.append(float(share.detach()))
    _, floor = level_shares(hybrid)
    assert sum(shares[-5:]) / 5 - floor < 0.5 * (sum(shares[:5]) / 5 - floor)


def test_values_are_fitted_to_what_plans_cost(hybrid, tokens):
    """What the predictor says the narrowest plan gives up is then the KL that it costs."""
    starts, c = torch.tensor([20, 20]), hybrid.config
    hybrid.predictor.init_weights()
    with torch.no_grad():
        full = hybrid.hidden(tokens)
        answer = torch.where(torch.arange(tokens.size(1)) >= 19, tokens, -1)
        narrow = hybrid.hidden(tokens, widths=c.levels[0])
        want = head_loss(narrow, hybrid.lm_head.weight, answer, c.softcap, full, "none").view(answer.shape).sum(1)
        want *= ANSWER / (answer >= 0).sum(1)
    optimizer = torch.optim.Adam(hybrid.predictor.parameters(), lr=0.003)
    generator, losses = torch.Generator().manual_seed(3), []
    for _ in range(300):
        loss, seen = value_loss(hybrid, tokens, tokens, starts, full, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert grads(hybrid) == {n for n, _ in hybrid.named_parameters() if n.startswith("predictor.")}
    assert 0 < float(seen["share"]) <= 1 and float(seen["kl"]) > 0
    assert sum(losses[-20:]) < 0.1 * sum(losses[:20])
    values = predict(hybrid, tokens, torch.arange(tokens.size(1)) < starts[:, None], 0.5)
    assert (values[..., 0] == 0).all() and (values.diff(dim=-1) > 0).all()
    got = (values[..., -1] - values[..., 0]).sum(1).detach()
    torch.testing.assert_close(F.softsign(got), F.softsign(want), atol=0.05, rtol=0)


def test_energy_decides_which_plans_values_are_learned_from():
    g = torch.Generator().manual_seed(0)
    logits, shares = torch.zeros(4000, 4, 3), torch.tensor([[0.05, 0.1, 0.25]]).expand(4, 3)
    dear = draw_plans(logits, 20 * shares, g).float().mean()
    assert float(dear) < float(draw_plans(logits, shares, g).float().mean()) - 0.1
    wide = torch.tensor([0.0, 0.0, 9.0]).expand(4000, 4, 3)  # where the full level is worth it, it is drawn
    at = draw_plans(wide, shares, g)
    assert float((at == 2).all(1).float().mean()) == pytest.approx(0.75 + 0.25 * (0.5 / 3 + 0.5 / 81), abs=0.03)


def test_an_untrained_predictor_finds_the_extremes_alike_for_gumbel(hybrid, tokens):
    hybrid.predictor.init_weights()
    shares, _ = level_shares(hybrid)
    odds = log_odds(predict(hybrid, tokens, tokens >= 0, 0.5), shares)
    torch.testing.assert_close(odds[..., -1].sum(1), odds[..., 0].sum(1))
    assert (odds.diff(dim=-1) < 0).any() and (odds.diff(dim=-1) > 0).any()  # both directions are open


def test_controls_learn_alone(hybrid, tokens):
    for temperature in (None, 0.5):
        hybrid.zero_grad()
        generator = torch.Generator().manual_seed(2)
        out = controls_backward(hybrid, tokens, tokens, torch.tensor([20, 30]), generator, temperature)
        assert grads(hybrid) <= {n for n, _ in hybrid.named_parameters() if n.startswith(CONTROLS)}
        assert {"gate.c_proj.weight", "predictor.out_weight"} <= grads(hybrid)
        assert out.keys() == {"loss", "gate", "brier", "share", "kl" if temperature is None else "budget"}


@torch.no_grad()
@torch.no_grad()
def test_a_gate_that_resembles_the_head_sees_its_peak(hybrid):
    """Reading one feature alone, it answers the log-probability of the likeliest of the tokens whose rows it took."""
    gate, rows = hybrid.gate, hybrid.lm_head.weight[torch.randperm(300)]
    n = len(gate.c_fc.weight)
    gate.resemble(rows)
    gate.point.weight.zero_(), gate.c_proj.weight.zero_(), gate.c_proj.bias.zero_()
    h = 3 * torch.randn(5, 4, hybrid.config.n_embd)
    assert (gate(h, 1) == 0).all()
    gate.c_proj.weight[:, 0] = 1
    torch.testing.assert_close(gate(h, 1), (h @ rows[:n].T).log_softmax(-1).amax(-1), atol=1e-5, rtol=1e-5)
    gate.c_proj.weight[:, 1] = -1  # log-probability less that of all others: the logit
    want = (h @ rows[:n].T).double().softmax(-1).amax(-1).logit().float()
    torch.testing.assert_close(gate(h, 0), want, atol=1e-3, rtol=1e-3)


def test_the_predictor_sees_the_prompt_alone(hybrid, tokens):
    valid = torch.arange(48) < torch.tensor([[10], [25]])
    before = predict(hybrid, tokens, valid, 0.5)
    changed = torch.where(valid, tokens, tokens.flip(1))
    torch.testing.assert_close(predict(hybrid, changed, valid, 0.5), before)
    torch.testing.assert_close(predict(hybrid, tokens[:1, :10], valid[:1, :10], 0.5), before[:1])
    assert not torch.equal(predict(hybrid, tokens, valid, 0.9), before)


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_predictor_is_the_predictor(hybrid, dtype, monkeypatch):
    """Of trained size, for prompts of several lengths and budgets; a prompt's plan does not depend on the others'."""
    prepare_inference(hybrid, "cpu", dtype)
    for p in hybrid.predictor.parameters():
        p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * p.shape[-1] ** -0.5)
    idx, valid = pad([*PROMPTS, list(range(100, 160))], "cpu")
    budget = torch.linspace(0.3, 1, len(idx))
    got = predict(hybrid, idx, valid, budget)
    assert torch.equal(predict(hybrid, idx[1:2], valid[1:2], budget[1:2]), got[1:2])
    used, compiled = [], cpu_decode.predictor
    monkeypatch.setattr(cpu_decode, "predictor", lambda *a: used.append(1) or compiled(*a))
    assert torch.equal(predict(hybrid, idx, valid, budget), got) and used.pop()
    with pytest.raises(IndexError):
        predict(hybrid, idx + 250, valid, budget)
    with torch.enable_grad():
        torch.testing.assert_close(got, predict(hybrid, idx, valid, budget), atol=2e-5, rtol=2e-5)
    assert not used and got.diff(dim=-1).std() > 0.1


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plan_of_one_prompt_in_one_call_is_the_plan(hybrid, dtype):
    prepare_inference(hybrid, "cpu", dtype)
    for p in hybrid.predictor.parameters():
        p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * p.shape[-1] ** -0.5)
    run, plans = MatryoshkaKVCache(hybrid, 1, 8).run_alone(), set()
    for prompt in [*PROMPTS, list(range(100, 160))]:
        for budget, price in ((0.7, 0.0), (0.7, 4.0), (0.9, 4.0), (0.9, 6.0)):
            control = Controls(hybrid, budget, calibration={"prices": [[budget, price]]})
            want = control.plan([prompt]).clone()
            assert torch.equal(control.plan([prompt], run), want) and torch.equal(control.widths, want)
            plans.add(tuple(want[0].tolist()))
    assert len(plans) > 4
    assert MatryoshkaKVCache(hybrid, 2, 8).run_alone() is None  # a batch is planned together
    with pytest.raises(ValueError, match="token ids from 299 to 300 do not fit"):
        control.plan([[299, 300]], run)


def test_the_predictor_is_one_graph(hybrid):
    _, valid = pad(PROMPTS, "cpu")
    fast = torch.compile(hybrid.predictor, fullgraph=True, backend="eager")
    e, budget = torch.randn(3, 7, 64), torch.full((3,), 0.5)
    torch.testing.assert_close(fast(e, valid, budget), hybrid.predictor(e, valid, budget))


@torch.no_grad()
def test_prices_make_plans_meet_the_budget(hybrid):
    g = torch.Generator().manual_seed(4)
    prompts = [torch.randint(300, (int(torch.randint(1, 30, (), generator=g)),), generator=g).tolist() for _ in range(200)]
    table, fixed = cost_table(hybrid, 32)
    for budget, price in calibrate_prices(hybrid, prompts[:100], [0.6, 0.75, 0.9]):
        control = Controls(hybrid, budget, calibration={"prices": [[budget, price]]})
        at = torch.searchsorted(control.levels, control.plan(prompts[100:]))
        assert float(energy(F.one_hot(at, 3).double(), table, fixed).mean()) == pytest.approx(budget, rel=0.05)
    idx, valid = pad(prompts, "cpu")
    logits = predict(hybrid, idx, valid, 0.7)
    spent = [float(choose(logits, torch.tensor(hybrid.config.levels), level_shares(hybrid)[0], p).double().mean())
             for p in (-50, 0, 5, 50)]
    assert spent == sorted(spent, reverse=True) and len(set(spent)) > 2


def test_pairs_taken_out_or_weighted_are_the_same():
    g = torch.Generator().manual_seed(0)
    logits, here = torch.randn(3, 40, generator=g), torch.rand(3, 40, generator=g) < 0.6
    labels = (torch.rand(3, 40, generator=g) < 0.5).float()
    results = []
    for select in (True, False):
        x = logits.clone().requires_grad_()
        loss, brier = mean_over_pairs(x, labels, here, select)
        loss.backward()
        results.append((loss.detach(), brier, x.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)
    want = F.binary_cross_entropy(logits.sigmoid()[here], labels[here])
    assert float(results[0][0]) == pytest.approx(float(want), rel=1e-5)
    assert float(mean_over_pairs(logits, labels, torch.zeros_like(here), False)[0]) == 0


def test_shadow_loss_compares_each_token_with_itself(hybrid, tokens):
    targets, at = tokens.roll(-1, 1), torch.tensor([3, 40, 60, 77])
    shadow = Shadow(at)
    with torch.no_grad():
        h = hybrid.hidden(tokens, control=shadow)
        full = F.cross_entropy(hybrid.logits(h).flatten(0, 1)[at], targets.flatten()[at], reduction="none")
    loss, seen = gate_loss(hybrid, shadow, h.flatten(0, 1)[at], targets.flatten()[at])
    labels, sure = [], []
    for k, depth in enumerate(hybrid.config.exit_points):
        with torch.no_grad():
            x = hybrid.hidden(tokens, exits=torch.full_like(tokens, depth)).flatten(0, 1)[at]
            early = F.cross_entropy(hybrid.logits(x), targets.flatten()[at], reduction="none")
            labels.append((early <= full + hybrid.config.exit_tau).float())
            sure.append(torch.sigmoid(hybrid.gate(x, k)))
    assert seen["here"].all() and seen["pairs"] == seen["label"].numel()
    assert seen["label"].flatten().tolist() == torch.cat(labels).tolist()
    torch.testing.assert_close(seen["confidence"].flatten(), torch.cat(sure), atol=1e-4, rtol=1e-3)
    want = F.binary_cross_entropy(torch.cat(sure).detach(), torch.cat(labels))
    assert float(loss.detach()) == pytest.approx(float(want), rel=1e-3)
    loss.backward()
    assert grads(hybrid) == {n for n, _ in hybrid.named_parameters() if n.startswith("gate.")}


def test_watching_a_pass_changes_nothing(hybrid, tokens):
    watched = matryoshka_backward(hybrid, tokens, tokens, [], 1.0, gate_at=torch.tensor([1, 2]))
    assert float(watched["gate"]) > 0 and grads(hybrid) >= {"gate.c_fc.weight", "gate.c_proj.weight"}
    got = {n: p.grad.clone() for n, p in hybrid.named_parameters() if p.grad is not None}
    hybrid.zero_grad()
    assert float(matryoshka_backward(hybrid, tokens, tokens, [], 1.0)["loss"]) == float(watched["loss"])
    assert all(torch.equal(p.grad, got[n]) for n, p in language_parameters(hybrid).items())


def test_untrained_controls_and_base_models_are_refused(hybrid, base):
    hybrid.gate.init_weights()
    with pytest.raises(ValueError, match=r"gate was never trained: run .* --controls"):
        check_trained(hybrid)
    hybrid.predictor.init_weights()
    with pytest.raises(ValueError, match="predictor was never trained"):
        list(Engine(hybrid, None).tokens([1], 3, mode="auto"))
    with pytest.raises(ValueError, match="this is a base GPT"):
        list(Engine(base, None).tokens([1], 3, mode="auto"))


@pytest.mark.parametrize("options, words", [
    ({"budget": 0.0}, "budget 0.0 is out of range"), ({"budget": 1.5}, "budget 1.5 is out of range"),
    ({"budget": 0.01}, "less than the narrowest widths cost"),
    ({"exit_threshold": 0.3, "expand_threshold": 0.6}, "must not be below the expand threshold 0.6")])
def test_bad_options_are_named(hybrid, options, words):
    with pytest.raises(ValueError, match=words):
        Controls(hybrid, **options)


def test_an_empty_prompt_is_named(hybrid):
    with pytest.raises(ValueError, match="the prompt is empty"):
        Controls(hybrid).plan([[1], []])


def test_p_values_are_those_of_the_binomial_and_bounds_elsewhere():
    losses = torch.zeros(200)
    losses[:2] = 1
    want = sum(math.comb(200, k) * 0.02 ** k * 0.98 ** (200 - k) for k in range(3))
    assert p_value(losses, 0.02) == pytest.approx(want, rel=1e-9)
    # shares between 0 and 1: a bound holds over repeated draws
    g = torch.Generator().manual_seed(0)
    draws = torch.rand(2000, 100, generator=g) ** 4  # mean 0.2
    assert sum(p_value(row, 0.2) <= 0.1 for row in draws) / 2000 <= 0.1
    assert sum(p_value(row, 0.35) <= 0.1 for row in draws) / 2000 > 0.9  # and it has power


def test_too_few_sequences_say_how_many_are_needed():
    assert sequences_needed(0.02, 0.05) == 149
    with pytest.raises(ValueError, match=r"148 sequences cannot bound the risk by 0.02 .* give at least 149"):
        fixed_sequence(torch.zeros(3, 148), 0.02, 0.05)
    assert fixed_sequence(torch.zeros(3, 149), 0.02, 0.05)[0] == 2
    with pytest.raises(ValueError, match="delta 0 is out of range"):
        sequences_needed(0, 0.05)


def test_calibration_keeps_its_promise():
    """200 calibrations on fresh draws: the chosen setting's true risk exceeds delta in no more than 16 of them."""
    g = torch.Generator().manual_seed(1)
    true = torch.linspace(0, 0.06, 25)  # of the settings, strictest first
    delta, epsilon, failures, used = 0.02, 0.05, 0, []
    for _ in range(200):
        hardness = torch.rand(500, generator=g)  # a sequence that fails at one setting fails at the looser ones
        losses = (hardness < true[:, None]).float()
        at, values = fixed_sequence(losses, delta, epsilon)
        failures += at >= 0 and bool(true[at] > delta)
        used.append(at)
        assert at == len(values) - 2 or at == len(true) - 1
    assert failures <= 16
    assert sum(used) / 200 > 2  # and it is not by never choosing anything


def test_settings_are_tested_from_the_dearest_on_and_only_if_nothing_beats_them():
    a, b, c, d, e = (1.0, 0.9), (0.8, 1.0), (0.8, 0.9), (0.6, 1.0), (0.6, 0.9)
    points = [((1.0, 1.0), 0.0, 100), (a, 0.01, 90), (b, 0.02, 95), (c, 0.03, 60), (d, 0.03, 70), (e, 0.2, 40)]
    assert pareto_path(points) == [(1.0, 1.0), a, c, e]


def test_budgets_that_a_riskier_step_leaves_out_come_between():
    steps = [((1.0, 1.0), 0.0, 100), ((0.8, 0.9), 0.0, 80), ((0.5, 0.9), 0.01, 45), ((0.2, 0.9), 0.01, 20),
             ((0.1, 1.0), 0.02, 10)]
    others = [((0.9, 1.0), 0.0, 97), ((0.7, 0.9), 0.01, 79), ((0.6, 0.9), 0.02, 62), ((0.3, 0.9), 0.01, 45),
              ((0.15, 0.9), 0.02, 19)]  # nothing lost; between; too risky; no more lost; a stricter threshold
    assert pareto_path(steps + others) == [(1.0, 1.0), (0.8, 0.9), (0.7, 0.9), (0.5, 0.9), (0.2, 0.9), (0.1, 1.0)]


def test_where_nothing_is_lost_the_path_does_not_leap():
    """All alike on few data: the cheapest comes last, behind settings that are milder in both respects."""
    points = [((b, t), 0.0, 100 * b * t) for b in (1.0, 0.8, 0.6) for t in (1.0, 0.9, 0.7)]
    path = pareto_path(points)
    assert path[0] == (1.0, 1.0) and path[-1] == (0.6, 0.7) and path.index((0.8, 0.9)) < path.index((1.0, 0.7))
    costs = [b * t for b, t in path]
    assert costs == sorted(costs, reverse=True) and max(a - b for a, b in itertools.pairwise(costs)) < 0.3


def test_tuning_stops_lowering_a_threshold_where_too_much_is_lost(hybrid):
    seen = []

    def run(budget, threshold):
        seen.append((budget, threshold))
        return torch.full((4,), 1 - threshold), budget * threshold
    path = tune(hybrid, run, 0.05)
    grid = budget_grid(hybrid)
    assert path[0] == (1.0, 1.0) == seen[0] and {b for b, _ in seen} == set(grid)
    assert min(t for _, t in seen) == max(t for t in TUNED if 1 - t > 0.05)
    costs = [b * t for b, t in path[1:]]
    assert costs == sorted(costs, reverse=True)
    seen.clear()
    assert tune(hybrid, lambda b, t: (seen.append((b, t)), (torch.tensor([float(b < grid[6])]), b * t))[1], 0.05)
    assert {b for b, _ in seen} == set(grid[5:]) and (grid[5], TUNED[1]) not in seen  # behind what fails without any exit


def test_nothing_safe_is_said_so():
    at, values = fixed_sequence(torch.ones(4, 200), 0.02, 0.05)
    assert at == -1 and values == [pytest.approx(1)]
