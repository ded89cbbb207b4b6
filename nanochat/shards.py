"""
The layout that all training data has on disk, read and written: one folder of *.parquet shards, one row a
document. Where their names say train, validation or test they are read so (nanochat.data.splits); else, sorted by
name, the last shard is the validation split and the others are the training split (nanochat's layout).

A document is a text, in a string column "text", or a conversation, in a column "messages": a JSON string of a list of
{"role", "content"}, or, as hub datasets have it, a list of such structs. A folder holds one kind. Here both are strings:
a conversation is the JSON of its messages (nanochat.conversations reads it).
"""
import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import filelock
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from nanochat.common import WINDOWS, Progress, fsync_dir, get_rank, raise_if_full
from nanochat.conversations import plain_text
from nanochat.data.files import arrow_place
from nanochat.data.splits import choose

EMBEDDED = "embedded"
OTHER_SOURCES = f"give a local folder or file of .parquet, .jsonl or .txt, or --data {EMBEDDED} for the built-in text"
COLUMNS = {"text": "text", "chat": "messages"}  # kind of document -> its column

SHARD_CHARS = 250_000_000  # nanochat's shard size
GROUP_CHARS, GROUP_DOCS = 2_000_000, 1024  # a row group is what a reader holds at once


# ---------------------------------------------------------------------------------------------------------------------
# Reading

def list_shards(folder: str | os.PathLike, split: str) -> list[Path]:
    """
    Paths of a split's shards, of the sorted *.parquet of `folder`: "train" those that their names say are to train on, "val"
    those that are to validate, or the last of the others. Raises FileNotFoundError (no such folder, no shard in it) or
    ValueError (one shard only, none to train on, unknown split).
    """
    if split not in ("train", "val"):
        raise ValueError(f"unknown split '{split}': use train or val")
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no dataset folder {folder}: make it with python -m nanochat.dataset --data SOURCE")
    shards = {p.name: p for p in sorted(folder.glob("*.parquet")) if not p.name.startswith(".")}
    if not shards:
        raise FileNotFoundError(f"no .parquet shard in {folder}: fill it with python -m nanochat.dataset --data SOURCE")
    try:
        train, val, _ = choose(list(shards))
    except ValueError as e:
        raise ValueError(f"{folder}: {e}") from e
    if not val:
        train, val = train[:-1], train[-1:]
    if not train:
        raise ValueError(f"{folder} holds one shard, but the last is for validation and training needs another: give "
                         f"that file itself to python -m nanochat.dataset --data {shards[val[0]]}, which splits it")
    return [shards[name] for name in (train if split == "train" else val)]


def open_shard(path: str | os.PathLike) -> pq.ParquetFile:
    """The open parquet file (close it). Raises ValueError naming a file that is not parquet or has no documents."""
    try:
        file = pq.ParquetFile(arrow_place(path))
    except (FileNotFoundError, PermissionError):
        raise
    except (pa.ArrowException, OSError) as e:
        raise ValueError(f"{path} is not a readable parquet file ({first_line(e)}): remove or replace it") from e
    schema = file.schema_arrow
    column = COLUMNS[_kind(file)]
    if column not in schema.names:
        file.close()
        raise ValueError(f"{path} has no column 'text' (it has: {', '.join(schema.names)}): rename the column that "
                         "holds the documents to 'text' (of conversations: 'messages')")
    kind = schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    strings = pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()
    if not (strings or (column == "messages" and pa.types.is_nested(kind))):
        file.close()
        raise ValueError(f"{path}: column '{column}' holds {kind}, not {'strings' if column == 'text' else 'messages'}: "
                         "convert it")
    return file


def _kind(file: pq.ParquetFile) -> str:
    return "chat" if "messages" in file.schema_arrow.names else "text"  # as a line of a .jsonl with both


def shard_kind(path: str | os.PathLike) -> str:
    """What the documents of a shard are: "text" or "chat". Raises what open_shard raises."""
    with contextlib.closing(open_shard(path)) as file:
        return _kind(file)


def iter_shard(path: str | os.PathLike, start: int = 0, only: set[int] | None = None) -> Iterator[tuple[int, str]]:
    """
    (row, document) of a shard from row `start` on, or of the rows in `only`. Row groups without such a row are not read,
    and never more than one is in memory. Null and blank documents are empty ones.
    """
    with contextlib.closing(open_shard(path)) as file:
        first, column = 0, COLUMNS[_kind(file)]
        for group in range(file.num_row_groups):
            row, first = first, first + file.metadata.row_group(group).num_rows
            last = first if only is None else max((r + 1 for r in only if row <= r < first), default=0)
            if last <= max(row, start):
                continue
            try:
                for batch in file.iter_batches(batch_size=128, row_groups=[group], columns=[column], use_threads=False):
                    if row + len(batch) > start:
                        for r, document in enumerate(batch.column(0).to_pylist(), row):
                            if r >= start and (only is None or r in only):
                                yield r, _as_text(document)
                    row += len(batch)
                    if row >= last:
                        break
            except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
                raise ValueError(f"{path} is damaged in row group {group} ({first_line(e)}): remove it or fetch it "
                                 "again") from e


def _as_text(document: str | list | None) -> str:
    if not document:
        return ""
    return json.dumps(document) if not isinstance(document, str) else document if not document.isspace() else ""


def iter_texts(folder: str | os.PathLike, split: str, max_chars: int | None = None) -> Iterator[str]:
    """
    Documents of a split in order, of conversations what was said; with `max_chars` they end after that many characters (the
    last one is cut).
    """
    left = float("inf") if max_chars is None else max_chars
    for path in list_shards(folder, split):
        kind = shard_kind(path)
        for row, text in iter_shard(path):
            if left <= 0:
                return
            if kind == "chat" and text:
                text = plain_text(text, f"{path}, row {row}")
            if text:
                yield text if len(text) <= left else text[:int(left)]
                left -= len(text)


