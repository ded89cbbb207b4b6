"""
Lossless speed: the model drafts a few tokens with an early exit, a narrow width, or both, and checks them at full width
and depth in one pass, which costs little more than one token where reading the weights is what takes the time
(self-speculative decoding: Zhang et al. 2024, arXiv 2309.08168; Elhoushi et al. 2024, arXiv 2404.16710).

Memory. The cache's checkpoint lets each round take back what it wrote. A draft at full width that exits after `depth` blocks
has done a part of the check: those blocks are not run again. The tokens merely owe the others their memory, as exited
tokens do, and the check pays with the full update (GPT.finish). A narrow draft is taken back whole before the check.

Policy. A round stops drafting where the expected gain of one more token is not worth its measured time, and drafting
pauses while plain decoding is faster. How likely a drafted token is accepted is estimated from how many were, by draft
configuration, by row, and by how sure the draft was: by the gate where it is trained, else by the likeliest token's
probability.
"""
import collections
import itertools
import statistics
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch

from nanochat.matryoshka import Cost, block_cost, resolve_level, token_flops
from nanochat.sampling import accept_by_rejection, accept_greedily, draw, draw_tokens, probabilities

MAX_DRAFT = 8       # tokens
BINS = 8            # of a draft's confidence, see Record
PAUSE = (8, 256)    # steps that a first and a longest pause take; each is twice as long as the one before


class Draft(NamedTuple):
    """How tokens are drafted: after `depth` blocks, at `width`."""
    depth: int
    width: int


class Round(NamedTuple):
    """One row's part of a pass: what was drafted how (None: nothing), and how many of the drafted tokens were right."""
    draft: Draft | None
    drafted: int
    accepted: int


def candidates(config, mode=None, depth: int | None = None) -> list[Draft]:
    """
    The drafts that a mode or width ('auto' or None: any) and a depth (None: any) leave to choose from.
    ValueError where that is full compute itself.
    """
    depths = [*config.exit_points, config.n_block] if depth is None else [depth]
    widths = config.levels if mode in (None, "auto") else (resolve_level(mode, config.modes, config.levels),)
    out = [Draft(d, w) for d, w in itertools.product(depths, widths) if (d, w) != (config.n_block, config.top_width)]
    if not out:
        raise ValueError("a draft at full width and depth is full compute: choose a narrower mode or a lower depth")
    return out


def draft_cost(model, draft: Draft, context: float) -> Cost:
    """What one drafted token costs: the blocks behind its exit do nothing, not even write."""
    blocks = itertools.islice(model.transformer.h, draft.depth)
    return sum((c for b in blocks for c in block_cost(b, draft.width, context)), model.cost()["head"])


def round_flops(model, rounds: list[Round], prompt_tokens: int) -> float:
    """FLOPs of one row's rounds, the first of which continues a prompt of so many tokens and one generated token."""
    at, contexts, spent, head = prompt_tokens + 1, [], 0.0, model.cost()["head"].flops
    for draft, drafted, accepted in rounds:
        contexts += range(at, at + drafted + 1)  # all were checked
        if draft is not None and draft.width == model.config.top_width:
            spent += drafted * head              # what else was drafted is a part of the check
        elif draft is not None:
            spent += drafted * draft_cost(model, draft, at + (drafted - 1) / 2).flops
        at += accepted + 1
    n, config = len(contexts), model.config
    widths = torch.full((n, config.n_block), config.top_width)
    return spent + float(token_flops(model, torch.full((n,), config.n_block), widths, torch.tensor(contexts)).sum())


def batch_cost(rows: int) -> float:
    """
    What a pass over so many tokens takes over one of a single token, until measured: as on two Zen 4 cores, where up to
    about eight tokens the weights' reading takes the time, and then the arithmetic.
    """
    return max(1 + 0.02 * rows, 0.3 + 0.1 * rows)


