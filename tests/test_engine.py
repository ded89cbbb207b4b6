"""Generation: cached = uncached, sampling filters, stops, limits, streaming, and inference weights."""
import pytest
import torch

from nanochat.chat import visible_text
from nanochat.engine import Engine, prepare_inference
from nanochat.mamba_block import FP32_PARAMS
from nanochat.sampling import draw_tokens
from nanochat.tokenizer import Tokenizer


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
    assert list(Engine(hybrid, None).tokens(prompt, 20, mode=mode, temperature=0)) == greedy(hybrid, prompt, 20, mode)


def test_base_models_generate_too(base):
    assert list(Engine(base, None).tokens([1, 2], 10, temperature=0)) == greedy(base, [1, 2], 10, "think")


def test_seeds_reproduce_and_differ(hybrid):
    run = lambda seed: list(Engine(hybrid, None).tokens([1], 30, temperature=1.0, seed=seed))  # noqa: E731
    assert run(1) == run(1) != run(2)


def test_stop_tokens_end_and_are_not_yielded(hybrid):
    whole = list(Engine(hybrid, None).tokens([1, 2, 3], 20, temperature=0))
    at = next(i for i in range(1, 20) if whole[i] not in whole[:i])
    assert list(Engine(hybrid, None).tokens([1, 2, 3], 20, temperature=0, stop=[whole[at]])) == whole[:at]


def test_generation_ends_at_the_models_context(hybrid):
    assert len(list(Engine(hybrid, None).tokens([1] * 60, 100))) == 64 - 60 + 1  # the last token needs no place


@pytest.mark.parametrize("prompt, words", [([], "prompt is empty"), ([1] * 64, "64 tokens, but the model's context of 64")])
def test_bad_prompts_are_named(hybrid, prompt, words):
    with pytest.raises(ValueError, match=words):
        next(Engine(hybrid, None).tokens(prompt, 5))


def test_unknown_modes_are_named(hybrid):
    with pytest.raises(ValueError, match="unknown mode 'auto-magic'"):
        next(Engine(hybrid, None).tokens([1], 5, mode="auto-magic"))


def frequencies(n=4000, **kwargs):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(n, -1)
    settings = {"temperature": 1.0, "top_k": None, "top_p": None, **kwargs}
    drawn = draw_tokens(logits, tuple(settings.values()), [torch.Generator().manual_seed(0)] * n)
    return torch.bincount(torch.tensor(drawn), minlength=4) / n


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
    data, tokenizer = "aé漢🙂".encode(), Tokenizer([bytes([i]) for i in range(256)])
    pieces = list(visible_text(tokenizer, data))
    assert "".join(pieces) == "aé漢🙂" and [p for p in pieces if p] == list("aé漢🙂")
    assert "".join(visible_text(tokenizer, data[:-1])).endswith("\ufffd")


def test_inference_weights_are_bf16_except_the_ssm_and_the_controls(hybrid, tokens, monkeypatch):
    want = hybrid(tokens).detach()
    monkeypatch.setenv("NANOCHAT_DTYPE", "bfloat16")
    prepare_inference(hybrid, "cpu")
    for n, p in hybrid.named_parameters():
        fp32 = (".mamba." in n and n.endswith(FP32_PARAMS)) or n.startswith(("gate.", "predictor."))
        assert p.dtype == (torch.float32 if fp32 else torch.bfloat16), n
    assert (hybrid(tokens) - want).abs().max() < 0.15 * want.std()


PROMPTS = [[5, 17, 250, 3], [9], [7, 7, 7, 1, 2, 3, 4, 5, 6, 8, 200], [100, 3], [1, 2, 3], [4] * 20, [12, 13], [299, 0]]


def collect(engine, prompts, n, **options):
    out = [[] for _ in prompts]
    for pairs in engine.stream(prompts, n, **options):
        for row, token in pairs:
            out[row].append(token)
    return out


def near_tie(model, prompt, got, mode, depth):
    """Whether plain decoding's two likeliest next tokens are within 1e-4, where rounding may decide."""
    exits = torch.tensor([[6] * (len(prompt) - 1) + [depth or 6] * (len(got) + 1)])
    top = model(torch.tensor([prompt + got]), widths=mode, exits=exits).detach()[0, -1].topk(2).values
    return float(top[0] - top[1]) < 1e-4


