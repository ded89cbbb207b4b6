"""The hybrid: sizes, exact insertion, cached decode, slices, and its configuration's errors."""
from dataclasses import replace

import pytest
import torch
from conftest import language_parameters

from nanochat.cache import MatryoshkaKVCache
from nanochat.checkpoint_manager import build_model
from nanochat.gpt import GPTConfig
from nanochat.hybrid_gpt import HybridConfig, HybridGPT
from nanochat.surgery import extract, insert, probe


def test_stage_1_of_d32_has_the_documented_sizes():
    config = HybridConfig.from_base(GPTConfig())
    assert (config.d_inner // config.mamba_group_width, config.mamba_headdim, config.mamba_d_state) == (8, 64, 128)
    with torch.device("meta"):
        counts = HybridGPT(config).num_params()
    assert {k: round(v / 1e9, 3) for k, v in counts.items()} == {
        "base": 1.879, "mamba": 2.424, "value_embeds": 2.147, "control": 0.001, "total": 6.452}


@torch.no_grad()
def test_insertion_keeps_the_function(base, tokens):
    hybrid = insert(base, seed=1)
    assert (hybrid(tokens) - base(tokens)).abs().max() <= 1e-5
    assert probe(base, hybrid)["max_delta_logit"] <= 1e-5
    for name, p in base.named_parameters():
        parts = name.split(".")
        for i in range(1, len(parts)):
            if parts[i - 1] in ("h", "value_embeds"):
                parts[i] = str(2 * int(parts[i]))
        assert torch.equal(p, hybrid.get_parameter(".".join(parts)))


def test_insertion_in_double_is_exact(base, tokens):
    hybrid = insert(base, seed=1).double()
    base = base.double()
    base.compute_dtype = hybrid.compute_dtype = torch.float64
    # the mixer's scan and the norm's constants stay fp32; behind a zero out_proj they cannot matter
    assert (hybrid(tokens) - base(tokens)).abs().max() <= 1e-12


def test_all_that_insertion_added_learns_from_the_start(base, tokens):
    """Zero writers get gradient at once, what is behind them after the writers have moved: dead weights would never."""
    hybrid = insert(base, seed=1)
    opt, seen = torch.optim.SGD(hybrid.parameters(), lr=0.5), {}
    for _ in range(3):
        loss, _ = hybrid(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        for n, p in language_parameters(hybrid).items():
            seen[n] = seen.get(n, 0) + p.grad.abs().sum().item()
        opt.step()
        opt.zero_grad()
    assert min(seen.values()) > 0, min(seen, key=seen.get)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["ghost", "normal", "think", [16, 64, 32, 32, 64, 16]])
def test_cached_decode_equals_the_parallel_form(hybrid, tokens, mode):
    want = hybrid(tokens, widths=mode)
    cache = MatryoshkaKVCache(hybrid, 2, tokens.size(1))
    chunks = [tokens[:, :20], *tokens[:, 20:30].split(1, 1), tokens[:, 30:33], tokens[:, 33:]]
    got = torch.cat([hybrid(c, widths=mode, cache=cache) for c in chunks], 1)
    assert want.std() > 0.3 and (got - want).abs().max() <= 1e-4
    assert cache.pos == [tokens.size(1)] * 2


@torch.no_grad()
def test_widths_differ_and_full_width_is_the_default(hybrid, tokens):
    full = hybrid(tokens)
    assert torch.equal(full, hybrid(tokens, widths="god"))
    assert (full - hybrid(tokens, widths="normal")).abs().max() > 0.1


def test_the_mixer_is_never_sliced(hybrid, tokens):
    loss, _ = hybrid(tokens, tokens, widths="ghost")
    loss.backward()
    for block in hybrid.transformer.h:
        if block.kind == "mamba":
            assert (block.mamba.in_proj.weight.grad != 0).float().mean() > 0.99
            assert not block.mlp.c_fc.weight.grad[4 * 16:].any()


@pytest.mark.parametrize("change, words", [
    ({"mamba_group_width": 100}, "no multiple of the group width 100"),
    ({"mamba_group_width": 96, "mamba_headdim": 64}, "no multiple of its head dim 64"),
    ({"d_ref": 128}, "d_ref 128 must be"),
    ({"d_ref": 40}, "whole number of heads"),
])
def test_sizes_that_do_not_divide_are_refused(hybrid_config, change, words):
    with pytest.raises(ValueError, match=words):
        replace(hybrid_config, **change)


@pytest.mark.parametrize("width", [64, 128, 192, 256, 512, 768, 1280, 2048])
def test_any_depths_width_makes_a_hybrid(width):
    config = HybridConfig.from_base(GPTConfig(512, 300, 2, width // 32, width // 32, width))
    assert config.d_inner % config.mamba_group_width == 0
    with torch.device("meta"):
        HybridGPT(config)


def test_model_builds_on_meta_and_materialises(hybrid_config):
    model = build_model(hybrid_config)
    assert model.device.type == "cpu" and not any(p.is_meta for p in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("width, total, ngroups", [(2048, 6.450, 8), (2560, 9.323, 10), (4096, 20.966, 16)])
def test_presets_have_the_documented_sizes(width, total, ngroups):
    config = HybridConfig.preset("d32", width)
    with torch.device("meta"):
        model = HybridGPT(config)
    counts = model.num_params()
    assert round((counts["total"] - counts["control"]) / 1e9, 3) == total
    assert counts["control"] < 0.001 * counts["total"]
    assert model.transformer.h[1].mamba.ngroups == ngroups
    assert config.exit_points == (16, 24, 32, 40, 48, 56)
    assert set(config.levels) == {128, 512, 1024, 2048, width}


def test_shares_of_the_first_stage_are_as_designed():
    """DESIGN 3: 0.39, 6.25 and 25 % of the dynamic matmuls, but 36, 40 and 52 % of the whole model."""
    with torch.device("meta"):
        model = HybridGPT(HybridConfig.preset("d32"))
    whole = {}
    for mode in ("ghost", "whisper", "normal", "think"):
        cost = model.cost(mode, 1024)
        whole[mode] = sum(c.flops for c in cost.values())
    assert [round(100 * whole[m] / whole["think"]) for m in ("ghost", "whisper", "normal")] == [36, 40, 52]


@torch.no_grad()
@pytest.mark.parametrize("mode", ["ghost", "normal", "think"])
def test_extracted_equals_sliced(hybrid, tokens, mode):
    small = extract(hybrid, mode)
    assert (small(tokens) - hybrid(tokens, widths=mode)).abs().max() <= 1e-5
    assert small.num_params()["total"] < hybrid.num_params()["total"] or mode == "think"
    assert list(small.config.levels) == [d for d in hybrid.config.levels if d <= small.config.top_width]


def test_gradients_of_a_slice_equal_the_extracted_models(hybrid, tokens):
    small = extract(hybrid, "normal")
    for model in (hybrid, small):
        loss, _ = model(tokens[:, :-1], tokens[:, 1:], widths="normal")
        loss.backward()
    for name, p in language_parameters(small).items():
        corner = tuple(slice(n) for n in p.shape)
        whole = hybrid.get_parameter(name).grad
        torch.testing.assert_close(whole[corner], p.grad, atol=1e-6, rtol=1e-4)
        assert whole.count_nonzero() == whole[corner].count_nonzero()


@torch.no_grad()
def test_a_hybrid_whose_mamba_blocks_are_skipped_is_the_base(hybrid, base, tokens):
    """The attention blocks are the base's own code: with its weights, and Mamba blocks writing nothing, it is the base."""
    for i, block in enumerate(base.transformer.h):
        hybrid.transformer.h[2 * i].load_state_dict(block.state_dict(), strict=False)
        hybrid.transformer.h[2 * i + 1].mamba.out_proj.weight.zero_()
        hybrid.transformer.h[2 * i + 1].mlp.c_proj.weight.zero_()
    for table in hybrid.value_embeds.values():
        table.weight.zero_()
    hybrid.transformer.wte.load_state_dict(base.transformer.wte.state_dict())
    hybrid.lm_head.load_state_dict(base.lm_head.state_dict())
    for mode in ("normal", "think"):
        torch.testing.assert_close(hybrid(tokens, widths=mode), base(tokens, widths=mode), atol=1e-5, rtol=1e-5)


def test_extraction_refuses_what_it_cannot_do(base):
    with pytest.raises(ValueError, match="only a hybrid"):
        extract(base, "normal")


def test_unknown_presets_are_named():
    with pytest.raises(ValueError, match="the widths 2048, 2560 and 4096"):
        HybridConfig.preset("d32", 3072)