class Record:
    """What an engine has learned about its drafts: seconds on this device, and acceptance."""
    def __init__(self, model):
        self.model, self.counts, self.sure = model, {}, {}
        self.shares = {}    # see `share`
        self.times = {}     # the last ones of each entry below
        self.plain = {}     # rows: seconds of a pass
        self.drafts = {}    # (draft, rows): of a drafted token
        self.checks = {}    # (draft, rows): {tokens a row: of the check with all that follows it}

    def share(self, draft: Draft) -> float:
        """Of the full model's weights, that one drafted token reads."""
        if draft not in self.shares:
            self.shares[draft] = (draft_cost(self.model, draft, 0).weights
                                  / sum(c.weights for c in self.model.cost().values()))
        return self.shares[draft]

    # --- time

    def timed(self, table: dict, key, seconds: float) -> None:
        """table[key] becomes the lower median of the last times: what disturbs a machine makes single ones long."""
        last = self.times.setdefault((id(table), key), collections.deque(maxlen=7))
        last.append(seconds)
        table[key] = statistics.median_low(last)

    def draft(self, draft: Draft, rows: int) -> float:
        known = self.drafts.get((draft, rows))
        return self.share(draft) * self.plain[rows] if known is None else known

    def check(self, draft: Draft, rows: int, tokens: int) -> float:
        """A number of tokens never seen is scaled from the next one that was."""
        seen = self.checks.get((draft, rows), {})
        if tokens in seen:
            return seen[tokens]
        at = min(seen, key=lambda n: abs(n - tokens), default=1)
        return seen.get(at, self.plain[rows]) * batch_cost(rows * tokens) / batch_cost(rows * at)

    # --- acceptance

    def counted(self, draft: Draft, accepted: int, tried: int) -> None:
        for d, (a, n) in self.counts.items():
            self.counts[d] = 0.99 * a, 0.99 * n  # what is old is forgotten, and tried again some day
        a, n = self.counts.get(draft, (0.0, 0.0))
        self.counts[draft] = a + accepted, n + tried

    def acceptance(self, draft: Draft) -> float:
        """Of the next drafted token; where little is known, the more compute the likelier, and rather hopeful."""
        a, n = self.counts.get(draft, (0.0, 0.0))
        return (a + 2 * (0.5 + 0.5 * self.share(draft))) / (n + 2)

    def learned(self, draft: Draft, confidence: float, right: bool) -> None:
        a, n = self.sure.get((draft, self.bin(confidence)), (0.0, 0.0))
        self.sure[draft, self.bin(confidence)] = 0.99 * a + right, 0.99 * n + 1

    def chance(self, draft: Draft, confidence: float) -> float:
        """That a token is right which was drafted with this confidence."""
        a, n = self.sure.get((draft, self.bin(confidence)), (0.0, 0.0))
        return (a + 3 * confidence) / (n + 3)

    @staticmethod
    def bin(confidence: float) -> int:
        """Finer towards 1, where most tokens are: 0 to 1/2, to 3/4, to 7/8 ..."""
        return next((b for b in range(BINS - 1) if 1 - confidence > 0.5 ** (b + 1)), BINS - 1)


@dataclass
class _Row:
    """How one row's drafts fared lately."""
    accepted: float = 0.0
    tried: float = 0.0


def expected_tokens(a: float, k: int) -> float:
    """Tokens that a round of k drafted ones gives when each is right with probability a: Leviathan et al., equation 1."""
    return k + 1 if a >= 1 else (1 - a ** (k + 1)) / (1 - a)


def _until(tokens: list[int], ends: set[int] | None) -> list[int]:
    """The tokens up to and with the first of `ends`; only the first token if ends is None."""
    stop = 0 if ends is None else next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop + 1]


