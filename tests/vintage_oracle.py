"""
nanochat's forward pass, of every vintage, written the plain way from its formulas, and small random checkpoints of each: the
oracle of test_vintages.py. It shares nothing with the package.
"""
import math

import torch
import torch.nn.functional as F

# RoPE base, cap of the logits, factor on q and k, factor of the value embeddings' gate and its channels, short window at T
CONSTANTS = {
    "A": (1e4, 15.0, 1.0, None, None, None),
    "A'": (1e4, 15.0, 1.0, None, None, None),
    "B": (1e4, 15.0, 1.0, None, None, None),
    "C": (1e4, 15.0, 1.0, None, None, lambda T: T // 2),
    "D": (1e4, 15.0, 1.0, 2.0, 32, lambda T: T // 2),
    "E": (1e4, 20.0, 1.0, 2.0, 32, lambda T: T // 2),
    "F": (1e5, 15.0, 1.15, 3.0, 12, lambda T: 128 * math.ceil(T / 3 / 128)),
    "G": (1e5, 15.0, 1.2, 3.0, 12, lambda T: 128 * math.ceil(T / 4 / 128)),
}


def checkpoint(vintage: str, layers: int = 4, heads: int = 2, kv_heads: int = 2, head_dim: int = 32, vocab: int = 300,
               context: int = 288, pattern: str = "SSSL", seed: int = 0) -> tuple[dict, dict]:
    """(state dict, model_config) as that nanochat would have saved them, every weight random."""
    g = torch.Generator().manual_seed(seed)
    D, KV = heads * head_dim, kv_heads * head_dim
    rows = vocab if vintage == "A" else math.ceil(vocab / 64) * 64

    def random(*shape, std=None):
        return torch.randn(*shape, generator=g) * (shape[-1] ** -0.5 if std is None else std)
    state = {"transformer.wte.weight": random(rows, D, std=1.0), "lm_head.weight": random(rows, D)}
    for i in range(layers):
        h = f"transformer.h.{i}."
        state |= {h + "attn.c_q.weight": random(D, D), h + "attn.c_k.weight": random(KV, D),
                  h + "attn.c_v.weight": random(KV, D), h + "attn.c_proj.weight": random(D, D),
                  h + "mlp.c_fc.weight": random(4 * D, D), h + "mlp.c_proj.weight": random(D, 4 * D)}
    fields = {"sequence_len": context, "vocab_size": vocab, "n_layer": layers, "n_head": heads, "n_kv_head": kv_heads,
              "n_embd": D}
    if vintage in "BCDEFG":
        state["resid_lambdas"] = 1 + 0.2 * torch.rand(layers, generator=g)
        state["x0_lambdas"] = 0.3 * torch.rand(layers, generator=g) - 0.1
    if vintage in "CDEFG":
        fields["window_pattern"] = pattern
    if vintage in "DEFG":
        for i in range(layers):
            if i % 2 == (layers - 1) % 2:
                state[f"value_embeds.{i}.weight"] = random(rows, KV, std=0.5)
                state[f"transformer.h.{i}.attn.ve_gate.weight"] = random(kv_heads, CONSTANTS[vintage][4], std=0.3)
    if vintage == "G":
        state |= {"smear_gate.weight": random(1, 24), "smear_lambda": torch.tensor([0.6]),
                  "backout_lambda": torch.tensor([0.25])}
    return state, fields


def rms(x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 2.0 ** -23)


def rotate(x, base):
    """x (T, head_dim), at positions 0, 1, ...: halves rotated by -theta."""
    T, hd = x.shape
    theta = torch.arange(T, dtype=x.dtype)[:, None] / base ** (torch.arange(0, hd, 2, dtype=x.dtype) / hd)
    a, b = x[:, :hd // 2], x[:, hd // 2:]
    return torch.cat((a * theta.cos() + b * theta.sin(), b * theta.cos() - a * theta.sin()), 1)


def attention(u, ids, i, state, fields, vintage):
    """One layer's attention on u (T, D), a head at a time."""
    base, _, factor, gain, channels, short = CONSTANTS[vintage]
    T, n, n_kv, L = len(u), fields["n_head"], fields["n_kv_head"], fields["n_layer"]
    hd, w = fields["n_embd"] // n, {k: state[f"transformer.h.{i}.attn.{k}.weight"] for k in ("c_q", "c_k", "c_v", "c_proj")}
    pattern = fields.get("window_pattern", "L")
    window = short(fields["sequence_len"]) if pattern[i % len(pattern)] == "S" and i < L - 1 else T
    out = []
    for head in range(n):
        own, kv = slice(head * hd, (head + 1) * hd), head * n_kv // n
        shared = slice(kv * hd, (kv + 1) * hd)
        q, k, v = u @ w["c_q"][own].T, u @ w["c_k"][shared].T, u @ w["c_v"][shared].T
        if f"value_embeds.{i}.weight" in state:
            gate = gain * torch.sigmoid(u[:, :channels] @ state[f"transformer.h.{i}.attn.ve_gate.weight"][kv])
            v = v + gate[:, None] * state[f"value_embeds.{i}.weight"][ids][:, shared]
        q, k = rms(rotate(q, base)) * factor, rms(rotate(k, base)) * factor
        scores, far = q @ k.T / hd ** 0.5, torch.arange(T)[:, None] - torch.arange(T)
        out.append(scores.masked_fill((far < 0) | (far > window), -math.inf).softmax(-1) @ v)
    return torch.cat(out, 1) @ w["c_proj"].T


@torch.no_grad()
def logits(state: dict, fields: dict, vintage: str, ids: torch.Tensor) -> torch.Tensor:
    """The logits (T, vocab) of one sequence ids (T,), in the dtype of the state's tensors."""
    L, cap = fields["n_layer"], CONSTANTS[vintage][1]
    x = rms(state["transformer.wte.weight"][ids])
    if vintage == "G":
        gate = state["smear_lambda"] * torch.sigmoid(x[1:, :24] @ state["smear_gate.weight"][0])
        x = torch.cat((x[:1], x[1:] + gate[:, None] * x[:-1]))
    first, middle = x, None
    for i in range(L):
        if "resid_lambdas" in state:
            x = state["resid_lambdas"][i] * x + state["x0_lambdas"][i] * first
        x = x + attention(rms(x), ids, i, state, fields, vintage)
        h = f"transformer.h.{i}.mlp."
        x = x + F.relu(rms(x) @ state[h + "c_fc.weight"].T).square() @ state[h + "c_proj.weight"].T
        if i == L // 2:
            middle = x
    if vintage == "G":
        x = x - state["backout_lambda"] * middle
    out = rms(x) @ state["lm_head.weight"].T
    return (cap * torch.tanh(out / cap))[:, :fields["vocab_size"]]
