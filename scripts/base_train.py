"""
Trains a base GPT from one dial; everything else is derived and printed.

    python -m scripts.base_train --depth 4

The result is base_checkpoints/d4/{model_NNNNNN.pt,optim_NNNNNN.pt,meta_NNNNNN.json,tokenizer/} under
NANOCHAT_BASE_DIR, which scripts.surgery takes from there. Run again, it resumes where it stopped.
"""
import argparse

import torch

from nanochat import checkpoint_manager as ckpt
from nanochat.common import cli, get_base_dir, print0
from nanochat.dataloader import DataLoader
from nanochat.distributed import compile_blocks
from nanochat.gpt import GPTConfig
from nanochat.loss_eval import evaluate_bpb, matryoshka_backward
from nanochat.mixture import prepare_mixture
from nanochat.optim import setup_optimizers
from nanochat.tokenizer import Tokenizer
from nanochat.training import Run, add_training_args, derive_batch


@cli
def main(argv=None):
    p = argparse.ArgumentParser(description="Train a base GPT from one dial, --depth.")
    p.add_argument("--depth", type=int, default=4, help="layers; the width is depth x aspect ratio (default: 4)")
    p.add_argument("--aspect-ratio", type=int, default=64, help="width per layer (default: 64)")
    p.add_argument("--head-dim", type=int, default=None, help="dims per head (default: 128, less in small models)")
    p.add_argument("--max-seq-len", type=int, default=None, help="context, in tokens (default: 512 on a CPU, 2048 on a GPU)")
    p.add_argument("--target-param-data-ratio", type=float, default=20,
                   help="tokens per parameter, where --num-iterations is not given (default: 20)")
    p.add_argument("--tokenizer", default=None, help="the tokenizer's folder (default: tokenizer/ in NANOCHAT_BASE_DIR)")
    p.add_argument("--tag", default=None, help="name of the checkpoint folder (default: d<depth>)")
    add_training_args(p)
    args = p.parse_args(argv)

    tokenizer_dir = args.tokenizer or get_base_dir() / "tokenizer"
    tokenizer = Tokenizer.from_directory(tokenizer_dir)
    if args.max_seq_len is None:
        args.max_seq_len = 2048 if torch.cuda.is_available() and args.device != "cpu" else 512
    config = GPTConfig.from_depth(args.depth, tokenizer.get_vocab_size(), args.max_seq_len, args.aspect_ratio, args.head_dim)
    print0(f"depth {args.depth} -> width {config.n_embd} = {config.n_head} heads x {config.head_dim}, "
           f"vocabulary {config.vocab_size}, context {config.sequence_len}")
    device, dtype, passes = derive_batch(args, config.sequence_len)
    model = ckpt.build_model(config, device)
    params = model.num_params()
    print0("parameters " + ", ".join(f"{k} {v:,}" for k, v in params.items()))
    if args.num_iterations < 0:
        args.num_iterations = max(1, round(args.target_param_data_ratio * params["total"] / args.total_batch_size))
    print0(f"steps {args.num_iterations:,} = {args.num_iterations * args.total_batch_size / params['total']:.1f} "
           "tokens per parameter")
    args.tag = args.tag or f"d{args.depth}"
    folder = get_base_dir() / "base_checkpoints" / args.tag
    data = prepare_mixture(args.data)

    run = Run(folder, args, {"tokenizer": tokenizer.get_vocab_size(), "dtype": str(dtype)})
    torch.manual_seed(args.seed)
    model.init_weights()
    run.restore(model)
    if run.finished:
        print0(f"{folder} is trained already ({run.start} steps); --fresh starts over")
        return run.meta["figures"]
    tokenizer.save(folder / "tokenizer")
    model.compute_dtype = dtype
    if args.compile:
        compile_blocks(model)
    token_bytes = tokenizer.token_bytes()
    eval_steps = max(1, args.eval_tokens // (args.device_batch_size * config.sequence_len))

    def evaluate():
        val = DataLoader(tokenizer, data, "val", args.device_batch_size, config.sequence_len, device=device)
        return {"bpb": evaluate_bpb(model, val, eval_steps, token_bytes)}

    def backward(step, x, y, scale):
        return matryoshka_backward(model, x, y, [], scale)

    flops = 3 * sum(c.flops for c in model.cost(context=(config.sequence_len + 1) / 2).values())
    print0(f"FLOPs per trained token {flops:,.0f}")
    optimizers = setup_optimizers(model, args.matrix_lr, args.embedding_lr, args.unembedding_lr, args.scalar_lr)
    figures = run.train(model, optimizers, tokenizer, data, backward, evaluate, passes, config.sequence_len, flops)
    print0(f"trained {folder}: {figures['first_bpb']:.4f} -> {figures['bpb']:.4f} bits/byte, "
           f"{figures.get('tok_per_s', 0):,.0f} tok/s")
    return figures


if __name__ == "__main__":
    main()
