"""
The training loop that base_train and fractal_train share: schedule, gradient accumulation, evaluation, progress lines,
metrics.jsonl, wandb, checkpoints, and resuming where an interrupted run stopped.
"""
import argparse
import json
import math
import os
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

from nanochat import checkpoint_manager as ckpt
from nanochat import mixture
from nanochat.common import autodetect_device_type, get_compute_dtype, get_rank, print0
from nanochat.dataloader import DataLoader
from nanochat.shards import EMBEDDED

# Flags that say how a run is watched and kept, not what it computes: they may differ when it is resumed.
WATCHING = {"run", "eval_every", "save_every", "keep_checkpoints", "fresh", "log_every", "device", "compile", "checkpoint"}

# Dense bf16 peak FLOP/s by a part of the device's name, from the vendor's data sheets.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12,
              "4090": 165e12, "A10": 125e12}


def add_training_args(p: argparse.ArgumentParser, data: str | None = EMBEDDED) -> None:
    """The flags that every training script has. data: the default of --data; None: mixture.default_data's choice."""
    mixture.add_data_arg(p, data)
    p.add_argument("--num-iterations", type=int, default=-1, help="optimizer steps (default: derived and printed)")
    p.add_argument("--device-batch-size", type=int, default=-1,
                   help="rows per forward pass; lower it when memory runs out (default: 8 on a CPU, 32 on a GPU)")
    p.add_argument("--total-batch-size", type=int, default=-1,
                   help="tokens per optimizer step, over all passes (default: one pass on a CPU, 524288 on a GPU)")
    p.add_argument("--matrix-lr", type=float, default=0.02, help="Muon's learning rate (default: 0.02)")
    p.add_argument("--embedding-lr", type=float, default=0.2, help="AdamW's for embeddings, at width 768 (default: 0.2)")
    p.add_argument("--unembedding-lr", type=float, default=0.004,
                   help="AdamW's for the head, at width 768 (default: 0.004)")
    p.add_argument("--scalar-lr", type=float, default=0.004,
                   help="AdamW's for convolutions, gates and SSM parameters, at width 768 (default: 0.004)")
    p.add_argument("--warmup-ratio", type=float, default=0.0, help="share of the steps that raise the rate (default: 0)")
    p.add_argument("--warmdown-ratio", type=float, default=0.4,
                   help="share of the steps that lower it to 0 (default: 0.4)")
    p.add_argument("--seed", type=int, default=1337, help="of initialisation and sampling (default: 1337)")
    p.add_argument("--eval-every", type=int, default=250,
                   help="steps between evaluations; -1 = only before and after (default: 250)")
    p.add_argument("--eval-tokens", type=int, default=-1,
                   help="validation tokens per evaluation (default: 20 passes' worth)")
    p.add_argument("--save-every", type=int, default=250,
                   help="steps between checkpoints; -1 = only at the end (default: 250)")
    p.add_argument("--keep-checkpoints", type=int, default=2, help="how many to keep (default: 2)")
    p.add_argument("--log-every", type=int, default=10, help="steps between progress lines (default: 10)")
    p.add_argument("--compile", action="store_true",
                   help="compile each block: a slow start, then faster steps (needs a C++ compiler on a CPU)")
    p.add_argument("--fresh", action="store_true",
                   help="start over: delete the run's earlier checkpoints (default: resume from the newest)")
    p.add_argument("--run", default=None, help="log to wandb under this name (WANDB_MODE=offline works without network)")
    p.add_argument("--device", default=None, choices=["cpu", "cuda"], help="default: cuda where there is one")


