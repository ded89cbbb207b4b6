r"""
Makes a hybrid of a trained base GPT, and grows a hybrid to a larger width, the function unchanged.

    python -m scripts.surgery --new-dim=2048                         # chatsft_checkpoints/d32 -> hybrid_checkpoints/d32_2048
    python -m scripts.surgery --expand-from=2048 --new-dim=2560      # -> hybrid_checkpoints/d32_2560
    python -m scripts.surgery --expand-from=2560 --new-dim=4096
    python -m scripts.surgery --src ~/.cache/nanochat/base_checkpoints/d4
    python -m scripts.surgery --src karpathy/nanochat-d34            # fetched from the hub -> hybrid_checkpoints/d34_2176
    python -m scripts.surgery --expand-from=2176 --tag d34           # to 1.25 times the base's width, then to twice

Folders are those under NANOCHAT_BASE_DIR. Before anything is written, a probe batch goes through both models in fp32; if
any logit moved by more than 1e-4 nothing is written and the exit code is 1. Weights are read, made, proven and written one
tensor at a time, so memory does not limit the size. The output is {model.pt,config.json,tokenizer/} in hybrid_checkpoints/
<tag>_<width>, which appears when it is whole.
"""
import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from nanochat import checkpoint_manager as ckpt
from nanochat import step_checkpoint
from nanochat.common import Progress, cli, existing_folder, find_device_type, get_base_dir, print0
from nanochat.dataloader import DataLoader
from nanochat.dataset import prepare
from nanochat.growing import INITS, Init, grow_optimizers, grow_state, next_width, widths_ahead
from nanochat.hub_models import fetch_model, is_repo
from nanochat.hybrid_gpt import HybridConfig
from nanochat.monitor import peak_rss_mb
from nanochat.ordering import ORDERS, cannot_order, order_by_data, order_by_weights, order_state
from nanochat.owner import gives_back, own
from nanochat.streaming import leaves, open_state, save_lazy, streamed
from nanochat.surgery import MAX_DELTA, insert_optimizers, insert_state, prove, unchanged
from nanochat.vintages import VINTAGES

HUB = "karpathy/nanochat-d32"
ORDER = "none"
ORDER_TOKENS = 4096
AUTO_BYTES = 32e9  # --dtype auto: a file that would be larger in the source's dtype is written in bf16