def split_text(text: str, max_chars: int) -> list[tuple[int, int]]:
    """
    Spans (start, stop) that cover `text` in order, none longer than `max_chars`: cut behind a blank line if the last
    half of the span has one, else behind a line, else behind a space, else anywhere. A function of the text alone.
    """
    spans, start = [], 0
    while len(text) - start > max_chars:
        stop = start + max_chars
        for mark in ("\n\n", "\n", " "):
            found = text.rfind(mark, start + max_chars // 2, stop)
            if found > start:
                stop = found + len(mark)
                break
        spans.append((start, stop))
        start = stop
    if start < len(text):
        spans.append((start, len(text)))
    return spans


def first_line(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0]


# ---------------------------------------------------------------------------------------------------------------------
# Writing

class ShardWriter:
    """Appends documents to numbered parquet shards of about shard_chars; holds one row group in memory."""

    def __init__(self, folder: Path, pattern: str, shard_chars: float, column: str):
        self.folder, self.pattern, self.shard_chars, self.column = folder, pattern, shard_chars, column
        self.paths: list[Path] = []
        self.documents = 0
        self._file, self._written, self._group, self._group_chars = None, 0, [], 0

    def add(self, text: str) -> None:
        self._group.append(text)
        self._group_chars += len(text)
        self.documents += 1
        if self._group_chars >= GROUP_CHARS or len(self._group) >= GROUP_DOCS:
            self._flush()

    def _flush(self) -> None:
        if not self._group:
            return
        table = pa.table({self.column: pa.array(self._group, pa.string())})
        if self._file is None:
            self.paths.append(self.folder / self.pattern.format(len(self.paths)))
            place = arrow_place(self.paths[-1], "wb")
            self._file, self._written = pq.ParquetWriter(place, table.schema, compression="zstd"), 0
        self._file.write_table(table)
        self._written += self._group_chars
        self._group, self._group_chars = [], 0
        if self._written >= self.shard_chars:
            self.close()

    def close(self) -> None:
        self._flush()
        if self._file is not None:
            self._file.close()
            self._file = None


def write_layout(folder: Path, documents: Iterable[tuple[bool, str]], kind: str = "text") -> tuple[int, int]:
    """Writes (is validation, document) pairs as shards; returns the numbers of training and validation documents."""
    train = ShardWriter(folder, "shard_{:05d}.parquet", SHARD_CHARS, COLUMNS[kind])
    val = ShardWriter(folder, "validation.tmp", float("inf"), COLUMNS[kind])  # one shard, whatever its size
    for is_val, text in documents:
        (val if is_val else train).add(text)
    train.close()
    val.close()
    for path in val.paths:  # the name that sorts last is known only now
        path.rename(folder / f"shard_{len(train.paths):05d}.parquet")
    return train.documents, val.documents


@contextlib.contextmanager
def locked(folder: Path):
    """One process at a time prepares `folder`; others wait, then find it ready. A killed one's lock goes with it."""
    with _writable(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder.parent / f".{folder.name}.lock", mode=0o666)
        try:
            lock.acquire()
        except NotImplementedError:  # a file system without locks: then two at once do the work twice
            lock = None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


@contextlib.contextmanager
def _writable(folder: Path):
    """Says what to do where `folder` is to be made and may not be."""
    try:
        yield
    except OSError as e:
        if isinstance(e, PermissionError) or e.errno == errno.EROFS:
            raise PermissionError(e.errno, f"{folder} cannot be written ({e.strerror}): set NANOCHAT_BASE_DIR to a folder "
                                           "that can, or prepare the data as its owner") from e
        raise


def build(folder: Path, write: Callable[[Path], object]) -> Path:
    """Makes `folder` by write(temporary folder) and a rename, so that it never exists half-written."""
    if folder.is_dir():
        return folder
    with locked(folder):
        if folder.is_dir():  # another process made it while this one waited
            return folder
        tmp = folder.parent / f".{folder.name}.tmp"
        shutil.rmtree(tmp, ignore_errors=True)  # left by a killed process: the lock says nobody is in it
        with _writable(folder):
            tmp.mkdir()
        try:
            write(tmp)
            for path in tmp.iterdir():
                fsync(path)
            os.rename(tmp, folder)
            fsync_dir(folder.parent)
        except BaseException as e:
            shutil.rmtree(tmp, ignore_errors=True)
            raise_if_full(e, folder)
            raise
    return folder


def fsync(path: Path) -> None:
    """On the disk before the rename, or a power cut could leave a whole-looking shard without its content."""
    if WINDOWS:  # where only what is open for writing can be
        return
    with open(path, "rb") as f:
        os.fsync(f.fileno())


class _Lines(Progress):
    """Progress with tqdm's interface, for where there is no terminal: a line a minute, nothing of what takes less."""
    def __init__(self, what: str, total: float | None):
        super().__init__(what, total or 0, "bytes")
        self.n = 0

    def update(self, n: float) -> None:
        self.n += n
        self.step(n)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def progress(total: float | None, what: str) -> "tqdm | _Lines":
    """Progress in bytes with speed and ETA, on rank 0 only: a bar on a terminal, else a line a minute."""
    if not sys.stderr.isatty():
        return _Lines(what, total)
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, mininterval=0.5, delay=1, leave=False,
                disable=get_rank()[0] != 0)


def digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
