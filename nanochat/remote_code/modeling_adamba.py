"""
Adamba for transformers, inference only: AdambaForCausalLM. This file needs torch and transformers, nothing else.

Even blocks are attention + MLP, odd blocks a Mamba-2 mixer + MLP. Attention and MLP run at the width of config.mode: they
use the leading residual dims, heads and hidden units; the mixers, the embedding and the head always run whole.

Padding: wherever attention_mask has zeros, left, right or between, each row is brought to its own front, run as if it
stood alone, and put back. A padded position shows the logits of the last token before it, so that generation goes on
from the right one on either side of padding.

Letters in shapes: B rows, T tokens, D residual dims, d dims in use, H heads, K conv window, N SSM state, P SSM head dim.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_adamba import AdambaConfig

EPS = 2.0 ** -23  # of the norms in the residual stream
GATED_NORM_EPS = 1e-5
# Versions of transformers differ in what they call the cache.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
CHUNK = 64  # tokens of the SSM scan that are computed as one matrix product


# ---------------------------------------------------------------------------------------------------------------------
# What is kept between calls

class AdambaCache:
    """
    Keys, values and Mamba states of B rows, each of its own length. Grows as needed. `seen` counts the positions of the
    input ids, padding included.
    """
    is_compileable = False
    is_linear = (False,)

    def __init__(self, rows, device):
        self.seen, self.lengths, self.layers = 0, torch.zeros(rows, dtype=torch.long, device=device), {}

    def get_seq_length(self, layer_idx=0):
        return self.seen

    def get_max_cache_shape(self, layer_idx=0):
        return -1

    def reorder_cache(self, beam_idx):
        """Row r becomes a copy of row beam_idx[r]."""
        self.lengths = self.lengths[beam_idx.to(self.lengths.device)]
        for layer, tensors in self.layers.items():
            self.layers[layer] = tuple(t[beam_idx.to(t.device)] for t in tensors)

    def batch_repeat_interleave(self, repeats):
        self.reorder_cache(torch.arange(len(self.lengths)).repeat_interleave(repeats))

    def batch_select_indices(self, indices):
        self.reorder_cache(indices)

    def write(self, layer, k, v, start):
        """k, v (B, T, H, hd) at positions start[b], start[b] + 1, ... -> all keys and values, (B, S, H, hd)."""
        (B, T), need = k.shape[:2], int(start.max()) + k.size(1)
        if layer not in self.layers:
            self.layers[layer] = k.new_zeros(B, 0, *k.shape[2:]), v.new_zeros(B, 0, *v.shape[2:])
        keys, values = self.layers[layer]
        if keys.size(1) < need:
            room = max(need, 2 * keys.size(1), 64) - keys.size(1)
            keys, values = (F.pad(t, (0, 0, 0, 0, 0, room)) for t in (keys, values))
            self.layers[layer] = keys, values
        at = torch.arange(B, device=k.device)[:, None], start.to(k.device)[:, None] + torch.arange(T, device=k.device)
        keys[at], values[at] = k, v  # what is written beyond a row's end is overwritten before it is read
        return keys[:, :need], values[:, :need]


# ---------------------------------------------------------------------------------------------------------------------
# Layers

def norm(x, d_ref):
    """x * rsqrt(sum(x^2) / d_ref + eps) over the last dim, in fp32: a slice of x gets the length of the whole."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / d_ref + EPS)).to(x.dtype)


def rotate(x, positions, base):
    """Rotary positions: x (B, T, H, hd), positions (B, T)."""
    half = x.size(-1) // 2
    inv_freq = base ** -(torch.arange(0, 2 * half, 2, device=x.device, dtype=torch.float32) / (2 * half))
    angle = positions[..., None, None].float() * inv_freq
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.split(half, -1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), -1)


