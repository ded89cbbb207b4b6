"""The scripts as a user runs them, at toy size: the whole pipeline, exact resume, and every one-line error."""
import argparse
import fnmatch
import importlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import language_parameters

from nanochat import checkpoint_manager as ckpt
from nanochat import step_checkpoint, training
from nanochat.loss_eval import Student, matryoshka_backward
from nanochat.monitor import read_metrics
from nanochat.surgery import extract as surgery_extract
from scripts import (
    base_train,
    bench,
    bench_speculative,
    chat_cli,
    compare_steps,
    extract,
    fractal_eval,
    fractal_train,
    frontier,
    surgery,
    tok_train,
)

ROOT = Path(__file__).parent.parent
SMALL = ["--device-batch-size", "4", "--total-batch-size", "256", "--eval-tokens", "512", "--eval-every", "-1",
         "--log-every", "5"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base dir with a corpus, a tokenizer and a trained base; tests that write take a copy."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as mp:
        mp.setenv("NANOCHAT_BASE_DIR", str(home))
        mp.setenv("NANOCHAT_DTYPE", "float32")
        text = "".join(f"Line {i}: {'abcdefgh'[i % 8] * (i % 5)} is {i * i}, said {['Ann', 'Bob', 'Cy'][i % 3]}.\n"
                       for i in range(4000))
        (home / "docs").mkdir()
        for i in range(40):
            (home / "docs" / f"{i}.txt").write_text(text[i * 3000:(i + 1) * 3000])
        tok_train.main(["--data", str(home / "docs"), "--vocab-size", "300"])
        base_train.main([*base_args(home), "--num-iterations", "12"])
    return home


def base_args(home):
    return ["--depth", "2", "--aspect-ratio", "32", "--head-dim", "16", "--max-seq-len", "64",
            "--data", str(home / "docs"), *SMALL]


@pytest.fixture
def cwd(home, tmp_path, monkeypatch):
    """A private copy of `home` as NANOCHAT_BASE_DIR, fp32."""
    shutil.copytree(home, tmp_path / "home")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    # the copy's corpus keeps the original's path: that path is what the resume check compares
    return tmp_path / "home"


def test_the_whole_pipeline(home, cwd, capsys):
    proof = surgery.main(["--src", str(cwd / "base_checkpoints/d2")])
    assert proof["max_delta_logit"] <= 1e-5
    hybrid = cwd / "hybrid_checkpoints/d2_64"
    train = ["--data", str(home / "docs"), "--matryoshka", *SMALL]
    stage1 = fractal_train.main(["--checkpoint", str(hybrid), "--stage", "1", "--sample-dim", "--num-iterations", "12",
                                 *train])
    folder = cwd / "fractal_checkpoints/d2_64"
    before, after = (ckpt.load(p).model.state_dict() for p in (hybrid, folder))
    frozen = [k for k in before if "wte" in k or "lm_head" in k or (".h." in k and int(k.split(".")[2]) % 2 == 0
                                                                     and "ve_gate" not in k)]
    assert frozen and all(torch.equal(before[k], after[k]) for k in frozen)
    final = fractal_train.main(["--checkpoint", str(folder / "model.pt"), "--unfreeze", "--num-iterations", "4", *train])
    assert final["steps"] == 4 and stage1["steps"] == 12
    # each phase goes on in the text where the one before stopped: 12 + 12 + 4 batches
    info = [[rank["rows"] for rank in ckpt.load_json(p / "config.json")["loader"]]
            for p in (hybrid, folder, cwd / "fractal_checkpoints/d2_64_unfrozen")]
    assert info == [[4 * 12], [4 * 24], [4 * 28]]
    unfrozen = cwd / "fractal_checkpoints/d2_64_unfrozen"
    result = fractal_eval.main(["--checkpoint", str(unfrozen), "--data", str(home / "docs"), "--eval-tokens", "512",
                                "--json", str(cwd / "eval.json")])
    assert json.loads((cwd / "eval.json").read_text()) == result
    modes = result["modes"]
    assert list(modes) == ["ghost", "whisper", "normal", "think"]
    assert modes["think"]["bpb"] == pytest.approx(final["bpb"], rel=1e-6)
    assert modes["think"]["flops_share"] == 1 > modes["normal"]["flops_share"] > modes["ghost"]["flops_share"]
    assert modes["normal"]["dynamic_share"] == pytest.approx(0.25, rel=1e-2)
    capsys.readouterr()
    chat_cli.main(["--checkpoint", str(unfrozen), "-p", "Line 7", "--mode", "ghost", "--max-tokens", "9"])
    out = capsys.readouterr()
    assert "\nLine 7" in f"\n{out.out}" and "mode ghost" in out.err  # behind a line on compiling, perhaps
    fails(capsys, chat_cli.main, ["--checkpoint", str(unfrozen), "--chat", "-p", "Hello"], "base model")
    assert extract.main(["--checkpoint", str(unfrozen), "--mode", "normal", "--dst", str(cwd / "small")]) <= 1e-4
    again = fractal_eval.main(["--checkpoint", str(cwd / "small"), "--data", str(home / "docs"), "--eval-tokens", "512"])
    assert again["modes"]["normal"]["bpb"] == pytest.approx(modes["normal"]["bpb"], rel=1e-6)


def test_controls_are_trained_calibrated_and_used(home, cwd, capsys):
    surgery.main(["--src", str(cwd / "base_checkpoints/d2")])
    hybrid, docs = str(cwd / "hybrid_checkpoints/d2_64"), ["--data", str(home / "docs")]
    fails(capsys, chat_cli.main, ["--checkpoint", hybrid, "-p", "x", "--mode", "auto"], "never trained", "--controls")
    fails(capsys, fractal_eval.main, ["--checkpoint", hybrid, "--calibrate", *docs], "never trained", "--controls")
    fails(capsys, fractal_train.main, ["--checkpoint", hybrid, "--controls", "--matryoshka", *docs, *SMALL],
          "--controls trains nothing but the controls")
    fractal_train.main(["--checkpoint", hybrid, "--controls", "--num-iterations", "3", *docs, *SMALL])
    auto = cwd / "fractal_checkpoints/d2_64_auto"
    before, after = (ckpt.load(p).model.state_dict() for p in (hybrid, auto))
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert {k.split(".")[0] for k in changed} == {"gate", "predictor"}

    calibrate = ["--checkpoint", str(auto), "--calibrate", *docs, "--new-tokens", "4", "--device-batch-size", "4"]
    fails(capsys, fractal_eval.main, [*calibrate, "--sequences", "197"], "ask for at least 198")
    fails(capsys, fractal_eval.main, [*calibrate, "--sequences", "164", "--budget", "1"], "ask for at least 165")
    fails(capsys, fractal_eval.main, [*calibrate, "--delta", "2"], "delta 2.0 is out of range")
    fails(capsys, fractal_eval.main, [*calibrate, "--eval-tokens", "64"], "no effect with --calibrate: drop --eval-tokens")
    fails(capsys, fractal_eval.main, ["--checkpoint", str(auto), *docs, "--delta", "0.1", "--budget", "0.7"],
          "no effect without --calibrate: add it, or drop --delta, --budget")
    with pytest.MonkeyPatch.context() as mp:  # all this is said before anything is decoded
        mp.setattr(fractal_eval, "continuations", lambda *_: pytest.fail("decodes first"))
        fails(capsys, fractal_eval.main, [*calibrate, "--new-tokens", "0"], "--new-tokens is 0; it must be at least 1")
        fails(capsys, fractal_eval.main, [*calibrate, "--budget", "5"], "the budget 5.0 is out of range")
        fails(capsys, fractal_eval.main, [*calibrate, "--budget", "0.01"], "less than the narrowest widths cost")
    fails(capsys, fractal_eval.main, [*calibrate, "--delta", "0.3", "--epsilon", "0.3", "--sequences", "99999"],
          "the validation text ends after", "ask for fewer")
    evidence = fractal_eval.main([*calibrate, "--delta", "0.3", "--epsilon", "0.3", "--sequences", "12"])
    loaded = ckpt.load(auto)
    assert loaded.info["calibration"] == json.loads(json.dumps(evidence)) and evidence["sequences"] == 9
    assert loaded.model.config.exit_threshold == evidence["exit_threshold"]
    written = times(auto)
    fractal_train.main(["--checkpoint", hybrid, "--controls", "--num-iterations", "3", *docs, *SMALL])
    assert times(auto) == written  # the calibration is still there

    # what is chosen beforehand is chosen on other rows than the test's, with a budget too
    prices, tested = [], {}
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(fractal_eval, "calibrate_prices", lambda model, prompts, budgets: prices.append(prompts) or [])
        mp.setattr(fractal_eval, "differing", lambda model, ids, start, *_: (
            tested.update({len(ids): ids[:, :start].tolist()}) or torch.zeros(len(ids)), 1.0))
        for more in [], ["--budget", "1"]:
            fractal_eval.main([*calibrate, "--delta", "0.3", "--epsilon", "0.3", "--sequences", "20", *more])
            assert len(prices[-1]) == 5 and len(tested[15]) == 15 and not any(p in tested[15] for p in prices[-1])
            tested.clear()

    rows = frontier.main(["--checkpoint", str(auto), *docs, "--eval-tokens", "256", "--device-batch-size", "2", "--budgets",
                          "1.0", "--thresholds", "1.0,0.4", "--beside", f"itself={auto}"])["rows"]
    full, never, early, itself = rows[0], *rows[-3:]
    assert never["bpb"] == pytest.approx(full["bpb"], rel=1e-5) and itself["bpb"] == full["bpb"]
    assert never["share"] > 1 > early["share"]  # the controls cost something, exits save more

    capsys.readouterr()
    chat_cli.main(["--checkpoint", str(auto), "-p", "Line 7", "--mode", "auto", "--max-tokens", "9", "--trace"])
    out = capsys.readouterr()
    assert "\x1b[38;5;" in out.out and "widths by block" in out.err and "FLOPs saved" in out.err
    seen = int(re.search(r"\[(\d+) tokens,", out.err)[1])
    assert sum(map(int, re.findall(r"blocks (\d+)x", out.err))) == seen
    fails(capsys, chat_cli.main, ["--checkpoint", str(auto), "-p", "x", "--mode", "auto", "--budget", "1.5"], "out of range")
    fails(capsys, chat_cli.main, ["--checkpoint", str(auto), "-p", "x", "--budget", "0.5"], "mode auto only")


def test_surgery_of_a_base_evaluates_the_same(home, cwd):
    surgery.main(["--src", str(cwd / "base_checkpoints/d2")])
    a, b = (fractal_eval.main(["--checkpoint", str(cwd / p), "--data", str(home / "docs"), "--eval-tokens", "512"])
            for p in ("base_checkpoints/d2", "hybrid_checkpoints/d2_64"))
    assert a["modes"]["think"]["bpb"] == b["modes"]["think"]["bpb"]


def times(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def read_losses(folder):
    return {e["step"]: e["loss"] for e in read_metrics(folder) if "loss" in e}


def states_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("script", ["base", "stage1"])
def test_an_interrupted_run_resumes_bit_for_bit(home, cwd, script, monkeypatch):
    if script == "base":
        def run(*a):
            base_train.main([*base_args(home), "--num-iterations", "8", "--tag", "r", "--save-every", "3",
                             "--log-every", "1", *a])
        folder = cwd / "base_checkpoints/r"
    else:
        surgery.main(["--src", str(cwd / "base_checkpoints/d2")])

        def run(*a):
            fractal_train.main(["--checkpoint", str(cwd / "hybrid_checkpoints/d2_64"), "--matryoshka", "--sample-dim",
                                "--num-iterations", "8", "--data", str(home / "docs"), "--tag", "r", *SMALL,
                                "--save-every", "3", *a])
        folder = cwd / "fractal_checkpoints/r_64"
    names = ("model_000008.pt", "optim_000008.pt") if script == "base" else ("model.pt", "optim.pt")
    run()
    whole, optim = (ckpt.load_torch(folder / name) for name in names)
    losses, whole = read_losses(folder), {k: v.clone() for k, v in whole.items()}
    optim = [{i: {k: v.clone() for k, v in s.items()} for i, s in o["state"].items()} for o in optim]
    save = step_checkpoint.Saver.save

    def killed(self, step, *args):
        if step == 6:
            self.wait()
            raise KeyboardInterrupt
        save(self, step, *args)
    monkeypatch.setattr(step_checkpoint.Saver, "save", killed)
    with pytest.raises(SystemExit) as e:
        run("--fresh")
    assert e.value.code == 130 and step_checkpoint.steps(folder) == [3]
    monkeypatch.setattr(step_checkpoint.Saver, "save", save)
    if script == "stage1":  # what there is can be written out, without the text
        with monkeypatch.context() as m:
            m.setattr(fractal_train, "prepare_mixture", None)
            run("--export")
        assert ckpt.load_json(folder / "config.json")["provenance"]["steps"] == 3
    if script == "base":  # two passes of half the rows: the same text, the same steps to rounding
        shutil.copytree(folder, cwd / "interrupted")
        run("--device-batch-size", "2")
        assert read_losses(folder) == pytest.approx(losses, abs=2e-4)
        shutil.rmtree(folder)
        (cwd / "interrupted").rename(folder)
    run()
    assert states_equal(whole, ckpt.load_torch(folder / names[0]))
    for a, b in zip(optim, ckpt.load_torch(folder / names[1])):
        assert all(states_equal(s, b["state"][i]) for i, s in a.items())
    assert step_checkpoint.steps(folder) == [6, 8]
    written = times(folder)
    run()  # a finished run says so and changes nothing
    assert times(folder) == written


def test_accumulated_passes_equal_one_large_pass(hybrid, tokens):
    """Two half batches, each scaled by 1/2, give the whole batch's gradient."""
    x, y = tokens[:, :-1], tokens[:, 1:]
    matryoshka_backward(hybrid, x, y, [Student("normal")], 1.0)
    whole = {n: p.grad.clone() for n, p in language_parameters(hybrid).items()}
    hybrid.zero_grad()
    for r in range(2):
        matryoshka_backward(hybrid, x[r:r + 1], y[r:r + 1], [Student("normal")], 0.5)
    for n, p in language_parameters(hybrid).items():
        torch.testing.assert_close(p.grad, whole[n], atol=1e-6, rtol=1e-3)


def test_surgery_reads_nanochats_flat_folder(cwd):
    """All files in one folder: only the tokenizer goes along."""
    base = cwd / "base_checkpoints/d2"
    for path in (base / "tokenizer").iterdir():
        path.rename(base / path.name)
    (base / "tokenizer").rmdir()
    surgery.main(["--src", str(base)])
    written = {p.name for p in (cwd / "hybrid_checkpoints/d2_64/tokenizer").iterdir()}
    assert "tokenizer.json" in written and not any(n.startswith(("model", "optim", "meta")) for n in written)


def test_a_changed_source_is_noticed(home, cwd, capsys):
    surgery.main(["--src", str(cwd / "base_checkpoints/d2")])
    args = ["--data", str(home / "docs"), *SMALL, "--num-iterations", "2", "--checkpoint"]
    fractal_train.main([*args, str(cwd / "hybrid_checkpoints/d2_64")])
    fails(capsys, fractal_train.main, [*args, str(cwd / "fractal_checkpoints/d2_64")], "both the source and the destination")
    surgery.main(["--src", str(cwd / "base_checkpoints/d2"), "--seed", "7"])
    fails(capsys, fractal_train.main, [*args, str(cwd / "hybrid_checkpoints/d2_64")], "source_sha256", "--fresh")


def test_the_default_length_counts_new_entries_alone(home, cwd, capsys):
    """20 tokens for each entry that stage 2 changes: the old corners of grown tensors are none of these."""
    surgery.main(["--src", str(cwd / "base_checkpoints/d2")])
    surgery.main(["--expand-from", "64", "--tag", "d2", "--new-dim", "128"])
    grown = cwd / "hybrid_checkpoints/d2_128"
    with pytest.raises(SystemExit):  # it says what it would do, and finds nothing to export
        fractal_train.main(["--checkpoint", str(grown), "--data", str(home / "docs"), *SMALL, "--export"])
    old, new = (ckpt.load(p).model for p in (cwd / "hybrid_checkpoints/d2_64", grown))
    kept = sum(p.numel() for n, p in language_parameters(old).items() if ".mamba." not in n)
    trained = sum(p.numel() for p in language_parameters(new).values()) - kept
    out = capsys.readouterr().out
    assert f"; trained {trained:,}\n" in out
    assert f"\nsteps {round(20 * trained / 256):,} (20 tokens per trained parameter)" in out


def test_a_fresh_model_of_a_sub_models_size(home, cwd):
    surgery.main(["--src", str(cwd / "base_checkpoints/d2")])
    hybrid = str(cwd / "hybrid_checkpoints/d2_64")
    for name, more in (("a", []), ("b", []), ("c", ["--seed", "1"])):
        extract.main(["--checkpoint", hybrid, "--mode", "normal", "--dst", str(cwd / name), "--fresh", *more])
    a, b, c = (ckpt.load(str(cwd / name))[0] for name in "abc")
    whole = ckpt.load(hybrid)[0]
    assert a.config.top_width == 32 and a.num_params() == surgery_extract(whole, "normal").num_params()
    assert all(torch.equal(p, b.get_parameter(n)) for n, p in a.named_parameters())
    for other in (c, surgery_extract(whole, "normal")):
        assert not torch.equal(a.transformer.wte.weight, other.transformer.wte.weight)


def test_drafts_are_trained_used_and_measured(home, cwd, capsys):
    surgery.main(["--src", str(cwd / "base_checkpoints/d2")])
    hybrid, docs = str(cwd / "hybrid_checkpoints/d2_64"), ["--data", str(home / "docs")]
    train = ["--checkpoint", hybrid, *docs, *SMALL, "--num-iterations", "3"]
    fails(capsys, fractal_train.main, [*train, "--draft-exit", "3"], "no exit point", "choose one of 2")
    fails(capsys, fractal_train.main, [*train, "--controls", "--draft-exit", "2"], "drop --matryoshka")
    fractal_train.main([*train, "--unfreeze", "--draft-exit", "2"])
    folder = cwd / "fractal_checkpoints/d2_64_unfrozen"
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-2])["narrow"] > 0
    capsys.readouterr()
    chat = ["--checkpoint", str(folder), "-p", "Line 7", "--temperature", "0", "--max-tokens", "9"]
    chat_cli.main(chat)
    plain = capsys.readouterr().out
    chat_cli.main([*chat, "--lossless", "--mode", "auto"])
    assert capsys.readouterr().out == plain
    chat_cli.main([*chat, "--lossless", "--trace"])
    err = capsys.readouterr().err
    assert "tokens were drafted" in err and "of plain decoding's" in err
    fails(capsys, chat_cli.main, [*chat, "--lossless", "--budget", "0.5"], "drop the budget")

    race = ["speculative", "--checkpoint", str(folder), *docs]
    fails(capsys, bench.main, [*race, "--max-tokens", "2"], "--max-tokens is 2; it must be at least 3")
    fails(capsys, bench.main, [*race, "--table", "-1"], "--table is -1; it must be at least 0")
    fails(capsys, bench.main, [*race, "--length", "9"], "--length 9 is out of range: give 1 to 8")
    bench.main([*race, "--prompts", "0", "--max-tokens", "3", "--table", "1"])  # the least that has anything to draft
    bench.main(["speculative", "--checkpoint", str(folder), *docs, "--prompts", "2", "--max-tokens", "9", "--table", "1",
                "--proof", "18", "--json", str(cwd / "bench.json")])
    result = json.loads((cwd / "bench.json").read_text())
    assert {"speedup_b1", "speedup_b8", "acceptance", "mismatches"} <= set(result) and result["mismatches"] == 0
    (model,) = result["models"].values()
    assert model["proof"]["sequences"] == 18 and len(model["drafts"]) == 5 and model["sampled_b8"]["all"]["outputs"] == 8


