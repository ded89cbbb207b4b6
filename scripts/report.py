r"""
Collects what is known of a model into a report card, report.md: what it is and how it was made, its training, and the tables
of base_eval, chat_eval and tok_eval, so far as they were run.

    python -m scripts.report -g d32_2048_unfrozen
    python -m scripts.report --checkpoint CHECKPOINT --out report.md
"""
import argparse
import datetime
import platform
from pathlib import Path

import torch

from nanochat import checkpoint_manager as ckpt
from nanochat.common import atomic_write, cli, get_base_dir, print0, user_path
from nanochat.monitor import read_metrics
from nanochat.stages import history


def table(head: list, rows: list[list]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in lines)


def stored(path: Path) -> dict | None:
    """The JSON object of a file, None where there is none."""
    return ckpt.load_json(path) if path.is_file() else None


def of_model(found: ckpt.Found) -> str:
    """Size, width, and what was done to it, the last first."""
    config, info, file = found
    params = ckpt.build_model(config, "meta").num_params()
    rows = [["file", file], ["kind", ckpt.model_kind(config)], ["width", config.n_embd], ["layers", config.n_layer],
            ["context", config.sequence_len], ["vocabulary", config.vocab_size],
            ["modes", ", ".join(f"{mode} {width}" for mode, width in config.modes.items())],
            *([f"parameters, {k}", f"{v:,}"] for k, v in params.items())]
    for step in history(info.get("provenance")):
        said = ", ".join(f"{k} {v}" for k, v in step.items() if k != "from" and isinstance(v, str | int | float))
        if said:
            rows.append(["made by", said])
    return table(["", ""], rows)


def of_training(folder: Path, info: dict) -> str | None:
    """The figures of the run that wrote the model, and its evaluations; None where it was not trained here."""
    logged = read_metrics(folder) if (folder / "metrics.jsonl").is_file() else []
    evaluations = [e for e in logged if "val_bpb" in e]
    figures = info.get("figures") or {}
    if not evaluations and not figures:
        return None
    parts = [table(["figure", "value"], [[k, f"{v:,.4g}"] for k, v in figures.items() if isinstance(v, int | float)])]
    if evaluations:
        keys = [k for k in evaluations[-1] if k.startswith("val_") and k != "val_bpb"]
        parts.append(table(["step", *(k.removeprefix("val_") for k in keys)],
                           [[e["step"], *(f"{e[k]:.4f}" if k in e else "" for k in keys)] for e in evaluations]))
    return "\n\n".join(parts)


def of_base_eval(result: dict) -> str:
    core, modes = result["core"], list(result["bpb"] or result["core"])
    shares = result["flops_share"]
    rows = [["share of full FLOPs", *(f"{shares[m]:.1%}" if m in shares else "" for m in modes)]]
    if result["bpb"]:
        rows.append(["bits per byte", *(f"{result['bpb'][m]:.4f}" for m in modes)])
    if core:
        rows.append(["**CORE**", *(f"{core[m]['CORE']:.4f}" for m in modes)])
        rows += [[label, *(f"{core[m]['centred'][label]:.4f}" for m in modes)] for label in core[modes[0]]["centred"]]
    return table(["", *modes], rows)


def of_chat_eval(result: dict) -> str:
    names = list(result["rows"][0]["scores"])

    def cells(row):
        core, flops, speed = row["ChatCORE"], row["flops"], row["tok_per_s"]
        return [row["compute"], *(f"{row['scores'][n]:.1%}" for n in names), "" if core is None else f"{core:.4f}",
                "" if flops is None else f"{flops:.0%}", "" if speed is None else f"{speed:.1f}"]
    parts = [table(["", *names, "ChatCORE", "FLOPs", "tok/s"], [cells(row) for row in result["rows"]])]
    parts += result.get("comparison", [])
    if result["embedded"]:
        parts.append(f"Embedded examples, whose scores say nothing: {', '.join(result['embedded'])}.")
    return "\n\n".join(parts)


def of_tok_eval(result: dict) -> str:
    labels = list(next(iter(result["rows"].values())))
    return table(["bytes per token", *labels],
                 [[name, *(f"{row[k]:.3f}" for k in labels)] for name, row in result["rows"].items()])


def report(found: ckpt.Found, base: Path) -> str:
    """The card's text. ValueError for a result that is not what its script writes."""
    folder = found.file.parent
    name = folder.name
    fingerprint = ckpt.load_tokenizer(folder, found.config, found.info).fingerprint
    results = {"Base evaluation": (base / "base_eval" / name / "base_eval.json", of_base_eval, "base_eval"),
               "Chat evaluation": (base / "chat_eval" / name / "chat_eval.json", of_chat_eval, "chat_eval"),
               "Tokenizer": (base / "tok_eval" / f"{fingerprint}.json", of_tok_eval, "tok_eval")}
    gpus = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "no GPU"
    now = datetime.datetime.now(datetime.timezone.utc)
    parts = [f"# Report card: {name}", f"{now:%Y-%m-%d %H:%M} UTC, {platform.machine()}, {gpus}, Python "
             f"{platform.python_version()}, PyTorch {torch.__version__}", "## Model", of_model(found)]
    if training := of_training(folder, found.info):
        parts += ["## Training", training]
    for title, (path, render, script) in results.items():
        result = stored(path)
        try:
            text = render(result) if result else f"Not run yet: `python -m scripts.{script}`."
        except (KeyError, TypeError, IndexError, StopIteration, AttributeError) as e:
            raise ValueError(f"{path} is not what scripts.{script} writes ({e!r}): run it again, or remove the file") from e
        if result and script != "tok_eval" and path.stat().st_mtime < found.file.stat().st_mtime:
            text += f"\n\nThe model was written after this: run `python -m scripts.{script}` again."
        parts += [f"## {title}", text]
    return "\n\n".join(parts) + "\n"


@cli
def main(argv=None) -> Path:
    p = argparse.ArgumentParser(description="Write a model's report card.")
    ckpt.add_model_args(p)
    p.add_argument("--out", default=None, help="file to write (default: report.md in NANOCHAT_BASE_DIR)")
    args = p.parse_args(argv)
    text = report(ckpt.find(ckpt.chosen_model(args)), get_base_dir())
    out = user_path(args.out) if args.out else get_base_dir() / "report.md"
    with atomic_write(out, "w") as f:
        f.write(text)
    print0(f"wrote {out}")
    return out


if __name__ == "__main__":
    main()
