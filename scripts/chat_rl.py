r"""
Reinforcement learning on word problems (GSM8K), as nanochat's: several answers to each question, and those that are right
more often than their siblings become likelier. Afterwards narrow widths are taught what the whole model says of the same
answers, so that all modes follow.

    python -m scripts.chat_rl -i sft -g d32_2048 --download
    python -m scripts.chat_rl --checkpoint CHECKPOINT --data FOLDER --num-iterations 100    # FOLDER/train.jsonl, test.jsonl

GRPO without what it does not need when every answer is used once: no reference model, no ratio, no clipping; the advantage
is the reward less its question's mean, and every token counts the same. Forced tokens (the tool's output) are not learnt.
One process; the result, model.pt and the rest of an export, goes to chatrl_checkpoints/<name>.
"""
import argparse
import random
import time
from typing import NamedTuple

import torch

from nanochat import checkpoint_manager as ckpt
from nanochat.chat import check_chats
from nanochat.common import cli, find_device_type, get_base_dir, get_compute_dtype, get_rank, print0
from nanochat.confidence_probe import pad
from nanochat.engine import Compute, Engine
from nanochat.optim import setup_optimizers
from nanochat.owner import gives_back, own
from nanochat.stages import set_trained
from nanochat.tasks import make
from nanochat.tasks.evaluate import Judge, Sampling
from nanochat.training import check_rate, flag, set_rates


class Answers(NamedTuple):
    """A question's answers: ids and mask (prompt and forced tokens 0) of each, and the advantage of each."""
    ids: list[list[int]]
    masks: list[list[int]]
    advantages: list[float]


def parse_args(argv) -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Reinforcement learning of a chat model on GSM8K.")
    ckpt.add_model_args(p)
    p.add_argument("--data", default=None,
                   help="folder with GSM8K's files, or 'examples' (default: what --download fetched, else examples)")
    p.add_argument("--download", action="store_true", help="fetch GSM8K from the hub first")
    p.add_argument("--num-iterations", type=int, default=467, help="optimizer steps (default: 467, an epoch of GSM8K)")
    p.add_argument("--examples-per-step", type=int, default=16, help="questions of a step (default: 16)")
    p.add_argument("--num-samples", type=int, default=16, help="answers to each question (default: 16)")
    p.add_argument("--max-new-tokens", type=int, default=256, help="of an answer (default: 256)")
    p.add_argument("-t", "--temperature", type=float, default=1.0, help="of sampled answers (default: 1)")
    p.add_argument("-k", "--top-k", type=int, default=50, help="of sampled answers (default: 50)")
    p.add_argument("--device-batch-size", type=int, default=8, help="answers in a pass (default: 8)")
    p.add_argument("--init-lr-frac", type=float, default=0.05,
                   help="what pretraining's learning rates are multiplied by; they fall to 0 (default: 0.05)")
    p.add_argument("--narrow-weight", type=float, default=0.5,
                   help="weight of a narrow pass that learns what the whole model says of the answers; 0: none (default: "
                        "0.5)")
    p.add_argument("--eval-every", type=int, default=60, help="steps between evaluations (default: 60)")
    p.add_argument("--eval-examples", type=int, default=400, help="problems of an evaluation (default: 400)")
    p.add_argument("--seed", type=int, default=1337, help="of questions and answers (default: 1337)")
    p.add_argument("--tag", default=None, help="name of the folder that is written (default: the source's)")
    p.add_argument("--device-type", default=None, choices=["cpu", "cuda"], help="default: cuda where there is one")
    args = p.parse_args(argv)
    for name in ("num_iterations", "examples_per_step", "max_new_tokens", "device_batch_size", "eval_every",
                 "eval_examples"):
        if getattr(args, name) < 1:
            raise ValueError(f"{flag(name)} is {getattr(args, name)}; it must be at least 1")
    if args.num_samples < 2 or args.temperature <= 0:
        raise ValueError("answers are compared with each other: --num-samples must be at least 2, and --temperature above 0")
    for name in ("init_lr_frac", "narrow_weight"):
        check_rate(args, name)
    return args


def ask(engine: Engine, task, index: int, args, seed: int) -> tuple[Answers, float] | None:
    """(the answers to a task's problem, sampled at full compute; the share of right ones). None for one too long."""
    conversation, tokenizer = task[index], engine.tokenizer
    prompt = tokenizer.render_for_completion(conversation)
    room = min(args.max_new_tokens, engine.model.config.sequence_len - len(prompt))
    if room < 1:
        return None
    ids, masks = engine.generate_batch(prompt, num_samples=args.num_samples, max_tokens=room, temperature=args.temperature,
                                       top_k=args.top_k, seed=seed)
    rewards = [float(task.evaluate(conversation, tokenizer.decode(row[len(prompt):]))) for row in ids]
    mean = sum(rewards) / len(rewards)
    return Answers(ids, masks, [r - mean for r in rewards]), mean


