"""
Builds csrc/decode.cpp, once per machine and version of the source, and loads it. Where that cannot be done the callers
run their PyTorch forms instead, and one printed line says so.

The library is kept under get_base_dir()/native. Its name holds a hash of all that it was made from (source, compiler,
flags, CPU) and one of its own content, so that a stale or damaged file is never loaded but built anew, and a rename makes
it visible only when it is whole, whoever else is building it at the same time.
"""
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch  # noqa: F401  (its OpenMP runtime must be loaded before ours is looked up)

from nanochat.common import get_base_dir, print0

SOURCE = Path(__file__).parent / "csrc" / "decode.cpp"  # and the headers beside it
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC", "-Wno-psabi")
TIMEOUT = 300  # seconds; it takes about ten


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled operators, or None where they cannot be had; the reason is printed then."""
    try:
        compiler = shutil.which(os.environ.get("CXX", "g++"))
        if compiler is None:
            raise OSError(f"there is no C++ compiler {os.environ.get('CXX', 'g++')} (CXX names another)")
        return _load(compiler)
    except (OSError, subprocess.SubprocessError) as e:
        output = getattr(e, "stderr", None) or str(e)
        reason = next((line for line in output.splitlines() if "error" in line), " ".join(output.split()))
        print0(f"CPU decoding runs its PyTorch form, which is slower: {reason}", file=sys.stderr)
        return None


def _load(compiler: str) -> ctypes.CDLL:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=TIMEOUT).stdout
    sources = [path.read_text() for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h")))]
    made_from = "\0".join([*sources, version, *FLAGS, _cpu()])
    key, folder = _hash(made_from.encode()), _kept()
    for path in folder.glob(f"decode-{key}-*.so") if folder else ():
        if path.stem.rpartition("-")[2] == _hash(path.read_bytes()):
            return ctypes.CDLL(str(path))
        path.unlink(missing_ok=True)
    print0("compiling the operators of CPU decoding" + (", which are kept for the next time" if folder else "")
           + " (about 10 s)", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=folder) as tmp:
        parts = [str(Path(tmp) / name) for name in ("decode.o", "decode.so")]
        runtime = _openmp_runtime()
        for command in ([compiler, *FLAGS, "-c", str(SOURCE), "-o", parts[0]],
                        [compiler, "-shared", parts[0], *([runtime] if runtime else ["-fopenmp"]), "-o", parts[1]]):
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT)
        if folder is None:
            return ctypes.CDLL(parts[1])  # what is loaded needs its file no more
        path = folder / f"decode-{key}-{_hash(Path(parts[1]).read_bytes())}.so"
        os.replace(parts[1], path)
    return ctypes.CDLL(str(path))


def _kept() -> Path | None:
    """Where compiled operators are kept; None where nothing can be: on a read-only disk, without a home folder."""
    try:
        folder = get_base_dir() / "native"
        folder.mkdir(exist_ok=True)
    except (OSError, ValueError):
        return None
    return folder if os.access(folder, os.W_OK) else None


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))


def _openmp_runtime() -> str | None:
    """
    The GNU OpenMP library that torch has loaded. A second one in the process would have its own threads, and the idle
    ones of either would spin on the cores that the other's need.
    """
    try:
        paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    except OSError:
        return None
    return min(paths, default=None)