class AdambaAttention(nn.Module):
    def __init__(self, config, value_embedding):
        super().__init__()
        self.head_dim, self.group, self.d_ref = config.head_dim, config.n_head // config.n_kv_head, config.d_ref
        self.rope_base = config.rope_base
        D = config.top_width
        D_kv = self.n_kv(D) * self.head_dim
        self.c_q, self.c_k, self.c_v, self.c_proj = (nn.Linear(D, n, bias=False) for n in (D, D_kv, D_kv, D))
        self.ve_gate = nn.Linear(min(32, self.head_dim), self.n_kv(D), bias=False) if value_embedding else None

    def n_kv(self, d):
        """Key/value heads that the first d / head_dim query heads read."""
        return -(-(d // self.head_dim) // self.group)

    def forward(self, x, d, rows, cache, layer, value):
        """x (B, T, D) -> the update of its first d dims. rows: Rows; value: value embeddings (B, T, D_kv) or None."""
        B, T, _ = x.shape
        u, n = norm(x[..., :d], self.d_ref), self.n_kv(d) * self.head_dim
        q, k, v = (F.linear(u, m.weight[:out, :d]) for m, out in ((self.c_q, d), (self.c_k, n), (self.c_v, n)))
        if value is not None:
            c = self.ve_gate.in_features
            scale = min(1.0, d / self.d_ref) ** 0.5
            gate = 2 * torch.sigmoid(F.linear(u[..., :c] * scale, self.ve_gate.weight[:self.n_kv(d)]))
            v = v + gate.repeat_interleave(self.head_dim, -1) * value[..., :n]
        q, k, v = (t.view(B, T, -1, self.head_dim) for t in (q, k, v))
        positions = rows.positions.to(x.device)
        q, k = (norm(rotate(t, positions, self.rope_base), self.head_dim) for t in (q, k))
        if cache is not None:
            k, v = cache.write(layer, k, v, rows.start)
        # a token sees its row's keys up to its own position; what lies behind a row's end lies behind its tokens, too
        seen = torch.arange(k.size(1), device=x.device) <= positions[:, None, :, None]
        k, v = (t.repeat_interleave(self.group, 2)[:, :, :d // self.head_dim].transpose(1, 2) for t in (k, v))
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=seen)
        return F.linear(y.transpose(1, 2).reshape(B, T, d), self.c_proj.weight[:d, :d])


class AdambaMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.d_ref = config.d_ref
        self.c_fc = nn.Linear(config.top_width, 4 * config.top_width, bias=False)
        self.c_proj = nn.Linear(4 * config.top_width, config.top_width, bias=False)

    def forward(self, x, d):
        """x (B, T, D) -> the update of its first d dims."""
        hidden = F.relu(F.linear(norm(x[..., :d], self.d_ref), self.c_fc.weight[:4 * d, :d])).square()
        return F.linear(hidden, self.c_proj.weight[:d, :4 * d])


class AdambaMixer(nn.Module):
    """
    Mamba-2 (Dao & Gu 2024): in_proj -> causal conv and silu -> state space scan -> gated norm -> out_proj. A_log, D,
    dt_bias, the conv and the norm are kept in fp32.
    """
    def __init__(self, config):
        super().__init__()
        self.d_inner = config.mamba_expand * config.n_embd
        self.groups, self.d_state = self.d_inner // config.mamba_group_width, config.mamba_d_state
        self.headdim, self.heads = config.mamba_headdim, self.d_inner // config.mamba_headdim
        self.window = config.mamba_d_conv
        self.conv_dim = self.d_inner + 2 * self.groups * self.d_state
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.empty(self.heads)) for _ in range(3))
        self.in_proj = nn.Linear(config.n_embd, self.d_inner + self.conv_dim + self.heads, bias=False)  # z, x, B, C, dt
        self.conv1d = nn.Conv1d(self.conv_dim, self.conv_dim, self.window, groups=self.conv_dim)
        self.norm = nn.Module()
        self.norm.weight = nn.Parameter(torch.empty(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, config.n_embd, bias=False)

    def forward(self, u, rows, cache, layer):
        """u (B, T, D) -> (B, T, D); with a cache the layer's conv window (B, K, conv_dim) and state are carried on."""
        (B, T, _), K = u.shape, self.window
        z, xBC, dt = self.in_proj(u).split([self.d_inner, self.conv_dim, self.heads], -1)
        if cache is not None and layer in cache.layers:
            past, state = cache.layers[layer]
        else:
            past = xBC.new_zeros(B, K, self.conv_dim)
            state = torch.zeros(B, self.heads, self.headdim, self.d_state, device=u.device)
        counts = rows.counts.to(u.device)
        whole = torch.cat((past, xBC), 1)
        act = F.silu(F.conv1d(whole[:, 1:].mT.float(), self.conv1d.weight.float(), self.conv1d.bias.float(),
                              groups=self.conv_dim)).mT.to(u.dtype)
        # padding neither decays a state nor enters it
        dt = F.softplus(dt.float() + self.dt_bias.float()) * (torch.arange(T, device=u.device) < counts[:, None])[..., None]
        y, state = self.scan(act, dt, state)
        if cache is not None:
            at = counts[:, None] + torch.arange(K, device=u.device)  # the last K inputs of each row
            cache.layers[layer] = whole.gather(1, at[..., None].expand(-1, -1, self.conv_dim)), state
        y = (y.flatten(2) * F.silu(z.float())).unflatten(-1, (self.groups, -1))
        y = F.rms_norm(y, y.shape[-1:], eps=GATED_NORM_EPS).flatten(2) * self.norm.weight.float()
        return self.out_proj(y.to(u.dtype))

    def scan(self, act, dt, state):
        """
        h_t = exp(dt_t A) h_(t-1) + dt_t x_t B_t^T, y_t = h_t C_t + D x_t, in chunks: within one by a matrix of decays
        between its tokens, from one to the next by the state h (B, H, P, N). act (B, T, conv_dim), dt (B, T, H) fp32.
        """
        GN = self.groups * self.d_state
        x, key, query = act.float().split([self.d_inner, GN, GN], -1)
        x = x.unflatten(-1, (self.heads, self.headdim))                                         # (B, T, H, P)
        key, query = (t.unflatten(-1, (self.groups, self.d_state)).repeat_interleave(self.heads // self.groups, 2)
                      for t in (key, query))                                                    # (B, T, H, N)
        log_decay, out = dt * -self.A_log.float().exp(), []
        for i in range(0, x.size(1), CHUNK):
            xs, ks, qs, dts, logs = (t[:, i:i + CHUNK].transpose(1, 2) for t in (x, key, query, dt, log_decay))
            total = logs.cumsum(-1)                                                             # (B, H, L)
            lower = torch.ones(total.size(-1), total.size(-1), dtype=torch.bool, device=x.device).tril()
            between = torch.exp((total[..., :, None] - total[..., None, :]).masked_fill(~lower, float("-inf")))
            inputs = xs * dts[..., None]
            y = (qs @ ks.mT * between) @ inputs + (qs @ state.mT) * total.exp()[..., None]
            rest = torch.exp(total[..., -1:] - total)[..., None]
            state = state * total[..., -1].exp()[..., None, None] + (inputs * rest).mT @ ks
            out.append((y + xs * self.D.float()[:, None, None]).transpose(1, 2))
        return torch.cat(out, 1), state


class AdambaBlock(nn.Module):
    """One residual unit: attention or a Mamba-2 mixer, then an MLP."""
    def __init__(self, config, i):
        super().__init__()
        self.d_ref = config.d_ref
        if i % 2 == 0:
            self.attn = AdambaAttention(config, value_embedding=has_values(config, i))
        else:
            self.mamba = AdambaMixer(config)
        self.mlp = AdambaMLP(config)

    def forward(self, x, d, rows, cache, layer, value=None):
        if hasattr(self, "attn"):
            x = add(x, self.attn(x, d, rows, cache, layer, value))
        else:
            x = x + self.mamba(norm(x, self.d_ref), rows, cache, layer)
        return add(x, self.mlp(x, d))


def add(x, update):
    """x (B, T, D) with the update (B, T, d) added to its first d dims."""
    return x + F.pad(update, (0, x.size(-1) - update.size(-1)))


def has_values(config, i):
    """Whether block i has value embeddings: every second attention block, the last one always."""
    return i % 2 == 0 and (config.n_layer - 1 - i // 2) % 2 == 0


# ---------------------------------------------------------------------------------------------------------------------
# Rows and the model

class Rows:
    """
    How the tokens of a batch lie: `counts` (B,) tokens in each row, `start` (B,) tokens before them, `positions` (B, T) of
    the tokens once each row stands at its own front.
    """
    def __init__(self, attention_mask, shape, cache, device):
        T = shape[1]
        mask = torch.ones(shape, device=device) if attention_mask is None else attention_mask[:, -T:]
        mask = mask.to(device).bool()
        self.counts = mask.sum(1)
        self.start = torch.zeros_like(self.counts) if cache is None else cache.lengths.to(device)
        self.positions = self.start[:, None] + torch.arange(T, device=device)
        self.ragged = not bool(mask.all())
        self.to_front = (~mask).long().argsort(dim=1, stable=True)
        self.back = (mask.long().cumsum(1) - 1).clamp(min=0)


class AdambaPreTrainedModel(PreTrainedModel):
    config_class = AdambaConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["AdambaBlock"]
    # the recurrence is sensitive to these, and they are small
    _keep_in_fp32_modules = ["A_log", "dt_bias", "D", "conv1d", "norm"]
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias", "D", "conv1d", "norm"]
    # the networks that choose widths and exits by themselves (mode auto); the package that trained the model runs them
    _keys_to_ignore_on_load_unexpected = [r"^gate\.", r"^predictor\."]

    def _init_weights(self, module):
        """Nothing: this file is for trained weights."""


class AdambaForCausalLM(AdambaPreTrainedModel, GenerationMixin):
    """logits = softcap * tanh(head / softcap), of the state after config.exit_depth blocks."""

    def __init__(self, config):
        super().__init__(config)
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "h": nn.ModuleList(AdambaBlock(config, i) for i in range(config.n_block))})
        attention = [(i, b.attn) for i, b in enumerate(self.transformer.h) if i % 2 == 0]
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(config.vocab_size, attn.c_v.out_features)
                                           for i, attn in attention if attn.ve_gate is not None})
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False

    def get_input_embeddings(self):
        return self.transformer.wte

    def set_input_embeddings(self, value):
        self.transformer.wte = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(self, input_ids, attention_mask=None, cache=None, past_key_values=None, labels=None, use_cache=None,
                logits_to_keep=0, **kwargs):
        """
        input_ids (B, T) -> logits (B, T, vocab) fp32, and the cache. attention_mask (B, S): 1 for tokens, 0 for padding;
        its last T columns are those of the input ids. labels (B, T): as input_ids, -100 where a position does not count;
        loss is the mean cross-entropy of each token from those before it. logits_to_keep: of how many last positions logits
        are made (0: all).
        """
        config, device = self.config, input_ids.device
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = AdambaCache(len(input_ids), device)
        rows = Rows(attention_mask, input_ids.shape, cache, device)
        ids = input_ids.gather(1, rows.to_front) if rows.ragged else input_ids
        d, depth = config.width, config.depth
        x = norm(self.transformer.wte(ids), config.d_ref)
        for i, block in enumerate(self.transformer.h[:depth]):
            value = self.value_embeds[str(i)](ids) if str(i) in self.value_embeds else None
            x = block(x, d, rows, cache, i, value)
        if cache is not None:
            cache.seen, cache.lengths = cache.seen + ids.size(1), rows.start + rows.counts
        if rows.ragged:
            x = x.gather(1, rows.back.to(x.device)[..., None].expand_as(x))
        x = norm(x, config.d_ref)
        if isinstance(logits_to_keep, int):
            x = x[:, -logits_to_keep:]
        else:
            x = x[:, logits_to_keep]
        logits = config.softcap * torch.tanh(self.lm_head(x).float() / config.softcap)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device))
        cache = cache if use_cache or use_cache is None else None
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE_NAME: cache})

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, cache=None, past_key_values=None, use_cache=True,
                                      logits_to_keep=0, **kwargs):
        """The tokens that the cache has not seen, and a new cache at first."""
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = AdambaCache(len(input_ids), input_ids.device)
        seen = 0 if cache is None else cache.seen
        return {"input_ids": input_ids[:, seen:], "attention_mask": attention_mask, "cache": cache, "use_cache": use_cache,
                "logits_to_keep": logits_to_keep}
