"""
The two controls of elastic compute, and how they are put to work.

LayerDimPredictor looks once at the prompt, before any block runs, and picks a level for every block. ConfidenceGate looks
at a token's state at the exit points: sure enough, and the token leaves; unsure in the second half, and the blocks that
remain get wider. Controls turns both into decisions, for the engine (token by token) and for a parallel pass (all tokens
of a text at once): the two decide alike, since a token's decision depends on its own state, and a row's widening only on
the tokens before.
"""
import itertools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat import cpu_decode
from nanochat.common import Progress
from nanochat.matryoshka import cost_table, norm, once_per_model, token_flops

CLOSED = -1e4  # bias of a gate's unit or a predictor's gain that growth appends: exactly 0 behind it, so no answer changes


def by_frequency(tokens: torch.Tensor) -> torch.Tensor:
    """The ids that occur among `tokens` (any shape, int64, none negative), the most frequent first."""
    count = tokens.flatten().bincount()
    return count.argsort(descending=True, stable=True)[:int((count > 0).sum())]


class ConfidenceGate(nn.Module):
    """
    How sure it is that leaving here would cost nothing: one hidden layer on the normed state, and how far its likeliest unit
    stands out. The units begin as the head's rows of the most frequent tokens, so that this is the peak of a small softmax,
    for a fraction of the head's compute: no hidden layer without it came near (dev/LOG.md). Its parameters stay fp32.
    """
    PEAK = 3  # features of the softmax over the units
    def __init__(self, width: int, n_points: int):
        super().__init__()
        hidden = min(256, max(32, width // 2))
        self.c_fc = nn.Linear(width, hidden, bias=False)
        self.point = nn.Embedding(n_points, hidden)
        self.c_proj = nn.Linear(self.PEAK + hidden, n_points)

    @torch.no_grad()
    def init_weights(self):
        """The last layer is zero: an untrained gate answers 0.5, and so it shows that it is untrained."""
        bound = (3 / self.c_fc.in_features) ** 0.5
        nn.init.uniform_(self.c_fc.weight, -bound, bound)
        for p in (self.point.weight, self.c_proj.weight, self.c_proj.bias):
            p.zero_()  # and empty where the model has no exit point

    @torch.no_grad()
    def resemble(self, rows: torch.Tensor) -> None:
        """Before training: the first units become these rows (n, D) of the head, most frequent tokens first."""
        n = min(len(rows), len(self.c_fc.weight))
        self.c_fc.weight[:n] = rows[:n].to(self.c_fc.weight)

    @torch.no_grad()
    def admit_new_units(self) -> None:
        """Training begins: units that growth appended take part, where no gradient would ever reach them before."""
        self.point.weight.masked_fill_(self.point.weight <= CLOSED / 2, 0.0)

    def forward(self, h: torch.Tensor, point: int) -> torch.Tensor:
        """h (..., D), normed state at exit point number `point` -> logit of the confidence (...), fp32."""
        units = self.c_fc(h.float()) + self.point.weight[point]
        first, second = units.topk(2, -1).values.split(1, -1)
        likeliest = (units - first).logsumexp(-1, keepdim=True).neg().clamp(max=-1e-6)  # log-probability; near 0 too
        others = torch.log(-torch.expm1(likeliest))
        features = torch.cat((likeliest, others, first - second, F.relu(units).square()), -1)
        return features @ self.c_proj.weight[point] + self.c_proj.bias[point]

    @property
    def flops(self) -> int:
        """Of one token at one exit point; an exponential and a logarithm count as one."""
        hidden, width = self.c_fc.weight.shape
        return 2 * hidden * width + 6 * hidden + 2 * (self.PEAK + hidden)


class LayerDimPredictor(nn.Module):
    """
    Also called difficulty estimator: from the embeddings of a prompt and a compute budget, the value of running every block
    at every level: in nats, or as log-odds, as it was trained (loss_eval.py). A level's value is that of the one below and a
    gain above 0: wider is never worse, and where nothing tells levels apart compute has a price and noise none (dev/LOG.md).
    Each token's features are pooled by mean and by maximum. Its parameters stay fp32; out is (n_block, n_levels - 1, hidden)
    so that growth appends levels behind the old ones. The budget enters as bumps along (0, 1]: as a single number beside so
    many features it was ignored. What makes the gains is capped: it ran into the hundreds, where no draw shows another
    level.
    """
    BUMPS, CAP, BIAS, ADMITTED = 8, 6.0, -1.0, -3.0  # biases of a level's gain: untrained, and first trained behind growth
    def __init__(self, width: int, n_block: int, n_levels: int):
        super().__init__()
        hidden = min(256, max(64, width // 2))
        self.c_in = nn.Linear(width, hidden, bias=False)
        self.c_mid = nn.Linear(2 * hidden + 1 + self.BUMPS, hidden)
        self.out_weight = nn.Parameter(torch.empty(n_block, n_levels - 1, hidden))
        self.out_bias = nn.Parameter(torch.empty(n_block, n_levels - 1))

    @torch.no_grad()
    def init_weights(self):
        """The last layer's weights are zero: an untrained predictor finds all prompts alike."""
        for layer in (self.c_in, self.c_mid):
            bound = (3 / layer.in_features) ** 0.5
            nn.init.uniform_(layer.weight, -bound, bound)
        nn.init.zeros_(self.c_mid.bias)
        self.out_weight.zero_()  # both are empty where there is one level only
        self.out_bias.fill_(self.BIAS)

    def forward(self, e: torch.Tensor, valid: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
        """
        e (B, T, D) normed embeddings, of which those with valid (B, T) bool are the prompt (at least one a row); budget
        (B,) in (0, 1] -> values (B, n_block, n_levels), fp32, ascending from 0.
        """
        f = F.silu(self.c_in(e.float()))
        on = valid.unsqueeze(-1)
        count = on.sum(1)
        mean = (f * on).sum(1) / count
        top = f.masked_fill(~on, float("-inf")).amax(1)
        centres = torch.arange(1, self.BUMPS + 1, device=e.device) / self.BUMPS
        bumps = 4 * torch.exp(-((budget.float()[:, None] - centres) * self.BUMPS).square())
        hidden = F.silu(self.c_mid(torch.cat((mean, top, count.float().log2() / 8, bumps), -1)))
        raw = torch.einsum("bh,nlh->bnl", hidden, self.out_weight)
        gain = F.softplus(self.CAP * torch.tanh(raw / self.CAP) + self.out_bias)
        return F.pad(gain.cumsum(-1), (1, 0))

    @torch.no_grad()
    def admit_new_levels(self) -> None:
        """Training begins: levels that growth appended gain a little, where no gradient would ever reach them before."""
        self.out_bias.masked_fill_(self.out_bias <= CLOSED / 2, self.ADMITTED)

    def flops(self, tokens: int) -> int:
        """Of one prompt."""
        return 2 * (tokens * self.c_in.weight.numel() + self.c_mid.weight.numel() + self.out_weight.numel())


def log_odds(values: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """
    Values (B, n_block, n_levels), all ascending, as log-odds that can fall too: minus the price of compute at which an
    untrained predictor finds the narrowest and the widest plan alike, and all that fourfold, or no narrow level could become
    nearly certain. shares (n_block, n_levels), see level_shares.
    """
    n_block, n_levels = shares.shape
    alike = n_block * (n_levels - 1) * math.log1p(math.exp(LayerDimPredictor.BIAS))
    return 4 * (values - alike / float((shares[:, -1] - shares[:, 0]).sum()) * shares.to(values))


def gumbel_choice(logits: torch.Tensor, temperature: float, generator: torch.Generator | None = None, rank: int = 0,
                  world: int = 1) -> torch.Tensor:
    """
    Straight-through Gumbel-softmax (Jang et al. 2017, arXiv 1611.01144): a one-hot sample of softmax(logits) over the last
    dim of (B, n_block, n_levels), whose gradient is that of the soft sample at this temperature. In half the rows all blocks
    share one noise: one narrow block among many can spoil an answer, so that independent draws would hardly ever show what
    a wide plan is worth. rank, world: these rows are every world-th of a batch whose noise all ranks draw alike.
    """
    soft = ((logits + _gumbel(logits, generator, rank, world)) / temperature).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), soft.size(-1)).to(soft)
    return hard + (soft - soft.detach())


def _gumbel(logits: torch.Tensor, generator: torch.Generator | None, rank: int, world: int) -> torch.Tensor:
    """Gumbel noise for logits (B, n_block, n_levels), in half the rows the same for all blocks; see gumbel_choice."""
    rows = len(logits) * world
    uniform = torch.rand(rows, *logits.shape[1:], generator=generator)[rank::world]
    alike = torch.rand(rows, 1, 1, generator=generator)[rank::world] < 0.5
    uniform = torch.where(alike, uniform[:, :1], uniform).to(logits.device).clamp(1e-9, 1 - 1e-7)
    return -(-uniform.log()).log()


def random_price(u: torch.Tensor) -> torch.Tensor:
    """u in (0, 1) -> a price of compute from 0.01 to 3 nats per whole model, log-uniform if u is uniform."""
    return 10 ** (2.5 * u - 2)


@torch.no_grad()
def draw_plans(values: torch.Tensor, shares: torch.Tensor, generator: torch.Generator | None = None, rank: int = 0,
               world: int = 1) -> torch.Tensor:
    """
    Plans to learn values from, indices of levels (B, n_block): near the best at a price of compute that each row draws for
    itself; in a quarter of the rows at random. values (B, n_block, n_levels) in nats, shares (n_block, n_levels). rank,
    world: see gumbel_choice.
    """
    price, blind = torch.rand(2, len(values) * world, 1, 1, generator=generator)[:, rank::world].to(values.device)
    wish = (values - random_price(price) * shares.to(values)) / 0.3
    return (torch.where(blind < 0.25, 0, wish) + _gumbel(values, generator, rank, world)).argmax(-1)


def gumbel_temperature(step: int, total: int) -> float:
    """1 falling to 0.2 over the first 64 % of the training steps."""
    return max(0.2, 1 - step / (0.8 * total))


def check_trained(model) -> None:
    """ValueError where the model has no trained controls: what they lack, and how to train them."""
    for name in ("predictor", "gate"):
        control = getattr(model, name, None)
        if control is None:
            raise ValueError("mode 'auto' needs the controls of a hybrid, and this is a base GPT: make a hybrid with "
                             "`python -m scripts.surgery` and train it with `python -m scripts.fractal_train`")
        if not bool((control.out_weight if name == "predictor" else control.c_proj.weight).any()):
            raise ValueError(f"mode 'auto' needs trained controls, and this checkpoint's {name} was never trained: run "
                             "`python -m scripts.fractal_train --controls` on it, or choose ghost, whisper, normal or think")


def is_trained(model) -> bool:
    """Whether the model has trained controls, so that mode 'auto' can run."""
    try:
        check_trained(model)
    except ValueError:
        return False
    return True


class Controls:
    """
    Mode `auto` for the rows of one batch. `plan` picks their widths; it is then GPT.hidden's control, which lets tokens exit
    and rows expand, for the rows that `begin` named. A row's expansion lasts: `widths` (rows, n_block) int64 holds what its
    next token starts with, another tensor once one has expanded. `exits` (B, T), or a number, and `ran`, n_block levels, say
    how the tokens of the last pass were computed.

    budget: share of the full model's FLOPs per token that the predictor may plan for, exits not counted; None: the one
    the checkpoint was calibrated at, or 1. Thresholds: None: the config's. score(i, x): replaces the gate, (B, T) in (0, 1)
    from the states x (B, T, D) behind i blocks.
    ValueError for a budget or thresholds out of range.
    """
    def __init__(self, model, budget: float | None = None, exit_threshold: float | None = None,
                 expand_threshold: float | None = None, calibration: dict | None = None, score=None):
        c = model.config
        self.model, self.score = model, score or self._gate
        self.exit_threshold = c.exit_threshold if exit_threshold is None else exit_threshold
        self.expand_threshold = c.expand_threshold if expand_threshold is None else expand_threshold
        check_thresholds(self.exit_threshold, self.expand_threshold)
        calibration = calibration or {}
        self.budget = calibration.get("budget", 1.0) if budget is None else budget
        (self.shares, floor), self.levels = level_shares(model), level_tensor(model)
        if not 0 < self.budget <= 1:
            raise ValueError(f"the budget {self.budget} is out of range: give a share of the full compute in (0, 1]")
        if self.budget < floor:
            raise ValueError(f"a budget of {self.budget} is less than the narrowest widths cost, {floor:.3f} of the full "
                             f"compute: give one from {floor:.3f} to 1")
        self.price = _interpolate(calibration.get("prices", []), self.budget)
        self.widths = self.rows = self.exits = self.ran = None
        self.bar = self._bar if score is None else None

    def _bar(self, levels: list) -> tuple[float, float]:
        """
        Above the one answer of the gate a token leaves, below the other (past half depth) its row expands, if any of the
        levels of the blocks to come can.
        """
        top = self.model.config.top_width
        return self.exit_threshold, self.expand_threshold if any(d != top for d in levels) else 0.0

    def begin(self, rows: list[int], exits: torch.Tensor | int, levels: list) -> None:
        """
        A pass of these planned rows begins, with what it would do if nothing were decided (see GPT.hidden), for whoever
        reads `exits` and `ran` behind it.
        """
        self.rows, self.exits, self.ran = rows, exits, levels

    def _gate(self, i, x):
        c = self.model.config
        return torch.sigmoid(self.model.gate(norm(x, c.d_ref, c.norm_eps), c.exit_points.index(i)))

    @torch.no_grad()
    def plan(self, prompts: list[list[int]], run=None) -> torch.Tensor:
        """
        The levels of every block for each prompt, (rows, n_block) int64; they are remembered as `widths`. run: a BlockRun
        that makes the plan of a single prompt (None: the model does, as that of several).
        """
        if any(not p for p in prompts):
            raise ValueError("the prompt is empty: give at least one token, such as <|bos|>")
        if run is not None:
            self.widths = run.plan(*prompts, self.budget, self.price, self.shares)
        else:
            values = predict(self.model, *pad(prompts, self.model.device), self.budget).cpu()
            self.widths = choose(values, self.levels, self.shares, self.price)
        return self.widths

    def parallel(self, x: torch.Tensor, prompts: list[list[int]], acts: torch.Tensor, watch=None):
        """
        One pass over whole texts x (B, T) that decides as decoding them token by token would: (normed final states
        (B, T, D), planned widths (B, n_block)). acts (B, T) bool: the tokens that generate. watch(i, states, exits): looks
        on at each exit point, before a decision.
        """
        widths = self.plan(prompts)
        self.begin(list(range(len(x))), None, None)

        def decide(i, states, exits, levels):
            if watch is not None:
                watch(i, states, exits)
            return self(i, states, exits, levels, acts=acts)
        return self.model.hidden(x, widths, control=decide), widths

    def flops(self, at: torch.Tensor, per_point: float | None = None) -> torch.Tensor:
        """
        Of each of the N tokens at mask `at` (B, T) in the last parallel pass, (N,) fp64; per_point: of a decision (None: the
        gate's).
        """
        ran = torch.stack([torch.as_tensor(w).expand(at.shape) for w in self.ran], -1)[at]
        place = torch.arange(1, at.size(1) + 1).expand(at.shape)[at]
        return token_flops(self.model, self.exits[at], ran, place, self.model.gate.flops if per_point is None else per_point)

    def __call__(self, i, x, exits, levels, sure: float | None = None, acts=None):
        """
        GPT.hidden's control. sure: of a single token, the gate's answer. acts (B, T) bool: where the gate may decide (None:
        everywhere).
        """
        if sure is not None and sure > self.exit_threshold and acts is None:  # as below, in a tenth of the time
            self.exits, self.ran = i, levels
            return self.exits, levels
        if isinstance(exits, int):
            exits = torch.full(x.shape[:2], exits)
        going = exits > i if acts is None else (exits > i) & acts
        sure = self.score(i, x).cpu() if sure is None else torch.full_like(exits, sure, dtype=torch.float32)
        leave = going & (sure > self.exit_threshold)
        exits = exits.masked_fill(leave, i)
        if 2 * i > self.model.config.n_block:
            up = (going & ~leave & (sure < self.expand_threshold)).cumsum(1)  # (B, T) how many levels up by now
            if bool(up.any()):
                levels, self.widths = list(levels), self.widths.clone()
                for b in range(i, len(levels)):
                    level = torch.as_tensor(levels[b]).expand(up.shape)
                    at = (torch.searchsorted(self.levels, level.contiguous()) + up).clamp(max=len(self.levels) - 1)
                    levels[b] = self.levels[at]
                    self.widths[self.rows, b] = levels[b][:, -1]
                    if bool((levels[b] == levels[b].flatten()[0]).all()):
                        levels[b] = int(levels[b].flatten()[0])
        self.exits, self.ran = exits, levels
        return exits, levels


@once_per_model
def level_shares(model) -> tuple[torch.Tensor, float]:
    """
    (n_block, n_levels) fp64: the FLOPs of each block at each level as shares of the whole model at full width, half its
    context filled; and the share of the model at its narrowest, the least budget that a plan can meet.
    """
    table, fixed = cost_table(model, model.config.sequence_len / 2)
    full = float(table[:, -1].sum()) + fixed
    return table / full, (float(table[:, 0].sum()) + fixed) / full


@once_per_model
def level_tensor(model) -> torch.Tensor:
    """The levels (n_levels,), int64."""
    return torch.tensor(model.config.levels)


def budget_grid(model) -> list[float]:
    """Sixteen budgets from a little above the narrowest widths' cost up to 1."""
    _, floor = level_shares(model)
    return [round(floor + (1 - floor) * i / 16, 4) for i in range(1, 17)]


def check_thresholds(leave: float, expand: float) -> None:
    """ValueError unless 0 <= expand <= leave; a `leave` of 1 or more never exits."""
    if not 0 <= expand <= leave:
        raise ValueError(f"the exit threshold {leave} must not be below the expand threshold {expand}, and neither below 0: "
                         "a token cannot be sure enough to leave and too unsure to go on at its width")


def pad(prompts: list[list[int]], device) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts -> ids (B, T) int64, zero behind a row's end, and valid (B, T) bool."""
    T = max(map(len, prompts))
    idx = torch.tensor([p + [0] * (T - len(p)) for p in prompts], device=device)
    valid = torch.arange(T, device=device) < torch.tensor([[len(p)] for p in prompts], device=device)
    return idx, valid


def predict(model, idx: torch.Tensor, valid: torch.Tensor, budget) -> torch.Tensor:
    """The predictor's values (B, n_block, n_levels) for prompts idx (B, T), valid (B, T); budget: a number or (B,)."""
    c, table = model.config, model.transformer.wte.weight
    budget = torch.as_tensor(budget, dtype=torch.float32, device=idx.device).expand(len(idx))
    if cpu_decode.serves_prompts(idx, table, model.compute_dtype, model.predictor):
        return cpu_decode.predictor(model.predictor, table, idx, valid, budget, c.d_ref, c.norm_eps)
    e = norm(model.embed(model.transformer.wte, idx), c.d_ref, c.norm_eps).detach()
    return model.predictor(e, valid, budget)


def choose(values: torch.Tensor, levels: torch.Tensor, shares: torch.Tensor, price: float) -> torch.Tensor:
    """
    The best level of each block after each level has paid for its compute, of equal ones the narrower: values (B, n_block,
    n_levels), shares (n_block, n_levels) of the full compute, price in nats per whole model -> widths (B, n_block) int64.
    """
    return levels[(values.double() - price * shares).argmax(-1)]


def _interpolate(points: list, at: float) -> float:
    """Linear between [x, y] points, flat outside; 0 without points."""
    points = sorted(points)
    if not points:
        return 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= at <= x1:
            return y0 + (y1 - y0) * ((at - x0) / (x1 - x0) if x1 > x0 else 0)
    return points[0][1] if at < points[0][0] else points[-1][1]


@torch.no_grad()
def calibrate_prices(model, prompts: list[list[int]], budgets: list[float]) -> list[list[float]]:
    """
    For each budget the price (see `choose`) at which the plans for these prompts cost that much on average: [[budget,
    price], ...]. A predictor alone meets a budget only about as well as its training asked for.
    """
    (shares, floor), levels = level_shares(model), level_tensor(model)
    rest = floor - float(shares[:, 0].sum())
    idx, valid = pad(prompts, model.device)
    out = []
    for budget in budgets:
        values = predict(model, idx, valid, budget).cpu()
        low, high = 0.0, 1e4  # a higher price, a lower cost
        for _ in range(60):
            price = (low + high) / 2
            at = torch.searchsorted(levels, choose(values, levels, shares, price))
            cost = float(shares.gather(1, at.T).sum(0).mean()) + rest
            low, high = (price, high) if cost > budget else (low, price)
        out.append([budget, (low + high) / 2])
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Calibration: Learn-then-Test (Angelopoulos et al. 2021, arXiv 2110.01052) with fixed-sequence testing

# Exit thresholds in the order of their testing, strictest first; 1 never exits.
THRESHOLDS = (1.0, 0.999, 0.997, 0.99, 0.98, 0.97, 0.95, 0.93, 0.9, 0.87, 0.83, 0.78, 0.7, 0.6, 0.5)
TUNED = THRESHOLDS[::4]  # those that `tune` looks at, for every budget
PATH_STEPS = 24  # limits on the cost that pareto_path tries


def sequences_needed(delta: float, epsilon: float) -> int:
    """The fewest sequences that can bound a risk by delta at confidence 1 - epsilon: so many, and no loss in any."""
    for name, value in (("delta", delta), ("epsilon", epsilon)):
        if not 0 < value < 1:
            raise ValueError(f"{name} {value} is out of range: give one in (0, 1)")
    return math.ceil(math.log(epsilon) / math.log1p(-delta))


def p_value(losses: torch.Tensor, delta: float) -> float:
    """
    How likely it is to see losses as low as these (n,), each in [0, 1], if their mean truly exceeded delta. Exact (binomial)
    where each is 0 or 1, else the Hoeffding-Bentkus bound (Bates et al. 2021, arXiv 2101.02703).
    """
    n, mean = len(losses), float(losses.double().mean())

    def tail(k):  # P[Binomial(n, delta) <= k]
        i = torch.arange(k + 1, dtype=torch.float64)
        log = math.lgamma(n + 1) - torch.lgamma(i + 1) - torch.lgamma(n - i + 1)
        return min(1.0, float((log + i * math.log(delta) + (n - i) * math.log1p(-delta)).exp().sum()))
    if bool(((losses == 0) | (losses == 1)).all()):
        return tail(round(mean * n))
    if mean >= delta:
        return 1.0
    kl = (mean * math.log(mean / delta) if mean else 0) + (1 - mean) * math.log((1 - mean) / (1 - delta))
    return min(1.0, math.exp(-n * kl), math.e * tail(math.ceil(n * mean)))


def fixed_sequence(losses: torch.Tensor, delta: float, epsilon: float) -> tuple[int, list[float]]:
    """
    losses (settings, n), the strictest setting first, in an order chosen without looking at them -> (the last setting, from
    the first on without a gap, whose p-value is at most epsilon, or -1; the p-values up to the first failure). With
    probability 1 - epsilon over the draw of the n sequences, that setting's true risk is at most delta.
    ValueError when n is too small for any setting to pass.
    """
    n, least = losses.size(1), sequences_needed(delta, epsilon)
    if n < least:
        raise ValueError(f"{n} sequences cannot bound the risk by {delta} at confidence {1 - epsilon:g}: give at least "
                         f"{least}, or a larger delta or epsilon")
    values = []
    for row in losses:
        values.append(p_value(row, delta))
        if values[-1] > epsilon:
            return len(values) - 2, values
    return len(values) - 1, values


def pareto_path(points: list[tuple[tuple[float, float], float, float]]) -> list[tuple[float, float]]:
    """
    The order in which to test settings (budget, exit threshold), from (setting, loss, cost) of each on tuning data that the
    test does not use: behind full compute, for ever lower limits on the cost, the setting of least loss that keeps within
    (Pareto testing, Laufer-Goldshtein et al. 2022, arXiv 2210.07913). Of settings that lose alike, as nothing at all on few
    data, the one nearer to full compute in both respects: a path that leaps to the cheapest of these fails its first test.
    For the same reason, where a step loses more than the setting it comes from, at no stricter threshold, the budgets that
    it leaves out come between, at that setting's threshold, but for those that lose more than where it goes.
    """
    lost = {s: loss for s, loss, _ in points}
    grids = [sorted({s[k] for s, _, _ in points}, reverse=True) for k in (0, 1)]

    def key(point):
        setting, loss, cost = point
        return loss, max(grid.index(v) / len(grid) for v, grid in zip(setting, grids)), -cost
    full, path = max(cost for _, _, cost in points), [(1.0, 1.0)]
    for k in range(1, PATH_STEPS):
        within = [p for p in points if p[2] <= full * (1 - k / PATH_STEPS)]
        if within and (best := min(within, key=key)[0]) not in path:
            (budget, threshold), last = best, path[-1]
            if threshold <= last[1] and lost[best] > lost.get(last, 0):
                between = [(b, last[1]) for b in grids[0] if budget < b < last[0]]
                path += [s for s in between if s not in path and lost.get(s, math.inf) <= lost[best]]
            path.append(best)
    return path


def tune(model, run, most: float) -> list[tuple[float, float]]:
    """
    The path of settings to test, from tuning data: run(budget, exit threshold) -> (losses (n,), FLOPs) of them. A budget's
    thresholds are lowered until the mean loss exceeds `most`, budgets until even without exits it does.
    """
    points, budgets = [], budget_grid(model)[::-1]
    progress = Progress("tuning", len(budgets) * len(TUNED), "settings")
    for budget in budgets:
        for threshold in TUNED:
            losses, flops = run(budget, threshold)
            points.append(((budget, threshold), float(losses.mean()), flops))
            progress.step()
            if points[-1][1] > most:
                break
        if points[-1][0] == (budget, 1.0):
            break
    return pareto_path(points)


def calibrate(losses_at, delta: float, epsilon: float, settings: list[tuple[float, float]]) -> tuple[dict, torch.Tensor]:
    """
    Chooses a setting (budget, exit threshold) by Learn-then-Test from a list whose order does not depend on these data, the
    strictest first. losses_at(budget, threshold) -> losses (n,) in [0, 1] of n held-out sequences. Returns the evidence:
    'exit_threshold' and 'budget' (None where not even the strictest passes), 'delta', 'epsilon', 'sequences', 'settings',
    'observed' (mean losses) and 'p_values' of those tested; and the losses (settings, n) of all that were looked at, up
    to one whose mean is three times delta.
    """
    sequences_needed(delta, epsilon)  # refuses values out of range before anything is computed
    losses = []
    for setting in settings:
        losses.append(losses_at(*setting).double())
        if losses[-1].mean() > 3 * delta:
            break
    losses = torch.stack(losses)
    at, values = fixed_sequence(losses, delta, epsilon)
    budget, threshold = settings[at] if at >= 0 else (None, None)
    return {"exit_threshold": threshold, "budget": budget, "delta": delta, "epsilon": epsilon,
            "sequences": losses.size(1), "settings": [list(s) for s in settings[:len(values)]], "p_values": values,
            "observed": losses.mean(1)[:len(values)].tolist()}, losses


def calibrated_thresholds(leave: float | None, config) -> dict[str, float]:
    """The config's thresholds after calibration: None, nothing passed, never exits."""
    leave = 1.0 if leave is None else leave
    return {"exit_threshold": leave, "expand_threshold": min(leave, config.expand_threshold)}
