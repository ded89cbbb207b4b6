"""Generation: cached = uncached, sampling filters, stops, limits, streaming, and inference weights."""
import pytest
import torch

from nanochat.engine import Engine, prepare_inference, sample
from nanochat.mamba_block import FP32_PARAMS


class Bytes:
    """Stands where a tokenizer is: token i is byte i."""
    def id_to_bytes(self, i):
        return bytes([i])


@torch.no_grad()
def greedy(model, prompt, n, mode):
    """Without a cache: the whole sequence anew for every token."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]), widths=mode)[0, -1].argmax()))
    return ids[len(prompt):]


@pytest.mark.parametrize("mode", ["ghost", "whisper", "normal", "think", 32])
def test_greedy_decode_equals_recomputation(hybrid, mode):
    prompt = [5, 17, 250, 3]
    assert list(Engine(hybrid, None).generate(prompt, 20, mode, temperature=0)) == greedy(hybrid, prompt, 20, mode)


def test_base_models_generate_too(base):
    assert list(Engine(base, None).generate([1, 2], 10, temperature=0)) == greedy(base, [1, 2], 10, "think")


def test_seeds_reproduce_and_differ(hybrid):
    run = lambda seed: list(Engine(hybrid, None).generate([1], 30, temperature=1.0, seed=seed))  # noqa: E731
    assert run(1) == run(1) != run(2)


def test_stop_tokens_end_and_are_not_yielded(hybrid):
    whole = list(Engine(hybrid, None).generate([1, 2, 3], 20, temperature=0))
    at = next(i for i in range(1, 20) if whole[i] not in whole[:i])
    assert list(Engine(hybrid, None).generate([1, 2, 3], 20, temperature=0, stop=[whole[at]])) == whole[:at]


def test_generation_ends_at_the_models_context(hybrid):
    assert len(list(Engine(hybrid, None).generate([1] * 60, 100))) == 64 - 60 + 1  # the last token needs no place


@pytest.mark.parametrize("prompt, words", [([], "prompt is empty"), ([1] * 64, "64 tokens, but the model's context is 64")])
def test_bad_prompts_are_named(hybrid, prompt, words):
    with pytest.raises(ValueError, match=words):
        next(Engine(hybrid, None).generate(prompt, 5))


def test_unknown_modes_are_named(hybrid):
    with pytest.raises(ValueError, match="unknown mode 'auto-magic'"):
        next(Engine(hybrid, None).generate([1], 5, mode="auto-magic"))


def frequencies(n=4000, **kwargs):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(n, -1)
    settings = {"temperature": 1.0, "top_k": None, "top_p": None, **kwargs}
    drawn = sample(logits, generator=torch.Generator().manual_seed(0), **settings)
    return torch.bincount(drawn, minlength=4) / n


def test_sampling_follows_the_distribution():
    p = torch.tensor([2.0, 1.0, 0.0, -1.0]).softmax(-1)
    assert (frequencies() - p).abs().max() < 0.03
    assert (frequencies(temperature=0.5) - torch.tensor([4.0, 2.0, 0.0, -2.0]).softmax(-1)).abs().max() < 0.03
    assert frequencies(temperature=0)[0] == 1


def test_top_k_and_top_p_cut_the_tail():
    p = torch.tensor([2.0, 1.0]).softmax(-1)  # 0.64 and 0.24 of the whole hold 0.88
    for f in (frequencies(top_k=2), frequencies(top_p=0.8)):
        assert (f[:2] - p).abs().max() < 0.03 and f[2:].sum() == 0
    assert frequencies(top_p=0.5)[0] == 1 and frequencies(top_k=9)[3] > 0


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_sampling_parameters_out_of_range(bad):
    with pytest.raises(ValueError, match="must be"):
        frequencies(**bad)


def test_text_streams_in_whole_characters():
    data = "aé漢🙂".encode()
    pieces = list(Engine(None, Bytes()).stream_text(data))
    assert "".join(pieces) == "aé漢🙂" and [p for p in pieces if p] == list("aé漢🙂")
    assert "".join(Engine(None, Bytes()).stream_text(data[:-1])).endswith("\ufffd")


def test_inference_weights_are_bf16_except_the_ssm(hybrid, tokens, monkeypatch):
    want = hybrid(tokens).detach()
    monkeypatch.setenv("NANOCHAT_DTYPE", "bfloat16")
    prepare_inference(hybrid, "cpu")
    for n, p in hybrid.named_parameters():
        fp32 = ".mamba." in n and n.endswith(FP32_PARAMS)
        assert p.dtype == (torch.float32 if fp32 else torch.bfloat16), n
    assert (hybrid(tokens) - want).abs().max() < 0.15 * want.std()
