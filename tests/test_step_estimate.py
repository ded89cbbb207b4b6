"""
What fits on which GPUs: the estimate against whole traces, the choice as a pure function, and the derivation
on a machine that is told it has GPUs.
"""
import argparse
import itertools
import math
from dataclasses import asdict, replace

import pytest
import torch

from nanochat import common, distributed, step_checkpoint, step_estimate, training
from nanochat.checkpoint_manager import build_model
from nanochat.distributed import Gpu
from nanochat.elastic_step import ElasticStep
from nanochat.gpt import GPTConfig
from nanochat.hybrid_gpt import HybridConfig
from nanochat.optim import MATRIX_LR, setup_optimizers, state_bytes
from nanochat.step_estimate import (
    Choice,
    Estimate,
    Ranks,
    Workload,
    choose,
    estimate,
    jobs,
    possible_rows,
    preferences,
    refusal,
    trace_step,
    usable,
)

TINY = HybridConfig(sequence_len=64, vocab_size=320, n_layer=2, n_head=4, n_kv_head=4, n_embd=64, d_ref=64, top_width=64,
                    mamba_headdim=16, mamba_d_state=16, mamba_group_width=48)
GROWN = replace(TINY, n_head=5, n_kv_head=5, n_embd=80, top_width=80)
LEAN = Workload(TINY, "stage 1", recipe="lean")
H100 = Gpu("NVIDIA H100 80GB HBM3", 85_520_809_984)


# --- the estimate

@pytest.mark.parametrize("workload", [
    pytest.param(LEAN, id="stage 1"), pytest.param(Workload(GPTConfig(64, 320, 2, 4, 4, 64)), id="base"),
    pytest.param(Workload(GROWN, "stage 2", TINY, recipe="lean"), id="stage 2", marks=pytest.mark.slow),
    pytest.param(Workload(TINY, "controls", recipe="controls value"), id="controls", marks=pytest.mark.slow),
    pytest.param(Workload(TINY, "unfrozen", recipe="both", gate=True, draft_exit=2), id="both", marks=pytest.mark.slow)])
def test_passes_and_update_apart_are_the_whole_step(workload):
    """
    A shallow model is not extended: at the rows that are traced the parts must be those of one trace of a
    step.
    """
    ranks, how = Ranks(4), Choice(4, True, "adamw")
    some = [j for j in jobs(workload, ranks) if j.rows in (4, None) and j.checkpointing is not False]
    estimated = Estimate(workload, {job: job.run() for job in some})
    whole = trace_step(workload.build(), how, ranks)
    for parts, traced in zip(estimated.parts(how), whole):
        assert sum(parts.values()) == pytest.approx(sum(traced.values()), rel=0.01)
    assert estimated.peak(how) == pytest.approx(whole.peak, rel=0.01)
    muon, adamw = (estimated.parts(how._replace(optimizer=o))[0]["optimizer"] for o in ("muon", "adamw"))
    built = workload.build()
    sizes = [state_bytes(built.model, o)[0] for o in ("muon", "adamw")]
    assert adamw - muon == pytest.approx((sizes[1] - sizes[0]) / 4, rel=0.05)  # a quarter on each of four ranks


@pytest.mark.slow
@pytest.mark.parametrize("workload", [LEAN, Workload(GROWN, "stage 2", TINY, recipe="lean")], ids=["stage 1", "stage 2"])
def test_a_deep_model_is_extended_to_what_it_takes(workload):
    """
    Traced at 8 and 12 layers and 4 and 8 rows, extended to 20 layers and 16 rows, against traces of these.
    """
    deep, ranks = workload.with_layers(20), Ranks(4)
    made = estimate(deep, ranks, processes=0)
    for checkpointing, optimizer in ((True, "muon"), (False, "adamw")):
        how = Choice(16, checkpointing, optimizer)
        assert made.peak(how) == pytest.approx(trace_step(deep.build(), how, ranks).peak, rel=0.02)


@pytest.mark.slow
def test_the_traces_run_in_processes_of_their_own():
    """Two traces by two processes are those of this one, though this one is in a process group of its own."""
    some = jobs(LEAN, Ranks(2))[-2:]
    with step_estimate.fake_ranks(Ranks(3)):
        with pytest.MonkeyPatch.context() as m:
            m.setattr(step_estimate, "jobs", lambda *_: some)
            made = estimate(LEAN, Ranks(2), processes=2).made
    assert made == {job[2:]: job.run() for job in some}


