"""
Measures what surgery's choices are worth, on small models trained here on the embedded text.

    python -m scripts.compare_surgery growth --json growth.json --plot dev/growth.png
    python -m scripts.compare_surgery order --json order.json

growth: a hybrid is trained, then grown 1.25x and 2x with each --init, and trained on; beside it the hybrid not grown, and
models of the grown sizes from scratch, with the tokens of the second phase and with those of both. order: a base is
trained, turned with each --order, made a hybrid, and evaluated at each width before and after a short stage 1.
"""
import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib
import torch

from nanochat.checkpoint_manager import build_model, load_state, save_json
from nanochat.common import atomic_write, cli, get_base_dir, print0
from nanochat.dataloader import DataLoader
from nanochat.dataset import prepare
from nanochat.elastic_step import random_splits
from nanochat.gpt import GPTConfig
from nanochat.growing import INITS, Init, grow
from nanochat.hybrid_gpt import HybridConfig
from nanochat.loss_eval import evaluate_bpb, matryoshka_backward, sample_students
from nanochat.optim import setup_optimizers
from nanochat.ordering import ORDERS, order_by_data, order_by_weights, order_state
from nanochat.shards import iter_texts
from nanochat.stages import set_trained
from nanochat.step_parts import set_rates
from nanochat.streaming import State
from nanochat.surgery import insert
from nanochat.tokenizer import Tokenizer

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt

VOCAB, T = 1024, 128
EVAL_TOKENS = 8192


