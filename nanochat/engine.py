"""
Generation: the prompts in one pass, but only as deep as what follows them, then tokens from the cache, one by one or, a
single row's likeliest ones on a CPU, many in one call, the prompt included where it is short. The rows of a batch are
independent: each has its own length, width, exit depth, seed and end.

    engine = Engine(model, tokenizer)
    for column, masks in engine.generate(prompt_ids, num_samples=4, max_tokens=100): ...      # as nanochat's
    for token in engine.tokens(prompt_ids, max_tokens=100, mode="normal", temperature=0.8, top_k=50, seed=1): ...
    for pairs in engine.stream([prompt_a, prompt_b], max_tokens=100, mode=["think", "ghost"]): ...
    for token in engine.tokens(prompt_ids, max_tokens=100, mode="auto", budget=0.6): ...
    for token in engine.tokens(prompt_ids, max_tokens=100, mode="auto", lossless=True): ...    # see speculative.py
    engine.traces[0].flops(model)     # what the last answer cost
"""
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field

import torch

from nanochat.cache import MatryoshkaKVCache
from nanochat.chat import stop_tokens
from nanochat.common import get_compute_dtype, print0
from nanochat.confidence_probe import Controls, check_trained, pad
from nanochat.hybrid_gpt import stays_fp32
from nanochat.mamba_block import announce_form
from nanochat.matryoshka import prompt_flops, token_flops
from nanochat.native import library
from nanochat.sampling import check_settings, draw_tokens
from nanochat.speculative import MAX_DRAFT, Draft, Record, Round, Speculation, candidates, round_flops
from nanochat.tool_use import ToolUse


def prepare_inference(model, device_type: str, dtype: torch.dtype | None = None) -> None:
    """
    Casts, in place, the weights to `dtype` (None: the one that the device computes in), except the SSM parameters and the
    controls, which stay fp32, so that decoding does not cast them anew for every token. The model cannot be trained on
    afterwards. ValueError for a weight that is not finite.
    """
    announce_form(model, torch.device(device_type).type)
    dtype = dtype or get_compute_dtype(device_type)
    for name, p in model.named_parameters():
        p.requires_grad_(False)
        if not bool(p.isfinite().all()):
            raise ValueError(f"the weight {name} is not finite: the file is damaged, or its training diverged; use an "
                             "earlier checkpoint")
        if not stays_fp32(name):
            p.data = p.data.to(dtype)
    model.compute_dtype = dtype
    model.to(device_type).eval()
    if torch.device(device_type).type == "cpu":
        library()  # compiled now, if it ever is, and not within the first answer
        if later := model.config.later_features:
            print0(f"CPU decoding goes layer by layer, which is slower: this model has {', '.join(later)}, and the native "
                   "run of blocks has none of these")


@dataclass(frozen=True)
class Compute:
    """How much compute an answer may use: what Engine.stream takes under these names."""
    mode: str | int | None = None
    budget: float | None = None
    depth: int | None = None
    lossless: bool = False

    def check(self, model, calibration: dict | None = None) -> None:
        """ValueError, before anything is computed, for what `model` does not have or what does not go together."""
        if self.lossless:
            if self.budget is not None:
                raise ValueError("lossless decoding always decides at full compute: drop the budget")
            candidates(model.config, self.mode, self.depth)
        elif self.mode == "auto":
            check_trained(model)
            Controls(model, self.budget, calibration=calibration)
        elif self.budget is not None:
            raise ValueError("a budget has an effect in mode auto only: choose that mode, or drop the budget")
        else:
            model.resolve_widths(self.mode)

    @property
    def name(self) -> str:
        parts = [str(self.mode or "full"), f"budget {self.budget:g}" if self.budget is not None else "",
                 f"depth {self.depth}" if self.depth is not None else "", "lossless" if self.lossless else ""]
        return ", ".join(p for p in parts if p)


