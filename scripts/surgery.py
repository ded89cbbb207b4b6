"""
Makes a hybrid of a trained base GPT: a Mamba-2 block behind every attention block, the function unchanged.

    python -m scripts.surgery --src ~/.cache/nanochat/base_checkpoints/d4

The output is hybrid_checkpoints/<tag>_<width>/{model.pt,config.json,tokenizer/} under NANOCHAT_BASE_DIR. A probe batch
goes through both models first; if any logit moved by more than 1e-4 (in fp32) nothing is written and the exit code is 1.
"""
import argparse
import sys
from pathlib import Path

from nanochat import checkpoint_manager as ckpt
from nanochat.common import cli, get_base_dir, print0
from nanochat.surgery import MAX_DELTA, insert, probe


@cli
def main(argv=None):
    p = argparse.ArgumentParser(description="Insert Mamba-2 blocks into a trained base GPT, its function unchanged.")
    p.add_argument("--src", default=None, help="folder of the base's checkpoint: model_N.pt, meta_N.json, tokenizer "
                                               "(default: chatsft_checkpoints/d32 in NANOCHAT_BASE_DIR)")
    p.add_argument("--step", type=int, default=None, help="the checkpoint's step (default: the newest)")
    p.add_argument("--tag", default=None, help="name of the family (default: the source folder's name)")
    p.add_argument("--dst", default=None, help="output folder (default: hybrid_checkpoints/<tag>_<width>)")
    p.add_argument("--seed", type=int, default=0, help="draws the new weights (default: 0)")
    args = p.parse_args(argv)

    src = Path(args.src).expanduser() if args.src else get_base_dir() / "chatsft_checkpoints" / "d32"
    if not src.is_dir():
        raise FileNotFoundError(f"there is no folder {src}: train a base with `python -m scripts.base_train`, "
                                "or name one with --src")
    step = ckpt.last_step(src) if args.step is None else args.step
    base, meta = ckpt.load_step(src, step)
    if meta.get("kind", "gpt") != "gpt":
        raise ValueError(f"{src} holds a {meta['kind']} model already; surgery starts from a base GPT")
    tokenizer = ckpt.load_tokenizer(src, base.config)
    print0(f"source {src}, step {step}: {base.num_params()['total']:,} parameters")

    hybrid = insert(base, args.seed)
    print0("hybrid: " + ", ".join(f"{k} {v:,}" for k, v in hybrid.num_params().items()) + " parameters")
    proof = probe(base, hybrid)
    print0(f"probe of {proof['probe_tokens']} tokens: max |delta logit| {proof['max_delta_logit']:.2e}, "
           f"top-1 agreement {proof['top1_agreement']:.2%}")
    if not proof["max_delta_logit"] <= MAX_DELTA:  # a NaN fails too
        print(f"error: the function changed by more than {MAX_DELTA}; nothing was written", file=sys.stderr)
        sys.exit(1)
    tag = args.tag or src.name
    dst = Path(args.dst).expanduser() if args.dst else get_base_dir() / "hybrid_checkpoints" / f"{tag}_{base.config.n_embd}"
    ckpt.save_export(dst, hybrid, tokenizer, {
        "tag": tag, "provenance": {"surgery": "insert", "source": str(src), "step": step, "seed": args.seed,
                                   "source_sha256": ckpt.sha256(src / f"model_{step:06d}.pt")}, "proof": proof,
        "loader": meta.get("loader")})  # training goes on behind the text that the base has seen
    print0(f"wrote {dst}")
    return proof


if __name__ == "__main__":
    main()
