"""
Text for pretraining: three sources, one layout on disk, so that everything after this file has one path.

    python -m nanochat.dataset                                      # embedded: this interpreter's standard library
    python -m nanochat.dataset --data ~/texts                       # a folder or file of .parquet, .jsonl, .txt
    python -m nanochat.dataset --data karpathy/climbmix-400b-shuffle --num-shards 8      # shards of a hub dataset

Layout (nanochat's): one folder of *.parquet shards with a string column "text", one row a document. Sorted by name, the
last shard is the validation split and the others are the training split.
"""
import argparse
import ast
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import sysconfig
import time
import tokenize
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from nanochat.common import atomic_write, cli, fsync_dir, get_base_dir, get_rank, print0

EMBEDDED = "embedded"
DEFAULT_HUB = "karpathy/climbmix-400b-shuffle"
DEFAULT_SHARDS = 4  # training shards fetched from a hub (climbmix: some 90 MB each); the validation shard comes on top
DEFAULT_WORKERS = 4
EXTENSIONS = (".parquet", ".jsonl", ".txt")

LAYOUT_VERSION = 1  # part of a converted folder's name: raise it when what a conversion writes changes
SHARD_CHARS = 250_000_000  # nanochat's shard size
GROUP_CHARS, GROUP_DOCS = 2_000_000, 1024  # a row group is what a reader holds at once
DOCUMENT_CHARS = 65_536  # a longer .txt is cut into documents
VAL_FRACTION, VAL_CHARS = 0.05, 20_000_000  # the validation split: 5 %, of a large source less
EMBEDDED_MIN_CHARS = 1_000_000
RETRY_SECONDS = 1.0  # first wait after a failed transfer; doubles
ATTEMPTS = 3
OTHER_SOURCES = f"give a local folder or file of .parquet, .jsonl or .txt, or '{EMBEDDED}' for the built-in text"


# ---------------------------------------------------------------------------------------------------------------------
# Reading the layout

def list_shards(folder: str | os.PathLike, split: str) -> list[Path]:
    """
    Paths of a split's shards: "train" all but the last of the sorted *.parquet of `folder`, "val" the last.
    Raises FileNotFoundError (no such folder, no shard in it) or ValueError (one shard only, unknown split).
    """
    if split not in ("train", "val"):
        raise ValueError(f"unknown split '{split}': use train or val")
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no dataset folder {folder}: make it with python -m nanochat.dataset --data SOURCE")
    shards = sorted(p for p in folder.glob("*.parquet") if not p.name.startswith("."))
    if not shards:
        raise FileNotFoundError(f"no .parquet shard in {folder}: fill it with python -m nanochat.dataset --data SOURCE")
    if len(shards) < 2:
        raise ValueError(f"{folder} holds one shard, but the last is for validation and training needs another: give "
                         f"that file itself to python -m nanochat.dataset --data {shards[0]}, which splits it")
    return shards[:-1] if split == "train" else shards[-1:]


def open_shard(path: str | os.PathLike) -> pq.ParquetFile:
    """The open parquet file (close it). Raises ValueError naming a file that is not parquet or has no string texts."""
    try:
        file = pq.ParquetFile(path)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as e:
        raise ValueError(f"{path} is not a readable parquet file ({_first_line(e)}): remove or replace it") from e
    schema = file.schema_arrow
    if "text" not in schema.names:
        file.close()
        raise ValueError(f"{path} has no column 'text' (it has: {', '.join(schema.names)}): rename the column that "
                         "holds the documents to 'text'")
    kind = schema.field("text").type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()):
        file.close()
        raise ValueError(f"{path}: column 'text' holds {kind}, not strings: convert it")
    return file


def iter_shard(path: str | os.PathLike, start: int = 0, only: set[int] | None = None) -> Iterator[tuple[int, str]]:
    """
    (row, text) of a shard from row `start` on, or of the rows in `only`. Row groups without such a row are not read,
    and never more than one is in memory. A null text is an empty one.
    """
    with contextlib.closing(open_shard(path)) as file:
        first = 0
        for group in range(file.num_row_groups):
            row, first = first, first + file.metadata.row_group(group).num_rows
            last = first if only is None else max((r + 1 for r in only if row <= r < first), default=0)
            if last <= max(row, start):
                continue
            try:
                for batch in file.iter_batches(batch_size=128, row_groups=[group], columns=["text"], use_threads=False):
                    if row + len(batch) > start:
                        for r, text in enumerate(batch.column(0).to_pylist(), row):
                            if r >= start and (only is None or r in only):
                                yield r, text or ""
                    row += len(batch)
                    if row >= last:
                        break
            except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
                raise ValueError(f"{path} is damaged in row group {group} ({_first_line(e)}): remove it or fetch it "
                                 "again") from e