def derive_batch(args, sequence_len: int) -> tuple[str, torch.dtype, int]:
    """
    Checks the numeric flags, fills in the device, device batch and total batch that `args` leave open, prints each
    derivation, and returns (device type, compute dtype, gradient accumulation passes per step).
    """
    for name, least in (("log_every", 1), ("keep_checkpoints", 1), ("device_batch_size", 1), ("total_batch_size", 1),
                        ("num_iterations", 1), ("eval_tokens", 1)):
        value = getattr(args, name)
        if value < least and value != -1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    if get_rank()[1] > 1:
        raise ValueError("training over several processes is not supported yet: start it without torchrun")
    device = args.device or autodetect_device_type()
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for, but torch sees no CUDA device: drop the flag to run on the CPU")
    dtype = get_compute_dtype(device)
    if args.device_batch_size < 0:
        args.device_batch_size = 32 if device == "cuda" else 8
    one_pass = args.device_batch_size * sequence_len
    if args.total_batch_size < 0:
        args.total_batch_size = max(1, 524288 // one_pass) * one_pass if device == "cuda" else one_pass
    if args.eval_tokens < 0:
        args.eval_tokens = 20 * one_pass
    if args.total_batch_size % one_pass:
        raise ValueError(f"--total-batch-size {args.total_batch_size} is no multiple of the {one_pass} tokens of one pass "
                         f"({args.device_batch_size} rows x {sequence_len}): choose one that is")
    passes = args.total_batch_size // one_pass
    print0(f"device {device}, {torch.get_num_threads()} threads, compute dtype {str(dtype).removeprefix('torch.')}")
    print0(f"tokens per step {args.total_batch_size:,} = {args.device_batch_size} rows x {sequence_len} tokens x "
           f"{passes} pass{'es' if passes > 1 else ''}")
    return device, dtype, passes


def lr_multiplier(step: int, total: int, warmup_ratio: float, warmdown_ratio: float) -> float:
    """Linear warm-up, constant, linear warm-down to zero after the last step."""
    warmup, warmdown = round(warmup_ratio * total), round(warmdown_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    return min(1.0, (total - step) / warmdown) if warmdown else 1.0


def muon_momentum(step: int) -> float:
    """0.85 rising to 0.95 over the first 300 steps, as in nanochat."""
    return 0.85 + 0.10 * min(step / 300, 1)


def set_rates(optimizers, step: int, total: int, warmup_ratio: float, warmdown_ratio: float) -> float:
    """Learning rates and Muon's momentum of a step, of `total`. Returns the multiplier of the rates."""
    scale = lr_multiplier(step, total, warmup_ratio, warmdown_ratio)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * scale
            if "momentum" in group:
                group["momentum"] = muon_momentum(step)
    return scale


class Run:
    """
    A training run in one folder. `settings` (all flags that change what is computed, and the source) are stored with
    every checkpoint; a resume with others is refused.
    """
    def __init__(self, folder: Path, args, extra_settings: dict):
        self.folder, self.args = Path(folder), args
        settings = {k: v for k, v in vars(args).items() if k not in WATCHING} | extra_settings
        self.settings = json.loads(json.dumps(settings))
        self.start, self.meta, self.loader = 0, None, None  # loader: the data position of the newest checkpoint
        ckpt.remove_leftovers(self.folder, everything=args.fresh)
        if args.fresh:
            (self.folder / "metrics.jsonl").unlink(missing_ok=True)
        elif ckpt.list_steps(self.folder):
            self.start = ckpt.last_step(self.folder)
            self.meta = ckpt.load_json(self.folder / f"meta_{self.start:06d}.json")
            self.loader = self.meta["loader"]
            before = self.meta.get("settings", {})
            if changed := sorted(k for k in before.keys() | self.settings.keys()
                                 if before.get(k) != self.settings.get(k)):
                k = changed[0]
                raise ValueError(f"{self.folder} holds a run with other settings ({', '.join(changed)}; {k} was "
                                 f"{before.get(k)!r}, now {self.settings.get(k)!r}): use the same flags to resume it, "
                                 "--fresh to start over, or another --tag")

    @property
    def finished(self) -> bool:
        """Whether the checkpoint to resume from is the run's last."""
        return self.meta is not None and self.start >= self.args.num_iterations

    def restore(self, model) -> None:
        """Loads the weights of the checkpoint to resume from, if there is one."""
        if self.meta is not None:
            path = self.folder / f"model_{self.start:06d}.pt"
            ckpt.load_state(model, ckpt.load_torch(path), path)

    def train(self, model, optimizers, tokenizer, data, backward, evaluate, passes: int, sequence_len: int,
              flops_per_token: float | None = None, data_from: dict | None = None, moments_from: Path | None = None) -> dict:
        """
        Trains to args.num_iterations. backward(step, x, y, scale) computes and backpropagates one pass and returns its
        losses; evaluate() returns a dict with 'bpb'; flops_per_token, where known, gives the MFU. data_from: a loader
        state of an earlier phase on the same data; this one goes on behind it, so that no text is seen twice before all
        has been seen once. moments_from: an optimizer file of an earlier phase, whose state a new run takes over.
        Returns the run's figures: 'bpb' and 'first_bpb' (last and first evaluation), 'tok_per_s', 'steps'.
        """
        args, device = self.args, model.device
        rank, world = get_rank()
        if self.meta is not None:
            ckpt.load_optimizers(self.folder, self.start, optimizers)
            print0(f"resuming {self.folder} after step {self.start}")
        elif moments_from is not None:
            print0(f"{ckpt.carry_optimizers(moments_from, optimizers)} parameters go on with the optimizer's state in "
                   f"{moments_from}; --warmup-ratio raises the rate anew")
        where = tokenizer, data, "train", args.device_batch_size, sequence_len, rank, world, device
        try:
            loader = DataLoader(*where, self.loader or data_from, seed=args.seed)
            if self.meta is None and data_from:
                print0(f"the data goes on behind the {loader.tokens_read:,} tokens of the phases before")
        except ValueError as e:
            if self.meta is not None or data_from is None:
                raise
            print0(f"the data starts from its beginning, not where the phase before stopped: {e}")
            loader = DataLoader(*where, seed=args.seed)
        batches = iter(loader)
        figures = dict(self.meta["figures"]) if self.meta else {}
        peak = next((v for k, v in PEAK_FLOPS.items() if device.type == "cuda" and k in torch.cuda.get_device_name()), None)
        wandb = _start_wandb(args.run, self.settings) if rank == 0 and args.run else None
        self.folder.mkdir(parents=True, exist_ok=True)
        step_times, total = [], args.num_iterations
        with open(self.folder / "metrics.jsonl", "a+b") as log:
            if log.tell() and (log.seek(-1, os.SEEK_END), log.read(1))[1] != b"\n":
                log.write(b"\n")  # an interrupted run left half a line

            def record(entry):
                log.write(json.dumps(entry).encode() + b"\n")
                log.flush()
                if wandb:
                    wandb.log(entry)

            for step in range(self.start, total + 1):
                last = step == total
                due = args.eval_every > 0 and step % args.eval_every == 0 and step > self.start
                if step == 0 or due or last:
                    t0 = time.perf_counter()
                    result = evaluate()
                    figures.setdefault("first_bpb", result["bpb"])
                    figures["bpb"] = result["bpb"]
                    print0(f"step {step:5d}/{total} | validation {result['bpb']:.4f} bits/byte "
                           f"({time.perf_counter() - t0:.1f} s)")
                    record({"step": step, **{f"val_{k}": v for k, v in result.items()}})
                if step_times:
                    figures["tok_per_s"] = round(args.total_batch_size / statistics.median(step_times), 1)
                if step > self.start and (last or (args.save_every > 0 and step % args.save_every == 0)):
                    if not all(bool(p.isfinite().all()) for p in model.parameters()):
                        raise ValueError(f"a weight is not finite at step {step}, nothing was saved: lower the learning "
                                         f"rates; the checkpoints in {self.folder} are from before")
                    self.loader = loader.state()
                    ckpt.save_step(self.folder, step, model, optimizers, keep=args.keep_checkpoints, meta={
                        "settings": self.settings, "loader": self.loader, "figures": figures,
                        "val_bpb": figures.get("bpb")})
                if last:
                    break
                t0 = time.perf_counter()
                losses = {}
                for _ in range(passes):
                    x, y = next(batches)
                    for k, v in backward(step, x, y, 1 / passes).items():
                        losses[k] = losses.get(k, 0) + v / passes
                scale = set_rates(optimizers, step, total, args.warmup_ratio, args.warmdown_ratio)
                for opt in optimizers:
                    opt.step()
                model.zero_grad(set_to_none=True)
                losses = {k: float(v) for k, v in losses.items()}  # waits for the device
                if not math.isfinite(losses["loss"]):
                    raise ValueError(f"the loss is {losses['loss']} at step {step}: lower --matrix-lr and --embedding-lr; "
                                     f"the checkpoints in {self.folder} are from before")
                step_times.append(time.perf_counter() - t0)
                if step % args.log_every == 0 or step == total - 1:
                    recent = statistics.median(step_times[-20:])
                    rate = args.total_batch_size / recent
                    mfu = f" | MFU {rate * flops_per_token / peak:.1%}" if peak and flops_per_token else ""
                    values = " | ".join(f"{k} {v:.4f}" for k, v in losses.items())
                    print0(f"step {step:5d}/{total} | {values} | lr x{scale:.2f} | {rate:,.0f} tok/s{mfu} | "
                           f"ETA {_clock(recent * (total - step - 1))}")
                    record({"step": step, **losses, "lr_scale": scale, "tok_per_s": rate,
                            "peak_rss_mb": peak_rss_mb()})
        if wandb:
            wandb.finish()
        return figures | {"steps": total}


def peak_rss_mb() -> float:
    """The most memory that this process has had resident, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def _clock(seconds: float) -> str:
    m, s = divmod(int(seconds), 60)
    return f"{m // 60}:{m % 60:02d}:{s:02d}" if m >= 60 else f"{m}:{s:02d}"


def _start_wandb(name: str, settings: dict):
    import wandb  # takes seconds to import, and most runs do not want it
    try:
        return wandb.init(project="nanochat", name=name, config=settings)
    except Exception as e:  # its own exception classes vary between versions
        raise ConnectionError(f"wandb could not start ({e}): set WANDB_MODE=offline, or leave --run away") from e
