"""
What the model is trained on and judged by: cross-entropy, distillation of a narrow pass to the full one, bits per byte.

Logits are never whole in memory: the head, the softmax and both their gradients run over chunks of tokens, forward and
backward in one sweep. At 4096 tokens and 8192 classes on two cores that takes 270 ms where the plain loss takes 835.
"""
import math
import textwrap
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from nanochat import cpu_decode
from nanochat.common import to_device
from nanochat.confidence_probe import (
    Controls,
    calibrated_thresholds,
    draw_plans,
    gumbel_choice,
    level_shares,
    log_odds,
    predict,
    random_price,
)
from nanochat.matryoshka import cost_table, energy, expand_from, norm, sample_exits, sample_levels, sliced_linear, soft_masks

# Tokens whose logits exist at a time. On a CPU those of 8192 classes in fp32 are 8 MB, which stay in the last-level cache;
# on a GPU each chunk reads and writes the fp32 gradient of the head, 537 MB for d32.
CHUNK, GPU_CHUNK = 256, 2048
ANSWER = 3  # tokens, for which the predictor's values of levels hold
EXIT_WEIGHT = 0.5  # of exit_loss beside the full pass's cross-entropy, unless another one is asked for
PROBED = 16  # tokens of a row that gate and exits learn from in a pass (`python -m scripts.bench train`: what that costs)


def chunk_of(device: torch.device) -> int:
    """Tokens in a chunk of the head's loss on a device."""
    return CHUNK if device.type == "cpu" else GPU_CHUNK


def head_logits(h: torch.Tensor, weight: torch.Tensor, softcap: float) -> torch.Tensor:
    """h (..., D), weight (V, D) -> softcap * tanh(h weight^T / softcap), (..., V), fp32."""
    if cpu_decode.serves(h, weight):
        return cpu_decode.head(h, weight, softcap)
    wide = torch.promote_types(h.dtype, torch.float32)
    return torch.tanh(sliced_linear(h, weight, len(weight)).to(wide) / softcap) * softcap


class _HeadLoss(torch.autograd.Function):
    """
    Per-token cross-entropy, or KL to the teacher's distribution, of lm_head's capped logits. The forward sweep also
    makes the gradients with respect to h and weight for a mean over the supervised tokens; backward only scales them.
    The cap bounds the logits by +-15, so the softmax needs no pass for the maximum.
    """
    @staticmethod
    def forward(ctx, h, weight, targets, softcap, teacher, text, teacher_weight, teacher_cap):
        w = weight.to(h.dtype)
        other = None if teacher_weight is None else teacher_weight.to(h.dtype)
        wide = torch.promote_types(h.dtype, torch.float32)
        losses = torch.zeros(len(h), dtype=wide, device=h.device)
        scale = (1.0 / (targets >= 0).sum().clamp(min=1).double()).to(wide)  # a tensor: nobody waits for the device
        minus_cap = torch.full((), -softcap, dtype=wide, device=h.device)
        chunk = chunk_of(h.device)
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        for i in range(0, len(h), chunk):
            s = slice(i, i + chunk)
            hc, live = h[s], (targets[s] >= 0).to(wide)[:, None]
            t = (hc @ w.T).to(wide).div_(softcap).tanh_()  # (chunk, V): capped logits / softcap
            p = (t * softcap).exp_()
            z = p.sum(-1, keepdim=True)
            p.div_(z)
            if text:
                y = targets[s, None].clamp(min=0)
                losses[s] = ((z.log() - t.gather(1, y) * softcap) * live * text)[:, 0]
                p.scatter_add_(1, y, torch.full_like(z, -text))  # d loss / d capped logits = p - onehot
            if teacher is not None:
                lt = (teacher[s] @ (w if other is None else other).T).to(wide).div_(teacher_cap).tanh_().mul_(teacher_cap)
                q = lt.exp()
                zq = q.sum(-1, keepdim=True)
                q.div_(zq)
                # KL = sum q (log q - log p), with log q = lt - log zq and log p = softcap t - log z
                kl = lt.addcmul_(t, minus_cap).mul_(q).sum(-1, keepdim=True) - zq.log() + z.log()
                losses[s] += (kl * live * (1 - text))[:, 0]
                p.sub_(q.mul_(1 - text))
            if dh is not None or dw is not None:
                g = t.square_().neg_().add_(1).mul_(p).mul_(live * scale).to(h.dtype)  # d/d (h w^T): through the cap
                if dh is not None:
                    torch.mm(g, w, out=dh[s])
                if dw is not None:
                    dw.add_(g.T @ hc)
        ctx.save_for_backward(dh, dw)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return losses, losses.sum() * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, _, g):
        dh, dw = ctx.saved_tensors
        return (None if dh is None else dh * g.to(dh.dtype)), (None if dw is None else (dw * g).to(ctx.weight_dtype)), \
            None, None, None, None, None, None