def iter_texts(folder: str | os.PathLike, split: str, max_chars: int | None = None) -> Iterator[str]:
    """Documents of a split in order; with `max_chars` they end after that many characters (the last one is cut)."""
    left = float("inf") if max_chars is None else max_chars
    for path in list_shards(folder, split):
        for _, text in iter_shard(path):
            if left <= 0:
                return
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


def _first_line(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0]


# ---------------------------------------------------------------------------------------------------------------------
# Writing the layout

class _ShardWriter:
    """Appends documents to numbered parquet shards of about shard_chars; holds one row group in memory."""

    def __init__(self, folder: Path, pattern: str, shard_chars: float):
        self.folder, self.pattern, self.shard_chars = folder, pattern, shard_chars
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
        table = pa.table({"text": pa.array(self._group, pa.string())})
        if self._file is None:
            self.paths.append(self.folder / self.pattern.format(len(self.paths)))
            self._file, self._written = pq.ParquetWriter(self.paths[-1], table.schema, compression="zstd"), 0
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


def _write_layout(folder: Path, documents: Iterable[tuple[bool, str]]) -> tuple[int, int]:
    """Writes (is validation, text) pairs as shards; returns the numbers of training and validation documents."""
    train = _ShardWriter(folder, "shard_{:05d}.parquet", SHARD_CHARS)
    val = _ShardWriter(folder, "validation.tmp", float("inf"))  # one shard, whatever its size
    for is_val, text in documents:
        (val if is_val else train).add(text)
    train.close()
    val.close()
    for path in val.paths:  # the name that sorts last is known only now
        path.rename(folder / f"shard_{len(train.paths):05d}.parquet")
    return train.documents, val.documents


