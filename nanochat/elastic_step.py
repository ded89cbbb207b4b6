"""
The training step of a hybrid, pass by pass, as Run.train asks for it: DESIGN 8's (recipe both), and what was compared with
it. What is random depends on the seed, the step and the number of the pass in it, and is drawn for a pass of all ranks
together: they agree on all they do together, and so does a resumed run. Any number of ranks makes the same step of the same
rows in as many passes; with more passes of fewer rows the draws are others, and more. Two exceptions: without narrow passes
nothing is drawn, and the number of passes makes no difference; and with recipe 'half', where rows hold different numbers of
supervised tokens, a rank's narrow pass has the weight of all its rows and not of the half, so that ranks differ by that.
"""
import torch

from nanochat.common import get_rank
from nanochat.confidence_probe import gumbel_temperature
from nanochat.distributed import all_sum
from nanochat.loss_eval import (
    EXIT_WEIGHT,
    PROBED,
    Original,
    Student,
    controls_backward,
    matryoshka_backward,
    sample_students,
    tokens_of_rows,
)
from nanochat.matryoshka import sample_levels
from nanochat.step_parts import Share, pass_flops

PASSES_APART = 0x9E3779B1  # the generator's seed is its lowest 32 bits, which multiples of 2^32 / 1.618 fill most evenly
CONTROL_TOKENS = 32  # of a row, that the gate looks at while the controls are trained alone
RECIPES = {
    "both": "a full and a narrow pass of all rows in each step",
    "every": "the narrow pass in every --student-every-th step only",
    "half": "the narrow pass for half of the rows",
    "lean": "a full pass of half of the rows, a narrow one of the others, which learns the text and what the whole model "
            "says of it in a forward pass alone",
    "split": "a full pass of half of the rows, a narrow one of the others, which learns the text, no teacher",
    "single": "one pass at sampled widths, cross-entropy only, no teacher",
}
TAUGHT = {"both", "every", "half"}  # their full and narrow passes see the same rows, so that the gate can learn along
DEFAULT_RECIPE = "lean"  # where widths are sampled: the best at equal compute, all in all (dev/LOG.md)
TEXT_SHARE = 0.5  # of what a narrow pass learns where it has a teacher; the rest is the teacher's distribution


