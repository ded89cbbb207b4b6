r"""
Judges a base model, or a hybrid before it is taught to chat, in each mode: CORE, bits per byte, samples.

    python -m scripts.base_eval -i base -g d32 --bundle https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip
    python -m scripts.base_eval --checkpoint ... --eval core --modes think,normal -x 200
    torchrun --nproc_per_node=8 -m scripts.base_eval --checkpoint ...

The bundle is DCLM's as nanochat keeps it: a folder, a .zip, or a URL that is fetched once. 'examples' are three embedded
tasks of its three kinds, which show that it works and measure nothing. The table is written to base_eval/<name>/ under
NANOCHAT_BASE_DIR, as base_eval.json and, in nanochat's columns, base_eval.csv.
"""
import argparse
import csv
import io
import itertools

from nanochat import checkpoint_manager as ckpt
from nanochat import core_eval
from nanochat.chat import visible_text
from nanochat.common import atomic_write, autodetect_device_type, cli, get_base_dir, get_rank, print0
from nanochat.core_eval import BUNDLE_URL, CoreTask
from nanochat.dataloader import DataLoader
from nanochat.dataset import prepare
from nanochat.distributed import all_sum, first_alone, init_processes, leave
from nanochat.engine import Engine, prepare_inference
from nanochat.loss_eval import evaluate_bpb
from scripts.fractal_eval import add_eval_args, eval_steps, mode_table

KINDS = ("core", "bpb", "sample")
SAMPLES = ("Water boils at", "The largest planet of the solar system is", "The opposite of cold is", "A week has seven",
           "Once upon a time", "If x + 3 = 10, then x is")