def head_loss(h, weight, targets, softcap, teacher=None, reduction="mean", text: float = 0.0,
              teacher_head=None) -> torch.Tensor:
    """
    h (B, T, D); weight (V, D); targets (B, T) int64, -1 where a position is not supervised. Without teacher:
    cross-entropy in nats. With teacher (B, T, D) hidden states, which get no gradient: KL(teacher || student) of the
    two distributions; text: the share of cross-entropy in a mean of both. reduction 'mean' over the supervised positions
    (a scalar), or 'none': (B*T,), zero where unsupervised, without gradient. teacher_head: the head (weight, softcap) of
    another model, whose hidden states `teacher` then are, of whatever width.
    """
    if not torch.is_grad_enabled():
        weight = weight.detach()  # or the sweep would make a gradient that nobody asks for
    flat = None if teacher is None else teacher.detach().flatten(0, -2).to(h.dtype)
    other, cap = (None, softcap) if teacher_head is None else (teacher_head.weight.detach(), teacher_head.softcap)
    losses, mean = _HeadLoss.apply(h.flatten(0, -2), weight, targets.flatten(), softcap, flat, 1.0 if flat is None else text,
                                   other, cap)
    return mean if reduction == "mean" else losses


@torch.no_grad()
def evaluate_bpb(model, batches, steps: int, token_bytes: torch.Tensor, reduce=lambda t: t, **forward_args) -> float:
    """
    Bits per byte of text, which does not depend on the tokenizer. batches yields (x, y); token_bytes is (V,); reduce: sums a
    tensor over the ranks, where each has its own batches.
    """
    text = BitsPerByte(token_bytes)
    for _, (x, y) in zip(range(steps), batches):
        losses, _ = model(x, y, reduction="none", **forward_args)
        text.add(losses, y)
    text.reduce(reduce)
    return text.value


JUDGED_TOKENS = 512