@cli
@gives_back
def main(argv=None):
    p = argparse.ArgumentParser(description="Insert Mamba-2 blocks into a trained base GPT, or grow a hybrid, the function "
                                            "unchanged and proved so.")
    p.add_argument("--src", default=None, metavar="REPO_OR_FOLDER",
                   help="where to start from: a folder, or a repository on the hub, OWNER/NAME or OWNER/NAME/FOLDER "
                        "(default: chatsft_checkpoints/d32; with --expand-from the newest hybrid of that tag and width)")
    p.add_argument("--step", type=int, default=None, help="the base checkpoint's step (default: the newest)")
    p.add_argument("--vintage", default=None, choices=list(VINTAGES),
                   help="which nanochat trained the base, where its files do not say: E, of March 2-8, 2026 (default: told "
                        "from the files; docs/checkpoints.md)")
    p.add_argument("--download", action="store_true", help=f"fetch {HUB} from the hub into the source folder first")
    p.add_argument("--expand-from", type=int, default=None, metavar="WIDTH", help="grow the hybrid of this width")
    p.add_argument("--new-dim", type=int, default=None, metavar="WIDTH",
                   help="width of the result (default, and all that insertion can: the base's)")
    p.add_argument("--tag", default=None, help="name of the family (default: the source's; d32)")
    p.add_argument("--dst", default=None, help="output folder (default: hybrid_checkpoints/<tag>_<width>)")
    p.add_argument("--dtype", default="source", choices=["source", "auto", "float32", "bfloat16"],
                   help=f"of the matrices written; auto: bfloat16 beyond {AUTO_BYTES / 1e9:.0f} GB (default: source)")
    p.add_argument("--seed", type=int, default=0, help="draws the new weights (default: 0)")
    p.add_argument("--device-type", default=None, choices=["cpu", "cuda"],
                   help="where the proof runs (default: cuda where there is one)")
    p.add_argument("--order", default=None, choices=ORDERS,
                   help="turn a base so that its leading dims, heads and units carry most: by its weights alone, or by its "
                        f"activations on text (default: {ORDER})")
    p.add_argument("--data", default=None, help="the text that --order data looks at, as in training (default: embedded)")
    p.add_argument("--init", default=None, choices=INITS, help=f"how growth draws what reads (default: {Init.kind})")
    p.add_argument("--rank", type=int, default=None, help=f"of lora and svd (default: {Init.rank})")
    p.add_argument("--std", type=float, default=None, help="of new entries, lora and svd (default: that of the old ones)")
    p.add_argument("--scale", type=float, default=None, help="multiplies the default std, and copies (default: 1)")
    p.add_argument("--with-optimizer", action="store_true", help="carry the optimizer's state over, as optim.pt")
    p.add_argument("--dry-run", action="store_true", help="print sizes, disk and time needed, and write nothing")
    args = p.parse_args(argv)
    # Huge pages for torch's large tensors, before it makes the first: every tensor here is a fresh one, and half the time
    # went into page faults of 4 KB (casts 3.3x, uniform draws 1.9x as fast).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    device = find_device_type(args.device_type)

    growing = args.expand_from is not None
    config, info, file, state, note = (open_hybrid if growing else open_base)(args)
    tokenizer = ckpt.load_tokenizer(file.parent, config)
    print0(f"source {file} ({note}): {sum(s.numel() for s in state.shapes.values()):,} parameters")
    if growing:
        init = Init(**{k: v for k in ("rank", "std", "scale", "seed") if (v := getattr(args, k)) is not None},
                    **({"kind": args.init} if args.init else {}))
        if init.kind == "zero":
            print0("warning: with --init zero new heads, units and groups can hardly learn: most of them get no gradient")
        width = args.new_dim or next_width(config)
        if args.new_dim is None:
            print0(f"--new-dim {width}: {width / config.d_ref:g} times the base's width {config.d_ref}, in whole heads")
        new_config, new_state = grow_state(config, state, width, init)
        # old_config: which entries are old, that stages 2 and 3 freeze (stages.py)
        how = {"surgery": "grow", "init": asdict(init), "old_config": asdict(config)}
    else:
        ordered, order = ordered_base(args, config, state, tokenizer, device)
        new_config, new_state = insert_state(config, ordered, args.seed)
        how = {"surgery": "insert", "seed": args.seed, "order": order, "vintage": info.get("vintage")}
        print0(f"it can grow (--expand-from={new_config.n_embd}): by default to "
               f"{' and '.join(map(str, widths_ahead(new_config)))}; Mamba groups are {new_config.mamba_group_width} wide")
    optim = optimizer_file(file, info) if args.with_optimizer else None

    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(args.dtype, state.dtype)
    if args.dtype == "auto" and new_state.nbytes(dtype) > AUTO_BYTES:
        dtype = torch.bfloat16
    tag = args.tag or info.get("tag") or ("d32" if growing else tag_of(args.src, file))
    dst = (Path(args.dst).expanduser() if args.dst
           else get_base_dir() / "hybrid_checkpoints" / f"{tag}_{new_config.n_embd}")
    if dst.resolve() == file.parent.resolve():
        raise ValueError(f"{dst} is both the source and the destination: name another with --dst")
    size = new_state.nbytes(dtype) + (round(optim.stat().st_size * grown_share(state, new_state)) if optim else 0)
    table(config, new_config, new_state, dtype, size, dst)
    if args.dry_run:
        print0("dry run: nothing was written")
        return None
    own(dst)  # before the proof, which takes long
    check_room(dst, size)

    proof = run_proof((config, state), (new_config, new_state), dtype, device)
    if not unchanged(proof):
        print(f"error: the function changed by more than {MAX_DELTA}; nothing was written", file=sys.stderr)
        sys.exit(1)
    digest = ckpt.sha256(file)
    provenance = {**how, "source": str(file), "source_sha256": digest, "step": info.get("step"),
                  "command": " ".join(["python -m scripts.surgery", *(sys.argv[1:] if argv is None else argv)]),
                  "versions": versions(), "from": info.get("provenance")}
    with ckpt.replace_folder(dst) as folder:
        tokenizer.save(folder / "tokenizer")
        progress = Progress("writing", size, "bytes")
        save_lazy(leaves(new_state, dtype), folder / "model.pt", progress.step)
        if optim:
            states = ckpt.load_torch(optim)
            save_lazy(grow_optimizers(states, config, new_config) if growing else insert_optimizers(states),
                      folder / "optim.pt", progress.step)
        seconds = progress.seconds
        figures = {"bytes": progress.done, "seconds": round(seconds, 1), "mb_per_s": round(progress.done / seconds / 1e6, 1),
                   "peak_rss_mb": round(peak_rss_mb())}
        ckpt.save_json({"kind": "hybrid", "config": asdict(new_config), "tag": tag, "provenance": provenance,
                        "proof": proof, "written": figures,
                        # training goes on behind the text that the source has seen
                        "loader": info.get("loader")}, folder / "config.json")
    print0(f"wrote {dst}: {progress.done / 1e9:.2f} GB in {seconds:.0f} s, {figures['mb_per_s']:.0f} MB/s; "
           f"at most {peak_rss_mb() / 1e3:.2f} GB were resident")
    return proof


