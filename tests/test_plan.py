"""The plan's tables against hand counts, the memory trace against real allocations, and the seed workflow's early checks."""
import json
import os
import re
import subprocess
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanochat import memory_trace, mixture
from nanochat.checkpoint_manager import load_json
from nanochat.common import get_compute_dtype
from nanochat.elastic_step import ElasticStep
from nanochat.hybrid_gpt import CONTROLS, HybridConfig, stays_fp32
from nanochat.loss_eval import Student
from nanochat.optim import group_of
from nanochat.step_estimate import Choice, Ranks, trace_step
from scripts import plan, plan_memory, plan_nodes, plan_tables

ROOT = Path(__file__).parent.parent
TINY = HybridConfig(sequence_len=64, vocab_size=320, n_layer=2, n_head=4, n_kv_head=4, n_embd=64, d_ref=64, top_width=64,
                    mamba_headdim=16, mamba_d_state=16, mamba_group_width=48)
GROWN = HybridConfig(sequence_len=64, vocab_size=320, n_layer=2, n_head=5, n_kv_head=5, n_embd=80, d_ref=64, top_width=80,
                     mamba_headdim=16, mamba_d_state=16, mamba_group_width=48)


@pytest.fixture(scope="module")
def d32():
    return plan_tables.d32_stages()


def test_sizes_are_the_designs(d32):
    counts = [plan_tables.parameters(s) for s in d32]
    assert [round((c["total"] - c["control"]) / 1e9, 3) for c in counts] == [6.450, 9.323, 20.966]
    assert [round(c["base"] / 1e9, 3) for c in counts] == [1.879, 2.852, 6.979]
    # what is old: the base in stage 1; in 2 and 3 all that was there before, but for the Mamba mixers, and the controls
    assert counts[0]["trained"] == counts[0]["mamba"] + counts[0]["value_embeds"]
    for stage, before in zip(d32[1:], d32):
        names = dict(stage.model.named_parameters())
        new = sum(p.numel() if ".mamba." in n else p.numel() - q.numel()
                  for n, p in names.items() if not n.startswith(CONTROLS)
                  for q in (dict(before.model.named_parameters())[n],))
        assert plan_tables.parameters(stage)["trained"] == new


def test_memory_that_stays(d32):
    """Bytes by the rule: 4 for a master and a gradient, 4 for Muon's momentum, 8 for AdamW's two moments."""
    stage = d32[0]
    m = plan_tables.memory(stage)
    trained = [(n, p.numel()) for n, p in stage.model.named_parameters() if p.requires_grad]
    matrices = sum(n for name, n in trained if re.search(r"\.(mlp|mamba)\.(c_fc|c_proj|in_proj|out_proj)\.weight", name))
    assert m["gradients"] == 4 * sum(n for _, n in trained)
    assert m["optimizer"] == 8 * sum(n for _, n in trained) - 4 * matrices
    assert 0.20 < 1 - m["optimizer"] / m["optimizer_if_all_trained"] < 0.30  # the hand count; the seed's claim is 50 %


def test_modes_and_their_shares(d32):
    modes = plan_tables.modes(d32[2], 1024)
    assert list(modes) == ["ghost", "whisper", "normal", "think", "god"] and modes["god"]["share"] == 1
    full = d32[2].model.cost(context=1024)
    assert modes["ghost"]["flops"] == modes["ghost"]["dynamic"] + full["static"].flops + full["head"].flops


def test_flops_of_a_step():
    """All trained: three times the forward pass. Frozen parts: less by their weights' gradients alone."""
    model, context = plan_tables.make_stage(1, TINY).model, (TINY.sequence_len + 1) / 2
    forward = {k: c.flops for k, c in model.cost(context=context).items()}
    frozen = plan_tables.step_flops(model)
    for p in model.parameters():
        p.requires_grad_(True)
    whole = plan_tables.step_flops(model)
    assert 2 * whole["full"] == pytest.approx(3 * sum(forward.values()))
    assert 2 * whole["teacher"] == pytest.approx(sum(forward.values()) + forward["head"])
    narrow = 3 * (model.cost("ghost", context)["dynamic"].flops + forward["static"] + forward["head"])
    assert narrow < 2 * whole["narrow"] < 2 * whole["full"]
    base = 2 * sum(p.numel() for n, p in model.named_parameters() if re.search(r"attn\.c_|lm_head|h\.[02]\.mlp", n))
    assert 2 * (whole["full"] - frozen["full"]) == pytest.approx(base, rel=0.01)  # the value embeddings' gates are trained


