r"""
What tests/test_fake_gpu.py runs in processes of their own, on the fake device: the paths that a user can take on a GPU.

    NANOCHAT_FAKE_GPU=/tmp/libfake_gpu.so python tests/fake_gpu_runs.py \
        '{"name": ["train", {"recipe": "lean", "phase": "stage 1"}], "devices": ["mixed", {}]}'

prints the results of several runs by name, as a line of JSON; `big` is the size of d32, which takes minutes.
"""
import fake_gpu  # isort: skip  (before torch)
import json
import os
import sys
import warnings

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from nanochat.checkpoint_manager import build_model
from nanochat.confidence_probe import Controls
from nanochat.distributed import gradient_norm, reduce_whole, shard_model
from nanochat.elastic_step import ElasticStep
from nanochat.engine import Engine, prepare_inference
from nanochat.gpt import GPTConfig
from nanochat.growing import grown_config
from nanochat.hybrid_gpt import HybridConfig
from nanochat.loss_eval import evaluate_bpb
from nanochat.optim import setup_optimizers
from nanochat.stages import frozen_boxes, set_trained
from nanochat.step_parts import shares
from nanochat.training import _over_ranks

SMALL = HybridConfig.from_base(GPTConfig(128, 512, 4, 4, 4, 256))
ROWS = 8


def train(gpu, recipe: str | None, phase: str, sample: bool = True, checkpointing: bool = True, big: bool = False,
          draft_exit: int | None = None, optimizer: str = "muon") -> dict:
    """{'pass', 'rest'}: the counts of a step's pass and of all else in it, the zeroing of gradients apart."""
    config, boxes = HybridConfig.preset("d32") if big else SMALL, None
    if phase == "stage 2":
        old, config = config, grown_config(config, 320)
        boxes = frozen_boxes(config, {"surgery": "grow", "old_config": {k: getattr(old, k)
                                                                        for k in HybridConfig.__dataclass_fields__}})
    model = build_model(config, "meta")
    assert {b.mamba.form for b in model.transformer.h[1::2]} == {"cuda"}
    set_trained(model, phase, gate=recipe in ("both", "every", "half"), boxes=boxes)
    shard_model(model, None, torch.bfloat16, checkpointing)
    model.to_empty(device="cuda")
    optimizers = setup_optimizers(model, frozen=boxes, optimizer=optimizer)
    x, y = (torch.empty(ROWS, config.sequence_len, dtype=torch.int64, device="cuda") for _ in range(2))
    live = torch.ones(y.shape, dtype=torch.bool)
    step, out = ElasticStep(model, 0, 10, recipe, sample, student_every=1, draft_exit=draft_exit), {}
    gpu.reset()
    losses = step(2, x, y, shares([live])[0])
    out["pass"], out["operators"] = gpu.counts.per(), gpu.counts.operators.most_common(30)
    for _ in range(2):  # the first time makes the optimizers' state
        gpu.reset()
        reduce_whole(model.parameters())
        float(gradient_norm(model.parameters()))
        _over_ranks(losses, None, model.device)
        for o in optimizers:
            o.step()
        out["rest"] = gpu.counts.per()
    return out


def evaluate(gpu, batches: int = 2) -> dict:
    """Counts per batch of an evaluation in bits per byte, in the narrowest mode and at full width."""
    model, out = build_model(SMALL, "meta"), {}
    shard_model(model, None, torch.bfloat16)
    model.to_empty(device="cuda")
    x, y = (torch.empty(ROWS, SMALL.sequence_len, dtype=torch.int64, device="cuda") for _ in range(2))
    for mode in ("ghost", "think"):
        gpu.reset()
        evaluate_bpb(model, [(x, y)] * batches, batches, torch.ones(SMALL.vocab_size, dtype=torch.int64), widths=mode)
        out[mode] = gpu.counts.per(batches)
    return out


def prepare(model, dtype: torch.dtype) -> None:
    """prepare_inference of a model that is on the device already: what has no data cannot be moved in place."""
    model.to = lambda _: model
    prepare_inference(model, "cuda", dtype)


def decode(gpu, names: list[str], big: bool = False) -> dict:
    """Counts per step of decoding, each of the `names` in DECODING."""
    config = HybridConfig.preset("d32") if big else SMALL
    model = build_model(config, "meta")
    prepare(model.to_empty(device="cuda"), torch.bfloat16)
    out = {}
    for name in names:
        options = dict(DECODING[name])
        prompts = options.pop("prompts", [[1, 2, 3, 4]])
        if options.get("overflow"):
            prompts = [[1] * (config.sequence_len - 2)]
        tokens = options.pop("tokens", 4)
        if name.startswith("auto"):  # a device without data has a gate without answers
            options["control"] = Controls(model, 0.7, 0.6, 0.4, {"prices": [[0.7, 1.0]]},
                                          score=_scores(options.pop("scores"), config))
        stream = Engine(model, None).stream(prompts, tokens, temperature=0.0, **options)
        next(stream)
        next(stream)
        gpu.reset()
        n = sum(1 for _ in stream)
        out[name] = gpu.counts.per(max(1, n))
    return out


