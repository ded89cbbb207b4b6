"""
Speeds of the parts, each against what it should be compared with, measured in turns in one process:

    python -m scripts.bench mamba     the Mamba-2 mixer against transformers, longer rows, memory speed
    python -m scripts.bench base      a base training step against a plain PyTorch loop
    python -m scripts.bench decode    decoding against a plain loop, memory speed, and each mode against its bytes
    python -m scripts.bench speculative    lossless decoding against plain decoding
    python -m scripts.bench train     random-width training against its FLOPs

Ratios are medians over rounds; in each round every candidate runs once, so that a busy machine slows all of them alike.
"""
import argparse

from nanochat.checkpoint_manager import save_json
from nanochat.common import cli
from scripts import bench_mamba, bench_model, bench_speculative

# name: (help, adds the options, runs and returns the result)
SUBCOMMANDS = {
    "mamba": ("the Mamba-2 mixer against transformers, against itself on longer rows, against memory speed",
              bench_mamba.add_mamba, bench_mamba.bench_mamba),
    "base": ("a base training step against a plain PyTorch loop", bench_model.add_base, bench_model.bench_base),
    "decode": ("decoding against a plain loop, against memory speed, modes against their bytes",
               bench_model.add_decode, bench_model.bench_decode),
    "speculative": ("lossless decoding against plain decoding", bench_speculative.add_speculative,
                    bench_speculative.bench_speculative),
    "train": ("random-width training against its FLOPs", bench_model.add_train, bench_model.bench_train),
}


@cli
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench", description="Speeds of the parts.")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, (text, add, run) in SUBCOMMANDS.items():
        sub = subparsers.add_parser(name, help=text, description=text)
        sub.add_argument("--json", metavar="PATH", help="also write the result there")
        add(sub)
        sub.set_defaults(run=run)
    args = parser.parse_args(argv)
    result = args.run(args)
    if args.json:
        save_json(result, args.json)
        print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
