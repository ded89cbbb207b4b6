"""The sandbox: what programs may do, what hostile ones may not, and that each of its guards holds without the others."""
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat.execution import OUTPUT_BYTES, run_program

SANDBOX = Path(__file__).parents[1] / "nanochat" / "sandbox.py"


@pytest.mark.parametrize("program, output", [
    ("print(1)", "1\n"), ("import math, re, collections, heapq, typing\nassert math.pi > 3", ""),
    ("open('a', 'w').write('x')\nprint(open('a').read())", "x\n"),
    ("import threading\nt = threading.Thread(target=print, args=('t',))\nt.start()\nt.join()", "t\n")])
def test_ordinary_programs_run(program, output):
    result = run_program(program)
    assert result.success and result.output == output, result


@pytest.mark.parametrize("program, reason", [
    ("assert 1 == 2", "AssertionError"), ("def f(:", "SyntaxError"), ("import sys\nsys.exit(0)", "SystemExit"),
    ("import os\nos._exit(0)", "ended early"), ("import os\nos.fork()", "PermissionError"),
    ("import subprocess\nsubprocess.run(['ls'])", "PermissionError"), ("import os\nos.system('ls')", "PermissionError"),
    ("import socket\nsocket.socket()", "PermissionError"), ("import os\nos.kill(os.getppid(), 9)", "PermissionError"),
    ("import ctypes\nctypes.CDLL(None)", "PermissionError"), ("x = bytearray(10 << 30)", "MemoryError"),
    ("open('big', 'wb').write(b'x' * (100 << 20))", "OSError"), ("open('/etc/passwd')", "PermissionError"),
    ("open('/proc/self/environ')", "PermissionError"),
    ("def f(): f()\nf()", "RecursionError")])
def test_what_a_program_may_not_do(program, reason):
    result = run_program(program)
    assert not result.success and reason in result.reason, result


@pytest.mark.parametrize("program", ["while True: pass", "import time\ntime.sleep(60)",
                                     "try:\n    while True: pass\nexcept BaseException:\n    while True: pass"])
def test_endless_programs_are_stopped(program):
    start = time.perf_counter()
    result = run_program(program, timeout=0.5)
    assert not result.success and time.perf_counter() - start < 10


def test_endless_output_is_cut():
    result = run_program("while True: print('x' * 10000)", timeout=5)
    assert not result.success and len(result.output) <= OUTPUT_BYTES


def test_files_outside_are_neither_read_nor_written(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("key")
    assert not run_program(f"print(open({str(secret)!r}).read())").success
    assert not run_program(f"open({str(tmp_path / 'new')!r}, 'w').write('x')").success
    assert not run_program(f"import shutil\nshutil.rmtree({str(tmp_path)!r})").success
    assert secret.read_text() == "key" and list(tmp_path.iterdir()) == [secret]


# One guard at a time, without the audit hook: the kernel's own answer to what a program that got around Python would do.
GUARDED = """
import ctypes, runpy, sys
sandbox = runpy.run_path({sandbox!r}, run_name="sandbox")
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(sandbox["PR_SET_NO_NEW_PRIVS"], 1, 0, 0, 0)
{guard}
try:
    {attempt}
except OSError as e:
    print("refused", e.errno)
else:
    print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="these guards are Linux's")
@pytest.mark.parametrize("guard, attempt, errno", [
    ("assert sandbox['leave_network'](libc)", "import socket; socket.create_connection(('127.0.0.1', 9), 1)", 101),
    ("assert sandbox['filter_system_calls'](libc)", "import os; os.fork()", 1),
    ("assert sandbox['filter_system_calls'](libc)", "import socket; socket.socket()", 1),
    ("assert sandbox['filter_system_calls'](libc)", "import os; os.execv('/bin/true', ['true'])", 1),
    ("assert sandbox['filter_system_calls'](libc)", "import os; os.kill(os.getppid(), 0)", 1),
    ("assert sandbox['confine_files'](libc, '.')", "open('/etc/passwd')", 13),
    ("assert sandbox['confine_files'](libc, '.')", "open({outside!r}, 'w')", 13)])
def test_each_kernel_guard_holds_by_itself(tmp_path, guard, attempt, errno):
    code = GUARDED.format(sandbox=str(SANDBOX), guard=guard, attempt=attempt.format(outside=str(tmp_path / "outside")))
    work = tmp_path / "work"
    work.mkdir()
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=work)
    if "AssertionError" in run.stderr:
        pytest.skip("this kernel does not offer the guard to this user")
    assert run.stdout == f"refused {errno}\n", run
    assert subprocess.run([sys.executable, "-c", code.replace(guard, "pass")], capture_output=True, text=True,
                          cwd=work).stdout != f"refused {errno}\n"  # it is the guard that refuses
