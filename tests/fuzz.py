"""
Hostile flags and damaged files for every command: whatever they are, a command does its work or ends in one line and
exit code 2; no traceback, no code from a file, no hang.

    python -m tests.fuzz --mutants 10000 --seed 1 --json figures.json      # files; a few minutes per thousand
    python -m tests.fuzz --flags 2000 --seed 1                             # flags

Each run happens in this process, on a copy of a tiny home: a base, its hybrid, a resumable run, a tokenizer, data. A
child that dies is a failure, and another one goes on.
"""
import argparse
import collections
import contextlib
import gzip
import importlib
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 20  # a run that takes longer is a hang, unless it was told to do that much
MEMORY = 12 * 2**30  # of address space: what a hostile size may take before it is refused

SMALL = ["--device-batch-size", "2", "--total-batch-size", "128", "--eval-tokens", "128", "--eval-every", "-1"]
TRAIN = [*SMALL, "--num-iterations", "2"]
# command -> a valid tiny run of it; {} is the home
RUNS = {
    "scripts.tok_train": ["--data", "{}/docs", "--vocab-size", "270", "--out", "{}/made"],
    "scripts.base_train": ["--depth", "1", "--aspect-ratio", "32", "--head-dim", "16", "--max-seq-len", "64",
                           "--data", "{}/docs", "--tag", "made", *TRAIN],
    "scripts.surgery": ["--src", "{}/base_checkpoints/d1", "--dst", "{}/made"],
    "scripts.fractal_train": ["--checkpoint", "{}/hybrid_checkpoints/d1_32", "--data", "{}/docs", "--tag", "made", *TRAIN],
    "scripts.fractal_eval": ["--checkpoint", "{}/hybrid_checkpoints/d1_32", "--data", "{}/docs", "--eval-tokens", "128"],
    "scripts.chat_cli": ["--checkpoint", "{}/hybrid_checkpoints/d1_32", "-p", "Line", "--max-tokens", "3"],
    "scripts.extract": ["--checkpoint", "{}/hybrid_checkpoints/d1_32", "--mode", "normal", "--dst", "{}/made"],
    "nanochat.dataset": ["--data", "{}/docs"],
    "nanochat.mixture": ["--data", "0.5*{}/chat.jsonl,1*{}/docs"],
}
# hostile files: (what is damaged, the command that reads it); a folder means any file in it
READS = [
    ("hybrid_checkpoints/d1_32", "scripts.chat_cli", RUNS["scripts.chat_cli"]),
    ("hybrid_checkpoints/d1_32", "scripts.fractal_train", RUNS["scripts.fractal_train"]),
    ("base_checkpoints/d1", "scripts.surgery", RUNS["scripts.surgery"]),
    ("base_checkpoints/d1", "scripts.base_train", [
        "--depth", "1", "--aspect-ratio", "32", "--head-dim", "16", "--max-seq-len", "64", "--data", "{}/docs", *SMALL,
        "--num-iterations", "3"]),
    ("tokenizer", "scripts.base_train", RUNS["scripts.base_train"]),
    ("pickled", "scripts.base_train", [*RUNS["scripts.base_train"], "--tokenizer", "{}/pickled"]),
    ("shards", "nanochat.dataset", ["--data", "{}/shards"]), ("chats", "nanochat.dataset", ["--data", "{}/chats"]),
    ("chat.jsonl", "nanochat.dataset", ["--data", "{}/chat.jsonl"]),
    ("text.jsonl.gz", "nanochat.dataset", ["--data", "{}/text.jsonl.gz"]),
    ("text.jsonl.zst", "nanochat.dataset", ["--data", "{}/text.jsonl.zst"]),
    ("docs", "nanochat.dataset", ["--data", "{}/docs"]),
    ("base_data", "nanochat.dataset", ["--data", "{}/docs", "--skip-bad-rows"]),
]


class Outcome(NamedTuple):
    """How a run ended: done, refused, unexpected (one line that asks for a report), slow, or a fault with its text."""
    kind: str
    text: str = ""


class _Watch:
    """Notes programs that are started, as a file that runs code would."""
    started: list[str] = []
    on = False

    @classmethod
    def hook(cls, event, args):
        if cls.on and event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn"):
            cls.started.append(f"{event} {args[:2]!r}"[:200])


def _in(home: Path, arguments: list[str]) -> list[str]:
    return [a.replace("{}", str(home)) for a in arguments]


def _alarm(*_):
    raise KeyboardInterrupt


