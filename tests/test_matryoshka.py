"""Norm, levels, rotary positions, the CPU attention, and cost, each against an independent way to compute it."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import language_parameters, randomize
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nanochat.cache import MatryoshkaKVCache
from nanochat.checkpoint_manager import build_model
from nanochat.common import get_compute_dtype
from nanochat.cpu_attention import causal_attention
from nanochat.gpt import GPTConfig
from nanochat.hybrid_gpt import HybridConfig
from nanochat.matryoshka import add_prefix, apply_rope, mode_levels, norm, resolve_level, rope_tables, sample_levels
from nanochat.surgery import extract


def test_norm_is_rmsnorm_at_d_ref():
    x = torch.randn(3, 5, 64) * 7
    torch.testing.assert_close(norm(x, 64, 1e-6), F.rms_norm(x, (64,), eps=1e-6))


@pytest.mark.parametrize("d", [8, 64, 100])
def test_norm_keeps_its_length_at_every_width(d):
    length = norm(torch.randn(50, d) * 3, 64, 1e-9).norm(dim=-1)
    torch.testing.assert_close(length, torch.full((50,), 8.0))


def test_zero_dims_added_by_growth_change_nothing():
    x = torch.randn(4, 64)
    torch.testing.assert_close(norm(F.pad(x, (0, 36)), 64, 1e-6), F.pad(norm(x, 64, 1e-6), (0, 36)))


def test_norm_gradient():
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: norm(t, 16, 1e-3), x)


def test_norm_in_bf16_is_computed_in_fp32():
    x = (torch.randn(64, 256) * 100).bfloat16()
    torch.testing.assert_close(norm(x, 256, 1e-6), norm(x.float(), 256, 1e-6).bfloat16(), rtol=0, atol=0)


def test_rope_rotates_by_minus_theta():
    """As multiplication by exp(-i theta) of the pairs (x[j], x[j + hd/2])."""
    x, pos = torch.randn(2, 7, 3, 8, dtype=torch.float64), torch.arange(5, 12)
    theta = pos[:, None] * 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    want = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(-1j * theta)[:, None]
    got = apply_rope(x, rope_tables(pos, 8, 10000.0))
    torch.testing.assert_close(got, torch.cat((want.real, want.imag), -1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("T", [1, 127, 128, 300])
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-10), (torch.float32, 2e-5), (torch.bfloat16, 4e-2)])
def test_blocked_attention_equals_torchs(T, dtype, tol):
    q, k, v = (torch.randn(2, 3, T, 16, dtype=dtype, requires_grad=True) for _ in range(3))
    g = torch.randn(2, 3, T, 16, dtype=dtype)
    got = torch.autograd.grad(y := causal_attention(q, k, v), (q, k, v), g)
    want = torch.autograd.grad(z := F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), g)
    for a, b in ((y, z), *zip(got, want)):
        torch.testing.assert_close(a, b, atol=tol, rtol=tol)


def test_add_prefix_touches_only_the_prefix():
    x, y = torch.randn(2, 3, 8), torch.randn(2, 3, 5)
    out = add_prefix(x, y)
    assert torch.equal(out[..., :5], x[..., :5] + y) and torch.equal(out[..., 5:], x[..., 5:])


def test_modes_scale_with_the_model():
    assert mode_levels(4096, 2048, 128) == {"ghost": 128, "whisper": 512, "normal": 1024, "think": 2048, "god": 4096}
    assert mode_levels(64, 64, 32) == {"ghost": 32, "whisper": 32, "normal": 32, "think": 64, "god": 64}


def test_levels_that_are_not_allowed_raise():
    modes = mode_levels(256, 256, 32)
    assert resolve_level("128", modes, (32, 64, 128, 256)) == resolve_level("normal", modes, (32, 64, 128, 256)) == 128
    with pytest.raises(ValueError, match="unknown mode 'fast': choose one of ghost, whisper, normal, think, god"):
        resolve_level("fast", modes, (32, 64, 128, 256))
    with pytest.raises(ValueError, match=r"96 is not a level.*32, 64, 128, 256"):
        resolve_level(96, modes, (32, 64, 128, 256))


def test_sampled_levels_reach_every_uniform_level_and_mix():
    """Uniform draws must come up for every narrow level, or the named modes are never trained; mixed ones half the time."""
    levels, seen, mixed = (32, 64, 128, 256), set(), 0
    for step in range(300):
        draw = sample_levels(levels, 64, torch.Generator().manual_seed(step))
        assert len(draw) == 64 and set(draw) <= set(levels)
        seen |= {draw[0]} if len(set(draw)) == 1 else set()
        mixed += len(set(draw)) > 1
    assert seen >= {32, 64, 128} and 110 < mixed < 190
    assert draw == sample_levels(levels, 64, torch.Generator().manual_seed(299))


def test_dynamic_matmul_share_is_the_square_of_the_width(hybrid):
    full = hybrid.cost("think", 10)
    gates = sum(2 * b.attn.ve_gate.weight.numel() for b in hybrid.transformer.h if b.kind == "attention" and b.attn.ve_gate)
    for mode, d in hybrid.config.modes.items():
        cost = hybrid.cost(mode, 10)
        share = d / hybrid.config.n_embd
        assert math.isclose(cost["dynamic"].matmul - gates * share, (full["dynamic"].matmul - gates) * share ** 2)
        assert cost["dynamic"].attention == full["dynamic"].attention * share
        assert cost["static"] == full["static"] and cost["head"] == full["head"]


@torch.no_grad()
@pytest.mark.parametrize("mode", ["ghost", "normal", "think"])
def test_cost_equals_what_torch_counts(base, hybrid, tokens, mode):
    """
    Without a causal discount, which torch's counter does not know, every query sees all T positions. Of the Mamba mixer
    it sees the two projections: what lies between is a custom op.
    """
    for model in (base, hybrid):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(tokens, widths=mode)
        cost = model.cost(mode, context=tokens.size(1))
        assert counter.get_total_flops() == tokens.numel() * sum(c.matmul + c.attention for c in cost.values())


@torch.no_grad()
def test_cost_of_exited_tokens_is_their_memory_writes(hybrid, tokens):
    """A chunk that exits after two of six blocks, run with a cache, which the later blocks still write."""
    cache = MatryoshkaKVCache(hybrid, 2, 48)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        hybrid(tokens, widths="normal", exits=torch.full_like(tokens, 2), cache=cache)
        cache.settle()  # the deferred writes
    cost = hybrid.cost("normal", context=48, depth=2)
    assert counter.get_total_flops() == tokens.numel() * sum(c.matmul + c.attention for c in cost.values())
    assert sum(c.flops for c in cost.values()) < 0.7 * sum(c.flops for c in hybrid.cost("normal", 48).values())


@torch.no_grad()
@pytest.mark.parametrize("mode", ["ghost", "normal", "think"])
def test_memory_of_a_token_is_what_the_cache_holds(hybrid, tokens, mode):
    """Numbers that are not zero in a cache after 10 tokens; the states' from their shapes."""
    cache = MatryoshkaKVCache(hybrid, 1, 48)
    hybrid(tokens[:1, :10], widths=mode, cache=cache)
    kv = sum(int(v.k.count_nonzero() + v.v.count_nonzero()) for v in cache.views if hasattr(v, "k"))
    states = [v.state for v in cache.views if hasattr(v, "state")]
    cost = hybrid.cost(mode, context=10)
    assert kv == 10 * cost["dynamic"].kv == cost["dynamic"].kv_read
    assert cost["static"].state == sum(s.ssm_state.numel() for s in states)
    assert cost["static"].conv == sum(s.conv_state.numel() for s in states)


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_weights_read_are_the_parameters_in_use(n_kv_head):
    """At full width: every parameter but the embeddings' other rows, and the elementwise ones."""
    model = build_model(HybridConfig.from_base(GPTConfig(64, 300, 3, 4, n_kv_head, 64)))
    tables = sum(p.numel() for p in model.value_embeds.parameters())
    rows = sum(t.weight.size(1) for t in model.value_embeds.values())
    small = sum(p.numel() for n, p in language_parameters(model).items() if p.ndim == 1 or "conv1d" in n)
    total = sum(p.numel() for p in model.parameters()) - model.num_params()["control"]
    want = total - tables + rows - small - model.transformer.wte.weight.numel()
    assert sum(c.weights for c in model.cost().values()) == want


