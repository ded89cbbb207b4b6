"""
Local files of text: which files of a folder are data, and their bytes, decompressed where the name ends in .gz or .zst.
"""
import contextlib
import gzip
import io
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

EXTENSIONS = (".parquet", ".jsonl", ".txt")
PACKED = (".gz", ".zst")  # of .jsonl and .txt
# Texts about the data that lie beside it: README.txt, LICENSE-2.0.txt, requirements.txt, ...
_ABOUT = re.compile(r"(readme|licen[cs]e|copying|notice|authors|contributors|contributing|change(s|log)|citation|manifest"
                    r"|requirements|(md5|sha\d+)(sums?)?|checksums?)([-_.\d].*)?", re.IGNORECASE)


def kind_of(path: str | os.PathLike) -> str | None:
    """.parquet, .jsonl or .txt, what a file holds by its name, packed or not; None for any other."""
    path = Path(path)
    if path.suffix in PACKED:
        path = path.with_suffix("")
        return path.suffix if path.suffix in EXTENSIONS[1:] else None
    return path.suffix if path.suffix in EXTENSIONS else None


def find_data(folder: Path) -> tuple[list[str], dict[str, str]]:
    """
    (names of the data files under `folder`, relative to it and sorted, and of what else lies there: name -> why it is none).
    A text such as README.txt is data only where there is nothing else. What begins with a dot is passed over.
    """
    data, about, others = [], [], {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts) or not path.is_file() or name.as_posix() == "hub.json":
            continue
        kind = kind_of(path)
        if kind is None:
            others[name.as_posix()] = "no data"
        elif kind == ".txt" and _ABOUT.fullmatch(name.name.split(".txt")[0]):
            about.append(name.as_posix())
        else:
            data.append(name.as_posix())
    if not data:
        return about, others
    return data, others | dict.fromkeys(about, "no data")


@contextlib.contextmanager
def open_data(path: Path) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """
    (the file's bytes, decompressed; how many bytes of the file itself were read so far). ValueError where it is
    damaged.
    """
    with open(path, "rb") as raw:
        if path.suffix not in PACKED:
            yield raw, raw.tell
            return
        try:
            if path.suffix == ".gz":
                stream = gzip.GzipFile(fileobj=raw)
            else:
                stream = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw), "zstd"), 1 << 20)
            yield stream, raw.tell
        except (OSError, EOFError, zlib.error, pa.ArrowException) as e:
            raise ValueError(f"{path} is damaged or no {path.suffix} file ({str(e).splitlines()[0]}): unpack it to see, or "
                             "fetch it again") from e


def arrow_place(path: str | os.PathLike, mode: str = "rb"):
    """What pyarrow takes for a path: the path itself, or an open file where its name is not UTF-8, which pyarrow refuses."""
    try:
        os.fspath(path).encode()
        return path
    except UnicodeEncodeError:
        return pa.OSFile(os.fsencode(path), mode)