def test_a_student_pays_for_its_teachers_logits(hybrid):
    """What a step counts beyond the pass itself is what torch counts for the KL beyond a cross-entropy; so with exits."""
    x = torch.randint(300, (2, 8))
    step = ElasticStep(hybrid, seed=0, steps=1, recipe="both")
    more = step.student_flops([Student("normal"), Student("ghost", stop=1)], x) \
        - step.flops("normal", 16) - step.flops("ghost", 8)

    def counted(**teacher):
        with FlopCounterMode(display=False) as counter:
            hybrid.lm_head.loss(torch.ones(3, 8, 64, requires_grad=True), torch.zeros(3, 8, dtype=torch.long), **teacher)
        return counter.get_total_flops()
    both = counted(teacher=torch.ones(3, 8, 64))
    assert more == both - counted() > 0
    assert step.exit_flops(8) * 3 == both * len(hybrid.config.exit_points) > 0


def test_the_command(d32, tmp_path, capsys):
    result = plan.main([*"--gpus 16 --price 2 --mfu 0.5 --tokens 1e9 --json".split(), str(tmp_path / "p.json")])
    assert load_json(tmp_path / "p.json") == json.loads(json.dumps(result))
    out = capsys.readouterr().out
    assert "6.4515" in out and "first plan" in out
    for number, (hours, dollars) in plan_tables.FIRST_PLAN.items():
        t = result[f"stage {number}"]["training"]
        per_second = 16 * 989e12 * 0.5 / t["flops_per_token"]
        assert t["hours"] == pytest.approx(1e9 / per_second / 3600)
        assert t["dollars"] == pytest.approx(t["hours"] * 16 * 2)
        assert t["tokens_in_first_hours"] == pytest.approx(hours * 3600 * per_second)
        assert t["tokens_for_first_dollars"] == pytest.approx(dollars / 2 / 16 * 3600 * per_second)
    for bad in (["--mfu", "1.5"], ["--gpus", "0"], ["--price", "nan"], ["--gpu", "abacus"]):
        with pytest.raises(SystemExit) as info:
            plan.main(bad)
        assert info.value.code == 2


# --- the trace

@pytest.mark.parametrize("world, dtype", [(1, torch.float32), (2, torch.bfloat16)])
def test_traced_peak_is_the_measured_one(world, dtype):
    """
    A step that really runs, in one process and sharded over two, against its trace: the promise is 10 %; one process is
    within 2 %. What gloo's threads free late, which hangs on how busy the machine is, counts as held: once 7 and once 12 %
    more than traced. So two processes have three tries.
    """
    near = pytest.approx(1, abs=0.02 if world == 1 else 0.1)
    ratios = (plan_memory.check(world, dtype)["ratio"] for _ in range(1 if world == 1 else 3))
    assert any(ratio == near for ratio in ratios)


@pytest.mark.parametrize("stage", [plan_tables.make_stage(1, TINY), plan_tables.make_stage(2, GROWN, TINY)],
                         ids=["stage 1", "stage 2"])