def attempt(command: str, arguments: list[str], home: Path) -> Outcome:
    """Runs a command's main in this process, on the artifacts in `home`."""
    module = importlib.import_module(command)
    out, err = io.StringIO(), io.StringIO()
    os.environ["NANOCHAT_BASE_DIR"] = str(home)
    before = sys.argv, os.getcwd()
    sys.argv = [command, *arguments]
    os.chdir(home)
    _Watch.started.clear()
    _Watch.on = True
    signal.signal(signal.SIGALRM, _alarm)
    signal.alarm(SECONDS)
    code, fault = 0, ""
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            module.main()
    except SystemExit as e:
        code = e.code
    except BaseException as e:
        fault = f"{type(e).__name__}: {e}"
    finally:
        signal.alarm(0)
        _Watch.on = False
        sys.argv = before[0]
        os.chdir(before[1])
    said = err.getvalue()
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    if _Watch.started:
        return Outcome("fault", f"started {_Watch.started[0]}")
    if fault or "Traceback" in said:
        return Outcome("fault", fault or said[-400:])
    if code == 130 or (code is not None and code > 128):
        return Outcome("slow")
    if code in (0, None):
        return Outcome("done")
    if code == 2 and "usage:" in said and not errors:
        return Outcome("refused", said.strip().splitlines()[-1])
    if len(errors) != 1 or code not in (1, 2):
        return Outcome("fault", f"exit code {code}, {len(errors)} lines of error: {said[-400:]}")
    return Outcome("unexpected" if errors[0].startswith("error: unexpected ") else "refused", errors[0])


# ---------------------------------------------------------------------------------------------------------------------
# The home

