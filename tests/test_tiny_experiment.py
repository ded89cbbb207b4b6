"""The tiny experiment: its tasks are right and split, its judge judges as generating does, its parts run and report."""
import json
import random
from dataclasses import replace

import pytest
import torch
from conftest import randomize

from nanochat.confidence_probe import Controls
from nanochat.engine import Engine, prepare_inference
from tiny_experiment import __main__ as main
from tiny_experiment import report, run
from tiny_experiment.tasks import DIFFICULTIES, TASKS, Encoder, draw_many, make_tokenizer, split_of

SIZES = run.Settings(steps=3, students_from=1, rows=16, pieces=4, control_steps=2, control_rows=16, calibration=100, test=30,
                     swept=15, timed=2, processes=1, delta=0.05)


@pytest.fixture
def encoder():
    return Encoder(make_tokenizer())


def answer_of(prompt):
    """By other means than the generator's."""
    kind, _, rest = prompt.rstrip("=").partition(" ")
    if kind == "copy":
        return rest
    if kind == "twice":
        return rest * 2
    if kind == "count":
        word, letter = rest.split()
        return str(sum(c == letter for c in word))
    if kind == "len":
        return str(len(rest))
    if kind == "flip":
        return str(int(rest) + int("".join(reversed(rest))))
    if kind == "sum":
        return str(sum(int(c) for c in rest))
    return str(eval(kind))


def test_answers_are_right_and_thirds_equal():
    drawn = draw_many(0, 900, "train")
    assert all(answer_of(i.prompt) == i.answer for i in drawn)
    assert [sum(i.difficulty == d for i in drawn) for d in DIFFICULTIES] == [300] * 3
    assert {i.task for i in drawn} == {t for group in TASKS.values() for t in group}
    assert draw_many(0, 900, "train") == drawn != draw_many(1, 900, "train")


def test_splits_never_overlap():
    sets = {s: {i.prompt for i in draw_many(3, 3000, s)} for s in ("train", "test", "calibration", "controls")}
    for name, prompts in sets.items():
        assert {split_of(p) for p in prompts} == {name}
    rng = random.Random(0)
    for group in TASKS.values():  # every task has instances in every split
        for make in group.values():
            assert {split_of(make(rng)[0]) for _ in range(400)} == {"train", "test", "calibration", "controls"}


def test_held_out_questions_differ_and_every_part_has_the_same_tasks():
    """The smallest family runs out, evenly; the calibration's first third, which is for tuning, is like the rest."""
    calibration, test = draw_many(0, 4500, "calibration"), draw_many(0, 2250, "test")
    for drawn in (calibration, test):
        assert len(set(drawn)) == len(drawn) and [i.difficulty for i in drawn[:3]] == list(DIFFICULTIES)
    for part in (calibration[:1500], calibration[1500:], test):
        assert 0.02 < sum(i.task in ("flip", "digits") for i in part) / len(part) < 0.05
    assert sum(i.task == "flip" for i in test) < 10


def test_only_answers_are_supervised(encoder):
    instances = draw_many(0, 12, "train")
    x, y, starts = encoder.batch(instances)
    for row, targets, n, i in zip(x, y, starts, instances):
        text = encoder.prompt(i) + encoder.answer(i)
        assert len(encoder.prompt(i)) == n and row[:len(text) - 1].tolist() == text[:-1]
        assert targets[targets >= 0].tolist() == encoder.answer(i)
        assert (targets[:n - 1] == -1).all() and targets[n - 1] == encoder.answer(i)[0]


def trained(encoder):
    """A model that has seen a little, and whose controls decide this and that."""
    model, _, _ = run.train(0, SIZES)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.predictor.out_weight, std=1.0)
    prepare_inference(model, "cpu", torch.float32)
    return model


def test_judging_equals_generating(encoder, monkeypatch):
    """On answers that the model gives itself, so that they are right by definition; costs are those of the traces."""
    model = trained(encoder)
    prompts = draw_many(0, 24, "test")
    engine = Engine(model, encoder.tokenizer)

    def control():  # a score that a barely trained gate cannot be: all actions occur
        return Controls(model, 0.8, 0.6, 0.4, {"prices": [[0.8, 1.0]]},
                        score=lambda i, x: (9 * x[..., :2].sum(-1) + i).sin() / 2 + 0.5)
    out = [[] for _ in prompts]
    for pairs in engine.stream([encoder.prompt(i) for i in prompts], 5, mode="auto", temperature=0, control=control()):
        for r, token in pairs:
            out[r].append(token)

    class Own(Encoder):  # the answers as they were generated, without an end
        def answer(self, instance):
            return out[prompts.index(instance)]
    judge = run.Judge(model, Own(encoder.tokenizer), prompts)
    monkeypatch.setattr(run.Judge, "PIECE", 10)
    result = judge(control=lambda _: control())
    assert result["right"].all()
    flops = [trace.flops(model)["generated"] for trace in engine.traces]
    torch.testing.assert_close(result["flops"], torch.tensor(flops, dtype=torch.float64))
    depths = [[d for d, _ in trace.steps] for trace in engine.traces]
    assert [row[at].tolist() for row, at in zip(result["depth"], judge.answer)] == depths
    assert len({d for row in depths for d in row}) > 2