@dataclass
class Trace:
    """
    How one answer was computed: the prompt's length and widths per block, and for each generated token the depth and the
    widths per block at which it was computed. auto: the controls decided, whose own compute counts too. Lossless decoding
    also has the rounds in which the tokens behind the first came, and notes on where drafting did not pay.
    """
    prompt_tokens: int
    widths: tuple[int, ...]
    auto: bool = False
    steps: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def flops(self, model) -> dict[str, float]:
        """
        FLOPs of 'prompt' (all of it but its last token, through as many blocks as any token behind it, since it goes no
        deeper; and the predictor), of 'generated' (the passes that the generated tokens came from: the prompt's last token,
        then all generated ones but the last), memory writes of exited tokens and control networks included, and of the same
        passes at 'full_prompt' and 'full_generated' compute. Drafts, and what was checked in vain, count as generated. All
        as if the row were alone: in a batch, prompts go as deep as the deepest row. What a slide runs anew is not counted.
        """
        n, m, config = self.prompt_tokens - 1, len(self.steps), model.config
        depth, widths = map(torch.tensor, zip(*self.steps))
        context = torch.arange(n + 1, n + m + 1)
        generated = token_flops(model, depth, widths, context, model.gate.flops if self.auto else 0)
        full = token_flops(model, torch.full_like(depth, config.n_block), torch.full_like(widths, config.top_width), context)
        spent = float(generated.sum())
        if self.rounds:
            spent = float(generated[0]) + round_flops(model, self.rounds, self.prompt_tokens)
        return {"prompt": prompt_flops(model, n, self.widths[:int(depth.max())])
                + (model.predictor.flops(self.prompt_tokens) if self.auto else 0), "generated": spent,
                "full_prompt": prompt_flops(model, n, [config.top_width] * config.n_block),
                "full_generated": float(full.sum())}


def total_flops(flops: dict[str, float]) -> tuple[float, float]:
    """(spent, at full compute) of an answer and its prompt together, from Trace.flops."""
    return flops["prompt"] + flops["generated"], flops["full_prompt"] + flops["full_generated"]