class Speculation:
    """
    The rounds of one call of Engine.stream. drafts: the candidates. length: tokens per round (None: the policy decides,
    about pauses too). settings: temperature, top_k, top_p. seconds: spent so far, by part.
    """
    def __init__(self, record: Record, drafts: list[Draft], length: int | None, settings: tuple, traces: list):
        self.record, self.drafts, self.length, self.settings, self.traces = record, drafts, length, settings, traces
        self.model = record.model
        self.rows = [_Row() for _ in traces]
        self.pause, self.wait = PAUSE[0], 0  # below 0: a pause is over, and one round is tried whatever it promises
        self.seconds = dict.fromkeys(("plain", "draft", "check", "rollback"), 0.0)
        self.gate = getattr(self.model, "gate", None)
        if self.gate is not None and not bool(self.gate.c_proj.weight.any()):
            self.gate = None  # never trained

    # --- policy

    def best(self, live: list[int], lengths: range) -> tuple[float, Draft]:
        """The draft that promises the most tokens a second, all rows together, over all `lengths`."""
        n, record, best, most = len(live), self.record, (0.0, self.drafts[0]), lengths[-1]
        for draft in self.drafts:
            each = record.draft(draft, n)
            ceiling = (most + 1) * n / (most * each + record.check(draft, n, most + 1))  # if all were right, and no dearer
            if ceiling <= best[0]:
                continue
            chances = [self.acceptance(draft, r) for r in live]
            tokens, run = n, chances
            for k in range(1, most + 1):
                tokens += sum(run)
                if k in lengths:
                    best = max(best, (tokens / (k * each + record.check(draft, n, k + 1)), draft))
                run = [p * a for p, a in zip(run, chances)]
        return best

    def acceptance(self, draft: Draft, r: int) -> float:
        row = self.rows[r]
        return (row.accepted + 6 * self.record.acceptance(draft)) / (row.tried + 6)

    def plan(self, live: list[int], most: int) -> tuple[Draft | None, float]:
        """How to draft now (None: not at all), and the rate in tokens a second that this promises."""
        plain = self.record.plain.get(len(live))
        if self.length is not None:
            at = min(self.length, most)
            if at < 1 or (plain is None and len(self.drafts) > 1):  # costs are estimated from a plain token's
                return None, 0.0
            return (self.best(live, range(at, at + 1))[1] if len(self.drafts) > 1 else self.drafts[0]), 0.0
        if most < 1 or plain is None or self.wait > 0:
            self.wait -= 1
            return None, 0.0
        rate, draft = self.best(live, range(1, most + 1))
        ratio = rate * plain / len(live)
        if ratio < 1 and self.wait == 0:
            self.wait = self.pause
            self.pause = min(2 * self.pause, PAUSE[1])
            for r in live:
                self.traces[r].notes.append(f"after {len(self.traces[r].steps)} tokens: drafting pauses for {self.wait}, "
                                            f"the best draft would give {ratio:.2f}x")
            return None, 0.0
        if ratio >= 1:
            self.pause = PAUSE[0]
        self.wait = 0
        return draft, rate

    # --- one round

    def __call__(self, cache, live: list[int], last: torch.Tensor, generators: list, left: int,
                 ends: list[set[int] | None] | None = None) -> list[list[int]]:
        """
        cache: all but the rows' newest tokens `last` (B, 1). left: tokens that the row with the most to come still wants.
        ends: for each row the tokens after which others may be forced, so that nothing drafted after one is kept; None for
        a row whose next token is forced: it gets one token, in whose place the forced one goes.
        Gives each row 1 or more new tokens; the cache then holds all but the newest again.
        """
        most = min(MAX_DRAFT, cache.length - max(cache.pos) - 1, left - 1)
        draft, rate = self.plan(live, most)
        if draft is None:
            return self._plain(cache, live, last, generators)
        if self.length is not None:
            most = min(most, self.length)
        n, start, full = len(live), list(cache.pos), draft.width == self.model.config.top_width
        begin = now = time.perf_counter()
        cache.checkpoint(MAX_DRAFT + 1)
        tokens, q, sure = [last], [], []
        alive = torch.ones(n)  # how likely each row's drafted tokens are all right
        while True:
            token, probs, confidence = self._draft(cache, draft, tokens[-1], generators)
            tokens.append(token), q.append(probs), sure.append(confidence)
            done, was, now = len(sure), now, time.perf_counter()
            self.record.timed(self.record.drafts, (draft, n), now - was)
            if done == most:
                break
            if self.length is None:
                alive *= torch.tensor([self.record.chance(draft, c) for c in confidence])
                gain = sum(float(p) * self.acceptance(draft, r) for p, r in zip(alive, live))
                price = (self.record.draft(draft, n) + self.record.check(draft, n, done + 2)
                         - self.record.check(draft, n, done + 1))
                if gain < rate * price:
                    break
        drafted = now
        h = self._check(cache, draft, full, tokens)
        chosen = self._accept(torch.cat(tokens[1:], 1), q, self.model.logits(h), generators)
        if ends is not None:
            chosen = [_until(new, stop) for new, stop in zip(chosen, ends)]
        checked = time.perf_counter()
        cache.truncate([p + len(new) for p, new in zip(start, chosen)])
        end = time.perf_counter()
        self.record.timed(self.record.checks.setdefault((draft, n), {}), done + 1, end - drafted)
        for part, seconds in (("draft", drafted - begin), ("check", checked - drafted), ("rollback", end - checked)):
            self.seconds[part] += seconds
        self._learn(draft, live, chosen, sure)
        return chosen

    def _plain(self, cache, live, last, generators):
        begin = time.perf_counter()
        cache.drop_checkpoint()
        c, out = self.model.config, None
        if self.settings[0] == 0 and len(live) == 1:
            out = cache.greedy(last[0].tolist(), 1, (), [c.top_width] * c.n_block, c.n_block)
        tokens = out[0] if out else draw_tokens(
            self.model.logits(self.model.hidden(last, cache=cache)[:, -1]), self.settings, generators)
        seconds = time.perf_counter() - begin
        self.record.timed(self.record.plain, len(live), seconds)
        self.seconds["plain"] += seconds
        for r in live:
            self.traces[r].rounds.append(Round(None, 0, 0))
        return [[token] for token in tokens]

    def _draft(self, cache, draft, token, generators):
        """One token more: (B, 1); the distribution it was drawn from, (B, V), None if greedy; and B confidences."""
        model, (depth, width) = self.model, draft
        h = model.hidden(token, width, self._exits(depth, token), cache)
        logits = model.logits(h[:, -1])
        probs = logits.softmax(-1) if self.settings[0] == 0 else probabilities(logits, *self.settings)
        if self.gate is not None and depth in model.config.exit_points:
            confidence = torch.sigmoid(self.gate(h, model.config.exit_points.index(depth)))[:, -1].tolist()
        else:
            confidence = probs.amax(-1).tolist()
        if self.settings[0] == 0:
            return logits.argmax(-1, keepdim=True), None, confidence
        return torch.tensor(draw(probs, generators), device=model.device)[:, None], probs, confidence

    def _exits(self, depth, token):
        return None if depth == self.model.config.n_block else torch.full(token.shape, depth)

    def _check(self, cache, draft, full, tokens):
        """The full model's hidden states (B, k + 1, D) at the newest token before the draft and all drafted ones."""
        if full:
            self.model.hidden(tokens[-1], draft.width, self._exits(draft.depth, tokens[-1]), cache)
            return self.model.finish(cache)
        cache.truncate([p - len(tokens) + 1 for p in cache.pos])
        return self.model.hidden(torch.cat(tokens, 1), cache=cache)

    def _accept(self, drafted, q, logits, generators):
        if self.settings[0] == 0:
            return accept_greedily(drafted, logits)
        p = probabilities(logits.flatten(0, 1), *self.settings).view_as(logits)
        return [accept_by_rejection(*row) for row in zip(drafted.tolist(), torch.stack(q, 1), p, generators)]

    def _learn(self, draft, live, chosen, sure):
        k, all_accepted, all_tried = len(sure), 0, 0
        for i, (r, new) in enumerate(zip(live, chosen)):
            accepted, row = len(new) - 1, self.rows[r]
            tried = min(accepted + 1, k)
            row.accepted, row.tried = 0.8 * row.accepted + accepted, 0.8 * row.tried + tried
            all_accepted, all_tried = all_accepted + accepted, all_tried + tried
            for j in range(tried):
                self.record.learned(draft, sure[j][i], j < accepted)
            self.traces[r].rounds.append(Round(draft, k, accepted))
        self.record.counted(draft, all_accepted, all_tried)
