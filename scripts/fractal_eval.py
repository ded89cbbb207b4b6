"""
Bits per byte and compute of a model at each of its modes; or the calibration of its mode auto.

    python -m scripts.fractal_eval --checkpoint ~/.cache/nanochat/fractal_checkpoints/d4_256 --json eval.json
    python -m scripts.fractal_eval --checkpoint ~/.cache/nanochat/fractal_checkpoints/d4_256_unfrozen_auto \
        --calibrate --delta 0.02 --epsilon 0.05

Calibration chooses budget and exit threshold by Learn-then-Test on held-out text: with probability 1 - epsilon over that
text, mode auto's greedy tokens differ from full compute's in at most a share delta. It writes both and the evidence into the
checkpoint's config.json.

FLOPs are per token at the mean context of the evaluation. The dynamic part (attention and MLP) shrinks with the mode;
the Mamba mixers and the head do not, so the whole model's share is given beside it.
"""
import argparse
import time
from dataclasses import asdict, replace

import torch

from nanochat import checkpoint_manager as ckpt
from nanochat.common import autodetect_device_type, cli, get_compute_dtype, print0
from nanochat.confidence_probe import (
    THRESHOLDS,
    Controls,
    budget_grid,
    calibrate,
    calibrate_prices,
    calibrated_thresholds,
    check_trained,
    sequences_needed,
    tune,
)
from nanochat.dataloader import DataLoader
from nanochat.dataset import prepare
from nanochat.engine import Engine, prepare_inference
from nanochat.loss_eval import evaluate_bpb
from nanochat.owner import gives_back, own
from nanochat.training import flag

PRICE_ROWS = 16  # that prices are fitted to where --budget leaves no setting to tune


def add_eval_args(p: argparse.ArgumentParser, tokens: int) -> None:
    """The flags that say on what text is evaluated."""
    p.add_argument("--data", default="embedded", help="as in training; its validation split is read (default: embedded)")
    p.add_argument("--eval-tokens", type=int, default=tokens,
                   help=f"validation tokens for each row of the table (default: {tokens})")
    p.add_argument("--device-batch-size", type=int, default=8, help="rows per forward pass (default: 8)")