# --- the choice

def peaks(state: float, row: float, muon: float = 0.0):
    """
    Memory by rule, in GB: a state, so much per row (a tenth with checkpointing), Muon's buffers or AdamW's
    moments.
    """
    def peak(how):
        passes = state + how.rows * row * (0.1 if how.checkpointing else 1) + 4 * (how.optimizer == "adamw")
        return 1e9 * max(passes, state + (muon if how.optimizer == "muon" else 4))
    return peak


ROWS = [2, 4, 8, 16, 32]


@pytest.mark.parametrize("gpus, memory", list(itertools.product((1, 2, 4, 8), (24, 40, 80, 141))))
def test_the_choice_is_the_best_that_fits(gpus, memory):
    """By enumeration: nothing that fits is preferred to it, and where it is None nothing fits."""
    peak, given = peaks(100 / gpus, 8.0, muon=20 / gpus), {}
    found = choose(peak, memory * 1e9, ROWS, 2048, given)
    fitting = [Choice(r, c, o) for r in ROWS for c in (True, False) for o in ("muon", "adamw")
               if peak(Choice(r, c, o)) <= memory * 1e9 * 0.95 - 3e9]
    if not fitting:
        assert found is None
        assert "use more GPUs" in str(refusal(peak, memory * 1e9, ROWS, 2048, given, "GPUs"))
        return
    choice, needed = found
    assert choice in fitting and needed == peak(choice)
    if any(c.optimizer == "muon" for c in fitting):
        assert choice.optimizer == "muon"
    fitting = [c for c in fitting if c.optimizer == choice.optimizer]
    fast = [c for c in fitting if not c.checkpointing and c.rows >= 4]  # 4 x 2048 tokens
    assert choice == max(fast or [c for c in fitting if c.checkpointing], key=lambda c: c.rows)


def test_adamw_is_chosen_only_where_muons_buffers_do_not_fit():
    assert choose(peaks(50, 1.0, muon=40), 80e9, ROWS, 2048, {})[0] == Choice(16, False, "adamw")
    assert choose(peaks(50, 1.0, muon=20), 80e9, ROWS, 2048, {})[0] == Choice(16, False, "muon")


def test_flags_are_obeyed_or_refused_with_what_would_fit():
    peak = peaks(20, 8.0)
    assert choose(peak, 80e9, ROWS, 2048, {"rows": 3, "checkpointing": False})[0] == Choice(3, False)
    assert choose(peak, 80e9, ROWS, 2048, {"checkpointing": False})[0] == Choice(4, False)
    assert choose(peak, 80e9, ROWS, 2048, {"rows": 32})[0] == Choice(32, True)
    # what leaves less than the reserve is taken where a flag demands it, and only there
    assert usable(80e9) < peak(Choice(7, False)) < 80e9
    assert choose(peak, 80e9, ROWS, 2048, {"rows": 7, "checkpointing": False})[0] == Choice(7, False)
    given = {"rows": 32, "checkpointing": False}
    assert choose(peak, 80e9, ROWS, 2048, given) is None
    said = str(refusal(peak, 80e9, ROWS, 2048, given, "8 x A100"))
    assert "\n" not in said and all(words in said for words in (
        "80.0 GB, 73.0 GB beside",
        "--device-batch-size 32 --no-gradient-checkpointing takes at least 276.0 GB on each of 8 x A100",
        "--device-batch-size 4 --no-gradient-checkpointing --optimizer muon would fit (52.0 GB)"))


def test_rows_make_whole_passes():
    assert possible_rows(LEAN, -1, 8) == ROWS and possible_rows(Workload(TINY), -1, 8) == [1, *ROWS]
    long = replace(LEAN, config=replace(TINY, sequence_len=2048))
    assert possible_rows(long, -1, 64) == [2, 4] and possible_rows(long, -1, 1024) == [2]
    assert possible_rows(long, 2048 * 6 * 12, 6) == [2, 3, 4, 6, 12] and possible_rows(long, 2047, 6) == [2]


# --- on a machine that is told it has GPUs

