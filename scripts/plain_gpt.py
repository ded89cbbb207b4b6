"""
The yardstick of scripts/bench.py: the same base GPT written the plain way, as nanochat writes it, with nothing but
torch's own operators. It loads our weights, so both compute the same function.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


def rms(x):
    return F.rms_norm(x, (x.size(-1),))


class PlainGPT(nn.Module):
    """base GPT of `config`; weights are cast to the activations' dtype at each use, as in nanochat's training."""
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        shapes = {"c_q": (1, 1), "c_k": (1, 1), "c_v": (1, 1), "c_proj": (1, 1), "fc": (4, 1), "proj": (1, 4)}
        self.h = nn.ModuleList(nn.ModuleDict({k: nn.Linear(i * c.n_embd, o * c.n_embd, bias=False)
                                              for k, (o, i) in shapes.items()}) for _ in range(c.n_layer))
        angle = torch.outer(torch.arange(c.sequence_len).float(),
                            c.rope_base ** -(torch.arange(0, c.head_dim, 2).float() / c.head_dim))
        self.register_buffer("cos", angle.cos()[:, None], persistent=False)
        self.register_buffer("sin", angle.sin()[:, None], persistent=False)

    @torch.no_grad()
    def load(self, gpt):
        """Copies the weights of a nanochat.gpt.GPT."""
        self.wte.weight.copy_(gpt.transformer.wte.weight)
        self.lm_head.weight.copy_(gpt.lm_head.weight)
        for mine, block in zip(self.h, gpt.transformer.h):
            for name in ("c_q", "c_k", "c_v", "c_proj"):
                mine[name].weight.copy_(getattr(block.attn, name).weight)
            mine["fc"].weight.copy_(block.mlp.c_fc.weight)
            mine["proj"].weight.copy_(block.mlp.c_proj.weight)
        return self

    def forward(self, idx, targets=None, cache=None, pos=0, dtype=torch.float32):
        """Loss with targets, else logits; cache: a list of (k, v) buffers (B, H, length, hd), filled up to `pos`."""
        c, (B, T) = self.config, idx.shape
        cos, sin = (t[pos:pos + T].to(dtype) for t in (self.cos, self.sin))

        def linear(layer, x):
            return F.linear(x, layer.weight.to(x.dtype))

        def rope(x):
            x1, x2 = x.chunk(2, -1)
            return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), -1)
        x = rms(self.wte(idx).to(dtype))
        for i, h in enumerate(self.h):
            u = rms(x)
            q, k, v = (linear(h[n], u).view(B, T, c.n_head, c.head_dim) for n in ("c_q", "c_k", "c_v"))
            q, k, v = (t.transpose(1, 2) for t in (rms(rope(q)), rms(rope(k)), v))
            if cache is not None:
                cache[i][0][:, :, pos:pos + T], cache[i][1][:, :, pos:pos + T] = k, v
                k, v = cache[i][0][:, :, :pos + T], cache[i][1][:, :, :pos + T]
            y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
            x = x + linear(h["c_proj"], y.transpose(1, 2).reshape(B, T, c.n_embd))
            x = x + linear(h["proj"], F.relu(linear(h["fc"], rms(x))).square())
        logits = linear(self.lm_head, rms(x)).float()
        logits = c.softcap * torch.tanh(logits / c.softcap)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