@contextlib.contextmanager
def _locked(folder: Path):
    """One process at a time prepares `folder`; others wait, then find it ready. A killed one's lock goes with it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _build(folder: Path, write: Callable[[Path], object]) -> Path:
    """Makes `folder` by write(temporary folder) and a rename, so that it never exists half-written."""
    if folder.is_dir():
        return folder
    with _locked(folder):
        if folder.is_dir():  # another process made it while this one waited
            return folder
        tmp = folder.parent / f".{folder.name}.tmp"
        shutil.rmtree(tmp, ignore_errors=True)  # left by a killed process: the lock says nobody is in it
        tmp.mkdir()
        try:
            write(tmp)
            for path in tmp.iterdir():
                _fsync(path)
            os.rename(tmp, folder)
            fsync_dir(folder.parent)
        except BaseException as e:
            shutil.rmtree(tmp, ignore_errors=True)
            _raise_if_full(e, folder)
            raise
    return folder


def _fsync(path: Path) -> None:
    """On the disk before the rename, or a power cut could leave a whole-looking shard without its content."""
    with open(path, "rb") as f:
        os.fsync(f.fileno())


def _raise_if_full(e: BaseException, folder: Path) -> None:
    if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise OSError(e.errno, f"no room left to write {folder}: free some disk space and run the same command "
                               "again") from e


def _progress(total: float | None, what: str) -> tqdm:
    """A bar in bytes with speed and ETA, on rank 0 only."""
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, mininterval=0.5, disable=get_rank()[0] != 0)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


# ---------------------------------------------------------------------------------------------------------------------
# (c) The embedded text

# Not text one would want to learn from: test suites (fixtures; and many distributions leave them out), code tables,
# build settings, and what is not the standard library at all.
_SKIPPED_FOLDERS = re.compile("site-packages|dist-packages|__pycache__|tests?|idle_test|encodings|pydoc_data|config-.*")
_SKIPPED_FILES = re.compile(r"_sysconfigdata.*\.py|stringprep\.py|entities\.py|_casefix\.py|(Pattern)?Grammar\.txt")


def _stdlib_files(root: Path) -> list[Path]:
    """The .py, .txt and .rst files of the standard library at `root`, relative to it, sorted."""
    found = []
    for where, folders, names in os.walk(root):
        folders[:] = [f for f in folders if not _SKIPPED_FOLDERS.fullmatch(f)]
        found += [Path(where, n).relative_to(root) for n in names
                  if n.endswith((".py", ".txt", ".rst")) and not _SKIPPED_FILES.fullmatch(n)]
    return sorted(found)


def _stdlib_documents(root: Path) -> dict[str, str]:
    """
    Name -> text: each source file, and each topic of the language reference that help() shows. What repeats half or
    more of its paragraphs from larger documents is left out (many topics are chapters of others), so that no such
    copy can stand on the other side of the split.
    """
    texts = {}
    for path in _stdlib_files(root):
        try:
            with tokenize.open(root / path) as f:  # honours a coding cookie and a BOM
                texts[path.as_posix()] = f.read().strip() + "\n"
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue  # deliberately broken or unreadable sources are no text
    with contextlib.suppress(OSError, SyntaxError, ValueError, UnicodeDecodeError):
        with tokenize.open(root / "pydoc_data/topics.py") as f:
            assigned = [node.value for node in ast.parse(f.read()).body if isinstance(node, ast.Assign)]
        for name, text in ast.literal_eval(assigned[0]).items():
            texts[f"pydoc_data/topics/{name}"] = text.strip() + "\n"
    kept, seen = {}, set()
    for name, text in sorted(texts.items(), key=lambda item: (-len(item[1]), item[0])):
        long = {p for p in re.split(r"\n\s*\n", text) if len(p) > 120} or {text}
        if 2 * sum(len(p) for p in long & seen) < sum(map(len, long)) and len(text) > 1:
            kept[name] = text
        seen |= long
    return kept


def _prepare_embedded(base_data: Path) -> Path:
    root = Path(sysconfig.get_paths()["stdlib"])
    # a link may dangle: such a file is no text either, see _stdlib_documents
    sizes = [(p.as_posix(), (root / p).stat().st_size) for p in _stdlib_files(root) if (root / p).exists()]
    tag = hashlib.blake2b(repr((LAYOUT_VERSION, sizes)).encode(), digest_size=4).hexdigest()

    def write(tmp: Path) -> None:
        # The order and the split follow a hash of the names: both splits are a fair draw, the same on every machine.
        texts = sorted(_stdlib_documents(root).items(), key=lambda item: _digest(item[0]))
        total = sum(len(text) for _, text in texts)
        if total < EMBEDDED_MIN_CHARS:
            raise ValueError(f"the standard library at {root} holds too little text ({total:,} characters; a packed or "
                             "stripped Python?): use another Python or a local folder of .txt, .jsonl or .parquet")
        pairs, seen = [], 0
        for _, text in texts:
            pairs.append((seen < VAL_FRACTION * total, text))
            seen += len(text)
        print0(f"embedded text: {len(texts)} documents, {total / 1e6:.1f} M characters of Python's standard library")
        _write_layout(tmp, pairs)

    return _build(base_data / f"embedded-py{platform.python_version()}-{tag}", write)


# ---------------------------------------------------------------------------------------------------------------------
# (b) Local files

def _local_files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix not in EXTENSIONS:
            raise ValueError(f"{path} is none of {', '.join(EXTENSIONS)}: convert it to one of them")
        return [path]
    files = sorted(p for p in path.rglob("*") if p.suffix in EXTENSIONS and p.is_file()
                   and not any(part.startswith(".") for part in p.relative_to(path).parts))
    if not files:
        raise FileNotFoundError(f"no {', '.join(EXTENSIONS)} file in {path}: put text there, or use --data {EMBEDDED}")
    return files


def _read_txt(path: Path, advance: Callable[[int], object]) -> Iterator[str]:
    """The file as one document, or as several where it is longer than DOCUMENT_CHARS; a few of those in memory."""
    rest, told = "", 0
    with open(path, encoding="utf-8-sig") as f:
        while True:
            try:
                block = f.read(16 * DOCUMENT_CHARS)
            except UnicodeDecodeError as e:
                raise ValueError(f"{path} is not UTF-8 text ({e.reason} before byte {f.buffer.tell():,}): convert it, "
                                 "for example with iconv -f latin1 -t utf-8") from e
            advance(f.buffer.tell() - told)
            told = f.buffer.tell()
            rest += block
            spans = split_text(rest, DOCUMENT_CHARS)
            for start, stop in (spans[:-1] if block else spans):  # the last one may go on in the next block
                yield rest[start:stop]
            if not block:
                return
            rest = rest[spans[-1][0]:] if spans else ""


def _read_jsonl(path: Path, advance: Callable[[int], object]) -> Iterator[str]:
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            advance(len(line))
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as e:
                raise ValueError(f"{path}, line {number} is not JSON ({e}): give an object with a field 'text' on each "
                                 "line") from e
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise ValueError(f"{path}, line {number} has no string in a field 'text': rename the field that holds "
                                 "the text")
            yield record["text"]


def _read_parquet(path: Path, advance: Callable[[int], object]) -> Iterator[str]:
    with contextlib.closing(open_shard(path)) as file:
        rows = max(file.metadata.num_rows, 1)
    size, told = path.stat().st_size, 0
    for row, text in iter_shard(path):
        advance(size * (row + 1) // rows - told)
        told = size * (row + 1) // rows
        yield text


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _prepare_local(path: Path, base_data: Path) -> Path:
    path = path.expanduser().resolve()
    files = _local_files(path)
    if len(files) > 1 and all(f.suffix == ".parquet" and f.parent == path for f in files):
        for file in files:  # the layout already: used where it lies
            open_shard(file).close()
        return path
    root = path if path.is_dir() else path.parent
    stats = [(f.relative_to(root).as_posix(), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    total = sum(size for _, size, _ in stats)
    fraction = min(VAL_FRACTION, VAL_CHARS / max(total, 1))
    tag = hashlib.blake2b(repr((LAYOUT_VERSION, str(path), stats)).encode(), digest_size=8).hexdigest()

    def documents() -> Iterator[tuple[int, str]]:
        with _progress(total, f"converting {path.name}") as bar:
            for file in files:
                for text in _READERS[file.suffix](file, bar.update):
                    text = text.encode("utf-8", "replace").decode()  # a lone surrogate (JSON allows it) is no UTF-8
                    if text.strip():
                        yield _digest(text), text

    def write(tmp: Path) -> None:
        low, high = 2**64, -1

        def sides(is_val: Callable[[int], bool]) -> Iterator[tuple[bool, str]]:
            nonlocal low, high
            for digest, text in documents():
                low, high = min(low, digest), max(high, digest)
                yield is_val(digest), text

        # A document's side follows its content, so equal documents stand on one side and the split needs no memory.
        if 0 not in _write_layout(tmp, sides(lambda digest: digest < fraction * 2**64)):
            return
        # A handful of documents, all on one side: then the one of smallest digest validates.
        if low >= high:
            raise ValueError(f"{path} holds {'no' if high < 0 else 'only one'} document, but training and validation "
                             f"need one each: add text (above {DOCUMENT_CHARS:,} characters a .txt counts as several)")
        for file in tmp.iterdir():
            file.unlink()
        _write_layout(tmp, sides(lambda digest: digest == low))

    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", path.name).strip(".") or "local"
    return _build(base_data / f"{name}-{tag}", write)


# ---------------------------------------------------------------------------------------------------------------------
# (a) Hub datasets

def _attempt(action: Callable, what: str, folder: Path):
    """action(), tried again after a wait when the transfer failed. Raises ValueError or OSError with the remedy."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except Exception as e:  # the hub's client lets several libraries' exceptions through
            _raise_if_full(e, folder)
            if isinstance(e, RepositoryNotFoundError):
                raise ValueError(f"{what}: no such dataset on the hub, or none you may read (`hf auth login`): check "
                                 f"the name, or {OTHER_SOURCES}") from e
            if isinstance(e, EntryNotFoundError) and not isinstance(e, LocalEntryNotFoundError):
                raise ValueError(f"{what}: no such file on the hub; remove {folder} to list the dataset afresh") from e
            if isinstance(e, PermissionError):
                raise
            if attempt == ATTEMPTS:
                raise ConnectionError(f"{what} could not be fetched ({_first_line(e)}): check the network and run the "
                                      f"same command again (what came is kept), or {OTHER_SOURCES}") from e
            time.sleep(RETRY_SECONDS * 2 ** (attempt - 1))


