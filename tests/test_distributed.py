"""Training over several processes, really sharded (gloo, CPU, fp32): the same steps, and nothing lost when one dies."""
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import pytest
import ranks
import torch
from conftest import randomize
from test_scripts import fails

from nanochat import checkpoint_manager as ckpt
from nanochat import distributed, elastic_step, loss_eval, optim, stages, step_checkpoint, stop
from nanochat.confidence_probe import budget_grid
from nanochat.elastic_step import TAUGHT, ElasticStep
from nanochat.growing import Init, grow
from nanochat.hybrid_gpt import HybridConfig
from nanochat.mixture import prepare_mixture
from nanochat.monitor import read_metrics
from nanochat.step_parts import Share, shares
from nanochat.tokenizer import Tokenizer
from scripts import fractal_train, surgery

CASES = {
    "stage 1, sampled": {"phase": "stage 1", "recipe": "both", "sample": True},
    "stage 1, half of the rows": {"phase": "stage 1", "recipe": "half", "sample": True, "steps": 5},
    "stage 2, sampled": {"phase": "stage 2", "recipe": "both", "sample": True, "steps": 10},
    "all, each level": {"phase": "unfrozen", "recipe": "both", "sample": False, "steps": 10},
    "masked, in passes": {"phase": "unfrozen", "recipe": "both", "sample": True, "masked": True, "passes": 2, "steps": 10},
    "single": {"phase": "unfrozen", "recipe": "single", "sample": True, "steps": 5},
    "every": {"phase": "unfrozen", "recipe": "every", "sample": True, "steps": 5, "student_every": 2},
    "split": {"phase": "unfrozen", "recipe": "split", "sample": True, "steps": 5},
    "lean": {"phase": "stage 1", "recipe": "lean", "sample": True, "steps": 5},
    "lean, masked": {"phase": "unfrozen", "recipe": "lean", "sample": True, "masked": True, "passes": 2, "steps": 5},
    "controls": {"phase": "controls", "recipe": "controls gumbel", "sample": True, "steps": 10},
    "controls, by value": {"phase": "controls", "recipe": "controls value", "sample": True, "steps": 8},
    "full passes": {"phase": "unfrozen", "recipe": None, "sample": False, "steps": 4},
    "drafts": {"phase": "stage 1", "recipe": "both", "sample": True, "steps": 4, "draft_exit": 2},
}