def test_trace_of_a_sharded_step(stage):
    trace = trace_step(stage.workload.build(), Choice(2, True), Ranks(8))
    assert trace.peak == sum(trace.at_peak.values()) and not torch.distributed.is_initialized()
    # a rank holds an eighth of every sharded parameter, rounded up to whole rows, and what stays fp32 whole
    small = sum(4 * p.numel() for n, p in stage.model.named_parameters() if stays_fp32(n))
    total = 4 * sum(p.numel() for p in stage.model.parameters())
    assert (total - small) / 8 + small <= trace.at_peak["parameters"] < 1.3 * ((total - small) / 8 + small)
    assert trace.at_peak["optimizer"] > 0 and trace.at_peak["activations"] > 0
    # twice the rows: more activations, and not one byte more of state
    again = trace_step(stage.workload.build(), Choice(4, True), Ranks(8))
    assert again.at_peak["parameters"] == trace.at_peak["parameters"]
    assert again.at_peak["optimizer"] == trace.at_peak["optimizer"] and again.peak > trace.peak


def test_a_trace_refuses_large_tensors_with_data():
    """Weights must be fake. Random numbers for the rows of 1,024 ranks have data, and are as large."""
    weights = torch.ones(2_000_000)
    with memory_trace.traced():
        scores = torch.rand(1024, 2048, generator=torch.Generator().manual_seed(0))[::512]
        assert scores.sort().values.shape == (2, 2048)
        with pytest.raises(AssertionError, match="a large tensor is not fake"):
            weights * 2


class Linear:
    """An Estimate by a rule of thumb: so many GB of state, and a GB or two a row."""
    def __init__(self, state: float):
        self.state = state

    def at_peak(self, how):
        parts = dict.fromkeys(memory_trace.CATEGORIES, 0.0)
        return parts | {"parameters": self.state * 1e9, "activations": how.rows * (1 if how.checkpointing else 2) * 1e9}

    def peak(self, how):
        return sum(self.at_peak(how).values())