@torch.no_grad()
def judge_tokenizer(model, tokenizer, device) -> tuple[float, float]:
    """
    (bits per byte of the model, bits per byte of the tokens' bare frequencies) on some of Python's own text, in at most 512
    tokens. A trained model that is given its own tokenizer needs far fewer bits than the frequencies, which know this very
    text but no order; given another's tokenizer it needs more.
    """
    T = min(model.config.sequence_len, JUDGED_TOKENS)
    text = Path(textwrap.__file__).read_text(encoding="utf-8")[:8 * JUDGED_TOKENS]
    ids = torch.tensor(tokenizer.encode(text)[:JUDGED_TOKENS])
    rows = torch.cat((torch.full((-(-len(ids) // T), 1), tokenizer.get_bos_token_id()),
                      F.pad(ids, (0, -len(ids) % T), value=-1).view(-1, T)), 1).to(device)
    token_bytes = tokenizer.token_bytes()
    bits = evaluate_bpb(model, [(rows[:, :-1].clamp(min=0), rows[:, 1:])], 1, token_bytes)
    shares = ids.unique(return_counts=True)[1] / len(ids)
    return bits, float(-(shares * shares.log2()).sum()) * len(ids) / int(token_bytes[ids].sum())


class BitsPerByte:
    """
    Summed cross-entropy / (ln 2 * bytes of the target tokens). Special tokens (0 bytes) are not counted. The sums stay on
    the losses' device until `value` is asked for.
    """
    def __init__(self, token_bytes: torch.Tensor):
        self.token_bytes, self.sums = token_bytes, torch.zeros(2, dtype=torch.float64)  # nats, bytes

    def add(self, losses: torch.Tensor, targets: torch.Tensor) -> None:
        """losses (B*T,) in nats; targets (B, T), negative where a position does not count."""
        y = targets.flatten()
        if self.token_bytes.device != y.device:
            self.token_bytes, self.sums = to_device(self.token_bytes, y.device), to_device(self.sums, y.device)
        size = torch.where(y >= 0, self.token_bytes[y.clamp(min=0)], 0)
        self.sums += torch.stack(((losses * (size > 0)).sum().double(), size.sum().double()))

    def reduce(self, reduce) -> None:
        """Replaces the sums by reduce(sums), a function of a tensor (2,) fp64 such as a sum over ranks."""
        self.sums = reduce(self.sums)

    @property
    def value(self) -> float:
        nats, size = self.sums.tolist()
        if size <= 0:
            raise ValueError("the evaluation saw no token that is to be learnt: give more --eval-tokens, or data in whose "
                             "validation split an assistant says something")
        return nats / (math.log(2) * size)


def tokens_of_rows(mask: torch.Tensor, n: int, generator: torch.Generator, rank: int = 0, world: int = 1) -> torch.Tensor:
    """Flat indices of at most n random tokens in each row of mask (B, T) bool; rank, world: see sample_students."""
    B, T = mask.shape
    scores = torch.rand(B * world, T, generator=generator)[rank::world].masked_fill(~mask.cpu(), -1)
    best = scores.topk(min(n, T), dim=1)
    return (best.indices + T * torch.arange(B)[:, None])[best.values >= 0].sort().values


def some_tokens(mask: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
    """Flat indices of at most n random tokens of mask (B, T) bool."""
    at = mask.cpu().flatten().nonzero()[:, 0]
    return at[torch.randperm(len(at), generator=generator)[:n]]


class Student(NamedTuple):
    """
    A narrow pass: widths and exits (see GPT.hidden) of the batch's rows [start, stop); None: all that there are. counts:
    whether anything is learned from it. Where a model is sharded, a pass that some ranks make must be made by all. label:
    under which its loss is logged, the same on all ranks (None: the widths). text: the share of the text in what it learns;
    the rest is what the teacher says.
    """
    widths: object = None
    exits: torch.Tensor | None = None
    start: int = 0
    stop: int | None = None
    counts: bool = True
    label: int | str | None = None
    text: float = 0.0


def sample_students(config, rows: int, T: int, starts: torch.Tensor, generator: torch.Generator,
                    expanding: int | None = None, rank: int = 0, world: int = 1,
                    levels: tuple[int, ...] | None = None) -> list[Student]:
    """
    One step's student passes over `rows` rows (DESIGN 8): sampled levels and an exit per token; in the first `expanding`
    rows (None: a quarter) some blocks go one level up from a random position on. starts (rows * world,): where a row's
    prompt ends; see sample_exits. With several ranks of `rows` rows each, all sample for the global batch, from generators
    seeded alike; row i of a rank is the batch's row i * world + rank. levels: those to sample from (None: all).
    """
    levels = levels or config.levels
    widths = sample_levels(levels, config.n_block, generator)
    exits = sample_exits(config.exit_points, config.n_block, starts, T, generator)[rank::world]
    label = widths[0] if len(set(widths)) == 1 else "mixed"
    total = rows * world
    some = total // 4 if expanding is None else expanding
    if some == 0 or min(widths) == config.top_width:
        return [Student(widths, exits, label=label)]
    grown = expand_from(widths, levels, starts[:some], T, generator)[rank::world]
    n = len(grown)  # of this rank's rows; at least one pass of one row, see Student
    idle = Student(widths, exits[:1], 0, 1, counts=False)
    mixed = (Student(grown, exits[:n], 0, n) if n else idle)._replace(label="mixed")
    if some == total:
        return [mixed]
    return [mixed, (Student(widths, exits[n:], n, rows) if n < rows else idle)._replace(label=label)]


class Original(NamedTuple):
    """A frozen model of the same tokenizer, and the share of what it says in what a full pass learns beside the text."""
    model: torch.nn.Module
    share: float = 0.5


def matryoshka_backward(model, x, y, students: list[Student], scale: float,
                        gate_at: torch.Tensor | None = None, exit_at: torch.Tensor | None = None,
                        at_scale: float | None = None, by_width: dict | None = None,
                        exit_weight: float = EXIT_WEIGHT, original: Original | None = None,
                        live: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """
    One training step's losses (DESIGN 8), backward included, each multiplied by `scale`: cross-entropy of the full
    pass (the teacher), then the KL of each student's narrow pass to the teacher's detached distribution, or a mixture of
    that and the text (Student.text), averaged over the supervised tokens of all students. The teacher's graph is freed
    before a student's is built. gate_at: flat indices into (B, T) of supervised tokens; the gate learns from the teacher
    pass at these. exit_at: likewise; at these the full pass also learns to answer at every exit point (exit_loss, times
    exit_weight). at_scale: what these two losses are multiplied by instead (None: scale). by_width: is filled with label ->
    [the students' loss times what it was multiplied by, that factor], both summed. original: the full pass learns from it,
    too. live: y >= 0, on the CPU (None: it is computed, which waits for the device). Returns the losses, detached: 'loss',
    'exits', 'narrow', 'gate'.
    """
    at_scale = scale if at_scale is None else at_scale
    shadow = None if gate_at is None else Shadow(gate_at)
    leaving = None if exit_at is None else Shadow(exit_at, grad=True)
    watching = [one for one in (shadow, leaving) if one is not None]

    def watch(i, x, exits, levels):
        for one in watching:
            one(i, x, exits, levels)
        return exits, levels
    kept = {}
    if original is not None:
        with torch.no_grad():
            kept = {"teacher": original.model.hidden(x), "teacher_head": original.model.lm_head, "text": 1 - original.share}
    loss, teacher = model(x, y, control=watch if watching else None, **kept)
    out, whole = {"loss": loss.detach()}, loss * scale
    if leaving is not None:
        at_exits = exit_loss(model, leaving, teacher, y)
        out["exits"] = at_exits.detach()
        whole = whole + exit_weight * at_scale * at_exits
    whole.backward()
    if students and live is None:
        live = (y >= 0).cpu()
    counts = [s.counts * int(live[s.start:s.stop].sum()) for s in students]
    for s, count in zip(students, counts):
        rows = slice(s.start, s.stop)
        targets = y[rows] if s.counts else torch.full_like(y[rows], -1)
        loss, _ = model(x[rows], targets, widths=s.widths, exits=s.exits, teacher=teacher[rows], text=s.text)
        share = count / max(1, sum(counts))
        (loss * (scale * share)).backward()
        out["narrow"] = out.get("narrow", 0) + loss.detach() * share
        if by_width is not None:
            level = by_width.setdefault(s.widths if s.label is None else s.label, [0.0, 0.0])
            level[0] += loss.detach() * (scale * share)
            level[1] += scale * share
    if shadow is not None:
        here = shadow.there(x.device)
        gate, _ = gate_loss(model, shadow, teacher.flatten(0, 1)[here], y.flatten()[here])
        (gate * at_scale).backward()
        out["gate"] = gate.detach()
    return out


class Shadow:
    """
    Looks on at a pass's exit points, as GPT.hidden's control or Controls.parallel's watch, and keeps the states of a few
    tokens, and whether they got there. at: flat indices into (B, T). grad: the states keep their gradient.
    """
    def __init__(self, at: torch.Tensor, grad: bool = False):
        self.at, self.grad, self.seen, self._there = at, grad, [], None

    def there(self, device: torch.device) -> torch.Tensor:
        """`at` on the device; it is copied once."""
        if self._there is None or self._there.device != device:
            self._there = to_device(self.at, device)
        return self._there

    def __call__(self, i, x, exits, levels=None):
        states = x.flatten(0, 1)[self.there(x.device)]
        self.seen.append((i, states if self.grad else states.detach(), exits.flatten()[self.at] > i))
        return exits, levels


def exit_loss(model, shadow: Shadow, teacher: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """
    What the states that `shadow` has seen at the exit points of a full pass would answer there: half cross-entropy, half KL
    to the pass's own end, a mean over tokens and points. teacher (B, T, D): its normed final states; y (B, T) int64. One
    product with the head and no further pass, and yet it is what makes exits at full width worth taking: student passes
    are seldom that wide, and the full pass was never asked there (dev/LOG.md; Schuster et al. 2022, arXiv 2207.07061,
    train exits so too).
    """
    c, at, n = model.config, shadow.there(y.device), len(shadow.seen)
    states = torch.stack([norm(x, c.d_ref, c.norm_eps) for _, x, _ in shadow.seen])
    return model.lm_head.loss(states, y.flatten()[at].expand(n, -1), teacher.flatten(0, 1)[at].expand_as(states), text=0.5)


def gate_loss(model, shadow: Shadow, full: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """
    Shadow loss: binary cross-entropy of the gate against [a token's loss at an exit <= its own loss at full depth +
    exit_tau], over the tokens and exit points that `shadow` has seen. full (M, D): normed final states of the same tokens at
    full depth; targets (M,) int64, none of them negative. Only the gate gets gradient. Returns the mean and 'brier', a
    tensor, 'pairs', their number N, and the 'confidence' and 'label' of all tokens at all points (points, M), of which those
    in 'here', (points, M) bool on the CPU, are the pairs.
    """
    c = model.config
    states = [full, *(norm(x, c.d_ref, c.norm_eps) for _, x, _ in shadow.seen)]
    with torch.no_grad():  # one call for all exit points: a sharded head is gathered once
        own, *losses = model.lm_head.loss(torch.stack(states), targets.expand(len(states), -1),
                                          reduction="none").view(len(states), -1)
    logits = torch.stack([model.gate(h, c.exit_points.index(i)) for (i, _, _), h in zip(shadow.seen, states[1:])])
    labels = torch.stack([(loss <= own + c.exit_tau).float() for loss in losses])
    here = torch.stack([here for _, _, here in shadow.seen])
    loss, brier = mean_over_pairs(logits, labels, here, select=logits.device.type == "cpu")
    return loss, {"brier": brier, "pairs": int(here.sum()), "confidence": torch.sigmoid(logits.detach()), "label": labels,
                  "here": here}


def mean_over_pairs(logits: torch.Tensor, labels: torch.Tensor, here: torch.Tensor,
                    select: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Binary cross-entropy and Brier score of logits against labels, both (points, M), over the pairs in `here`, (points, M)
    bool on the CPU; 0 where there are none. select: these are taken out first, else all are computed and weighted by 0 or 1:
    on a GPU the number of pairs would be a shape that the CPU has to wait for.
    """
    weight, n = None, max(1, int(here.sum()))
    if select:
        logits, labels = logits[here], labels[here]
    else:
        weight = to_device(here, logits.device).float()
    loss = F.binary_cross_entropy_with_logits(logits, labels, weight, reduction="sum")
    off = (torch.sigmoid(logits.detach()) - labels).square()
    return loss / n, (off if weight is None else off * weight).sum() / n


def predictor_loss(model, x, y, starts, budget: float, temperature: float, generator, rank: int = 0,
                   world: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """
    (cross-entropy behind the prompts at levels sampled from the predictor, their mean cost as a share of full compute), both
    with gradient to the predictor alone, through straight-through Gumbel-softmax and soft prefix masks (DESIGN 7). x, y (B,
    T); starts (B,) int64: a row's first starts[r] tokens are the prompt, which is all that the predictor sees, and the loss
    counts from the prompt's last token on, the one that the first generated token comes from. Rows share the budget, so
    that easy ones can leave compute to hard ones. rank, world: see gumbel_choice.
    """
    T, c = x.size(1), model.config
    t = torch.arange(T, device=x.device)
    starts = starts.to(x.device)[:, None]
    odds = log_odds(predict(model, x, t < starts, budget), level_shares(model)[0])
    choice = gumbel_choice(odds, temperature, generator, rank, world)
    table, fixed = cost_table(model, c.sequence_len / 2)
    # what learns otherwise is left out here; where a model is sharded, nothing but the controls learns
    frozen = {name: p.detach() for name, p in model.named_parameters()
              if p.requires_grad and not name.startswith("predictor.")}
    loss, _ = functional_call(model, frozen, (x, torch.where(t >= starts - 1, y, -1)),
                              {"widths": soft_masks(choice, c.levels, c.top_width)})
    return loss, energy(choice, table, fixed).mean()


def value_loss(model, x, y, starts, full: torch.Tensor, generator, rank: int = 0,
               world: int = 1) -> tuple[torch.Tensor, dict]:
    """
    The predictor's other loss, by regression: what does a plan do to an answer? Each row runs a plan of draw_plans, sliced
    and without gradient; the mean KL of its distributions behind the prompt to those at full compute, for an answer of
    ANSWER tokens, is what the plan costs. The values given up, top - chosen summed over blocks, are fitted to it on the
    scale of x / (1 + x), since what is spoiled cannot be spoiled much more, as two probabilities: by the divergence between
    them, whose best guess is the mean as a squared error's is, but which tells 0.001 from 0.01 as well as 0.1 from 0.5, and
    where next to nothing is lost the prices lie. Unlike straight-through gradients this sees what several narrow blocks do
    together, at a third of the compute (dev/LOG.md). Energy enters by the price at which plans are drawn here and chosen
    later. full (B, T, D): normed final states at full compute; the rest as in predictor_loss. Returns the loss and the means
    'kl' and 'share' (of full compute) of the plans.
    """
    c, (B, T) = model.config, x.shape
    t = torch.arange(T, device=x.device)
    starts = starts.to(x.device)[:, None]
    (shares, floor), levels = level_shares(model), torch.tensor(c.levels)
    any_budget = torch.rand(B * world, generator=generator)[rank::world]  # it plays no part: only prices do
    values = predict(model, x, t < starts, any_budget)
    at = draw_plans(values, shares, generator, rank, world)
    answer = torch.where(t >= starts - 1, y, -1)
    with torch.no_grad():
        kl, _ = model(x, answer, widths=levels[at.cpu()], teacher=full, reduction="none")
        kl = ANSWER * kl.view(B, T).sum(1) / (answer >= 0).sum(1).clamp(min=1)
    lost = (values[..., -1] - values.gather(2, at.unsqueeze(2))[..., 0]).sum(1)
    said, truth = (F.softsign(v.clamp(min=0) + 1e-6) for v in (lost, kl))
    loss = sum((p * (p / q).log()).mean() for p, q in ((truth, said), (1 - truth, 1 - said)))
    share = shares.gather(1, at.T.cpu()).sum(0).mean() + floor - shares[:, 0].sum()
    return loss, {"kl": kl.mean(), "share": share}


def controls_backward(model, x, y, starts, generator: torch.Generator, temperature: float | None = None, tokens: int = 256,
                      scale: float = 1.0, energy_weight: float = 1.0, at: torch.Tensor | None = None, rank: int = 0,
                      world: int = 1, reduce=lambda t: t) -> dict[str, torch.Tensor]:
    """
    One step of training the controls alone, on the model as it is: backward of the shadow loss and of the predictor's loss,
    each multiplied by `scale`. The predictor learns by value_loss, or, given a Gumbel `temperature`, by predictor_loss:
    cross-entropy + energy_weight * |cost - budget|. x, y (B, T), starts (B,): see there.

    The gate learns on the passes that it will see: widths planned by the predictor for a random budget, exits by the gate
    itself at a random threshold. A token's own loss at full depth is that at full width too, since that is the answer it
    would replace. `tokens`: how many supervised tokens it looks at (or `at`: their flat indices). Returns 'loss' (the
    predictor's), 'share' (the mean cost of its plans), 'kl' or 'budget', 'gate' and 'brier'; with several ranks (rank,
    world; reduce sums a tensor over them) the parts of these that add up over the ranks.
    """
    c, T = model.config, x.size(1)
    _, floor = level_shares(model)
    draw = torch.rand(3, generator=generator).tolist()
    budget, leave = floor + (1 - floor) * draw[0], 0.5 + 0.5 * draw[1]
    behind = torch.arange(T) >= starts[:, None] - 1
    if at is None:
        at = some_tokens(behind & (y.cpu() >= 0), tokens, generator)

    prices = [[budget, random_price(torch.tensor(draw[2])).item()]] if temperature is None else []
    shadow, control = Shadow(at), Controls(model, budget, **calibrated_thresholds(leave, c), calibration={"prices": prices})
    with torch.no_grad():
        full = model.hidden(x)
        control.parallel(x, [row[:n] for row, n in zip(x.tolist(), starts.tolist())], behind, shadow)
    here = shadow.there(x.device)
    gate, seen = gate_loss(model, shadow, full.flatten(0, 1)[here], y.flatten()[here])
    own = torch.tensor([seen["pairs"], int((behind & (y.cpu() >= 0)).sum())], dtype=torch.float64)
    of_pairs, of_tokens = (own / reduce(own.clone()).clamp(min=1)).tolist()
    (gate * (scale * of_pairs)).backward()
    out = {"gate": gate.detach() * of_pairs, "brier": seen["brier"] * of_pairs}
    if temperature is None:
        loss, seen = value_loss(model, x, y, starts, full, generator, rank, world)
        (loss * (scale / world)).backward()
        return {"loss": loss.detach() / world, **out, **{k: v / world for k, v in seen.items()}}
    budget = floor + (1 - floor) * draw[2]
    loss, share = predictor_loss(model, x, y, starts, budget, temperature, generator, rank, world)
    off = reduce(share.detach() / world) - budget  # of all ranks' rows together
    ((loss * of_tokens + energy_weight * off.sign() * share / world) * scale).backward()
    return {"loss": loss.detach() * of_tokens, **out, "share": share.detach() / world,
            "budget": torch.tensor(budget / world)}
