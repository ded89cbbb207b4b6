"""
What the three stages of nanochat-d32's hybrid take, computed from the model itself on the meta device.

    python -m scripts.plan                                      # 8 H100s at $3 an hour and 40 % MFU
    python -m scripts.plan --gpus 16 --gpu B200 --price 6 --mfu 0.35 --json plan.json
    python -m scripts.plan --memory --gpus 4 --gpu-memory 80    # what fits there, with which flags, traced: minutes
    python -m scripts.plan --nodes 8                            # bytes that 64 GPUs exchange in a step, and its time

Without --memory and --nodes, four tables: parameters; FLOPs of a generated token by mode; memory; and what training costs:
FLOPs per token of the step that the stage really runs (full pass, narrow pass and its teacher, what is frozen left out),
tokens per hour, the hours and dollars that --tokens-per-param takes, and what the hours and dollars of the project's
first plan buy in tokens.
"""
import argparse

from nanochat.checkpoint_manager import save_json
from nanochat.common import cli
from nanochat.monitor import PEAK_FLOPS
from nanochat.training import flag
from scripts.plan_memory import show_memory
from scripts.plan_nodes import show_nodes
from scripts.plan_tables import WIDTHS, d32_stages, show_tables

# Flags that a report (None: the tables) does not use.
IDLE = {None: {"device_batch_size", "gpu_memory", "nvlink", "network"},
        "--memory": {"gpu", "price", "mfu", "tokens", "tokens_per_param", "context", "nvlink", "network"},
        "--nodes": {"price", "tokens", "tokens_per_param", "context", "gpu_memory"}}


def positive(kind):
    def parse(text: str):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not positive")
        return value
    return parse


@cli
def main(argv=None) -> dict:
    p = argparse.ArgumentParser(prog="python -m scripts.plan", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                description="Parameters, compute, memory and cost of the three stages, from the code.")
    p.add_argument("--gpus", type=positive(int), default=8, help="how many there are")
    p.add_argument("--gpu", choices=list(PEAK_FLOPS), default="H100", help="which, for its bf16 peak")
    p.add_argument("--price", type=positive(float), default=3.0, help="dollars per GPU hour")
    p.add_argument("--mfu", type=positive(float), default=0.4, help="share of the peak that training reaches, to 1")
    p.add_argument("--tokens", type=positive(float), default=None, help="tokens per stage, instead of --tokens-per-param")
    p.add_argument("--tokens-per-param", type=positive(float), default=20.0,
                   help="tokens per trained parameter (fractal_train's default length)")
    p.add_argument("--context", type=positive(int), default=1024, help="tokens before the one whose compute is shown")
    p.add_argument("--memory", action="store_true", help="instead of the tables: trace the memory of a training step")
    p.add_argument("--gpu-memory", type=positive(float), default=80, help="with --memory: GB (10^9 bytes) of each GPU")
    p.add_argument("--device-batch-size", type=positive(int), default=None,
                   help="with --memory or --nodes: rows of 2048 tokens per GPU and pass (None: as many as fit; 4)")
    p.add_argument("--nodes", type=positive(int), nargs="+", default=None, metavar="N",
                   help="instead of the tables: what N nodes of --gpus GPUs exchange in a step (several N: each in turn)")
    p.add_argument("--nvlink", type=positive(float), default=350,
                   help="with --nodes: GB/s that a GPU sends within its node (H100: 450 at most)")
    p.add_argument("--network", type=positive(float), default=40,
                   help="with --nodes: GB/s that a GPU sends to other nodes (a 400 Gbit/s card each: 50 at most)")
    p.add_argument("--stages", type=int, nargs="+", choices=list(WIDTHS), default=list(WIDTHS), help="which")
    p.add_argument("--json", metavar="PATH", default=None, help="also write the figures there")
    args = p.parse_args(argv)
    if args.mfu > 1:
        raise ValueError(f"--mfu {args.mfu:g} is more than the whole peak: give a share such as 0.4")
    if args.memory and args.nodes:
        raise ValueError("--memory and --nodes are two reports: ask for one at a time")
    mode = "--memory" if args.memory else "--nodes" if args.nodes else None
    for name in sorted(k for k in IDLE[mode] if getattr(args, k) != p.get_default(k)):
        print(f"note: {flag(name)} has no effect {f'with {mode}' if mode else 'without --memory or --nodes'}")
    stages = [s for s in d32_stages() if s.number in args.stages]
    if args.memory:
        result = show_memory(stages, args)
    elif args.nodes:
        result = show_nodes(stages, args)
    else:
        result = show_tables(stages, args)
    if args.json:
        save_json(result, args.json)
    return result


if __name__ == "__main__":
    main()
