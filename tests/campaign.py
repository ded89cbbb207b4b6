r"""
Ends training, surgery and export in every way at random moments, and asserts that the same command then completes them.

    python -m tests.campaign --minutes 120 --seed 1 --folder ~/campaign
    python -m tests.campaign --soak-tokens 1000000

A trial runs one command on a tiny model, in 1 to 3 processes, with one to three faults in a row: kill -9 of one process or
all, signals as a scheduler sends them (twice, to all), a full disk (a small file system of its own where this user may mount
one, else a limit on file size), damaged checkpoints, jumps of the clock, the same command started twice. Then the command
runs once more without a fault, and must end in the same bits as one that nothing interrupted; with another number of
processes it must complete, read no row twice, and end within 1e-3 of its loss. A trial that does not is kept, with its logs.
"""
import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import ranks
import torch
from conftest import randomize

from nanochat import checkpoint_manager as ckpt
from nanochat import step_checkpoint, training
from nanochat.dataloader import DataLoader
from nanochat.tokenizer import Tokenizer
from scripts import fractal_train, surgery

FAULTS = ("kill one", "kill all", "signals", "full disk", "damage", "clock", "twice")
STEPS, ROWS, T = 9, 12, 32
LOSS = 1e-3  # relative, of the last validation, between numbers of processes
SECONDS = 1200  # for one attempt, also on a busy machine; a longer one counts as hanging


# ---------------------------------------------------------------------------------------------------------------------
# The commands, as the processes run them

def make_home(home: Path) -> None:
    """A corpus and a tiny hybrid."""
    (home / "docs").mkdir(parents=True)
    text = "".join(f"Line {i}: {'abcdefgh'[i % 8] * (i % 5)} is {i * i}, said {['Ann', 'Bob', 'Cy'][i % 3]}.\n"
                   for i in range(4000))
    for i in range(40):
        (home / "docs" / f"{i}.txt").write_text(text[i * 1000:(i + 1) * 1000])
    tokenizer = Tokenizer.train_from_iterator([text[:50000]], 300)
    config = replace(ranks.TINY, vocab_size=300)
    ckpt.save_export(home / "hybrid_checkpoints" / "t_32", randomize(ckpt.build_model(config)), tokenizer, {"tag": "t"})


def training_flags(home: Path, base: Path, world: int) -> list[str]:
    """At a third of the rate: other numbers of processes read other rows, whose noise alone would be 1.3e-3 of the loss."""
    return ["--checkpoint", str(base / "hybrid_checkpoints/t_32"), "--data", str(home / "docs"), "--matryoshka",
            "--sample-dim", "--lr-scale", "0.3", "--device-batch-size", str(ROWS // world), "--total-batch-size",
            str(ROWS * T), "--eval-tokens", "768", "--eval-every", "3", "--save-every", "2", "--num-iterations",
            str(STEPS), "--log-every", "1"]


def command(kind: str, home: Path, base: Path, world: int, rows: Path | None, jump: float, fresh: bool) -> None:
    """One rank of a command. rows: a file that gets the digest of every row read; jump: seconds that the clock jumps by."""
    if rows is not None:
        training.DataLoader = noting(rows.with_name(f"{rows.name}.{os.environ['RANK']}"))
    if jump:
        threading.Thread(target=turn_clock, args=(jump,), daemon=True).start()
    if kind == "surgery":
        surgery.main(["--expand-from=32", "--new-dim=48", "--tag", "t"])
    else:
        fractal_train.main(training_flags(home, base, world) + ["--export"] * (kind == "export") + ["--fresh"] * fresh)


def noting(path: Path):
    """The loader, which writes the digests of each training batch's rows as one line."""
    class Noting(DataLoader):
        def __next__(self):
            x, y = super().__next__()
            if self.split == "train":
                with open(path, "a") as f:
                    f.write(" ".join(hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16] for row in x) + "\n")
            return x, y
    return Noting


def turn_clock(jump: float) -> None:
    real = time.time
    time.sleep(random.random())
    time.time = lambda: real() + jump


def content(path: Path):
    """A file's tensors, numbers and words, nested, as one digest each; without what depends on speed or place."""
    if path.suffix == ".pt":
        return digest(torch.load(path, weights_only=True))
    info = json.loads(path.read_text())
    figures = {k: v for k, v in info.get("figures", {}).items() if k != "tok_per_s"}
    kept = {k: v for k, v in info.items() if k not in ("written", "figures", "provenance")}
    return digest(kept | {"figures": figures})


