"""
gpu_check on a machine without a GPU: its dry form runs the parts that a GPU runs, on real processes; a fault in what a part
looks at is a FAIL, and the others still run.
"""
import json
import os
import re
import site
import subprocess
import venv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_tiny_experiment import SIZES

from nanochat import mamba_kernels
from nanochat.step_estimate import Choice
from scripts import gpu_check, gpu_check_parts
from scripts.gpu_check_parts import Finding, Part, Setting
from tiny_experiment import __main__ as main
from tiny_experiment import run

ROOT = Path(__file__).parents[1]
DRY = Setting.on_cpu()


@pytest.mark.parametrize("name", ["kernels", "surgery", "sharding", "decoding"])
def test_a_part_passes_with_its_figures(name, same_start):
    finding = getattr(gpu_check_parts, name)(DRY)
    assert finding.passed and re.search(r"\d", finding.text) and finding.figures


def test_training_compares_eager_with_compiled(same_start, monkeypatch):
    monkeypatch.setattr(gpu_check_parts, "_what_fits", lambda s: (Choice(2, False), 1e9))
    finding = gpu_check_parts.training(DRY)
    losses = [finding.figures[k]["loss"] for k in ("eager", "compiled")]
    assert finding.passed and losses[0] == pytest.approx(losses[1], rel=1e-3)
    timed = gpu_check_parts._timed_steps

    def other(s, choice, compiled):  # a compiler that computes something else
        figures = timed(s, choice, False)
        return figures | {"loss": figures["loss"] * (1.05 if compiled else 1)}
    monkeypatch.setattr(gpu_check_parts, "_timed_steps", other)
    assert not gpu_check_parts.training(DRY).passed


def test_wrong_kernels_fail(monkeypatch, same_start):
    """The form that is checked gets a conv shifted by one token, a decode step without its decay."""
    right = gpu_check_parts._mixer_errors

    def broken(mixer, exact, dtype):
        with torch.no_grad():
            mixer.conv1d.weight.copy_(mixer.conv1d.weight.roll(1, -1))
        return right(mixer, exact, dtype)
    monkeypatch.setattr(gpu_check_parts, "_mixer_errors", broken)
    assert not gpu_check_parts.kernels(DRY).passed


def test_missing_kernels_fail_with_the_command():
    finding = gpu_check.run_part(Part("kernels", gpu_check_parts.kernels), replace(DRY, dry=False))
    assert finding.passed is False and str(mamba_kernels.why_no_cuda()) in finding.text


def test_a_surgery_that_changes_the_function_fails(monkeypatch, same_start):
    insert = gpu_check_parts.insert

    def wrong(base, seed):
        hybrid = insert(base, seed)
        hybrid.lm_head.weight.data.mul_(1.001)
        return hybrid
    monkeypatch.setattr(gpu_check_parts, "insert", wrong)
    assert not gpu_check_parts.surgery(DRY).passed


def test_the_proof_runs_the_form_that_computes_in_fp32(hybrid):
    """On a GPU the kernels multiply fp32 as TF32, which moves logits by more than the proof allows."""
    other = gpu_check_parts.build_model(hybrid.config)
    other.load_state_dict(hybrid.state_dict())
    for model in (hybrid, other):
        for block in model.transformer.h[1::2]:
            block.mamba.form = "cuda"
    assert gpu_check_parts.prove(hybrid, other)["max_delta_logit"] == 0
    assert {b.mamba.form for m in (hybrid, other) for b in m.transformer.h[1::2]} == {"torch"}


def fails(_):
    raise ValueError("the reason")


def test_it_goes_on_after_a_failure_and_says_so(monkeypatch, capsys, tmp_path):
    parts = (Part("one", fails), Part("two", lambda s: Finding(True, "7 of 7", {"n": 7}), True),
             Part("three", lambda s: Finding(None, "no tokenizer", {})))
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(["--dry", "--json", str(tmp_path / "check.json")])
    out = capsys.readouterr().out
    assert stopped.value.code == 1
    assert "[1/3] FAIL  one: the reason" in out and "[2/3] PASS  two: 7 of 7" in out and "[3/3] SKIP  three" in out
    assert out.endswith("1 of 3 parts passed; failed: one\n")
    written = json.loads((tmp_path / "check.json").read_text())
    assert written["parts"]["two"]["n"] == 7 and written["machine"]["versions"]["torch"] == torch.__version__


def test_no_part_begins_after_the_minutes(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "PARTS", (Part("one", lambda s: Finding(True, "1", {})),) * 2)
    gpu_check.main(["--dry", "--minutes", "1e-9"])
    assert capsys.readouterr().out.count("SKIP  one: the 1e-09 minutes are over: give more --minutes") == 2


@pytest.mark.parametrize("flags, words", [([], "there is nothing to check: torch sees no CUDA device"),
                                          (["--dry", "--minutes", "0"], "--minutes is 0; it must be above 0")])
def test_bad_input_is_one_line(flags, words, capsys):
    if torch.cuda.is_available() and not flags:
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(flags)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and words in err and err.count("\n") == 1


BARE = ("torch", "triton", "numpy", "einops")  # and what torch itself depends on
DEPENDENCIES = ("sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "filelock", "typing_extensions",
                "setuptools", "torchgen", "functorch", "numpy.libs")


def bare_python(folder: Path) -> Path:
    """A Python that finds nothing but BARE and its dependencies."""
    venv.create(folder, with_pip=False)
    target = next(folder.glob("lib/python*/site-packages"))
    for source in map(Path, site.getsitepackages()):
        for name in (*BARE, *DEPENDENCIES):
            for path in (source / name, source / f"{name}.py"):
                if path.exists():
                    (target / path.name).symlink_to(path)
    return folder / "bin/python"


@pytest.mark.slow
def test_the_dry_form_runs_from_the_source_tree_alone(tmp_path):
    """Under torchrun with two processes, in a Python without tokenizers, hub client, pyarrow or plots."""
    python = bare_python(tmp_path / "venv")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "NANOCHAT_BASE_DIR": str(tmp_path / "base")}
    env.pop("PYTHONPATH", None)
    assert subprocess.run([python, "-c", "import rustbpe"], capture_output=True).returncode
    done = subprocess.run([python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m",
                           "scripts.gpu_check", "--dry", "--json", tmp_path / "check.json"], cwd=ROOT, env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "check.json").read_text())["parts"]
    assert {k: v["verdict"] for k, v in parts.items()} == dict.fromkeys(
        [p.name for p in gpu_check_parts.PARTS[:-1]], "PASS") | {"tiny experiment": "SKIP"}
    assert "pip install" in parts["tiny experiment"]["text"] and "2 ranks with gloo" in parts["sharding"]["text"]
    assert 1 <= parts["resuming"]["resumed"] < 6


@pytest.mark.slow
def test_the_tiny_experiment_runs_in_the_check(monkeypatch):
    """In this process and shorter; its command line is the check's."""
    monkeypatch.setattr(run.Settings, "quick", classmethod(lambda cls: SIZES))
    commands = []

    def call(command, **options):
        commands.append(command[1:3])
        main.main(command[3:])
        return subprocess.CompletedProcess(command, 0)
    monkeypatch.setattr(subprocess, "run", call)
    assert gpu_check_parts.tiny(DRY).passed and commands == [["-m", "tiny_experiment"]]
