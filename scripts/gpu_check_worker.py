"""
A short training run for `scripts.gpu_check`, which kills it and starts it again: it saves after each step and goes on from
what it finds. Prints a line of JSON at the start and for each step.
"""
import argparse
import json
from pathlib import Path

import torch

from nanochat import step_checkpoint
from nanochat.checkpoint_manager import build_model
from nanochat.common import cli, get_compute_dtype
from nanochat.distributed import gradient_norm, init_processes, shard_model
from nanochat.elastic_step import ElasticStep
from nanochat.optim import setup_optimizers
from nanochat.stages import set_trained
from nanochat.step_parts import shares
from scripts.gpu_check_parts import Setting, randomized


@cli
def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m scripts.gpu_check_worker", description=__doc__.split("\n\n")[0])
    p.add_argument("folder", type=Path, help="where the checkpoints are")
    p.add_argument("steps", type=int, help="how many steps the whole run has")
    p.add_argument("--dry", action="store_true", help="small, on the CPU")
    args = p.parse_args(argv)
    device = init_processes("cpu" if args.dry else "cuda")
    s = Setting.on_cpu() if args.dry else Setting.on_gpu(device, get_compute_dtype("cuda"))
    model = randomized(build_model(s.small, device))
    set_trained(model, "unfrozen")
    shard_model(model, None, s.dtype)
    optimizers = setup_optimizers(model)
    found, start = step_checkpoint.find_whole(args.folder), 0
    if found is not None:
        start = found[0]
        step_checkpoint.load(step_checkpoint.path_of(args.folder, start), model, optimizers)
    print(json.dumps({"resumed": start}), flush=True)
    step, saver = ElasticStep(model, 0, args.steps, "lean"), step_checkpoint.Saver(args.folder, 2)
    for i in range(start, args.steps):
        generator = torch.Generator().manual_seed(i)
        x, y = torch.randint(s.small.vocab_size, (2, 4, s.small.sequence_len), generator=generator).to(device)
        losses = step(i, x, y, shares([(x, y)])[0])
        gradient_norm(model.parameters())
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        print(json.dumps({"step": i + 1, "loss": float(losses["loss"])}), flush=True)
        saver.save(i + 1, model, optimizers, {"settings": {}}, {"loader": None})
    saver.wait()


if __name__ == "__main__":
    main()
