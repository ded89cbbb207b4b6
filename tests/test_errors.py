"""Every error ends in one line and exit code 2; what a user cannot have caused names a file that holds the traceback."""
import argparse
import os
import re
import sys
from pathlib import Path

import fuzz
import pytest
import torch

from nanochat import common
from nanochat.common import busy_cores, cli, get_base_dir, note_if_busy, user_path
from nanochat.shards import progress
from nanochat.tokenizer import MAX_SPACES, Tokenizer, cut_spaces
from scripts import tok_train


class Panic(BaseException):
    """As Rust's PanicException, it is no Exception."""


def run(capsys, action):
    @cli
    def main():
        raise_or_call(action)
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        main()
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1 and err.startswith("error: "), err
    return err


def raise_or_call(action):
    if isinstance(action, BaseException):
        raise action
    action()


def recurse():
    recurse()


@pytest.mark.parametrize("action, name", [
    (RuntimeError("broken\nin two lines"), "RuntimeError"), (TypeError("not list"), "TypeError"),
    (AssertionError(), "AssertionError"), (KeyError("k"), "KeyError"), (ZeroDivisionError("d"), "ZeroDivisionError"),
    (recurse, "RecursionError"), (Panic("called `Result::unwrap()`"), "Panic"), (AttributeError("a"), "AttributeError"),
    (lambda: b"\xff".decode(), "UnicodeDecodeError"), (lambda: len(3), "TypeError"),
    (lambda: argparse.ArgumentParser().add_argument("x", action="?"), "ValueError"),  # of a library, not of ours
])
def test_what_nobody_foresaw_names_a_file_with_the_traceback(capsys, monkeypatch, tmp_path, action, name):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    said = run(capsys, action)
    assert f"unexpected {name}" in said and "please report it" in said
    path = Path(re.search(r"the file (\S+), which", said)[1])
    assert path.parent == tmp_path / "logs" and "Traceback" in path.read_text() and "raise_or_call" in path.read_text()


@pytest.mark.parametrize("action, words", [
    (ValueError("--x is 3: give 4"), "error: --x is 3: give 4\n"), (FileNotFoundError(2, "no", "f"), "f"),
    (ImportError("no module"), "no module"), (OSError(28, "no room left"), "error: no room left\n"),
    (MemoryError("m"), "out of memory"), (torch.OutOfMemoryError("CUDA out of memory"), "--device-batch-size"),
    (lambda: torch.empty(2**62), "out of memory"), (lambda: torch.Generator().manual_seed(2**70), "out of range"),
    (OverflowError("int too large"), "a number is out of range"),
])
def test_what_a_user_can_cause_says_what_to_do(capsys, monkeypatch, tmp_path, action, words):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    said = run(capsys, action)
    assert words in said and "report" not in said and not list(tmp_path.iterdir())


