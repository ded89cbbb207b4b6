"""From logits to tokens."""
import torch


def check_settings(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """ValueError for values out of range."""
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f"temperature {temperature} must be >= 0, top-k {top_k} >= 1, top-p {top_p} in (0, 1]")


def probabilities(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """
    logits (B, V) -> the distribution (B, V), fp32, that is sampled from at a temperature > 0. top_k keeps the k likeliest,
    top_p the smallest set of likeliest tokens that holds that much probability. ValueError for values out of range.
    """
    check_settings(temperature, top_k, top_p)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1)), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p is not None:
        ranked, order = logits.sort(dim=-1, descending=True)
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
        return logits.argmax(-1).tolist()
    return draw(probabilities(logits, *settings), generators)


def accept_greedily(drafted: torch.Tensor, logits: torch.Tensor) -> list[list[int]]:
    """
    drafted (B, k) tokens and the full model's logits (B, k + 1, V) at the positions before them and behind the last -> for
    each row the tokens that plain greedy decoding would have given: the drafted ones up to the first that differs from the
    likeliest, then the likeliest.
    """
    best = logits.argmax(-1)
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
