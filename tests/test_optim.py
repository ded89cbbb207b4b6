"""Muon against torch's SVD, AdamW's groups, and that every trainable parameter has exactly one owner."""
import pytest
import torch

from nanochat.checkpoint_manager import build_model
from nanochat.optim import Muon, group_of, orthogonalize, setup_optimizers
from nanochat.stages import set_trained


@pytest.mark.parametrize("shape", [(3, 40, 40), (2, 96, 24), (2, 24, 96)])
def test_orthogonalize_keeps_the_directions_and_flattens_the_spectrum(shape):
    u, _, vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    g = u * torch.linspace(1, 0.05, u.size(-1)) @ vh  # five steps cannot lift singular values much below that
    core = u.mT @ orthogonalize(g) @ vh.mT  # in the singular basis: near the identity, if the directions are kept
    values = core.diagonal(dim1=-2, dim2=-1)
    assert 0.3 < values.min() and values.max() < 1.35
    off = core - torch.diag_embed(values)
    assert off.abs().max() < 0.05


def test_muon_takes_the_documented_step():
    p = torch.nn.Parameter(torch.randn(24, 8))
    start, grads = p.detach().clone(), [torch.randn(24, 8), torch.randn(24, 8)]
    opt, buffer, want = Muon([p], lr=0.1, momentum=0.9), torch.zeros(24, 8), start.clone()
    for g in grads:
        p.grad = g.clone()
        opt.step()
        buffer = buffer.lerp(g, 1 - 0.9)  # in these operations: orthogonalize rounds to bf16, where one ulp shows
        want = want - 0.1 * 3 ** 0.5 * orthogonalize(g.lerp(buffer, 0.9)[None])[0]
    torch.testing.assert_close(p.detach(), want, atol=1e-5, rtol=1e-5)


def test_stacked_matrices_step_as_each_alone():
    shapes, grads = [(16, 8), (8, 16), (16, 8)], [torch.randn(16, 8), torch.randn(8, 16), torch.randn(16, 8)]
    together = [torch.nn.Parameter(torch.ones(s)) for s in shapes]
    for p, g in zip(together, grads):
        p.grad = g
    Muon(together).step()
    for p, g in zip(together, grads):
        alone = torch.nn.Parameter(torch.ones(p.shape))
        alone.grad = g
        Muon([alone]).step()
        torch.testing.assert_close(p, alone)


def test_every_parameter_has_one_owner(hybrid):
    opts = setup_optimizers(hybrid)
    owned = [id(p) for o in opts for g in o.param_groups for p in g["params"]]
    assert sorted(owned) == sorted(id(p) for p in hybrid.parameters())
    names = {id(p): n for n, p in hybrid.named_parameters()}
    matrices = {names[id(p)] for p in opts[1].param_groups[0]["params"]}
    assert not any(w in n for n in matrices for w in ("A_log", "dt_bias", ".D", "conv1d", "norm", "gate", "wte", "lm_head"))
    assert {n.rsplit(".", 2)[1] for n in matrices} == {"c_q", "c_k", "c_v", "c_proj", "c_fc", "in_proj", "out_proj"}
    with pytest.raises(AssertionError, match="no optimizer rule"):
        group_of("transformer.h.0.attn.mystery")


def test_learning_rates_scale_with_width(base_config):
    model = build_model(base_config)
    rates = {g["name"]: g["lr"] for o in setup_optimizers(model, 0.02, 0.2, 0.004) for g in o.param_groups}
    scale = (64 / 768) ** -0.5
    assert rates == pytest.approx({"matrix": 0.02, "embedding": 0.2 * scale, "unembedding": 0.004 * scale})


def test_stage_1_leaves_the_base_bit_identical_and_moves_all_that_is_new(hybrid, tokens):
    set_trained(hybrid, "stage 1")
    before = {n: p.detach().clone() for n, p in hybrid.named_parameters()}
    opts = setup_optimizers(hybrid)
    for _ in range(3):
        loss, _ = hybrid(tokens, tokens)
        loss.backward()
        for o in opts:
            o.step()
        hybrid.zero_grad()
    for n, p in hybrid.named_parameters():
        new = "value_embeds" in n or "ve_gate" in n or (n.startswith("transformer.h.") and int(n.split(".")[2]) % 2 == 1)
        assert torch.equal(before[n], p) != new, n
        assert new or (p.grad is None and all(p not in o.state for o in opts))
