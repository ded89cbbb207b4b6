r"""
Judges a chat model on ARC, MMLU, GSM8K, HumanEval and SpellingBee, in each mode, and says what each mode costs.

    python -m scripts.chat_eval --checkpoint ~/.cache/nanochat/fractal_checkpoints/d32_2048
    python -m scripts.chat_eval --checkpoint ... -a "GSM8K|ARC-Easy" --modes think,normal,auto -x 200
    python -m scripts.chat_eval --checkpoint ... --reference ~/.cache/nanochat/chatsft_checkpoints/d32    # what was lost?
    torchrun --nproc_per_node=8 -m scripts.chat_eval --checkpoint ...

Without --download or --data the problems are a few embedded examples, which show that everything works and measure nothing.
Outcomes are kept under NANOCHAT_BASE_DIR/chat_eval as they come: the same command goes on where an interrupted one stopped.
"""
import argparse
import random
from pathlib import Path

from nanochat import checkpoint_manager as ckpt
from nanochat.chat import check_chats
from nanochat.common import autodetect_device_type, cli, get_base_dir, get_rank, print0
from nanochat.confidence_probe import is_trained
from nanochat.distributed import everyone, first_alone, init_processes, leave
from nanochat.engine import Compute, Engine, prepare_inference
from nanochat.tasks import BENCHMARKS, make
from nanochat.tasks.evaluate import Judge, Sampling, chat_core, evaluate, fingerprint, paired_difference


