"""
What every module shares: where artifacts live, which device and dtype compute, atomic files, one-line user errors.
This module imports nothing of the package.
"""
import contextlib
import errno
import functools
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

WINDOWS = os.name == "nt"  # the one place that knows: what Windows lacks asks here


def user_path(text: str | os.PathLike) -> Path:
    """A path as a user writes it, ~ expanded. ValueError where nobody knows what ~ is: no HOME, no entry for the user."""
    try:
        return Path(text).expanduser()
    except RuntimeError as e:
        raise ValueError(f"{text}: the home folder is unknown ({e}): write the whole path, or set HOME") from e


def get_base_dir() -> Path:
    """
    Folder of all artifacts: $NANOCHAT_BASE_DIR, by default ~/.cache/nanochat. Made if absent. OSError or ValueError where
    that cannot be.
    """
    try:
        path = user_path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat")
        path.mkdir(parents=True, exist_ok=True)
        return path
    except ValueError as e:
        raise ValueError("no folder for artifacts is known: set NANOCHAT_BASE_DIR to one (or HOME)") from e
    except OSError as e:
        raise OSError(e.errno, f"the folder for artifacts, {path}, cannot be made ({e.strerror}): set NANOCHAT_BASE_DIR to "
                               "one that can") from e


def get_rank() -> tuple[int, int]:
    """(rank, world size) as torchrun sets them in the environment; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def print0(*args, **kwargs) -> None:
    """print on rank 0 only, flushed, so that a log file is readable while the program runs."""
    if get_rank()[0] == 0:
        with terminal_may_close():
            print(*args, **kwargs, flush=True)


@contextlib.contextmanager
def terminal_may_close():
    """For what prints: where the terminal was closed or a log has no room left, the text is lost and the program goes on."""
    try:
        yield
    except OSError as e:
        if e.errno == errno.EIO:
            drop_terminal()
        elif not is_full(e):
            raise


def drop_terminal() -> None:
    """Standard output and errors go nowhere from now on, except into a file: writing to a closed terminal is an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for fd in (1, 2):
        with contextlib.suppress(OSError):
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                os.dup2(nowhere, fd)
    os.close(nowhere)


class Progress:
    """
    Lines of progress with speed and the time that is left, at most one in `every` seconds (None: 15 on a terminal, else
    60). `total` counts what `step` is told, in `unit`s ('bytes' are shown as GB).
    """
    def __init__(self, what: str, total: float, unit: str = "steps", every: float | None = None):
        self.what, self.total, self.unit = what, total, unit
        self.every = every if every is not None else 15.0 if sys.stdout.isatty() else 60.0
        self.start = self.said = time.perf_counter()
        self.done = 0

    def step(self, n: float = 1, text: str = "") -> None:
        """n more are done; text: what else to show."""
        self.done += n
        now = time.perf_counter()
        if now - self.said > self.every:
            self.said = now
            rate = self.done / (now - self.start)
            shown = f"{self.done:.0f} of {self.total:.0f} {self.unit}, {rate:.2g}/s"
            if self.unit == "bytes":
                shown = f"{self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB, {rate / 1e6:.0f} MB/s"
            left = max(0.0, self.total - self.done) / rate if rate else float("inf")
            print0(f"  {self.what}: {shown}, ETA {left:.0f} s" + (f" | {text}" if text else ""))

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start


def autodetect_device_type() -> str:
    """'cuda' where there is one, else 'cpu'."""
    return "cuda" if torch.cuda.is_available() else "cpu"


NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")  # Linux: one folder for each GPU that the driver has found


