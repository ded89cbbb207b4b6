r"""
Writes a model as a repository for Hugging Face: transformers loads it without this package, and --push uploads it.

    python -m scripts.export --checkpoint $NANOCHAT_BASE_DIR/fractal_checkpoints/d32_2048_unfrozen --dst hub/ --dtype bf16
    python -m scripts.export -i fractal -g d32_2048_unfrozen --dst hub/ --push USER/NAME --variant stage1_6b

The folder then holds config.json, safetensors in shards, the tokenizer, the chat template, a card (README.md), and for a
hybrid the code that runs it (docs/huggingface.md). A base GPT becomes transformers' own NanoChatForCausalLM. Weights are
read and written one tensor at a time, so memory does not limit the size. A repository is private unless --public is given.
"""
import argparse
import shutil

import torch

from nanochat import checkpoint_manager as ckpt
from nanochat import hf_export
from nanochat.common import Progress, cli, print0, user_path
from nanochat.hub_upload import check_repo, push
from nanochat.hybrid_gpt import HybridConfig
from nanochat.monitor import peak_rss_mb
from nanochat.streaming import leaves, open_state

DTYPES = {"source": None, "fp32": torch.float32, "bf16": torch.bfloat16}


@cli
def main(argv=None):
    args = parse_args(argv)
    if args.push:
        check_repo(args.push, args.variant)
    config, info, file = ckpt.find(ckpt.chosen_model(args))
    hf_export.check_exportable(config)
    check_compute(args, config)
    tokenizer = ckpt.load_tokenizer(file.parent, config, info)
    measured = read_measured(args.eval, config) if args.eval else None
    state = open_state(file, config)
    dtype = DTYPES[args.dtype] or state.dtype
    dst, size = user_path(args.dst), state.nbytes(dtype)
    check_room(dst, size)
    tree = leaves(state, dtype)
    if not isinstance(config, HybridConfig):
        tree = {hf_export.nanochat_name(name): leaf for name, leaf in tree.items()}
    with ckpt.replace_folder(dst, hf_export.files_of_export(dst)) as folder:
        progress = Progress("writing", size, "bytes")
        hf_export.save_safetensors(tree, folder, report=progress.step)
        hub_config = hf_export.hub_config(config, tokenizer, dtype, info, args.mode, args.exit_depth)
        hf_export.write_files(folder, hub_config, tokenizer)
        with open(folder / "README.md", "w", encoding="utf-8") as f:
            f.write(hf_export.card(config, info, dtype, args.push, args.variant, measured))
    print0(f"wrote {dst}: {size / 1e9:.2f} GB in {progress.seconds:.0f} s; at most {peak_rss_mb() / 1e3:.2f} GB were "
           "resident")
    if args.push:
        row = hf_export.variant_row(config, dtype, measured)
        url = push(dst, args.push, args.variant, row, private=not args.public)
        print0(f"uploaded to {url}" + (f", folder {args.variant}" if args.variant else ""))


def parse_args(argv) -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Write a model as a Hugging Face repository, and upload it.")
    ckpt.add_model_args(p)
    p.add_argument("--dst", required=True, help="folder to write; an earlier export there is replaced")
    p.add_argument("--mode", default="god", help="the mode or width that runs where from_pretrained names no other "
                                                 "(default: god, the full width); the weights are written whole")
    p.add_argument("--exit-depth", type=int, default=None, help="likewise, the number of blocks that run (default: all)")
    p.add_argument("--dtype", default="source", choices=list(DTYPES),
                   help="of the matrices written; what the recurrence needs stays fp32 (default: source)")
    p.add_argument("--eval", default=None, metavar="FILE",
                   help="the table of scripts.fractal_eval --json, for the card's bits per byte of each mode")
    p.add_argument("--push", default=None, metavar="USER/NAME", help="upload to this repository of the hub, made if absent")
    p.add_argument("--variant", default=None, metavar="NAME",
                   help="upload into this folder of the repository; its card lists all variants")
    p.add_argument("--public", action="store_true", help="make a new repository public (default: private)")
    args = p.parse_args(argv)
    for flag, given in (("--variant", args.variant), ("--public", args.public)):
        if given and not args.push:
            raise ValueError(f"{flag} has no effect without --push USER/NAME: add it, or drop {flag}")
    return args


def check_compute(args, config) -> None:
    """ValueError for a mode or an exit depth that the model does not have."""
    if not isinstance(config, HybridConfig):
        if (args.mode, args.exit_depth) != ("god", None):
            raise ValueError("a base GPT is exported in transformers' own architecture, which has no modes and no exits: "
                             "drop --mode and --exit-depth, or make a hybrid of it with `python -m scripts.surgery`")
        return
    args.mode = args.mode if args.mode in config.modes else ckpt.build_model(config, "meta").resolve_widths(args.mode)[0]
    if args.exit_depth is not None and not 1 <= args.exit_depth <= config.n_block:
        raise ValueError(f"--exit-depth is {args.exit_depth}; it must be from 1 to {config.n_block}")


def read_measured(path: str, config) -> dict[str, float]:
    """Mode -> bits per byte, of the file that scripts.fractal_eval --json wrote. ValueError for another file."""
    rows = ckpt.load_json(user_path(path)).get("modes")
    try:
        return {mode: float(rows[mode]["bpb"]) for mode in config.distinct_modes}
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ValueError(f"{path} is no table of this model's modes: write one with `python -m scripts.fractal_eval "
                         "--checkpoint ... --json FILE`") from e


def check_room(dst, size: int) -> None:
    """OSError unless the disk has room for the export beside what is there."""
    place = dst
    while not place.exists():
        place = place.absolute().parent
    free = shutil.disk_usage(place).free
    if free < 1.01 * size + 1e8:
        raise OSError(f"{dst} needs {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB of disk are free: free some, write "
                      "elsewhere with --dst, or choose --dtype bf16")


if __name__ == "__main__":
    main()