def parse_args(argv):
    p = argparse.ArgumentParser(description="Score a chat model on nanochat's benchmarks, per mode, against compute.")
    ckpt.add_model_args(p)
    p.add_argument("--reference", default=None, metavar="CHECKPOINT",
                   help="another model, such as the one before surgery, which is evaluated at full compute, too, and "
                        "compared problem by problem")
    p.add_argument("-a", "--task-name", default=None, help="tasks, separated by | (default: all, and their ChatCORE)")
    p.add_argument("--modes", default="all",
                   help="modes or widths, separated by commas; 'auto' among them; 'all': every mode of the model, and auto "
                        "where its controls are trained (default: all)")
    p.add_argument("--budget", type=float, default=None, help="compute budget of mode auto (default: as calibrated)")
    p.add_argument("--lossless", action="store_true", help="decode losslessly: full compute's answers, drafted")
    p.add_argument("-x", "--max-problems", type=int, default=None, help="problems of each task (default: all)")
    p.add_argument("-b", "--batch-size", type=int, default=8, help="problems answered at once (default: 8)")
    p.add_argument("-t", "--temperature", type=float, default=0.0, help="of generated answers; 0 is greedy (default: 0)")
    p.add_argument("-k", "--top-k", type=int, default=50, help="of generated answers (default: 50)")
    p.add_argument("-m", "--max-new-tokens", type=int, default=512, help="of generated answers (default: 512)")
    p.add_argument("-n", "--num-samples", type=int, default=1,
                   help="answers to each generative problem, solved if one is right: pass@n (default: 1)")
    p.add_argument("--data", default=None,
                   help="folder with the data sets' files, or 'examples' (default: what --download fetched, else examples)")
    p.add_argument("--download", action="store_true", help="fetch the data sets from the hub first")
    p.add_argument("--show", type=int, default=0, metavar="N", help="print N problems of each task with the answers given")
    p.add_argument("--out", default=None, help="folder of the results (default: chat_eval/<checkpoint's name>)")
    p.add_argument("--fresh", action="store_true", help="judge every problem again")
    p.add_argument("--device-type", default=None, choices=["cpu", "cuda"], help="default: cuda where there is one")
    args = p.parse_args(argv)
    for name in ("max_problems", "batch_size", "max_new_tokens", "num_samples", "top_k"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if args.num_samples > 1 and args.temperature == 0:
        raise ValueError("--num-samples above 1 draws the same greedy answer each time: give a --temperature, such as 0.8")
    return args


def load_engine(path: str | Path, device) -> tuple[Engine, str]:
    """(an engine with the checkpoint's model and tokenizer, the checkpoint's fingerprint)."""
    model, tokenizer, info, file = ckpt.load(path, device)
    prepare_inference(model, device.type)
    check_chats(model, tokenizer)
    return Engine(model, tokenizer, info.get("calibration")), fingerprint(file, model.config)


def chosen_computes(args, engine: Engine) -> list[Compute]:
    """What --modes, --budget and --lossless ask for. ValueError for a mode that the model does not have."""
    if args.modes == "all":
        names = list(engine.model.config.distinct_modes)
        if is_trained(engine.model):
            names.append("auto")
    else:
        names = [name.strip() for name in args.modes.split(",")]
    if args.budget is not None and "auto" not in names:
        raise ValueError("--budget has an effect in mode auto only: add it to --modes, or drop --budget")
    if args.lossless:
        computes = [Compute(lossless=True, budget=args.budget)]
    else:
        computes = [Compute(name, args.budget if name == "auto" else None) for name in names]
    for compute in computes:
        compute.check(engine.model, engine.calibration)
    return computes


def judge_all(engine, mark: str, computes: list[Compute], tasks: list, args, out: Path) -> dict:
    """compute's name -> task's name -> Results, of all processes together on every one of them."""
    rank, world = get_rank()
    sampling = Sampling(args.temperature, args.top_k, args.max_new_tokens, args.num_samples)
    table = {}
    for compute in computes:
        judge, row = Judge(engine, compute, sampling, args.batch_size), {}
        for task in tasks:
            count = min(len(task), args.max_problems or len(task))
            settings = {"checkpoint": mark, "task": task.name, "compute": repr(compute), "sampling": repr(sampling),
                        "problems": len(task), "data": args.data, "world": world}
            name = f"{task.name}.{compute.name}".replace(", ", "_").replace(" ", "")
            path = out / (f"{name}.jsonl" if world == 1 else f"{name}.{rank}of{world}.jsonl")
            if args.fresh:
                path.unlink(missing_ok=True)
            results = evaluate(judge, task, path, settings, (count, rank, world))
            results.outcomes = sorted((o for part in everyone(results.outcomes) for o in part if o.index < count),
                                      key=lambda o: o.index)
            print0(f"{task.name:<14} {compute.name:<22} {results.score:7.1%}  ({len(results.outcomes)} problems)")
            row[task.name] = results
        table[compute.name] = row
    return table


def summarise(table: dict, tasks: list) -> list[dict]:
    """A row for each compute: scores by task, ChatCORE where all benchmarks are there, share of FLOPs, tokens per second."""
    baselines = {task.name: task.baseline for task in tasks}
    rows = []
    for name, results in table.items():
        outcomes = [o for r in results.values() for o in r.outcomes]
        scores = {task: r.score for task, r in results.items()}
        core = chat_core(scores, baselines) if set(BENCHMARKS) <= set(scores) else None
        spent, full = sum(o.flops for o in outcomes), sum(o.full_flops for o in outcomes)
        seconds = sum(o.seconds for o in outcomes)
        rows.append({"compute": name, "scores": scores, "ChatCORE": core, "flops": spent / full if full else None,
                     "tok_per_s": sum(o.tokens for o in outcomes) / seconds if seconds else None})
    return rows


def show_table(rows: list[dict], tasks: list) -> None:
    names = [task.name for task in tasks]
    print0("\n" + f"{'':<22}" + "".join(f"{n:>15}" for n in names) + f"{'ChatCORE':>10}{'FLOPs':>8}{'tok/s':>9}")
    for row in rows:
        core = "" if row["ChatCORE"] is None else f"{row['ChatCORE']:.4f}"
        flops = "" if row["flops"] is None else f"{row['flops']:.0%}"
        speed = "" if row["tok_per_s"] is None else f"{row['tok_per_s']:.1f}"
        print0(f"{row['compute']:<22}" + "".join(f"{row['scores'][n]:>15.1%}" for n in names)
               + f"{core:>10}{flops:>8}{speed:>9}")


def compare(table: dict, reference: dict) -> list[str]:
    """
    A line for each compute: the mean over tasks of its difference to the reference, with the 95 % interval over problems,
    and the tasks in which it is worse by more than theirs.
    """
    theirs, lines = next(iter(reference.values())), []
    for name, ours in table.items():
        differences = {task: paired_difference([o.right for o in mine.outcomes], [o.right for o in theirs[task].outcomes])
                       for task, mine in ours.items()}
        mean = sum(d for d, _ in differences.values()) / len(differences)
        half = sum(h * h for _, h in differences.values()) ** 0.5 / len(differences)
        lost = [f"{task} {100 * d:+.1f}" for task, (d, h) in differences.items() if d + h < 0]
        lines.append(f"{name} against the reference: {100 * mean:+.1f} points (95 % interval {100 * (mean - half):+.1f} to "
                     f"{100 * (mean + half):+.1f}); lost: " + (", ".join(lost) or "nothing that so many problems can tell"))
    return lines


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, key, label in zip(axes, ("flops", "tok_per_s"), ("share of full compute's FLOPs", "tokens per second")):
        for row in (r for r in rows if r[key] is not None):
            score = row["ChatCORE"] if row["ChatCORE"] is not None else sum(row["scores"].values()) / len(row["scores"])
            axis.plot(row[key], score, "o")
            axis.annotate(row["compute"], (row[key], score), textcoords="offset points", xytext=(5, 4), fontsize=8)
        axis.set_xlabel(label)
    axes[0].set_ylabel("ChatCORE" if rows[0]["ChatCORE"] is not None else "mean score")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def show_samples(tasks: list, table: dict, count: int) -> None:
    first = next(iter(table.values()))
    for task in tasks:
        outcomes = first[task.name].outcomes
        for o in random.Random(0).sample(outcomes, min(count, len(outcomes))):
            question, verdict = task[o.index]["messages"][-2]["content"], "right" if o.right else "wrong"
            print0(f"\n--- {task.name} {o.index}: {verdict}\n{question}" + "".join(f"\n>>> {a}" for a in o.answers))


@cli
def main(argv=None) -> dict:
    args = parse_args(argv)
    device = init_processes(args.device_type or autodetect_device_type())
    names = list(BENCHMARKS) if args.task_name is None else args.task_name.split("|")
    tasks = first_alone(lambda: [make(name, "test", args.data, args.download) for name in names])
    path = ckpt.chosen_model(args)
    engine, mark = load_engine(path, device)
    source = path.resolve()
    name = source.parent.name if source.is_file() else source.name
    out = Path(args.out).expanduser() if args.out else get_base_dir() / "chat_eval" / name
    table = judge_all(engine, mark, chosen_computes(args, engine), tasks, args, out)
    rows = summarise(table, tasks)
    show_table(rows, tasks)
    result = {"checkpoint": str(path), "rows": rows, "embedded": [t.name for t in tasks if t.embedded]}
    if args.reference:
        engine, mark = load_engine(args.reference, device)
        reference = judge_all(engine, mark, [Compute()], tasks, args, out / "reference")
        result["reference"] = summarise(reference, tasks)
        result["comparison"] = compare(table, reference)
        print0("\n" + "\n".join(result["comparison"]))
    if get_rank()[0] == 0:
        show_samples(tasks, table, args.show)
        ckpt.save_json(result, out / "chat_eval.json")
        plot(rows, out / "chat_eval.png")
    print0(f"\nwrote {out / 'chat_eval.json'} and chat_eval.png")
    leave()
    return result


if __name__ == "__main__":
    main()
