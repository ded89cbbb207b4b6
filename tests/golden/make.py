"""
Made the files in this folder, once, with the code of 29 November 2026: an export of a small trained hybrid with its
calibration (model/), its training run's last step (step_000400/) and optimizers' file (optim.pt), and what decoding and
evaluation said of them (expected.json). test_golden.py loads them with today's code and asks for the same. They are made
anew only if a format or a result changes on purpose:

    python -m tests.golden.make
"""
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
STEPS, CONTROL_STEPS = 400, 150
PROMPTS = ["def read(self, ", "import os\nclass ", "    return", "for i in range("]
NEW_TOKENS = 24
# name -> what Engine.stream is given; lists have one entry per prompt
DECODINGS = {
    "full": {}, "ghost": {"mode": "ghost"}, "whisper": {"mode": "whisper"}, "normal": {"mode": "normal"},
    "a width": {"mode": 16}, "a mode per row": {"mode": ["think", "ghost", "normal", "whisper"]},
    "depth 4": {"depth": 4}, "a depth per row": {"depth": [2, 4, 6, 8]}, "normal, depth 4": {"mode": "normal", "depth": 4},
    "auto": {"mode": "auto"}, "auto at 0.7": {"mode": "auto", "budget": 0.7},
    "auto that exits and widens": {"mode": "auto", "budget": 0.7, "thresholds": (0.5, 0.45)}, "lossless": {"lossless": True},
    "lossless, drafted by ghost": {"lossless": True, "mode": "ghost", "draft": 3}, "sliding": {"overflow": "slide"},
    "drawn": {"temperature": 0.8, "top_k": 20, "seed": 5}}


def decode(model, tokenizer, calibration) -> dict:
    """name -> tokens, and where the answers' compute is traced, depths, widths and FLOPs; of the four prompts."""
    from nanochat.confidence_probe import Controls
    from nanochat.engine import Engine
    prompts = [tokenizer.encode(text, prepend="<|bos|>") for text in PROMPTS]
    out = {}
    for name, options in DECODINGS.items():
        engine, new = Engine(model, tokenizer, calibration), 80 if name == "sliding" else NEW_TOKENS
        options = {"temperature": 0.0, **options}
        if thresholds := options.pop("thresholds", None):
            options["control"] = Controls(model, options.pop("budget"), *thresholds, calibration=calibration)
        answers = engine.answers(prompts, new, **options)
        out[name] = {"tokens": answers}
        if not options.get("lossless"):  # how it drafts depends on the clock
            out[name] |= {"steps": [[[d, list(w)] for d, w in t.steps] for t in engine.traces],
                          "flops": [t.flops(model) for t in engine.traces]}
    return out


def bits_per_byte(model, tokenizer) -> dict[str, float]:
    """Of each mode, on the text of expected.json's neighbour text.txt."""
    from nanochat.loss_eval import evaluate_bpb
    ids = torch.tensor(tokenizer.encode((HERE / "text.txt").read_text(), prepend="<|bos|>"))
    T = model.config.sequence_len
    rows = (len(ids) - 1) // T
    batch = ids[:rows * T].view(rows, T), ids[1:rows * T + 1].view(rows, T)
    return {mode: evaluate_bpb(model, iter([batch]), 1, tokenizer.token_bytes(), widths=mode)
            for mode in ("ghost", "whisper", "normal", "think")}


def observe(folder: Path) -> dict:
    """All that is expected of an export: what its modes decode, and their bits per byte."""
    from nanochat import checkpoint_manager as ckpt
    from nanochat.engine import prepare_inference
    model, tokenizer, info, _ = ckpt.load(folder)
    prepare_inference(model, "cpu", torch.float32)
    return {"decoded": decode(model, tokenizer, info["calibration"]), "bits per byte": bits_per_byte(model, tokenizer)}


def main():
    from nanochat import checkpoint_manager as ckpt
    from nanochat.hybrid_gpt import HybridConfig
    from nanochat.tokenizer import Tokenizer
    from scripts import fractal_eval, fractal_train, tok_train
    from tests.conftest import randomize
    torch.set_num_threads(1)
    config = HybridConfig(sequence_len=64, vocab_size=320, n_layer=4, n_head=4, n_kv_head=4, n_embd=32, d_ref=32,
                          top_width=32, mamba_headdim=16, mamba_d_state=16, mamba_group_width=48)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["NANOCHAT_BASE_DIR"] = scratch
        work = Path(scratch)
        tok_train.main(["--vocab-size", "320", "--out", str(work / "tokenizer")])
        tokenizer = Tokenizer.from_directory(work / "tokenizer")
        ckpt.save_export(work / "start", randomize(ckpt.build_model(config)), tokenizer, {"tag": "golden"})
        common = ["--data", "embedded", "--device-batch-size", "8", "--total-batch-size", "512", "--eval-tokens", "4096",
                  "--device-type", "cpu", "--eval-every", "-1", "--save-every", "-1"]
        fractal_train.main(["--checkpoint", str(work / "start"), "--unfreeze", "--lr-scale", "1", "--matryoshka",
                            "--sample-dim", "--num-iterations", str(STEPS), *common])
        trained = work / "fractal_checkpoints/golden_32_unfrozen"
        fractal_train.main(["--checkpoint", str(trained), "--controls", "--num-iterations", str(CONTROL_STEPS), *common])
        final = work / "fractal_checkpoints/golden_32_unfrozen_auto"
        fractal_eval.main(["--checkpoint", str(final), "--calibrate", "--sequences", "64", "--new-tokens", "8",
                           "--delta", "0.3"])
        for name in ("model", f"step_{STEPS:06d}"):
            shutil.rmtree(HERE / name, ignore_errors=True)
        shutil.copytree(trained / f"step_{STEPS:06d}", HERE / f"step_{STEPS:06d}")
        shutil.copy(trained / "optim.pt", HERE)
        (HERE / "model").mkdir()
        shutil.copytree(final / "tokenizer", HERE / "model/tokenizer")
        shutil.copy(final / "model.pt", HERE / "model")
        info = json.loads((final / "config.json").read_text())
        del info["loader"]  # the text that waits to be packed: long, and needed to train on only
        (HERE / "model/config.json").write_text(json.dumps(info, indent=1))
        (HERE / "trained.sha256").write_text(digest(ckpt.load(trained).model.state_dict()))
    (HERE / "expected.json").write_text(json.dumps(observe(HERE / "model"), separators=(",", ":")))


def digest(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 over the names and bytes of weights."""
    total = hashlib.sha256()
    for name in sorted(state):
        total.update(name.encode() + state[name].detach().contiguous().numpy().tobytes())
    return total.hexdigest()


if __name__ == "__main__":
    main()