def make_home(home: Path) -> Path:
    """The artifacts that the runs above read, made by the commands themselves."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import tiktoken

    home.mkdir(parents=True)
    (home / "docs").mkdir()
    for i in range(4):
        (home / f"docs/{i}.txt").write_text("".join(f"Line {i}.{j} says {j * j}.\n" for j in range(300)))
    chats = [[{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"{i} it is."}]
             for i in range(60)]
    (home / "chat.jsonl").write_text("".join(json.dumps(c) + "\n" for c in chats))
    data = "".join(json.dumps({"text": f"Document {i} " * (i % 9 + 1)}) + "\n" for i in range(60)).encode()
    (home / "text.jsonl.gz").write_bytes(gzip.compress(data))
    (home / "text.jsonl.zst").write_bytes(pa.compress(data, codec="zstd", asbytes=True))
    for folder, table in (("shards", pa.table({"text": [f"Document {i} " * 9 for i in range(60)]})),
                          ("chats", pa.table({"messages": pa.array(chats)}))):
        (home / folder).mkdir()
        for i in range(2):
            pq.write_table(table, home / folder / f"{i}.parquet", row_group_size=20)
    for command, arguments in (
            ("scripts.tok_train", ["--data", "{}/docs", "--vocab-size", "270"]), ("nanochat.dataset", ["--data", "{}/docs"]),
            ("scripts.base_train", [*RUNS["scripts.base_train"], "--tag", "d1", "--save-every", "1"]),
            ("scripts.surgery", ["--src", "{}/base_checkpoints/d1"])):
        outcome = attempt(command, _in(home, arguments), home)
        assert outcome.kind == "done", (command, outcome)
    from nanochat.tokenizer import Tokenizer
    enc = Tokenizer.from_directory(home / "tokenizer").enc
    (home / "pickled").mkdir()
    (home / "pickled/tokenizer.pkl").write_bytes(pickle.dumps(tiktoken.Encoding(
        "x", pat_str=enc._pat_str, mergeable_ranks=enc._mergeable_ranks, special_tokens=enc._special_tokens)))
    return home


# ---------------------------------------------------------------------------------------------------------------------
# Files

class _Program:
    """Unpickled by a careless reader it starts a program."""
    def __reduce__(self):
        return os.system, ("true",)


def mutate(path: Path, rng: random.Random) -> str:
    """Damages a file in place; says how."""
    data = bytearray(path.read_bytes())
    ways = [_flip, _flip, _cut, _zero, _insert, _swap, _empty]
    if path.suffix in (".json", ".jsonl"):
        ways += [_hostile_json] * 5
    if path.suffix == ".pt" and data:
        ways += [_hostile_torch] * 2
    if path.suffix in (".pkl", ".metadata") or path.name == ".metadata":
        ways.append(_program)
    way = rng.choice(ways)
    path.write_bytes(way(data, rng))
    return way.__name__


def _flip(data, rng):
    for _ in range(rng.choice((1, 1, 3, 30)) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def _cut(data, rng):
    return data[:rng.randrange(len(data) + 1)]


def _zero(data, rng):
    at = rng.randrange(len(data) + 1)
    data[at:at + 200] = bytes(len(data[at:at + 200]))
    return data


def _insert(data, rng):
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.randbytes(rng.choice((1, 7, 1000)))
    return data


def _swap(data, rng):
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:a] + data[b:] + data[a:b]


def _empty(data, rng):
    return rng.choice((b"", b"\n", b"null", b"[]", b"{}", b"[" * 100_000, b"\xff\xfe", b"0" * 5000))


def _program(data, rng):
    return pickle.dumps(_Program())


def _hostile_json(data, rng):
    """The first line, or the whole, with one value replaced."""
    lines = bytes(data).split(b"\n", 1)
    whole = True
    try:
        obj = json.loads(bytes(data))
    except ValueError:
        try:
            obj, whole = json.loads(lines[0]), False
        except ValueError:
            return data
    places = []

    def walk(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])
    walk(obj)
    if places:
        node, key = rng.choice(places)
        node[key] = rng.choice([None, -1, 0, 1, 2**31, 2**63, 10**30, 0.5, math.nan, math.inf, "", "x", "\ud800", [], {},
                                True, [[]], "a" * 10_000, {"a": {"b": []}}, 1e308])
        if isinstance(node, dict) and rng.random() < 0.2:
            del node[key]
    return json.dumps(obj).encode() + (b"" if whole else b"\n" + lines[-1])


def _hostile_torch(data, rng):
    """The same zip with another pickle in it, or a legacy file."""
    import torch
    made = io.BytesIO()
    kind = rng.randrange(4)
    if kind == 0:
        torch.save({"a": torch.ones(3)}, made, _use_new_zipfile_serialization=False)
        return made.getvalue()
    if kind == 1:
        torch.save(rng.choice([None, 3, [], {"a": "b"}, {"lm_head.weight": torch.ones(2, dtype=torch.int8)},
                               {1: torch.ones(2)}, torch.ones(2), {"x": torch.ones(2).to_sparse()}]), made)
        return made.getvalue()
    try:
        with zipfile.ZipFile(io.BytesIO(bytes(data))) as old, zipfile.ZipFile(made, "w") as new:
            for info in old.infolist():
                body = old.read(info)
                if info.filename.endswith("data.pkl"):
                    body = pickle.dumps(_Program()) if kind == 2 else bytes(_flip(bytearray(body), rng))
                new.writestr(info.filename, body)
    except zipfile.BadZipFile:
        return data
    return made.getvalue()


def one_mutant(seed: int, pristine: Path, work: Path) -> tuple[str, Outcome]:
    """What was damaged and how, and how the command that reads it ended."""
    rng = random.Random(seed)
    what, command, arguments = rng.choice(READS)
    home = work / "h"
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(pristine, home)
    target = home / what
    files = [target] if target.is_file() else sorted(p for p in target.rglob("*") if p.is_file() and p.suffix != ".lock")
    path = rng.choice(files)
    how = mutate(path, rng)
    name = f"{command} {path.relative_to(home)} {how}"
    return name, attempt(command, _in(home, arguments), home)


# ---------------------------------------------------------------------------------------------------------------------
# Flags

NUMBERS = ["0", "-1", "-2", "1", "3", "2147483648", "9223372036854775808", "18446744073709551616", "-9223372036854775809",
           "1" + "0" * 30, "nan", "inf", "-inf", "1e308", "1e-320", "-0.0", "0.5", "1e400", "½", "٣", "0x10", " 1 "]
TEXTS = ["", " ", "0", "nan", "🙂", "\udcff", "x" * 300, "x" * 5000, "..", "/dev/null", "/dev/full", "/proc/self/mem",
         "no/such", "~nobody/x", "1*", "a,b", "*", "%s%n{}", "\n", "--", "{}/docs", "{}/docs/0.txt", "{}/tokenizer",
         "{}", "{}/base_checkpoints/d1", "{}/hybrid_checkpoints/d1_32/model.pt", "{}/chat.jsonl",
         "0.1*{}/docs,1e308*{}/chat.jsonl"]
LONG = {"--num-iterations", "--max-tokens", "--eval-tokens", "--vocab-size", "--depth", "--aspect-ratio", "--max-seq-len",
        "--device-batch-size", "--total-batch-size", "--target-param-data-ratio"}  # a large number of these is much work


def flags_of(command: str) -> list:
    """The actions of a command's parser."""
    class Parsed(BaseException):
        pass

    def caught(parser, *_):
        raise Parsed(parser)
    kept, argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_args, caught
    try:
        importlib.import_module(command).main.__wrapped__()
    except Parsed as e:
        return [a for a in e.args[0]._actions if a.option_strings and a.dest not in ("help", "compile")]
    finally:
        argparse.ArgumentParser.parse_args = kept
    raise AssertionError(f"{command} parses nothing")


def values_of(action) -> list[str]:
    """Hostile values of a flag."""
    values = NUMBERS if action.type in (int, float) else [*TEXTS, *NUMBERS]
    return [*map(str, action.choices), "", "🙂"] if action.choices else values


