"""
What the code of 29 November 2026 wrote is still read, and says the same: tests/golden, made by tests/golden/make.py. A
change of the code that is not meant to change results must leave these tests as they are.
"""
import json
from pathlib import Path

import pytest
import torch
from golden import make

from nanochat import checkpoint_manager as ckpt
from nanochat import step_checkpoint
from nanochat.optim import setup_optimizers
from nanochat.stages import set_trained

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def expected():
    return json.loads((GOLDEN / "expected.json").read_text())


@pytest.fixture(scope="module")
def observed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield json.loads(json.dumps(make.observe(GOLDEN / "model")))
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", make.DECODINGS)
def test_decoded_tokens_and_their_compute(name, expected, observed):
    """The tokens, and each one's depth and widths; FLOPs as the trace counts them."""
    got, want = observed["decoded"][name], expected["decoded"][name]
    assert got.keys() == want.keys()
    assert got["tokens"] == want["tokens"]
    assert got.get("steps") == want.get("steps")
    for mine, theirs in zip(got.get("flops", []), want.get("flops", []), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-12)


def test_the_golden_answers_use_what_they_are_named_after(expected):
    """Else the files would show nothing: in auto tokens exit at several depths, and rows widen."""
    steps = [step for row in expected["decoded"]["auto that exits and widens"]["steps"] for step in row]
    assert len({depth for depth, _ in steps}) > 2 and len({tuple(widths) for _, widths in steps}) > 1
    tokens = {name: found["tokens"] for name, found in expected["decoded"].items()}
    assert tokens["lossless"] == tokens["lossless, drafted by ghost"] == tokens["full"] != tokens["ghost"]


def test_bits_per_byte(expected, observed):
    assert observed["bits per byte"] == pytest.approx(expected["bits per byte"], abs=2e-6)


def test_a_run_goes_on_from_its_step_folder():
    """The weights to the bit, every moment of the optimizers, and the same moments from the optimizers' file."""
    path = step_checkpoint.path_of(GOLDEN, make.STEPS)
    meta = step_checkpoint.read_meta(path)
    model = ckpt.build_model(ckpt.find(GOLDEN / "model").config)
    set_trained(model, "unfrozen", gate=True)
    optimizers, fresh = (setup_optimizers(model, optimizer=meta["settings"]["optimizer"]) for _ in range(2))
    step_checkpoint.load(path, model, optimizers)
    assert make.digest(model.state_dict()) == (GOLDEN / "trained.sha256").read_text()
    assert ckpt.carry_optimizers(GOLDEN / "optim.pt", fresh) == sum(len(o.state) for o in optimizers) > 0
    for mine, theirs in zip(fresh, optimizers, strict=True):
        assert mine.state.keys() == theirs.state.keys()
        for p in mine.state:
            assert all(torch.equal(mine.state[p][k], v) for k, v in theirs.state[p].items())
    rank = step_checkpoint.read_rank(path, 0)
    assert rank.keys() == {"loader", "rng"}
