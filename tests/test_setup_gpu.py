"""dev/setup_gpu.sh, with a Python in its PATH that writes down what it is told instead of doing it."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="it is a shell script")
PYTHON = """#!/bin/sh
echo "$*" >> "$LOG"
case "$*" in
    *why_no_gpu*) echo "$FAULT" ;;
    *Python.h*) exit "${NO_HEADERS:-0}" ;;
    *version_info*) exit "${OLD:-0}" ;;
    *scripts.gpu_check*) exit "${CHECK:-0}" ;;
    *--version*) echo Python 3.12.1 ;;
esac
"""


@pytest.fixture
def node(tmp_path):
    """run(flags, environment) on a machine with two GPUs, and the log of what Python was told."""
    shutil.copytree(ROOT / "dev", tmp_path / "tree/dev")
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "tree")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("python", "python3", "cc"):
        (tools / name).write_text(PYTHON)
        (tools / name).chmod(0o755)
    (tools / "id").write_text("#!/bin/sh\necho 1000\n")
    (tools / "id").chmod(0o755)
    (tmp_path / "venv").mkdir()
    log = tmp_path / "log"

    def run(*flags, **env):
        log.write_text("")
        base = {"PATH": f"{tools}:{os.environ['PATH']}", "VIRTUAL_ENV": str(tmp_path / "venv"), "LOG": str(log), "FAULT": "",
                "GPU_PROBE": "seq 2", "DISK_PROBE": "echo 500", "HOME": str(tmp_path)}
        return subprocess.run(["bash", tmp_path / "tree/dev/setup_gpu.sh", *flags], env=base | env, capture_output=True,
                              text=True), [line for line in log.read_text().splitlines() if line.startswith("-m ")]
    return run


def test_it_installs_checks_and_says_what_is_next(node):
    done, told = node()
    assert done.returncode == 0, done
    assert told == ["-m pip install --quiet --disable-pip-version-check -e .[cuda]", "-m scripts.get_kernels",
                    "-m scripts.gpu_check --minutes 2 --json gpu_check.json"]
    assert "installed: 2 GPUs, Python 3.12.1" in done.stdout
    assert "torchrun --standalone --nproc_per_node=2 -m scripts.gpu_check" in done.stdout


def test_a_second_run_installs_nothing_again(node):
    node()
    done, told = node("--no-check", DISK_PROBE="echo 1")
    assert done.returncode == 0 and told == ["-m scripts.get_kernels"]


@pytest.mark.parametrize("env, words", [
    ({"GPU_PROBE": "true"}, "no GPU is found ('true' lists none): install NVIDIA's driver first"),
    ({"NO_HEADERS": "1"}, "python3-dev are missing: run `sudo sh -c 'apt-get update && apt-get install -y python3-dev'`"),
    ({"OLD": "1"}, "is older than Python 3.10"), ({"DISK_PROBE": "echo 3"}, "has 3 GB of free disk, and the Python"),
    ({"FAULT": "the driver is old"}, "the driver is old; then run this script again"), ({"MINUTES": "0"}, "MINUTES=0 is no"),
    ({"CHECK": "1"}, "the check failed: its lines above say where")])
def test_what_it_cannot_do_it_says_in_one_line(node, env, words):
    done, told = node(**env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done
    assert words in done.stderr
    assert ("-m scripts.get_kernels" in told) == ("CHECK" in env)


def test_its_help_is_its_head(node):
    done, told = node("--help")
    assert done.returncode == 0 and not told and "It can be run again" in done.stdout.replace("\n", " ")
