"""
What a sequence leaves behind for its next tokens: keys and values of every attention block (MatryoshkaKVCache) and
the convolution and SSM state of every Mamba block, in one object of bounded size that is allocated once.
"""
import torch


class KVView:
    """One attention block's keys and values, (B, kv heads, length, head_dim), filled up to the cache's position."""
    def __init__(self, owner, k, v):
        self.owner, self.k, self.v = owner, k, v

    def update(self, k: torch.Tensor, v: torch.Tensor):
        """
        k, v (B, h, T, head_dim) of the next T tokens, at whatever width they were computed. Returns the first h heads
        of all positions so far (h, as the width does not change within a sequence) and the attention mask, None where
        a query may see all of them.
        """
        start, h, T = self.owner.pos, k.size(1), k.size(2)
        self.k[:, :h, start:start + T] = k
        self.v[:, :h, start:start + T] = v
        mask = None
        if T > 1:
            end = torch.arange(start, start + T, device=k.device)
            mask = torch.arange(start + T, device=k.device) <= end[:, None]  # (T, start + T)
        return self.k[:, :h, :start + T], self.v[:, :h, :start + T], mask


class MatryoshkaKVCache:
    """
    Preallocated memory for `batch` sequences of up to `length` tokens. cache[i] is block i's part; pos counts the
    tokens that it holds. Keys and values are in the dtype of the model's activations, SSM states in fp32.
    """
    def __init__(self, model, batch: int, length: int):
        c, dtype, device = model.config, model.compute_dtype, model.device
        if length > c.sequence_len:
            raise ValueError(f"a cache of {length} tokens exceeds the model's context of {c.sequence_len}")
        self.pos, self.length = 0, length
        self.parts = []
        for block in model.transformer.h:
            if block.kind == "attention":
                shape = (batch, c.n_kv_head, length, c.head_dim)
                self.parts.append(KVView(self, torch.zeros(shape, dtype=dtype, device=device),
                                         torch.zeros(shape, dtype=dtype, device=device)))
            else:
                self.parts.append(block.mamba.new_state(batch, device, dtype))

    def __getitem__(self, i: int):
        return self.parts[i]

    def advance(self, n: int) -> None:
        assert self.pos + n <= self.length, "the model wrote past the end of its cache"
        self.pos += n
