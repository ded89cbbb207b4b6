"""
What every module shares: where artifacts live, which device and dtype compute, atomic files, one-line user errors.
This module imports nothing of the package.
"""
import contextlib
import errno
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch


def get_base_dir() -> Path:
    """Folder of all artifacts: $NANOCHAT_BASE_DIR, by default ~/.cache/nanochat. Made if absent."""
    path = Path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat").expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


def get_rank() -> tuple[int, int]:
    """(rank, world size) as torchrun sets them in the environment; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def print0(*args, **kwargs) -> None:
    """print on rank 0 only, flushed, so that a log file is readable while the program runs."""
    if get_rank()[0] == 0:
        print(*args, **kwargs, flush=True)


class Progress:
    """
    Lines of progress with speed and the time that is left, at most one in `every` seconds. `total` counts what `step` is
    told, in `unit`s ('bytes' are shown as GB).
    """
    def __init__(self, what: str, total: float, unit: str = "steps", every: float = 15.0):
        self.what, self.total, self.unit, self.every = what, total, unit, every
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
            print0(f"  {self.what}: {shown}, ETA {(self.total - self.done) / rate:.0f} s" + (f" | {text}" if text else ""))

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
    fault = "torch sees no CUDA device: drop the flag to run on the CPU"
    if has_nvidia_gpu():
        if torch.version.cuda is None:
            fault = (f"this machine has an NVIDIA GPU, but torch {torch.__version__} was built without CUDA: install the "
                     f"CUDA build with `pip install --force-reinstall torch=={torch.__version__.partition('+')[0]}`")
        else:
            fault = (f"this machine has an NVIDIA GPU, but torch {torch.__version__} cannot use it: the driver must support "
                     f"CUDA {torch.version.cuda} (nvidia-smi shows what it supports), so update the driver")
        if requested is None:
            print0(f"warning: running on the CPU, because {fault}")
    if requested == "cuda":
        raise ValueError(f"--device-type cuda cannot be used: {fault}")
    return "cpu"


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
    `path` always holds a whole file: the old one or the new one. A full disk raises OSError that says so.
    """
    path = Path(path)
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
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(e.errno, f"no room left to write {path}; what was there before is untouched: "
                                   "free some disk space and run the same command again") from e
        raise


def fsync_dir(path: str | os.PathLike) -> None:
    """Makes a rename inside the folder `path` survive a power cut."""
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


def cli(main):
    """
    Decorator of a script's main(): what a user can cause (ValueError, OSError, ImportError: their messages say the
    remedy) ends in one line on stderr and exit code 2. NANOCHAT_DEBUG=1 shows the traceback too.
    """
    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except BrokenPipeError:  # the reader of our output went away, as `| head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            sys.exit(130)
        except (ValueError, OSError, ImportError) as e:
            if os.environ.get("NANOCHAT_DEBUG"):
                traceback.print_exc()
            # OSErrors raised here carry their sentence in strerror; those of the system name the file themselves.
            text = e.strerror if isinstance(e, OSError) and e.strerror and not e.filename else str(e)
            print("error: " + " ".join(str(text).split()), file=sys.stderr)
            sys.exit(2)
    return wrapped
