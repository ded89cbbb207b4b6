"""The campaign finds what it is there to find, runs for a while, and the page about it names tests that exist."""
import ast
import re
from pathlib import Path

import campaign
import pytest
import torch

ROOT = Path(__file__).parents[1]


def test_the_page_names_tests_that_exist():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs/reliability.md").read_text())
    assert len(named) > 20
    for file, name in named:
        functions = {node.name for node in ast.parse((ROOT / "tests" / file).read_text()).body
                     if isinstance(node, ast.FunctionDef)}
        assert name in functions, f"{file} has no {name}"


def test_one_bit_makes_another_content(tmp_path):
    path, t = tmp_path / "model.pt", torch.zeros(1000)
    torch.save({"w": t}, path)
    before = campaign.content(path)
    torch.save({"w": t.clone()}, path)
    assert campaign.content(path) == before
    t.view(torch.int32)[500] ^= 1
    torch.save({"w": t}, path)
    assert campaign.content(path) != before


def made_up(tmp_path, monkeypatch, resumed: int, rows: list[str]):
    """A trial of two attempts: the first made steps 0 to 5, the second went on after step `resumed`, by `rows`."""
    trial = campaign.Trial.__new__(campaign.Trial)
    trial.logs = tmp_path
    monkeypatch.setattr(campaign, "STEPS", resumed + len(rows))
    first = [f"a{i} b{i}" for i in range(6)]
    for name, text, lines in (("1", "", first), ("2", f"resuming x after step {resumed}\n", rows)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.log").write_text(text)
        (tmp_path / name / "rows.0").write_text("\n".join(lines) + "\n")
    return sorted(trial.rows_that_count())


def test_rows_count_up_to_where_the_next_attempt_goes_on(tmp_path, monkeypatch):
    assert made_up(tmp_path, monkeypatch, 2, ["a2 b2", "c d"]) == ["a0", "a1", "a2", "b0", "b1", "b2", "c", "d"]


def test_a_row_that_is_read_twice_is_seen(tmp_path, monkeypatch):
    assert made_up(tmp_path, monkeypatch, 2, ["a1 b2"]).count("a1") == 2


def test_what_is_not_as_it_must_be_is_wrong(tmp_path):
    """A weight that is one bit off, and a file that is left."""
    trial = campaign.Trial.__new__(campaign.Trial)
    trial.kind, trial.world, trial.base, trial.counts = "train", 2, tmp_path, campaign.Counter()
    trial.out.mkdir(parents=True)
    torch.save({"w": torch.zeros(10)}, trial.out / "model.pt")
    trial.references = {("train", 2): trial.made()}
    trial.compare()
    (trial.out / ".model.pt.abc.tmp").touch()
    with pytest.raises(campaign.Wrong, match="abc"):
        trial.compare()
    torch.save({"w": torch.full((10,), 1e-45)}, trial.out / "model.pt")
    with pytest.raises(campaign.Wrong, match=r"model.pt.*differ"):
        trial.compare()


@pytest.mark.slow
def test_commands_that_are_ended_at_random_moments_complete(tmp_path):
    figures = campaign.campaign(1.5, 20, tmp_path / "campaign")
    assert figures["trials"] > 0 and not figures["wrong"], figures["wrong"]


@pytest.mark.slow
def test_decoding_for_long_takes_no_more_memory():
    assert campaign.soak(20_000)["grown_mb"] < 30