def tag_of(src: str | None, file: Path) -> str:
    """The family's name of a base: what its repository, without 'nanochat-', or its folder is called."""
    return src.split("/")[-1].removeprefix("nanochat-") if src and is_repo(src) else file.parent.name


def open_base(args):
    """config, meta, file, state and a note of the base that --src and --step name."""
    if used := [f"--{k}" for k in ("init", "rank", "std", "scale") if getattr(args, k) is not None]:
        raise ValueError(f"{', '.join(used)} has no effect on insertion: it is for growth, with --expand-from")
    home = get_base_dir() / "chatsft_checkpoints" / "d32"
    if args.src and is_repo(args.src):
        into = home if args.src == HUB else get_base_dir() / "hub_checkpoints" / "--".join(args.src.split("/")[:2])
        src = fetch_model(args.src, into, args.step)
    else:
        src = Path(args.src).expanduser() if args.src else home
        if args.download:
            src = fetch_model(HUB, src, args.step)
    if not src.is_dir():
        raise FileNotFoundError(f"there is no folder {src}: fetch nanochat-d32 with --download, train a base with "
                                "`python -m scripts.base_train`, or name one, or a repository on the hub, with --src")
    config, info, file = ckpt.find(src, args.step, args.vintage)
    if isinstance(config, HybridConfig):
        raise ValueError(f"{src} holds a hybrid model already; insertion starts from a base GPT, and a hybrid is "
                         "grown with --expand-from")
    if args.new_dim not in (None, config.n_embd):
        raise ValueError(f"--new-dim {args.new_dim} is not the base's width {config.n_embd}: insertion keeps the width; "
                         f"then grow with --expand-from={config.n_embd} --new-dim={args.new_dim}")
    step = int(match[1]) if (match := re.match(r"model_(\d+)\.", file.name)) else None
    if "vintage" in info:
        vintage = VINTAGES[info["vintage"]]
        print0(f"nanochat of vintage {vintage.name} (from {vintage.since} on)"
               + "".join(f"; {note}" for note in info["vintage_notes"]))
    note = "an export" if step is None else f"step {step}"
    return config, {**info, "step": step}, file, open_state(file, config, info), note