@pytest.fixture
def gpus(monkeypatch):
    """
    Eight ranks, of which this is the first, with an H100 each; only the queries of torch.cuda are replaced.
    """
    def init(kind):
        assert kind == "cuda"
        return torch.device("cuda", 0)
    monkeypatch.setenv("NANOCHAT_DTYPE", "bfloat16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(training, "init_processes", init)
    monkeypatch.setattr(training, "smallest_gpu", lambda: H100)
    monkeypatch.setattr(training, "get_rank", lambda: (0, 8))
    monkeypatch.setattr(step_estimate, "get_rank", lambda: (0, 8))
    return monkeypatch


def parse(*flags):
    p = argparse.ArgumentParser()
    training.add_training_args(p)
    return p.parse_args(flags)


def derive(tmp_path, *flags):
    args, workload = parse(*flags), replace(LEAN, config=replace(TINY, sequence_len=2048))
    args.passes = training.derive_batch(args, 2048, tmp_path, lambda *a: step_estimate.fit(workload, *a))[2]
    return args


def test_the_derivation_on_gpus(gpus, tmp_path, capsys):
    gpus.setattr(step_estimate, "estimate", lambda *_: argparse.Namespace(peak=peaks(10, 9.7)))
    args = derive(tmp_path)
    assert (args.device_batch_size, args.gradient_checkpointing, args.optimizer, args.compile) == (4, False, "muon", True)
    assert (args.total_batch_size, args.passes, args.matrix_lr) == (524288, 8, 0.02)
    out = capsys.readouterr().out
    assert "memory: 4 rows per pass, no gradient checkpointing, Muon + AdamW: about 48.8 of 85.5 GB on each NVIDIA" in out
    args = derive(tmp_path, "--gradient-checkpointing", "--no-compile", "--optimizer", "adamw")
    assert (args.device_batch_size, args.gradient_checkpointing, args.compile) == (32, True, False)
    assert args.matrix_lr == MATRIX_LR["adamw"]
    with pytest.raises(ValueError, match=r"--device-batch-size 32 --no-gradient-checkpointing takes at least 320.4 GB"):
        derive(tmp_path, "--no-gradient-checkpointing", "--device-batch-size", "32")
    assert "warning: less is left" not in capsys.readouterr().out
    gpus.setattr(step_estimate, "estimate", lambda *_: argparse.Namespace(peak=peaks(70, 1.4)))  # 79.8 GB with 7 rows
    derive(tmp_path, "--no-gradient-checkpointing", "--device-batch-size", "7", "--total-batch-size", str(7 * 2048 * 8))
    assert "warning: less is left than the 7.3 GB" in capsys.readouterr().out


def test_an_estimate_that_fails_is_told(gpus, tmp_path, capsys):
    def broken(*_):
        raise RuntimeError("torch changed")
    gpus.setattr(step_estimate, "estimate", broken)
    args = derive(tmp_path, "--optimizer", "adamw")
    assert (args.device_batch_size, args.gradient_checkpointing, args.optimizer) == (8, True, "adamw")
    assert "warning: the memory of a step could not be estimated (RuntimeError: torch changed)" in capsys.readouterr().out


def test_on_a_cpu_nothing_is_estimated(tmp_path):
    args = parse()
    training.derive_batch(args, 64, tmp_path, None)
    assert (args.device_batch_size, args.gradient_checkpointing, args.optimizer, args.compile, args.total_batch_size) == \
        (8, False, "muon", False, 512)


# --- how long a run takes

def test_hours_dollars_and_steps_on_gpus(gpus, capsys):
    """
    Twenty tokens per trained parameter of stage 1 are the README's 174 hours; a time gives as many steps as
    it buys.
    """
    config = HybridConfig.preset("d32")
    built = Workload(config, "stage 1", recipe="lean").build()
    trained = sum(p.numel() for p in built.model.parameters() if p.requires_grad)
    step = ElasticStep(built.model, 0, 1, "lean")
    args, device = parse("--total-batch-size", "524288"), torch.device("cuda", 0)
    steps = training.derive_length(args, trained, 20, step.flops_per_token(), None, device)
    assert steps == round(20 * trained / 524288) == 174_378
    out = capsys.readouterr().out
    assert "time: about 174." in out and "and $4,1" in out and "8 x NVIDIA H100 80GB HBM3 at 40% of the bf16 peak" in out
    assert "--target-hours" in out
    half = parse("--total-batch-size", "524288", "--target-hours", "87", "--price", "2")
    fewer = training.derive_length(half, trained, 20, step.flops_per_token(), None, device)
    assert fewer == pytest.approx(steps / 2, rel=0.01)
    assert "time: about 87.0 hours and $1,392 at $2" in capsys.readouterr().out
    assert training.derive_length(parse("--total-batch-size", "1024", "--num-iterations", "7"), trained, 20,
                                  step.flops_per_token(), None, device) == 7
    with pytest.raises(ValueError, match=r"--target-hours needs a speed.*give --num-iterations"):
        training.derive_length(parse("--target-hours", "1"), trained, 20, None, None, device)


def test_hours_on_a_cpu_are_measured(capsys):
    asked, device = [], torch.device("cpu")
    args = parse("--total-batch-size", "100", "--target-hours", "0.5")
    steps = training.derive_length(args, 1000, 20, None, lambda: asked.append(1) or 10.0, device)
    assert steps == 180 and asked == [1]
    out = capsys.readouterr().out
    assert "time: about 0.5 hours on a timed step of this machine" in out and "$" not in out
    assert training.derive_length(parse("--total-batch-size", "100"), 1000, 20, None, asked.append, device) == 200
    assert "time:" not in capsys.readouterr().out
    speed = step_estimate.measured_speed(LEAN, None, 2, 1, torch.float32)
    assert math.isfinite(speed) and speed > 0
    for flags, words in ((["--target-hours", "2", "--num-iterations", "5"], "drop one"),
                         (["--target-hours", "0"], "above 0"), (["--price", "-1"], "--price is -1.0")):
        with pytest.raises(ValueError, match=words):
            training.derive_batch(parse(*flags), 64, None, None)


def test_a_resumed_run_keeps_its_steps_and_its_optimizer(tmp_path, monkeypatch):
    """What was derived for one machine holds on the next one: --target-hours counts no second time."""
    settings = {"total_batch_size": 64, "eval_tokens": 64, "num_iterations": 321, "target_hours": 2.0, "optimizer": "adamw"}
    monkeypatch.setattr(step_checkpoint, "steps", lambda _: [4])
    monkeypatch.setattr(step_checkpoint, "read_meta", lambda _: {"settings": settings})
    for flags, steps, optimizer in ((["--target-hours", "2"], 321, "adamw"), (["--target-hours", "3"], -1, "adamw"),
                                    (["--optimizer", "muon"], -1, "muon")):
        args = parse(*flags)
        assert step_checkpoint.settle(args, tmp_path)
        assert (args.num_iterations, args.optimizer, args.total_batch_size) == (steps, optimizer, 64)


@pytest.mark.parametrize("recipe", ["both", "split", "single", "half", "every"])
def test_flops_of_every_recipe(recipe):
    """
    All of it is between the full pass alone and, for each token, a full pass, a narrow one and what teachers
    cost.
    """
    model = build_model(TINY, "meta")
    full = ElasticStep(model, 0, 1, None).flops_per_token()["full"]
    parts = ElasticStep(model, 0, 1, recipe).flops_per_token()
    expected = {"both": (1, 3), "every": (1, 2), "half": (1, 2), "split": (0.5, 1.2), "single": (0.1, 1)}[recipe]
    assert expected[0] * full < sum(parts.values()) < expected[1] * full
    assert ElasticStep(model, 0, 1, "controls value").flops_per_token() is None


# --- what a lack of memory says; settings of CUDA; a torch without CUDA

def test_out_of_memory_names_the_flags_in_order():
    args = argparse.Namespace(device_batch_size=8, gradient_checkpointing=False, optimizer="muon")

    def advice(**change):
        vars(args).update(change)
        with pytest.raises(ValueError) as info, training.memory_advice(args, least_rows=2):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
        text = str(info.value)
        assert "\n" not in text and "CUDA out of memory" in text
        return [word for word in ("--device-batch-size", "--gradient-checkpointing", "--optimizer adamw", "more GPUs")
                if word in text], text
    words, text = advice()
    assert words == sorted(words, key=text.index) and len(words) == 4 and "--device-batch-size 4 (it is 8)" in text
    assert advice(device_batch_size=2)[0] == words[1:]
    assert advice(gradient_checkpointing=True)[0] == words[2:]
    assert advice(optimizer="adamw")[0] == words[3:]


def test_cuda_is_configured_before_it_is_used(monkeypatch):
    """
    Of the real init_processes: the settings are there when the first call to CUDA comes, and a user's own
    stay.
    """
    seen = {}

    def first_use(index):
        seen.update(alloc=[common.os.environ.get(k) for k in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")],
                    matmul=torch.get_float32_matmul_precision())
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.cuda, "set_device", first_use)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    try:
        for own, alloc in ((None, ["expandable_segments:True", None]), ("PYTORCH_ALLOC_CONF", ["x:1", None]),
                           ("PYTORCH_CUDA_ALLOC_CONF", [None, "x:1"])):
            for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
                monkeypatch.delenv(name, raising=False)
            if own:
                monkeypatch.setenv(own, "x:1")
            torch.set_float32_matmul_precision("highest")
            assert distributed.init_processes("cuda") == torch.device("cuda", 0)
            assert seen == {"alloc": alloc, "matmul": "high"}
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_torch_without_cuda_beside_a_gpu_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "0000:01:00.0").mkdir()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(common, "NVIDIA_GPUS", tmp_path / "none")
    assert common.find_device_type(None) == "cpu" and capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="--device-type cuda cannot be used: torch sees no CUDA device"):
        common.find_device_type("cuda")
    smi = tmp_path / "nvidia-smi"
    for driver, lists in ((tmp_path, None), (tmp_path / "none", "GPU 0: NVIDIA H100"), (tmp_path / "none", "")):
        monkeypatch.setattr(common, "NVIDIA_GPUS", driver)
        if lists is not None:
            smi.write_text(f"#!/bin/sh\necho '{lists}'\n")
            smi.chmod(0o755)
        there = lists != ""
        monkeypatch.setattr(torch.version, "cuda", None)
        assert common.find_device_type("cpu") == "cpu" and capsys.readouterr().out == ""
        assert common.find_device_type(None) == "cpu"
        said = capsys.readouterr().out
        assert said.count("\n") == there and ("pip install --force-reinstall torch==" in said) == there
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        with pytest.raises(ValueError, match=r"update the driver" if there else "sees no CUDA device: drop the flag"):
            common.find_device_type("cuda")


