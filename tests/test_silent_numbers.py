"""Numbers that were wrong without a word: ties, weights that are not finite, roundings that differ by path, axes, counts."""
import dataclasses

import pytest
import torch
from conftest import randomize

from nanochat import tokenizer as tokenizer_module
from nanochat.checkpoint_manager import build_model
from nanochat.confidence_probe import Controls
from nanochat.engine import Engine, prepare_inference
from nanochat.monitor import Monitor
from nanochat.sampling import accept_greedily, draw_tokens, probabilities
from nanochat.tokenizer import Tokenizer

# --- ties

def test_top_k_keeps_k_even_among_equals():
    """bf16 logits: of four equally likely ones top-k 2 keeps the first two, and top-k 1 is greedy."""
    logits = torch.tensor([[0.5, 2.0, 2.0, 1.0, 2.0, 2.0]]).bfloat16().float()
    for k in range(1, 7):
        kept = probabilities(logits, 0.7, k, None)[0].nonzero()[:, 0].tolist()
        assert kept == sorted([1, 2, 4, 5, 3, 0][:k])
    assert probabilities(logits, 1.0, None, 0.3)[0].nonzero()[:, 0].tolist() == [1, 2]


def test_top_k_1_is_greedy_in_bf16(hybrid):
    prepare_inference(hybrid, "cpu", torch.bfloat16)
    hybrid.lm_head.weight.data[150:] = hybrid.lm_head.weight.data[:150]  # every logit twice
    engine, prompts = Engine(hybrid, None), [[i, i + 1] for i in range(0, 80, 2)]
    best = engine.answers(prompts, 20, temperature=0)
    assert engine.answers(prompts, 20, temperature=1.0, top_k=1, seed=3) == best
    assert max(map(max, best)) < 150  # of two equal ones the first


# --- what is not finite

@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.0}, {"temperature": 0, "lossless": True},
                                     {"temperature": 0.5, "top_k": 3}, {"temperature": 0.5, "top_p": 0.5}])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_logit_that_is_no_number_stops_decoding(hybrid, options, rows):
    prepare_inference(hybrid, "cpu", torch.float32)
    engine = Engine(hybrid, None)
    assert len(engine.answers([[1, 2]] * rows, 5, **options)[0]) == 5
    hybrid.lm_head.weight.data[7, 3] = float("nan")
    with pytest.raises(ValueError, match=r"logits are not finite.*earlier checkpoint"):
        engine.answers([[1, 2]] * rows, 5, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_before_the_first_token(hybrid, value):
    hybrid.transformer.h[1].mamba.in_proj.weight.data[3, 5] = value
    with pytest.raises(ValueError, match=r"transformer\.h\.1\.mamba\.in_proj\.weight is not finite.*earlier checkpoint"):
        prepare_inference(hybrid, "cpu", torch.float32)


def test_checks_of_drafts_see_it_too():
    with pytest.raises(ValueError, match="not finite"):
        accept_greedily(torch.tensor([[1]]), torch.tensor([[[0.0, 1.0], [float("nan"), 0.0]]]))


@pytest.mark.parametrize("settings", [(float("nan"), None, None), (float("inf"), None, None), (1.0, None, float("nan"))])
def test_settings_that_are_no_numbers(settings):
    with pytest.raises(ValueError, match="must be >= 0 and finite"):
        draw_tokens(torch.zeros(1, 4), settings, [torch.Generator()])


def test_the_smallest_temperature_is_greedy():
    logits = torch.tensor([[-15.0, 14.9, 15.0]])
    assert draw_tokens(logits, (5e-324, None, None), [torch.Generator()]) == [2]


@pytest.mark.parametrize("seed", [2**63, -2**63 - 1])
def test_a_seed_that_no_generator_takes(hybrid, seed):
    with pytest.raises(ValueError, match=r"seed .* is out of range"):
        next(Engine(hybrid, None).tokens([1], 2, seed=seed))


# --- one path

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_auto_at_full_budget_without_exits_is_full_compute_to_the_bit(hybrid_config, dtype):
    """Prompts short and long, alone and in a batch, greedy and sampled: the tokens are those without mode auto."""
    model = randomize(build_model(dataclasses.replace(hybrid_config, sequence_len=128)))
    prepare_inference(model, "cpu", dtype)
    engine, g = Engine(model, None), torch.Generator().manual_seed(1)
    prompts = [torch.randint(300, (n,), generator=g).tolist() for n in (1, 2, 7, 31, 47, 60, 100)]
    for options in ({"temperature": 0}, {"temperature": 1.0, "seed": 5}):
        for batch in ([p] for p in prompts), (prompts[1:4], prompts[2:], [prompts[3]] * 2):
            for rows in batch:
                full = engine.answers(rows, 20, **options)
                control = Controls(model, 1.0, exit_threshold=1.0)
                assert engine.answers(rows, 20, mode="auto", control=control, **options) == full


def test_a_full_budget_plans_full_width(hybrid):
    assert Controls(hybrid, 1.0, calibration={"prices": [[1.0, 1e4]]}).plan([[1], [2, 3]]).unique().tolist() == [64]


# --- axes and counts

class Wandb:
    def __init__(self):
        self.logged = []

    def log(self, entry, step=None):
        self.logged.append((step, entry))

    def finish(self):
        pass


def test_wandbs_axis_is_the_step(tmp_path, monkeypatch):
    """Also of a run that is resumed, logs every tenth step, and validates in between."""
    fake = Wandb()
    monkeypatch.setattr("nanochat.monitor._start_wandb", lambda *_: fake)
    monitor = Monitor(tmp_path, 100, 131, torch.device("cpu"), 64, "name", {})
    for step in range(100, 131):
        if step % 15 == 0:
            monitor.record({"step": step, "val_bpb": 1.0})
        monitor.step(step, 0.1, {"loss": 1.0}, 1.0, 1.0, 0, show=step % 10 == 0)
    monitor.close()
    assert [step for step, _ in fake.logged] == [100, 105, 110, 120, 120, 130]
    assert all(step == entry["step"] for step, entry in fake.logged)


def test_a_pair_that_occurs_too_often_to_count_is_refused(monkeypatch):
    """rustbpe counts in 32 bits: one more would be negative, and the vocabulary silently another."""
    monkeypatch.setattr(tokenizer_module, "MAX_PAIRS", 1000)
    with pytest.raises(ValueError, match=r"a pair of bytes occurs more than 1,000 times.*--max-chars"):
        Tokenizer.train_from_iterator(["ab" * 600, "x", "ab" * 500], 270)
    Tokenizer.train_from_iterator(["ab" * 600, "x", "cd" * 600], 270)
