"""
Where training data comes from: three sources, one layout on disk (nanochat.shards), so that all after it has one path.

    python -m nanochat.dataset                                      # embedded: this interpreter's standard library
    python -m nanochat.dataset --data ~/texts                       # a folder or file of .parquet, .jsonl, .txt
    python -m nanochat.dataset --data karpathy/climbmix-400b-shuffle --num-shards 8      # shards of a hub dataset
    python -m nanochat.dataset --data HuggingFaceTB/smoltalk:all    # one of its configurations

A .jsonl has on each line {"text": ...}, or a conversation: a list of {"role", "content"}, or {"messages": such a list};
.jsonl and .txt may be packed, as .gz or .zst. Which files train and which validate: nanochat.data.splits. Every row is
looked through once, before training: nanochat.data.check. Training mixes several sources: nanochat.mixture.
"""
import argparse
import ast
import contextlib
import hashlib
import io
import json
import os
import platform
import re
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

from nanochat import conversations
from nanochat.common import cli, get_base_dir, print0, user_path
from nanochat.data.check import SKIP, checked
from nanochat.data.files import EXTENSIONS, PACKED, find_data, kind_of, open_data
from nanochat.data.splits import Chosen, choose, left_out_line
from nanochat.hub import DEFAULT_SHARDS, DEFAULT_WORKERS, prepare_hub
from nanochat.shards import (
    EMBEDDED,
    OTHER_SOURCES,
    build,
    digest,
    iter_shard,
    list_shards,
    open_shard,
    progress,
    shard_kind,
    split_text,
    write_layout,
)

DEFAULT_HUB = "karpathy/climbmix-400b-shuffle"

LAYOUT_VERSION = 1  # part of a converted folder's name: raise it when what a conversion writes changes
DOCUMENT_CHARS = 65_536  # a longer .txt is cut into documents
VAL_FRACTION, VAL_CHARS = 0.05, 20_000_000  # the validation split: 5 %, of a large source less
EMBEDDED_MIN_CHARS = 1_000_000


# ---------------------------------------------------------------------------------------------------------------------
# The embedded text

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
        texts = sorted(_stdlib_documents(root).items(), key=lambda item: digest(item[0]))
        total = sum(len(text) for _, text in texts)
        if total < EMBEDDED_MIN_CHARS:
            raise ValueError(f"the standard library at {root} holds too little text ({total:,} characters; a packed or "
                             "stripped Python?): use another Python or a local folder of .txt, .jsonl or .parquet")
        pairs, seen = [], 0
        for _, text in texts:
            pairs.append((seen < VAL_FRACTION * total, text))
            seen += len(text)
        print0(f"embedded text: {len(texts)} documents, {total / 1e6:.1f} M characters of Python's standard library")
        write_layout(tmp, pairs)

    return build(base_data / f"embedded-py{platform.python_version()}-{tag}", write)


# ---------------------------------------------------------------------------------------------------------------------
# Local files

def _local_files(path: Path) -> Chosen:
    """The files to read, as names under `path` (a folder) or beside it (a file), and those that are left out."""
    if path.is_file():
        if kind_of(path) is None:
            raise ValueError(f"{path} is none of {', '.join(EXTENSIONS)}: convert it to one of them (of .jsonl and .txt "
                             f"{' and '.join(PACKED)} are read too)")
        return Chosen([path.name], [], {})
    names, others = find_data(path)
    if not names:
        raise FileNotFoundError(f"no {', '.join(EXTENSIONS)} file in {path}: put text there, or use --data {EMBEDDED}")
    try:
        chosen = choose(names, _card(path / "README.md"))
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    return chosen._replace(left_out=chosen.left_out | others)


def _card(path: Path) -> list | None:
    """The configurations that a dataset card names; None where it names none."""
    if not path.is_file():
        return None
    from huggingface_hub import metadata_load
    try:
        configs = (metadata_load(path) or {}).get("configs")
    except Exception:  # it is no card: YAML's errors, or another encoding
        return None
    return configs if isinstance(configs, list) else None


def _read_txt(path: Path, advance: Callable[[int], object], fault: Callable[[str], None]) -> Iterator[str]:
    """The file as one document, or as several where it is longer than DOCUMENT_CHARS; a few of those in memory."""
    rest, told = "", 0
    with open_data(path) as (stream, tell), io.TextIOWrapper(stream, encoding="utf-8-sig") as f:
        while True:
            try:
                block = f.read(16 * DOCUMENT_CHARS)
            except UnicodeDecodeError as e:
                raise ValueError(f"{path} is not UTF-8 text ({e.reason} before byte {f.buffer.tell():,}): convert it, "
                                 "for example with iconv -f latin1 -t utf-8") from e
            advance(tell() - told)
            told = tell()
            rest += block
            spans = split_text(rest, DOCUMENT_CHARS)
            for start, stop in (spans[:-1] if block else spans):  # the last one may go on in the next block
                yield rest[start:stop]
            if not block:
                return
            rest = rest[spans[-1][0]:] if spans else ""


