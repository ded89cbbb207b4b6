"""Runs that are signalled, whose evaluation dies, whose disk is full: nothing is lost, and they end in the same bits."""
import fcntl
import os
import pty
import resource
import shutil
import signal
import sys
import termios
import time
from pathlib import Path

import pytest
import ranks
import test_distributed
import torch
from conftest import randomize
from test_distributed import flags, losses, same_files
from test_scripts import fails

from nanochat import checkpoint_manager as ckpt
from nanochat import distributed, step_checkpoint, stop
from nanochat.elastic_step import ElasticStep
from nanochat.monitor import Monitor
from nanochat.owner import gives_back
from nanochat.streaming import Leaf, save_lazy
from nanochat.tokenizer import Tokenizer
from nanochat.training import Run
from scripts import chat_sft, fractal_train

home, cwd, fp32 = test_distributed.home, test_distributed.cwd, test_distributed.fp32  # fixtures


@pytest.fixture(scope="module")
def whole(home):
    """The folder of a run that nothing interrupted."""
    with pytest.MonkeyPatch.context() as m:
        m.setenv("NANOCHAT_DTYPE", "float32")
        m.setenv("NANOCHAT_BASE_DIR", str(home))
        fractal_train.main(flags(home, home))
    return home / "fractal_checkpoints" / "t_32"


@pytest.fixture
def folder(cwd):
    return cwd / "fractal_checkpoints" / "t_32"


def at_step(number, action):
    """Has `action` happen in that step of training in this process."""
    call = ElasticStep.__call__

    def step(self, at, *args):
        if at == number:
            action()
        return call(self, at, *args)
    ElasticStep.__call__ = step


@pytest.fixture
def step(monkeypatch):
    monkeypatch.setattr(ElasticStep, "__call__", ElasticStep.__call__)  # puts it back
    return at_step


# ---------------------------------------------------------------------------------------------------------------------
# Signals

def signalled_as_by_a_scheduler(argv):
    """SIGTERM to every process, and a moment later again, through torchrun."""
    def both():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
    at_step(3, both)
    fractal_train.main(argv)


def test_a_signal_that_comes_twice_within_a_moment_is_one(home, cwd, tmp_path, folder):
    codes = ranks.finish(ranks.start(2, signalled_as_by_a_scheduler, flags(home, cwd, 2), out=tmp_path / "log"))
    assert codes == [128 + signal.SIGTERM] * 2 and step_checkpoint.steps(folder) == [2, 4]


def test_repeats_end_the_program_only_after_the_grace_period(monkeypatch):
    with stop.Stop() as noted:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert noted.signal == signal.SIGTERM
        monkeypatch.setattr(stop, "GRACE", 0.01)
        time.sleep(0.02)
        with pytest.raises(SystemExit) as e:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        assert e.value.code == 128 + signal.SIGTERM


def on_a_terminal(name, ready, argv):
    """Trains as the leader of a terminal's session; in step 3 it waits for the terminal to go."""
    os.setsid()
    fd = os.open(name, os.O_RDWR)
    fcntl.ioctl(fd, termios.TIOCSCTTY, 0)
    for i in range(3):
        os.dup2(fd, i)
    sys.stdout, sys.stderr = (os.fdopen(i, "w", buffering=1, closefd=False) for i in (1, 2))

    def wait():
        ready.touch()
        time.sleep(2)  # a signal ends no sleep, but its handler runs meanwhile
        with pytest.raises(OSError):
            os.write(fd, b"?")
    at_step(3, wait)
    fractal_train.main(argv)


def test_a_closed_terminal_saves(home, cwd, tmp_path, folder):
    master, slave = pty.openpty()
    [process] = ranks.start(1, on_a_terminal, os.ttyname(slave), tmp_path / "ready", flags(home, cwd), out=tmp_path / "log")
    os.close(slave)
    until = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and process.is_alive() and time.monotonic() < until:
        time.sleep(0.02)
    os.close(master)
    assert ranks.finish([process]) == [128 + signal.SIGHUP]
    assert step_checkpoint.steps(folder) == [2, 4]