def random_splits(rows: int, T: int, generator: torch.Generator) -> torch.Tensor:
    """Where plain text is cut into a prompt and what follows, (rows,): somewhere in its second to fourth eighth."""
    return torch.randint(max(1, T // 8), max(2, T // 2), (rows,), generator=generator)


class ElasticStep:
    """
    Called with (step, x, y, share) for each pass: backpropagates, and returns its part of the step's losses. recipe: None
    (the full pass alone), one of RECIPES, or 'controls value' or 'controls gumbel' (predictor and gate alone; how the
    predictor learns). sample: sampled widths and exits instead of each level in turn. levels: the widths that students learn
    (None: all). steps: of the run. draft_exit: also a student of full width that leaves after so many blocks. exit_weight:
    how much a recipe's full pass also learns to answer at the exit points (loss_eval.exit_loss). A narrow pass that has a
    teacher learns half from it and half from the text, a draft all from it. Losses by width: 'narrow_' and, where only some
    rows are in the full pass, 'loss_'; 'loss' is then the mean over all rows.
    """
    def __init__(self, model, seed: int, steps: int, recipe: str | None, sample: bool = True, levels=None,
                 student_every: int = 4, energy_weight: float = 1.0, draft_exit: int | None = None,
                 exit_weight: float = EXIT_WEIGHT):
        assert draft_exit is None or recipe is None or recipe in TAUGHT, "drafts have a teacher"
        self.model, self.seed, self.steps, self.recipe, self.sample = model, seed, steps, recipe, sample
        self.levels, self.every, self.energy_weight = levels or model.config.levels, student_every, energy_weight
        self.draft_exit, self._flops, self._looking, self._head = draft_exit, {}, None, model.cost()["head"].flops
        self.exit_weight = exit_weight if model.config.exit_points else 0.0  # a single pair of blocks has none
        self.context = (model.config.sequence_len + 1) / 2  # of a token, on average
        self.original: Original | None = None
        self.unsupervised = torch.zeros(())

    def __call__(self, step: int, x: torch.Tensor, y: torch.Tensor, share: Share) -> dict:
        model, config, (rows, T), (rank, world) = self.model, self.model.config, x.shape, get_rank()
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + step + share.number * PASSES_APART)
        live = (y >= 0).cpu() if share.live is None else share.live
        self.unsupervised = self.unsupervised + (~live).all(1).sum()
        full = (self.flops(None, 1) + self.original_flops()) * x.numel()
        drafts = [] if self.draft_exit is None else [Student(exits=torch.full((rows, T), self.draft_exit), label="draft")]
        if self.recipe is None:
            losses = matryoshka_backward(model, x, y, drafts, share.tokens, original=self.original, live=live)
            return {k: v * share.tokens for k, v in losses.items()} | {"flops": full + self.student_flops(drafts, x)}
        splits = random_splits(rows * world, T, g)
        if self.recipe.startswith("controls"):
            temperature = gumbel_temperature(step, self.steps) if self.recipe == "controls gumbel" else None
            mine = splits[rank::world]
            behind = live & (torch.arange(T) >= mine[:, None] - 1)
            at = tokens_of_rows(behind, CONTROL_TOKENS, g, rank, world)
            losses = controls_backward(model, x, y, mine, g, temperature, scale=share.passes,
                                       energy_weight=self.energy_weight, at=at, rank=rank, world=world, reduce=all_sum)
            return {k: v * share.passes for k, v in losses.items()}
        if self.recipe not in TAUGHT:
            # no row expands: these recipes learn more for expanded caches, too, at fixed widths (dev/LOG.md)
            student = sample_students(config, rows, T, splits, g, 0, rank, world, self.levels)[0]
            whole = 0 if self.recipe == "single" else len(range(rank, rows * world // 2, world))  # of this rank's rows
            weight = share.tokens / max(1, int(live.sum()))
            out = {"loss": 0.0, "flops": 0.0}

            def note(label, loss, weight):
                out[label], out[f"{label}:"] = loss.detach() * weight, weight
                return out[label]
            if whole < rows:
                teacher, x1, y1 = None, x[whole:], y[whole:]
                out["flops"] += self.flops(student.widths, x1.numel())
                if self.recipe == "lean":
                    with torch.no_grad():
                        _, teacher = model(x1, y1)
                    out["flops"] += self.looking_flops() * x1.numel()
                loss, _ = model(x1, y1, widths=student.widths, exits=student.exits[whole:], teacher=teacher, text=TEXT_SHARE)
                own = weight * int(live[whole:].sum())
                (loss * own).backward()
                out["loss"] += note(f"narrow_{student.label}", loss, own)
            if whole:
                at = tokens_of_rows(live, PROBED, g, rank, world)
                x1, y1, here = x[:whole], y[:whole], at[at < whole * T]
                own, probed = weight * int(live[:whole].sum()), share.probed * len(here) / max(1, len(at))
                losses = matryoshka_backward(model, x1, y1, [], own, exit_at=here if self.exit_weight else None,
                                             at_scale=probed, exit_weight=self.exit_weight, original=self.original)
                out["flops"] += ((self.flops(None, 1) + self.original_flops()) * x1.numel()
                                 + self.exit_flops(len(here)))
                out["loss"] += note(f"loss_{config.top_width}", losses["loss"], own)
                if self.exit_weight:
                    note("exits", losses["exits"], probed)
            return out
        at = tokens_of_rows(live, PROBED, g, rank, world)
        students = self._students(step, rows, T, splits, g, rank, world) + drafts
        by_width = {}
        losses = matryoshka_backward(model, x, y, students, share.tokens, at if config.exit_points else None,
                                     at if self.exit_weight else None, share.probed, by_width, self.exit_weight,
                                     self.original, live)
        weights = {"gate": share.probed, "exits": share.probed}
        out = {k: v * weights.get(k, share.tokens) for k, v in losses.items()}
        for width, (loss, weight) in by_width.items():
            out |= {f"narrow_{width}": loss, f"narrow_{width}:": weight}
        return out | {"flops": full + self.student_flops(students, x) + self.exit_flops(len(at))}

    def _students(self, step, rows, T, splits, g, rank, world) -> list[Student]:
        if self.recipe == "every" and step % self.every:
            return []
        if self.recipe == "half":
            rows, splits = max(1, rows // 2), splits[:max(1, rows // 2) * world]
        if self.sample:
            students = sample_students(self.model.config, rows, T, splits, g, None, rank, world, self.levels)
        else:
            students = [Student(d) for d in self.levels if d < self.model.config.top_width]
        return [s._replace(stop=rows if s.stop is None else s.stop, text=TEXT_SHARE) for s in students]

    def student_flops(self, students: list[Student], x: torch.Tensor) -> float:
        """
        Of all their passes, and of the teacher's logits, which each compares with anew. The parallel form computes every
        token down to the deepest exit.
        """
        total = 0.0
        for s in students:
            tokens, depth = x[s.start:s.stop].numel(), self.model.config.n_block if s.exits is None else int(s.exits.max())
            total += self.flops(s.widths, tokens) * depth / self.model.config.n_block + self._head * tokens
        return total

    def flops_per_token(self, draws: int = 100) -> dict[str, float] | None:
        """
        FLOPs of a training step per token of its batch, by part, as MFU counts them (recomputed activations are not):
        'full' passes, 'exits' (what some tokens answer on the way), 'teacher' (forward only) and 'narrow' passes, the
        mean over so many draws of their levels. None where controls are trained: what they decide sets their cost.
        """
        c, g = self.model.config, torch.Generator().manual_seed(0)
        parts = dict.fromkeys(("full", "exits", "teacher", "narrow"), 0.0)
        exits = self.exit_flops(PROBED) / c.sequence_len
        if self.recipe is None:
            return parts | {"full": self.flops(None, 1), "teacher": self.original_flops()}
        if self.recipe.startswith("controls"):
            return None
        if self.recipe in TAUGHT:
            x = torch.zeros(4, c.sequence_len, dtype=torch.long)
            students = [self._students(i, *x.shape, random_splits(*x.shape, g), g, 0, 1)
                        for i in range(draws if self.sample else 1)]
            narrow = sum(self.student_flops(some, x) for some in students) / len(students) / x.numel()
            return parts | {"full": self.flops(None, 1), "exits": exits, "narrow": narrow, "teacher": self.original_flops()}
        narrow = sum(self.flops(sample_levels(self.levels, c.n_block, g), 1) for _ in range(draws)) / draws
        if self.recipe == "single":
            return parts | {"narrow": narrow}
        return {"full": self.flops(None, 1) / 2, "exits": exits / 2, "narrow": narrow / 2,
                "teacher": (self.looking_flops() / 2 if self.recipe == "lean" else 0.0) + self.original_flops() / 2}

    def exit_flops(self, tokens: int) -> float:
        """Of what so many tokens answer at the exit points, forward and backward, and of the answers they learn from."""
        if not self.exit_weight:
            return 0.0
        each = (3 + self.model.lm_head.weight.requires_grad) * self._head
        return each * len(self.model.config.exit_points) * tokens

    def original_flops(self) -> float:
        """Of a token in the forward pass of the original model, where there is one."""
        return sum(c.flops for c in self.original.model.cost(context=self.context).values()) if self.original else 0.0

    def looking_flops(self) -> float:
        """Of a token in a teacher's forward pass, whose logits the student compares with anew."""
        if self._looking is None:
            cost = self.model.cost(context=self.context)
            self._looking = sum(c.flops for c in cost.values()) + self._head
        return self._looking

    def flops(self, widths, tokens: int) -> float:
        """Of a pass over so many tokens, forward and backward."""
        if isinstance(widths, torch.Tensor):  # of each token
            each, count = widths.flatten(0, -2).unique(dim=0, return_counts=True)
            return sum(self.flops(w, n) for w, n in zip(each.tolist(), count.tolist()))
        key = tuple(widths) if isinstance(widths, list) else widths
        if key not in self._flops:
            self._flops[key] = pass_flops(self.model, widths, self.context)
        return self._flops[key] * tokens
