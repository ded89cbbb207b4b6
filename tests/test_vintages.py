"""Every vintage of nanochat against a plain reference of its forward pass, and all forms of decoding against each other."""
from dataclasses import replace

import pytest
import torch
from vintage_oracle import CONSTANTS, checkpoint, logits

from nanochat import vintages
from nanochat.cache import MatryoshkaKVCache
from nanochat.checkpoint_manager import build_model, load_weights
from nanochat.ordering import cannot_order, order_by_data, order_by_weights, order_state
from nanochat.streaming import State
from nanochat.weight_files import Weights

pytestmark = pytest.mark.usefixtures("same_start")
CONTEXT = 288  # the shortest in which all windows cut something off: they are 144 and 128


def model_of(vintage, **sizes):
    """Our base GPT of a random checkpoint, and what the checkpoint was."""
    state, fields = checkpoint(vintage, **sizes)
    base = vintages.convert(Weights.of(state, "x.pt"), fields, "x.pt", "E" if vintage == "E" else None)
    assert base.vintage.name == vintage
    model = build_model(base.config)
    load_weights(model, base.weights, "x.pt")
    return model, state, fields


@torch.no_grad()
@pytest.mark.parametrize("vintage", CONSTANTS)
def test_the_forward_pass_is_that_nanochats(vintage):
    """max |delta logit| in fp32, parallel and cached: with chunks of any length, and token by token at the end."""
    model, state, fields = model_of(vintage, kv_heads=1 if vintage in "CG" else 2)
    idx = torch.randint(300, (2, CONTEXT), generator=torch.Generator().manual_seed(1))
    want = torch.stack([logits(state, fields, vintage, row) for row in idx])
    cache = MatryoshkaKVCache(model, 2, CONTEXT)
    cuts = (1, 2, 60, 100, *(1,) * 5, CONTEXT - 173, *(1,) * 5)
    got = {"parallel": model(idx), "cached": torch.cat([model(c, cache=cache) for c in idx.split(cuts, 1)], 1)}
    assert want.std() > 0.3
    deltas = {form: float((out - want).abs().max()) for form, out in got.items()}
    print(f"| {vintage} | {deltas['parallel']:.1e} | {deltas['cached']:.1e} |")
    assert max(deltas.values()) <= 5e-5, deltas


@torch.no_grad()
@pytest.mark.parametrize("told, other", [("D", "E"), ("C", "B"), ("A", "F")])
def test_another_vintages_formulas_are_another_function(told, other):
    """The oracle can tell: read as another vintage, logits move by far more than rounding."""
    model, state, fields = model_of(told)
    idx = torch.randint(300, (CONTEXT,), generator=torch.Generator().manual_seed(1))
    if other == "B":
        fields = {k: v for k, v in fields.items() if k != "window_pattern"}
    assert (model(idx[None])[0] - logits(state, fields, other, idx)).abs().max() > 0.01


@torch.no_grad()
def test_any_cut_of_a_prompt_gives_the_same_smear():
    """Two rows of different lengths, in all cuts of their first tokens; padding between them counts for nothing."""
    model, _, _ = model_of("G", layers=2)
    idx = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(1))
    want = model(idx)
    for cut in range(1, 9):
        for ragged in (False, True):
            cache, lengths = MatryoshkaKVCache(model, 2, 16), [cut, max(1, cut - 2) if ragged else cut]
            first = idx[:, :cut].clone()
            first[1, lengths[1]:] = 299  # padding
            out = model(first, cache=cache, lengths=lengths if ragged else None)
            rest = [9 - n for n in lengths]
            more = torch.full((2, max(rest)), 299)
            for r, n in enumerate(lengths):
                more[r, :9 - n] = idx[r, n:]
            behind = model(more, cache=cache, lengths=rest if ragged else None)
            for r, n in enumerate(lengths):
                assert (torch.cat((out[r, :n], behind[r, :9 - n])) - want[r]).abs().max() <= 1e-5, (cut, ragged)


