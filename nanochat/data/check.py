"""
Looks through all rows of a folder of shards once, before anything is trained on them, and remembers what it found: a row
that cannot be used would otherwise end a run at the step that meets it, and again at each resume.
"""
import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat import conversations
from nanochat.common import atomic_write, get_base_dir, print0
from nanochat.data.files import arrow_place
from nanochat.shards import COLUMNS, build, first_line, open_shard, progress, shard_kind

VERSION = 1  # of what is remembered: raise it when what counts as a fault changes
REMEMBER_SECONDS = 1.0  # what was looked through sooner than that is not worth a file
SKIP = "or leave such rows out with --skip-bad-rows"


class Faults(NamedTuple):
    """Of one shard: how many rows it has, and those that cannot be used, row -> why."""
    rows: int
    bad: dict[int, str]


def find_faults(shards: list[Path], base_data: Path | None) -> dict[Path, Faults]:
    """
    The faults of each shard, from memory where neither its size nor its time has changed since it was looked through.
    Raises ValueError where one is no shard at all.
    """
    name = hashlib.blake2b(repr(shards[0].parent.resolve()).encode(), digest_size=8).hexdigest()
    memory = None if base_data is None else base_data / "checked" / f"{name}.json"
    known, found = _recall(memory), {}
    stats = {path: [path.stat().st_size, path.stat().st_mtime_ns] for path in shards}
    for path in shards:
        if (entry := known.get(path.name)) and entry["stat"] == stats[path]:
            found[path] = Faults(entry["rows"], {int(row): why for row, why in entry["bad"].items()})
    new = [path for path in shards if path not in found]
    start = time.perf_counter()
    if new:
        with progress(sum(stats[path][0] for path in new), f"checking {shards[0].parent.name}") as bar:
            for path in new:
                found[path] = _look_through(path, bar)
    if new and memory and time.perf_counter() - start >= REMEMBER_SECONDS:
        entries = {path.name: {"stat": stats[path], "rows": found[path].rows, "bad": found[path].bad} for path in shards}
        with contextlib.suppress(OSError), atomic_write(memory, "w") as f:  # on a read-only disk it is done anew each time
            json.dump({"version": VERSION, "shards": entries}, f)
    return found


def _recall(memory: Path | None) -> dict:
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
        known = json.loads(memory.read_text())
        if known.get("version") == VERSION and all(isinstance(e, dict) and {"stat", "rows", "bad"} <= e.keys()
                                                   for e in known["shards"].values()):
            return known["shards"]
    return {}


def _look_through(path: Path, bar) -> Faults:
    kind, bad, row, size = shard_kind(path), {}, 0, path.stat().st_size
    with contextlib.closing(open_shard(path)) as file:
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            try:
                for i, why in _faults_of_group(file, group, kind, row):
                    bad[i] = why
            except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
                bad |= dict.fromkeys(range(row, row + count), f"row group {group} is damaged ({first_line(e)})")
            row += count
            bar.update(size // file.num_row_groups)
    return Faults(row, bad)


def _faults_of_group(file: pq.ParquetFile, group: int, kind: str, row: int) -> Iterator[tuple[int, str]]:
    for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=[COLUMNS[kind]], use_threads=False):
        batch.validate(full=True)  # of UTF-8 too
        for i, messages in enumerate(batch.column(0).to_pylist() if kind == "chat" else (), row):
            try:
                if messages:
                    conversations.check(messages)
            except ValueError as e:
                yield i, str(e)
        row += len(batch)


def checked(folder: Path, shards: list[Path], base_data: Path | None, skip_bad_rows: bool) -> Path:
    """
    `folder`, once no row of its shards has a fault; with skip_bad_rows else a folder of base_data that holds the same shards
    without those rows. ValueError for a row that cannot be used.
    """
    faults = find_faults(shards, base_data)
    bad = {path: found.bad for path, found in faults.items() if found.bad}
    if not bad:
        return folder
    rows, count = sum(found.rows for found in faults.values()), sum(map(len, bad.values()))
    path, reasons = next(iter(bad.items()))
    row = min(reasons)
    first = f"{path}, row {row}: {reasons[row]}"
    if not skip_bad_rows:
        raise ValueError(f"{first} ({count:,} of {rows:,} rows of {folder} cannot be used): mend or replace the "
                         f"file, {SKIP}")
    if count == rows:
        raise ValueError(f"{first}; no row of {folder} can be used: give another source")
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in shards]
    tag = hashlib.blake2b(repr((VERSION, str(folder), stats)).encode(), digest_size=8).hexdigest()

    def write(tmp: Path) -> None:
        for path in shards:
            if path in bad:
                _write_without(path, set(bad[path]), tmp / path.name)
            else:
                _link(path.resolve(), tmp / path.name)
    print0(f"left out {count:,} of {rows:,} rows of {folder} that cannot be used; the first is {first}")
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", folder.name).strip(".") or "local"
    return build((base_data or get_base_dir() / "base_data") / f"{name}-{tag}-skipped", write)


def _write_without(path: Path, bad: set[int], target: Path) -> None:
    """Copies the documents of a shard without the rows in `bad`; a row group in which all are bad is not read."""
    column, row = COLUMNS[shard_kind(path)], 0
    with contextlib.closing(open_shard(path)) as file:
        schema = pa.schema([file.schema_arrow.field(column)])
        with pq.ParquetWriter(arrow_place(target, "wb"), schema, compression="zstd") as out:
            for group in range(file.num_row_groups):
                keep = [r - row for r in range(row, row + file.metadata.row_group(group).num_rows) if r not in bad]
                row += file.metadata.row_group(group).num_rows
                if keep:
                    out.write_table(file.read_row_group(group, columns=[column]).take(keep).cast(schema))


def _link(path: Path, target: Path) -> None:
    for make in (os.symlink, os.link, shutil.copyfile):  # Windows allows few users a link
        with contextlib.suppress(OSError):
            make(path, target)
            return
    raise OSError(f"{path} can be neither linked nor copied to {target.parent}: free some disk space there")
