r"""
Trains a hybrid so that all its widths work: stage 1 trains what surgery added and keeps the base as it was;
--unfreeze then trains everything at a lower learning rate; --controls then fits the predictor and the gate of mode auto.

    python -m scripts.fractal_train --checkpoint \
        $NANOCHAT_BASE_DIR/hybrid_checkpoints/d4_256 --stage 1 --matryoshka --sample-dim
    python -m scripts.fractal_train --checkpoint \
        $NANOCHAT_BASE_DIR/fractal_checkpoints/d4_256 --unfreeze --matryoshka --sample-dim
    python -m scripts.fractal_train --checkpoint \
        $NANOCHAT_BASE_DIR/fractal_checkpoints/d4_256_unfrozen --controls

Each step runs a full pass (teacher, cross-entropy) and, with --matryoshka, narrow passes (students) that learn the
teacher's distribution at sampled widths and exits, while the gate looks on. With --controls the model stays as it is, and
gate and predictor learn on the passes that they decide themselves. The result is model.pt, config.json and tokenizer/ in
fractal_checkpoints/<tag>_<width>[_unfrozen][_auto]/ under NANOCHAT_BASE_DIR, beside the step checkpoints that an
interrupted run resumes from.
"""
import argparse

import torch

from nanochat import checkpoint_manager as ckpt
from nanochat.common import cli, get_base_dir, print0
from nanochat.confidence_probe import gumbel_temperature
from nanochat.dataloader import DataLoader
from nanochat.distributed import compile_blocks
from nanochat.loss_eval import (
    GATE_TOKENS,
    Student,
    controls_backward,
    evaluate_bpb,
    matryoshka_backward,
    sample_students,
    some_tokens,
)
from nanochat.mixture import default_data, prepare_mixture
from nanochat.optim import setup_optimizers
from nanochat.stages import set_trained
from nanochat.training import Run, add_training_args, derive_batch