@pytest.mark.parametrize("n_kv_head", [1, 2])
@torch.no_grad()
def test_shared_kv_heads_decode_and_extract_at_every_width(tokens, n_kv_head):
    model = randomize(build_model(HybridConfig.from_base(GPTConfig(64, 300, 3, 4, n_kv_head, 64))))
    widths = torch.full((2, 48, 6), 16)
    widths[0, 20:] = 64
    widths[1, 9:, 2:] = 32
    for w in ("ghost", "normal", "think", widths):
        want = model(tokens, widths=w)
        cache = MatryoshkaKVCache(model, 2, 48)
        got = [model(tokens[:, t:t + 1], widths=w if isinstance(w, str) else w[:, t:t + 1], cache=cache) for t in range(48)]
        assert (torch.cat(got, 1) - want).abs().max() <= 1e-4
        if isinstance(w, str):
            assert (extract(model, w)(tokens) - want).abs().max() <= 1e-5


@pytest.mark.parametrize("name, want", [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_dtype_override(monkeypatch, name, want):
    monkeypatch.setenv("NANOCHAT_DTYPE", name)
    assert get_compute_dtype("cpu") == want
    monkeypatch.setenv("NANOCHAT_DTYPE", "int8")
    with pytest.raises(ValueError, match="NANOCHAT_DTYPE=int8 is not known; set it to bfloat16 or float32"):
        get_compute_dtype("cpu")