def _jsonl_kind(path: Path) -> str:
    """What the first line of a .jsonl is: "text" or "chat"."""
    with open_data(path) as (f, _), contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        first = json.loads(next((line for line in f if line.strip()), b"{}"))
        return "chat" if conversations.is_conversation(first) else "text"
    return "text"  # whose reader says what is wrong with it


def _parse_line(line: bytes, chat: bool, where: str) -> str:
    """The document of a line of a .jsonl, empty where its text or its messages are null. ValueError for no document."""
    if chat:
        record = conversations.load(line, where)
        return json.dumps(conversations.check_at(record, where)["messages"]) if record is not None else ""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where} is not JSON ({e}): give an object with a field 'text' on each line") from e
    if not isinstance(record, dict) or not isinstance(record.get("text", 0), str | None):
        raise ValueError(f"{where} has no string in a field 'text': rename the field that holds the text (a "
                         "conversation goes into a file of conversations only)")
    return record["text"] or ""


def _read_jsonl(path: Path, advance: Callable[[int], object], fault: Callable[[str], None]) -> Iterator[str]:
    chat, told = _jsonl_kind(path) == "chat", 0
    with open_data(path) as (f, tell):
        for number, line in enumerate(f, 1):
            advance(tell() - told)
            told = tell()
            if line.strip():
                try:
                    yield _parse_line(line, chat, f"{path}, line {number}")
                except ValueError as e:
                    fault(str(e))