@pytest.mark.parametrize("vintage, change, named, words", [
    ("A", {"bigram_embed.weight": torch.ones(2, 2)}, None, "bigram embeddings"),
    ("D", {"value_embed_A.weight": torch.ones(2, 2)}, None, "January branch"),
    ("A", {"transformer.h.0.attn.c_q.bias": torch.ones(64)}, None, "biases"),
    ("B", {"resid_lambdas": torch.tensor([1.0, -0.5])}, None, r"resid_lambdas\[1\].*-0.5"),
    ("B", {"x0_lambdas": torch.tensor([1.0, float("nan")])}, None, "x0_lambdas.*not finite"),
    ("D", {"transformer.h.1.attn.ve_gate.weight": torch.ones(2, 20)}, None, "read 20 channels"),
    ("G", {"something.weight": torch.ones(2)}, None, "vintage G.*unexpected something.weight"),
    ("A", {}, "E", "not of vintage E: its weights and meta file are those of A; leave out"),
    ("D", {}, "G", "not of vintage G.*or give --vintage E"), ("A", {}, "X", "--vintage X is not known")])
def test_what_cannot_be_read_is_named(vintage, change, named, words):
    state, fields = checkpoint(vintage, layers=2)
    with pytest.raises(ValueError, match=words):
        vintages.convert(Weights.of(state | change, "x.pt"), fields, "x.pt", named)


def test_neutral_lambdas_are_dropped():
    """A model whose lambdas do nothing runs as d32 does, with all that is compiled for it."""
    state, fields = checkpoint("B")
    state |= {"resid_lambdas": torch.ones(4), "x0_lambdas": torch.zeros(4)}
    base = vintages.convert(Weights.of(state, "x.pt"), fields, "x.pt")
    assert base.vintage.name == "B" and base.config == replace(base.config, x0_lambdas=()) and not base.config.later_features
    blocks = [k for k in base.weights.specs if k.startswith("transformer.h.")]
    assert len(blocks) == 24 and all(torch.equal(base.weights.read(k), state[k]) for k in blocks)


@torch.no_grad()
@pytest.mark.parametrize("how", ["weights", "data"])
def test_order_is_exact_where_it_is_allowed(how):
    model, _, _ = model_of("C")
    idx = torch.randint(300, (2, 200), generator=torch.Generator().manual_seed(1))
    state = State.of(model)
    order = order_by_weights(model.config, state) if how == "weights" else order_by_data(model.config, state, idx)
    turned = build_model(model.config)
    turned.load_state_dict(order_state(model.config, state, order).dict(torch.float32))
    assert (turned(idx) - model(idx)).abs().max() <= 1e-4 and not torch.equal(turned.lm_head.weight, model.lm_head.weight)
    for vintage, words in (("D", "gates"), ("G", "gates")):
        assert words in cannot_order(model_of(vintage)[0].config)


@torch.no_grad()
def test_windows_make_attention_cheaper():
    """block_cost sees no more keys than the window lets through, and sums over tokens agree with it."""
    from nanochat.matryoshka import block_cost, prompt_flops, token_flops
    model, _, _ = model_of("C")
    block, whole = model.transformer.h[0], model.transformer.h[-1]
    assert block.attn.window == 144 and whole.attn.window is None
    (short, _), (long, _) = block_cost(block, 64, 250), block_cost(whole, 64, 250)
    assert (short.attention, long.attention) == (4 * 145 * 64, 4 * 250 * 64)
    n, c = 200, model.config
    each = token_flops(model, torch.full((n,), c.n_block), torch.full((n, c.n_block), 64), torch.arange(1, n + 1))
    assert float(each[170]) == pytest.approx(sum(x.flops for x in model.cost(64, 171).values()))
    head = model.cost()["head"].flops
    assert prompt_flops(model, n, [64] * c.n_block) == pytest.approx(float(each.sum()) - n * head)
