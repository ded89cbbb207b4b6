r"""
Bits per byte against compute on held-out text: fixed widths, fixed depths, and mode auto at several budgets and exit
thresholds, of one model; and other models beside it, such as ones of a sub-model's size that were trained on their own.

    python -m scripts.frontier --checkpoint $NANOCHAT_BASE_DIR/fractal_checkpoints/d4_256_unfrozen_auto \
        --beside normal=$NANOCHAT_BASE_DIR/fractal_checkpoints/alone_128_unfrozen --json frontier.json --png frontier.png

The first eighth of each row is the prompt: the predictor sees it, and it runs at full depth. Only what follows counts.
"""
import argparse
from pathlib import Path

import torch

from nanochat import checkpoint_manager as ckpt
from nanochat.common import autodetect_device_type, cli, get_compute_dtype, print0
from nanochat.confidence_probe import Controls, calibrate_prices, calibrated_thresholds, check_trained, level_shares
from nanochat.dataloader import DataLoader
from nanochat.dataset import prepare
from nanochat.loss_eval import BitsPerByte, head_loss
from nanochat.matryoshka import token_flops
from scripts.fractal_eval import add_eval_args, eval_steps


@torch.no_grad()
def measure(model, batches: list, token_bytes, start: int, widths=None, depth: int | None = None, control=None) -> dict:
    """
    Bits per byte and mean FLOPs of the tokens from position start - 1 on, at fixed widths and depth, or as `control`
    decides; its own networks included, the predictor's spread over the tokens.
    """
    c = model.config
    text, flops, tokens = BitsPerByte(token_bytes), 0.0, 0
    for x, y in batches:
        B, T = x.shape
        behind = (torch.arange(T) >= start - 1).expand(B, T)
        if control is not None:
            h, _ = control.parallel(x, x[:, :start].tolist(), behind)
            flops += float(control.flops(behind).sum()) + B * model.predictor.flops(start)
        else:
            exits, levels = torch.where(behind, depth or c.n_block, c.n_block), model.resolve_widths(widths)
            h = model.hidden(x, levels, exits)
            context = torch.arange(1, T + 1).expand(B, T)[behind]
            flops += float(token_flops(model, exits[behind], torch.tensor(levels).expand(len(context), -1), context).sum())
        y = torch.where(behind.to(y.device), y, -1)
        text.add(head_loss(h, model.lm_head.weight, y, c.softcap, reduction="none"), y)
        tokens += int(behind.sum())
    return {"bpb": text.value, "flops": flops / tokens}


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib  # slow to import
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(7, 4.5))
    for kind, marker in (("width", "s"), ("depth", "^"), ("auto", "o"), ("alone", "*")):
        points = [r for r in rows if r["kind"] == kind]
        if points:
            line = {"lw": 1} if kind in ("width", "depth") else {"ls": ""}
            label = {"width": "fixed widths", "depth": "fixed depths", "auto": "auto", "alone": "trained alone"}[kind]
            ax.plot([100 * r["share"] for r in points], [r["bpb"] for r in points], marker=marker, ms=6, label=label, **line)
    ax.set(xlabel="FLOPs per token, % of full compute", ylabel="bits per byte", title="Held-out text against compute")
    ax.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=130)


@cli
def main(argv=None):
    p = argparse.ArgumentParser(description="Bits per byte against compute: fixed widths, fixed depths, mode auto.")
    p.add_argument("--checkpoint", required=True, help="a hybrid with trained controls (fractal_train --controls)")
    add_eval_args(p, 32768)
    p.add_argument("--budgets", default="0.6,0.8,1.0", help="of mode auto, shares of full compute (default: 0.6,0.8,1.0)")
    p.add_argument("--thresholds", default="1.0,0.9,0.8,0.7",
                   help="exit thresholds of mode auto (default: 1.0,0.9,0.8,0.7)")
    p.add_argument("--beside", action="append", default=[], metavar="NAME=PATH",
                   help="another checkpoint, at its own full compute, under this name; may be given again")
    p.add_argument("--json", default=None, help="also write the figures to this file")
    p.add_argument("--png", default=None, help="also plot them to this file")
    args = p.parse_args(argv)
    try:
        budgets, thresholds = ([float(v) for v in text.split(",")] for text in (args.budgets, args.thresholds))
    except ValueError as e:
        raise ValueError(f"--budgets and --thresholds take numbers with commas between ({e})") from e
    if any("=" not in text for text in args.beside):
        raise ValueError("--beside takes NAME=PATH, such as normal=~/models/alone")

    device = autodetect_device_type()
    model, tokenizer, _, _ = ckpt.load(args.checkpoint, device)
    check_trained(model)
    model.compute_dtype = get_compute_dtype(device)
    c = model.config
    start, T = max(1, c.sequence_len // 8), c.sequence_len
    _, floor = level_shares(model)
    if low := [b for b in budgets if not floor <= b <= 1]:
        raise ValueError(f"the budget {low[0]} cannot be met: the narrowest widths cost {floor:.3f}, and 1 is all")
    loader = DataLoader(tokenizer, prepare(args.data), "val", args.device_batch_size, T, device=device)
    batches = [batch for _, batch in zip(range(eval_steps(args, T)), loader)]
    token_bytes = tokenizer.token_bytes()
    rows = []

    def add(kind, name, result):
        rows.append({"kind": kind, "name": name, **result, "share": result["flops"] / rows[0]["flops"] if rows else 1.0})
        print0(f"{kind:<7}{name:<22}{rows[-1]['bpb']:>9.4f} bits/byte{rows[-1]['share']:>9.1%} of full compute")
    for mode, width in reversed(c.distinct_modes.items()):
        add("width", f"{mode} ({width})", measure(model, batches, token_bytes, start, widths=mode))
    for depth in reversed(c.exit_points):
        add("depth", f"{depth} of {c.n_block} blocks", measure(model, batches, token_bytes, start, depth=depth))
    prompts = [row for x, _ in batches for row in x[:, :start].tolist()]
    prices = calibrate_prices(model, prompts, budgets)
    for budget in budgets:
        for threshold in thresholds:
            control = Controls(model, budget, **calibrated_thresholds(threshold, c), calibration={"prices": prices})
            add("auto", f"budget {budget}, exit {threshold}", measure(model, batches, token_bytes, start, control=control))
    for text in args.beside:
        name, _, path = text.partition("=")
        other, its, _, _ = ckpt.load(path, device)
        if its.get_vocab_size() != tokenizer.get_vocab_size() or other.config.sequence_len != T:
            raise ValueError(f"{path} has another vocabulary or context than {args.checkpoint}: they cannot be compared")
        other.compute_dtype = model.compute_dtype
        add("alone", name, measure(other, batches, token_bytes, start))
    result = {"checkpoint": str(args.checkpoint), "prompt_tokens": start, "tokens": sum(x.numel() for x, _ in batches),
              "rows": rows}
    if args.json:
        ckpt.save_json(result, args.json)
    if args.png:
        plot(rows, Path(args.png))
    return result


if __name__ == "__main__":
    main()
