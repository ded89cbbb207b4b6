"""
Generation: prefill the prompts in one pass, then decode token by token from the cache. The rows of a batch are
independent: each has its own length, width, exit depth, seed and end.

    engine = Engine(model, tokenizer)
    for token in engine.generate(prompt_ids, max_tokens=100, mode="normal", temperature=0.8, top_k=50, seed=1): ...
    for pairs in engine.stream([prompt_a, prompt_b], max_tokens=100, mode=["think", "ghost"]): ...
"""
import codecs
import functools
from collections.abc import Iterable, Iterator

import torch

from nanochat.cache import MatryoshkaKVCache
from nanochat.common import get_compute_dtype
from nanochat.mamba_block import FP32_PARAMS


def prepare_inference(model, device_type: str, dtype: torch.dtype | None = None) -> None:
    """
    Casts, in place, the weights to `dtype` (None: the one that the device computes in), except the SSM parameters that
    stay fp32, so that decoding does not cast them anew for every token. The model cannot be trained on afterwards.
    """
    dtype = dtype or get_compute_dtype(device_type)
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

    def generate(self, prompt: list[int], max_tokens: int, **options) -> Iterator[int]:
        """The tokens that follow one prompt, one by one; options as in `stream`."""
        for pairs in self.stream([prompt], max_tokens, **options):
            yield from (token for _, token in pairs)

    @torch.inference_mode()
    def stream(self, prompts: list[list[int]], max_tokens: int, mode=None, depth=None, temperature: float = 1.0,
               top_k: int | None = None, top_p: float | None = None, seed: int = 0, stop: Iterable[int] = (),
               overflow: str = "stop", control=None) -> Iterator[list[tuple[int, int]]]:
        """
        Yields, a step at a time, [(row, token id), ...] of the rows that are still going; a row ends after max_tokens
        or before a token in `stop`.

        mode: a mode name or width (None: full) for all rows, or a list with one per row.
        depth: after how many blocks generated tokens exit (None: none does; prompts run all blocks), likewise.
        seed: row r draws with seed + r, so a row does not depend on the others.
        overflow: where a row fills the model's context, 'stop' ends it, 'slide' goes on from the last half of it.
        control: the trained controls, for mode 'auto': control.plan(prompts) gives the widths (rows, n_block), and
        control(rows, i, x, exits, levels) is GPT.hidden's, for these rows.
        ValueError for an empty prompt, one that leaves no room, or options out of range.
        """
        model, n = self.model, len(prompts)
        limit, n_block = model.config.sequence_len, model.config.n_block
        modes, depths = _per_row(mode, n, "modes"), _per_row(depth, n, "depths")
        if overflow not in ("stop", "slide"):
            raise ValueError(f"overflow is '{overflow}': choose 'stop' or 'slide'")
        for prompt in prompts:
            if not prompt:
                raise ValueError("the prompt is empty: give at least one token, such as <|bos|>")
            if len(prompt) >= limit:
                raise ValueError(f"the prompt has {len(prompt)} tokens, but the model's context is {limit}: shorten it")
        for d in depths:
            if d is not None and not 1 <= d <= n_block:
                raise ValueError(f"depth {d} is out of range: this model has {n_block} blocks")
        if "auto" in modes:
            if modes != ["auto"] * n:
                raise ValueError("mode 'auto' cannot be mixed with others in one batch: run those prompts apart")
            if control is None:
                raise ValueError("mode 'auto' needs trained controls, and this checkpoint has none: choose ghost, "
                                 "whisper, normal or think")
            widths = control.plan(prompts)
        else:
            control = None
            widths = torch.tensor([model.resolve_widths(m) for m in modes])  # (rows, n_block)
        exits = torch.tensor([[n_block if d is None else d] for d in depths])
        stop, device = set(stop), model.device
        text = [list(p) for p in prompts]
        left = [max_tokens] * n
        generators = [torch.Generator(device=device).manual_seed(seed + r) for r in range(n)]
        length = limit if overflow == "slide" else min(limit, max(map(len, prompts)) + max_tokens)

        if max_tokens < 1:
            return
        live = list(range(n))
        cache = MatryoshkaKVCache(model, n, length)
        h = self._prefill(text, widths, cache)
        while live:
            tokens = self._sample(model.logits(h), [generators[r] for r in live], temperature, top_k, top_p)
            stay, pairs = [], []
            for i, (r, token) in enumerate(zip(live, tokens)):
                if token in stop:
                    continue
                pairs.append((r, token))
                text[r].append(token)
                left[r] -= 1
                if left[r] > 0 and (cache.pos[i] < length or overflow == "slide"):
                    stay.append(i)
            if pairs:
                yield pairs
            if not stay:
                return
            if len(stay) < len(live):
                cache.keep(stay)
                live = [live[i] for i in stay]
            full = [i for i, p in enumerate(cache.pos) if p == length]
            for i in full:  # slide: the row starts again from the last half of its context, the newest token apart
                fresh = MatryoshkaKVCache(model, 1, length)
                r = live[i]
                self._prefill([text[r][-max(2, limit // 2):-1]], widths[r:r + 1], fresh)
                cache.append(fresh)
            if full:
                rows = [i for i in range(len(live)) if i not in full]
                cache.keep(rows + list(range(len(live), len(live) + len(full))))
                live = [live[i] for i in rows + full]
            idx = torch.tensor([text[r][-1:] for r in live], device=device)
            decide = None if control is None else functools.partial(control, live)
            h = model.hidden(idx, widths[live], None if bool((exits[live] == n_block).all()) else exits[live], cache,
                             control=decide)[:, -1]

    def _prefill(self, texts: list[list[int]], widths, cache) -> torch.Tensor:
        """Runs the texts, of different lengths, into the cache; the hidden state (B, D) of each one's last token."""
        lengths = [len(t) for t in texts]
        longest = max(lengths)
        idx = torch.tensor([t + [0] * (longest - len(t)) for t in texts], device=self.model.device)
        h = self.model.hidden(idx, widths, cache=cache, lengths=lengths if min(lengths) < longest else None)
        return h[torch.arange(len(texts)), torch.tensor(lengths) - 1]

    def _sample(self, logits, generators, temperature, top_k, top_p) -> list[int]:
        if temperature == 0:
            return sample(logits, 0, top_k, top_p, None).tolist()
        return [int(sample(logits[i:i + 1], temperature, top_k, top_p, g)) for i, g in enumerate(generators)]

    def stream_text(self, tokens: Iterable[int]) -> Iterator[str]:
        """Token ids -> pieces of text as soon as they are whole characters."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            yield decoder.decode(self.tokenizer.id_to_bytes(token))
        yield decoder.decode(b"", final=True)


def _per_row(value, n: int, what: str) -> list:
    """One value for all rows, or a list with one per row."""
    values = value if isinstance(value, list) else [value] * n
    if len(values) != n:
        raise ValueError(f"{len(values)} {what} were given for {n} prompts")
    return values
