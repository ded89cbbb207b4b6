"""
What a task is: numbered conversations of one benchmark or data set, and how an answer to one is judged; and where its rows
come from: the hub (only where the user asks for a download), a local folder, or a few embedded examples in the real format.
"""
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanochat.common import get_base_dir, print0

EXAMPLES = Path(__file__).with_name("examples.json")
SHUFFLE_SEED = 42  # nanochat's


class Source(NamedTuple):
    """Where a task's rows lie on the hub: a dataset, the folder of its configuration, and the columns that each row has."""
    repo: str
    config: str
    columns: tuple[str, ...]

    def folder(self) -> Path:
        """Where `download` puts them."""
        return get_base_dir() / "task_data" / self.repo.replace("/", "--")


class Task:
    """
    A sequence of conversations {"messages": [...]}, the last message being the right answer. kind: 'categorical' (the
    conversation also has 'letters', of which the answer is one) or 'generative'. baseline: the score of guessing.
    """
    name: str
    kind = "generative"
    baseline = 0.0

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict:
        raise NotImplementedError

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def evaluate(self, conversation: dict, answer: str) -> bool:
        """Whether `answer`, what the assistant wrote, solves the conversation."""
        raise NotImplementedError


class RowTask(Task):
    """A task whose conversations are made of the rows of a data set, in one shuffled order, the same in every run."""
    source: Source
    splits = {"train": "train", "test": "test"}  # our name -> the data set's

    def __init__(self, split: str, data: str | None = None, fetch: bool = False):
        """
        data: a folder that holds the data set's files, 'examples', or None: what was downloaded, else the examples. fetch:
        download it first.
        """
        if split not in self.splits:
            raise ValueError(f"{self.name} has no split '{split}': choose {' or '.join(self.splits)}")
        if fetch:
            download(self.source, [self.splits[split]])
        rows, self.embedded = load_rows(self, self.splits[split], data)
        order = np.random.default_rng(SHUFFLE_SEED).permutation(len(rows))
        self.rows = [rows[i] for i in order]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.conversation(self.rows[index])

    def conversation(self, row: dict) -> dict:
        raise NotImplementedError

    def unwrap(self, row: dict) -> dict:
        """The row's columns, where a data set nests them in another."""
        return row


class TaskMixture(Task):
    """Several tasks' conversations in one shuffled order, the same in every run; a task that stands twice counts twice."""
    def __init__(self, tasks: Sequence[Task]):
        self.tasks, self.name = list(tasks), "mixture"
        self.index = [(t, i) for t, task in enumerate(tasks) for i in range(len(task))]
        random.Random(SHUFFLE_SEED).shuffle(self.index)

    def __len__(self):
        return len(self.index)

    def __getitem__(self, index):
        task, i = self.index[index]
        return self.tasks[task][i]


# ---------------------------------------------------------------------------------------------------------------------
# Rows

def load_rows(task: RowTask, split: str, data: str | None) -> tuple[list[dict], bool]:
    """
    (the rows of a split, whether they are the embedded examples). Raises FileNotFoundError for a folder without them,
    ValueError for rows that lack a column.
    """
    source = task.source
    if data is None:
        data = "examples" if not source.folder().exists() else str(source.folder())
        if data == "examples":
            print0(f"{task.name}: {source.repo} has not been downloaded (--download does), so these are "
                   "a few embedded examples, and their scores say nothing")
    if data == "examples":
        rows = json.loads(EXAMPLES.read_text(encoding="utf-8"))[task.name]
    else:
        rows = read_split(Path(data).expanduser(), source, split)
    rows = [task.unwrap(row) if isinstance(row, dict) else row for row in rows]
    for i, row in enumerate(rows):
        missing = [c for c in source.columns if not isinstance(row, dict) or c not in row]
        if missing:
            raise ValueError(f"row {i} of {task.name} ({data}) has no column {', '.join(missing)}: it needs "
                             f"{', '.join(source.columns)}, as {source.repo} has them")
    return rows, data == "examples"


def read_split(folder: Path, source: Source, split: str) -> list[dict]:
    """The rows of {config}/{split}-*.parquet or {split}.jsonl, in a folder or in its copy of the data set's repository."""
    places = [folder / source.config, folder, folder / source.repo.replace("/", "--") / source.config]
    for place in places:
        if files := sorted(place.glob(f"{split}-*.parquet")) or sorted(place.glob(f"{split}.parquet")):
            import pyarrow.parquet as parquet
            return [row for file in files for row in parquet.read_table(file).to_pylist()]
        if (file := place / f"{split}.jsonl").is_file():
            return [parse_line(line, where) for where, line in numbered_lines(file)]
    raise FileNotFoundError(f"{folder} has no {source.config}/{split}-*.parquet and no {split}.jsonl: fetch {source.repo} "
                            "with --download, or give --data examples")


def parse_line(line: str, where: str):
    """The JSON value of a line. ValueError that begins with where it stands."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where} is not JSON ({e}): give one value on each line") from e


def numbered_lines(file: Path) -> Iterator[tuple[str, str]]:
    """(where it stands, line) of each line of a text file that is not blank."""
    with open(file, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                yield f"{file}, line {number}", line


def download(source: Source, splits: Sequence[str]) -> None:
    """Fetches a data set's files of these splits from the hub; what is there already is not fetched again."""
    from huggingface_hub import snapshot_download
    config = f"{source.config}/" if source.config else ""
    try:
        snapshot_download(source.repo, repo_type="dataset", local_dir=source.folder(),
                          allow_patterns=[f"{config}{split}-*.parquet" for split in splits])
    except Exception as e:  # the hub's client lets several libraries' exceptions through
        reason = " ".join(str(e).split())[:200]
        raise ConnectionError(f"{source.repo} could not be fetched ({reason}): check the network and run the same command "
                              "again, or take the embedded examples (without --download; to train, --data examples:NAME)"
                              ) from e