def ordered_base(args, config, state, tokenizer, device):
    """The base's state in the order asked for, and that order's name."""
    how = args.order or ORDER
    if args.data is not None and how != "data":
        raise ValueError(f"--data has no effect with --order {how}: it is for --order data")
    if how == "none":
        return state, how
    if args.with_optimizer:
        raise ValueError(f"an optimizer's moments do not survive --order {how}: use --order none, or drop --with-optimizer")
    if can_not := cannot_order(config):
        print0(f"the base is left unordered: {can_not}")
        return state, "none"
    progress = Progress("order", config.n_layer + (how == "data"), "parts")
    if how == "weights":
        order = order_by_weights(config, state, progress.step)
    else:
        T = min(config.sequence_len, ORDER_TOKENS)
        loader = DataLoader(tokenizer, prepare(args.data or "embedded"), "train", ORDER_TOKENS // T, T)
        order = order_by_data(config, state, next(iter(loader))[0], device, progress.step)
    print0(f"ordered by {'its weights' if how == 'weights' else 'its activations on text'} ({progress.seconds:.0f} s)")
    return order_state(config, state, order), how


def open_hybrid(args):
    """
    config, info, file, state and a note of the hybrid of width --expand-from: --src, else the tag's trained export, else
    surgery's.
    """
    if used := [f"--{k}" for k in ("download", "step", "vintage", "order", "data") if getattr(args, k) not in (None, False)]:
        raise ValueError(f"{', '.join(used)} has no effect with --expand-from: it is for a base")
    width, tag = args.expand_from, args.tag or "d32"
    if args.src:
        folder, note = Path(args.src).expanduser(), "named by --src"
    else:
        home = get_base_dir()
        trained = [home / "fractal_checkpoints" / f"{tag}_{width}{end}" for end in
                   ("_unfrozen_auto", "_unfrozen", "_auto", "")]
        choices = [*((f, "the trained export") for f in trained),
                   (home / "hybrid_checkpoints" / f"{tag}_{width}", "surgery's; there is no trained export")]
        folder, note = next(((f, n) for f, n in choices if (f / "config.json").is_file() and (f / "model.pt").is_file()),
                            (None, None))
        if folder == choices[-1][0]:
            refuse_unexported(trained)
        if folder is None:
            raise FileNotFoundError(f"there is no hybrid {tag}_{width} in {home}/fractal_checkpoints or hybrid_checkpoints: "
                                    f"make one with `python -m scripts.surgery --new-dim={width}`, or name it with --src")
    config, info, file = ckpt.find(folder)
    if not isinstance(config, HybridConfig):
        raise ValueError(f"{folder} holds a base GPT: make a hybrid of it first, without --expand-from")
    if config.n_embd != width:
        raise ValueError(f"{folder} has width {config.n_embd}, not {width}: use --expand-from={config.n_embd}")
    return config, info, file, open_state(file, config), note


def refuse_unexported(folders: list[Path]) -> None:
    """ValueError where a folder holds an interrupted training run: growing what that started from would lose it."""
    for folder in folders:
        if done := step_checkpoint.steps(folder):
            raise ValueError(f"{folder} holds a run that was interrupted after step {done[-1]} and has no export: finish "
                             "it, or export it by the same training command with --export; or name another hybrid with "
                             "--src")


def optimizer_file(file: Path, info: dict) -> Path:
    """The optimizer's state that belongs to a model's file: that of its step, or beside an export."""
    folder = file.parent
    stem = file.name.replace("model", "optim", 1)
    if not (folder / stem).is_file():
        raise FileNotFoundError(f"there is no optimizer's state {folder / stem}: leave out --with-optimizer")
    return folder / stem


def grown_share(state, new_state) -> float:
    """How much larger the tensors get that both have."""
    both = [k for k in new_state.shapes if k in state.shapes]
    return sum(new_state.shapes[k].numel() for k in both) / sum(state.shapes[k].numel() for k in both)


def table(config, new_config, new_state, dtype, size, dst) -> None:
    """Prints what will be made of what, and what it takes."""
    old, new = (ckpt.build_model(c, "meta").num_params() for c in (config, new_config))
    old = {"base": old["total"]} | old  # of a base, all
    print0(f"width {config.n_embd} -> {new_config.n_embd}, {config.n_block} -> {new_config.n_block} blocks, "
           f"levels {', '.join(map(str, new_config.levels))}")
    for k in new:
        print0(f"  {k:13s}{old.get(k, 0):16,d} ->{new[k]:16,d}")
    free = shutil.disk_usage(existing_folder(dst)).free
    # as measured on two CPU cores (README): proof and writing each make every weight once or twice
    print0(f"output {dst}: {size / 1e9:.2f} GB in {str(dtype).removeprefix('torch.')}, {free / 1e9:.1f} GB of disk are "
           f"free; about {max(1, round(new['total'] / 1e9))} min on two CPU cores")


def check_room(dst: Path, size: int) -> None:
    """OSError unless the disk has room for the output, and a little more, beside what is there."""
    free = shutil.disk_usage(existing_folder(dst)).free
    if free < 1.01 * size + 1e8:
        raise OSError(f"{dst} needs {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB of disk are free: free some, write "
                      "elsewhere with --dst, or choose --dtype bfloat16")


def run_proof(before, after, dtype, device) -> dict:
    """Proves (config, state) pairs equal in fp32, and says what casting the second to `dtype` costs."""
    (c0, s0), (c1, s1) = before, after
    runs = [(c0, s0), (c1, s1), *([(c1, s1.rounded(dtype))] if dtype != torch.float32 else [])]
    progress = Progress("proof", sum(c.n_block + 2 + sum(k.startswith("value_embeds.") for k in s.shapes)
                                     for c, s in runs), "parts")
    models = [streamed(c, s, device, report=progress.step) for c, s in runs]
    proof = prove(*models, device=device)
    print0(f"proof: {proof['probe_tokens']} tokens through both models in fp32, max |delta logit| "
           f"{proof['max_delta_logit']:.2e}, top-1 agreement {proof['top1_agreement']:.2%} ({progress.seconds:.0f} s)")
    if "level" in proof:
        level = proof["level"]
        print0(f"  at width {level['width']} of both: {level['max_delta_logit']:.2e}, {level['top1_agreement']:.2%}")
    if "cast" in proof:
        print0(f"  casting to {str(dtype).removeprefix('torch.')} then moves logits by at most "
               f"{proof['cast']['max_delta_logit']:.2e}, top-1 agreement {proof['cast']['top1_agreement']:.2%}")
    return proof


def versions() -> dict[str, str]:
    try:
        own = importlib.metadata.version("nanochat")
    except importlib.metadata.PackageNotFoundError:
        own = "not installed"
    return {"nanochat": own, "torch": torch.__version__, "python": platform.python_version()}


if __name__ == "__main__":
    main()