def test_the_memory_command_says_what_fits(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(plan, "d32_stages", lambda: [plan_tables.make_stage(1, TINY)])
    monkeypatch.setattr(plan_memory, "check", lambda *_: {"traced_mb": 1.0, "measured_mb": 1.0, "ratio": ratios.pop()})
    monkeypatch.setattr(plan_memory, "estimate", lambda workload, ranks: Linear(40 / ranks.world))
    ratios = [1.09, 0.91]
    memory = ["--memory", "--json", str(tmp_path / "m.json")]
    result = plan.main([*memory, "--gpus", "4", "--gpu-memory", "40", "--price", "9", "--context", "7"])
    out = capsys.readouterr().out
    assert "--context has no effect with --memory" in out and "--price has no" in out
    # of 40 GB, 35 are usable: 10 of state, and 16 rows of 1 GB. Without checkpointing only a short pass would fit
    assert "fits on 4 x 40 GB: --device-batch-size 16 --gradient-checkpointing --optimizer muon" in out
    assert result["stage 1"]["flags"] == "--device-batch-size 16 --gradient-checkpointing --optimizer muon"
    assert result["stage 1"]["peak_gb"] == 26 and load_json(tmp_path / "m.json") == json.loads(json.dumps(result))
    ratios = [1.0, 1.0]
    result = plan.main([*memory, "--gpus", "2", "--gpu-memory", "24"])
    assert result["stage 1"]["choice"] is None
    assert "does not fit on 2 x 24 GB: it takes at least 22.0 GB, and 19.8 GB are usable" in capsys.readouterr().out
    (tmp_path / "m.json").unlink()
    for ratios in ([0.89], [1.11, 1.0]):
        with pytest.raises(SystemExit) as info:
            plan.main(memory)
        assert "off by more than 10%" in info.value.code and not ratios and not list(tmp_path.iterdir())
    plan.main(["--device-batch-size", "2", "--stages", "1"])
    assert "--device-batch-size has no effect without --memory or --nodes" in capsys.readouterr().out


@pytest.mark.parametrize("nodes, checkpointing", [(1, False), (2, True)])
def test_what_a_step_exchanges(nodes, checkpointing):
    """
    By hand: a pass of a fully trained model gathers every sharded matrix for forward and, blocks only, for backward; every
    gradient is reduce-scattered in fp32, and summed over the nodes that hold copies. Muon sends each matrix to the rank
    that computes it and back.
    """
    workload, each = replace(stage_one().workload, phase="unfrozen", recipe=None), 4
    ranks = Ranks(each * nodes, nodes)
    how = Choice(4, checkpointing)
    model = workload.build().model
    sizes = {n: p.numel() for n, p in model.named_parameters() if not stays_fp32(n)}
    blocks = sum(n for name, n in sizes.items() if name.startswith("transformer.h."))
    sent = plan_nodes.exchanged(workload, how, ranks, update=False)
    away = (each - 1) / each
    near = {"rel": 0.03}  # rows are padded to whole ones
    assert sent["all-gather", "node"][1] == pytest.approx(2 * away * (sum(sizes.values()) + blocks), **near)
    assert sent["reduce-scatter", "node"][1] == pytest.approx(4 * away * sum(sizes.values()), **near)
    if nodes == 2:  # fp32 shards over two nodes: 2 x 1/2 of a quarter
        assert sent["all-reduce", "network"][1] == pytest.approx(4 * sum(sizes.values()) / each, rel=0.1)
    else:
        assert not any(where == "network" for _, where in sent)
    update = plan_nodes.exchanged(workload, how, ranks, update=True)
    matrices = sum(p.numel() for n, p in model.named_parameters() if group_of(n) == "matrix")
    width = get_compute_dtype("cpu").itemsize
    most = 2 * width * matrices / nodes / each
    assert 0.5 * most < update["all-to-all", "node"][1] < 1.6 * most
    assert (("all-gather", "network") in update) == (nodes == 2)


def stage_one():
    return plan_tables.make_stage(1, TINY)


@pytest.mark.slow
def test_exchanges_are_linear_in_depth():
    """16 layers extended from 4 and 8, against a trace of all."""
    workload, how = stage_one().workload.with_layers(16), Choice(4, True)
    steps = [plan_nodes.step_exchanges(workload, how, Ranks(16, 2), passes=2)]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(plan_nodes, "LAYERS", (16,))
        steps.append(plan_nodes.step_exchanges(workload, how, Ranks(16, 2), passes=2))
    assert steps[0].keys() == steps[1].keys()
    for k in steps[0]:
        assert steps[0][k] == pytest.approx(steps[1][k], rel=0.01)


def test_the_nodes_command(monkeypatch, capsys):
    monkeypatch.setattr(plan, "d32_stages", lambda: [stage_one()])
    monkeypatch.setattr(plan_nodes, "step_exchanges", lambda workload, how, ranks, passes: {
        ("all-gather", "node"): [10, 7e9], ("all-reduce", "network"): [1, 4e9 * (ranks.nodes > 1)]})
    result = plan.main(["--nodes", "1", "8", "--gpus", "8", "--nvlink", "70", "--network", "20", "--price", "4"])
    out = capsys.readouterr().out
    assert "--price has no effect with --nodes" in out and "--gpu-memory" not in out
    assert [round(r["exchange_s"], 6) for r in result.values()] == [0.1, 0.3]
    assert result["stage 1, 64 GPUs"]["rows"] == 4 and "stage 1 on 8 x 8 GPUs" in out
    with pytest.raises(SystemExit):
        plan.main(["--nodes", "2", "--memory"])
    assert "one at a time" in capsys.readouterr().err


# --- bash speedrun.sh d32

def speedrun(tmp_path, flag="--check", **env):
    """Its checks: never without a flag, or a check that wrongly passes would install and download."""
    base = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path / "not/there"), "GPU_PROBE": "seq 8",
            "DISK_PROBE": "echo 5000", "NETWORK_PROBE": "true"}
    return subprocess.run(["bash", ROOT / "speedrun.sh", "d32", flag], env=base | env, capture_output=True, text=True)