def has_nvidia_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU, whatever torch sees: the driver lists one, or nvidia-smi does."""
    with contextlib.suppress(OSError):
        if any(NVIDIA_GPUS.iterdir()):
            return True
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def find_device_type(requested: str | None) -> str:
    """
    'cuda' or 'cpu': what --device-type requests, or, if None, cuda where torch sees one. ValueError if cuda is requested
    and torch sees none. Prints a warning if the CPU is only the default because torch cannot use the machine's GPU.
    """
    if torch.cuda.is_available() or requested == "cpu":
        return requested or "cuda"
    fault, present = why_no_gpu(), has_nvidia_gpu()
    if requested is None and present:
        print0(f"warning: running on the CPU, because {fault}")
    if requested == "cuda":
        raise ValueError(f"--device-type cuda cannot be used: {fault}" + ": drop the flag to run on the CPU" * (not present))
    return "cpu"


def why_no_gpu() -> str | None:
    """None where torch can use a GPU, else why it cannot, and what helps where something does."""
    if torch.cuda.is_available():
        return None
    if not has_nvidia_gpu():
        return "torch sees no CUDA device"
    if torch.version.cuda is None:
        return (f"this machine has an NVIDIA GPU, but torch {torch.__version__} was built without CUDA: install the CUDA "
                f"build with `pip install --force-reinstall torch=={torch.__version__.partition('+')[0]}`")
    return (f"this machine has an NVIDIA GPU, but torch {torch.__version__} cannot use it: the driver must support CUDA "
            f"{torch.version.cuda} (nvidia-smi shows what it supports), so update the driver")


def has_native_bf16(device_type: str) -> bool:
    """Whether bf16 matrix products run in hardware (elsewhere they are emulated, slower than fp32)."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # AVX512-BF16 or AMX: measured 705 (bf16) against 164 (fp32) GFLOP/s on two EPYC cores.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def get_compute_dtype(device_type: str) -> torch.dtype:
    """
    The dtype of activations and matrix products; master weights stay fp32.
    bf16 where the device has it natively, else fp32; $NANOCHAT_DTYPE (bfloat16, float32) overrides.
    Raises ValueError for any other value of it.
    """
    name = os.environ.get("NANOCHAT_DTYPE")
    if not name:
        return torch.bfloat16 if has_native_bf16(device_type) else torch.float32
    if name not in ("bfloat16", "float32"):
        raise ValueError(f"NANOCHAT_DTYPE={name} is not known; set it to bfloat16 or float32, or unset it")
    return getattr(torch, name)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb"):
    """
    Opens a temporary file beside `path`; on success it is fsynced and renamed onto `path`, on any error removed, so
    `path` always holds a whole file: the old one or the new one. A link stays one: the file is written where it points. A
    full disk raises OSError that says so.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, tmp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(fd, mode) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.chmod(tmp, 0o666 & ~_umask())
        os.replace(tmp, path)
        fsync_dir(path.parent)
    except BaseException as e:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(tmp)
        raise_if_full(e, path)
        raise


def is_full(e: BaseException) -> bool:
    """Whether an error says that a disk, a quota or a limit on file size has no room left."""
    return isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def raise_if_full(e: BaseException, path: Path) -> None:
    """OSError with the remedy, if that was the cause of an error in writing `path`, which is untouched."""
    if is_full(e):
        raise OSError(e.errno, f"no room left to write {path}; what was there before is untouched: free some disk space and "
                               "run the same command again") from e


def existing_folder(path: Path) -> Path:
    """The path, or the nearest folder above it that exists: where its disk can be asked for room."""
    while not path.exists():
        path = path.parent
    return path


def fsync_dir(path: str | os.PathLike) -> None:
    """Makes a rename inside the folder `path` survive a power cut. Windows opens no folder, and needs it less."""
    if WINDOWS:
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@functools.cache
def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def busy_cores(seconds: float = 0.2) -> float | None:
    """
    How many cores other processes keep busy, measured for a moment where the load average hints at it; 0 where it does not,
    None where the system does not say.
    """
    try:
        load = os.getloadavg()[0]
    except (OSError, AttributeError):
        return None
    if load < 0.5:
        return 0.0

    def read() -> tuple[int, int]:
        numbers = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return sum(numbers), numbers[3] + numbers[4]  # all, idle or waiting for a disk
    try:
        before = read()
        time.sleep(seconds)
        total, idle = (b - a for a, b in zip(before, read()))
    except (OSError, ValueError, IndexError):
        return load  # no /proc: the mean of the last minute is all there is
    return (os.cpu_count() or 1) * (1 - idle / total) if total else load


def note_if_busy(threads: int) -> None:
    """
    Prints a line where other processes leave fewer cores than this one has threads: threads wait for each other at every
    step, and two beside one busy process have trained at a thirtieth of one thread's speed.
    """
    cores, busy = os.cpu_count() or 1, busy_cores() if threads > 1 else 0
    if busy and busy + threads > cores + 0.5:
        print0(f"note: other processes keep {busy:.1f} of {cores} cores busy, and {threads} threads that wait for "
               "each other can then be many times slower than fewer: try "
               f"OMP_NUM_THREADS={max(1, int(cores - busy))}")


_ROOT = Path(__file__).resolve().parent.parent  # of the package and its scripts


def _is_foreseen(e: BaseException) -> bool:
    """
    Whether an error's own message says what a user can do: OSErrors and ImportErrors, and ValueErrors that the package
    raises itself (one from inside a library knows nothing of our flags).
    """
    if isinstance(e, (OSError, ImportError)):
        return True
    if not isinstance(e, ValueError) or isinstance(e, UnicodeError):
        return False
    frames = traceback.extract_tb(e.__traceback__)
    return not frames or _ROOT in Path(frames[-1].filename).parents


def _is_out_of_memory(e: BaseException) -> bool:
    return isinstance(e, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(e, RuntimeError) and any(words in str(e) for words in (
            "can't allocate memory", "out of memory", "Storage size calculation overflowed",
            "numel: integer multiplication")))


def _is_out_of_range(e: BaseException) -> bool:
    """Whether a number was too large for a C integer: torch raises that as a ValueError at our call."""
    return isinstance(e, OverflowError) or "Overflow when unpacking" in str(e)


def _logs_dir() -> Path:
    """The artifacts' logs folder. Made if absent."""
    path = get_base_dir() / "logs"
    path.mkdir(exist_ok=True)
    return path