def learn(model, answers: list[Answers], args, level: int | None) -> float:
    """
    Backward of a step: minus the mean over all sampled tokens of advantage * log-probability; and, at a narrow `level`, the
    divergence from what the whole model says there. Returns the first.
    """
    rows = [(ids, mask, a) for group in answers for ids, mask, a in zip(*group) if sum(mask)]
    tokens, total = sum(sum(mask) for _, mask, _ in rows), 0.0
    for at in range(0, len(rows), args.device_batch_size):
        batch = rows[at:at + args.device_batch_size]
        ids, masks = (pad([row[i] for row in batch], model.device)[0] for i in (0, 1))
        x, y = ids[:, :-1], torch.where(masks[:, 1:] > 0, ids[:, 1:], -1)
        if not any(a for _, _, a in batch) and level is None:
            continue
        h, loss = model.hidden(x), 0.0
        for r, (_, mask, advantage) in enumerate(batch):
            if advantage:
                loss = loss + model.lm_head.loss(h[r:r + 1], y[r:r + 1]) * (advantage * sum(mask) / tokens)
        if isinstance(loss, torch.Tensor):
            loss.backward()
            total += float(loss.detach())
        if level is not None:
            narrow = model.lm_head.loss(model.hidden(x, level), y, teacher=h.detach())
            (narrow * (args.narrow_weight * int((y >= 0).sum()) / tokens)).backward()
    return total


def score(engine: Engine, task, args) -> float:
    """The share of a task's first problems that greedy answers solve."""
    count = min(len(task), args.eval_examples)
    judge = Judge(engine, Compute(), Sampling(max_tokens=args.max_new_tokens), args.device_batch_size)
    return sum(o.right for o in judge.run(task, list(range(count)))) / count


def questions(engine: Engine, task, args, rng: random.Random):
    """(answers, share of right ones) of a task's problems in random order, again and again. ValueError where none fits."""
    while True:
        fitting = 0
        for index in rng.sample(range(len(task)), len(task)):
            if (asked := ask(engine, task, index, args, rng.getrandbits(48))) is not None:
                fitting += 1
                yield asked
        if not fitting:
            raise ValueError(f"no question fits into the model's context of {engine.model.config.sequence_len} tokens: take "
                             "a model of a longer one")


def train_steps(engine: Engine, optimizers: list, train, test, args) -> dict:
    """Trains; the run's figures: 'first_accuracy', 'accuracy' (greedy, on test), 'rewards' (the mean of each step)."""
    model, figures = engine.model, {"rewards": []}
    levels = [d for d in model.config.levels if d < model.config.top_width] if args.narrow_weight else []
    asked = questions(engine, train, args, random.Random(args.seed))
    for step in range(args.num_iterations + 1):
        if step % args.eval_every == 0 or step == args.num_iterations:
            figures["accuracy"] = score(engine, test, args)
            figures.setdefault("first_accuracy", figures["accuracy"])
            print0(f"step {step:5d}/{args.num_iterations} | {figures['accuracy']:.2%} of the test problems right, greedily")
        if step == args.num_iterations:
            return figures
        began = time.perf_counter()
        answers, means = zip(*(next(asked) for _ in range(args.examples_per_step)))
        loss = learn(model, answers, args, levels[step % len(levels)] if levels else None)
        set_rates(optimizers, step, args.num_iterations, 0.0, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        figures["rewards"].append(sum(means) / len(means))
        print0(f"step {step:5d}/{args.num_iterations} | reward {figures['rewards'][-1]:.3f} | loss {loss:.4f} | "
               f"{time.perf_counter() - began:.1f} s")


@cli
@gives_back
def main(argv=None) -> dict:
    args = parse_args(argv)
    if get_rank()[1] > 1:
        raise ValueError("answers are drawn from a model that one process holds whole: run this without torchrun")
    device = find_device_type(args.device_type)
    model, tokenizer, info, file = ckpt.load(ckpt.chosen_model(args), device)
    if ckpt.model_kind(model.config) != "hybrid":
        raise ValueError(f"{file.parent} holds a base GPT: make a hybrid of it with `python -m scripts.surgery --src ...`")
    name = args.tag or file.parent.name
    folder = get_base_dir() / "chatrl_checkpoints" / name
    if folder.resolve() == file.parent.resolve() or ckpt.list_steps(folder):
        raise ValueError(f"{folder} is the source, or a checkpoint of nanochat's, which is never overwritten: give a --tag")
    own(folder)
    model.compute_dtype = get_compute_dtype(device)
    check_chats(model, tokenizer)
    train, test = (make("GSM8K", split, args.data, args.download) for split in ("train", "test"))
    set_trained(model, "unfrozen")
    optimizers = setup_optimizers(model)
    for group in (g for optimizer in optimizers for g in optimizer.param_groups):
        group["initial_lr"] *= args.init_lr_frac
    figures = train_steps(Engine(model, tokenizer), optimizers, train, test, args)
    ckpt.save_export(folder, model, tokenizer, {
        "tag": f"{info.get('tag', name)}_rl", "figures": {k: v for k, v in figures.items() if k != "rewards"},
        "provenance": {"trained": "rl", "steps": args.num_iterations, "from": info.get("provenance")}})
    print0(f"wrote {folder}: {figures['first_accuracy']:.2%} -> {figures['accuracy']:.2%} of the test problems right")
    return figures


if __name__ == "__main__":
    main()