@pytest.fixture(autouse=True)
def fp32(monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("NANOCHAT_DTYPE", "float32")
        ranks.together(2, ranks.several, CASES, out, out=out)
    return {name: torch.load(out / f"{name}.pt") for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_make_the_steps_of_one(two_ranks, name):
    one, two = ranks.train(**CASES[name], path=None), two_ranks[name]
    for step, (a, b) in enumerate(zip(one["losses"], two["losses"], strict=True)):
        a.pop("flops", None), b.pop("flops", None)  # a rank without rows of a pass makes it with one that does not count
        assert a == pytest.approx(b, abs=1e-5, rel=1e-5), step
    assert one["losses"][0]["loss"] != pytest.approx(one["losses"][-1]["loss"], abs=1e-4)
    # both optimizers make whole steps of what is only rounding, where a gradient is zero
    near = sum(torch.isclose(two["state"][k], v, atol=1e-4).sum() for k, v in one["state"].items())
    assert near > 0.95 * sum(v.numel() for v in one["state"].values())


def test_ranks_are_as_good_as_passes_where_nothing_is_drawn(two_ranks):
    one, two = ranks.train(**CASES["full passes"] | {"passes": 2}, path=None), two_ranks["full passes"]
    for a, b in zip(one["losses"], two["losses"], strict=True):
        assert (a["loss"], a["norm"]) == pytest.approx((b["loss"], b["norm"]), abs=1e-5, rel=1e-5)


def test_each_pass_of_a_step_draws_for_itself_on_all_ranks_alike(monkeypatch):
    """Otherwise a step of many passes would know one choice of widths, and one of exits."""
    model, drawn, sample = ranks.start_model("unfrozen")[0], {}, loss_eval.sample_students
    x = torch.randint(64, (4, ranks.T))

    def watched(config, rows, T, starts, *args):
        students = sample(config, rows, T, starts, *args)
        drawn.setdefault(at, []).append((students[0].widths, starts.tolist()))
        return students
    monkeypatch.setattr(elastic_step, "sample_students", watched)
    for rank in range(2):
        monkeypatch.setattr(elastic_step, "get_rank", lambda rank=rank: (rank, 2))
        step = ElasticStep(model, 0, 9, "single")
        for number in range(4):
            for share in shares([x >= 0] * 3):
                at = number, share.number
                step(number, x, x, share)
    assert len(drawn) == 12 and all(one == other for one, other in drawn.values())
    assert len({str(starts) for (_, starts), _ in drawn.values()}) == 12
    assert all(len({str(drawn[number, i][0][0]) for i in range(3)}) > 1 for number in range(4))  # widths


@pytest.mark.parametrize("recipe, passes", [
    (None, [[(4, True)]] * 3),
    ("both", [[(4, True), (1, False), (3, False)]] * 3),
    ("every", [[(4, True), (1, False), (3, False)], [(4, True)], [(4, True), (1, False), (3, False)]]),
    ("half", [[(4, True), (2, False)]] * 3),
    ("lean", [[(2, None), (2, False), (2, True)]] * 3),
    ("split", [[(2, False), (2, True)]] * 3),
    ("single", [[(4, False)]] * 3)])
def test_a_recipe_makes_the_passes_it_promises(recipe, passes, monkeypatch):
    """Rows of each pass, and whether it is a full one (None: without gradients); at widths that are never the top one."""
    monkeypatch.setattr(loss_eval, "sample_levels", lambda levels, n, g: [levels[0]] * n)
    model = ranks.start_model("unfrozen")[0]
    stages.set_trained(model, "unfrozen", gate=recipe in TAUGHT)
    step, seen, hidden = ElasticStep(model, 0, 9, recipe, student_every=2), [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda idx, widths=None, *a: seen.append(
        (len(idx), widths is None if torch.is_grad_enabled() else None)) or hidden(idx, widths, *a))
    x = torch.randint(64, (4, ranks.T))
    for number, want in enumerate(passes):
        losses = step(number, x, x, Share(1.0, 1.0, 1.0))
        flops = losses["flops"]
        assert seen == want, number
        parts = {k[:-1]: losses[k] for k in losses if k.endswith(":")}
        if recipe in ("lean", "split", "single"):
            halves = {"narrow_8": 0.5, "loss_32": 0.5, "exits": 0.5}
            assert parts == ({"narrow_8": 1.0} if recipe == "single" else halves)
            assert float(losses["loss"]) == pytest.approx(sum(float(losses[k]) for k in parts if k != "exits"))
        full = sum(step.flops(None, n * ranks.T) if whole else step.looking_flops() * n * ranks.T
                   for n, whole in seen if whole is not False)
        narrow = sum(step.flops(model.config.levels[0], n * ranks.T) for n, whole in seen if whole is False)
        probed = sum(n * loss_eval.PROBED for n, whole in seen if whole) if recipe else 0
        assert ("exits" in losses) == (probed > 0)
        flops -= step.exit_flops(probed)
        assert full + narrow <= flops <= full + 2 * narrow  # one row of four is a level wider from somewhere on
        seen.clear()


@pytest.mark.parametrize("recipe", ["lean", "split"])
def test_what_the_narrow_half_learns(recipe, monkeypatch):
    """The text, with lean by half; the other half is what the whole model says of these rows."""
    monkeypatch.setattr(loss_eval, "sample_levels", lambda levels, n, g: [levels[0]] * n)
    model = ranks.start_model("unfrozen")[0]
    stages.set_trained(model, "unfrozen", gate=False)
    x = torch.randint(64, (4, ranks.T), generator=torch.Generator().manual_seed(1))
    y = torch.where(torch.arange(ranks.T) < 3, -1, x.roll(-1, 1))
    seen, hidden = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda idx, *a: seen.append((idx, *a[:2])) or hidden(idx, *a))
    losses = ElasticStep(model, 5, 9, recipe)(0, x, y, Share(1.0, 1.0, 1.0))
    model.hidden = hidden
    idx, widths, exits = next(s for s in seen if s[1] is not None)
    assert torch.equal(idx, x[2:])
    with torch.no_grad():
        student, teacher = (loss_eval.head_logits(hidden(x[2:], *a), model.lm_head.weight, 15.0).log_softmax(-1)
                            for a in ((widths, exits), ()))
    live = y[2:] >= 0
    text = -student.gather(-1, y[2:].clamp(min=0)[..., None])[..., 0][live].mean()
    kl = (teacher.exp() * (teacher - student)).sum(-1)[live].mean()
    want = (text + kl) / 2 if recipe == "lean" else text
    assert float(losses["narrow_8"]) == pytest.approx(float(want) / 2, rel=1e-4)


@pytest.mark.parametrize("recipe", ["lean", "both"])
def test_exits_weigh_what_is_asked_for(recipe):
    model = ranks.start_model("unfrozen")[0]
    stages.set_trained(model, "unfrozen", gate=recipe == "both")
    x, got = torch.randint(64, (4, ranks.T), generator=torch.Generator().manual_seed(1)), []
    for weight in (0.0, 0.1, 0.3):
        model.zero_grad()
        losses = ElasticStep(model, 5, 9, recipe, exit_weight=weight)(0, x, x.roll(-1, 1), Share(1.0, 1.0, 1.0))
        assert ("exits" in losses) == bool(weight)
        got.append(model.transformer.h[0].mlp.c_fc.weight.grad.clone())
    none, some, more = got
    torch.testing.assert_close(more - none, 3 * (some - none), atol=1e-6, rtol=1e-3)
    assert float((some - none).norm()) > 1e-3 * float(none.norm())


def test_a_narrow_pass_of_all_rows_learns_from_text_and_teacher():
    """Recipe both, each level in turn; and a draft, which learns from the teacher alone."""
    model = ranks.start_model("unfrozen")[0]
    stages.set_trained(model, "unfrozen", gate=True)
    x = torch.randint(64, (4, ranks.T), generator=torch.Generator().manual_seed(1))
    y, leave = x.roll(-1, 1), model.config.exit_points[0]
    losses = ElasticStep(model, 5, 9, "both", sample=False, levels=(8, 32), draft_exit=leave)(0, x, y, Share(1.0, 1.0, 1.0))
    with torch.no_grad():
        teacher, narrow, draft = (model(x, **how).log_softmax(-1)
                                  for how in ({}, {"widths": 8}, {"exits": torch.full_like(x, leave)}))
    kl, drafted = ((teacher.exp() * (teacher - student)).sum(-1).mean() for student in (narrow, draft))
    text = -narrow.gather(-1, y[..., None]).mean()
    want = {"narrow_8": (text + kl) / 4, "narrow_draft": drafted / 2}  # each is half of what students learn
    assert {k: float(losses[k]) for k in want} == {k: pytest.approx(float(v), rel=1e-4) for k, v in want.items()}


@pytest.mark.parametrize("world", [1, 2])
def test_what_is_old_stays_bit_identical(two_ranks, world):
    """Muon and AdamW, with weight decay, sharded or not; and what is new moves."""
    case = CASES["stage 2, sampled"]
    after = (two_ranks["stage 2, sampled"] if world == 2 else ranks.train(**case, path=None))["state"]
    source, boxes = ranks.start_model("stage 2")
    before = source.state_dict()
    assert {"transformer.wte.weight", "lm_head.weight", "transformer.h.0.attn.c_q.weight", "transformer.h.1.mlp.c_fc.weight",
            "value_embeds.2.weight"} <= boxes.keys()
    for name, was in before.items():
        if name.startswith("predictor."):
            assert torch.equal(after[name], was)
            continue
        old = torch.zeros_like(was, dtype=torch.bool)
        for box in boxes.get(name, ()):
            old[box] = True
        assert torch.equal(after[name][old], was[old]), name
        new = ~old
        assert not new.any() or not torch.equal(after[name][new], was[new]), name
        assert old.any() == (".mamba." not in name and not name.startswith("gate.")), name
    base = {n for n in before if n.startswith("transformer.h.0.") or n in ("transformer.wte.weight", "lm_head.weight")}
    stage1 = two_ranks["stage 1, sampled"]["state"]
    first = ranks.start_model("stage 1")[0].state_dict()
    assert all(torch.equal(stage1[n], first[n]) for n in base if "ve_gate" not in n)


def test_frozen_tensors_hold_no_optimizer_state():
    model = ckpt.build_model(HybridConfig.preset("d32"), "meta")
    stages.set_trained(model, "stage 1", gate=True)
    held = {name for o in optim.setup_optimizers(model) for g in o.param_groups for name in g["param_names"]}
    assert held == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any(n.startswith(("transformer.wte", "lm_head", "transformer.h.0.attn.c_", "transformer.h.0.mlp"))
                   for n in held)
    needed, everything = optim.state_bytes(model)
    # Muon holds 4 bytes a parameter, AdamW 8; frozen are 1.611 B of matrices, embedding and head of 0.134 B each, predictor
    assert everything - needed == 4 * 1_610_612_736 + 8 * (2 * 134_217_728 + 707_264)
    assert 1 - needed / everything == pytest.approx(0.242, abs=0.001)


@pytest.mark.parametrize("world, nodes", [(2, 1), (3, 1), (4, 2)])
def test_muon_sharded_is_muon_whole_and_each_matrix_moves_once(tmp_path, world, nodes):
    ranks.together(world, ranks.orthogonalized, world, nodes, tmp_path / "o.pt", out=tmp_path)
    for shape, (got, moved, alike) in torch.load(tmp_path / "o.pt").items():
        whole = torch.randn(5, *shape, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(got, optim.orthogonalize(whole), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(alike, optim.orthogonalize(whole), atol=2e-5, rtol=1e-4)
        assert len(moved) == 2  # one exchange there, one back, for all matrices of a shape
        if shape[0] % (world // nodes) == 0:  # with as many rows on each rank, the part that is not at home already
            share = 1 - 1 / (world // nodes)
            assert moved == pytest.approx([5 * shape[0] * shape[1] * share] * 2)


def test_nodes_hold_copies_of_the_shards(tmp_path):
    case = CASES["stage 1, sampled"] | {"steps": 4}
    ranks.together(4, ranks.several, {"hsdp": case | {"nodes": 2}}, tmp_path, out=tmp_path)
    one, four = ranks.train(**case, path=None), torch.load(tmp_path / "hsdp.pt")
    for a, b in zip(one["losses"], four["losses"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a["norm"] == pytest.approx(b["norm"], abs=1e-5)


def test_an_evaluation_gathers_weights_once(tmp_path):
    ranks.together(2, ranks.evaluated, tmp_path / "seen.pt", out=tmp_path)
    losses, gathers = zip(*torch.load(tmp_path / "seen.pt"))
    assert len(set(losses)) == 1
    assert gathers[0] == gathers[1] == gathers[3] > 3 and gathers[2] == 0


def test_checkpointing_and_compilation_change_nothing():
    case = {"phase": "stage 1", "recipe": "both", "sample": False, "steps": 3}
    plain = ranks.train(**case, path=None)
    for options in ({"gradient_checkpointing": True}, {"gradient_checkpointing": True, "compile": True, "backend": "eager"}):
        torch._dynamo.reset()
        other = ranks.train(**case, path=None, **options)
        for a, b in zip(plain["losses"], other["losses"], strict=True):
            assert a == pytest.approx(b, abs=1e-6, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The script, interrupted in every way

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base dir with a corpus, a small hybrid as surgery leaves it, and runs of it by two ranks, one never interrupted."""
    home = tmp_path_factory.mktemp("home")
    (home / "docs").mkdir()
    text = "".join(f"Line {i}: {'abcdefgh'[i % 8] * (i % 5)} is {i * i}, said {['Ann', 'Bob', 'Cy'][i % 3]}.\n"
                   for i in range(4000))
    for i in range(40):
        (home / "docs" / f"{i}.txt").write_text(text[i * 1000:(i + 1) * 1000])
    tokenizer = Tokenizer.train_from_iterator([text[:50000]], 300)
    config = replace(ranks.TINY, vocab_size=300)
    ckpt.save_export(home / "hybrid_checkpoints" / "t_32", randomize(ckpt.build_model(config)), tokenizer, {"tag": "t"})
    return home


@pytest.fixture
def cwd(home, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    shutil.copytree(home / "hybrid_checkpoints", tmp_path / "hybrid_checkpoints")
    return tmp_path


def flags(home, cwd, world=1, *more):
    """A batch of 12 rows on any number of ranks."""
    return ["--checkpoint", str(cwd / "hybrid_checkpoints" / "t_32"), "--data", str(home / "docs"), "--matryoshka",
            "--sample-dim", "--device-batch-size", str(12 // world), "--total-batch-size", str(12 * 32), "--eval-tokens",
            "384", "--eval-every", "-1", "--log-every", "1", "--save-every", "2", "--num-iterations", "7", *more]


def losses(folder):
    return {e["step"]: e["loss"] for e in read_metrics(folder) if "loss" in e}


def same_files(a, b, names=("model.pt", "optim.pt")):
    for name in names:
        x, y = ckpt.load_torch(a / name), ckpt.load_torch(b / name)
        if name == "optim.pt":
            x, y = ({(n, k): v for s in tree for i, n in ckpt.optimizer_names(s).items()
                     for k, v in s["state"].get(i, {}).items()} for tree in (x, y))
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x), name


def test_a_killed_and_a_stopped_run_lose_nothing(home, cwd, tmp_path, capsys):
    folder, argv = cwd / "fractal_checkpoints" / "t_32", flags(home, cwd, 2)
    ranks.together(2, ranks.fractal, argv, out=tmp_path / "log" / "whole")
    kept = cwd / "whole"
    folder.rename(kept)

    codes = ranks.finish(ranks.start(2, ranks.fractal, argv, ("kill in save", 1, 4), out=tmp_path / "log" / "killed"))
    assert codes[1] == -signal.SIGKILL and codes[0] != 0
    assert step_checkpoint.steps(folder) == [2] and (folder / ".step_000004.tmp").is_dir()
    shutil.copytree(folder, cwd / "on_other_ranks")

    codes = ranks.finish(ranks.start(2, ranks.fractal, argv, ("SIGTERM", 1, 4), out=tmp_path / "log" / "stopped"))
    assert codes == [128 + signal.SIGTERM] * 2 and step_checkpoint.steps(folder) == [4, 5]  # the step under way is saved
    log = (tmp_path / "log" / "stopped" / "0.log").read_text()
    assert "after step 2" in log and "stopped by SIGTERM: step 5 is saved" in log

    ranks.together(2, ranks.fractal, argv, out=tmp_path / "log" / "resumed")
    assert losses(folder) == losses(kept)
    same_files(folder, kept)
    assert step_checkpoint.steps(folder) == [6, 7] and not list(folder.glob(".step*"))
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")

    # saved on two, resumed on one and on three: the same weights and moments
    for world in (1, 3):
        shutil.rmtree(folder)
        shutil.copytree(cwd / "on_other_ranks", folder)
        ranks.together(world, ranks.fractal, flags(home, cwd, world, "--export"), out=tmp_path / "log" / f"export{world}")
        folder.rename(cwd / f"exported{world}")
        shutil.copytree(cwd / "on_other_ranks", folder)
        ranks.together(world, ranks.fractal, flags(home, cwd, world), out=tmp_path / "log" / f"on{world}")
        assert "goes on behind the furthest" in (tmp_path / "log" / f"on{world}" / "0.log").read_text()
        assert list(losses(folder)) == list(range(7)) and losses(folder)[1] == losses(kept)[1]
    same_files(cwd / "exported1", cwd / "exported3")

    # whoever exported it, the position is that of both ranks, and a phase behind it goes on there
    states = [step_checkpoint.read_rank(cwd / "on_other_ranks" / "step_000002", rank)["loader"] for rank in range(2)]
    for world in (1, 3):
        assert ckpt.load_json(cwd / f"exported{world}" / "config.json")["loader"] == states
    capsys.readouterr()
    fractal_train.main([*flags(home, cwd), "--checkpoint", str(cwd / "exported1"), "--unfreeze", "--num-iterations", "1"])
    assert f"the data goes on behind the {2 * 12 * 32:,} tokens" in capsys.readouterr().out


def test_ctrl_c_saves_and_a_later_one_ends_at_once(home, cwd, capsys, monkeypatch):
    folder, call = cwd / "fractal_checkpoints" / "t_32", ElasticStep.__call__
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)  # a terminal: with a bar
    fractal_train.main(flags(home, cwd))
    out = capsys.readouterr()
    assert "7/7" in out.err and "step     6/7 | " in out.out
    folder.rename(cwd / "whole")

    def interrupted(self, step, *args, times=1):
        if step == 3:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        return call(self, step, *args)
    monkeypatch.setattr(ElasticStep, "__call__", interrupted)
    with pytest.raises(SystemExit) as e:
        fractal_train.main(flags(home, cwd))
    assert e.value.code == 128 + signal.SIGINT and "stopped by SIGINT: step 4 is saved" in capsys.readouterr().out
    assert step_checkpoint.steps(folder) == [2, 4]
    monkeypatch.setattr(ElasticStep, "__call__", call)
    fractal_train.main(flags(home, cwd))
    same_files(folder, cwd / "whole")
    shutil.rmtree(folder)
    monkeypatch.setattr(stop, "GRACE", -1)
    monkeypatch.setattr(ElasticStep, "__call__", partialmethod(interrupted, times=2))
    with pytest.raises(SystemExit):
        fractal_train.main(flags(home, cwd))
    assert step_checkpoint.steps(folder) == [2] and "is saved" not in capsys.readouterr().out


def test_controls_of_a_sharded_model_get_the_prices_of_a_whole_one(home, cwd, tmp_path):
    """Their own training is the same to rounding (above); the prices come from passes of the sharded model behind it."""
    argv = [a for a in flags(home, cwd, 2) if a not in ("--matryoshka", "--sample-dim")] + ["--controls"]
    ranks.together(2, ranks.fractal, argv, out=tmp_path / "log" / "two")
    folder = cwd / "fractal_checkpoints" / "t_32_auto"
    model, info = ckpt.load(folder).model, ckpt.load_json(folder / "config.json")
    tokenizer = ckpt.load_tokenizer(folder, model.config, {})
    whole = fractal_train.uncalibrated(model, tokenizer, prepare_mixture(str(home / "docs")))
    assert info["calibration"]["prices"] == [pytest.approx(p, abs=1e-4) for p in whole["prices"]]
    assert len(whole["prices"]) == len(budget_grid(model)) and any(p for _, p in whole["prices"])


def test_torchrun_restarts_what_died(home, cwd, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(f"""
        import os, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import ranks
        ranks.fractal(sys.argv[1:], ("SIGKILL", 1, 5) if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else None)
    """))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1",
                           "--standalone", str(program), *flags(home, cwd, 2)], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "after step 4" in done.stdout and done.stdout.count("wrote ") == 1
    assert list(losses(cwd / "fractal_checkpoints" / "t_32")) == list(range(7))


@pytest.fixture
def trained(home, cwd, capsys):
    """A finished run in this process."""
    fractal_train.main(flags(home, cwd))
    capsys.readouterr()
    return cwd / "fractal_checkpoints" / "t_32"


@pytest.mark.parametrize("damage", ["bit", "truncated", "meta", "missing"])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(home, cwd, trained, capsys, damage):
    shutil.copytree(trained, cwd / "kept")
    newest = trained / "step_000007"
    file = newest / {"meta": "meta.json", "missing": "rank_0.json"}.get(damage, "__0_0.distcp")
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    else:
        data[len(data) // 2] ^= 4
        file.write_bytes(data[:len(data) // 2] if damage == "truncated" else data)
    fractal_train.main(flags(home, cwd))
    out = capsys.readouterr().out
    assert "step_000007 is damaged" in out and "resuming" in out and "after step 6" in out
    assert step_checkpoint.steps(trained) == [6, 7] and (trained / "damaged_000007").is_dir()
    same_files(trained, cwd / "kept")


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_a_hostile_checkpoint_runs_no_code(home, cwd, trained, capsys, monkeypatch):
    monkeypatch.chdir(cwd)
    path = trained / "step_000007"
    genuine = pickle.loads((path / ".metadata").read_bytes())
    genuine.storage_data[next(iter(genuine.storage_data))].relative_path = "../../../secret"
    for name, made, word in (("code", pickle.dumps(Evil()), "system"), ("path", pickle.dumps(genuine), "outside its folder"),
                             ("rubbish", b"\x80\x04garbage", "refused")):
        (path / ".metadata").write_bytes(made)
        meta = ckpt.load_json(path / "meta.json")  # an attacker makes the sums fit
        del meta["crc32"]
        meta["files"][".metadata"] = list(step_checkpoint._sum(path / ".metadata"))
        ckpt.save_json({**meta, "crc32": step_checkpoint._crc(meta)}, path / "meta.json")
        fails(capsys, fractal_train.main, flags(home, cwd), ".metadata is refused", word, "--fresh")
        assert not (cwd / "evil").exists(), name


def test_steps_that_are_not_finite_are_skipped_and_in_the_end_stop_the_run(home, cwd, capsys, monkeypatch):
    call, bad = ElasticStep.__call__, {2, 4}

    def spoilt(self, step, *args):
        out = call(self, step, *args)
        if step in bad:
            next(p for p in self.model.parameters() if p.grad is not None).grad.view(-1)[0] = float("nan")
        return out
    monkeypatch.setattr(ElasticStep, "__call__", spoilt)
    figures = fractal_train.main(flags(home, cwd))
    out = capsys.readouterr().out
    assert figures["skipped"] == 2 and "step 2 is skipped" in out and "2 in all" in out
    assert all(p.isfinite().all() for p in ckpt.load(cwd / "fractal_checkpoints" / "t_32").model.parameters())
    assert len(losses(cwd / "fractal_checkpoints" / "t_32")) == 7
    bad.update(range(3, 9))
    fails(capsys, fractal_train.main, flags(home, cwd, 1, "--fresh", "--max-skipped-steps", "3"), "3 steps in a row, to 4",
          "gradients of 1 tensors", "--matrix-lr")
    assert step_checkpoint.steps(cwd / "fractal_checkpoints" / "t_32") == [2, 4]


def full_disk(argv):
    import resource
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    save, n = step_checkpoint.Saver.save, 60_000

    def limited(self, step, *args):
        if step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))
        save(self, step, *args)
    step_checkpoint.Saver.save = limited
    fractal_train.main(argv)


def test_a_full_disk_stops_with_a_line_and_keeps_what_was_there(home, cwd, tmp_path):
    """A limit on file size stands in for the full disk."""
    codes = ranks.finish(ranks.start(1, full_disk, flags(home, cwd), out=tmp_path / "log"))
    log = (tmp_path / "log" / "0.log").read_text()
    assert codes == [2] and log.count("error:") == 1 and "no room left to write" in log and "same command again" in log, log
    folder = cwd / "fractal_checkpoints" / "t_32"
    assert step_checkpoint.steps(folder) == [2] and not list(folder.glob(".step*"))
    assert step_checkpoint.find_whole(folder)[0] == 2


def test_nobody_gives_up_on_a_long_write(home, cwd, tmp_path, monkeypatch):
    """Hours, and a barrier after each long write of rank 0, so that the others wait in no collective of the GPUs."""
    ranks.together(2, ranks.waits, tmp_path / "w.pt", out=tmp_path / "log")
    timeouts, waited = torch.load(tmp_path / "w.pt")
    assert min(timeouts) >= 3600 and waited > 1.5
    calls = []

    def noting(name, function):
        return lambda *args: (calls.append(name), function(*args))[1]
    for owner, name in ((ckpt, "save_optimizers"), (ckpt, "save_export"), (distributed, "barrier")):
        monkeypatch.setattr(owner, name, noting(name, getattr(owner, name)))
    fractal_train.main(["--checkpoint", str(cwd / "hybrid_checkpoints/t_32"), "--num-iterations", "1", "--data",
                        str(home / "docs"), "--device-batch-size", "2", "--eval-tokens", "64", "--eval-every", "-1"])
    assert calls == ["save_optimizers", "barrier", "save_export", "barrier"]


def test_stages_are_known_by_where_a_checkpoint_comes_from(home, cwd, capsys):
    short = ["--num-iterations", "1", "--data", str(home / "docs"), "--device-batch-size", "2", "--total-batch-size", "64",
             "--eval-tokens", "64", "--checkpoint"]
    fractal_train.main([*short, str(cwd / "hybrid_checkpoints/t_32"), "--energy-lambda", "2", "--unembedding-lr", "0.1",
                        "--recipe", "half", "--student-every", "3", "--exit-weight", "0.1"])
    out = capsys.readouterr().out
    assert "stage 1, by the checkpoint's provenance" in out and "less than if everything were trained" in out
    for flag in ("--energy-lambda", "--unembedding-lr", "--recipe", "--student-every", "--exit-weight"):
        assert f"note: {flag} has no effect in phase stage 1" in out
    surgery.main(["--expand-from=32", "--new-dim=48", "--tag", "t"])
    grown = cwd / "hybrid_checkpoints/t_48"
    fails(capsys, fractal_train.main, [*short, str(grown), "--stage", "1"], "--stage 1 does not fit", "48")
    fractal_train.main([*short, str(grown), "--expanded-dim", "48"])
    assert "stage 2, by the checkpoint's provenance" in capsys.readouterr().out
    info = ckpt.load_json(grown / "config.json")
    before, after = (ckpt.load(p).model.state_dict() for p in (grown, cwd / "fractal_checkpoints/t_48"))
    for name, boxes in stages.frozen_boxes(HybridConfig(**info["config"]), info["provenance"]).items():
        assert all(torch.equal(before[name][box], after[name][box]) for box in boxes)
    surgery.main(["--expand-from=48", "--new-dim=64", "--tag", "t"])
    last = ckpt.load_json(cwd / "hybrid_checkpoints/t_64/config.json")
    assert stages.stage_of(HybridConfig(**last["config"]), last["provenance"]) == 3
    last["provenance"]["old_config"]["n_layer"] = 3
    with pytest.raises(ValueError, match=r"its config\.json was changed"):
        stages.frozen_boxes(HybridConfig(**last["config"]), last["provenance"])
    with pytest.raises(ValueError, match=r"does not say what it was grown from.*--unfreeze"):
        stages.frozen_boxes(HybridConfig(**last["config"]), {"surgery": "grow"})


def test_growth_says_which_entries_are_old():
    """Filled with ones before growth and with nothing else, the boxes are where the ones are: also in fused matrices."""
    from nanochat.growing import old_boxes
    model = ckpt.build_model(ranks.TINY)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1)
    grown = grow(model, 48, Init("zero"))
    for name, boxes in old_boxes(model.config, grown.config).items():
        old = torch.zeros_like(grown.get_parameter(name), dtype=torch.bool)
        for box in boxes:
            assert not old[box].any()
            old[box] = True
        assert (grown.get_parameter(name)[old] == 1).all() and old.sum() == model.get_parameter(name).numel(), name
        if name.endswith((".in_proj.weight", "c_q.weight", "lm_head.weight")):
            assert (grown.get_parameter(name)[~old] == 0).all(), name
