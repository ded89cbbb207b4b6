"""
The training step of a hybrid (DESIGN 8), pass by pass, as Run.train asks for it. What is random depends on the seed and the
step alone, and is drawn for the global batch: ranks agree on all they do together, any number of them makes the same step,
and so does a resumed run.
"""
import torch

from nanochat.common import get_rank
from nanochat.confidence_probe import gumbel_temperature
from nanochat.distributed import all_sum
from nanochat.loss_eval import (
    GATE_TOKENS,
    Student,
    controls_backward,
    matryoshka_backward,
    sample_students,
    tokens_of_rows,
)
from nanochat.training import Share, pass_flops

CONTROL_TOKENS = 32  # of a row, that the gate looks at while the controls are trained alone
RECIPES = {
    "both": "a full and a narrow pass of all rows in each step",
    "every": "the narrow pass in every --student-every-th step only",
    "half": "the narrow pass for half of the rows",
    "single": "one pass at sampled widths, cross-entropy only, no teacher",
}


def random_splits(rows: int, T: int, generator: torch.Generator) -> torch.Tensor:
    """Where plain text is cut into a prompt and what follows, (rows,): somewhere in its second to fourth eighth."""
    return torch.randint(max(1, T // 8), max(2, T // 2), (rows,), generator=generator)


class ElasticStep:
    """
    Called with (step, x, y, share) for each pass: backpropagates, and returns its part of the step's losses. recipe: None
    (the full pass alone), one of RECIPES, or 'controls value' or 'controls gumbel' (predictor and gate alone; how the
    predictor learns). sample: sampled widths and exits instead of each level in turn. levels: the widths that students learn
    (None: all). steps: of the run. draft_exit: also a student of full width that leaves after so many blocks.
    """
    def __init__(self, model, seed: int, steps: int, recipe: str | None, sample: bool = True, levels=None,
                 student_every: int = 4, energy_weight: float = 1.0, draft_exit: int | None = None):
        self.model, self.seed, self.steps, self.recipe, self.sample = model, seed, steps, recipe, sample
        self.levels, self.every, self.energy_weight = levels or model.config.levels, student_every, energy_weight
        self.draft_exit, self._flops = draft_exit, {}

    def __call__(self, step: int, x: torch.Tensor, y: torch.Tensor, share: Share) -> dict:
        model, config, (rows, T), (rank, world) = self.model, self.model.config, x.shape, get_rank()
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        full = self.flops(None) * x.numel()
        drafts = [] if self.draft_exit is None else [Student(exits=torch.full((rows, T), self.draft_exit), label="draft")]
        if self.recipe is None:
            losses = matryoshka_backward(model, x, y, drafts, share.tokens)
            part = self.draft_exit / config.n_block if drafts else 0
            return {k: v * share.tokens for k, v in losses.items()} | {"flops": full * (1 + part)}
        splits = random_splits(rows * world, T, g)
        if self.recipe.startswith("controls"):
            temperature = gumbel_temperature(step, self.steps) if self.recipe == "controls gumbel" else None
            mine = splits[rank::world]
            behind = (y.cpu() >= 0) & (torch.arange(T) >= mine[:, None] - 1)
            at = tokens_of_rows(behind, CONTROL_TOKENS, g, rank, world)
            losses = controls_backward(model, x, y, mine, g, temperature, scale=share.passes,
                                       energy_weight=self.energy_weight, at=at, rank=rank, world=world, reduce=all_sum)
            return {k: v * share.passes for k, v in losses.items()}
        if self.recipe == "single":
            student = sample_students(config, rows, T, splits, g, 0, rank, world, self.levels)[0]
            loss, _ = model(x, y, widths=student.widths, exits=student.exits)
            (loss * share.tokens).backward()
            return {"loss": loss.detach() * share.tokens, "flops": self.flops(student.widths) * x.numel()}
        at = tokens_of_rows(y >= 0, GATE_TOKENS, g, rank, world)
        students = self._students(step, rows, T, splits, g, rank, world) + drafts
        by_width = {}
        losses = matryoshka_backward(model, x, y, students, share.tokens, at, share.gate, by_width)
        weights = {"gate": share.gate}
        out = {k: v * weights.get(k, share.tokens) for k, v in losses.items()}
        for width, (loss, weight) in by_width.items():
            out |= {f"kl_{width}": loss, f"kl_{width}:": weight}
        narrow = sum(self.flops(s.widths) * T * len(x[s.start:s.stop]) for s in students)
        return out | {"flops": full + narrow}

    def _students(self, step, rows, T, splits, g, rank, world) -> list[Student]:
        if self.recipe == "every" and step % self.every:
            return []
        if self.recipe == "half":
            rows, splits = max(1, rows // 2), splits[:max(1, rows // 2) * world]
        if not self.sample:
            return [Student(d, stop=rows) for d in self.levels if d < self.model.config.top_width]
        students = sample_students(self.model.config, rows, T, splits, g, None, rank, world, self.levels)
        return [s._replace(stop=rows) if s.stop is None else s for s in students]

    def flops(self, widths) -> float:
        """Per token; where rows differ, as its first token's."""
        if isinstance(widths, torch.Tensor):
            widths = widths[0, 0].tolist()
        key = tuple(widths) if isinstance(widths, list) else widths
        if key not in self._flops:
            self._flops[key] = pass_flops(self.model, widths, (self.model.config.sequence_len + 1) / 2)
        return self._flops[key]