def _read_parquet(path: Path, advance: Callable[[int], object], fault: Callable[[str], None]) -> Iterator[str]:
    with contextlib.closing(open_shard(path)) as file:
        rows = max(file.metadata.num_rows, 1)
    chat, size, told = shard_kind(path) == "chat", path.stat().st_size, 0
    for row, text in iter_shard(path):
        advance(size * (row + 1) // rows - told)
        told = size * (row + 1) // rows
        try:
            yield json.dumps(conversations.parse(text, f"{path}, row {row}")["messages"]) if chat and text else text
        except ValueError as e:
            fault(str(e))


def _kind(path: Path) -> str:
    return {".txt": lambda _: "text", ".jsonl": _jsonl_kind, ".parquet": shard_kind}[kind_of(path)](path)


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _one_kind(files: list[Path]) -> str:
    """The kind of documents that all `files` hold. Raises ValueError where they differ."""
    first = _kind(files[0])
    for file in files[1:]:
        if _kind(file) != first:
            raise ValueError(f"{files[0]} holds {'conversations' if first == 'chat' else 'text'} and {file} does not: give "
                             "them as two sources, --data 'WEIGHT*FILE,WEIGHT*FILE'")
    return first


def _is_layout(path: Path, chosen: Chosen) -> bool:
    """Whether a folder holds the shards that would be read, and is read alike as it is."""
    names = chosen.train + chosen.val
    if not path.is_dir() or len(names) < 2 or any(kind_of(n) != ".parquet" or "/" in n for n in names):
        return False
    train, val = ([p.name for p in list_shards(path, split)] for split in ("train", "val"))
    return (train, val) == (chosen.train, chosen.val) if chosen.val else train + val == chosen.train


def _prepare_local(path: Path, base_data: Path | None, skip_bad_rows: bool) -> Path:
    """The folder of shards of a local source. base_data: None where nothing can be made, which is then an error."""
    path = user_path(path).resolve()
    chosen = _local_files(path)
    if chosen.left_out:
        print0(left_out_line(path.name, chosen.left_out))
    root = path if path.is_dir() else path.parent
    files = [root / name for name in chosen.train + chosen.val]
    kind = _one_kind(files)
    if _is_layout(path, chosen):  # used where it lies
        return checked(path, list_shards(path, "train") + list_shards(path, "val"), base_data, skip_bad_rows)
    base_data = base_data or get_base_dir() / "base_data"
    stats = [(f.relative_to(root).as_posix(), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    tag = hashlib.blake2b(repr((LAYOUT_VERSION, str(path), stats, chosen.val)).encode(), digest_size=8).hexdigest()
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", path.name).strip(".") or "local"
    folder = base_data / f"{name}-{tag}"
    if folder.is_dir() or not skip_bad_rows:
        return build(folder, lambda tmp: _convert(tmp, path, files, set(files[len(chosen.train):]), kind, False))
    return build(base_data / f"{name}-{tag}-skipped",
                 lambda tmp: _convert(tmp, path, files, set(files[len(chosen.train):]), kind, True))


def _convert(folder: Path, path: Path, files: list[Path], validating: set[Path], kind: str, skip_bad_rows: bool) -> None:
    """
    Writes the documents of `files` into `folder` as shards. Those in `validating` are the validation split; where there are
    none it is cut from all. ValueError for a row that cannot be used, unless these are to be skipped.
    """
    total, faults, seen = sum(f.stat().st_size for f in files), [], [0, 0]

    def fault(text: str) -> None:
        if not skip_bad_rows:
            raise ValueError(f"{text}; {SKIP}")
        faults.append(text if not faults else None)

    def documents() -> Iterator[tuple[bool, str]]:
        faults.clear()
        with progress(total, f"converting {path.name}") as bar:
            for file in files:
                for text in _READERS[kind_of(file)](file, bar.update, fault):
                    text = text.encode("utf-8", "replace").decode()  # a lone surrogate (JSON allows it) is no UTF-8
                    if text.strip():
                        seen[file in validating] += 1
                        yield file in validating, text

    if not validating:
        _cut(folder, path, documents, min(VAL_FRACTION, VAL_CHARS / max(total, 1)), kind)
    else:
        write_layout(folder, documents(), kind)
        if 0 in seen:
            raise ValueError(f"{path} holds no document to {'validate' if seen[0] else 'train'} on, in the files whose "
                             "names say so: add text there")
    if faults:
        print0(f"left out {len(faults):,} rows of {path} that cannot be used; the first is {faults[0]}")


def _cut(folder: Path, path: Path, documents: Callable, fraction: float, kind: str) -> None:
    """Writes the documents, of which about a fraction is the validation split."""
    low, high = 2**64, -1

    def sides(is_val: Callable[[int], bool]) -> Iterator[tuple[bool, str]]:
        nonlocal low, high
        for _, text in documents():
            key = digest(text)
            low, high = min(low, key), max(high, key)
            yield is_val(key), text

    # A document's side follows its content, so equal documents stand on one side and the split needs no memory.
    if 0 not in write_layout(folder, sides(lambda key: key < fraction * 2**64), kind):
        return
    # A handful of documents, all on one side: then the one of smallest digest validates.
    if low >= high:
        raise ValueError(f"{path} holds {'no' if high < 0 else 'only one'} document, but training and validation "
                         f"need one each: add text (above {DOCUMENT_CHARS:,} characters a .txt counts as several)")
    for file in folder.iterdir():
        file.unlink()
    write_layout(folder, sides(lambda key: key == low), kind)


# ---------------------------------------------------------------------------------------------------------------------

def prepare(source: str = EMBEDDED, num_shards: int = DEFAULT_SHARDS, workers: int = DEFAULT_WORKERS,
            base_dir: str | os.PathLike | None = None, skip_bad_rows: bool = False) -> Path:
    """
    The folder of shards for `source`, made under base_dir/base_data (default: the artifacts' folder) if need be; quick
    when it is there. `source` is the word "embedded" (a folder of that name is ./embedded), else an existing path, else
    the name owner/name or owner/name:configuration of a hub dataset, of which `num_shards` training shards and one that
    validates are fetched, `workers` at once; more of them that are there already are used too. skip_bad_rows: leaves out,
    and counts, the rows that cannot be used, such as malformed conversations, which are an error else.
    Raises FileNotFoundError, ValueError, ConnectionError or OSError, in one line with the remedy.
    """
    source = os.fspath(source)
    path = user_path(source) if source != EMBEDDED else None
    try:
        base_data = Path(base_dir or get_base_dir()) / "base_data"
    except (OSError, ValueError):
        if path is None or not path.is_dir():
            raise
        base_data = None  # shards can be used where they lie
    if path is None:
        return _prepare_embedded(base_data)
    if path.exists():
        return _prepare_local(path, base_data, skip_bad_rows)
    if source.startswith((".", "/", "~")) or kind_of(source):
        raise FileNotFoundError(f"no such file or folder: {source}; {OTHER_SOURCES}")
    match = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?::([\w.-]+))?", source)
    if match is None:
        raise ValueError(f"'{source}' is neither an existing path nor a hub dataset owner/name: {OTHER_SOURCES}, or a "
                         f"hub name such as {DEFAULT_HUB}")
    folder = prepare_hub(match[1], num_shards, workers, base_data, match[2])
    if folder.is_file():  # all there is, to train and to validate
        return _prepare_local(folder, base_data, skip_bad_rows)
    return checked(folder, list_shards(folder, "train") + list_shards(folder, "val"), base_data, skip_bad_rows)


def add_skip_arg(parser: argparse.ArgumentParser) -> None:
    """--skip-bad-rows."""
    parser.add_argument("--skip-bad-rows", action="store_true",
                        help="leave out, and count, rows of the data that cannot be used, such as malformed conversations "
                             "(default: the first one is an error, before anything is trained)")


@cli
def main() -> None:
    parser = argparse.ArgumentParser(description="Make the folder of parquet shards that training reads.")
    parser.add_argument("--data", default=EMBEDDED, help=f"'{EMBEDDED}' (default: this Python's standard library), a "
                        f"folder or file of .parquet, .jsonl, .txt, or a hub dataset such as {DEFAULT_HUB}")
    parser.add_argument("--num-shards", type=int, default=DEFAULT_SHARDS,
                        help=f"training shards to fetch from a hub dataset (default {DEFAULT_SHARDS})")
    parser.add_argument("--workers", type=int, default=DEFAULT_WORKERS,
                        help=f"shards fetched at once (default {DEFAULT_WORKERS})")
    add_skip_arg(parser)
    args = parser.parse_args()
    folder = prepare(args.data, args.num_shards, args.workers, skip_bad_rows=args.skip_bad_rows)
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
