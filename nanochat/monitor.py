"""
How a training run is watched: a line per interval, a bar on a terminal, metrics.jsonl always, curves.png, wandb on demand.
Only rank 0 does any of it.
"""
import contextlib
import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows has none
    resource = None

from nanochat.common import atomic_write, get_rank, print0, terminal_may_close

# Dense bf16 peak FLOP/s by a part of the device's name, from the vendor's data sheets.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12,
              "4090": 165e12, "A10": 125e12}
LOG_SECONDS = 60.0  # off a terminal, between the lines of two steps


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU, in FLOP/s, by its name; None for one that PEAK_FLOPS does not know."""
    return next((v for k, v in PEAK_FLOPS.items() if k in device_name), None)


class Monitor:
    """
    Of one run in `folder`, steps `start` to `total`, of `tokens` each. wandb_run: its name there, or None; settings: what
    wandb shows of it.
    """
    def __init__(self, folder: Path, start: int, total: int, device: torch.device, tokens: int, wandb_run: str | None,
                 settings: dict):
        self.folder, self.total, self.device, self.tokens = Path(folder), total, device, tokens
        self.times, self.wandb, self.bar, self.log = [], None, None, None
        self.said = -math.inf  # when the last step was printed
        self.peak = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
        if get_rank()[0]:
            return
        if wandb_run:
            self.wandb = _start_wandb(wandb_run, settings)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = open(self.folder / "metrics.jsonl", "a+b", buffering=0)
        # an interrupted run may have left half a line
        self.half = bool(self.log.tell()) and (self.log.seek(-1, os.SEEK_END), self.log.read(1))[1] != b"\n"
        self.failed = set()  # files that could not be written, each said once
        if sys.stderr.isatty():
            from tqdm import tqdm
            self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, leave=False)

    def record(self, entry: dict) -> None:
        """One line of metrics.jsonl."""
        if self.log is not None:
            line = b"\n" * self.half + json.dumps(entry).encode() + b"\n"
            with self._optional("metrics.jsonl"):
                self.half = True
                self.half = self.log.write(line) < len(line)
        if self.wandb:
            self.wandb.log(entry, step=entry["step"])  # its own count would be that of the calls

    def say(self, text: str) -> None:
        if self.bar is not None:
            with terminal_may_close():
                self.bar.write(text)
        else:
            print0(text)

    @contextlib.contextmanager
    def _optional(self, name: str):
        """For a file without which a run goes on: that it cannot be written (a full disk) is said once."""
        try:
            yield
        except OSError as e:
            if name not in self.failed:
                self.failed.add(name)
                self.say(f"warning: {self.folder / name} cannot be written ({os.strerror(e.errno)}): the run goes on")

    def step(self, step: int, seconds: float, values: dict[str, float], lr: float, norm: float, flops: float,
             show: bool) -> None:
        """A step was made. values: its losses; flops: of all ranks."""
        self.times.append(seconds)
        if self.bar is not None:
            with terminal_may_close():
                self.bar.update()
        if not show:
            return
        recent = statistics.median(self.times[-20:])
        rate = self.tokens / recent
        mfu = flops / recent / self.peak / get_rank()[1] if self.peak and flops else None
        gpu = torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else None
        memory = peak_rss_mb() / 1e3 if gpu is None else gpu
        # a log file gets a line a minute, with the first and the last step; metrics.jsonl has all
        now = time.perf_counter()
        if self.bar is not None or now - self.said >= LOG_SECONDS or step == self.total - 1:
            self.said = now
            self.say(f"step {step:5d}/{self.total} | " + " | ".join(f"{k} {v:.4f}" for k, v in values.items())
                     + f" | lr x{lr:.2f} | grad {norm:.3g} | {rate:,.0f} tok/s" + (f" | MFU {mfu:.1%}" if mfu else "")
                     + f" | {memory:.1f} GB | ETA {_clock(recent * (self.total - step - 1))}")
        self.record({"step": step, **values, "lr_scale": lr, "grad_norm": norm, "tok_per_s": rate,
                     "peak_rss_mb": peak_rss_mb(), **({"mfu": mfu} if mfu else {}),
                     **({"peak_gpu_gb": gpu} if gpu is not None else {})})

    @property
    def tok_per_s(self) -> float | None:
        return round(self.tokens / statistics.median(self.times), 1) if self.times else None

    def draw(self) -> None:
        """Writes curves.png from metrics.jsonl."""
        if self.log is not None:
            with self._optional("curves.png"):
                draw_curves(self.folder)

    def close(self) -> None:
        if self.bar is not None:
            with terminal_may_close():
                self.bar.close()
        if self.log is not None:
            self.log.close()
        if self.wandb:
            self.wandb.finish()


def read_metrics(folder: Path) -> list[dict]:
    """The entries of metrics.jsonl in order; a step that was repeated behind an interruption counts once, as repeated."""
    entries = {}
    for line in (Path(folder) / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):  # half a line, where the run was killed
            entry = json.loads(line)
            entries[entry["step"], "val_bpb" in entry] = entry
    return [entry for _, entry in sorted(entries.items())]


def draw_curves(folder: Path) -> None:
    """curves.png: training losses, validation bits per byte, gradient norm with rate, and speed, over the steps."""
    if "MPLCONFIGDIR" not in os.environ and not _has_home():  # else it says so on every run
        os.environ["MPLCONFIGDIR"] = tempfile.mkdtemp(prefix="matplotlib-")
    import matplotlib  # takes a second to import, and most processes draw nothing
    matplotlib.use("Agg")  # no display is needed
    import matplotlib.pyplot as plt
    entries = read_metrics(folder)
    train, val = ([e for e in entries if key in e] for key in ("tok_per_s", "val_bpb"))
    apart = {"step", "lr_scale", "grad_norm", "tok_per_s", "peak_rss_mb", "peak_gpu_gb", "mfu"}
    fig, axes = plt.subplots(2, 2, figsize=(11, 7))
    panels = (("training losses, nats", train, sorted({k for e in train for k in e} - apart)),
              ("validation, bits per byte", val, sorted({k for e in val for k in e} - {"step"})),
              ("gradient norm and rate", train, ["grad_norm", "lr_scale"]), ("tokens per second", train, ["tok_per_s"]))
    for ax, (title, some, keys) in zip(axes.flat, panels):
        for key in keys:
            points = [(e["step"], e[key]) for e in some if key in e]
            ax.plot([x for x, _ in points], [y for _, y in points], "-", marker="." if len(points) < 50 else None,
                    label=key.removeprefix("val_"))
        ax.set(title=title, xlabel="step")
        if keys:
            ax.legend(fontsize=7)
    axes[1, 0].set_yscale("symlog", linthresh=1e-3)
    fig.tight_layout()
    with atomic_write(Path(folder) / "curves.png") as f:
        fig.savefig(f, format="png", dpi=90)
    plt.close(fig)


def _has_home() -> bool:
    """Whether there is a home folder that can be written."""
    try:
        return os.access(Path.home(), os.W_OK)
    except RuntimeError:
        return False


def peak_rss_mb() -> float:
    """The most memory that this process has had resident, in MB; 0 where the system does not say."""
    if resource is None:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def timer(device: torch.device) -> float:
    """Seconds, once all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _clock(seconds: float) -> str:
    m, s = divmod(int(seconds), 60)
    return f"{m // 60}:{m % 60:02d}:{s:02d}" if m >= 60 else f"{m}:{s:02d}"


def _start_wandb(name: str, settings: dict):
    import wandb  # takes seconds to import, and most runs do not want it
    try:
        return wandb.init(project="nanochat", name=name, config=settings)
    except Exception as e:  # its own exception classes vary between versions
        raise ConnectionError(f"wandb could not start ({e}): set WANDB_MODE=offline, or leave --run away") from e