def with_flags(command: str, chosen: list[tuple[object, str]], home: Path) -> tuple[str, Outcome]:
    """A valid run of the command with flags of these values besides; what was given and how it ended."""
    arguments = _in(home, RUNS[command])
    for action, value in chosen:
        name = action.option_strings[-1]
        arguments += [name] if action.nargs == 0 else [f"{name}={_in(home, [value])[0]}"]
    said = " ".join(f"{a.option_strings[-1]}={v[:40]!r}" for a, v in chosen)
    outcome = attempt(command, arguments, home)
    if outcome.kind == "slow" and any(a.option_strings[-1] in LONG for a, _ in chosen):
        outcome = Outcome("done", "as much as it was told")
    return f"{command} {said}", outcome


def one_flags(seed: int, pristine: Path, work: Path) -> tuple[str, Outcome]:
    rng = random.Random(seed)
    command = rng.choice(list(RUNS))
    home = work / "a/b/c"  # deep: what climbs out of it stays inside
    shutil.rmtree(work / "a", ignore_errors=True)
    shutil.copytree(pristine, home)
    flags = flags_of(command)
    chosen = [(a, rng.choice(values_of(a))) for a in rng.sample(flags, rng.choice((1, 1, 1, 2)))]
    return with_flags(command, chosen, home)


# ---------------------------------------------------------------------------------------------------------------------
# The loop

def _work(one, seeds: list[int], pristine: Path, queue) -> None:
    import torch
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # a compiler or git would be a program that is started
    os.environ |= {"CXX": "none", "WANDB_MODE": "disabled", "WANDB_DISABLE_GIT": "true"}
    sys.addaudithook(_Watch.hook)
    with tempfile.TemporaryDirectory() as work:
        for seed in seeds:
            queue.put((seed, None, None, 0.0))
            start = time.perf_counter()
            queue.put((seed, *one(seed, pristine, Path(work)), time.perf_counter() - start))
    queue.put(None)


def loop(one, count: int, seed: int, pristine: Path, say=print) -> dict:
    """Runs one(seed, ...) count times, in a child that is replaced where it dies; the figures, and each kind's examples."""
    context = multiprocessing.get_context("fork")
    seeds, kinds, examples = [seed * 1_000_003 + i for i in range(count)], collections.Counter(), {}
    start, slowest = time.perf_counter(), ("", 0.0)
    while seeds:
        queue = context.SimpleQueue()
        child = context.Process(target=_work, args=(one, seeds, pristine, queue))
        child.start()
        queue._writer.close()
        at = None
        while True:
            try:
                message = queue.get()
            except EOFError:
                break
            if message is None:
                break
            at, name, outcome, seconds = message
            if name is None:
                continue
            outcome = Outcome(*outcome)
            kinds[outcome.kind] += 1
            slowest = max(slowest, (name, seconds), key=lambda x: x[1])
            if outcome.kind in ("fault", "unexpected", "slow"):
                examples.setdefault(outcome.kind, []).append(f"{at}: {name}: {outcome.text}")
            seeds = seeds[seeds.index(at) + 1:]
            if sum(kinds.values()) % 500 == 0:
                say(f"{sum(kinds.values())} of {count}: {dict(kinds)}, {time.perf_counter() - start:.0f} s")
        child.join()
        if child.exitcode and seeds:
            kinds["fault"] += 1
            examples.setdefault("fault", []).append(f"{seeds[0]}: the process died with {child.exitcode}")
            seeds = seeds[1:]
    return {"runs": sum(kinds.values()), **kinds, "seconds": round(time.perf_counter() - start), "slowest": slowest,
            "examples": examples}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    p.add_argument("--mutants", type=int, default=0, help="damaged files to try (default: 0)")
    p.add_argument("--flags", type=int, default=0, help="runs with hostile flags (default: 0)")
    p.add_argument("--seed", type=int, default=1, help="of the damage (default: 1)")
    p.add_argument("--home", type=Path, default=None, help="keep the tiny home here, and use it again (default: none)")
    p.add_argument("--json", type=Path, default=None, help="write the figures to this file (default: none)")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        home = args.home or Path(tmp) / "home"
        if not home.is_dir():
            make_home(home)
        figures = {}
        for name, one, count in (("mutants", one_mutant, args.mutants), ("flags", one_flags, args.flags)):
            if count:
                figures[name] = loop(one, count, args.seed, home, lambda text: print(text, flush=True))
    for name, result in figures.items():
        print(name, {k: v for k, v in result.items() if k != "examples"})
        for kind, examples in result["examples"].items():
            for example in examples[:40]:
                print(f"  {kind} {example}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1, ensure_ascii=True))
    sys.exit(any(result.get("fault") for result in figures.values()))


if __name__ == "__main__":
    main()