def test_outputs_that_loop_are_told():
    assert bench_speculative.loops([9, 1, 5] + [3, 4] * 8) and bench_speculative.loops([7] * 10)
    assert not bench_speculative.loops(list(range(30))) and not bench_speculative.loops([3, 4] * 8 + [5])


def test_an_extracted_model_trains(home, cwd):
    surgery.main(["--src", str(cwd / "base_checkpoints/d2")])
    extract.main(["--checkpoint", str(cwd / "hybrid_checkpoints/d2_64"), "--mode", "normal", "--dst", str(cwd / "small")])
    figures = fractal_train.main(["--checkpoint", str(cwd / "small"), "--unfreeze", "--matryoshka", "--tag", "s",
                                  "--data", str(home / "docs"), *SMALL, "--num-iterations", "2"])
    assert figures["steps"] == 2


def fails(capsys, main, args, *words):
    """Runs a script that must end with exit code 2 and exactly one line on stderr that has all `words`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        main(args)
    err = capsys.readouterr().err
    lines = [x for x in err.splitlines() if x.startswith("error:")]
    assert e.value.code == 2 and len(lines) == 1 and "Traceback" not in err, err
    for word in words:
        assert word in lines[0], lines[0]


def listing(folder):
    """All paths but the texts' and the compiled CPU operators'."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not {"docs", "native"} & set(p.parts))


