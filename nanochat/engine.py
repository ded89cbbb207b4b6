"""
Generation: prefill the prompts in one pass, then decode token by token from the cache. The rows of a batch are
independent: each has its own length, width, exit depth, seed and end.

    engine = Engine(model, tokenizer)
    for token in engine.generate(prompt_ids, max_tokens=100, mode="normal", temperature=0.8, top_k=50, seed=1): ...
    for pairs in engine.stream([prompt_a, prompt_b], max_tokens=100, mode=["think", "ghost"]): ...
    for token in engine.generate(prompt_ids, max_tokens=100, mode="auto", budget=0.6): ...
    engine.traces[0].flops(model)     # what the last answer cost
"""
import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from nanochat.cache import MatryoshkaKVCache
from nanochat.common import get_compute_dtype
from nanochat.confidence_probe import Controls, check_trained, pad
from nanochat.hybrid_gpt import stays_fp32
from nanochat.matryoshka import token_flops


def prepare_inference(model, device_type: str, dtype: torch.dtype | None = None) -> None:
    """
    Casts, in place, the weights to `dtype` (None: the one that the device computes in), except the SSM parameters and the
    controls, which stay fp32, so that decoding does not cast them anew for every token. The model cannot be trained on
    afterwards.
    """
    dtype = dtype or get_compute_dtype(device_type)
    for name, p in model.named_parameters():
        p.requires_grad_(False)
        if not stays_fp32(name):
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


@dataclass
class Trace:
    """
    How one answer was computed: the prompt's length and widths per block, and for each generated token the depth and the
    widths per block at which it was computed. auto: the controls decided, whose own compute counts too.
    """
    prompt_tokens: int
    widths: tuple[int, ...]
    auto: bool = False
    steps: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)

    def flops(self, model) -> dict[str, float]:
        """
        FLOPs of 'prompt' (all of it but its last token, and the predictor), of 'generated' (the passes that the generated
        tokens came from: the prompt's last token, then all generated ones but the last), memory writes of exited tokens and
        control networks included, and of the same passes at 'full_prompt' and 'full_generated' compute.
        """
        n, m, config = self.prompt_tokens - 1, len(self.steps), model.config
        context = torch.arange(1, n + m + 1)
        depth = torch.tensor([config.n_block] * n + [d for d, _ in self.steps])
        widths = torch.tensor([self.widths] * n + [w for _, w in self.steps])
        full = token_flops(model, torch.full_like(depth, config.n_block), torch.full_like(widths, config.top_width), context)
        prompt = token_flops(model, depth[:n], widths[:n], context[:n])
        generated = token_flops(model, depth[n:], widths[n:], context[n:], model.gate.flops if self.auto else 0)
        return {"prompt": float(prompt.sum()) + (model.predictor.flops(self.prompt_tokens) if self.auto else 0),
                "generated": float(generated.sum()),
                "full_prompt": float(full[:n].sum()), "full_generated": float(full[n:].sum())}


