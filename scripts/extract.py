"""
Writes the sub-model of one level as a checkpoint of its own: attention and MLP matrices cut to the level, Mamba and the
head as they are. It computes the same logits as the large model does in that mode, from a smaller file. Or, with --fresh, a
model of the same shape with new weights, to train on its own beside it.

    python -m scripts.extract --checkpoint $NANOCHAT_BASE_DIR/fractal_checkpoints/d4_256_unfrozen --mode normal --dst normal/
"""
import argparse
import sys
from pathlib import Path

import torch

from nanochat import checkpoint_manager as ckpt
from nanochat.common import cli, print0
from nanochat.owner import LOCK, gives_back, own
from nanochat.surgery import MAX_DELTA, extract, probe


@cli
@gives_back
def main(argv=None):
    p = argparse.ArgumentParser(description="Write the sub-model of one level as a checkpoint of its own.")
    p.add_argument("--checkpoint", required=True, help="the hybrid: a folder (export or training), or the model.pt in it")
    p.add_argument("--mode", required=True, help="ghost, whisper, normal, think, or a width")
    p.add_argument("--dst", required=True, help="folder to write")
    p.add_argument("--fresh", action="store_true",
                   help="initialise its weights anew: a model of that size to train on its own and compare with")
    p.add_argument("--seed", type=int, default=None, help="of --fresh (default: 1337)")
    args = p.parse_args(argv)
    if args.seed is not None and not args.fresh:
        raise ValueError("--seed has no effect without --fresh: add it, or drop --seed")

    model, tokenizer, info, _ = ckpt.load(args.checkpoint)
    dst = own(Path(args.dst).expanduser())
    if dst.exists() and any(path.name != LOCK for path in dst.iterdir()):
        raise ValueError(f"{dst} is not empty: name a new folder")
    small = extract(model, args.mode)
    before, after = (m.num_params()["total"] for m in (model, small))
    print0(f"parameters {before:,} -> {after:,} at width {small.config.top_width}")
    source = {"source": str(args.checkpoint), "from": info.get("provenance")}
    if args.fresh:
        torch.manual_seed(1337 if args.seed is None else args.seed)
        small.init_weights()
        ckpt.save_export(dst, small, tokenizer, {"tag": dst.name, "provenance": {"fresh": args.mode, **source}})
        print0(f"wrote {dst}, untrained: train it with `python -m scripts.fractal_train --checkpoint {dst} --unfreeze "
               "--lr-scale 1`")
        return None
    proof = probe(model, small, args.mode)
    delta = proof["max_delta_logit"]
    print0(f"max |delta logit| against mode {args.mode}: {delta:.2e}")
    if not delta <= MAX_DELTA:
        print(f"error: the sub-model differs by more than {MAX_DELTA}; nothing was written", file=sys.stderr)
        sys.exit(1)
    ckpt.save_export(dst, small, tokenizer, {
        "tag": info.get("tag"), "provenance": {"extracted": args.mode, **source}, "proof": proof})
    print0(f"wrote {dst}")
    return delta


if __name__ == "__main__":
    main()
