"""
Judges a chat model on a task, at a chosen compute: multiple choice by the likeliest of the choices' letters, everything else
by generating an answer. Outcomes are appended to a file as they come, so an interrupted evaluation goes on where it stopped.
"""
import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nanochat.chat import stop_tokens
from nanochat.common import Progress, get_rank
from nanochat.confidence_probe import pad
from nanochat.distributed import all_sum
from nanochat.engine import Compute, Engine, total_flops
from nanochat.tasks.common import Task


@dataclass(frozen=True)
class Sampling:
    """How generative answers are drawn: temperature 0 is greedy. A problem is solved if one of num_samples is right."""
    temperature: float = 0.0
    top_k: int | None = 50
    max_tokens: int = 512
    num_samples: int = 1
    seed: int = 42


@dataclass
class Outcome:
    """One problem's result. flops and full_flops: of the answer and its prompt, spent and at full compute."""
    index: int
    right: bool
    answers: list[str]
    tokens: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    full_flops: float = 0.0


def letter_ids(tokenizer, conversation: dict) -> list[int]:
    """The token of each of a multiple choice's letters. ValueError for a letter that is no single token."""
    out = []
    for letter in conversation["letters"]:
        ids = tokenizer.encode(letter)
        if len(ids) != 1:
            raise ValueError(f"the answer letter {letter!r} is {len(ids)} tokens of this model's tokenizer, and multiple "
                             "choice needs one: use a tokenizer that was trained on more text")
        out.append(ids[0])
    return out


@torch.no_grad()
def choose_in_passes(model, tokenizer, task: Task, count: int, batch_size: int, widths=None) -> float:
    """
    The share of right answers to a categorical task's first `count` problems, by plain forward passes, as a model in
    training can make them, sharded over ranks or not: all ranks call and get the same. A question too long for the model
    is wrong.
    """
    rank, world = get_rank()
    problems = [task[i] for i in range(count)]
    asked = [(tokenizer.render_for_completion(c), c) for c in problems]
    asked = sorted((a for a in asked if len(a[0]) <= model.config.sequence_len), key=lambda a: len(a[0]))
    batches = [asked[i:i + batch_size] for i in range(0, len(asked), batch_size)]
    right = 0
    for at in range(0, len(batches), world):
        mine = batches[at + rank] if at + rank < len(batches) else batches[0]  # all ranks make as many passes
        ids, valid = pad([prompt for prompt, _ in mine], model.device)
        h = model.hidden(ids, widths)
        logits = model.lm_head(h[torch.arange(len(mine), device=h.device), valid.sum(1) - 1])
        for row, (_, conversation) in zip(logits.tolist(), mine):
            best = max(zip(letter_ids(tokenizer, conversation), conversation["letters"]), key=lambda pair: row[pair[0]])
            right += at + rank < len(batches) and task.evaluate(conversation, best[1])
    return float(all_sum(torch.tensor(float(right), device=model.device))) / max(1, count)