def eval_steps(args, sequence_len: int) -> int:
    """Passes that --eval-tokens asks for; ValueError for values out of range."""
    if args.device_batch_size < 1 or args.eval_tokens < 1:
        raise ValueError("--device-batch-size and --eval-tokens must be at least 1")
    return max(1, args.eval_tokens // (args.device_batch_size * sequence_len))


def mode_table(model, context: float) -> dict[str, dict]:
    """
    Per mode: its width, matmul FLOPs per token of the dynamic part and of the whole model, both as shares of full, and
    the numbers that a token leaves in the KV cache.
    """
    rows = {}
    full = model.cost(context=context)
    for mode, width in model.config.distinct_modes.items():
        cost = model.cost(mode, context)
        matmul = sum(c.matmul for c in cost.values())
        rows[mode] = {
            "width": width,
            "matmul_flops": matmul,
            "dynamic_matmul_flops": cost["dynamic"].matmul,
            "kv_values_per_token": cost["dynamic"].kv,
            "flops": sum(c.flops for c in cost.values()),
            "dynamic_share": cost["dynamic"].matmul / full["dynamic"].matmul,
            "flops_share": sum(c.flops for c in cost.values()) / sum(c.flops for c in full.values()),
        }
    return rows


def print_table(rows: dict[str, dict]) -> None:
    print0(f"{'mode':<10}{'width':>6}{'bits/byte':>11}{'matmul FLOPs/token':>20}{'dynamic share':>15}{'whole share':>13}"
           f"{'KV bytes/token':>16}")
    for mode, r in rows.items():
        print0(f"{mode:<10}{r['width']:>6}{r['bpb']:>11.4f}{r['matmul_flops']:>20,.0f}{r['dynamic_share']:>15.1%}"
               f"{r['flops_share']:>13.1%}{r['kv_bytes_per_token']:>16,.0f}")


def continuations(model, tokenizer, data, n: int, length: int, batch: int, device) -> tuple[torch.Tensor, int]:
    """
    n held-out prompts of half a context and what full compute greedily makes of them: ids (n, prompt + length), and the
    prompt's length. ValueError where the validation text is too short.
    """
    T = model.config.sequence_len
    start = max(1, min(T // 2, T - length))
    if start + length > T:
        raise ValueError(f"--new-tokens {length} does not fit the model's context of {T}: ask for at most {T - 1}")
    rows, engine, began = [], Engine(model, tokenizer), time.perf_counter()
    loader = DataLoader(tokenizer, data, "val", batch, T, device=device)
    for x, _ in loader:
        if loader.epoch > 0:
            raise ValueError(f"the validation text ends after {len(rows)} sequences, and --sequences asks for {n}: "
                             "give more --data, or ask for fewer")
        prompts = x[:, :start].tolist()
        rows += [p + answer for p, answer in zip(prompts, engine.answers(prompts, length, temperature=0))]
        spent = time.perf_counter() - began
        print0(f"  full compute: {min(len(rows), n)}/{n} sequences, {len(rows) * length / spent:,.0f} tok/s, "
               f"ETA {max(0, spent / len(rows) * (n - len(rows))):.0f} s")
        if len(rows) >= n:
            return torch.tensor(rows[:n], device=device), start


@torch.no_grad()
def differing(model, ids: torch.Tensor, start: int, control, batch: int) -> tuple[torch.Tensor, float]:
    """
    For each sequence the share of full compute's greedy tokens (those behind `start`) that mode auto would have chosen
    otherwise after the same text, (n,); and the FLOPs of all these tokens. One parallel pass decides as decoding does.
    """
    out, flops = [], 0.0
    for i in range(0, len(ids), batch):
        x = ids[i:i + batch, :-1]
        behind = (torch.arange(x.size(1)) >= start - 1).expand(len(x), -1)
        h, _ = control.parallel(x, x[:, :start].tolist(), behind)
        flops += float(control.flops(behind).sum())
        chosen = model.logits(h[:, start - 1:]).argmax(-1)
        out.append((chosen != ids[i:i + batch, start:]).double().mean(1).cpu())
    return torch.cat(out), flops


def calibrate_checkpoint(args, model, tokenizer, info, file, data, device) -> dict:
    """The evidence, also written into the checkpoint's config.json."""
    if file.name != "model.pt":
        raise ValueError(f"{file} is a training step: calibrate an export, which has a config.json")
    check_trained(model)
    own(file.parent)
    if args.new_tokens < 1:
        raise ValueError(f"--new-tokens is {args.new_tokens}; it must be at least 1")
    if args.budget is not None:
        Controls(model, args.budget)  # refuses one out of range before anything is decoded

    def apart(n):  # the rows that prices and settings are chosen on: the test must not have seen them
        return max(1, n // 4 if args.budget is None else min(PRICE_ROWS, n // 4))
    least, tuning = sequences_needed(args.delta, args.epsilon), apart(args.sequences)
    if args.sequences - tuning < least:
        enough = next(n for n in range(least, 2 * least + 1) if n - apart(n) >= least)
        raise ValueError(f"--sequences {args.sequences} ({tuning} for prices and tuning) cannot bound the risk by "
                         f"{args.delta} at confidence {1 - args.epsilon:g}: ask for at least {enough}, or a larger "
                         "--delta or --epsilon")
    prepare_inference(model, device)
    ids, start = continuations(model, tokenizer, data, args.sequences, args.new_tokens, args.device_batch_size, device)
    asked = set() if args.budget is None else {args.budget}
    prices = calibrate_prices(model, ids[:tuning, :start].tolist(), sorted({*budget_grid(model), *asked}))

    def run(budget, threshold, rows):
        control = Controls(model, budget, **calibrated_thresholds(threshold, model.config), calibration={"prices": prices})
        return differing(model, ids[rows], start, control, args.device_batch_size)

    def losses_at(budget, threshold):
        losses, _ = run(budget, threshold, slice(tuning, None))
        print0(f"  budget {budget}, exit threshold {threshold}: {losses.mean():.2%} of the tokens differ")
        return losses
    settings = [(args.budget, t) for t in THRESHOLDS]
    if args.budget is None:
        settings = tune(model, lambda budget, threshold: run(budget, threshold, slice(tuning)), 3 * args.delta)
    evidence, _ = calibrate(losses_at, args.delta, args.epsilon, settings)
    evidence |= {"risk": "share of greedy tokens that differ from full compute's", "new_tokens": args.new_tokens,
                 "prompt_tokens": start, "prices": prices}
    if evidence["exit_threshold"] is None:
        differ = (f"nothing keeps the risk below {args.delta}: without any exit {evidence['observed'][0]:.1%} of the tokens "
                  f"differ at a budget of {settings[0][0]}")
        if evidence["observed"][0] < args.delta:
            raise ValueError(f"{differ}, and {evidence['sequences']} sequences do not prove that it is so few: raise "
                             "--sequences or --delta")
        more = "" if settings[0][0] == 1 else "--budget or "
        raise ValueError(f"{differ}: raise {more}--delta, or train longer")
    config = replace(model.config, **calibrated_thresholds(evidence["exit_threshold"], model.config))
    ckpt.save_json(info | {"config": asdict(config), "calibration": evidence}, file.parent / "config.json")
    at = evidence["settings"].index([evidence["budget"], evidence["exit_threshold"]])
    print0(f"budget {evidence['budget']}, exit threshold {evidence['exit_threshold']}: with {1 - args.epsilon:.4g} "
           f"confidence at most a share of {args.delta:g} of the tokens differ; {evidence['observed'][at]:.2%} did in "
           f"{evidence['sequences']} sequences\nwrote {file.parent / 'config.json'}")
    return evidence


@cli
@gives_back
def main(argv=None):
    p = argparse.ArgumentParser(description="Bits per byte and compute at each mode.")
    p.add_argument("--checkpoint", required=True, help="a model's folder (export or training), or the model.pt in it")
    add_eval_args(p, 163840)
    p.add_argument("--json", default=None, help="also write the table to this file")
    p.add_argument("--calibrate", action="store_true",
                   help="choose budget and exit threshold of mode auto, instead of the table")
    p.add_argument("--delta", type=float, default=0.02, help="the risk to stay below: share of tokens (default: 0.02)")
    p.add_argument("--epsilon", type=float, default=0.05, help="the chance that the promise fails (default: 0.05)")
    p.add_argument("--budget", type=float, default=None,
                   help="share of full compute that the predictor's widths may cost, and auto's default (default: tuned, "
                        "with the threshold, on a quarter of the sequences)")
    p.add_argument("--sequences", type=int, default=256,
                   help="held-out sequences to calibrate on; a part serves to fit prices and to tune (default: 256)")
    p.add_argument("--new-tokens", type=int, default=32, help="generated tokens of each (default: 32)")
    args = p.parse_args(argv)
    foreign = ("eval_tokens",) if args.calibrate else ("delta", "epsilon", "budget", "sequences", "new_tokens")
    idle = [flag(name) for name in foreign if getattr(args, name) != p.get_default(name)]
    if idle:
        raise ValueError(f"no effect with --calibrate: drop {idle[0]}" if args.calibrate else
                         f"no effect without --calibrate: add it, or drop {', '.join(idle)}")

    device = autodetect_device_type()
    model, tokenizer, info, file = ckpt.load(args.checkpoint, device)
    model.compute_dtype = get_compute_dtype(device)
    T = model.config.sequence_len
    steps = eval_steps(args, T)
    data = prepare(args.data)
    if args.calibrate:
        evidence = calibrate_checkpoint(args, model, tokenizer, info, file, data, device)
        if args.json:
            ckpt.save_json(evidence, args.json)
        return evidence
    rows = mode_table(model, (T + 1) / 2)
    token_bytes = tokenizer.token_bytes()
    for mode, row in rows.items():
        val = DataLoader(tokenizer, data, "val", args.device_batch_size, T, device=device)
        row["kv_bytes_per_token"] = row.pop("kv_values_per_token") * model.compute_dtype.itemsize
        row["bpb"] = evaluate_bpb(model, val, steps, token_bytes, widths=mode)
    print_table(rows)
    result = {"checkpoint": str(args.checkpoint), "eval_tokens": steps * args.device_batch_size * T,
              "params": model.num_params(), "modes": rows}
    if args.json:
        ckpt.save_json(result, args.json)
    return result


if __name__ == "__main__":
    main()
