"""
Adamba for inference with `transformers`, in one file that needs nothing but torch and transformers:

    model = AutoModelForCausalLM.from_pretrained(REPOSITORY, trust_remote_code=True, mode="normal")

A block is a residual unit: attention + MLP, or Mamba-2 + MLP. Attention and MLP run at the width that `config.mode` says:
the first d dims of the residual stream, the first d / head_dim heads, the first 4 d hidden units. Mamba-2 (Dao & Gu 2024,
arXiv 2405.21060), the embeddings and the head always run whole.

Padding: the valid tokens of each row are moved to its front before the first block, and back after the last. So inside,
row r has counts[r] valid tokens, which follow those it had before; padding is seen by nobody, wherever it stood. Outside, a
padded column shows what the last valid token before it showed, so that generation goes on from the right one.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_adamba import AdambaConfig

# What this release of transformers calls the memory of a generation.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
CHUNK = 64          # tokens in one step of the Mamba scan
MAMBA_EPS = 1e-5    # of the mixer's gated norm
SMEAR_DIMS = 24     # leading dims that the smear's gate reads


def norm(x, d_ref, eps):
    """x * rsqrt(sum(x^2) / d_ref + eps) over the last dim, in fp32: RMSNorm at length d_ref, and scaled alike at others."""
    wide = x.float()
    return (wide * (wide.square().sum(-1, keepdim=True) / d_ref + eps).rsqrt()).to(x.dtype)


def linear(x, layer, d_out):
    """x (..., d_in) times the leading corner of the layer's matrix -> (..., d_out)."""
    return F.linear(x, layer.weight[:d_out, :x.size(-1)])


def add(x, y):
    """x (..., D) with y (..., d) added to its first d dims."""
    return x + F.pad(y, (0, x.size(-1) - y.size(-1)))


