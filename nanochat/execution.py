"""
What a model may make this machine do: a calculator for its tool calls, and a sandbox for the programs it writes.

    calculate("2,000*3/4")               -> "1500"
    run_program("print(1)", timeout=3)   -> Execution(success=True, output="1\n", reason="")
"""
import ast
import json
import operator
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

MAX_EXPRESSION = 256   # characters; what fits into them cannot take long to compute
MAX_RESULT = 64        # characters of a result; longer ones are no answer to anything
OUTPUT_BYTES = 1 << 20  # of a program's printed text, and of any file it writes
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
              ast.FloorDiv: operator.floordiv, ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculate(expression: str) -> str | None:
    """
    Evaluates a tool call: numbers with + - * / // and parentheses (commas between digits are dropped), or
    'text'.count('part'). Returns the result as nanochat's training text has it (10 and not 10.0), or None for anything
    else, for a division by zero, and for a result of more than 64 characters. Nothing is executed: the syntax tree is
    walked, and its size is bounded, so this needs no time limit and works in any thread.
    """
    if len(expression) > MAX_EXPRESSION:
        return None
    expression = expression.strip()
    arithmetic = all(c in "0123456789.,+-*/() " for c in expression)
    try:
        tree = ast.parse(expression.replace(",", "") if arithmetic else expression, mode="eval").body
        value = _arithmetic(tree) if arithmetic else _count(tree)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None
    text = str(value).removesuffix(".0")
    return text if len(text) <= MAX_RESULT else None


def _arithmetic(node: ast.expr) -> int | float:
    """The value of a syntax tree of numbers and operators. ValueError for any other node."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_arithmetic(node.left), _arithmetic(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_arithmetic(node.operand))
    raise ValueError("not arithmetic")


def _count(node: ast.expr) -> int:
    """The value of the syntax tree of 'text'.count('part'). ValueError for any other."""
    if (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "count"
            and len(node.args) == 1 and not node.keywords):
        text, part = node.func.value, node.args[0]
        if all(isinstance(n, ast.Constant) and isinstance(n.value, str) for n in (text, part)):
            return text.value.count(part.value)
    raise ValueError("not a count of a part in a text")


class Execution(NamedTuple):
    """How a program ended: whether it ran to its end, what it printed, and why it did not succeed ('' if it did)."""
    success: bool
    output: str
    reason: str


def run_program(program: str, timeout: float = 5.0, memory_mb: int = 512) -> Execution:
    """
    Runs Python source in a process of its own that sees neither network nor files (nanochat/sandbox.py says how) and has
    `timeout` seconds and `memory_mb` of address space. A program that ends itself early, by exit() or otherwise, did not
    succeed. The process and its files are gone when this returns.
    """
    nonce = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        work = Path(folder) / "work"
        work.mkdir()
        request = json.dumps({"program": program, "nonce": nonce, "seconds": timeout, "bytes": memory_mb << 20,
                              "file_bytes": OUTPUT_BYTES, "work": str(work)})
        with open(output, "wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", str(Path(__file__).with_name("sandbox.py"))], cwd=work, stdin=subprocess.PIPE,
                stdout=out, stderr=subprocess.STDOUT, start_new_session=True, env={"PATH": "", "LANG": "C.UTF-8"})
        try:
            process.communicate(request.encode(), timeout=timeout + 2)  # two seconds to start the interpreter
        except subprocess.TimeoutExpired:
            return Execution(False, _read(output), f"timed out after {timeout:g} s")
        finally:
            process.kill()
            process.wait()
        text = _read(output)
    printed, ended, _ = text.rpartition(nonce)
    if process.returncode == 0 and ended:
        return Execution(True, printed, "")
    last = text.strip().splitlines()[-1:] or [f"ended early (exit status {process.returncode})"]
    return Execution(False, text, last[0][:200])


def _read(path: Path) -> str:
    with open(path, "rb") as f:
        return f.read(OUTPUT_BYTES).decode(errors="replace")