def test_d32_stops_early_and_says_why(tmp_path):
    for env, words in [({"GPU_PROBE": "no-such-command"}, "no GPU is found"), ({"GPU_PROBE": "true"}, "no GPU is found"),
                       ({"DISK_PROBE": "echo 12"}, r"has 12 GB of free disk, and 900 GB more are needed"),
                       ({"NETWORK_PROBE": "false"}, "nanochat-d32 and the training data must be downloaded"),
                       ({"NETWORK_PROBE": "false", "DATA": "embedded"}, "nanochat-d32 must be downloaded"),
                       ({"GPU_PROBE": "seq 6"}, r"TOTAL_BATCH=524288 tokens are no multiple of the 98304 of one pass .8 "
                                                r"rows x 2048 x 6 GPUs.: set TOTAL_BATCH=491520"),
                       ({"TOTAL_BATCH": "2048"}, "set TOTAL_BATCH=131072"), ({"BATCH": "all"}, "BATCH=all is no positive")]:
        done = speedrun(tmp_path, **env)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done
        assert re.search(f"^error: .*{words}", done.stderr)
    assert not (tmp_path / "not").exists()


def test_d32_asks_for_no_more_than_it_needs(tmp_path):
    done = speedrun(tmp_path)
    assert done.returncode == 0 and done.stdout == \
        "8 GPUs, 5000 GB of free disk (900 needed), to download: nanochat-d32 and the training data\n"
    base = tmp_path / "not/there/chatsft_checkpoints/d32"
    base.mkdir(parents=True)
    (base / "model_000650.pt").write_bytes(b"")
    done = speedrun(tmp_path, NETWORK_PROBE="false", DATA="embedded", USED_PROBE="echo 400", DISK_PROBE="echo 501")
    assert done.returncode == 0 and "(500 needed)" in done.stdout and "download" not in done.stdout
    assert speedrun(tmp_path, "--typo").returncode == 2


def test_d32_knows_which_data_is_downloaded(tmp_path):
    """By the rule of mixture.parse: what is neither embedded nor a path is the hub's."""
    (tmp_path / "my, own.jsonl").write_text("{}")
    (tmp_path / "chat.jsonl").write_text("{}")
    base = tmp_path / "not/there/chatsft_checkpoints/d32"
    base.mkdir(parents=True)
    (base / "model_000650.pt").write_bytes(b"")
    for data, hub in [(f"{tmp_path}/my, own.jsonl", False), (f"{tmp_path}/chat.jsonl", False), ("~/chat.jsonl", False),
                      (f"0.5*embedded, 0.5* {tmp_path}/chat.jsonl", False), ("0.5*embedded,0.5*~/chat.jsonl", False),
                      ("karpathy/embedded", True), ("0.5*embedded,0.5*karpathy/climbmix-400b-shuffle", True), ("", True)]:
        done = speedrun(tmp_path, NETWORK_PROBE="false", DATA=data, HOME=str(tmp_path))
        assert done.returncode == (2 if hub else 0) and ("the training data" in done.stderr) == hub, (data, done)
        assert not data or hub == any(source != "embedded" and not Path(source.replace("~", str(tmp_path))).exists()
                                      for _, source in mixture.parse(data))


def test_d32_trains_as_long_as_the_first_plan(d32):
    """The script's steps are what the plan's hours buy, to a percent."""
    text = (ROOT / "dev/speedrun_d32.sh").read_text()
    args = types.SimpleNamespace(gpu="H100", mfu=0.4, gpus=8, price=3.0, tokens=None, tokens_per_param=20)
    batch = int(re.search(r"TOTAL_BATCH=\$\{TOTAL_BATCH:-(\d+)\}", text)[1])
    for stage in d32:
        steps = int(re.search(rf"STAGE{stage.number}_STEPS=\$\{{STAGE{stage.number}_STEPS:-(\d+)\}}", text)[1])
        assert steps * batch == pytest.approx(plan_tables.training(stage, args)["tokens_in_first_hours"], rel=0.01)


def test_d32_knows_its_disk(d32):
    text = (ROOT / "dev/speedrun_d32.sh").read_text()
    assert 1 < int(re.search(r"^DISK_GB=(\d+)", text, re.M)[1]) * 1e9 / plan_tables.disk(d32) < 1.1
