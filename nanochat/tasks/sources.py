"""
Tasks as a source of training data: --data tasks:GSM8K+MMLU gives the conversations of their training splits, fetched from
the hub; examples:GSM8K+MMLU the few embedded ones.
"""
import hashlib
import json
from pathlib import Path

from nanochat.common import get_base_dir, print0
from nanochat.shards import build, digest, write_layout
from nanochat.tasks import make
from nanochat.tasks.common import TaskMixture

PREFIXES = ("tasks:", "examples:")
VAL_FRACTION = 0.02  # of the training splits: the tasks' own test splits are for chat_eval alone


def is_task_source(source: str) -> bool:
    return source.startswith(PREFIXES)


def prepare_tasks(source: str) -> Path:
    """
    The folder of shards of 'tasks:NAME+NAME...' or 'examples:NAME+NAME...', names of nanochat.tasks.TASKS; one that is named
    twice counts twice. Raises as nanochat.tasks.make does.
    """
    kind, _, names = source.partition(":")
    fetch = kind == "tasks"
    mixture = TaskMixture([make(name, "train", None if fetch else "examples", fetch) for name in names.split("+")])
    texts = [json.dumps(conversation["messages"]) for conversation in mixture]
    content = hashlib.blake2b(digest_size=8)
    for text in texts:
        content.update(text.encode())
    name = f"{kind}-{names.replace('+', '-')}"[:80] + f"-{content.hexdigest()}"
    if not fetch:
        print0(f"{source}: {len(texts)} embedded conversations, from which nothing worth knowing is learnt")
    return build(get_base_dir() / "base_data" / name, lambda folder: write_layout(folder, _sides(texts), "chat"))


def _sides(texts: list[str]) -> list[tuple[bool, str]]:
    """(whether it validates, conversation): equal ones stand on one side, and there is at least one on each."""
    keys = [digest(text) for text in texts]
    if len(set(keys)) < 2:
        raise ValueError("the tasks hold fewer than two different conversations, and training and validation need one each: "
                         "name more tasks")
    bound = max(min(keys), int(VAL_FRACTION * 2**64))
    if bound >= max(keys):
        bound = min(keys)
    return [(key <= bound, text) for key, text in zip(keys, texts)]