def _keep_traceback(e: BaseException) -> str:
    """Writes the traceback to a file, in the artifacts' logs folder or else the temporary one; says where."""
    name = f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    text = f"{' '.join(sys.argv)}\nPython {sys.version}\ntorch {torch.__version__}, {sys.platform}\n\n"
    text += "".join(traceback.format_exception(e))
    for folder in (_logs_dir, lambda: Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError, ValueError):
            path = folder() / name
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
            return f"the file {path}, which holds the traceback"
    return "what NANOCHAT_DEBUG=1 prints (no file could be written)"


def describe_error(e: BaseException) -> str:
    """One line on an error: its own where that says the remedy, else a request to report it that names a file."""
    if _is_foreseen(e) and not _is_out_of_range(e):
        # OSErrors raised here carry their sentence in strerror; those of the system name the file themselves.
        text = e.strerror if isinstance(e, OSError) and e.strerror and not e.filename else str(e)
    else:
        text = (str(e).strip().splitlines() or [""])[0][:300]
        if _is_out_of_memory(e):
            text = (f"out of memory ({text}): make it smaller, as by a lower --device-batch-size, a shorter context, or "
                    "--gradient-checkpointing in training")
        elif _is_out_of_range(e):
            text = f"a number is out of range ({text}): give a smaller one"
        else:
            text = f"unexpected {type(e).__name__}: {text} -- please report it with {_keep_traceback(e)}"
    return "error: " + " ".join(str(text).split())


def cli(main):
    """
    Decorator of a script's main(): every error ends in one line on stderr and exit code 2, see describe_error.
    NANOCHAT_DEBUG=1 shows the traceback too. What the terminal's encoding lacks is printed as \\x.. and stops nothing.
    """
    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            return main(*args, **kwargs)
        except BrokenPipeError:  # the reader of our output went away, as `| head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            sys.exit(130)
        except SystemExit:
            raise
        except BaseException as e:  # Rust's PanicException is no Exception
            if os.environ.get("NANOCHAT_DEBUG"):
                traceback.print_exc()
            print(describe_error(e), file=sys.stderr)
            sys.exit(2)
    return wrapped