def test_where_no_log_can_be_written_the_temporary_folder_has_it(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file/base"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert f"the file {tmp_path}/error-" in run(capsys, RuntimeError("x"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    assert "NANOCHAT_DEBUG=1" in run(capsys, RuntimeError("x"))


def test_a_real_panic_of_rust_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    tokenizer = Tokenizer.train_from_iterator(["some text"], 265)
    assert "unexpected PanicException" in run(capsys, lambda: tokenizer.enc.encode_ordinary(" " * 1_100_000))


def test_exits_and_interrupts_keep_their_codes(capsys):
    for action, code in ((SystemExit(143), 143), (KeyboardInterrupt(), 130), (SystemExit(0), 0)):
        with pytest.raises(SystemExit) as e:
            cli(lambda action=action: raise_or_call(action))()
        assert e.value.code == code


# --- a run of white space

@pytest.mark.parametrize("space", [" ", "\t \n", "\u2003"])
def test_a_run_of_white_space_of_any_length_is_encoded(space):
    tokenizer = Tokenizer.train_from_iterator(["some text   \n\n"] * 9, 270)
    text = "a" + space * (1_100_000 // len(space)) + "b" + " " * (MAX_SPACES + 7)
    assert tokenizer.decode(tokenizer.encode(text)) == text == "".join(cut_spaces(text))
    assert tokenizer.encode([text, "a b"]) == [tokenizer.encode(text), tokenizer.encode("a b")]
    shorter = text[:MAX_SPACES]
    assert tokenizer.encode(shorter) == tokenizer.enc.encode_ordinary(shorter)


def test_a_finished_tokenizer_is_saved_before_it_is_judged(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    (tmp_path / "text.txt").write_text("word " * 200 + " " * 1_100_000 + "word\n\n" * 20_000)
    tok_train.main(["--data", str(tmp_path / "text.txt"), "--vocab-size", "270", "--out", str(tmp_path / "tok")])
    assert "bytes per token" in capsys.readouterr().out
    monkeypatch.setattr(Tokenizer, "encode", lambda *a, **k: raise_or_call(Panic("in the evaluation")))
    with pytest.raises(SystemExit):
        tok_train.main(["--data", str(tmp_path / "text.txt"), "--vocab-size", "271", "--out", str(tmp_path / "tok2")])
    assert Tokenizer.from_directory(tmp_path / "tok2").get_vocab_size() == 271


# --- what is printed

def test_progress_off_a_terminal_is_a_line_a_minute(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(common.time, "perf_counter", lambda: now[0])
    with progress(1000 * 10**6, "converting x") as bar:
        for _ in range(1000):
            now[0] += 0.5
            bar.update(10**6)
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 8 and not err and "converting x: 0.2 of 1.0 GB, 2 MB/s, ETA 379" in out
    with progress(10, "quick") as bar:
        bar.update(10)
    assert capsys.readouterr() == ("", "")


def test_a_terminals_encoding_stops_nothing(capsys, tmp_path):
    @cli
    def main():
        print("漢 \udcff")
        raise ValueError("bad \udcff path")
    with pytest.raises(SystemExit):
        main()
    out, err = capsys.readouterr()
    assert out == "漢 \\udcff\n" and err == "error: bad \\udcff path\n"


@pytest.mark.parametrize("busy, threads, said", [(0.0, 8, False), (7.0, 2, True), (1.0, 1, False), (None, 4, False),
                                                 (2.0, 2, False)])
def test_a_busy_machine_is_told(capsys, monkeypatch, busy, threads, said):
    monkeypatch.setattr(common, "busy_cores", lambda: busy)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    note_if_busy(threads)
    out = capsys.readouterr().out
    assert ("OMP_NUM_THREADS=" in out) == said and out.count("\n") == said
    if said:
        assert "keep 7.0 of 8 cores busy" in out and "OMP_NUM_THREADS=1" in out


def test_busy_cores_are_counted(monkeypatch):
    """Between two looks at /proc/stat half of the ticks were idle, or waited for a disk."""
    ticks = iter(["cpu 100 0 100 800 0 0 0 0 0 0", "cpu 120 0 130 830 20 0 0 0 0 0"])
    monkeypatch.setattr(os, "getloadavg", lambda: (3.0, 0, 0))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(Path, "read_text", lambda self: next(ticks) + "\ncpu0 ...\n")
    assert busy_cores(0) == pytest.approx(4.0)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.2, 0, 0))
    assert busy_cores(0) == 0  # nothing to measure
    monkeypatch.delattr(os, "getloadavg")  # Windows
    assert busy_cores(0) is None


def test_nobodys_home(monkeypatch, tmp_path):
    import pwd
    for name in ("HOME", "NANOCHAT_BASE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    with pytest.raises(ValueError, match="set NANOCHAT_BASE_DIR"):
        get_base_dir()
    with pytest.raises(ValueError, match="the home folder is unknown"):
        user_path("~/x")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "x"))
    assert get_base_dir() == tmp_path / "x"
    (tmp_path / "f").write_text("")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "f/x"))
    with pytest.raises(OSError, match=r"cannot be made.*set NANOCHAT_BASE_DIR"):
        get_base_dir()


# --- the campaigns, in small; python -m tests.fuzz runs them in large

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as mp:
        for name, value in {"NANOCHAT_BASE_DIR": "", "CXX": "none", "WANDB_MODE": "disabled"}.items():
            mp.setenv(name, value)
        yield fuzz.make_home(tmp_path_factory.mktemp("fuzz") / "home")


@pytest.mark.slow
def test_500_damaged_files_run_no_code_and_end_in_one_line(home):
    figures = fuzz.loop(fuzz.one_mutant, 500, 2025, home)
    assert figures["runs"] == 500 and not {"fault", "slow"} & figures.keys(), figures["examples"]
    assert figures["refused"] > 200 and figures.get("unexpected", 0) <= 5, figures


@pytest.mark.slow
def test_hostile_flags_end_in_one_line(home, tmp_path):
    import shutil

    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    given_to = st.sampled_from(list(fuzz.RUNS)).flatmap(lambda command: st.tuples(st.just(command), st.lists(
        st.sampled_from(fuzz.flags_of(command)).flatmap(lambda a: st.tuples(st.just(a), st.sampled_from(fuzz.values_of(a)))),
        min_size=1, max_size=2)))

    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(given_to)
    def prove(drawn):
        command, chosen = drawn
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        copy = tmp_path / "a/b/c"
        shutil.copytree(home, copy)
        name, outcome = fuzz.with_flags(command, chosen, copy)
        assert outcome.kind in ("done", "refused", "unexpected"), (name, outcome)
    import resource
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (fuzz.MEMORY, before[1]))
    try:
        prove()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_the_fuzzers_find_what_is_wrong(home, monkeypatch, tmp_path):
    """A command that lets a traceback through, starts a program, or hangs is a fault to them."""
    sys.addaudithook(fuzz._Watch.hook)
    module = type(sys)("bad_command")
    monkeypatch.setitem(sys.modules, "bad_command", module)
    for main, kind, words in ((lambda: 1 / 0, "fault", "ZeroDivisionError"),
                              (lambda: os.system("true"), "fault", "os.system"),
                              (cli(lambda: 1 / 0), "unexpected", "please report"), (lambda: None, "done", ""),
                              (cli(lambda: raise_or_call(ValueError("x"))), "refused", "error: x"),
                              (lambda: sys.exit(3), "fault", "exit code 3")):
        module.main = main
        outcome = fuzz.attempt("bad_command", [], tmp_path)
        assert outcome.kind == kind and words in outcome.text