# --- the optimizer

def test_adamw_alone_trains_every_matrix(hybrid):
    both, alone = setup_optimizers(hybrid), setup_optimizers(hybrid, 0.003, optimizer="adamw")
    assert len(both) == 2 and len(alone) == 1
    groups = {g["name"]: g for g in alone[0].param_groups}
    assert set(groups) == {g["name"] for o in both for g in o.param_groups}
    assert groups["matrix"]["lr"] == pytest.approx(0.003 * (hybrid.config.n_embd / 768) ** -0.5)
    x = torch.randint(300, (2, 16))
    before = {n: p.detach().clone() for n, p in hybrid.named_parameters()}
    hybrid(x, x)[0].backward()
    alone[0].step()
    held = sum(v.numel() * 4 for s in alone[0].state.values() for k, v in s.items() if k != "step")
    moved = [n for n, p in hybrid.named_parameters() if p.grad is not None and not torch.equal(p, before[n])]
    assert len(moved) == sum(p.grad is not None for p in hybrid.parameters())
    for p in hybrid.parameters():
        p.requires_grad_(p.grad is not None)
    assert held == state_bytes(hybrid, "adamw")[0] > state_bytes(hybrid, "muon")[0]


def test_workloads_are_of_the_models_that_train():
    built = Workload(GROWN, "stage 2", TINY, recipe="lean").build()
    assert built.boxes and not all(p.requires_grad for p in built.model.parameters())
    assert asdict(Workload(GROWN, "stage 2", TINY).with_layers(4))["old_config"]["n_layer"] == 4
    assert all(p.requires_grad for p in Workload(GPTConfig(64, 320, 2, 4, 4, 64)).build().model.parameters())
    assert [c.optimizer for c in preferences([2, 4], 4)] == ["muon"] * 4 + ["adamw"] * 4
