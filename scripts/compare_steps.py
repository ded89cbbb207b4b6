"""
What a training step should do with its compute: the teacher's pass, the student's, and how much of each, at equal FLOPs.

    python -m scripts.compare_steps --json steps.json

A small hybrid is trained whole on the embedded text, then goes on with each kind of step until the same FLOPs are spent
(counted by the model: three times a forward pass for every pass), with the learning rate falling along those FLOPs. Bits
per byte at every mode, mean and standard deviation over seeds, say which kind is best.
"""
import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from nanochat.checkpoint_manager import build_model
from nanochat.common import atomic_write, cli, get_base_dir, print0
from nanochat.hybrid_gpt import HybridConfig
from nanochat.loss_eval import Student, matryoshka_backward, sample_students
from nanochat.matryoshka import sample_levels
from nanochat.optim import setup_optimizers
from nanochat.training import set_rates
from scripts.compare_surgery import T, Text, small_base, train


class Step:
    """
    Kinds of step, each (step, x, y) -> FLOPs spent; backward included. What a step samples depends on its number alone.
    """
    def __init__(self, model):
        self.model, self.c = model, model.config
        self.full = self.pass_flops(None)

    def pass_flops(self, widths) -> float:
        """Of one token, forward and backward; exits save none, since the parallel form computes every token everywhere."""
        return 3 * sum(p.flops for p in self.model.cost(widths, (T + 1) / 2).values())

    def students(self, step: int, rows: int) -> tuple[list[Student], float]:
        """A step's narrow passes over `rows` rows, and their FLOPs."""
        g = torch.Generator().manual_seed(step)
        starts = torch.randint(T // 8, T // 2, (rows,), generator=g)
        students = [s._replace(stop=s.stop or rows) for s in sample_students(self.c, rows, T, starts, g)]
        flops = 0.0
        for s in students:
            widths = torch.as_tensor(s.widths).expand(*s.exits.shape, self.c.n_block).flatten(0, 1)
            each, count = widths.unique(dim=0, return_counts=True)
            flops += sum(int(n) * self.pass_flops(w.tolist()) for w, n in zip(each, count))
        return students, flops

    def teacher_and_student(self, step, x, y, every: int = 1, share: int = 1) -> float:
        """A full pass and, in one step of `every` (0: never), a narrow one of the first 1 / share of the rows."""
        spent, students = x.numel() * self.full, []
        if every and step % every == 0:
            students, more = self.students(step, len(x) // share)
            spent += more
        matryoshka_backward(self.model, x, y, students, 1.0)
        return spent

    def one_pass(self, step, x, y, rows: slice = slice(None), narrow: bool = False) -> float:
        """A pass at sampled levels, full width among them unless `narrow`, that learns the text itself."""
        g = torch.Generator().manual_seed(step)
        widths = sample_levels(self.c.levels, self.c.n_block, g)
        if not narrow and int(torch.randint(len(self.c.levels), (), generator=g)) == 0:
            widths = [self.c.top_width] * self.c.n_block
        loss, _ = self.model(x[rows], y[rows], widths=widths)
        loss.backward()
        return x[rows].numel() * self.pass_flops(widths)

    def halves(self, step, x, y) -> float:
        """A full pass of half the rows, a narrow one of the others; both learn the text itself."""
        half = len(x) // 2
        matryoshka_backward(self.model, x[:half], y[:half], [], 0.5)
        return half * T * self.full + self.one_pass(step, x, y, slice(half, None), narrow=True)


KINDS: dict[str, Callable] = {
    "full passes only": partial(Step.teacher_and_student, every=0),
    "teacher and student": Step.teacher_and_student,
    "student every 2nd step": partial(Step.teacher_and_student, every=2),
    "student every 4th step": partial(Step.teacher_and_student, every=4),
    "student on half the rows": partial(Step.teacher_and_student, share=2),
    "half the rows each, no teacher": Step.halves,
    "one pass at sampled levels": Step.one_pass,
}


def compare(args) -> dict:
    """Bits per byte by kind, by mode, a list over seeds; and the steps that each kind made."""
    config = replace(HybridConfig.from_base(small_base(args)), mamba_headdim=16, mamba_group_width=48, mamba_d_state=32)
    text = Text(args.steps + 4 * args.more_steps, args.rows)
    result = {"settings": vars(args), "bpb": {}, "steps": {}}
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        start = build_model(config)
        start.init_weights()
        before = train(start, text, 0, args.steps)[-1][1]
        print0(f"seed {seed}: {start.num_params()['total']:,} parameters, {before:.4f} bits/byte after {args.steps} steps")
        for name, kind in KINDS.items():
            model, t0 = copy.deepcopy(start), time.perf_counter()
            step, spent, steps = Step(model), 0.0, 0
            total = args.more_steps * args.rows * T * step.full
            opts = setup_optimizers(model, *(args.lr_scale * r for r in (0.02, 0.2, 0.004, 0.004)))
            while spent < total:
                x, y = text.train[args.steps + steps]
                spent += kind(step, steps, x, y)
                set_rates(opts, round(1000 * min(spent / total, 0.999)), 1000, 0.05, 0.8)
                for opt in opts:
                    opt.step()
                model.zero_grad(set_to_none=True)
                steps += 1
            got = {mode: text.bpb(model, mode) for mode in config.distinct_modes}
            for mode, value in got.items():
                result["bpb"].setdefault(name, {}).setdefault(mode, []).append(value)
            result["steps"].setdefault(name, []).append(steps)
            print0(f"  {name:<32}{steps:5d} steps: " + ", ".join(f"{k} {v:.4f}" for k, v in got.items())
                   + f" ({time.perf_counter() - t0:.0f} s)")
    return result


def table(result: dict) -> str:
    """Mean and standard deviation over seeds as a markdown table."""
    modes = list(next(iter(result["bpb"].values())))
    rows = ["| step | steps | " + " | ".join(modes) + " |", "|---|---|" + "---|" * len(modes)]
    for name, values in result["bpb"].items():
        cells = [f"{statistics.mean(values[m]):.3f} ± {statistics.stdev(values[m]) if len(values[m]) > 1 else 0:.3f}"
                 for m in modes]
        rows.append(f"| {name} | {statistics.mean(result['steps'][name]):.0f} | {' | '.join(cells)} |")
    return "\n".join(rows)


@cli
def main(argv=None):
    p = argparse.ArgumentParser(description="Compare kinds of training step at equal FLOPs, on small models.")
    p.add_argument("--width", type=int, default=128, help="of the model (default: 128)")
    p.add_argument("--layers", type=int, default=3, help="attention blocks, and as many of Mamba (default: 3)")
    p.add_argument("--steps", type=int, default=400, help="full steps before the comparison (default: 400)")
    p.add_argument("--more-steps", type=int, default=400, help="full steps whose FLOPs each kind may spend (default: 400)")
    p.add_argument("--rows", type=int, default=8, help=f"of {T} tokens in a step (default: 8)")
    p.add_argument("--lr-scale", type=float, default=0.5, help="of the rates in the comparison (default: 0.5)")
    p.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    p.add_argument("--json", default=None, help="file for all figures (default: NANOCHAT_BASE_DIR/compare_steps.json)")
    args = p.parse_args(argv)
    if min(args.steps, args.more_steps, args.rows - 1, args.seeds, args.layers) < 1:
        raise ValueError("--steps, --more-steps, --seeds and --layers must be at least 1, --rows at least 2")
    result = compare(args)
    path = Path(args.json).expanduser() if args.json else get_base_dir() / "compare_steps.json"
    with atomic_write(path, "w") as f:
        json.dump(result, f)
    print0(table(result))
    return result


if __name__ == "__main__":
    main()