def test_bad_input_is_one_line_and_writes_nothing(home, cwd, capsys, monkeypatch):
    base = str(cwd / "base_checkpoints/d2")
    surgery.main(["--src", base])
    hybrid = str(cwd / "hybrid_checkpoints/d2_64")
    docs = ["--data", str(home / "docs")]
    before = listing(cwd)
    fails(capsys, base_train.main, ["--data", str(cwd / "nowhere.txt")], "nowhere.txt")
    fails(capsys, base_train.main, ["--tokenizer", str(cwd / "nowhere")], "nowhere", "tok_train")
    fails(capsys, base_train.main, [*base_args(home), "--head-dim", "48"], "no multiple of the head dim 48", "--head-dim")
    fails(capsys, base_train.main, [*base_args(home), "--total-batch-size", "300"], "300 is no multiple of the 256")
    fails(capsys, base_train.main, [*base_args(home), "--device-batch-size", "0"], "--device-batch-size is 0")
    fails(capsys, base_train.main, [*base_args(home), "--tag", "d2", "--num-iterations", "12", "--matrix-lr", "0.5"],
          "other settings (matrix_lr", "was 0.02, now 0.5", "--fresh", "--tag")
    fails(capsys, tok_train.main, ["--vocab-size", "264", *docs], "265")
    fails(capsys, surgery.main, [], "chatsft_checkpoints/d32", "--src")
    fails(capsys, surgery.main, ["--src", str(cwd / "docs")], "no checkpoint in")
    fails(capsys, surgery.main, ["--src", base, "--step", "7"], "meta_000007.json")
    fails(capsys, fractal_train.main, ["--checkpoint", base, *docs], "base GPT", "scripts.surgery")
    fails(capsys, fractal_train.main, ["--checkpoint", hybrid, "--sample-dim", *docs], "no effect without --matryoshka")
    fails(capsys, fractal_train.main, ["--checkpoint", str(cwd / "none")], "no model in", "scripts.surgery")
    fails(capsys, fractal_train.main, ["--checkpoint", hybrid, *docs, "--log-every", "0"], "--log-every is 0")
    for name in ("--keep-checkpoints", "--max-skipped-steps", "--log-every"):  # -1 is not their word for never
        for value in ("-1", "0"):
            fails(capsys, base_train.main, [*base_args(home), name, value], f"{name} is {value}; it must be at least 1")
    for name in ("--num-iterations", "--save-every", "--eval-every"):
        fails(capsys, base_train.main, [*base_args(home), name, "0"], f"{name} is 0; it must be at least 1, or -1")
    for name, value in (("--warmdown-ratio", "-0.5"), ("--warmup-ratio", "1.1"), ("--warmup-ratio", "nan")):
        fails(capsys, base_train.main, [*base_args(home), name, value], f"{name} is {value}; it is a share of the steps")
    for name in ("--matrix-lr", "--embedding-lr", "--unembedding-lr", "--scalar-lr", "--weight-decay"):
        fails(capsys, base_train.main, [*base_args(home), name, "-1"], f"{name} is -1.0", "0 or more")
    fails(capsys, base_train.main, [*base_args(home), "--matrix-lr", "inf"], "--matrix-lr is inf", "a finite number")
    fails(capsys, base_train.main, [*base_args(home), "--target-param-data-ratio", "-20"], "must be a number above 0")
    for name in ("--lr-scale", "--energy-lambda"):
        fails(capsys, fractal_train.main, ["--checkpoint", hybrid, *docs, name, "-1"], f"{name} is -1.0", "0 or more")
    for recipe in ("single", "split"):
        fails(capsys, fractal_train.main, ["--checkpoint", hybrid, *docs, "--matryoshka", "--sample-dim", "--recipe", recipe,
                                           "--draft-exit", "2"], f"{recipe} has none", "choose --recipe both, every, half")
    fails(capsys, fractal_train.main, ["--checkpoint", hybrid, *docs, "--matryoshka", "--sample-dim", "--device-batch-size",
                                       "1"], "lean needs at least two rows", "--recipe both")
    fails(capsys, fractal_eval.main, ["--checkpoint", hybrid, "--eval-tokens", "0"], "at least 1")
    fails(capsys, chat_cli.main, ["--checkpoint", hybrid, "--mode", "auto", "-p", "x"], "needs trained controls")
    fails(capsys, chat_cli.main, ["--checkpoint", hybrid, "-p", "x", "--trace", "--max-tokens", "0"], "--max-tokens is 0")
    fails(capsys, extract.main, ["--checkpoint", hybrid, "--mode", "normal", "--dst", base], "not empty")
    fails(capsys, extract.main, ["--checkpoint", hybrid, "--mode", "normal", "--dst", str(cwd / "x"), "--seed", "1"],
          "no effect without --fresh")
    fails(capsys, extract.main, ["--checkpoint", base, "--mode", "normal", "--dst", str(cwd / "new")], "only a hybrid")
    fails(capsys, chat_cli.main, ["--checkpoint", hybrid, "--mode", "loud", "-p", "x"], "unknown mode 'loud'", "ghost")
    fails(capsys, chat_cli.main, ["--checkpoint", hybrid, "--mode", "48", "-p", "x"], "48 is not a level", "32, 64")
    fails(capsys, chat_cli.main, ["--checkpoint", hybrid, "-p", "x" * 500], "the model's context of 64 must hold the answer",
          "shorten it to 63 at most")
    fails(capsys, fractal_train.main, ["--checkpoint", hybrid, "--expanded-dim", "96", *docs], "96 is not the checkpoint's",
          "--new-dim=96")
    fails(capsys, fractal_train.main, ["--checkpoint", hybrid, "--stage", "2", *docs], "--stage 2 does not fit")
    fails(capsys, fractal_train.main, ["--checkpoint", hybrid, "--matryoshka", "--dim-levels", "16,99", *docs],
          "the model's levels are 16,32,64")
    fails(capsys, fractal_train.main, ["--checkpoint", hybrid, "--export", *docs], "no checkpoint in", "to export")
    fails(capsys, fractal_train.main, ["--checkpoint", hybrid, "--export", "--fresh", *docs], "--fresh deletes", "drop one")
    monkeypatch.setenv("NANOCHAT_DTYPE", "fp8")
    fails(capsys, base_train.main, base_args(home), "NANOCHAT_DTYPE=fp8", "bfloat16")
    assert listing(cwd) == before


