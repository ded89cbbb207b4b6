"""
Generation: prefill a prompt in one pass, then decode token by token from the cache, at a chosen width.

    engine = Engine(model, tokenizer)
    for token in engine.generate(prompt_ids, max_tokens=100, mode="normal", temperature=0.8, top_k=50, seed=1): ...
"""
import codecs
from collections.abc import Iterable, Iterator

import torch

from nanochat.cache import MatryoshkaKVCache
from nanochat.common import get_compute_dtype
from nanochat.mamba_block import FP32_PARAMS


def prepare_inference(model, device_type: str) -> None:
    """
    Casts, in place, the weights to the dtype that the device computes in, except the SSM parameters that stay fp32, so
    that decoding does not cast them anew for every token. The model cannot be trained on afterwards.
    """
    dtype = get_compute_dtype(device_type)
    for name, p in model.named_parameters():
        p.requires_grad_(False)
        if not (".mamba." in name and name.endswith(FP32_PARAMS)):
            p.data = p.data.to(dtype)
    model.compute_dtype = dtype
    model.to(device_type).eval()


@torch.no_grad()
def sample(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None,
           generator: torch.Generator | None) -> torch.Tensor:
    """
    logits (B, V) -> token ids (B,). temperature 0 is greedy. top_k keeps the k likeliest, top_p the smallest set of
    likeliest tokens that holds that much probability. ValueError for values out of range.
    """
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f"temperature {temperature} must be >= 0, top-k {top_k} >= 1, top-p {top_p} in (0, 1]")
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1)), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p is not None:
        ranked, order = logits.sort(dim=-1, descending=True)
        probs = ranked.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= top_p  # the mass before this token suffices already
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


class Engine:
    """Decodes with a model and a tokenizer. `model` should have been through `prepare_inference`."""
    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    @torch.inference_mode()
    def generate(self, prompt: list[int], max_tokens: int, mode="think", temperature: float = 1.0,
                 top_k: int | None = None, top_p: float | None = None, seed: int = 0,
                 stop: Iterable[int] = ()) -> Iterator[int]:
        """
        Yields up to max_tokens token ids after `prompt` (at least one id), and none from a token in `stop` on. It ends
        early where the model's context is full. ValueError for an empty prompt, one that leaves no room, or a mode
        that the model does not have.
        """
        length = self.model.config.sequence_len
        if not prompt:
            raise ValueError("the prompt is empty: give at least one token, such as <|bos|>")
        if len(prompt) >= length:
            raise ValueError(f"the prompt has {len(prompt)} tokens, but the model's context is {length}: shorten it")
        widths = self.model.resolve_widths(mode)
        stop = set(stop)
        cache = MatryoshkaKVCache(self.model, 1, min(length, len(prompt) + max_tokens))
        generator = torch.Generator(device=self.model.device).manual_seed(seed)
        idx = torch.tensor([prompt], device=self.model.device)
        for i in range(max_tokens):
            h = self.model.hidden(idx, widths, cache=cache)[:, -1:]  # only the last position needs the head
            token = int(sample(self.model.logits(h)[:, 0], temperature, top_k, top_p, generator))
            if token in stop:
                return
            yield token
            if cache.pos[0] == cache.length or i + 1 == max_tokens:
                return
            idx = torch.tensor([[token]], device=self.model.device)

    def stream_text(self, tokens: Iterable[int]) -> Iterator[str]:
        """Token ids -> pieces of text as soon as they are whole characters."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            yield decoder.decode(self.tokenizer.id_to_bytes(token))
        yield decoder.decode(b"", final=True)
