"""The benchmarks and chat data of nanochat: `make("GSM8K", "test")` gives one; common.py says what a task is."""
from functools import partial

from nanochat.tasks.chats import CustomJSON, SmolTalk
from nanochat.tasks.common import Task
from nanochat.tasks.gsm8k import GSM8K
from nanochat.tasks.humaneval import HumanEval
from nanochat.tasks.multiple_choice import ARC, MMLU
from nanochat.tasks.spellingbee import SpellingBee

TASKS = {"ARC-Easy": partial(ARC, "ARC-Easy"), "ARC-Challenge": partial(ARC, "ARC-Challenge"), "MMLU": MMLU, "GSM8K": GSM8K,
         "HumanEval": HumanEval, "SpellingBee": SpellingBee, "SmolTalk": SmolTalk}
BENCHMARKS = tuple(name for name in TASKS if name != "SmolTalk")  # those that are judged, in ChatCORE


def make(name: str, split: str, data: str | None = None, fetch: bool = False) -> Task:
    """
    The task of a name of TASKS, or of the path of a .jsonl of conversations. data and fetch: see RowTask. Raises ValueError
    for a name or a split that there is not, OSError for files that are not there or cannot be fetched.
    """
    if name.endswith(".jsonl"):
        return CustomJSON(name)
    if name not in TASKS:
        raise ValueError(f"there is no task {name}: choose of {', '.join(TASKS)}, or give the path of a .jsonl")
    return TASKS[name](split, data, fetch)