class Judge:
    """Asks one model the problems of tasks, in batches, at one compute."""
    def __init__(self, engine: Engine, compute: Compute, sampling: Sampling, batch_size: int = 8):
        self.engine, self.compute, self.sampling, self.batch_size = engine, compute, sampling, batch_size
        self.stop = stop_tokens(engine.tokenizer)

    def run(self, task: Task, indices: list[int]) -> Iterator[Outcome]:
        """The outcomes of a task's problems, a batch at a time; a batch holds prompts of like length."""
        problems = [(i, task[i]) for i in indices]
        prompts = {i: self.engine.tokenizer.render_for_completion(c) for i, c in problems}
        limit = self.engine.model.config.sequence_len
        short = sorted((p for p in problems if len(prompts[p[0]]) < limit), key=lambda p: len(prompts[p[0]]))
        for i, _ in problems:
            if len(prompts[i]) >= limit:
                yield Outcome(i, False, ["(the question does not fit into the model's context)"])
        ask = self._choose if task.kind == "categorical" else self._generate
        for at in range(0, len(short), self.batch_size):
            batch = short[at:at + self.batch_size]
            yield from ask(task, batch, [prompts[i] for i, _ in batch])

    def _choose(self, task, batch, prompts):
        tokenizer, compute = self.engine.tokenizer, asdict(self.compute)
        if compute.pop("lossless"):
            compute = {}  # one token at full compute is what lossless decoding gives
        allowed = [letter_ids(tokenizer, conversation) for _, conversation in batch]
        began = time.perf_counter()
        rows = self.engine.answers(prompts, 1, temperature=0, allowed=allowed, **compute)
        seconds = (time.perf_counter() - began) / len(batch)
        for r, (i, conversation) in enumerate(batch):
            answer = conversation["letters"][allowed[r].index(rows[r][0])]
            yield self._outcome(i, task.evaluate(conversation, answer), [answer], 1, seconds, [r])

    def _generate(self, task, batch, prompts):
        s, n = self.sampling, self.sampling.num_samples
        repeated = [p for p in prompts for _ in range(n)]
        began = time.perf_counter()
        rows = self.engine.answers(repeated, s.max_tokens, temperature=s.temperature, top_k=s.top_k, stop=self.stop,
                                   seed=[s.seed + n * i + k for i, _ in batch for k in range(n)], **asdict(self.compute))
        seconds = (time.perf_counter() - began) / len(batch)
        for b, (i, conversation) in enumerate(batch):
            mine = range(b * n, (b + 1) * n)
            answers = [self.engine.tokenizer.decode(rows[r]) for r in mine]
            right = any(task.evaluate(conversation, answer) for answer in answers)
            yield self._outcome(i, right, answers, sum(len(rows[r]) for r in mine), seconds, mine)

    def _outcome(self, index, right, answers, tokens, seconds, rows):
        traces = [self.engine.traces[r] for r in rows if self.engine.traces[r].steps]
        totals = [total_flops(trace.flops(self.engine.model)) for trace in traces]
        return Outcome(index, bool(right), answers, tokens, seconds, sum(t[0] for t in totals), sum(t[1] for t in totals))


class Results:
    """
    The outcomes of one task at one compute, in a .jsonl whose first line says what was evaluated: a file of other settings
    begins anew.
    """
    def __init__(self, path: Path, settings: dict):
        self.path, self.outcomes, self.settings = Path(path), [], json.loads(json.dumps(settings))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._read()
        if not self.outcomes:
            self.path.write_text(json.dumps(self.settings) + "\n", encoding="utf-8")

    def _read(self) -> None:
        first, *lines = self.path.read_text(encoding="utf-8").splitlines() or [""]
        try:
            if json.loads(first) != self.settings:
                return
            for line in lines:
                self.outcomes.append(Outcome(**json.loads(line)))
        except (ValueError, TypeError):  # the last line of a killed run is not whole
            with open(self.path, "w", encoding="utf-8") as f:
                f.writelines(json.dumps(row) + "\n" for row in [self.settings, *map(asdict, self.outcomes)])

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(asdict(outcome)) + "\n")

    @property
    def score(self) -> float:
        return sum(o.right for o in self.outcomes) / max(1, len(self.outcomes))


def evaluate(judge: Judge, task: Task, path: Path, settings: dict, share: tuple[int, int, int]) -> Results:
    """
    A task's results at a judge's compute, those in `path` kept. share: (how many problems, this process's rank, number of
    processes); each process takes every so-manieth problem.
    """
    count, rank, world = share
    results = Results(path, settings)
    done = {o.index for o in results.outcomes}
    left = [i for i in range(rank, count, world) if i not in done]
    progress = Progress(f"{task.name}, {judge.compute.name}", len(left), "problems")
    for outcome in judge.run(task, left):
        results.add(outcome)
        progress.step(1, f"{results.score:.1%} right")
    return results


def chat_core(scores: dict[str, float], baselines: dict[str, float]) -> float:
    """The mean of (score - baseline) / (1 - baseline) over tasks: 0 is guessing, 1 is perfect."""
    return sum((scores[t] - baselines[t]) / (1 - baselines[t]) for t in scores) / len(scores)


def paired_difference(ours: list[bool], theirs: list[bool]) -> tuple[float, float]:
    """The mean difference of two models' outcomes on the same problems, and half the width of its 95 % interval."""
    differences = [int(a) - int(b) for a, b in zip(ours, theirs, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / max(1, n - 1)
    return mean, 1.96 * math.sqrt(variance / n)


def fingerprint(file: Path, config) -> str:
    """What tells one checkpoint from another without reading all of it: its config, size and time of change."""
    stat = file.stat()
    return hashlib.blake2b(repr((config, stat.st_size, stat.st_mtime_ns)).encode(), digest_size=8).hexdigest()
