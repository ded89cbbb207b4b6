"""From logits to tokens."""
import math

import torch

NOT_FINITE = ("the model's logits are not finite, so no token can be drawn: its weights are damaged, or its training "
              "diverged; use an earlier checkpoint")


def check_settings(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """ValueError for values out of range."""
    if (not 0 <= temperature < math.inf or (top_k is not None and top_k < 1)
            or (top_p is not None and not 0 < top_p <= 1)):
        raise ValueError(f"temperature {temperature} must be >= 0 and finite, top-k {top_k} >= 1, top-p {top_p} in (0, 1]")


def best_tokens(logits: torch.Tensor) -> torch.Tensor:
    """
    logits (..., V) -> the likeliest token (...), of equally likely ones the first. ValueError where a logit is no number.
    """
    most, best = logits.max(-1)  # NaN if any is
    check_finite(most)
    return best


def check_finite(logits: torch.Tensor) -> None:
    """ValueError where a logit is no number, of which no token can be drawn."""
    if not bool(logits.isfinite().all()):
        raise ValueError(NOT_FINITE)


def probabilities(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """
    logits (B, V) -> the distribution (B, V), fp32, that is sampled from at a temperature > 0. top_k keeps the k likeliest,
    top_p the smallest set of likeliest tokens that holds that much probability; of equally likely ones those that come
    first. ValueError for values out of range, or a logit that is no number.
    """
    check_settings(temperature, top_k, top_p)
    most = logits.amax(-1, keepdim=True)
    check_finite(most)
    logits = (logits - most) / max(temperature, 1e-30)  # the smallest temperatures would make infinities of large logits
    if top_k is not None and top_k < logits.size(-1):
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        equal = logits == kth  # in bf16 often several, of which not all may fit
        room = top_k - (logits > kth).sum(-1, keepdim=True)
        logits = logits.masked_fill((logits < kth) | (equal & (equal.cumsum(-1) > room)), float("-inf"))
    if top_p is not None:
        ranked, order = logits.sort(dim=-1, descending=True, stable=True)
        probs = ranked.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= top_p  # the mass before this token suffices already
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))
    return logits.softmax(-1)


def draw(probs: torch.Tensor, generators: list[torch.Generator]) -> list[int]:
    """A token of each row of probs (B, V), drawn with its own generator."""
    return [int(torch.multinomial(p, 1, generator=g)) for p, g in zip(probs, generators)]


def draw_tokens(logits: torch.Tensor, settings: tuple, generators: list[torch.Generator]) -> list[int]:
    """logits (B, V) -> a token of each row, with its own generator; settings: temperature (0: greedy), top_k, top_p."""
    if settings[0] == 0:
        most, best = logits.max(-1)
        *tokens, finite = torch.cat((best, most.isfinite().all().long()[None])).tolist()  # one wait for the device, not two
        if not finite:
            raise ValueError(NOT_FINITE)
        return tokens
    return draw(probabilities(logits, *settings), generators)


def accept_greedily(drafted: torch.Tensor, logits: torch.Tensor) -> list[list[int]]:
    """
    drafted (B, k) tokens and the full model's logits (B, k + 1, V) at the positions before them and behind the last -> for
    each row the tokens that plain greedy decoding would have given: the drafted ones up to the first that differs from the
    likeliest, then the likeliest.
    """
    best = best_tokens(logits)
    right = (drafted == best[:, :-1]).long().cumprod(1).sum(1)
    return [row[:n + 1] for row, n in zip(best.tolist(), right.tolist())]


def accept_by_rejection(drafted: list[int], q: torch.Tensor, p: torch.Tensor, generator: torch.Generator) -> list[int]:
    """
    One row's exact rejection sampling (Leviathan et al. 2023, arXiv 2211.17192): drafted (k) tokens, drawn from q (k, V); p
    (k + 1, V) the full model's distributions -> 1 to k + 1 tokens, distributed as if each had been drawn from p. A drafted
    token x stays with probability min(1, p(x) / q(x)); the first that does not is drawn anew from what p has above q.
    """
    for i, token in enumerate(drafted):
        u = torch.rand((), generator=generator, device=p.device)
        if not bool(u * q[i, token] < p[i, token]):
            rest = (p[i] - q[i]).clamp(min=0)
            return [*drafted[:i], *draw((rest if bool(rest.any()) else p[i])[None], [generator])]
    return [*drafted, *draw(p[-1:], [generator])]
