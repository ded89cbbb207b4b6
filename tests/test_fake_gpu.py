"""
Every path that a user can take on a GPU, on one without data (fake_gpu.py): what mixes devices raises there as on a real
one, and what makes a GPU slow is counted. The ceilings are what was reached; a change may lower them.
"""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="it needs g++ on Linux")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run({name: [function of fake_gpu_runs, options]}) -> {name: its result}, from a process of its own."""
    library = tmp_path_factory.mktemp("fake_gpu") / "libfake_gpu.so"

    def run(jobs: dict) -> dict:
        done = subprocess.run([sys.executable, HERE / "fake_gpu_runs.py", json.dumps(jobs)], capture_output=True, text=True,
                              env={**os.environ, "NANOCHAT_FAKE_GPU": str(library), "OMP_NUM_THREADS": "1"})
        said = [line for line in done.stderr.splitlines() if "registered at" not in line]  # torch's lists of its backends
        assert done.returncode == 0, "\n".join(said)[-4000:]
        return json.loads(done.stdout.splitlines()[-1])
    return run


def check(counts: dict, launches: float, syncs: float, copies: float) -> None:
    ceilings = {"launches": launches, "syncs": syncs, "copies": copies}
    assert all(counts[k] <= most for k, most in ceilings.items()), (counts, ceilings)


# (launches, syncs, copies) of the pass and of the rest of a step: norm, losses, optimizer. Eight blocks of width 256.
STEPS = {
    "lean": ({"recipe": "lean", "phase": "stage 1"}, (3190, 0, 0), (120, 2, 0)),
}
SLOW_STEPS = {
    "both": ({"recipe": "both", "phase": "stage 1"}, (4450, 0, 0), (125, 2, 0)),
    "full": ({"recipe": None, "phase": "unfrozen"}, (1390, 0, 0), (145, 2, 0)),
    "every level in turn, drafts": ({"recipe": "both", "phase": "unfrozen", "sample": False, "draft_exit": 2}, (5360, 0, 0),
                                    (150, 2, 0)),
    "stage 2": ({"recipe": "lean", "phase": "stage 2"}, (3640, 0, 0), (190, 2, 0)),
    "controls": ({"recipe": "controls value", "phase": "controls"}, (1950, 8, 8), (20, 2, 0)),
    "controls, gumbel": ({"recipe": "controls gumbel", "phase": "controls"}, (2700, 8, 9), (20, 2, 0)),
}
# Of each decoding step, all of its rows' tokens; of lossless decoding of each token.
DECODING = {"full": (390, 1, 0), "auto in a batch": (430, 5, 2)}
SLOW_DECODING = {
    "ragged": (410, 2, 2), "narrow": (405, 1, 0), "ghost": (405, 1, 0), "depth": (116, 1, 0),
    "two widths": (850, 2, 6), "two depths": (442, 2, 2), "auto goes on": (408, 4, 0), "auto exits": (220, 3, 0),
    "auto expands": (408, 4, 0), "sliding": (460, 1, 0.34),
    # when drafting goes on depends on what it took by the clock: these vary by some percent
    "lossless": (800, 7, 3), "lossless by depth": (600, 6, 3), "lossless in a batch": (800, 8, 7)}


@pytest.fixture(scope="module")
def quick(run):
    """One process for the quick tests: it is importing torch that takes time."""
    return run(jobs_of(STEPS, DECODING) | {"evaluate": ["evaluate", {}], "mixed": ["mixed", {}]})


def test_the_fake_device_refuses_and_counts_as_a_real_one(quick):
    found = quick["mixed"]
    assert all("same device" in found[name] for name in ("add", "mm", "where"))
    assert found["copies"] == 4 and found["syncs"] == 4


def jobs_of(steps: dict, decoding: dict) -> dict:
    jobs = {name: ["train", options] for name, (options, *_) in steps.items()}
    return jobs | {"decode": ["decode", {"names": list(decoding)}]}


def check_paths(found: dict, steps: dict, decoding: dict) -> None:
    for name, (_, of_pass, of_rest) in steps.items():
        check(found[name]["pass"], *of_pass)
        check(found[name]["rest"], *of_rest)
    for name, ceilings in decoding.items():
        check(found["decode"][name], *ceilings)


def test_training_evaluation_and_decoding(quick):
    check_paths(quick, STEPS, DECODING)
    for mode in quick["evaluate"].values():  # of each of two batches
        check(mode, 500, 0.5, 0)
    assert quick["lean"]["pass"]["launches"] > 1000
    assert quick["evaluate"]["ghost"]["bytes"] < quick["evaluate"]["think"]["bytes"]


@pytest.mark.slow
def test_every_other_recipe_phase_and_way_to_decode(run):
    found = run(jobs_of(SLOW_STEPS, SLOW_DECODING) | {"tiny": ["tiny", {}]})
    check_paths(found, SLOW_STEPS, SLOW_DECODING)
    assert found["tiny"]["pairs"] > 0
