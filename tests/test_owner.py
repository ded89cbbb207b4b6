"""One process at a time writes into a folder; the others are told who it is; and a link is written where it points."""
import errno
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import ranks
from test_distributed import cwd, flags, fp32, home  # noqa: F401 (fixtures)
from test_scripts import fails

from nanochat import checkpoint_manager as ckpt
from nanochat import owner
from nanochat.common import atomic_write
from scripts import extract, fractal_train, surgery


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def holds(folder: Path, ended: Path) -> None:
    """Owns a folder until the file `ended` is there."""
    sys.argv = ["some_command", "--flag"]

    @owner.gives_back
    def work():
        owner.own(folder)
        until(ended.exists)
    work()


@pytest.fixture
def held(tmp_path):
    """A function: another process owns this folder from now on; it is returned."""
    processes, ended = [], tmp_path / "ended"

    def hold(folder):
        processes.extend(ranks.start(1, holds, folder, ended, out=tmp_path / "log"))
        lock = owner.lock_of(folder)
        until(lambda: lock.is_file() and lock.read_bytes().endswith(b"}"))
        return processes[-1]
    yield hold
    ended.touch()
    for process in processes:
        process.join(20)


def test_a_lock_file_that_its_owner_removed_meanwhile_is_none(tmp_path, monkeypatch):
    """Whoever opened it just before would else hold a file that nobody else sees."""
    opened, real = [], os.open

    def slowly(path, *how):
        fd = real(path, *how)
        if not opened:
            os.unlink(path)
        opened.append(path)
        return fd
    monkeypatch.setattr(owner.os, "open", slowly)

    @owner.gives_back
    def work():
        owner.own(tmp_path / "f")
        with pytest.raises(BlockingIOError):
            owner._take(tmp_path / "f")
    work()
    assert len(opened) == 3 and not list(tmp_path.iterdir())


def test_a_second_surgery_is_refused_before_its_work_and_the_first_one_completes(home, cwd, capsys, held):  # noqa: F811
    argv, folder = ["--expand-from=32", "--new-dim=48", "--tag", "t"], cwd / "hybrid_checkpoints" / "t_48"
    process = held(folder)
    fails(capsys, surgery.main, argv, f"process {process.pid} on", "some_command --flag", "since 20", "t_48")
    assert sorted(p.name for p in folder.parent.iterdir()) == [".t_48.owner", "t_32"]
    os.kill(process.pid, signal.SIGKILL)  # what it leaves stops nobody
    process.join()
    surgery.main(argv)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["t_32", "t_48"]
    ckpt.load(folder)


def test_all_ranks_of_a_second_training_are_refused(home, cwd, tmp_path, held):  # noqa: F811
    process = held(cwd / "fractal_checkpoints" / "t_32")
    codes = ranks.finish(ranks.start(2, ranks.fractal, flags(home, cwd, 2), out=tmp_path / "second"))
    assert codes == [2, 2]
    for rank in range(2):
        log = (tmp_path / "second" / f"{rank}.log").read_text()
        assert log.count("error:") == 1 and f"is being written by process {process.pid} on" in log, log
    assert not (cwd / "fractal_checkpoints" / "t_32").exists()


@pytest.fixture
def lockless(monkeypatch):
    def refuse(fd, how):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(owner.fcntl, "flock", refuse)


@owner.gives_back
def take(folder):
    owner.own(folder)


def test_without_locks_the_words_decide(tmp_path, lockless, capsys):
    folder, path = tmp_path / "f", tmp_path / ".f.owner"

    def left(**other):
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        owner._write(fd)
        os.close(fd)
        path.write_text(json.dumps(json.loads(path.read_text()) | other))
    left(pid=os.getppid(), started=owner._started(os.getppid()))
    with pytest.raises(BlockingIOError, match=f"process {os.getppid()} on"):
        take(folder)
    assert "has no locks" in capsys.readouterr().out
    left(pid=os.getppid(), started="1")  # the number has gone to another process
    take(folder)
    left(pid=2**22 + 1)  # above the largest process number of Linux
    take(folder)
    left(machine="elsewhere", host="elsewhere")
    with pytest.raises(BlockingIOError, match=r"elsewhere.*nobody can tell.*remove .*\.f\.owner"):
        take(folder)
    path.write_text("rubbish")
    take(folder)
    assert not path.exists()


def test_what_another_machine_left_is_said_where_its_lock_is_gone(tmp_path, capsys):
    path = tmp_path / ".f.owner"
    path.write_text(json.dumps({"pid": 1, "host": "node7", "machine": "node7", "since": "yesterday", "command": "x"}))
    take(tmp_path / "f")
    assert "process 1 on node7 (since yesterday: x) did not say that it ended" in capsys.readouterr().out


def test_a_folder_whose_parent_may_not_be_written_is_locked_inside(tmp_path, monkeypatch):
    (tmp_path / "f").mkdir()
    monkeypatch.setattr(owner.os, "access", lambda path, how: path != tmp_path)
    assert owner.lock_of(tmp_path / "f") == tmp_path / "f" / ".owner"
    take(tmp_path / "f")
    assert not list((tmp_path / "f").iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Links

def test_surgery_and_extraction_write_where_a_link_points(home, cwd, tmp_path):  # noqa: F811
    disk = tmp_path / "disk"
    disk.mkdir()
    for name, main, argv in (("grown", surgery.main, ["--expand-from=32", "--new-dim=48", "--tag", "t"]),
                             ("small",
                              extract.main, ["--mode", "16", "--checkpoint", str(cwd / "hybrid_checkpoints/t_32")])):
        link = tmp_path / name
        link.symlink_to(disk / name)  # which is not there yet
        main([*argv, "--dst", str(link)])
        assert link.is_symlink() and {"model.pt", "config.json"} <= {p.name for p in (disk / name).iterdir()}
    surgery.main(["--expand-from=32", "--new-dim=64", "--tag", "t", "--dst", str(tmp_path / "grown")])
    assert (tmp_path / "grown").is_symlink() and ckpt.load(disk / "grown").model.config.n_embd == 64
    assert sorted(p.name for p in disk.iterdir()) == ["grown", "small"]


def test_training_writes_where_a_link_points(home, cwd, tmp_path, monkeypatch):  # noqa: F811
    (cwd / "fractal_checkpoints").mkdir()
    (cwd / "fractal_checkpoints" / "t_32").symlink_to(tmp_path / "elsewhere")
    fractal_train.main(flags(home, cwd, 1, "--num-iterations", "1"))
    assert (cwd / "fractal_checkpoints" / "t_32").is_symlink()
    assert {"model.pt", "step_000001"} <= {p.name for p in (tmp_path / "elsewhere").iterdir()}


def test_a_file_is_written_where_its_link_points(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "model.pt"
    link.symlink_to("disk/m.pt")
    for text in (b"1", b"2"):
        with atomic_write(link) as f:
            f.write(text)
    assert link.is_symlink() and (tmp_path / "disk/m.pt").read_bytes() == b"2"
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["m.pt"]
