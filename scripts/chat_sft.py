r"""
Fine-tunes a hybrid on conversations: nanochat's chat_sft, with the training step of fractal_train, so that every width and
every exit learns.

    python -m scripts.chat_sft -i fractal -g d32_2048_unfrozen
    torchrun --nproc_per_node=8 -m scripts.chat_sft --checkpoint ~/.cache/nanochat/fractal_checkpoints/d32_2048_unfrozen \
        --teacher ~/.cache/nanochat/chatsft_checkpoints/d32
    python -m scripts.chat_sft --checkpoint ... --data "0.5*examples:GSM8K+SpellingBee,0.5*my_chats.jsonl"

Only what the assistant says is learnt. At every evaluation it prints ChatCORE per mode, and keeps the model of the fewest
held-out bits per byte so far in chatsft_checkpoints/<name>_best; the last one is written to chatsft_checkpoints/<name>, name
being the source's folder. All flags of fractal_train that are not named here are taken too, with its meaning.
"""
import argparse
from pathlib import Path

from nanochat import checkpoint_manager as ckpt
from nanochat.common import cli, find_device_type, get_base_dir, get_rank, print0
from nanochat.distributed import everyone, first_alone
from nanochat.engine import Compute, Engine
from nanochat.mixture import DEFAULT_CHATS, MULTIPLE_CHOICE, TOOL_USE
from nanochat.owner import gives_back, own
from nanochat.tasks import BENCHMARKS, make
from nanochat.tasks.evaluate import Judge, Sampling, chat_core, choose_in_passes
from scripts import fractal_train

STEPS, ROWS = 650, 32  # nanochat-d32's
HUB_DATA = f"0.7*{DEFAULT_CHATS},0.2*{TOOL_USE},0.1*{MULTIPLE_CHOICE}"  # about the shares that nanochat-d32 was tuned on
EXAMPLES = "examples:ARC-Easy+ARC-Challenge+MMLU+GSM8K+SmolTalk"


