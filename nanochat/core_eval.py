"""
CORE, DCLM's measure of a base model (Li et al. 2024, arXiv 2406.11794) as nanochat computes it: in-context tasks of three
kinds, each centred on guessing, and their mean.

    multiple_choice     one query, several choices: the likeliest continuation, by its tokens' mean loss
    schema              several contexts, one continuation: the context after which that is likeliest
    language_modeling   one continuation: right if each of its tokens is the greedy one
"""
import csv
import json
import os
import random
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import yaml

from nanochat.common import Progress, get_base_dir, get_rank, print0, user_path
from nanochat.confidence_probe import pad
from nanochat.distributed import all_sum
from nanochat.shards import locked
from nanochat.tasks.common import EXAMPLES, numbered_lines, parse_line

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"  # nanochat's copy of DCLM's
BUNDLE_BYTES = 2 << 30  # more than this, unpacked, is no evaluation bundle
SHUFFLE_SEED, SHOTS_SEED = 1337, 1234  # nanochat's
COLUMNS = {"multiple_choice": ("query", "choices", "gold"), "schema": ("context_options", "continuation", "gold"),
           "language_modeling": ("context", "continuation")}
REMEDY = "download it again, or give another --bundle"


@dataclass(frozen=True)
class CoreTask:
    """An in-context task: kind is a key of COLUMNS, shots the examples before a row, baseline the score of guessing."""
    label: str
    kind: str
    rows: list[dict]
    shots: int
    delimiter: str
    baseline: float


class Sequence(NamedTuple):
    """Token ids of which those in [start, stop) are judged."""
    ids: list[int]
    start: int
    stop: int


# ---------------------------------------------------------------------------------------------------------------------
# The bundle

def open_bundle(source: str) -> Path:
    """
    The folder that holds core.yaml: of a folder, a .zip, or a URL of one, which is fetched and unpacked once under
    NANOCHAT_BASE_DIR. FileNotFoundError, ConnectionError, or ValueError for a file that is no whole bundle.
    """
    if source.startswith(("http://", "https://")):
        folder = _made(get_base_dir() / "eval_bundle", lambda tmp: _unpack(_fetch(source, tmp / "bundle.zip"), tmp))
    else:
        path = user_path(source)
        if not path.exists():
            raise FileNotFoundError(f"there is no evaluation bundle {path}: give --bundle {BUNDLE_URL} once, or --bundle "
                                    "examples for the embedded ones")
        folder = path
        if path.is_file():
            stat = path.stat()
            name = f"eval_bundle-{path.stem}-{stat.st_size}-{stat.st_mtime_ns}"
            folder = _made(get_base_dir() / name, lambda tmp: _unpack(path, tmp))
    found = [p for p in (folder, folder / "eval_bundle") if (p / "core.yaml").is_file()]
    if not found:
        raise ValueError(f"{folder} holds no core.yaml, so it is no evaluation bundle: {REMEDY}")
    return found[0]


def _made(folder: Path, write) -> Path:
    """`folder`, made by write(temporary folder) where it is not there; it is never half-written."""
    with locked(folder):
        if not folder.is_dir():
            tmp = folder.with_name(f".{folder.name}.tmp")
            shutil.rmtree(tmp, ignore_errors=True)  # left by a killed process
            tmp.mkdir()
            try:
                write(tmp)
                os.rename(tmp, folder)
            finally:
                shutil.rmtree(tmp, ignore_errors=True)
    return folder


def _fetch(url: str, to: Path) -> Path:
    import urllib.request
    print0(f"fetching {url}")
    try:
        with urllib.request.urlopen(url, timeout=60) as reply, open(to, "wb") as f:
            shutil.copyfileobj(reply, f, 1 << 20)
    except OSError as e:
        raise ConnectionError(f"{url} could not be fetched ({e}): check the network and run the same command again, or give "
                              "a file with --bundle") from e
    return to