def rope_tables(positions, head_dim, base):
    """cos and sin (B, T, 1, head_dim / 2), fp32, of the rotary embedding at positions (B, T)."""
    frequency = base ** -(torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angle = positions[..., None, None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(x, rope):
    """x (B, T, H, head_dim), its halves turned by minus the angle, as nanochat does."""
    cos, sin = (t.to(x.dtype) for t in rope)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class AdambaCache:
    """
    What a generation remembers of B rows: how many tokens each has (lengths), how many columns of input_ids were seen
    (padding included), per attention block keys and values, per Mamba block the last inputs of its convolution and the
    state, and, where the model smears, each row's last embedding.
    """
    is_compileable = False

    def __init__(self, rows, blocks, device, compute):
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.columns, self.compute, self.embedding = 0, compute, None
        self.blocks = [{} for _ in range(blocks)]

    def get_seq_length(self, layer_idx=0):
        """The number of columns seen."""
        return self.columns

    def reorder_cache(self, rows):
        """Makes row i what row rows[i] was, for beam search."""
        self.lengths = self.lengths.index_select(0, rows.to(self.lengths.device))
        if self.embedding is not None:
            self.embedding = self.embedding.index_select(0, rows.to(self.embedding.device))
        self.blocks = [{k: t.index_select(0, rows.to(t.device)) for k, t in block.items()} for block in self.blocks]


def write_keys(memory, k, v, positions, size):
    """Puts k and v (B, KV, T, hd) at positions (B, T) into a block's memory -> all keys and values up to `size`."""
    if "k" not in memory or memory["k"].size(2) < size:
        room = size + 256 if "k" in memory else size
        for name, new in (("k", k), ("v", v)):
            grown = new.new_zeros(*new.shape[:2], room, new.size(-1))
            if name in memory:
                grown[:, :, :memory[name].size(2)] = memory[name]
            memory[name] = grown
    rows = torch.arange(len(k), device=k.device)[:, None]
    memory["k"][rows, :, positions], memory["v"][rows, :, positions] = k.transpose(1, 2), v.transpose(1, 2)
    return memory["k"][:, :, :size], memory["v"][:, :, :size]


class Attention(nn.Module):
    """Causal attention of the first d / head_dim heads: rotary positions, then RMSNorm of q and k; value embeddings."""

    def __init__(self, config, value_embedding):
        super().__init__()
        self.config, self.group = config, config.n_head // config.n_kv_head
        D, hd = config.top_width, config.head_dim
        kv = self.kv_heads(D) * hd
        self.c_q, self.c_proj = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
        self.c_k, self.c_v = nn.Linear(D, kv, bias=False), nn.Linear(D, kv, bias=False)
        self.ve_gate = nn.Linear(min(32, hd), self.kv_heads(D), bias=False) if value_embedding else None

    def kv_heads(self, d):
        return -(-(d // self.config.head_dim) // self.group)

    def forward(self, x, d, rope, positions, mask, value, memory, size):
        c, (B, T, _), hd = self.config, x.shape, self.config.head_dim
        n_kv = self.kv_heads(d)
        u = norm(x[..., :d], c.d_ref, c.norm_eps)
        q = linear(u, self.c_q, d).view(B, T, -1, hd)
        k, v = (linear(u, layer, n_kv * hd).view(B, T, -1, hd) for layer in (self.c_k, self.c_v))
        if self.ve_gate is not None:  # the gate sees one scale at every width
            seen = u[..., :self.ve_gate.in_features] * min(1.0, d / c.d_ref) ** 0.5
            gate = 2 * torch.sigmoid(linear(seen, self.ve_gate, n_kv))
            v = v + gate.unsqueeze(-1) * value[..., :n_kv * hd].view(B, T, -1, hd)
        q, k = (norm(rotate(t, rope), hd, c.norm_eps) * c.qk_scale for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if memory is not None:
            k, v = write_keys(memory, k, v, positions, size)
        k, v = (t.repeat_interleave(self.group, dim=1)[:, :d // hd] for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)
        return linear(y.transpose(1, 2).reshape(B, T, d), self.c_proj, d)


class MLP(nn.Module):
    """relu(u W_fc)^2 W_proj with the first 4 d hidden units."""

    def __init__(self, config):
        super().__init__()
        self.d_ref, self.eps = config.d_ref, config.norm_eps
        self.c_fc = nn.Linear(config.top_width, 4 * config.top_width, bias=False)
        self.c_proj = nn.Linear(4 * config.top_width, config.top_width, bias=False)

    def forward(self, x, d):
        u = norm(x[..., :d], self.d_ref, self.eps)
        return linear(F.relu(linear(u, self.c_fc, 4 * d)).square(), self.c_proj, d)


def scan(x, dt, A, B, C, state):
    """
    The state space recurrence S_t = exp(dt_t A) S_(t-1) + dt_t x_t B_t^T, y_t = S_t C_t, in chunks, fp32.
    x (b, T, H, P), dt (b, T, H) >= 0, A (H) < 0, B and C (b, T, H, N), state (b, H, P, N) -> y (b, T, H, P), last state.
    """
    out = []
    for t in range(0, x.size(1), CHUNK):
        xs, dts, Bs, Cs = (v[:, t:t + CHUNK].transpose(1, 2) for v in (x, dt, B, C))  # (b, H, Q, ...)
        decay = (dts * A[:, None]).cumsum(-1)                           # log of the decay since the chunk began
        Q = decay.size(-1)
        later = torch.ones(Q, Q, dtype=torch.bool, device=x.device).tril()
        between = (decay[..., :, None] - decay[..., None, :]).masked_fill(~later, float("-inf")).exp()
        weights = Cs @ Bs.mT * between * dts[..., None, :]
        out.append(weights @ xs + decay.exp().unsqueeze(-1) * (Cs @ state.mT))
        left = (decay[..., -1:] - decay).exp() * dts
        state = decay[..., -1, None, None].exp() * state + (xs * left.unsqueeze(-1)).mT @ Bs
    return torch.cat(out, dim=2).transpose(1, 2), state


class GatedNorm(nn.Module):
    """RMSNorm of y * silu(z) over each group of channels, fp32."""

    def __init__(self, size, groups):
        super().__init__()
        self.weight, self.groups = nn.Parameter(torch.ones(size)), groups

    def forward(self, y, z):
        v = (y * F.silu(z.float())).unflatten(-1, (self.groups, -1))
        return (v * (v.square().mean(-1, keepdim=True) + MAMBA_EPS).rsqrt()).flatten(-2) * self.weight.float()


class Mamba2(nn.Module):
    """The Mamba-2 mixer, with the parameter names of mamba_ssm. Its recurrence is computed in fp32."""

    def __init__(self, config):
        super().__init__()
        self.inner, self.state = config.mamba_expand * config.n_embd, config.mamba_d_state
        self.groups, self.heads = self.inner // config.mamba_group_width, self.inner // config.mamba_headdim
        self.channels, self.taps = self.inner + 2 * self.groups * self.state, config.mamba_d_conv
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.zeros(self.heads)) for _ in range(3))
        self.in_proj = nn.Linear(config.n_embd, self.inner + self.channels + self.heads, bias=False)
        self.conv1d = nn.Conv1d(self.channels, self.channels, self.taps, groups=self.channels)
        self.norm = GatedNorm(self.inner, self.groups)
        self.out_proj = nn.Linear(self.inner, config.n_embd, bias=False)

    def forward(self, u, counts, memory):
        """u (B, T, D), of which counts[r] tokens of row r are valid (None: all) -> (B, T, D)."""
        B, T, _ = u.shape
        z, xBC, dt = self.in_proj(u).split([self.inner, self.channels, self.heads], dim=-1)
        dt = F.softplus(dt.float() + self.dt_bias.float())
        if counts is not None:  # dt = 0 leaves the state as it is
            dt = dt.masked_fill((torch.arange(T, device=u.device) >= counts[:, None]).unsqueeze(-1), 0)
        memory = {} if memory is None else memory
        past = memory.get("conv", xBC.new_zeros(B, self.taps - 1, self.channels))
        state = memory.get("ssm", dt.new_zeros(B, self.heads, self.inner // self.heads, self.state))
        window = torch.cat((past, xBC), dim=1)
        ends = torch.full((B,), T, device=u.device) if counts is None else counts
        last = ends[:, None] + torch.arange(self.taps - 1, device=u.device)
        memory["conv"] = window.gather(1, last.unsqueeze(-1).expand(-1, -1, self.channels))
        act = F.conv1d(window.float().mT, self.conv1d.weight.float(), self.conv1d.bias.float(), groups=self.channels)
        x, Bs, Cs = F.silu(act.mT).split([self.inner, self.groups * self.state, self.groups * self.state], dim=-1)
        x = x.unflatten(-1, (self.heads, -1))
        Bs, Cs = (t.unflatten(-1, (self.groups, -1)).repeat_interleave(self.heads // self.groups, dim=2) for t in (Bs, Cs))
        y, memory["ssm"] = scan(x, dt, -self.A_log.float().exp(), Bs, Cs, state)
        y = (y + x * self.D.float()[:, None]).flatten(-2)
        return self.out_proj(self.norm(y, z).to(u.dtype))


class AdambaAttentionBlock(nn.Module):
    """Attention, then MLP, at width d."""

    def __init__(self, config, value_embedding):
        super().__init__()
        self.attn, self.mlp = Attention(config, value_embedding), MLP(config)

    def forward(self, x, d, rope, positions, mask, value, memory, size):
        x = add(x, self.attn(x, d, rope, positions, mask, value, memory, size))
        return add(x, self.mlp(x, d))


class AdambaMambaBlock(nn.Module):
    """A Mamba-2 mixer at full width, then MLP at width d."""

    def __init__(self, config):
        super().__init__()
        self.d_ref, self.eps = config.d_ref, config.norm_eps
        self.mamba, self.mlp = Mamba2(config), MLP(config)

    def forward(self, x, d, counts, memory):
        x = x + self.mamba(norm(x, self.d_ref, self.eps), counts, memory)
        return add(x, self.mlp(x, d))


class AdambaForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model. The networks of mode 'auto' (gate, predictor) are in the files, and not used here."""
    config_class = AdambaConfig
    base_model_prefix = ""
    _no_split_modules = ["AdambaAttentionBlock", "AdambaMambaBlock"]
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias", "D", "conv1d", "norm"]
    _keys_to_ignore_on_load_unexpected = [r"^gate\.", r"^predictor\."]
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        per, c = 2 if config.hybrid else 1, config
        self.tables = [i for i in range(c.n_layer) if (c.hybrid or c.value_embeds) and (c.n_layer - 1 - i) % 2 == 0]
        blocks = []
        for i in range(c.n_layer):
            blocks.append(AdambaAttentionBlock(c, i in self.tables))
            if c.hybrid:
                blocks.append(AdambaMambaBlock(c))
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(c.vocab_size, c.n_embd), "h": nn.ModuleList(blocks)})
        self.value_embeds = nn.ModuleDict({
            str(per * i): nn.Embedding(c.vocab_size, blocks[per * i].attn.c_v.out_features) for i in self.tables})
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer["wte"]

    def get_output_embeddings(self):
        return self.lm_head

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False  # it brings its own

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, cache=None, past_key_values=None, use_cache=True,
                                      logits_to_keep=None, **kwargs):
        memory = cache if cache is not None else past_key_values
        new = input_ids if memory is None else input_ids[:, memory.columns:]
        inputs = {"input_ids": new, "attention_mask": attention_mask, CACHE: memory, "use_cache": use_cache}
        return inputs if logits_to_keep is None else inputs | {"logits_to_keep": logits_to_keep}

    def forward(self, input_ids, attention_mask=None, cache=None, past_key_values=None, use_cache=None, labels=None,
                logits_to_keep=0, **kwargs):
        """
        input_ids (B, T) int64; attention_mask (B, columns so far) with 0 for padding, wherever it stands. Returns logits
        (B, T, vocab), fp32 (of the last `logits_to_keep` columns, if not 0); with labels (B, T), -100 for none, also the
        mean cross-entropy in nats of predicting each label from the tokens before it.
        """
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError("Adamba takes input_ids: its value embeddings are looked up by token")
        memory = cache if cache is not None else past_key_values
        compute = self.config.level(), self.config.depth()
        if memory is None and (self.config.use_cache if use_cache is None else use_cache):
            memory = AdambaCache(len(input_ids), self.config.n_block, input_ids.device, compute)
        if memory is not None and memory.compute != compute:
            raise ValueError(f"the cache was made at (width, depth) {memory.compute}, and the config now says {compute}: "
                             "start again without it")
        counts, back = None, None
        if attention_mask is not None:
            valid = attention_mask[:, -input_ids.size(1):].to(input_ids.device).bool()
            if attention_mask.dim() != 2 or valid.shape != input_ids.shape:
                raise ValueError(f"attention_mask of shape {tuple(attention_mask.shape)} does not fit: give (rows, columns)")
            if not bool(valid.all()):
                order = (~valid).long().argsort(dim=1, stable=True)
                input_ids, counts, back = input_ids.gather(1, order), valid.sum(1), (valid.cumsum(1) - 1).clamp(min=0)
        h = self.hidden(input_ids, counts, memory, *compute)
        if back is not None:
            h = h.gather(1, back.to(h.device).unsqueeze(-1).expand_as(h))
        if isinstance(logits_to_keep, int):
            h = h[:, -logits_to_keep:] if logits_to_keep else h
        else:
            h = h[:, logits_to_keep]
        cap = self.config.softcap
        logits = cap * torch.tanh(self.lm_head(h).float() / cap)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device))
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: memory})

    def hidden(self, ids, counts, cache, width, depth):
        """ids (B, T), of which counts[r] of row r are valid (None: all) -> the normed last states (B, T, D)."""
        c, (B, T), per = self.config, ids.shape, 2 if self.config.hybrid else 1
        start = ids.new_zeros(B) if cache is None else cache.lengths
        positions = start[:, None] + torch.arange(T, device=ids.device)
        size = T if cache is None else int(start.max()) + T
        rope, masks = rope_tables(positions, c.head_dim, c.rope_base), {}

        def mask_of(window):
            """(B, 1, T, size) bool: a token sees those up to itself, and so many before; None for plain causal attention."""
            window = 0 if window >= size - 1 else window
            if window not in masks:
                keys = torch.arange(size, device=ids.device)
                seen = keys <= positions.unsqueeze(-1)
                if window:
                    seen &= keys >= positions.unsqueeze(-1) - window
                plain = not window and (size == T or (T == 1 and bool((start == start[0]).all())))
                masks[window] = None if plain else seen.unsqueeze(1)
            return masks[window]
        x = norm(self.transformer["wte"](ids), c.d_ref, c.norm_eps)
        if len(c.smear_gate):
            x = self.smear(x, counts, cache)
        first, middle = x, None
        backout = per * min(c.n_layer // 2 + 1, c.n_layer) if c.backout_lambda else None
        for i, block in enumerate(self.transformer["h"][:depth]):
            memory = None if cache is None else cache.blocks[i]
            layer = i // per
            if i % per:
                x = block(x, width, counts, memory)
            else:
                if len(c.x0_lambdas) and c.x0_lambdas[layer]:
                    x = x + c.x0_lambdas[layer] * first.to(x.device)
                value = self.value_embeds[str(i)](ids) if layer in self.tables else None
                window = c.windows[layer] if len(c.windows) else 0
                x = block(x, width, rope, positions, mask_of(window), value, memory, size)
            if i + 1 == backout:
                middle = x
        if middle is not None:
            x = x - c.backout_lambda * middle.to(x.device)
        if cache is not None:
            cache.lengths = start + (T if counts is None else counts)
            cache.columns += T
        return norm(x, c.d_ref, c.norm_eps)

    def smear(self, x, counts, cache):
        """x (B, T, D), with a share of the embedding of the token before added to each."""
        B, T, _ = x.shape
        before = x[:, :1] * 0 if cache is None or cache.embedding is None else cache.embedding
        before = torch.cat((before, x), dim=1)
        if cache is not None:
            ends = torch.full((B,), T, device=x.device) if counts is None else counts
            cache.embedding = before.gather(1, ends[:, None, None].expand(-1, 1, x.size(-1)))
        gate = torch.tensor(self.config.smear_gate, device=x.device, dtype=x.dtype)
        share = self.config.smear_lambda * torch.sigmoid(x[..., :SMEAR_DIMS] @ gate)
        return x + share.unsqueeze(-1) * before[:, :T]
