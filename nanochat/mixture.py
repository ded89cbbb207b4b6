"""
Mixtures of sources: what --data says, parsed and prepared.

    --data embedded                                                          one source
    --data "0.8*karpathy/climbmix-400b-shuffle,0.2*chat.jsonl"               two, by their share of the tokens

    --data tasks:GSM8K+MMLU                                                  benchmarks' training splits, as conversations

A source is what nanochat.dataset takes: text or conversations, on the disk or on the hub; or tasks (nanochat.tasks.sources).
To fetch and convert beforehand:

    python -m nanochat.mixture --data "..."
"""
import argparse
import math
from pathlib import Path
from typing import NamedTuple

from nanochat.common import cli, print0, user_path
from nanochat.dataset import DEFAULT_HUB, EMBEDDED, add_skip_arg, prepare
from nanochat.shards import list_shards, shard_kind
from nanochat.tasks.sources import is_task_source, prepare_tasks

DEFAULT_CHATS = "HuggingFaceTB/smol-smoltalk"
MULTIPLE_CHOICE, TOOL_USE = "tasks:MMLU+ARC-Easy+ARC-Challenge", "tasks:GSM8K"
# nanochat-d32 is a chat model: it stays one by hearing chats, and it was taught multiple choice and the tool by these alone.
DEFAULT_MIXTURE = f"0.8*{DEFAULT_HUB},0.1*{DEFAULT_CHATS},0.05*{MULTIPLE_CHOICE},0.05*{TOOL_USE}"
SYNTAX = "write WEIGHT*SOURCE,WEIGHT*SOURCE such as 0.8*karpathy/climbmix-400b-shuffle,0.2*chat.jsonl"


class Part(NamedTuple):
    """A source of a mixture: its weight and its folder of shards."""
    weight: float
    folder: Path


def parse(spec: str) -> list[tuple[float, str]]:
    """
    (weight, source) of each part of a mixture; the weight of a lone source may be left out. Weights are positive and need
    not add up to 1. An existing path is a source whatever characters it has. Raises ValueError that explains the syntax.
    """
    try:
        exists = user_path(spec).exists()
    except (OSError, ValueError):  # such as "File name too long", which many sources together are
        exists = False
    if exists or ("," not in spec and "*" not in spec):
        return [(1.0, spec)]
    parts = []
    for text in spec.split(","):
        weight, star, source = text.partition("*")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not star or not source.strip() or not 0 < value < math.inf:
            raise ValueError(f"--data {spec}: '{text}' is no WEIGHT*SOURCE with a positive weight: {SYNTAX}")
        parts.append((value, source.strip()))
    sources = [source for _, source in parts]
    if len(set(sources)) < len(sources):
        raise ValueError(f"--data {spec} names a source twice: add its weights up")
    return parts


def prepare_mixture(spec: str, skip_bad_rows: bool = False) -> list[Part]:
    """The parts of a mixture, each made ready by nanochat.dataset.prepare, whose errors it raises; printed where several."""
    parsed = parse(spec)
    parts = [Part(weight, prepare_tasks(source) if is_task_source(source) else prepare(source, skip_bad_rows=skip_bad_rows))
             for weight, source in parsed]
    total = sum(weight for weight, _ in parsed)
    if len(parts) > 1:
        print0("data: " + ", ".join(
            f"{weight / total:.1%} {source} ({'conversations' if is_chat(part) else 'text'})"
            for (weight, source), part in zip(parsed, parts)))
    return parts


def is_chat(part: Part) -> bool:
    return shard_kind(list_shards(part.folder, "train")[0]) == "chat"


def add_data_arg(p: argparse.ArgumentParser, default: str | None) -> None:
    """--data, with `default`; None: what default_data says."""
    said = default or f"on a GPU {DEFAULT_MIXTURE}, on a CPU {EMBEDDED}"
    p.add_argument("--data", default=default, help=(
        f"'{EMBEDDED}' (the Python standard library's text), a folder or file of .parquet/.jsonl/.txt, a hub dataset's "
        f"name such as {DEFAULT_HUB} (with :CONFIGURATION where it has several), {MULTIPLE_CHOICE} or any tasks' training "
        "splits, or examples:... of them without a network, "
        "or a mixture of such: WEIGHT*SOURCE,WEIGHT*SOURCE, the weights being shares of the "
        'tokens. A .jsonl has {"text": ...} on each line, or a conversation: a list of {"role", "content"} or {"messages": '
        f'such a list}}, of which only what the assistant says is learnt (default: {said})'))


def default_data(device: str) -> str:
    """What a hybrid is trained on where --data does not say: on a GPU the real mixture, on a CPU the embedded text."""
    data = DEFAULT_MIXTURE if device == "cuda" else EMBEDDED
    print0(f"--data is not given: {data}" + (f" (without a network: --data {EMBEDDED})" if device == "cuda" else ""))
    return data


@cli
def main(argv=None) -> None:
    p = argparse.ArgumentParser(description="Make the sources of a mixture ready for training.")
    add_data_arg(p, DEFAULT_MIXTURE)
    add_skip_arg(p)
    args = p.parse_args(argv)
    for part in prepare_mixture(args.data, args.skip_bad_rows):
        print0(f"{'conversations' if is_chat(part) else 'text'} in {part.folder}")


if __name__ == "__main__":
    main()
