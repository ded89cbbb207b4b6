r"""
Writes a checkpoint as a Hugging Face repository, which transformers loads without this package, and publishes it.

    python -m scripts.export --checkpoint ~/.cache/nanochat/fractal_checkpoints/d32_2048 --dst d32-adamba --dtype bf16
    python -m scripts.export --checkpoint ... --dst normal --mode normal                # the sub-model of one mode, smaller
    python -m scripts.export --checkpoint ... --dst d32-adamba --push USER/NAME --variant stage1_6b

A repository on the hub is made private unless --public is given. Weights are written shard by shard: a model larger than
memory can be exported. Run again, an upload that was interrupted goes on.
"""
import argparse
import json
from pathlib import Path

import torch

from nanochat import checkpoint_manager as ckpt
from nanochat.common import Progress, cli, print0
from nanochat.huggingface.card import Place, model_card
from nanochat.huggingface.export import Exported, as_exported, sub_model, write_repository
from nanochat.huggingface.publish import check_names, publish
from nanochat.hybrid_gpt import HybridConfig
from nanochat.monitor import peak_rss_mb
from nanochat.owner import LOCK, gives_back, own
from nanochat.streaming import open_state, streamed
from nanochat.surgery import MAX_DELTA, probe
from scripts.surgery import check_room

DTYPES = {"source": None, "float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16,
          "bf16": torch.bfloat16}


def parse_args(argv):
    p = argparse.ArgumentParser(description="Write a checkpoint as a Hugging Face repository, and publish it.")
    ckpt.add_model_args(p)
    p.add_argument("--dst", required=True, help="folder to write")
    p.add_argument("--mode", default=None, help="export the sub-model of this mode or width alone (default: the whole)")
    p.add_argument("--dtype", default="source", choices=list(DTYPES), help="of the matrices (default: as they are)")
    p.add_argument("--quality", default=None, metavar="JSON",
                   help="what `scripts.fractal_eval --json` wrote of this checkpoint: bits per byte, for the card")
    p.add_argument("--push", default=None, metavar="USER/NAME", help="upload to this repository of the hub, too")
    p.add_argument("--variant", default=None, help="the folder of the repository to upload into (default: its top)")
    p.add_argument("--public", action="store_true", help="make the repository public (default: private)")
    args = p.parse_args(argv)
    if args.push is None and (args.variant is not None or args.public):
        raise ValueError("--variant and --public say how to upload: add --push USER/NAME, or drop them")
    if args.push is not None:
        check_names(args.push, args.variant)
    return args


def read_quality(path: str | None) -> dict[str, float]:
    """Mode -> bits per byte, from fractal_eval's JSON."""
    if path is None:
        return {}
    modes = ckpt.load_json(Path(path).expanduser()).get("modes")
    rows = list(modes.values()) if isinstance(modes, dict) else [None]
    if not all(isinstance(row, dict) and isinstance(row.get("bpb"), float) for row in rows):
        raise ValueError(f"{path} has no bits per byte for modes: write it with `python -m scripts.fractal_eval --json`")
    return {mode: row["bpb"] for mode, row in modes.items()}


def cut(config, state, info: dict, mode: str):
    """Config, state and info of the sub-model of a mode, proved to compute the same. ValueError for a base GPT."""
    if not isinstance(config, HybridConfig):
        raise ValueError("only a hybrid has sub-models: export this base GPT whole, without --mode")
    width = ckpt.build_model(config, "meta").resolve_widths(mode)[0]
    small, small_state = sub_model(config, state, width)
    proof = probe(streamed(config, state), streamed(small, small_state), mode, device="cpu")
    delta = proof["max_delta_logit"]
    print0(f"the sub-model of width {width}: max |delta logit| against mode {mode} {delta:.2e}")
    if not delta <= MAX_DELTA:
        raise ValueError(f"the sub-model differs from mode {mode} by more than {MAX_DELTA}: nothing was written")
    provenance = {"extracted": mode, "from": info.get("provenance")}
    return small, small_state, {"tag": info.get("tag"), "provenance": provenance, "proof": proof}


def written_before(dst: Path, record: dict) -> bool:
    """
    Whether dst holds this very export already, so that only the upload is to be done. ValueError where it holds other files.
    """
    if not dst.exists() or (dst.is_dir() and not {p.name for p in dst.iterdir()} - {LOCK}):
        return False
    try:
        found = json.loads((dst / "config.json").read_text()).get("adamba", {}).get("export")
    except (OSError, ValueError, AttributeError):
        found = None
    if found != record:
        raise ValueError(f"{dst} exists and is not this export: name another folder with --dst, or remove it")
    return True


def write(dst: Path, exported: Exported, dtype: torch.dtype, tokenizer, card: str) -> None:
    """Writes the repository, which appears under the name dst when it is whole. OSError where the disk has no room."""
    size = exported.state.nbytes(dtype)
    check_room(dst, size)
    progress = Progress("writing", size, "bytes")
    with ckpt.replace_folder(dst) as folder:
        write_repository(folder, exported, dtype, tokenizer, card, progress.step)
    print0(f"wrote {dst}: {size / 1e9:.2f} GB in {progress.seconds:.0f} s; at most {peak_rss_mb() / 1e3:.2f} GB were "
           "resident")


@cli
@gives_back
def main(argv=None):
    args = parse_args(argv)
    config, info, file = ckpt.find(ckpt.chosen_model(args))
    tokenizer, dst = ckpt.load_tokenizer(file.parent, config, info), own(Path(args.dst).expanduser())
    quality, state = read_quality(args.quality), open_state(file, config, info)
    dtype = DTYPES[args.dtype] or state.dtype
    record = {"source_sha256": ckpt.sha256(file), "mode": args.mode, "dtype": str(dtype).removeprefix("torch.")}
    before = written_before(dst, record)
    if args.mode is not None:
        config, state, info = cut(config, state, info, args.mode)
    exported = as_exported(config, state, info, tokenizer.fingerprint)
    known = exported.config["adamba"]
    known |= {"export": record, "parameters": sum(s.numel() for s in state.shapes.values())}
    card = model_card(config, known, quality, Place(args.push, args.variant), exported.remote_code)
    if before:
        print0(f"{dst} holds this export already")
        (dst / "README.md").write_text(card, encoding="utf-8")
    else:
        write(dst, exported, dtype, tokenizer, card)
    if args.push is not None:
        print0(f"published {'publicly' if args.public else 'privately'}: "
               f"{publish(dst, args.push, args.variant, args.public)}")
    return dst


if __name__ == "__main__":
    main()