def random_splits(rows: int, T: int, generator: torch.Generator) -> torch.Tensor:
    """Where plain text is cut into a prompt and what follows, (rows,): somewhere in its second to fourth eighth."""
    return torch.randint(max(1, T // 8), max(2, T // 2), (rows,), generator=generator)


@cli
def main(argv=None):
    p = argparse.ArgumentParser(description="Train a hybrid at sampled widths, stage by stage.")
    p.add_argument("--checkpoint", required=True, help="the hybrid: an export's folder or the model.pt in it")
    p.add_argument("--stage", type=int, choices=[1], default=1,
                   help="1: train the Mamba blocks, value embeddings and gates, the base frozen (default: 1)")
    p.add_argument("--unfreeze", action="store_true", help="train everything instead, at --lr-scale times the rates")
    p.add_argument("--lr-scale", type=float, default=None,
                   help="multiplies every learning rate (default: 1; 0.3 with --unfreeze)")
    p.add_argument("--matryoshka", action="store_true", help="also train narrow widths, by distillation from the full pass")
    p.add_argument("--sample-dim", action="store_true",
                   help="sample one width per block and step, instead of a pass at every level in every step")
    p.add_argument("--controls", action="store_true",
                   help="train the predictor and the gate alone, for mode auto, and leave the model as it is")
    p.add_argument("--tag", default=None, help="name of the family (default: the checkpoint's)")
    add_training_args(p, data=None)
    args = p.parse_args(argv)
    if args.sample_dim and not args.matryoshka:
        raise ValueError("--sample-dim has no effect without --matryoshka: add it, or drop --sample-dim")
    if args.controls and (args.matryoshka or args.unfreeze):
        raise ValueError("--controls trains nothing but the controls: drop --matryoshka, --sample-dim and --unfreeze")
    if args.lr_scale is None:
        args.lr_scale = 0.3 if args.unfreeze else 1.0

    model, tokenizer, info, file = ckpt.load(args.checkpoint)
    if ckpt.model_kind(model.config) != "hybrid":
        raise ValueError(f"{args.checkpoint} holds a base GPT: make a hybrid of it with "
                         "`python -m scripts.surgery --src ...`")
    config, T = model.config, model.config.sequence_len
    device, dtype, passes = derive_batch(args, T)
    model.to(device).compute_dtype = dtype
    if args.compile:
        compile_blocks(model)
    args.tag = args.tag or info.get("tag", f"d{config.n_layer}")
    source_is_unfrozen = str(info.get("provenance", {}).get("trained", "")).startswith("unfrozen")
    suffix = ("_unfrozen" if args.unfreeze or (args.controls and source_is_unfrozen) else "") + "_auto" * args.controls
    folder = get_base_dir() / "fractal_checkpoints" / f"{args.tag}_{config.n_embd}{suffix}"
    if folder.resolve() == file.parent.resolve():
        raise ValueError(f"{folder} is both the source and the destination: name another family with --tag")
    phase = "controls" if args.controls else "unfrozen" if args.unfreeze else f"stage {args.stage}"
    set_trained(model, phase, gate=args.matryoshka)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counts = model.num_params()
    print0("parameters " + ", ".join(f"{k} {v:,}" for k, v in counts.items()) + f"; trained {trained:,}")
    if args.num_iterations < 0:
        args.num_iterations = max(1, round(20 * trained / args.total_batch_size))
    print0(f"steps {args.num_iterations:,}; levels {', '.join(map(str, config.levels))}")
    args.data = args.data or default_data(device)
    data = prepare_mixture(args.data)

    source = ckpt.sha256(file)
    run = Run(folder, args, {"source_sha256": source, "dtype": str(dtype)})
    run.restore(model)
    token_bytes = tokenizer.token_bytes()
    eval_steps = max(1, args.eval_tokens // (args.device_batch_size * T))
    names = list(config.distinct_modes) if args.matryoshka else ["god"]

    def evaluate():
        out = {}
        for mode in names:
            val = DataLoader(tokenizer, data, "val", args.device_batch_size, T, device=device)
            out[mode] = evaluate_bpb(model, val, eval_steps, token_bytes, widths=mode)
        print0("  " + ", ".join(f"{k} {v:.4f}" for k, v in out.items()))
        return {"bpb": out[names[-1]], **out}  # the last is the full width

    def backward(step, x, y, scale):
        # the generator depends on the seed and step alone: ranks agree, and so does a resumed run
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        rows, T = x.shape
        if args.controls:
            return controls_backward(model, x, y, random_splits(rows, T, generator), generator,
                                     gumbel_temperature(step, args.num_iterations), scale=scale)
        if not args.matryoshka:
            return matryoshka_backward(model, x, y, [], scale)
        students = [Student(d) for d in config.levels if d < config.top_width]
        if args.sample_dim:
            students = sample_students(config, rows, T, random_splits(rows, T, generator), generator)
        return matryoshka_backward(model, x, y, students, scale, some_tokens(y >= 0, GATE_TOKENS, generator))

    if not run.finished:
        rates = [lr * args.lr_scale for lr in (args.matrix_lr, args.embedding_lr, args.unembedding_lr, args.scalar_lr)]
        figures = run.train(model, setup_optimizers(model, *rates), tokenizer, data, backward, evaluate, passes, T,
                            data_from=info.get("loader"),
                            moments_from=moments if (moments := file.parent / "optim.pt").is_file() else None)
    else:
        figures = run.meta["figures"]
        print0(f"{folder} is trained already ({run.start} steps); --fresh starts over")
    ckpt.save_export(folder, model, tokenizer, {
        "tag": args.tag, "provenance": {"trained": suffix[1:] or f"stage {args.stage}",
                                        "steps": args.num_iterations, "source_sha256": source,
                                        "from": info.get("provenance")}, "figures": figures,
        "loader": run.loader})
    print0(f"wrote {folder}: {figures['first_bpb']:.4f} -> {figures['bpb']:.4f} bits/byte at full width")
    return figures


if __name__ == "__main__":
    main()
