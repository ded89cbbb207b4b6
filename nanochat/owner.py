"""
Who writes into a folder: one process at a time, which a lock file beside the folder names.

    fractal_checkpoints/.d32_2048.owner     beside d32_2048/, while a command writes there

The lock is the system's (flock), so it ends with its process, however that ends; the file says who holds it since when. A
command that ends by itself removes the file. What a killed one leaves stops nobody: its lock is gone. On a file system
without locks the file's words are all there is: see _is_alive.
"""
import contextlib
import errno
import functools
import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path

from nanochat.common import WINDOWS, get_rank, print0
from nanochat.distributed import everyone

if WINDOWS:
    import msvcrt
else:
    import fcntl

LOCK = ".owner"  # the end of a lock file's name, or the whole of it
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_held: dict[Path, tuple[Path, int, list[Path]]] = {}  # folder -> its lock file, its descriptor, folders made for it


def own(folder: str | os.PathLike) -> Path:
    """
    Makes this process the one that writes into `folder`, until what `gives_back` decorates ends, and returns where the
    folder is, links followed. Of several ranks the first one holds it, and all call together. BlockingIOError on all of
    them, which says who holds it, if another process does. Nothing happens if this one does already.
    """
    folder, fault = Path(os.path.realpath(folder)), None
    if get_rank()[0] == 0 and folder not in _held:
        try:
            _held[folder] = _take(folder)
        except OSError as e:
            fault = e
    fault = everyone(fault)[0]
    if fault is not None:
        raise fault
    return folder


def gives_back(function):
    """Decorator: the folders that the function has come to own are given back when it returns or raises."""
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        before = set(_held)
        try:
            return function(*args, **kwargs)
        finally:
            for folder in _held.keys() - before:
                _release(*_held.pop(folder))
    return wrapped


def lock_of(folder: Path) -> Path:
    """The lock file of a folder: beside it, or in it where nothing may be made beside."""
    beside = folder.parent / f".{folder.name}{LOCK}"
    inside = not beside.exists() and folder.is_dir() and not os.access(folder.parent, os.W_OK)
    return folder / LOCK if inside else beside


def _take(folder: Path) -> tuple[Path, int, list[Path]]:
    path = lock_of(folder)
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locks = _lock(fd)
            if locks is False:
                raise _refusal(folder, _read(fd), path)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(path)):  # else its owner has removed it since it was opened
                    _check_words(folder, path, _read(fd), locks)
                    _write(fd)
                    return path, fd, made
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _lock(fd: int) -> bool | None:
    """True: the lock is ours; False: another process has it; None: the file system has no locks."""
    try:
        if WINDOWS:  # a byte far behind the words, which others can then read
            os.lseek(fd, 1 << 30, os.SEEK_SET)
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in _NO_LOCKS:
            return None
        if e.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            return False
        raise
    return True


def _check_words(folder: Path, path: Path, words: dict, locks: bool | None) -> None:
    """What is left in a lock file whose lock nobody has: said where it may matter, BlockingIOError where it decides."""
    elsewhere = bool(words) and words.get("machine") != _machine()
    if locks is None:
        print0(f"note: the file system of {folder} has no locks: that two commands write there at once is only known by "
               f"what {path} says")
        if elsewhere or _is_alive(words):
            raise _refusal(folder, words, path, unsure=elsewhere)
    elif elsewhere:
        print0(f"note: {_describe(words)} did not say that it ended; its lock on {folder} is gone, so this command goes on")


def _is_alive(words: dict) -> bool:
    """Whether the process that wrote these words, on this machine since it was started, runs still."""
    pid = words.get("pid")
    if type(pid) is not int or pid == os.getpid():
        return False
    if WINDOWS:  # where os.kill would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return words.get("started") == _started(pid)  # else its number has gone to another


def _machine() -> str:
    """This machine since it was started; of a container, that container: process numbers mean something in it."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _started(pid: int) -> str | None:
    """When a process was started, in the kernel's ticks; None where the system does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _write(fd: int) -> None:
    words = {"pid": os.getpid(), "host": platform.node(), "machine": _machine(), "started": _started(os.getpid()),
             "since": time.strftime("%Y-%m-%d %H:%M:%S"), "command": shlex.join(sys.argv)}
    with contextlib.suppress(OSError):  # the lock counts, also on a full disk
        os.ftruncate(fd, 0)
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, json.dumps(words).encode("utf-8", "replace"))


def _read(fd: int) -> dict:
    try:
        os.lseek(fd, 0, os.SEEK_SET)
        words = json.loads(os.read(fd, 1 << 16))
    except (OSError, ValueError, RecursionError):  # taken, but not yet written
        return {}
    return words if isinstance(words, dict) else {}


def _describe(words: dict) -> str:
    if not words:
        return "another process"
    return (f"process {words.get('pid')} on {words.get('host')} (since {words.get('since')}: "
            f"{str(words.get('command'))[:200]})")


def _refusal(folder: Path, words: dict, path: Path, unsure: bool = False) -> BlockingIOError:
    remedy = (f"nobody can tell from here whether it still runs: if it does not, remove {path}" if unsure else
              "wait until it has ended, or stop it, or name another destination")
    return BlockingIOError(errno.EWOULDBLOCK, f"{folder} is being written by {_describe(words)}: {remedy}")


def _release(path: Path, fd: int, made: list[Path]) -> None:
    """
    Removes the file while the lock is held: who opened it meanwhile sees that it is another's no more. Folders that were
    made for it go too if nothing else has come into them.
    """
    with contextlib.suppress(OSError):
        if not WINDOWS:
            os.unlink(path)
    os.close(fd)
    if WINDOWS:
        with contextlib.suppress(OSError):
            os.unlink(path)
    with contextlib.suppress(OSError):
        for parent in made:
            parent.rmdir()