class Text:
    """The embedded corpus as batches in memory, the same for every run."""
    def __init__(self, batches: int, rows: int):
        data = prepare("embedded")
        self.tokenizer = Tokenizer.train_from_iterator(iter_texts(data, "train", 2_000_000), VOCAB)
        train, val = (DataLoader(self.tokenizer, data, split, rows, T) for split in ("train", "val"))
        self.train = [(x.clone(), y.clone()) for (x, y), _ in zip(train, range(batches))]
        self.val = [(x.clone(), y.clone()) for (x, y), _ in zip(val, range(EVAL_TOKENS // (rows * T)))]
        self.bytes = self.tokenizer.token_bytes()

    @torch.no_grad()
    def bpb(self, model, widths=None, exits=None) -> float:
        return evaluate_bpb(model, self.val, len(self.val), self.bytes, widths=widths, exits=exits)


def fresh_model(config, seed: int):
    """With weights of its own, drawn from the seed."""
    torch.manual_seed(seed)
    model = build_model(config)
    model.init_weights()
    return model


def optimizers_of(model, lr_scale: float) -> list:
    return setup_optimizers(model, *(lr_scale * r for r in (0.02, 0.2, 0.004, 0.004)))


def write(result: dict, path: str | None, name: str) -> None:
    """All figures to `path`, or to NANOCHAT_BASE_DIR/<name>.json."""
    save_json(result, Path(path).expanduser() if path else get_base_dir() / f"{name}.json")


def train(model, text: Text, start: int, steps: int, lr_scale: float = 1.0, every: int = 0, warmup: float = 0.0,
          backward: Callable | None = None) -> list[list[float]]:
    """
    Trains on the batches from number `start` on; [[tokens of this phase, bits per byte], ...] after every `every` steps
    (0: only at the end).
    """
    opts = optimizers_of(model, lr_scale)
    curve = [[0, text.bpb(model)]]
    for step in range(steps):
        x, y = text.train[start + step]
        if backward is None:
            model(x, y)[0].backward()
        else:
            backward(step, x, y)
        set_rates(opts, step, steps, warmup, 0.6)
        for opt in opts:
            opt.step()
        model.zero_grad(set_to_none=True)
        if step + 1 == steps or (every and (step + 1) % every == 0):
            curve.append([(step + 1) * x.numel(), text.bpb(model)])
    return curve


def small_base(args) -> GPTConfig:
    return GPTConfig(T, VOCAB, args.layers, args.width // 16, args.width // 16, args.width)


def growth(args) -> dict:
    """Curves of the second phase by factor, then by run, then by seed."""
    config = replace(HybridConfig.from_base(small_base(args)), mamba_headdim=16, mamba_group_width=48,
                     mamba_d_state=32)
    text = Text(args.steps + args.more_steps, args.rows)
    result = {"settings": {**vars(args), "config": asdict(config)}, "before": [], "curves": {}}
    every = max(1, args.more_steps // 4)

    def run(factor, name, model, start, steps, **kwargs):
        t0 = time.perf_counter()
        curve = train(model, text, start, steps, every=every, **kwargs)
        result["curves"].setdefault(factor, {}).setdefault(name, []).append(curve)
        print0(f"{factor} {name}: {curve[0][1]:.4f} -> {curve[-1][1]:.4f} bits/byte ({time.perf_counter() - t0:.0f} s)")

    for seed in range(args.seeds):
        model = fresh_model(config, seed)
        result["before"].append(train(model, text, 0, args.steps)[-1][1])
        print0(f"seed {seed}: {model.num_params()['total']:,} parameters, {result['before'][-1]:.4f} bits/byte")
        go_on = {"start": args.steps, "steps": args.more_steps, "lr_scale": args.lr_scale, "warmup": 0.1}
        run("1x", "not grown", copy.deepcopy(model), **go_on)
        for factor in args.factors:
            width, label = round(args.width * factor), f"{factor:g}x"
            for kind in INITS:
                run(label, kind, grow(model, width, Init(kind, rank=args.rank, seed=seed)), **go_on)
            n_head = width // config.head_dim
            wide = replace(config, n_embd=width, n_head=n_head, n_kv_head=n_head, top_width=width)
            for name, start, steps in (("scratch", args.steps, args.more_steps),
                                       ("scratch, all tokens", 0, args.steps + args.more_steps)):
                run(label, name, fresh_model(wide, seed), start, steps)
    return result


def growth_table(result: dict) -> str:
    """Final bits per byte, mean and standard deviation over seeds, as a markdown table."""
    curves = result["curves"]
    factors = [f for f in curves if f != "1x"]
    rows = ["| | " + " | ".join(factors) + " |", "|---|" + "---|" * len(factors)]
    for name in curves[factors[0]]:
        cells = []
        for f in factors:
            ends = [c[-1][1] for c in curves[f][name]]
            cells.append(f"{statistics.mean(ends):.4f} ± {statistics.stdev(ends) if len(ends) > 1 else 0:.4f}")
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    rows.append(f"| the small one, not grown | {statistics.mean(c[-1][1] for c in curves['1x']['not grown']):.4f} |"
                + " |" * (len(factors) - 1))
    rows.append(f"before: {statistics.mean(result['before']):.4f}")
    s = result["settings"]
    for f in factors:
        short, long = (statistics.mean(c[-1][1] for c in curves[f][n]) for n in ("scratch", "scratch, all tokens"))
        few, many = s["more_steps"], s["steps"] + s["more_steps"]
        slope = (long - short) / math.log(many / few)
        best = min((statistics.mean(c[-1][1] for c in curves[f][k]), k) for k in INITS)
        equal = few * math.exp((best[0] - short) / slope)
        rows.append(f"{f}: {best[1]} ends where scratch would after {equal:.0f} steps (on the line through its two "
                    f"lengths, over log steps): {equal / few:.1f}x the steps since growth, {equal / many:.2f}x all steps")
    return "\n".join(rows)


def plot(result: dict, path: Path) -> None:
    """
    Held-out bits per byte since growth, means over seeds, one panel for each factor; a model from scratch, which begins far
    above, by where it ends.
    """
    factors, top = [f for f in result["curves"] if f != "1x"], statistics.mean(result["before"]) + 0.02
    fig, axes = plt.subplots(1, len(factors), figsize=(5.5 * len(factors), 4), squeeze=False)
    for ax, f in zip(axes[0], factors):
        for name, runs in {**result["curves"]["1x"], **result["curves"][f]}.items():
            if name.startswith("scratch"):
                end = statistics.mean(c[-1][1] for c in runs)
                shown = ax.axhline(end, color="k", linestyle=":", linewidth=0.8) if end < top else ax.plot([], [], " ")[0]
                shown.set_label(f"{name}: {end:.3f} at the end")
                continue
            mean = [statistics.mean(ys) for ys in zip(*([y for _, y in c] for c in runs))]
            ax.plot([x / 1e3 for x, _ in runs[0]], mean, "-o", markersize=3, label=name)
        ax.set(title=f"grown {f}", xlabel="thousand tokens since growth", ylabel="held-out bits per byte",
               ylim=(None, top))
        ax.legend(fontsize=7)
    fig.tight_layout()
    with atomic_write(path) as out:
        fig.savefig(out, format="png", dpi=120)
    plt.close(fig)


def order(args) -> dict:
    """Bits per byte by order and width, after insertion and after stage 1, a list over seeds."""
    config = small_base(args)
    text = Text(args.steps + args.more_steps, args.rows)
    result = {"settings": vars(args), "before": {}, "after": {}}
    for seed in range(args.seeds):
        base = fresh_model(config, seed)
        bpb = train(base, text, 0, args.steps)[-1][1]
        print0(f"seed {seed}: base {bpb:.4f} bits/byte")
        state = State.of(base)
        for how in ORDERS:
            turned = build_model(config)
            tokens = torch.cat([x for x, _ in text.train[:4]])
            ranked = (order_by_weights(config, state) if how == "weights"
                      else order_by_data(config, state, tokens) if how == "data" else None)
            load_state(turned, (order_state(config, state, ranked) if ranked else state).dict(), "the ordered base")
            model = insert(turned, seed)
            levels = model.config.distinct_modes

            def backward(step, x, y, model=model):
                g = torch.Generator().manual_seed(step)
                rows = len(x)
                matryoshka_backward(model, x, y, sample_students(model.config, rows, T, random_splits(rows, T, g), g), 1.0)
            for when in ("before", "after"):
                if when == "after":
                    set_trained(model, "stage 1")
                    train(model, text, args.steps, args.more_steps, backward=backward)
                got = {mode: text.bpb(model, mode) for mode in levels}
                for mode, value in got.items():
                    result[when].setdefault(how, {}).setdefault(mode, []).append(value)
                print0(f"  {how} {when} stage 1: " + ", ".join(f"{k} {v:.4f}" for k, v in got.items()))
    return result


def order_table(result: dict) -> str:
    """Means over seeds as a markdown table."""
    modes = list(result["before"]["none"])
    rows = ["| order | stage 1 | " + " | ".join(modes) + " |", "|---|---|" + "---|" * len(modes)]
    for when in ("before", "after"):
        for how, values in result[when].items():
            rows.append(f"| {how} | {when} | " + " | ".join(f"{statistics.mean(values[m]):.3f}" for m in modes) + " |")
    return "\n".join(rows)


@cli
def main(argv=None):
    p = argparse.ArgumentParser(description="Measure growth's inits, or ordering, on small models.")
    p.add_argument("what", choices=["growth", "order"], help="what to compare")
    p.add_argument("--width", type=int, default=128, help="of the small model (default: 128)")
    p.add_argument("--factors", type=float, nargs="+", default=[1.25, 2.0], help="of growth (default: 1.25 2)")
    p.add_argument("--steps", type=int, default=480, help="before surgery (default: 480)")
    p.add_argument("--more-steps", type=int, default=120, help="after surgery (default: 120)")
    p.add_argument("--lr-scale", type=float, default=0.5, help="of the rates after growth (default: 0.5)")
    p.add_argument("--rank", type=int, default=Init.rank, help=f"of lora and svd (default: {Init.rank})")
    p.add_argument("--rows", type=int, default=8, help=f"of {T} tokens in a step (default: 8)")
    p.add_argument("--layers", type=int, default=3, help="of the base (default: 3)")
    p.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    p.add_argument("--json", default=None, help="file for all figures (default: NANOCHAT_BASE_DIR/compare_<what>.json)")
    p.add_argument("--plot", default=None, help="file for the curves of growth (default: none)")
    args = p.parse_args(argv)
    if min(args.steps, args.more_steps, args.seeds, args.rows, args.layers) < 1:
        raise ValueError("--steps, --more-steps, --seeds, --rows and --layers must be at least 1")
    if args.what == "order" and args.plot:
        raise ValueError("--plot has no effect on order: drop it")
    result = (growth if args.what == "growth" else order)(args)
    write(result, args.json, f"compare_{args.what}")
    if args.plot:
        plot(result, Path(args.plot))
    print0((growth_table if args.what == "growth" else order_table)(result))
    return result


if __name__ == "__main__":
    main()