def _unpack(path: Path, folder: Path) -> None:
    """A .zip's files into a folder. ValueError for a damaged one, one that names places outside, or one too large."""
    try:
        with zipfile.ZipFile(path) as z:
            infos = [i for i in z.infolist() if not i.is_dir() and not i.filename.startswith("__MACOSX")]
            for info in infos:
                if not (folder / info.filename).resolve().is_relative_to(folder.resolve()):
                    raise ValueError(f"{path} holds {info.filename!r}, a place outside its folder: {REMEDY}")
            if sum(i.file_size for i in infos) > BUNDLE_BYTES:
                raise ValueError(f"{path} unpacks to more than {BUNDLE_BYTES >> 30} GB, as no bundle does: {REMEDY}")
            for info in infos:
                target = folder / info.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                with z.open(info) as f, open(target, "wb") as g:
                    shutil.copyfileobj(f, g, 1 << 20)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as e:
        raise ValueError(f"{path} is truncated or no .zip ({e}): {REMEDY}") from e
    if path.parent == folder:
        os.unlink(path)


def read_bundle(folder: Path | None) -> list[CoreTask]:
    """The tasks of a bundle's folder in its order; None: the embedded ones. ValueError names what lacks or is malformed."""
    if folder is None:
        return [_checked(CoreTask(**task)) for task in json.loads(EXAMPLES.read_text(encoding="utf-8"))["CORE"]]
    try:
        listed = yaml.safe_load((folder / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]
        with open(folder / "eval_meta_data.csv", encoding="utf-8") as f:
            baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(f)}
        tasks = [(t["label"], t["icl_task_type"], t["dataset_uri"], int(t["num_fewshot"][0]),
                  str(t.get("continuation_delimiter", " "))) for t in listed]
    except (OSError, KeyError, TypeError, ValueError, IndexError, yaml.YAMLError) as e:
        said = " ".join(str(e).split())[:120]
        raise ValueError(f"{folder} is truncated or no evaluation bundle ({said}): {REMEDY}") from e
    out = []
    for label, kind, uri, shots, delimiter in tasks:
        file = folder / "eval_data" / uri
        if not file.resolve().is_relative_to(folder.resolve()) or not file.is_file() or label not in baselines:
            raise ValueError(f"{folder} lacks the data or the baseline of {label}: {REMEDY}")
        rows = [parse_line(line, where) for where, line in numbered_lines(file)]
        out.append(_checked(CoreTask(label, kind, rows, shots, delimiter, baselines[label])))
    return out


def _checked(task: CoreTask) -> CoreTask:
    """The task. ValueError where its kind is unknown or a row lacks a column."""
    if task.kind not in COLUMNS or not task.rows or task.shots < 0 or not 0 <= task.baseline < 1:
        raise ValueError(f"{task.label}: kind {task.kind!r}, {len(task.rows)} rows, {task.shots} examples, baseline "
                         f"{task.baseline} describe no task: {REMEDY}")
    for i, row in enumerate(task.rows):
        missing = [c for c in COLUMNS[task.kind] if not isinstance(row, dict) or c not in row]
        if not missing and "gold" in COLUMNS[task.kind]:
            options = row.get("choices", row.get("context_options"))
            if not isinstance(row["gold"], int) or not 0 <= row["gold"] < len(options):
                missing = ["gold as an index"]
        if missing:
            raise ValueError(f"row {i} of {task.label} lacks {', '.join(missing)}: {REMEDY}")
    return task


# ---------------------------------------------------------------------------------------------------------------------
# Prompts

def prompts(task: CoreTask, index: int) -> list[str]:
    """
    What a model reads of a row: the prompt with each choice, with each context, or (language modelling) without and with the
    continuation. Before it stand examples, other rows that depend on the index alone.
    """
    others = [i for i in range(len(task.rows)) if i != index]
    shots = random.Random(SHOTS_SEED + index).sample(others, min(task.shots, len(others)))
    row, d = task.rows[index], task.delimiter

    def shown(r, answer=None):
        if task.kind == "multiple_choice":
            return r["query"] + d + r["choices"][r["gold"] if answer is None else answer]
        if task.kind == "schema":
            return r["context_options"][r["gold"] if answer is None else answer] + d + r["continuation"]
        return r["context"].strip() + d + r["continuation"]
    before = "".join(shown(task.rows[i]) + "\n\n" for i in shots)
    if task.kind == "language_modeling":
        return [(before + row["context"].strip() + d).strip(), before + shown(row)]
    return [before + shown(row, i) for i in range(len(row.get("choices", row.get("context_options"))))]


