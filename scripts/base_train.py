"""
Trains a base GPT from one dial; everything else is derived and printed.

    python -m scripts.base_train --depth 4

The result is base_checkpoints/d4/{model_NNNNNN.pt,optim_NNNNNN.pt,meta_NNNNNN.json,tokenizer/} under
NANOCHAT_BASE_DIR, which scripts.surgery takes from there. Run again, it resumes where it stopped.
"""
import argparse
import functools
import itertools
import math

import torch

from nanochat import checkpoint_manager as ckpt
from nanochat import distributed
from nanochat.common import cli, find_device_type, get_base_dir, get_rank, print0
from nanochat.dataloader import DataLoader
from nanochat.elastic_step import ElasticStep
from nanochat.gpt import GPTConfig
from nanochat.loss_eval import evaluate_bpb
from nanochat.mixture import prepare_mixture
from nanochat.optim import setup_optimizers
from nanochat.owner import gives_back
from nanochat.step_estimate import Workload, fit, measured_speed
from nanochat.tokenizer import Tokenizer
from nanochat.training import Run, add_training_args, derive_batch, derive_length, memory_advice


@cli
@gives_back
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
    if not 0 < args.target_param_data_ratio < math.inf:
        raise ValueError(f"--target-param-data-ratio is {args.target_param_data_ratio}; it must be a number above 0")

    tokenizer_dir = args.tokenizer or get_base_dir() / "tokenizer"
    tokenizer = Tokenizer.from_directory(tokenizer_dir)
    args.device_type = find_device_type(args.device_type)
    if args.max_seq_len is None:
        args.max_seq_len = 2048 if args.device_type == "cuda" else 512
    config = GPTConfig.from_depth(args.depth, tokenizer.get_vocab_size(), args.max_seq_len, args.aspect_ratio, args.head_dim)
    print0(f"depth {args.depth} -> width {config.n_embd} = {config.n_head} heads x {config.head_dim}, "
           f"vocabulary {config.vocab_size}, context {config.sequence_len}")
    args.tag = args.tag or f"d{args.depth}"
    folder = get_base_dir() / "base_checkpoints" / args.tag
    workload = Workload(config)
    device, dtype, passes = derive_batch(args, config.sequence_len, folder, functools.partial(fit, workload))
    rank, world = get_rank()
    model = ckpt.build_model(config, device)
    params = model.num_params()
    print0("parameters " + ", ".join(f"{k} {v:,}" for k, v in params.items()))
    step = ElasticStep(model, args.seed, 1, None)
    step.steps = derive_length(args, params["total"], args.target_param_data_ratio, step.flops_per_token(),
                               lambda: measured_speed(workload, distributed.make_mesh("cpu"), args.device_batch_size, passes,
                                                      dtype), device)
    data = distributed.first_alone(lambda: prepare_mixture(args.data, args.skip_bad_rows))

    run = Run(folder, args, {"tokenizer": tokenizer.get_vocab_size(), "dtype": str(dtype)})
    torch.manual_seed(args.seed)
    model.init_weights()
    distributed.shard_model(model, distributed.make_mesh(device.type), dtype, args.gradient_checkpointing, args.compile)
    optimizers = setup_optimizers(model, args.matrix_lr, args.embedding_lr, args.unembedding_lr, args.scalar_lr,
                                  weight_decay=args.weight_decay, optimizer=args.optimizer)
    if run.meta is not None:
        run.restore(model, optimizers)
    token_bytes = tokenizer.token_bytes()
    eval_steps = -(-max(1, args.eval_tokens // (args.device_batch_size * config.sequence_len)) // world)

    def evaluate():
        val = DataLoader(tokenizer, data, "val", args.device_batch_size, config.sequence_len, device=device)
        with distributed.gathered_once(model):
            return {"bpb": evaluate_bpb(model, itertools.islice(val, rank, None, world), eval_steps, token_bytes,
                                        distributed.all_sum)}

    print0(f"FLOPs per trained token {step.flops(None, 1):,.0f}")
    if run.finished:
        figures = run.meta["figures"]
        print0(f"{folder} is trained already ({run.start} steps); --fresh starts over")
    else:
        if rank == 0:
            tokenizer.save(folder / "tokenizer")
        with memory_advice(args):
            figures = run.train(model, optimizers, tokenizer, data, step, evaluate, passes, config.sequence_len)
    if not (folder / f"meta_{args.num_iterations:06d}.json").is_file():
        ckpt.save_step(folder, args.num_iterations, model, optimizers, {
            "tokenizer_fingerprint": tokenizer.fingerprint, "settings": run.settings, "loader": run.loader,
            "figures": figures, "val_bpb": figures["bpb"]})
        distributed.barrier()
    print0(f"trained {folder}: {figures['first_bpb']:.4f} -> {figures['bpb']:.4f} bits/byte, "
           f"{figures.get('tok_per_s', 0):,.0f} tok/s")
    distributed.leave()
    return figures


if __name__ == "__main__":
    main()