class Engine:
    """
    Decodes with a model and a tokenizer. `model` should have been through `prepare_inference`. calibration: what
    fractal_eval --calibrate stored beside it, for mode 'auto'. traces: one Trace for each row of the last call; speculation:
    its Speculation, if it was lossless. record: what lossless decoding has learned about drafts so far.
    """
    def __init__(self, model, tokenizer, calibration: dict | None = None):
        self.model, self.tokenizer, self.calibration, self.traces = model, tokenizer, calibration, []
        self.speculation, self.record, self._pace, self._trained, self._spare = None, Record(model), 1, False, None

    def generate(self, tokens: list[int], num_samples: int = 1, max_tokens: int | None = None, temperature: float = 1.0,
                 top_k: int | None = None, seed: int = 42,
                 compute: Compute = Compute()) -> Iterator[tuple[list[int], list[int]]]:
        """
        nanochat's interface: num_samples answers to one prompt. Yields, a step at a time, (the next token of each answer, a
        mask: 1 where it was sampled, 0 where the calculator's result was forced). An answer that has ended yields
        <|assistant_end|>, masked 0 from the second one on, until all have. max_tokens None: to the end of the model's
        context; an answer that is longer goes on from the last half of it. ValueError as in `stream`.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
        stop, end = stop_tokens(self.tokenizer), self.tokenizer.encode_special("<|assistant_end|>")
        most = max(1, self.model.config.sequence_len - len(tokens)) if max_tokens is None else max_tokens
        # The calculator's calls again, since `stream` does not say which tokens it forced.
        tools, over, count = [ToolUse(self.tokenizer) for _ in range(num_samples)], set(), 0
        steps = self.stream([tokens] * num_samples, most, temperature=temperature, top_k=top_k, seed=seed, stop=stop,
                            overflow="slide", **asdict(compute))
        for column in _columns(steps, num_samples, MAX_DRAFT + 1 if compute.lossless else 1):
            masks = []
            for row, token in enumerate(column):
                masks.append(int(row not in over and not tools[row].forced))
                if token is None:
                    column[row] = end
                    over.add(row)
                else:
                    tools[row].next([token])
                    tools[row].wrote(token)
            count += 1
            yield column, masks
        if count < most:
            yield [end] * num_samples, [int(row not in over) for row in range(num_samples)]

    def generate_batch(self, tokens: list[int], num_samples: int = 1, **options) -> tuple[list[list[int]], list[list[int]]]:
        """
        nanochat's interface: (prompt and answer, its mask) of num_samples answers, without the token that ends them; the
        mask is 0 on the prompt. Options as in `generate`.
        """
        results = [list(tokens) for _ in range(num_samples)]
        masks = [[0] * len(tokens) for _ in range(num_samples)]
        stop, ended = stop_tokens(self.tokenizer), set()
        for column, mask in self.generate(tokens, num_samples, **options):
            for row, token in enumerate(column):
                if token in stop:
                    ended.add(row)
                elif row not in ended:
                    results[row].append(token)
                    masks[row].append(mask[row])
        return results, masks

    def tokens(self, prompt: list[int], max_tokens: int, **options) -> Iterator[int]:
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

    def stream(self, prompts: list[list[int]], max_tokens: int, mode=None, depth=None, temperature: float = 1.0,
               top_k: int | None = None, top_p: float | None = None, seed: int | list[int] = 0, stop: Iterable[int] = (),
               overflow: str = "stop", budget: float | None = None, control=None, lossless: bool = False,
               draft: int | None = None, allowed: list[list[int]] | None = None,
               ended: set[int] | None = None) -> Iterator[list[tuple[int, int]]]:
        """
        Yields, a step at a time, [(row, token id), ...] of the rows that are still going; a row ends after max_tokens
        or before a token in `stop`. Where a row calls the calculator, its result is forced into the row (tool_use.py).

        mode: a mode name or width (None: full) for all rows, or a list with one per row; 'auto' for all: the predictor
        picks each row's widths, the gate each token's exit and when a row expands.
        depth: after how many blocks generated tokens exit (None: none does), likewise; prompts go no deeper. The pass
        over the prompt's last token is the first that generates: it exits like the others.
        seed: row r draws with seed + r, so a row does not depend on the others; or a list with one per row.
        overflow: where a row fills the model's context, 'stop' ends it, 'slide' goes on from the last half of it.
        budget: for 'auto', see Controls. control: Controls to use instead of the model's own.
        lossless: full width and depth decide every token, in fp32 the same tokens (greedy) or the same distribution as
        without mode and depth; these now say how tokens are drafted, the same for all rows (None or 'auto': chosen by
        what it has brought). draft: tokens drafted at a time, 1 to 8 (None: as many as pay, or none).
        allowed: for each row the only tokens that may be drawn (the letters of a multiple choice, say); not with lossless.
        ended: rows that the caller adds to this set end before their next token.
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
                raise ValueError(f"the prompt has {len(prompt)} tokens, but the model's context of {limit} must hold the "
                                 f"answer, too: shorten it to {limit - 1} at most")
        for d in depths:
            if d is not None and not 1 <= d <= n_block:
                raise ValueError(f"depth {d} is out of range: this model has {n_block} blocks")
        if allowed is not None and lossless:
            raise ValueError("drafts know nothing of allowed tokens: decode without lossless")
        if lossless:
            drafts = self._drafts(modes, depths, budget, control, draft)
            modes, depths = [None] * n, [None] * n
        elif draft is not None:
            raise ValueError("a draft length has an effect with lossless decoding only: ask for that too, or leave it away")
        settings = temperature, top_k, top_p
        check_settings(*settings)
        seeds = _per_row(seed, n, "seeds") if isinstance(seed, list) else [seed + r for r in range(n)]
        if not all(-2**63 <= s < 2**63 for s in seeds):
            raise ValueError(f"seed {seed} is out of range: give one from -2^63 to 2^63 less the number of rows")
        if "auto" in modes:
            if modes != ["auto"] * n:
                raise ValueError("mode 'auto' cannot be mixed with others in one batch: run those prompts apart")
            if control is None:
                if not self._trained:
                    check_trained(model)
                    self._trained = True
                control = Controls(model, budget, calibration=self.calibration)
        elif budget is not None or control is not None:
            raise ValueError("a budget has an effect in mode 'auto' only: choose it, or leave the budget away")
        else:
            widths = torch.tensor([model.resolve_widths(m) for m in modes])  # (rows, n_block)
        if max_tokens < 1:
            return
        depths = [n_block if d is None else d for d in depths]
        stop, device = set(map(int, stop)), model.device
        text = [list(p) for p in prompts]
        left = [max_tokens] * n
        generators = [torch.Generator(device=device).manual_seed(s) if temperature else None for s in seeds]
        length = limit if overflow == "slide" else min(limit, max(map(len, prompts)) + max_tokens)

        with torch.inference_mode():  # never while the caller has its turn
            cache = self._cache(n, length, device)
            if control is not None:
                widths = control.plan(prompts, cache.run_alone())
        self.traces = [Trace(len(p), tuple(w), control is not None) for p, w in zip(prompts, widths.tolist())]
        tools = [ToolUse(self.tokenizer) for _ in prompts] if self.tokenizer is not None else None
        calls = {tools[0].end} if tools else set()  # a token after which others may be forced
        self.speculation = None
        if lossless:
            self.speculation = Speculation(self.record, drafts, draft, settings, self.traces)
        live = list(range(n))
        planned, levels, leave = (None, None), None, None
        ahead = []  # steps of a single row's tokens that are not given out yet

        def look():
            """The live rows' levels, and after how many blocks they leave, unless a control decides otherwise."""
            nonlocal planned, levels, leave
            now = live, widths if control is None else control.widths
            if now[0] is not planned[0] or now[1] is not planned[1]:  # rows have ended or expanded
                planned = now
                levels = now[1][live[0]].tolist() if len(live) == 1 else model.resolve_widths(now[1][live])
                each = [depths[r] for r in live]
                leave = each[0] if min(each) == max(each) else torch.tensor(each)[:, None]
            if control is not None:
                control.begin(live, leave, levels)

        def step(idx=None, resume=None):
            look()
            if idx is None:
                idx = torch.tensor([text[r][-1:] for r in live], device=device)
            h = model.hidden(idx, levels, leave, cache, control=control, resume=resume)[:, -1]
            left_at, ran = (leave, levels) if control is None else (control.exits, control.ran)
            left_at = [left_at] * len(live) if isinstance(left_at, int) else left_at[:, 0].tolist()
            if all(type(w) is int for w in ran):
                ran = [tuple(ran)] * len(live)
            else:
                ran = list(zip(*([w] * len(live) if type(w) is int else w.expand(len(live), 1)[:, 0].tolist() for w in ran)))
            for r, its in zip(live, zip(left_at, ran)):
                self.traces[r].steps.append(its)
            return h

        def several():
            """
            A single row's next tokens in one call, about as many as fit in 20 ms, judging by the last call; a short prompt
            runs in the same call. None where that cannot be done: decoding must be greedy.
            """
            if len(live) > 1 or temperature or allowed is not None or (control is not None and control.bar is None):
                return None
            look()
            r, began = live[0], time.perf_counter()
            if tools and tools[r].forced:
                return None
            new = text[r][-1:] if cache.pos[0] else text[r]  # the prompt in the same call
            out = cache.greedy(new, min(left[r], length - cache.pos[0] - len(new) + 1, self._pace), stop | calls, levels,
                               leave, control and control.bar(levels))
            if out is None:
                return None
            tokens, left_at, undecided = out
            ahead.extend((d, tuple(levels)) for d in left_at)
            if undecided is not None:
                idx = torch.tensor([[(text[r] + tokens)[-1]]], device=device)
                tokens += draw_tokens(model.logits(step(idx, undecided)), settings, generators[r:r + 1])
                ahead.append(self.traces[r].steps.pop())
            if len(new) == 1:  # a prompt's tokens are much faster
                self._pace = 1 + int(0.02 * len(tokens) / (time.perf_counter() - began))
            return [tokens]

        def drawn(h, own):
            logits = model.logits(h)
            if allowed is not None:
                logits = _only(logits, [allowed[r] for r in live])
            return [[t] for t in draw_tokens(logits, settings, own)]

        def following(own):
            return several() or drawn(step(), own)
        with torch.inference_mode():
            if not lossless and (chosen := several()):
                pass  # the prompt and its first token are done
            else:  # the same path for every mode: in bf16, another shape of the same products rounds otherwise
                if max(map(len, text)) > 1:  # prompts go no deeper than their answers
                    cache.hold(*self._padded([t[:-1] for t in text]), model.resolve_widths(widths))
                if lossless:
                    chosen = drawn(step(), generators)
                    for trace in self.traces:
                        trace.steps.clear()  # they are appended as the tokens come
                else:
                    chosen = following(generators)
        while live:
            stay, kept = [], [[] for _ in live]
            for i, (r, tokens) in enumerate(zip(live, chosen)):
                if ended and r in ended:
                    continue
                if tools:
                    tokens = tools[r].next(tokens)
                for token in tokens:
                    if lossless:
                        self.traces[r].steps.append((n_block, self.traces[r].widths))
                    if token in stop:
                        break
                    kept[i].append(token)
                    text[r].append(token)
                    if tools:
                        tools[r].wrote(token)
                    left[r] -= 1
                    if left[r] == 0:
                        break
                else:
                    if cache.pos[i] < length or overflow == "slide":
                        stay.append(i)
            for j in range(max(map(len, kept))):
                if ahead:
                    self.traces[live[0]].steps.append(ahead.pop(0))
                yield [(r, tokens[j]) for r, tokens in zip(live, kept) if j < len(tokens)]
            self.traces[live[0]].steps += ahead  # of a token that ends the row
            ahead.clear()
            if not stay:
                self._spare = cache if n == 1 and device.type == "cpu" else None
                return
            with torch.inference_mode():
                if len(stay) < len(live):
                    cache.keep(stay)
                    live = [live[i] for i in stay]
                full = [i for i, p in enumerate(cache.pos) if p == length]
                if full:  # slide: a row starts again from the last half of its context, the newest token apart
                    rows, anew = [i for i in range(len(live)) if i not in full], []
                    for r in (live[i] for i in full):
                        anew.append(MatryoshkaKVCache(model, 1, length))
                        now = (widths if control is None else control.widths)[r:r + 1]
                        self._prefill([text[r][-max(2, limit // 2):-1]], now, anew[-1])
                    if rows:
                        cache.keep(rows)
                    else:
                        cache, *anew = anew
                    for other in anew:
                        cache.append(other)
                    live = [live[i] for i in rows + full]
                own = [generators[r] for r in live]
                if lossless:
                    last = torch.tensor([text[r][-1:] for r in live], device=device)
                    ends = [None if tools and tools[r].forced else calls for r in live]
                    chosen = self.speculation(cache, live, last, own, max(left[r] for r in live), ends)
                else:
                    chosen = following(own)

    def _cache(self, rows: int, length: int, device) -> MatryoshkaKVCache:
        """
        An empty cache: for a single row on a CPU that of the last answer, if it fits (and is not many times too long: it is
        zeroed), since a new one takes as long as a token of a small model. While an answer is being made its cache belongs
        to nobody else.
        """
        spare, self._spare = self._spare, None
        if (rows == 1 and spare is not None and length <= spare.length <= max(4 * length, 256)
                and (spare.model, spare.device, spare.dtype) == (self.model, device, self.model.compute_dtype)):
            spare.clear()
            return spare
        del spare  # before there is another
        return MatryoshkaKVCache(self.model, rows, length)

    def _prefill(self, texts: list[list[int]], widths, cache) -> torch.Tensor:
        """Runs the texts, of different lengths, into the cache; the hidden states (B, T, D)."""
        idx, lengths = self._padded(texts)
        return self.model.hidden(idx, widths, cache=cache, lengths=lengths)

    def _padded(self, texts: list[list[int]]) -> tuple[torch.Tensor, list[int] | None]:
        """The texts (B, T), and their lengths where these differ."""
        lengths = [len(t) for t in texts]
        return pad(texts, self.model.device)[0], lengths if min(lengths) < max(lengths) else None

    def _drafts(self, modes: list, depths: list, budget, control, draft) -> list[Draft]:
        """The drafts to choose from. ValueError for what does not go with lossless decoding."""
        if budget is not None or control is not None:
            raise ValueError("lossless decoding always decides at full compute: leave the budget and the controls away")
        if len(set(modes)) > 1 or len(set(depths)) > 1:
            raise ValueError("the rows of a batch are drafted alike: give one mode and one depth")
        if draft is not None and not 1 <= draft <= MAX_DRAFT:
            raise ValueError(f"a draft of {draft} tokens is out of range: give 1 to {MAX_DRAFT}")
        return candidates(self.model.config, modes[0], depths[0])


def _columns(steps: Iterable[list[tuple[int, int]]], n: int, patience: int) -> Iterator[list[int | None]]:
    """
    Engine.stream's steps as columns of one token for each of n rows, None where a row has ended: where it is absent from so
    many steps in a row as `patience`. (Lossless rounds give rows different numbers of tokens, 1 to MAX_DRAFT + 1.)
    """
    waiting, absent = [deque() for _ in range(n)], [0] * n

    def column():
        return [row.popleft() if row else None for row in waiting]
    for pairs in steps:
        absent = [a + 1 for a in absent]
        for row, token in pairs:
            waiting[row].append(token)
            absent[row] = 0
        while any(waiting) and all(row or a >= patience for row, a in zip(waiting, absent)):
            yield column()
    while any(waiting):
        yield column()


def _only(logits: torch.Tensor, allowed: list[list[int]]) -> torch.Tensor:
    """Logits (B, V) with minus infinity on all but each row's allowed tokens."""
    out = torch.full_like(logits, float("-inf"))
    for row, tokens in enumerate(allowed):
        out[row, tokens] = logits[row, tokens]
    return out


def _per_row(value, n: int, what: str) -> list:
    """One value for all rows, or a list with one per row."""
    values = value if isinstance(value, list) else [value] * n
    if len(values) != n:
        raise ValueError(f"{len(values)} {what} were given for {n} prompts")
    return values