def test_two_processes_train_as_one(encoder):
    """One step of the matrices; Adam's first step is the sign of the gradient, which rounding decides where it is zero."""
    sizes = replace(SIZES, steps=1, control_steps=0)
    one, two = run.train(0, sizes)[0], run.train_in_parallel(0, replace(sizes, processes=2), None)[0]
    start, moved = run.make_model(encoder, 0), 0
    for (name, a), b, c in zip(one.named_parameters(), two.parameters(), start.parameters()):
        if name.startswith("transformer.h.") and a.ndim == 2:
            torch.testing.assert_close(a, b, atol=5e-4, rtol=0)
            moved += bool((a - c).abs().max() > 2e-3)
    assert moved >= 12  # the writers into the residual stream, zero until now; the rest gets gradient from here on


def test_the_gate_in_pieces_is_the_gate_in_one(encoder, monkeypatch):
    model = randomize(run.make_model(encoder, 0))
    judge, seen = run.Judge(model, encoder, draw_many(0, 30, "test")), []
    for piece in (7, 1000):
        monkeypatch.setattr(run.Judge, "PIECE", piece)
        seen.append(run.examine_gate(judge, 0.8, []))
    for name in ("loss", "brier", "rate", "ece"):
        assert seen[0][name] == pytest.approx(seen[1][name], rel=1e-4)
    assert sum(seen[0]["confusion"].values()) == sum(seen[1]["confusion"].values()) > 100
    assert 0 < seen[0]["rate"] < 1


def test_every_part_runs_and_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run.Settings, "quick", classmethod(lambda cls: SIZES))
    result = main.main(["--quick", "--out", str(tmp_path), "--seeds", "2"])
    assert {p.name for p in tmp_path.iterdir()} == {"report.json", "report.md", "accuracy_flops.png", "controls.png",
                                                   "traces.png", "model_0", "model_1"}
    written = json.loads((tmp_path / "report.json").read_text())
    for key in ("exact_match", "exit_rate", "flops_saved", "wall_speedup", "gate_loss", "ece", "mean_width", "mean_depth",
                "claims"):
        assert key in written
    assert len(written["gate_loss"]) == 2 and set(written["exact_match"]["adaptive"]) == {"all", *DIFFICULTIES}
    printed = capsys.readouterr().out
    assert all(c["claim"] in printed for c in result["claims"]) and "FAIL" in printed


def test_a_claim_fails_when_its_figure_does():
    """The verdicts follow the figures: the same report with one figure changed."""
    curve = [{"flops": f, "all": a, "easy": a, "medium": a, "hard": a} for f, a in ((0.3, 0.9), (1.0, 1.0))]
    poor = [{**p, "all": p["all"] - 0.5} for p in curve]
    good = {"seed": 0, "exit_rate": 0.8, "spent": {"generated": 0.3, "all": 0.5},
            "gate_first": {"brier": 0.25, "loss": 0.7},
            "gate": {"brier": 0.02, "base_brier": 0.1, "loss": 0.1, "ece": 0.01},
            "hard_minus_easy": {k: {"mean": 1.0, "low": 0.5} for k in ("depth", "width")},
            "exact_match": {n: {"all": 0.97, "easy": 1.0, "medium": 0.98, "hard": 0.9} for n in ("full", "adaptive")},
            "wall": {"speedup": 2.0, "whole_speedup": 1.9}, "promise": {"failures": 3},
            "curves": {"gate": curve, "random": poor, "change": poor, "softmax": poor},
            "static": {k: dict(enumerate(poor)) for k in ("width", "depth", "both")}}
    verdicts = report.claims([good])
    assert all(c["pass"] for c in verdicts)
    for change, word in (({"exit_rate": 0.7}, "exit early"),
                         ({"wall": {"speedup": 1.7, "whole_speedup": 2.0}}, "behind the first"),
                         ({"wall": {"speedup": 2.0, "whole_speedup": 1.7}}, "wall-clock"),
                         ({"spent": {"generated": 0.45, "all": 0.5}}, "60 %"), ({"promise": {"failures": 17}}, "promise"),
                         ({"curves": {**good["curves"], "softmax": curve, "gate": poor}}, "softmax")):
        failed = [c["claim"] for c in report.claims([good | change]) if not c["pass"]]
        assert any(word in c for c in failed) and len(failed) < len(verdicts)


@pytest.mark.parametrize("args", [["--seeds", "0"], ["--steps", "0"]])
def test_bad_options_are_named(args, capsys):
    with pytest.raises(SystemExit) as e:
        main.main(args)
    assert e.value.code == 2 and "must be at least 1" in capsys.readouterr().err


def test_difference_knows_its_error():
    g = random.Random(0)
    apart = run.difference([g.gauss(1, 1) for _ in range(400)], [g.gauss(0, 1) for _ in range(400)])
    same = run.difference([g.gauss(0, 1) for _ in range(400)], [g.gauss(0, 1) for _ in range(400)])
    assert apart["low"] > 0.5 and same["low"] < 0 < apart["mean"]