def digest(obj) -> str:
    h = hashlib.sha256()

    def add(o):
        if isinstance(o, torch.Tensor):
            h.update(f"{o.dtype} {tuple(o.shape)}".encode() + o.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(o, dict):
            for k in sorted(o, key=str):
                h.update(f"{k}:".encode())
                add(o[k])
        elif isinstance(o, (list, tuple)):
            for i in o:
                add(i)
        else:
            h.update(repr(o).encode())
        h.update(b";")
    add(obj)
    return h.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Disks

class Disk:
    """
    A folder whose disk can be filled: a small file system where this user may mount one, else limits on file size. Surgery
    begins only where 100 MB are free.
    """
    def __init__(self, folder: Path, megabytes: int = 160):
        self.folder = folder
        folder.mkdir(parents=True)
        libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
        self.mounted = libc is not None and os.geteuid() == 0 and libc.mount(
            b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={megabytes}m".encode()) == 0
        self.libc = libc

    def fill(self, pids: list[int], left: int) -> None:
        """Leaves so many bytes."""
        if not self.mounted:
            return limit_size(pids, left)
        free = shutil.disk_usage(self.folder).free
        with contextlib.suppress(OSError), open(self.folder / "filler", "wb") as f:
            os.posix_fallocate(f.fileno(), 0, max(1, free - left))

    def free(self, pids: list[int]) -> None:
        if self.mounted:
            (self.folder / "filler").unlink(missing_ok=True)
        else:
            limit_size(pids, resource.RLIM_INFINITY)

    def close(self, keep: Path | None = None) -> None:
        """Removes it all, or moves it to `keep`."""
        if keep is not None:
            shutil.copytree(self.folder, keep, symlinks=True)
        if self.mounted:
            self.libc.umount2(os.fsencode(self.folder), 2)
        shutil.rmtree(self.folder, ignore_errors=True)


def mount_for_this_process_only() -> None:
    """What is mounted from now on is gone when this process and those that it starts have ended, also by kill -9."""
    if sys.platform == "linux" and os.geteuid() == 0:
        libc = ctypes.CDLL(None)
        if libc.unshare(0x00020000) == 0:  # CLONE_NEWNS
            libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None)  # MS_REC | MS_PRIVATE


def limit_size(pids: list[int], size: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


# ---------------------------------------------------------------------------------------------------------------------
# One trial

class Wrong(Exception):
    """A trial that did not end as it must."""


class Trial:
    """
    One command in a base folder of its own. references: what undisturbed commands made, by kind and number of processes;
    counts: of faults and of how they ended, over all trials.
    """
    def __init__(self, seed: int, folder: Path, home: Path, references: dict, counts: Counter):
        self.rng = random.Random(seed)
        self.folder, self.home, self.references, self.counts = folder, home, references, counts
        self.logs, self.base, self.attempts = folder / "logs", folder / "disk" / "base", 0
        self.kind = self.rng.choice(["train"] * 6 + ["surgery"] * 2 + ["export"])
        self.world = 1 if self.kind == "surgery" else self.rng.choice((1, 1, 2, 2, 3))
        self.disk = Disk(folder / "disk")
        shutil.copytree(home / "hybrid_checkpoints", self.base / "hybrid_checkpoints")
        self.told, self.seconds = [f"{self.kind} on {self.world}"], None

    @property
    def out(self) -> Path:
        return self.base / ("hybrid_checkpoints/t_48" if self.kind == "surgery" else "fractal_checkpoints/t_32")

    def start(self, kind=None, world=None, jump=0.0, fresh=False):
        """Starts the command; (processes, their log's folder)."""
        self.attempts += 1
        world, log = world or self.world, self.logs / f"{self.attempts}"
        env = {"NANOCHAT_BASE_DIR": str(self.base), "NANOCHAT_DTYPE": "float32"}
        rows = log / "rows" if (kind or self.kind) == "train" else None
        return ranks.start(world, command, kind or self.kind, self.home, self.base, world, rows, jump, fresh,
                           out=log, env=env.items()), log

    def finish(self, started) -> tuple[list[int], str]:
        """
        (exit codes, what the first rank printed). As torchrun does, it ends the others a while after one has failed. Wrong
        for processes that hang.
        """
        processes, log = started
        end, failed = time.monotonic() + SECONDS, False
        while alive := [p for p in processes if p.is_alive()]:
            if not failed and any(p.exitcode for p in processes):
                failed, end = True, time.monotonic() + 20
            if time.monotonic() > end:
                self.kill(alive)
                if not failed:
                    raise Wrong(f"attempt {self.attempts} hangs")
            time.sleep(0.02)
        return [p.exitcode for p in processes], (log / "0.log").read_text(errors="replace")

    def settle(self, world=None) -> str:
        """The command without a fault, which must succeed, at the latest with --fresh once nothing whole is left."""
        codes, log = self.finish(self.start(world=world))
        if set(codes) == {2} and "no checkpoint is left to go on from" in log:
            self.counts["refused in a line: only damaged checkpoints"] += 1
            codes, log = self.finish(self.start(world=world, fresh=True))
        if set(codes) == {0}:
            return log
        raise Wrong(f"the same command again ends with {codes}: {log[-1500:]}")

    def run(self) -> None:
        if self.kind == "export":
            self.prepare_export()
        for _ in range(self.rng.choice((1, 1, 2, 3))):
            fault = self.rng.choice([f for f in FAULTS if self.kind == "train" or f not in ("damage", "signals")])
            self.told.append(fault)
            getattr(self, fault.replace(" ", "_"))()
            self.counts[fault] += 1
        other = self.rng.choice([w for w in (1, 2, 3) if w != self.world]) if self.kind == "train" \
            and self.rng.random() < 0.3 else None
        if other is None:
            self.settle()
            self.compare()
        else:
            self.told.append(f"then on {other}")
            self.settle(world=other)
            self.compare_loosely()

    def prepare_export(self) -> None:
        """An interrupted training, and what its undisturbed export gives."""
        started = self.start("train")
        while not step_checkpoint.steps(self.out) and any(p.is_alive() for p in started[0]):
            time.sleep(0.02)
        self.kill(started[0])
        kept = self.folder / "kept"
        shutil.copytree(self.out, kept)
        begun = time.perf_counter()
        self.settle()
        self.seconds = time.perf_counter() - begun
        self.references["export", id(self)] = self.made()
        shutil.rmtree(self.out)
        shutil.copytree(kept, self.out)

    def made(self) -> dict:
        return {name: content(self.out / name) for name in ("model.pt", "optim.pt", "config.json")
                if (self.out / name).is_file()}

    def reference(self) -> dict:
        key = ("export", id(self)) if self.kind == "export" else (self.kind, self.world)
        return self.references[key]

    def compare(self) -> None:
        if (made := self.made()) != (want := self.reference()):
            raise Wrong(f"{[k for k in want if made.get(k) != want[k]]} differ from those of an undisturbed run")
        left = [p.name for p in (*self.out.parent.glob(".*"), *self.out.glob(".*"))]
        if left:
            raise Wrong(f"{left} are left")
        self.counts["same bits as an undisturbed run"] += 1

    def compare_loosely(self) -> None:
        """After a change of the number of processes: complete, no row twice, nearly the same loss."""
        figures = json.loads((self.out / "config.json").read_text())["figures"]
        want = json.loads((self.folder.parent / f"train_{self.world}.json").read_text())["figures"]
        if abs(figures["bpb"] / want["bpb"] - 1) > LOSS:
            raise Wrong(f"ends at {figures['bpb']} bits per byte, an undisturbed run at {want['bpb']}")
        rows = Counter(self.rows_that_count())
        if twice := [row for row, n in rows.items() if n > 1]:
            raise Wrong(f"{len(twice)} of {len(rows)} rows were read twice")
        self.counts["another number of processes"] += 1

    def rows_that_count(self):
        """The rows of the steps that the final model has made: of each attempt those up to where the next one resumed."""
        attempts = [(log, self.resumed_at(log)) for log in sorted(self.logs.iterdir(), key=lambda p: int(p.name))
                    if list(log.glob("rows.*"))]
        end = STEPS
        for log, start in reversed(attempts):
            for path in log.glob("rows.*"):
                for line in path.read_text().splitlines()[:max(0, end - start)]:
                    yield from line.split()
            end = min(end, start)

    @staticmethod
    def resumed_at(log: Path) -> int:
        found = re.search(r"resuming .* after step (\d+)", (log / "0.log").read_text(errors="replace"))
        return int(found[1]) if found else 0

    # --- faults

    def moment(self) -> float:
        """Seconds to wait: the fault comes while the command runs, or now and then just after its end."""
        return self.rng.uniform(0, 1) * (self.seconds or self.references["seconds", self.kind, self.world])

    def kill(self, processes) -> None:
        for p in processes:
            if p.is_alive():
                os.kill(p.pid, signal.SIGKILL)
        for p in processes:
            p.join()

    def kill_all(self) -> None:
        started = self.start()
        time.sleep(self.moment())
        self.kill(started[0])
        self.counts["kills while it ran"] += any(p.exitcode == -signal.SIGKILL for p in started[0])

    def kill_one(self) -> None:
        started = self.start()
        time.sleep(self.moment())
        victim = self.rng.choice(started[0])
        self.kill([victim])
        self.counts["kills while it ran"] += victim.exitcode == -signal.SIGKILL
        self.finish(started)

    def signals(self) -> None:
        """To all, and once more a moment later, as torchrun passes on what it gets."""
        started, number = self.start(), self.rng.choice((signal.SIGTERM, signal.SIGHUP, signal.SIGINT))
        time.sleep(self.moment())
        for _ in range(2):
            for p in started[0]:
                if p.is_alive():
                    os.kill(p.pid, number)
            time.sleep(self.rng.uniform(0, 0.05))
        codes, log = self.finish(started)
        if f"stopped by {number.name}: step " in log and set(codes) == {128 + number}:
            self.counts["saved by a signal"] += 1

    def full_disk(self) -> None:
        """Full from one moment on, and at times free again at another; in vain or not, it ends in a line or not at all."""
        started = self.start()
        pids = [p.pid for p in started[0]]
        time.sleep(self.moment())
        self.disk.fill(pids, self.rng.choice((0, 4_000, 100_000, 300_000)))
        if self.rng.random() < 0.5:
            time.sleep(self.moment())
            self.disk.free(pids)
        codes, log = self.finish(started)
        self.disk.free([])
        if set(codes) == {0}:
            self.counts["outlived a full disk"] += 1
        elif codes[0] == 2 and any(words in log for words in ("no room left", "No space left", "of disk are free")):
            self.counts["ended in a line: full disk"] += 1
        else:
            raise Wrong(f"a full disk ends with {codes}: {log[-1500:]}")

    def damage(self) -> None:
        """Of one or two files of the checkpoints, once an attempt was killed."""
        self.kill_all()
        files = [p for p in self.base.glob("fractal_checkpoints/t_32/step_*/*") if p.is_file()]
        for path in self.rng.sample(files, min(len(files), self.rng.choice((1, 2)))):
            data = bytearray(path.read_bytes())
            if self.rng.random() < 0.5:
                data = data[:self.rng.randrange(len(data) + 1)]
            elif data:
                data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
            path.write_bytes(data)
            self.counts["damaged files"] += 1

    def clock(self) -> None:
        """The clock jumps while an attempt runs, which is then killed; what it wrote is from the past or the future."""
        jump = self.rng.uniform(-1, 1) * 3e8
        started = self.start(jump=jump)
        time.sleep(self.moment())
        self.kill(started[0])
        for path in self.base.rglob("*"):
            with contextlib.suppress(OSError):
                os.utime(path, (time.time() + jump,) * 2)

    def twice(self) -> None:
        """Started again while it runs: one completes, the other is refused, or found that the first had ended already."""
        first = self.start()
        time.sleep(self.moment())
        second = self.start()
        ended = [self.finish(first), self.finish(second)]
        refused = [set(codes) == {2} and "is being written by process" in log for codes, log in ended]
        done = [set(codes) == {0} for codes, _ in ended]
        if not all(r or d for r, d in zip(refused, done)) or not any(done):
            raise Wrong(f"two at once end with {[codes for codes, _ in ended]}: {[log[-1000:] for _, log in ended]}")
        self.counts["refused while another wrote" if any(refused) else "the first had ended already"] += 1


# ---------------------------------------------------------------------------------------------------------------------
# The campaign

def make_references(folder: Path, home: Path) -> dict:
    """What each command makes and how long it takes when nothing disturbs it."""
    references = {}
    ranks.finish(ranks.start(1, print, "ready", out=folder / "ready"))  # what is imported once is in no command's time
    for kind, world in (("surgery", 1), ("train", 1), ("train", 2), ("train", 3)):
        trial = Trial(0, folder / f"reference_{kind}_{world}", home, references, Counter())
        trial.kind, trial.world = kind, world
        begun = time.perf_counter()
        trial.settle()
        references["seconds", kind, world] = time.perf_counter() - begun
        references[kind, world] = trial.made()
        if kind == "train":
            shutil.copy(trial.out / "config.json", folder / f"train_{world}.json")
        trial.disk.close()
    return references


def campaign(minutes: float, seed: int, folder: Path) -> dict:
    """Trials for so many minutes; the figures, with what went wrong under 'wrong'."""
    begun, counts, wrong, trials = time.monotonic(), Counter(), [], 0
    folder.mkdir(parents=True, exist_ok=True)
    home = folder / "home"
    if not home.is_dir():
        make_home(home)
    references, said = make_references(folder, home), time.monotonic()
    while time.monotonic() - begun < 60 * minutes:
        number = 1_000_003 * seed + trials
        trial = Trial(number, folder / f"trial_{number}", home, references, counts)
        keep = None
        try:
            trial.run()
        except Wrong as e:
            wrong.append(f"seed {number}: {', '.join(trial.told)}: {e}")
            print(f"WRONG {wrong[-1]}", flush=True)
            keep = folder / f"wrong_{number}"
        finally:
            references.pop(("export", id(trial)), None)
            trial.disk.close(keep)
            if keep is None:
                shutil.rmtree(trial.folder, ignore_errors=True)
        trials += 1
        if time.monotonic() - said > 60:
            said = time.monotonic()
            print(f"  {(said - begun) / 60:.0f} min: {trials} trials, {sum(counts[f] for f in FAULTS)} faults, "
                f"{len(wrong)} wrong", flush=True)
    return {"minutes": round((time.monotonic() - begun) / 60, 1), "seed": seed, "trials": trials,
            "survived": trials - len(wrong), "faults": {f: counts[f] for f in FAULTS},
            "outcomes": {k: n for k, n in sorted(counts.items()) if k not in FAULTS}, "wrong": wrong}


def soak(tokens: int) -> dict:
    """Decodes so many tokens of a tiny hybrid, and how the memory in use grew after the first tenth of them, in MB."""
    from nanochat.engine import Compute, Engine
    tokenizer = Tokenizer.train_from_iterator(["Line of text, and a few more words to merge. " * 50], 300)
    config = replace(ranks.TINY, vocab_size=tokenizer.get_vocab_size(), sequence_len=256)
    model = randomize(ckpt.build_model(config)).eval()
    engine, done, after_tenth, begun = Engine(model, tokenizer), 0, None, time.perf_counter()
    modes = ("god", "ghost", "auto")
    while done < tokens:
        prompt = [1 + done % 250, 2, 3]
        answers = engine.generate(prompt, 4, max_tokens=200, seed=done, compute=Compute(modes[done // 1000 % 3]))
        done += sum(len(column) for column, _ in answers)
        if after_tenth is None and done >= tokens / 10:
            after_tenth = resident_mb()
    return {"tokens": done, "seconds": round(time.perf_counter() - begun), "resident_mb": round(resident_mb(), 1),
            "grown_mb": round(resident_mb() - after_tenth, 1)}


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def main() -> int:
    p = argparse.ArgumentParser(description="Interrupt commands at random, and assert that nothing is lost.")
    p.add_argument("--minutes", type=float, default=0, help="how long (default: 0)")
    p.add_argument("--seed", type=int, default=1, help="of kinds and moments (default: 1)")
    p.add_argument("--folder", type=Path, default=None, help="keep trials that went wrong here (default: none are kept)")
    p.add_argument("--soak-tokens", type=int, default=0, help="decode so many tokens and watch the memory (default: 0)")
    args = p.parse_args()
    torch.set_num_threads(1)
    mount_for_this_process_only()
    figures = {}
    with tempfile.TemporaryDirectory() as tmp:
        if args.minutes:
            figures = campaign(args.minutes, args.seed, args.folder or Path(tmp) / "campaign")
        if args.soak_tokens:
            figures["soak"] = soak(args.soak_tokens)
    print(json.dumps(figures, indent=1))
    return bool(figures.get("wrong"))


if __name__ == "__main__":
    sys.exit(main())