def sequences(tokenizer, task: CoreTask, index: int, limit: int) -> list[Sequence]:
    """
    The prompts of a row as tokens, each cropped on the left to `limit`, and which tokens are judged: what differs between
    choices; the common end, of contexts; the continuation.
    """
    rows = [tokenizer.encode(text, prepend="<|bos|>") for text in prompts(task, index)]
    if task.kind == "language_modeling":
        start = len(rows[0])
        if rows[1][:start] != rows[0]:  # the continuation's first letters joined the context's last in one token
            start = _common(rows)
        found = [Sequence(rows[1], start, len(rows[1]))]
    elif task.kind == "multiple_choice":
        found = [Sequence(ids, _common(rows), len(ids)) for ids in rows]
    else:
        same = _common([ids[::-1] for ids in rows])
        found = [Sequence(ids, len(ids) - same, len(ids)) for ids in rows]
    cut = [max(0, len(s.ids) - limit) for s in found]
    return [Sequence(s.ids[c:], max(1, s.start - c), s.stop - c) for s, c in zip(found, cut)]


def _common(rows: list[list[int]]) -> int:
    """How many of their first tokens are the same in all rows."""
    return next((i for i, column in enumerate(zip(*rows)) if len(set(column)) > 1), min(map(len, rows)))


# ---------------------------------------------------------------------------------------------------------------------
# Scores

@torch.no_grad()
def judge(model, found: list[Sequence], batch_size: int, widths=None) -> Iterator[tuple[int, float, bool]]:
    """(number, mean loss of its judged tokens in nats, whether each is the greedy one) of sequences, sorted by length."""
    order = sorted(range(len(found)), key=lambda i: len(found[i].ids))
    for at in range(0, len(order), batch_size):
        batch = order[at:at + batch_size]
        idx, _ = pad([found[i].ids for i in batch], model.device)
        h = model.hidden(idx, widths)
        for row, i in enumerate(batch):
            s = found[i]
            logits = model.logits(h[row, s.start - 1:s.stop - 1])
            targets = idx[row, s.start:s.stop]
            yield i, float(F.cross_entropy(logits, targets)), bool((logits.argmax(-1) == targets).all())


def evaluate_task(model, tokenizer, task: CoreTask, most: int | None, batch_size: int, widths=None) -> float:
    """
    The share of a task's rows (of `most` of them, in nanochat's shuffled order) that a model gets right. With several
    processes each judges its share of the rows; all get the same number.
    """
    rows = list(task.rows)
    random.Random(SHUFFLE_SEED).shuffle(rows)
    shuffled = CoreTask(task.label, task.kind, rows[:most], task.shots, task.delimiter, task.baseline)
    rank, world = get_rank()
    mine = range(rank, len(shuffled.rows), world)
    progress, right, limit = Progress(task.label, len(mine), "rows"), 0, model.config.sequence_len
    for at in range(0, len(mine), 64):  # so many rows' prompts are in memory
        found = [(i, s) for i in mine[at:at + 64] for s in sequences(tokenizer, shuffled, i, limit)]
        losses: dict[int, list] = {i: [] for i, _ in found}
        for n, loss, greedy in sorted(judge(model, [s for _, s in found], batch_size, widths)):
            losses[found[n][0]].append((loss, greedy))
        for i, each in losses.items():
            if task.kind == "language_modeling":
                right += each[0][1]
            else:
                right += min(range(len(each)), key=lambda k: each[k][0]) == shuffled.rows[i]["gold"]
        progress.step(len(losses), "")
    return float(all_sum(torch.tensor(float(right), device=model.device))) / len(shuffled.rows)


def centred(accuracy: float, baseline: float) -> float:
    """0 for guessing, 1 for all right."""
    return (accuracy - baseline) / (1 - baseline)