def test_a_closed_terminal_is_ignored_under_nohup(home, cwd, whole, folder, step, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        step(3, lambda: os.kill(os.getpid(), signal.SIGHUP))
        fractal_train.main(flags(home, cwd))
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")  # torchrun ends all the same, and its processes with it
        with stop.Stop() as noted:
            os.kill(os.getpid(), signal.SIGHUP)
            assert noted.signal == signal.SIGHUP
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    same_files(folder, whole)


# ---------------------------------------------------------------------------------------------------------------------
# The end of a process

def leaves_nothing_running(argv, out):
    fractal_train.main(argv)
    distributed._free_groups()  # what the interpreter's end calls
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    (out / os.environ["RANK"]).write_text(" ".join(n for n in names if "gloo" in n))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_thread_of_gloos_outlives_a_run(home, cwd, tmp_path):
    """One that did made torchrun end with 1 after a run that had done all its work."""
    ranks.together(2, leaves_nothing_running, [*flags(home, cwd, 2), "--num-iterations", "1"], tmp_path,
                   out=tmp_path / "log")
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["", ""]


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and saving

def test_an_evaluation_that_dies_costs_no_step(home, cwd, whole, folder, monkeypatch, capsys):
    """In the middle and at the end: it is made again, and no step is."""
    evaluate = Run._evaluate
    for at, more in ((4, ["--eval-every", "4"]), (7, [])):
        def dying(self, step, *args, at=at):
            if step == at:
                self._settle(step)
                raise MemoryError("the evaluation")
            return evaluate(self, step, *args)
        monkeypatch.setattr(Run, "_evaluate", dying)
        fails(capsys, fractal_train.main, [*flags(home, cwd), *more], "out of memory (the evaluation)")
        assert step_checkpoint.steps(folder)[-1] == at
        monkeypatch.setattr(Run, "_evaluate", evaluate)
    fractal_train.main(flags(home, cwd))
    out = capsys.readouterr().out
    assert "after step 7" in out and "step     7/7 | validation" in out and "tok/s" not in out.partition("wrote")[0]
    same_files(folder, whole)
    # also what the optimizers would go on with: the rates of the last step
    rates = [[[g["lr"] for g in o["param_groups"]] for o in ckpt.load_torch(f / "optim.pt")] for f in (folder, whole)]
    assert rates[0] == rates[1]
    info = [ckpt.load_json(f / "config.json") for f in (folder, whole)]
    assert info[0]["loader"] == info[1]["loader"] and info[0]["figures"]["bpb"] == info[1]["figures"]["bpb"]
    written = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    fractal_train.main(flags(home, cwd))  # now it knows all
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == written


def limit_files(n: int) -> None:
    """No file of this process grows beyond so many bytes: the kernel refuses the write, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY))


def short_of_room(argv, rank, first, after):
    """On one rank, from step `first` until step `after`."""
    if int(os.environ["RANK"]) == rank:
        at_step(first, lambda: limit_files(20_000))
        at_step(after, lambda: limit_files(resource.RLIM_INFINITY))
    fractal_train.main(argv)


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_ends_no_run(home, cwd, tmp_path, folder):
    argv = flags(home, cwd, 2)
    ranks.together(2, ranks.fractal, argv, out=tmp_path / "log" / "whole")
    whole = folder.rename(cwd / "whole")
    for rank in range(2):
        shutil.rmtree(folder, ignore_errors=True)
        ranks.together(2, short_of_room, argv, rank, 3, 5, out=tmp_path / "log" / str(rank))
        log = (tmp_path / "log" / str(rank) / "0.log").read_text()
        assert log.count("warning:") == 1 + (rank == 0) and "no room left to write" in log, log
        assert "the run goes on, and saves again at step 6" in log
        assert step_checkpoint.steps(folder) == [6, 7] and not list(folder.glob(".step*"))
        same_files(folder, whole)
        assert losses(folder) == losses(whole)


def test_metrics_and_curves_that_cannot_be_written_end_no_run(tmp_path, capsys):
    monitor = Monitor(tmp_path, 0, 9, torch.device("cpu"), 1, None, {})
    monitor.record({"step": 0, "loss": 1.0})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    try:
        limit_files(size + 9)
        for i in range(1, 4):
            monitor.record({"step": i, "loss": 1.0})
        monitor.draw()
    finally:
        limit_files(resource.RLIM_INFINITY)
    monitor.record({"step": 4, "loss": 1.0})
    monitor.close()
    out = capsys.readouterr().out
    assert out.count("metrics.jsonl cannot be written") == 1 and out.count("curves.png cannot be written") == 1
    assert list(losses(tmp_path)) == [0, 4]


def test_a_best_model_that_cannot_be_written_ends_no_fine_tuning(hybrid, tmp_path, capsys):
    tokenizer = Tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog and runs on"] * 4, 300)
    watch = chat_sft.Watch(tmp_path / "best", [], (0, 0), 1, {})
    watch(hybrid, tokenizer, {"god": 2.0})
    try:
        limit_files(20_000)
        watch(randomize(hybrid, 1), tokenizer, {"god": 1.0})
    finally:
        limit_files(resource.RLIM_INFINITY)
    assert "keeps the best model before" in capsys.readouterr().out and watch.best == 2.0
    assert ckpt.load(tmp_path / "best").info["best_bpb"] == 2.0
    watch(hybrid, tokenizer, {"god": 1.5})
    assert ckpt.load(tmp_path / "best").info["best_bpb"] == 1.5


def test_growth_on_a_full_disk_is_one_line(tmp_path):
    """torch's own writer makes the holes, and hides what the system said."""
    tree = {f"a{i}": Leaf(torch.Size([100, 100]), torch.float32, lambda: torch.zeros(100, 100)) for i in range(3)}
    @gives_back
    def write():
        with ckpt.replace_folder(tmp_path / "out") as new:
            save_lazy(tree, new / "model.pt")
    try:
        limit_files(100_000)
        with pytest.raises(OSError, match="no room left to write") as e:
            write()
    finally:
        limit_files(resource.RLIM_INFINITY)
    assert "free some disk space" in str(e.value) and not list(tmp_path.iterdir())