def _hub_listing(repo: str, folder: Path) -> dict:
    """
    {"repo", "revision", "files": [[name, bytes], ...]}: asked once, then kept beside the shards, so that later calls
    need no network and all shards are of one revision.
    """
    path = folder / "hub.json"
    with contextlib.suppress(FileNotFoundError, ValueError):
        listing = json.loads(path.read_text())
        if listing.get("repo") == repo and listing.get("files"):
            return listing
    from huggingface_hub import HfApi
    info = _attempt(lambda: HfApi().dataset_info(repo, files_metadata=True, timeout=20), repo, folder)
    files = sorted((s.rfilename, s.size or 0) for s in info.siblings if s.rfilename.endswith(".parquet"))
    if len(files) < 2:
        raise ValueError(f"{repo} holds {len(files)} .parquet files, but two or more are needed (one validates): "
                         f"choose another dataset, or {OTHER_SOURCES}")
    listing = {"repo": repo, "revision": info.sha, "files": files}
    with atomic_write(path, "w") as f:
        json.dump(listing, f)
    return listing


def _prepare_hub(repo: str, num_shards: int, workers: int, base_data: Path) -> Path:
    if num_shards < 1 or workers < 1:
        raise ValueError(f"num_shards={num_shards} and workers={workers} must both be at least 1")
    folder = base_data / repo.replace("/", "--")
    with _locked(folder):
        listing = _hub_listing(repo, folder)
        *train, last = [(name, size, folder / name.replace("/", "--")) for name, size in listing["files"]]
        # Validation first and alone: a folder left half-filled never validates on a training shard.
        wanted = [last, *train[:num_shards]]
        missing = [shard for shard in wanted if not shard[2].exists()]
        if missing:
            _fetch_all(repo, listing["revision"], missing, workers, folder)
    for *_, path in wanted:
        open_shard(path).close()
    return folder


