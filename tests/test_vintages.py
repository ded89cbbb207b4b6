"""Every vintage of nanochat against a plain reference of its forward pass, and all forms of decoding against each other."""
import pytest
import torch
from vintage_oracle import CONSTANTS, checkpoint, logits

from nanochat import vintages
from nanochat.cache import MatryoshkaKVCache
from nanochat.checkpoint_manager import build_model, load_weights
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
