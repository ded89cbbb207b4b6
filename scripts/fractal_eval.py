"""
Bits per byte and compute of a model at each of its modes.

    python -m scripts.fractal_eval --checkpoint ~/.cache/nanochat/fractal_checkpoints/d4_256 --json eval.json

FLOPs are per token at the mean context of the evaluation. The dynamic part (attention and MLP) shrinks with the mode;
the Mamba mixers and the head do not, so the whole model's share is given beside it.
"""
import argparse

from nanochat import checkpoint_manager as ckpt
from nanochat.common import autodetect_device_type, cli, get_compute_dtype, print0
from nanochat.dataloader import DataLoader
from nanochat.dataset import prepare
from nanochat.loss_eval import evaluate_bpb


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


@cli
def main(argv=None):
    p = argparse.ArgumentParser(description="Bits per byte and compute at each mode.")
    p.add_argument("--checkpoint", required=True, help="a model's folder (export or training), or the model.pt in it")
    p.add_argument("--data", default="embedded", help="as in training; its validation split is read (default: embedded)")
    p.add_argument("--eval-tokens", type=int, default=163840, help="validation tokens per mode (default: 163840)")
    p.add_argument("--device-batch-size", type=int, default=8, help="rows per forward pass (default: 8)")
    p.add_argument("--json", default=None, help="also write the table to this file")
    args = p.parse_args(argv)
    if args.device_batch_size < 1 or args.eval_tokens < 1:
        raise ValueError("--device-batch-size and --eval-tokens must be at least 1")

    device = autodetect_device_type()
    model, tokenizer, _, _ = ckpt.load(args.checkpoint, device)
    model.compute_dtype = get_compute_dtype(device)
    T = model.config.sequence_len
    data = prepare(args.data)
    steps = max(1, args.eval_tokens // (args.device_batch_size * T))
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