def _fetch_all(repo: str, revision: str, missing: list[tuple[str, int, Path]], workers: int, folder: Path) -> None:
    """The shards (name, bytes, target), the first alone, then `workers` at once, with one progress bar for all."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    staging = folder / ".download"  # here an interrupted transfer goes on; whole, checked shards are renamed from it

    def fetch(name: str, target: Path) -> None:
        got = _attempt(lambda: hf_hub_download(repo, name, repo_type="dataset", revision=revision, local_dir=staging),
                       f"{repo}/{name}", folder)
        open_shard(got).close()
        _fsync(got)
        os.replace(got, target)

    def arrived() -> int:
        sizes = 0
        for path in (*(target for *_, target in missing), *staging.rglob("*.incomplete")):
            with contextlib.suppress(OSError):  # not there yet, or just renamed
                sizes += path.stat().st_size
        return sizes

    quiet = are_progress_bars_disabled()
    disable_progress_bars()
    pool = ThreadPoolExecutor(workers)
    try:
        with _progress(sum(size for _, size, _ in missing) or None, f"fetching {len(missing)} shards") as bar:
            for part in (missing[:1], missing[1:]):
                pending = {pool.submit(fetch, name, target) for name, _, target in part}
                while pending:
                    done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                    bar.update(max(arrived() - bar.n, 0))
                    for future in done:
                        future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        if not quiet:
            enable_progress_bars()
    shutil.rmtree(staging, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------

def prepare(source: str = EMBEDDED, num_shards: int = DEFAULT_SHARDS, workers: int = DEFAULT_WORKERS,
            base_dir: str | os.PathLike | None = None) -> Path:
    """
    The folder of shards for `source`, made under base_dir/base_data (default: the artifacts' folder) if need be; quick
    when it is there. `source` is the word "embedded" (a folder of that name is ./embedded), else an existing path, else
    the name owner/name of a hub dataset, of which `num_shards` training shards and the last one are fetched, `workers`
    at once; more of them that are there already are used too.
    Raises FileNotFoundError, ValueError, ConnectionError or OSError, in one line with the remedy.
    """
    base_data = Path(base_dir or get_base_dir()) / "base_data"
    source = os.fspath(source)
    if source == EMBEDDED:
        return _prepare_embedded(base_data)
    path = Path(source).expanduser()
    if path.exists():
        return _prepare_local(path, base_data)
    if source.startswith((".", "/", "~")) or source.endswith(EXTENSIONS):
        raise FileNotFoundError(f"no such file or folder: {source}; {OTHER_SOURCES}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise ValueError(f"'{source}' is neither an existing path nor a hub dataset owner/name: {OTHER_SOURCES}, or a "
                         f"hub name such as {DEFAULT_HUB}")
    return _prepare_hub(source, num_shards, workers, base_data)


@cli
def main() -> None:
    parser = argparse.ArgumentParser(description="Make the folder of parquet shards that training reads.")
    parser.add_argument("--data", default=EMBEDDED, help=f"'{EMBEDDED}' (default: this Python's standard library), a "
                        f"folder or file of .parquet, .jsonl, .txt, or a hub dataset such as {DEFAULT_HUB}")
    parser.add_argument("--num-shards", type=int, default=DEFAULT_SHARDS,
                        help=f"training shards to fetch from a hub dataset (default {DEFAULT_SHARDS})")
    parser.add_argument("--workers", type=int, default=DEFAULT_WORKERS,
                        help=f"shards fetched at once (default {DEFAULT_WORKERS})")
    args = parser.parse_args()
    folder = prepare(args.data, args.num_shards, args.workers)
    for split in ("train", "val"):
        shards, rows = list_shards(folder, split), 0
        for shard in shards:
            with contextlib.closing(open_shard(shard)) as file:
                rows += file.metadata.num_rows
        size = sum(shard.stat().st_size for shard in shards)
        print0(f"{split:5s} {len(shards)} shards, {rows:,} documents, {size / 1e6:.1f} MB compressed")
    print0(f"dataset folder: {folder}")


if __name__ == "__main__":
    main()