def test_ragged_batch_equals_single_rows_token_for_token(hybrid):
    """Eight rows of different lengths, widths, depths and ends."""
    engine = Engine(hybrid, None)
    modes = ["think", "ghost", "normal", "whisper", 32, "think", "normal", "ghost"]
    depths = [None, 2, 4, None, 6, 3, None, 5]
    stop = [17, 250]
    together = collect(engine, PROMPTS, 15, mode=modes, depth=depths, temperature=0, stop=stop)
    for r, prompt in enumerate(PROMPTS):
        alone = collect(engine, [prompt], 15, mode=modes[r], depth=depths[r], temperature=0, stop=stop)[0]
        at = next((i for i, (a, b) in enumerate(zip(together[r], alone)) if a != b), None)
        if at is not None:
            print(f"row {r} differs at token {at}")
        assert at is None or near_tie(hybrid, prompt, alone[:at], modes[r], depths[r])
        assert at is not None or together[r] == alone
    assert len({tuple(t) for t in together}) > 4


def test_depth_equals_the_parallel_form(hybrid):
    prompt, n = [5, 17, 250, 3], 12
    got = list(Engine(hybrid, None).tokens(prompt, n, depth=3, temperature=0))
    ids = prompt + got
    exits = torch.tensor([[6] * 3 + [3] * (n + 1)])  # the prompt's last token is the first that generates
    want = hybrid(torch.tensor([ids]), exits=exits).argmax(-1)[0, 3:-1]
    assert got == want.tolist()


def test_a_row_draws_the_same_whatever_is_beside_it(hybrid):
    engine = Engine(hybrid, None)
    together = collect(engine, PROMPTS[:3], 20, temperature=1.0, top_k=20, seed=5)
    for r in range(3):
        assert together[r] == list(engine.tokens(PROMPTS[r], 20, temperature=1.0, top_k=20, seed=5 + r))


def test_a_full_context_slides_on_request(hybrid):
    """It goes on from the last half of the context, as if that had been the prompt."""
    engine, prompt = Engine(hybrid, None), [3] * 50
    got = list(engine.tokens(prompt, 40, temperature=0, overflow="slide"))
    assert len(got) == 40
    ids = prompt + got
    first = 64 - 50 + 1  # tokens until the context was full
    again = list(engine.tokens(ids[50 + first - 32:50 + first], 40 - first, temperature=0))
    assert got[first:] == again
    mixed = collect(engine, [prompt, [1, 2]], 40, temperature=0, overflow="slide")
    assert mixed == [got, list(engine.tokens([1, 2], 40, temperature=0))]


@pytest.mark.parametrize("options, words", [
    ({"budget": 0.5}, "in mode 'auto' only"), ({"mode": ["auto", "think"][:1], "budget": 2.0}, "budget 2.0 is out of range"),
    ({"depth": 7}, "depth 7 is out of range"),
    ({"mode": ["think"] * 3}, "3 modes were given for 1 prompts"),
    ({"overflow": "wrap"}, "choose 'stop' or 'slide'")])
def test_bad_options_are_named(hybrid, options, words):
    with pytest.raises(ValueError, match=words):
        list(Engine(hybrid, None).tokens([1], 3, **options))


@pytest.mark.parametrize("options", [{}, {"mode": "ghost"}, {"depth": 2}, {"mode": ["think", "ghost", "normal"]}])
def test_allowed_tokens_restrict_each_row(hybrid, options):
    """The answer to a multiple choice: the likeliest of the row's own letters, as the whole distribution has them."""
    prompts, letters = PROMPTS[:3], [[65, 66, 67], [10, 20], [299]]
    engine = Engine(hybrid, None)
    got = [row[0] for row in engine.answers(prompts, 1, temperature=0, allowed=letters, **options)]
    for r, prompt in enumerate(prompts):
        mode = options.get("mode")
        exits = torch.tensor([[6] * (len(prompt) - 1) + [options.get("depth", 6)]])
        logits = hybrid(torch.tensor([prompt]), widths=mode[r] if isinstance(mode, list) else mode, exits=exits)[0, -1]
        assert got[r] == max(letters[r], key=lambda t: float(logits[t]))
    with pytest.raises(ValueError, match="without lossless"):
        engine.answers(prompts, 1, allowed=letters, lossless=True)