def _scores(values: list[float], config):
    """A score that gives each exit point in turn one of the values; the CPU reads it, as it reads the gate's."""
    def score(i, x):
        return torch.full_like(x[..., 0].float().cpu(), values[config.exit_points.index(i) % len(values)])
    return score


RAGGED = [[1, 2, 3], [4, 5, 6, 7, 8]]
DECODING = {
    "full": {}, "narrow": {"mode": "normal"}, "ghost": {"mode": "ghost"}, "depth": {"depth": 2},
    "ragged": {"prompts": RAGGED}, "two widths": {"prompts": RAGGED, "mode": ["think", "ghost"]},
    "two depths": {"prompts": RAGGED, "depth": [2, 8]},
    "auto goes on": {"mode": "auto", "scores": [0.5]}, "auto exits": {"mode": "auto", "scores": [0.5, 0.9]},
    "auto expands": {"mode": "auto", "scores": [0.5, 0.5, 0.5, 0.1, 0.1, 0.1]},
    "auto in a batch": {"mode": "auto", "scores": [0.5, 0.5, 0.3, 0.7], "prompts": RAGGED},
    "lossless": {"lossless": True, "draft": 3, "mode": "ghost", "tokens": 8},
    "lossless by depth": {"lossless": True, "draft": 2, "depth": 2, "tokens": 8},
    "lossless in a batch": {"lossless": True, "draft": 2, "mode": "ghost", "tokens": 8, "prompts": RAGGED},
    "sliding": {"overflow": "slide", "tokens": 8},
}


def tiny(gpu) -> dict:
    """The tiny experiment's training, judging, examination and generation."""
    from tiny_experiment import run
    from tiny_experiment.tasks import Encoder, draw_many, make_tokenizer
    s = run.Settings(steps=2, students_from=1, student_every=1, rows=16, pieces=2, control_steps=1, control_rows=16,
                     processes=1, device_type="cuda")
    encoder = Encoder(make_tokenizer())
    make = run.make_model

    def fake(encoder, seed, device_type):  # weights without data
        return make(encoder, seed, "cpu").to("meta").to_empty(device=device_type)
    run.make_model = fake
    model, history, control_history = run.train(0, s)
    prepare(model, torch.float32)
    judge = run.Judge(model, encoder, draw_many(0, 12, "test"))
    judge(16)
    judge(control=lambda x: Controls(model, 0.7, 0.6, 0.4, {"prices": [[0.7, 1.0]]}, score=run.softmax_score(model)))
    judge(control=lambda x: Controls(model, 0.7, 0.6, 0.4, {"prices": [[0.7, 1.0]]}, score=run.change_score(model, x)))
    examined = run.examine_gate(judge, 0.7, [[0.7, 1.0]])
    texts, _ = run.generate_all(Engine(model, None), judge, encoder, mode=16)
    assert len(texts) == 12 and len(history) == 2 and len(control_history) == 1
    return {"pairs": sum(n for _, _, n in examined["curve"])}


def mixed(gpu) -> dict:
    """Mixing devices raises, as on a GPU."""
    a, b, out = torch.empty(3, device="cuda"), torch.ones(3), {}
    for name, f in (("add", lambda: a + b), ("mm", lambda: a[None] @ b[:, None]),
                    ("where", lambda: torch.where(b > 0, a, b))):
        try:
            f()
            out[name] = None
        except RuntimeError as e:
            out[name] = str(e)
    gpu.reset()
    b.to("cuda")
    torch.tensor([1.0], device="cuda")
    b.pin_memory().to("cuda", non_blocking=True)
    b.pin_memory().to("cuda")
    b.to("cuda", non_blocking=True)
    out["copies"] = gpu.counts.copies  # all but the one from pinned memory that nobody waits for
    float(a.sum()), a.cpu(), a[a > 0], bool(a.any())
    return out | {"syncs": gpu.counts.syncs}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    runs, results = {f.__name__: f for f in (train, evaluate, decode, tiny, mixed)}, {}
    with fake_gpu.fake_gpu() as gpu:
        for name, (run, options) in json.loads(sys.argv[1]).items():
            results[name] = runs[run](gpu, **options)
    print(json.dumps(results), flush=True)
    os._exit(0)  # torch's own end looks for a real device
