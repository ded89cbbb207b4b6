"""
What a training step should do with its compute: the teacher's pass, the student's, and how much of each, at equal FLOPs.

    python -m scripts.compare_steps --json steps.json

A small hybrid is trained on the embedded text at full width, then goes on whole (--phase unfrozen); or a small base is
trained, made a hybrid, and goes on in stage 1, with the base frozen (--phase "stage 1"). Either way each of fractal_train's
recipes spends the same FLOPs, with the learning rate falling along those. Bits per byte at every mode and, at full width,
behind every exit point, mean and standard deviation over seeds, say which is best.
"""
import argparse
import copy
import statistics
import time
from dataclasses import replace

from nanochat.common import cli, print0
from nanochat.elastic_step import TAUGHT, ElasticStep
from nanochat.hybrid_gpt import HybridConfig
from nanochat.loss_eval import EXIT_WEIGHT
from nanochat.stages import set_trained
from nanochat.step_parts import Share, set_rates
from nanochat.surgery import insert
from scripts.compare_surgery import T, Text, fresh_model, optimizers_of, small_base, train, write

WHOLE = Share(1.0, 1.0, 1.0)  # a step is one pass of one process
# name: recipe, --student-every, --exit-weight
KINDS = {"full passes only": (None, 1, 0.0), "both": ("both", 1, EXIT_WEIGHT), "every 2nd step": ("every", 2, EXIT_WEIGHT),
         "every 4th step": ("every", 4, EXIT_WEIGHT), "half": ("half", 1, EXIT_WEIGHT), "lean": ("lean", 1, EXIT_WEIGHT),
         "lean, exits at 0.1": ("lean", 1, 0.1), "lean, exits untaught": ("lean", 1, 0.0),
         "split": ("split", 1, EXIT_WEIGHT), "single": ("single", 1, 0.0)}


def compare(args) -> dict:
    """Bits per byte by kind, by mode or exit, a list over seeds; and the steps that each kind made."""
    config = small_base(args)
    if args.phase == "unfrozen":
        config = replace(HybridConfig.from_base(config), mamba_headdim=16, mamba_group_width=48, mamba_d_state=32)
    text = Text(args.steps + 4 * args.more_steps, args.rows)
    result = {"settings": vars(args), "bpb": {}, "steps": {}}
    for seed in range(args.seeds):
        start = fresh_model(config, seed)
        before = train(start, text, 0, args.steps)[-1][1]
        if args.phase == "stage 1":
            start = insert(start, seed)
        print0(f"seed {seed}: {start.num_params()['total']:,} parameters, {before:.4f} bits/byte after {args.steps} steps")
        for name, (recipe, every, exit_weight) in KINDS.items():
            if args.kinds and name not in args.kinds:
                continue
            model, t0 = copy.deepcopy(start), time.perf_counter()
            set_trained(model, args.phase, gate=recipe in TAUGHT)
            spent, steps = 0.0, 0
            backward = ElasticStep(model, seed, args.more_steps, recipe, student_every=every, exit_weight=exit_weight)
            total = args.more_steps * backward.flops(None, args.rows * T)
            opts = optimizers_of(model, args.lr_scale)
            while spent < total:
                x, y = text.train[args.steps + steps]
                spent += backward(steps, x, y, WHOLE)["flops"]
                set_rates(opts, round(1000 * min(spent / total, 0.999)), 1000, 0.05, 0.8)
                for opt in opts:
                    opt.step()
                model.zero_grad(set_to_none=True)
                steps += 1
            got = {mode: text.bpb(model, mode) for mode in model.config.distinct_modes}
            got |= {f"{depth} of {model.config.n_block} blocks": text.bpb(model, exits=depth) for depth in
                    model.config.exit_points}
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
    p.add_argument("--phase", choices=["unfrozen", "stage 1"], default="unfrozen",
                   help="what is trained (default: unfrozen)")
    p.add_argument("--kinds", nargs="+", choices=list(KINDS), default=None, help="which to compare (default: all)")
    p.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    p.add_argument("--json", default=None, help="file for all figures (default: NANOCHAT_BASE_DIR/compare_steps.json)")
    args = p.parse_args(argv)
    if min(args.steps, args.more_steps, args.rows - 1, args.seeds, args.layers) < 1:
        raise ValueError("--steps, --more-steps, --seeds and --layers must be at least 1, --rows at least 2")
    result = compare(args)
    write(result, args.json, "compare_steps")
    print0(table(result))
    return result


if __name__ == "__main__":
    main()