def test_a_batch_that_does_not_split_names_what_can_be_changed(home, cwd, capsys, monkeypatch):
    """A resumed run's total batch was not given and cannot be: rows of a pass and processes can."""
    args = base_args(home)
    at = args.index("--total-batch-size")
    del args[at:at + 2]
    resume = [*args, "--num-iterations", "12"]
    fails(capsys, base_train.main, [*resume, "--device-batch-size", "3"], "256 tokens, 4 rows, in a step",
          "choose a --device-batch-size that divides 4")
    fails(capsys, base_train.main, [*resume, "--device-batch-size", "3", "--total-batch-size", "256"],
          "--total-batch-size 256 is no multiple", "choose one that is")
    monkeypatch.setattr(training, "init_processes", torch.device)
    monkeypatch.setattr(training, "get_rank", lambda: (0, 3))
    fails(capsys, base_train.main, resume, "3 processes", "with a number of processes that divides 4")
    monkeypatch.setattr(training, "get_rank", lambda: (0, 2))
    fails(capsys, base_train.main, resume, "choose a --device-batch-size that divides 2")


def test_damaged_checkpoints_are_named(home, cwd, capsys):
    surgery.main(["--src", str(cwd / "base_checkpoints/d2")])
    hybrid = cwd / "hybrid_checkpoints/d2_64"
    state = dict(torch.load(hybrid / "model.pt", weights_only=True))
    data = (hybrid / "model.pt").read_bytes()
    (hybrid / "model.pt").write_bytes(data[:len(data) // 2])
    fails(capsys, chat_cli.main, ["--checkpoint", str(hybrid), "-p", "x"], "model.pt", "truncated", "again")
    state["extra.weight"] = state.pop("lm_head.weight")
    torch.save(state, hybrid / "model.pt")
    fails(capsys, chat_cli.main, ["--checkpoint", str(hybrid), "-p", "x"], "missing lm_head.weight",
          "unexpected extra.weight")
    os.unlink(hybrid / "model.pt")
    fails(capsys, chat_cli.main, ["--checkpoint", str(hybrid), "-p", "x"], "no checkpoint file")


def test_a_surgery_that_changes_the_function_writes_nothing(cwd, capsys, monkeypatch):
    from nanochat import surgery as functions

    def broken(config, base, seed):
        config, state = functions.insert_state(config, base, seed)
        make = state.make
        state.make = lambda name, dtype: make(name, dtype) + name.endswith("h.1.mlp.c_proj.weight")
        return config, state
    monkeypatch.setattr(surgery, "insert_state", broken)
    with pytest.raises(SystemExit) as e:
        surgery.main(["--src", str(cwd / "base_checkpoints/d2")])
    assert e.value.code == 1 and "nothing was written" in capsys.readouterr().err
    assert not (cwd / "hybrid_checkpoints").exists()


def test_wandb_logs_offline(home, cwd, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(cwd))
    base_train.main([*base_args(home), "--num-iterations", "2", "--tag", "w", "--run", "try"])
    assert list((cwd / "wandb").glob("offline-run-*/run-*.wandb"))


def commands():
    """Every module that a user runs: name -> it."""
    names = [f"{p.parent.name}.{p.stem}" for folder in ("nanochat", "scripts", "tiny_experiment")
             for p in sorted((ROOT / folder).glob("*.py")) if "\n    main()\n" in p.read_text()]
    return {name: importlib.import_module(name) for name in names}


def test_every_flag_has_help(monkeypatch):
    class Parsed(Exception):
        pass

    def caught(parser, *_):
        raise Parsed(parser)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", caught)  # parse_args calls it, too
    modules = commands()
    assert {"scripts.plan", "scripts.bench", "scripts.compare_steps", "nanochat.mixture", "tiny_experiment.__main__"} <= \
        modules.keys()
    for name, module in modules.items():
        with pytest.raises(Parsed) as info:
            module.main.__wrapped__()  # without cli, which would make a line of it
        parsers, flags = [(name, info.value.args[0])], []
        for where, parser in parsers:
            for action in parser._actions:
                if isinstance(action, argparse._SubParsersAction):
                    parsers += [(f"{where} {k}", sub) for k, sub in action.choices.items()]
                else:
                    assert action.help and action.help != argparse.SUPPRESS, (where, action.option_strings or action.dest)
                    flags.append(action)
            parser.format_help()  # a stray % in a help text would raise
        assert len(flags) >= 2, name


def test_an_installation_has_all_packages():
    listed = re.search(r"^include = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.M)[1]
    patterns = re.findall(r'"([\w.*]+)"', listed)
    top = {p.parent.name for p in ROOT.glob("*/__init__.py")}
    packages = [".".join(p.parent.relative_to(ROOT).parts) for t in top for p in (ROOT / t).rglob("__init__.py")]
    assert "nanochat.tasks" in packages and {p.removesuffix("*") for p in patterns} == top
    assert all(any(fnmatch.fnmatch(name, pattern) for pattern in patterns) for name in packages)


def test_compare_steps_spends_the_same_on_every_kind(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    result = compare_steps.main(["--steps", "2", "--more-steps", "3", "--seeds", "1", "--width", "32", "--rows", "4",
                                 "--layers", "1"])
    steps = {k: v[0] for k, v in result["steps"].items()}
    assert steps["full passes only"] == 3 and steps["both"] == 2
    assert steps["single"] >= steps["split"] >= 3
    assert all(len(v) == 1 and 0 < v[0] < 12 for modes in result["bpb"].values() for v in modes.values())
    assert (tmp_path / "compare_steps.json").is_file()
    result = compare_steps.main(["--steps", "2", "--more-steps", "2", "--seeds", "1", "--width", "32", "--rows", "4",
                                 "--layers", "1", "--phase", "stage 1", "--kinds", "both", "split"])
    assert result["steps"].keys() == {"both", "split"}
    with pytest.raises(SystemExit):
        compare_steps.main(["--rows", "1"])
