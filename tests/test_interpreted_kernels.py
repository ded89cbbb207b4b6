"""Runs interpreted_kernels.py, which must set TRITON_INTERPRET before Triton is imported, in a process of its own."""
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.kernels import upstream

HERE = Path(__file__).parent


def require_kernels():
    """Skips the test, with the command that helps, where Triton or mamba-ssm's files are missing."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (it exists for Linux only): run `pip install -e '.[dev]'`")
    try:
        upstream.locate()
    except ImportError as e:
        pytest.skip(str(e))


def child_environment():
    """This process's environment without what pytest and its workers put there."""
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"OMP_NUM_THREADS": "1"}


def run_child(marks: str, at_least: int):
    """All tests of the file with these marks must pass, and none be skipped."""
    require_kernels()
    done = subprocess.run([sys.executable, "-m", "pytest", str(HERE / "interpreted_kernels.py"), "--all", "-m", marks,
                           "-p", "no:cacheprovider", "-p", "no:xdist"], cwd=HERE.parent, env=child_environment(),
                          capture_output=True, text=True)
    summary = done.stdout.strip().splitlines()[-1:]
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    found = re.match(r"(\d+) passed, \d+ deselected in", summary[0])  # "1 failed" or "1 skipped" would not match
    assert found and int(found[1]) >= at_least, summary


def test_each_kernel_once():
    run_child("not slow", at_least=5)


@pytest.mark.slow
def test_every_kernel_size_dtype_and_kind_of_call():
    run_child("slow", at_least=80)
