"""The base GPT against the transformers library's NanoChat, its cache, its widths, and its configuration's errors."""
import pytest
import torch
from conftest import randomize

from nanochat.cache import MatryoshkaKVCache
from nanochat.checkpoint_manager import build_model
from nanochat.gpt import GPTConfig


def oracle(model):
    """transformers' NanoChatForCausalLM with our weights."""
    from transformers import NanoChatConfig, NanoChatForCausalLM
    c = model.config
    hf = NanoChatForCausalLM(NanoChatConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=4 * c.n_embd, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.head_dim,
        max_position_embeddings=c.sequence_len, final_logit_softcapping=c.softcap, tie_word_embeddings=False,
        rope_theta=c.rope_base, attn_implementation="eager")).eval()
    names = {"attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj", "attn.c_v": "self_attn.v_proj",
             "attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    state = {"model.embed_tokens.weight": model.transformer.wte.weight, "lm_head.weight": model.lm_head.weight}
    for i, block in enumerate(model.transformer.h):
        for ours, theirs in names.items():
            state[f"model.layers.{i}.{theirs}.weight"] = block.get_submodule(ours).weight
    missing, unexpected = hf.load_state_dict(state, strict=False)
    assert not unexpected and all("rotary" in k for k in missing)
    return hf


@pytest.mark.parametrize("n_kv_head", [4, 2])
@torch.no_grad()
def test_matches_transformers_parallel_and_cached(n_kv_head):
    model = randomize(build_model(GPTConfig(64, 300, 3, 4, n_kv_head, 64)))
    idx = torch.randint(300, (2, 40))
    want = oracle(model)(idx).logits
    assert (model(idx) - want).abs().max() <= 1e-3
    assert want.std() > 0.3  # the comparison is of real numbers, not of near-zeros
    cache = MatryoshkaKVCache(model, 2, 40)
    got = torch.cat([model(part, cache=cache) for part in (idx[:, :17], *idx[:, 17:37].split(1, 1), idx[:, 37:])], 1)
    assert (got - want).abs().max() <= 1e-3


@pytest.mark.parametrize("width", [16, 32, 64])
@torch.no_grad()
def test_a_width_is_a_smaller_model(base, tokens, width):
    """Width d computes what a model of width d computes that was cut out of the large one, norms over d_ref."""
    c = base.config
    small = build_model(GPTConfig(c.sequence_len, c.vocab_size, c.n_layer, width // c.head_dim, width // c.head_dim, width))
    small.lm_head.weight = torch.nn.Parameter(base.lm_head.weight[:, :width])
    for name, p in small.named_parameters():
        p.copy_(base.get_parameter(name)[tuple(slice(n) for n in p.shape)])
    # the small model sees embeddings normed at full width, and divides by the large one's d_ref
    x = torch.nn.functional.rms_norm(base.transformer.wte(tokens), (c.n_embd,), eps=c.norm_eps)
    y = x[..., :width]
    from nanochat.matryoshka import norm, rope_tables
    rope = rope_tables(torch.arange(tokens.size(1)), c.head_dim, c.rope_base)
    for block in small.transformer.h:
        block.attn.d_ref = block.mlp.d_ref = c.d_ref
        y = block(y, width, rope)
    want = norm(torch.cat((y, x[..., width:]), -1), c.d_ref, c.norm_eps)
    torch.testing.assert_close(base.hidden(tokens, widths=width), want, atol=1e-5, rtol=1e-5)


def test_gradients_stay_inside_the_slice(base, tokens):
    loss, _ = base(tokens, tokens, widths=32)
    loss.backward()
    for block in base.transformer.h:
        for name, p in block.named_parameters():
            rows, cols = {"mlp.c_fc.weight": (128, 32), "mlp.c_proj.weight": (32, 128)}.get(name, (32, 32))
            inside = p.grad[:rows, :cols].count_nonzero()
            assert inside > 0.9 * rows * cols  # relu leaves some entries at zero by chance
            assert inside == p.grad.count_nonzero()


def test_depth_dial_derives_the_known_sizes():
    c = GPTConfig.from_depth(32, 65536, 2048)
    assert (c.n_embd, c.n_head, c.head_dim) == (2048, 16, 128)
    with torch.device("meta"):
        from nanochat.gpt import GPT
        assert GPT(c).num_params()["total"] == 1_879_048_192
    assert c.modes == {"ghost": 128, "whisper": 512, "normal": 1024, "think": 2048, "god": 2048}
    small = GPTConfig.from_depth(4, 4096, 512)
    assert small.modes == {"ghost": 32, "whisper": 64, "normal": 128, "think": 256, "god": 256}


@pytest.mark.parametrize("make, words", [
    (lambda: GPTConfig(n_embd=100, n_head=3, n_kv_head=3), "no multiple of the 3 heads"),
    (lambda: GPTConfig.from_depth(4, 300, 64, head_dim=48), "no multiple of the head dim 48"),
    (lambda: GPTConfig(n_head=4, n_kv_head=3, n_embd=64), "cannot share"),
    (lambda: GPTConfig(n_layer=0), "n_layer is 0"),
    (lambda: GPTConfig(n_head=4, n_kv_head=4, n_embd=12), "odd"),
])
def test_bad_sizes_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_bad_widths_and_lengths_are_named(base, tokens):
    for widths, words in (("loud", "unknown mode 'loud'.*ghost"), (48, "48 is not a level.*16, 32, 64"),
                          ([64, 64], "2 widths were given for 3 blocks")):
        with pytest.raises(ValueError, match=words):
            base(tokens, widths=widths)
    with pytest.raises(ValueError, match="do not fit the model's context of 64"):
        base(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="exceeds the model's context"):
        MatryoshkaKVCache(base, 1, 65)