class Watch:
    """
    ChatCORE per mode of a model in training, and the best model so far, kept in `folder`: the one of the fewest bits per
    byte of held-out text, averaged over modes. ChatCORE does not choose, since its problems are those of chat_eval. most:
    problems of each multiple choice and of each generative task, for which a model is needed that is neither sharded nor
    compiled (without it these are left out).
    """
    def __init__(self, folder: Path, tasks: list, most: tuple[int, int], batch_size: int, info: dict):
        self.folder, self.tasks, self.most, self.batch_size, self.info = folder, tasks, most, batch_size, info
        self.best = None
        if (folder / "config.json").is_file():
            self.best = ckpt.load_json(folder / "config.json").get("best_bpb")

    def __call__(self, model, tokenizer, bpb: dict[str, float]) -> dict[str, float]:
        cores = {mode: self.core(model, tokenizer, mode) for mode in bpb} if self.tasks else {}
        if cores:
            print0("  ChatCORE " + ", ".join(f"{mode} {core:.4f}" for mode, core in cores.items()))
        mean = sum(bpb.values()) / len(bpb)
        if self.best is None or mean < self.best:
            self.keep(model, tokenizer, mean)
        return {f"ChatCORE_{mode}": core for mode, core in cores.items()}

    def keep(self, model, tokenizer, mean: float) -> None:
        """Writes the best model so far. That it cannot be written (a full disk) is said and ends no training."""
        fault = None
        try:
            ckpt.save_export(self.folder, model, tokenizer, self.info | {"best_bpb": mean})
        except OSError as e:
            fault = e.strerror or str(e)
        faults = [f for f in everyone(fault) if f]
        if faults:
            print0(f"warning: {faults[0]}; training goes on, and {self.folder} keeps the best model before")
        else:
            self.best = mean

    def core(self, model, tokenizer, mode: str) -> float:
        scores = {}
        for task in self.tasks:
            categorical = task.kind == "categorical"
            count = min(len(task), self.most[0 if categorical else 1])
            if categorical:
                scores[task.name] = choose_in_passes(model, tokenizer, task, count, self.batch_size, mode)
            else:
                limit = model.config.sequence_len
                sampling = Sampling(max_tokens=min(512, limit // 2))
                judge = Judge(Engine(model, tokenizer), Compute(mode), sampling, self.batch_size)
                scores[task.name] = sum(o.right for o in judge.run(task, list(range(count)))) / count
        return chat_core(scores, {task.name: task.baseline for task in self.tasks})


def parse_args(argv) -> tuple[argparse.Namespace, list[str]]:
    """The flags of this script, and the others, which are fractal_train's."""
    p = argparse.ArgumentParser(description="Fine-tune a hybrid on conversations. Takes fractal_train's flags, too.",
                                allow_abbrev=False)
    ckpt.add_model_args(p)
    p.add_argument("--data", default=None,
                   help=f"as in fractal_train (default: on a GPU {HUB_DATA}, on a CPU {EXAMPLES}, which only shows that it "
                        "works)")
    p.add_argument("--num-iterations", type=int, default=None,
                   help=f"optimizer steps (default: {STEPS}, nanochat-d32's, or what --target-hours allows)")
    p.add_argument("--total-batch-size", type=int, default=None,
                   help=f"tokens per optimizer step (default: {ROWS} rows, nanochat's)")
    p.add_argument("--init-lr-frac", type=float, default=0.02,
                   help="what pretraining's learning rates are multiplied by; they fall to 0 (default: 0.02)")
    p.add_argument("--eval-every", type=int, default=100, help="steps between evaluations (default: 100)")
    p.add_argument("--chatcore-max-cat", type=int, default=256,
                   help="problems of each multiple-choice task at an evaluation (default: 256)")
    p.add_argument("--chatcore-max-sample", type=int, default=24,
                   help="problems of each generative task; only where one process trains without --compile (default: 24)")
    p.add_argument("--tasks", default="|".join(BENCHMARKS), help="the tasks of ChatCORE, separated by | (default: all)")
    p.add_argument("--task-data", default=None,
                   help="folder with the tasks' files, or 'examples' (default: what was downloaded, else examples)")
    p.add_argument("--tag", default=None, help="name of the folders that are written (default: the source's)")
    p.add_argument("--device-type", default=None, choices=["cpu", "cuda"], help="default: cuda where there is one")
    return p.parse_known_args(argv)


def judged_tasks(args, generative: bool) -> list:
    """The tasks of ChatCORE while training."""
    if args.chatcore_max_cat < 0 or args.chatcore_max_sample < 0:
        raise ValueError("--chatcore-max-cat and --chatcore-max-sample must be at least 0")
    tasks = [make(name, "test", args.task_data) for name in args.tasks.split("|") if name]
    return [t for t in tasks
            if (args.chatcore_max_cat if t.kind == "categorical" else generative and args.chatcore_max_sample)]


@cli
@gives_back
def main(argv=None) -> dict:
    args, rest = parse_args(argv)
    path = ckpt.chosen_model(args)
    config, info, file = ckpt.find(path)
    name = args.tag or file.parent.name
    folder = get_base_dir() / "chatsft_checkpoints" / name
    if ckpt.list_steps(folder):
        raise ValueError(f"{folder} holds a checkpoint of nanochat's, which is never overwritten: give another --tag")
    device = find_device_type(args.device_type)
    data = args.data or (HUB_DATA if device == "cuda" else EXAMPLES)
    total = args.total_batch_size or ROWS * config.sequence_len
    timed = any(flag.startswith("--target-hours") for flag in rest)
    steps = STEPS if args.num_iterations is None and not timed else args.num_iterations
    training, given = fractal_train.parse_args([
        "--checkpoint", str(path), "--unfreeze", "--matryoshka", "--sample-dim", "--data", data,
        *(["--num-iterations", str(steps)] if steps is not None else []), "--total-batch-size", str(total),
        "--lr-scale", str(args.init_lr_frac), "--warmdown-ratio", "1", "--eval-every", str(args.eval_every),
        "--tag", f"{info.get('tag', name)}_sft", "--device-type", device, *rest])
    compiled = device == "cuda" if training.compile is None else training.compile
    generative = get_rank()[1] == 1 and not compiled
    tasks = first_alone(lambda: judged_tasks(args, generative))
    print0("ChatCORE while training: " + (", ".join(t.name for t in tasks) or "none"))
    best = folder.with_name(f"{name}_best")
    own(folder), own(best)  # the first rank alone as yet; where it is refused, torchrun ends the others
    if training.fresh and get_rank()[0] == 0:
        ckpt.remove_leftovers(best, everything=True)
    watch = Watch(best, tasks, (args.chatcore_max_cat, args.chatcore_max_sample), training.device_batch_size, {
        "tag": training.tag, "provenance": {"trained": "sft", "from": info.get("provenance")}})
    figures = fractal_train.train(training, given, folder, watch, "sft")
    print0(f"the best of its evaluations is in {best}")
    return figures


if __name__ == "__main__":
    main()