class Engine:
    """
    Decodes with a model and a tokenizer. `model` should have been through `prepare_inference`. calibration: what
    fractal_eval --calibrate stored beside it, for mode 'auto'. traces: one Trace for each row of the last call.
    """
    def __init__(self, model, tokenizer, calibration: dict | None = None):
        self.model, self.tokenizer, self.calibration, self.traces = model, tokenizer, calibration, []

    def generate(self, prompt: list[int], max_tokens: int, **options) -> Iterator[int]:
        """The tokens that follow one prompt, one by one; options as in `stream`."""
        for pairs in self.stream([prompt], max_tokens, **options):
            yield from (token for _, token in pairs)

    def answers(self, prompts: list[list[int]], max_tokens: int, **options) -> list[list[int]]:
        """The whole answers to prompts, in one batch; options as in `stream`."""
        out = [[] for _ in prompts]
        for pairs in self.stream(prompts, max_tokens, **options):
            for row, token in pairs:
                out[row].append(token)
        return out

    @torch.inference_mode()
    def stream(self, prompts: list[list[int]], max_tokens: int, mode=None, depth=None, temperature: float = 1.0,
               top_k: int | None = None, top_p: float | None = None, seed: int = 0, stop: Iterable[int] = (),
               overflow: str = "stop", budget: float | None = None, control=None) -> Iterator[list[tuple[int, int]]]:
        """
        Yields, a step at a time, [(row, token id), ...] of the rows that are still going; a row ends after max_tokens
        or before a token in `stop`.

        mode: a mode name or width (None: full) for all rows, or a list with one per row; 'auto' for all: the predictor
        picks each row's widths, the gate each token's exit and when a row expands.
        depth: after how many blocks generated tokens exit (None: none does; prompts run all blocks), likewise. The pass
        over the prompt's last token is the first that generates: it exits like the others.
        seed: row r draws with seed + r, so a row does not depend on the others.
        overflow: where a row fills the model's context, 'stop' ends it, 'slide' goes on from the last half of it.
        budget: for 'auto', see Controls. control: Controls to use instead of the model's own.
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
                check_trained(model)
                control = Controls(model, budget, calibration=self.calibration)
            widths = control.plan(prompts)
        elif budget is not None or control is not None:
            raise ValueError("a budget has an effect in mode 'auto' only: choose it, or leave the budget away")
        else:
            widths = torch.tensor([model.resolve_widths(m) for m in modes])  # (rows, n_block)
        exits = torch.tensor([[n_block if d is None else d] for d in depths])
        stop, device = set(stop), model.device
        text = [list(p) for p in prompts]
        left = [max_tokens] * n
        generators = [torch.Generator(device=device).manual_seed(seed + r) for r in range(n)]
        length = limit if overflow == "slide" else min(limit, max(map(len, prompts)) + max_tokens)

        if max_tokens < 1:
            return
        self.traces = [Trace(len(p), tuple(w), control is not None) for p, w in zip(prompts, widths.tolist())]
        live = list(range(n))
        cache = MatryoshkaKVCache(model, n, length)

        before, levels = None, None

        def step():
            nonlocal before, levels
            idx = torch.tensor([text[r][-1:] for r in live], device=device)
            now = (widths if control is None else control.widths)[live]
            if before is None or not torch.equal(now, before):
                before, levels = now, model.resolve_widths(now)
            ran = [None if bool((exits[live] == n_block).all()) else exits[live], levels]

            def decide(i, x, exits, levels):
                ran[:] = control(live, i, x, exits, levels)
                return ran
            h = model.hidden(idx, levels, ran[0], cache, control=control and decide)[:, -1]
            depths = [n_block] * len(live) if ran[0] is None else ran[0][:, 0].tolist()
            for i, (r, d) in enumerate(zip(live, depths)):
                at = tuple(w if isinstance(w, int) else int(w.expand(len(live), 1)[i, 0]) for w in ran[1])
                self.traces[r].steps.append((d, at))
            return h
        if control is None and exits.min() == n_block:
            h = self._prefill(text, widths, cache)
            for trace in self.traces:
                trace.steps.append((n_block, trace.widths))
        else:
            if max(map(len, text)) > 1:
                self._prefill([t[:-1] for t in text], widths, cache)
            h = step()
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
                now = (widths if control is None else control.widths)[r:r + 1]
                self._prefill([text[r][-max(2, limit // 2):-1]], now, fresh)
                cache.append(fresh)
            if full:
                rows = [i for i in range(len(live)) if i not in full]
                cache.keep(rows + list(range(len(live), len(live) + len(full))))
                live = [live[i] for i in rows + full]
            h = step()

    def _prefill(self, texts: list[list[int]], widths, cache) -> torch.Tensor:
        """Runs the texts, of different lengths, into the cache; the hidden state (B, D) of each one's last token."""
        lengths = [len(t) for t in texts]
        idx, _ = pad(texts, self.model.device)
        h = self.model.hidden(idx, widths, cache=cache, lengths=lengths if min(lengths) < idx.size(1) else None)
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