def parse_args(argv) -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Score a base model per mode: CORE, bits per byte, samples.")
    ckpt.add_model_args(p)
    p.add_argument("--eval", default=",".join(KINDS), help=f"what to do, of {', '.join(KINDS)} (default: all)")
    p.add_argument("--modes", default="all", help="modes or widths, separated by commas (default: all of the model)")
    p.add_argument("--bundle", default=None, metavar="PLACE",
                   help=f"the evaluation bundle: a folder, a .zip, a URL such as {BUNDLE_URL}, or 'examples' (default: "
                        "what was fetched before, else examples)")
    p.add_argument("-x", "--max-per-task", type=int, default=None, help="rows of each task of CORE (default: all)")
    add_eval_args(p, 163840)
    p.add_argument("--max-tokens", type=int, default=16, help="tokens of a sample (default: 16)")
    p.add_argument("--device-type", default=None, choices=["cpu", "cuda"], help="default: cuda where there is one")
    args = p.parse_args(argv)
    args.eval = [kind.strip() for kind in args.eval.split(",")]
    if unknown := sorted(set(args.eval) - set(KINDS)):
        raise ValueError(f"--eval {unknown[0]}: choose of {', '.join(KINDS)}")
    for name in ("max_per_task", "max_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    return args


def open_tasks(place: str | None) -> list[CoreTask]:
    """The tasks of CORE that --bundle names."""
    if place is None:
        fetched = get_base_dir() / "eval_bundle"
        place = str(fetched) if fetched.exists() else "examples"
    if place == "examples":
        print0("CORE: three embedded tasks, whose scores say nothing; --bundle takes a file or a URL")
        return core_eval.read_bundle(None)
    return core_eval.read_bundle(core_eval.open_bundle(place))


def core_table(model, tokenizer, tasks: list[CoreTask], modes: list, args) -> dict[str, dict]:
    """mode -> {'accuracy': {task: share}, 'centred': {task: score}, 'CORE': their mean}."""
    table = {}
    for mode in modes:
        row = {"accuracy": {}, "centred": {}}
        for task in tasks:
            share = core_eval.evaluate_task(model, tokenizer, task, args.max_per_task, args.device_batch_size, mode)
            row["accuracy"][task.label] = share
            row["centred"][task.label] = core_eval.centred(share, task.baseline)
            print0(f"{task.label:<40} {mode!s:<8} accuracy {share:7.2%}  centred {row['centred'][task.label]:8.4f}")
        row["CORE"] = sum(row["centred"].values()) / len(tasks)
        print0(f"{'CORE':<40} {mode!s:<8} {row['CORE']:.4f}")
        table[str(mode)] = row
    return table


def csv_text(core: dict[str, dict]) -> str:
    """The table of CORE: nanochat's columns, with the mode before them."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["Mode", "Task", "Accuracy", "Centered"])
    for mode, row in core.items():
        writer.writerows([mode, label, f"{row['accuracy'][label]:.6f}", f"{row['centred'][label]:.6f}"]
                         for label in row["accuracy"])
        writer.writerow([mode, "CORE", "", f"{row['CORE']:.6f}"])
    return out.getvalue()


def samples(model, tokenizer, modes: list, most: int) -> dict[str, list[str]]:
    """mode -> greedy continuations of SAMPLES, and one text drawn from nothing."""
    engine, bos = Engine(model, tokenizer), tokenizer.get_bos_token_id()
    prompts, out = [tokenizer.encode(text, prepend=bos) for text in SAMPLES], {}
    for mode in modes:
        rows = engine.answers(prompts, most, temperature=0, stop={bos}, mode=mode)
        free = engine.answers([[bos]], 4 * most, temperature=1.0, stop={bos}, mode=mode)[0]
        out[str(mode)] = [before + "".join(visible_text(tokenizer, row))
                          for before, row in zip((*SAMPLES, ""), [*rows, free])]
        print0(f"\n-- samples, mode {mode}\n" + "\n".join(out[str(mode)]))
    return out


def bits_per_byte(model, tokenizer, modes: list, args) -> dict[str, float]:
    """mode -> bits per byte of the validation text of --data; each process reads its share."""
    data = first_alone(lambda: prepare(args.data))
    rank, world = get_rank()
    out, T = {}, model.config.sequence_len
    for mode in modes:
        val = DataLoader(tokenizer, data, "val", args.device_batch_size, T, device=model.device)
        mine, steps = itertools.islice(val, rank, None, world), -(-eval_steps(args, T) // world)
        out[str(mode)] = evaluate_bpb(model, mine, steps, tokenizer.token_bytes(), all_sum, widths=mode)
    print0("\nbits per byte: " + ", ".join(f"{mode} {value:.4f}" for mode, value in out.items()))
    return out


@cli
def main(argv=None) -> dict:
    args = parse_args(argv)
    device = init_processes(args.device_type or autodetect_device_type())
    model, tokenizer, _, file = ckpt.load(ckpt.chosen_model(args), device)
    modes = list(model.config.distinct_modes) if args.modes == "all" else [m.strip() for m in args.modes.split(",")]
    for mode in modes:
        model.resolve_widths(mode)
    eval_steps(args, model.config.sequence_len)
    tasks = first_alone(lambda: open_tasks(args.bundle)) if "core" in args.eval else []
    prepare_inference(model, device.type)
    shares = {mode: row["flops_share"] for mode, row in mode_table(model, (model.config.sequence_len + 1) / 2).items()}
    result = {"checkpoint": str(file), "flops_share": shares, "core": {}, "bpb": {}, "samples": {}}
    if tasks:
        result["core"] = core_table(model, tokenizer, tasks, modes, args)
    if "bpb" in args.eval:
        result["bpb"] = bits_per_byte(model, tokenizer, modes, args)
    if "sample" in args.eval and get_rank()[0] == 0:
        result["samples"] = samples(model, tokenizer, modes, args.max_tokens)
    out = get_base_dir() / "base_eval" / file.parent.name
    if get_rank()[0] == 0:
        ckpt.save_json(result, out / "base_eval.json")
        if tasks:
            with atomic_write(out / "base_eval.csv", "w") as f:
                f.write(csv_text(result["core"]))
    print0(f"\nwrote {out}")
    leave()
    return result


if __name__ == "__main__":
    main()
