"""
The training loop that base_train and fractal_train share: schedule, gradient accumulation over passes and ranks, evaluation,
steps that are skipped, checkpoints, and resuming where an interrupted run stopped.
"""
import argparse
import contextlib
import json
import math
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from nanochat import checkpoint_manager as ckpt
from nanochat import mixture, step_checkpoint
from nanochat.common import find_device_type, get_compute_dtype, get_rank, note_if_busy, print0, to_device
from nanochat.dataloader import DataLoader
from nanochat.dataset import add_skip_arg
from nanochat.distributed import (
    Gpu,
    all_sum,
    everyone,
    gradient_norm,
    init_processes,
    local,
    reduce_whole,
    smallest_gpu,
)
from nanochat.monitor import Monitor, peak_flops, timer
from nanochat.optim import MATRIX_LR, OPTIMIZERS
from nanochat.owner import own
from nanochat.shards import EMBEDDED
from nanochat.step_parts import GPU_TOKENS, set_rates, shares
from nanochat.stop import SIGNALS, Stop

# Flags that say how a run is watched and kept, not what it computes: they may differ when it is resumed.
WATCHING = {"run", "eval_every", "save_every", "keep_checkpoints", "fresh", "log_every", "device_type", "compile",
            "checkpoint", "export", "gradient_checkpointing", "max_skipped_steps", "price",
            "skip_bad_rows", "accept_changed_data", "allow_slow_mamba"}
# Flags that follow from the number of processes: they may differ, as long as their product does not.
SPLIT = {"device_batch_size"}
MFU = 0.4  # assumed share of the GPUs' bf16 peak, before the first step has been timed
DOLLARS = 3.0  # per GPU hour


def add_training_args(p: argparse.ArgumentParser, data: str | None = EMBEDDED) -> None:
    """The flags that every training script has. data: the default of --data; None: mixture.default_data's choice."""
    mixture.add_data_arg(p, data)
    add_skip_arg(p)
    p.add_argument("--accept-changed-data", action="store_true",
                   help="resume although the data changed since the checkpoint, at the nearest position (default: an error "
                        "that says what changed)")
    p.add_argument("--num-iterations", type=int, default=-1, help="optimizer steps (default: derived and printed)")
    p.add_argument("--target-hours", type=float, default=None, metavar="H",
                   help="derive the number of steps from the hours that the run may take: on GPUs from their peak, assuming "
                        f"that training reaches {MFU:.0%}% of it, on a CPU from a timed step")
    p.add_argument("--price", type=float, default=DOLLARS,
                   help=f"dollars per GPU hour, for the estimated cost of the run (default: {DOLLARS:g})")
    p.add_argument("--device-batch-size", type=int, default=-1,
                   help="rows per forward pass of one process; lower it when memory runs out (default: 8 on a CPU; on GPUs "
                        "as many as their memory holds, at most 32, by an estimate that is printed)")
    p.add_argument("--total-batch-size", type=int, default=-1,
                   help="tokens per optimizer step, over all passes and processes (default: one pass of each on a CPU, "
                        "524288 on a GPU)")
    p.add_argument("--optimizer", choices=OPTIMIZERS, default=None,
                   help="muon: Muon for the matrices of the blocks, AdamW for the rest; adamw: AdamW for all "
                        "(default: muon; adamw on GPUs whose memory Muon's buffers do not fit)")
    p.add_argument("--matrix-lr", type=float, default=None,
                   help="learning rate of the blocks' matrices: Muon's, or AdamW's at width 768 (default: "
                        f"{MATRIX_LR['muon']:g}, with --optimizer adamw {MATRIX_LR['adamw']:g})")
    p.add_argument("--embedding-lr", type=float, default=0.2, help="AdamW's for embeddings, at width 768 (default: 0.2)")
    p.add_argument("--unembedding-lr", type=float, default=0.004,
                   help="AdamW's for the head, at width 768 (default: 0.004)")
    p.add_argument("--scalar-lr", type=float, default=0.004,
                   help="AdamW's for convolutions, gates and SSM parameters, at width 768 (default: 0.004)")
    p.add_argument("--weight-decay", type=float, default=0.0,
                   help="of matrices, embeddings and head, times the learning rate (default: 0, as nanochat-d32's)")
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
    p.add_argument("--keep-checkpoints", type=int, default=2,
                   help="how many to keep, of those that an interrupted run resumes from (default: 2)")
    p.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=None,
                   help="compute each block again in the backward pass instead of keeping its activations: a third more "
                        "compute, a fraction of the memory (default: off on a CPU; on GPUs only where memory needs it)")
    p.add_argument("--max-skipped-steps", type=int, default=10,
                   help="a step whose loss or gradient is not finite is skipped; stop after so many in a row (default: 10)")
    p.add_argument("--log-every", type=int, default=10,
                   help="steps between progress lines, off a terminal at most one a minute (default: 10)")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                   help="compile each block: a slow start, then faster steps; needs a C++ compiler on a CPU "
                        "(default: on for GPUs, off on a CPU)")
    p.add_argument("--fresh", action="store_true",
                   help="start over: delete the run's earlier checkpoints (default: resume from the newest)")
    p.add_argument("--run", default=None, help="log to wandb under this name (WANDB_MODE=offline works without network)")
    p.add_argument("--device-type", default=None, choices=["cpu", "cuda"], help="default: cuda where there is one")


def derive_batch(args, sequence_len: int, folder: Path, fit) -> tuple[torch.device, torch.dtype, int]:
    """
    Checks the numeric flags, joins the other processes if torchrun started several, makes this run the one that writes into
    `folder`, fills in what `args` leave open (the batch, gradient checkpointing, compilation, the optimizer and its rate;
    the batch and the optimizer as the run in `folder` has them, where one is to be resumed), prints each derivation, and
    returns (device, compute dtype, gradient accumulation passes per step). fit(total batch, given, gpu) finds what GPUs can
    hold: see derive_for_gpus. BlockingIOError where another process writes into `folder`.
    """
    _check_numbers(args)
    kind = find_device_type(args.device_type)
    asked = args.total_batch_size > 0
    device, dtype, world = init_processes(kind), get_compute_dtype(kind), get_rank()[1]
    own(folder)
    resumed = not args.fresh and step_checkpoint.settle(args, folder)
    if kind == "cuda":
        derive_for_gpus(args, smallest_gpu(), fit)
    else:
        args.device_batch_size = 8 if args.device_batch_size < 0 else args.device_batch_size
        args.gradient_checkpointing, args.compile = bool(args.gradient_checkpointing), bool(args.compile)
        args.optimizer = args.optimizer or "muon"
    if args.matrix_lr is None:
        args.matrix_lr = MATRIX_LR[args.optimizer]
    one_pass = args.device_batch_size * sequence_len * world
    if args.total_batch_size < 0:
        args.total_batch_size = max(1, GPU_TOKENS // one_pass) * one_pass if kind == "cuda" else one_pass
    if args.eval_tokens < 0:
        args.eval_tokens = 20 * one_pass
    if args.total_batch_size % one_pass:
        raise _indivisible(args, sequence_len, world, None if asked or not resumed else folder)
    passes = args.total_batch_size // one_pass
    if world == 1:
        note_if_busy(torch.get_num_threads())
    print0(f"device {kind}, {torch.get_num_threads()} threads, compute dtype {str(dtype).removeprefix('torch.')}"
           + (f", {world} processes" if world > 1 else ""))
    print0(f"tokens per step {args.total_batch_size:,} = {args.device_batch_size} rows x {sequence_len} tokens x "
           + (f"{world} processes x " if world > 1 else "") + f"{passes} pass{'es' if passes > 1 else ''}")
    return device, dtype, passes


def _indivisible(args, sequence_len: int, world: int, folder: Path | None) -> ValueError:
    """The error for a total batch that is no whole number of passes. folder: of the run whose total batch it is."""
    total, rows = args.total_batch_size, args.total_batch_size // sequence_len
    of_pass = (f"the {args.device_batch_size * sequence_len * world} tokens of one pass ({args.device_batch_size} rows x "
               f"{sequence_len}" + (f" x {world} processes" if world > 1 else "") + ")")
    if folder is None:
        return ValueError(f"--total-batch-size {total} is no multiple of {of_pass}: choose one that is")
    return ValueError(f"{folder} holds a run with {total} tokens, {rows} rows, in a step, which is no "
                      f"multiple of {of_pass}: " + (f"choose a --device-batch-size that divides {rows // world}"
                      if rows % world == 0 else f"resume it with a number of processes that divides {rows}")
                      + ", or start over with --fresh")


def derive_for_gpus(args, gpu: Gpu, fit) -> None:
    """
    Fills in the rows per pass, gradient checkpointing and optimizer that `args` leave open, by fit(tokens per optimizer step
    or -1, what flags fix of step_estimate.Choice, gpu), which the first rank calls and which returns the choice and a line
    about it; and whether blocks are compiled. fit's ValueError (nothing fits into such a GPU) is raised on all ranks.
    """
    args.compile = True if args.compile is None else args.compile
    fixed = {"rows": None if args.device_batch_size < 0 else args.device_batch_size,
             "checkpointing": args.gradient_checkpointing, "optimizer": args.optimizer}
    answer = None
    if get_rank()[0] == 0:
        try:
            answer = fit(args.total_batch_size, {k: v for k, v in fixed.items() if v is not None}, gpu)
        except ValueError as e:
            answer = e
    answer = everyone(answer)[0]
    if isinstance(answer, ValueError):
        raise answer
    (args.device_batch_size, args.gradient_checkpointing, args.optimizer), said = answer
    print0(said)


def derive_length(args, trained: int, ratio: float, flops: dict[str, float] | None, measure, device) -> int:
    """
    Fills in args.num_iterations where it is open (from --target-hours, else `ratio` tokens per `trained` parameter), prints
    it with the hours and dollars that it takes, and returns it. flops: of a step per token, by part, None where unknown;
    measure() times a step and returns tokens per second, for --target-hours on a CPU. ValueError where hours cannot be
    turned into steps.
    """
    speed, basis, world = None, "", get_rank()[1]
    if device.type == "cuda":
        gpu = smallest_gpu()
        if flops is not None and (peak := peak_flops(gpu.name)) is not None:
            speed = world * peak * MFU / sum(flops.values())
            basis = f"{world} x {gpu.name} at {MFU:.0%} of the bf16 peak"
        elif args.target_hours is not None and args.num_iterations < 0:
            raise ValueError("--target-hours needs a speed to count with, and that of this phase on a "
                             f"{gpu.name} is not known: give --num-iterations")
    elif args.target_hours is not None and args.num_iterations < 0:
        speed, basis = measure(), "a timed step of this machine"
    said = f"{ratio:g} tokens per trained parameter"
    if args.num_iterations < 0 and args.target_hours is not None:
        said = f"--target-hours {args.target_hours:g}"
        args.num_iterations = max(1, int(args.target_hours * 3600 * speed / args.total_batch_size))
    elif args.num_iterations < 0:
        args.num_iterations = max(1, round(ratio * trained / args.total_batch_size))
    else:
        said = "given" if args.target_hours is None else "as the run to be resumed has it"
    tokens = args.num_iterations * args.total_batch_size
    print0(f"steps {args.num_iterations:,} ({said}): {tokens / 1e9:,.4g} B tokens, {tokens / trained:.1f} per trained "
           "parameter")
    if speed is not None:
        hours = tokens / speed / 3600
        cost = f" and ${hours * world * args.price:,.0f} at ${args.price:g} per GPU hour (--price)" * (device.type == "cuda")
        other = "" if args.target_hours else "; --target-hours H fits the run into H hours"
        print0(f"time: about {hours:,.1f} hours{cost} on {basis}{other}; the progress lines show the real speed")
    return args.num_iterations


@contextlib.contextmanager
def memory_advice(args, least_rows: int = 1):
    """Turns a GPU's lack of memory inside into a ValueError that names the flags to change, in the order to try them."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        rows, advice = args.device_batch_size, []
        if rows > least_rows:
            advice.append(f"--device-batch-size {max(least_rows, rows // 2)} (it is {rows})")
        if not args.gradient_checkpointing:
            advice.append("--gradient-checkpointing")
        if args.optimizer == "muon":
            advice.append("--optimizer adamw, without Muon's buffers (for a run that has begun only with --fresh)")
        advice.append("more GPUs, over which the model is spread")
        raise ValueError(f"the GPU of rank {get_rank()[0]} ran out of memory ({str(e).partition('.')[0]}): the same command "
                         f"goes on from the last checkpoint with {', then '.join(advice)}") from e


def _check_numbers(args) -> None:
    """ValueError for a flag of add_training_args whose number means nothing; -1 is one's default or a word for never."""
    for name in ("log_every", "keep_checkpoints", "max_skipped_steps", "device_batch_size", "total_batch_size",
                 "num_iterations", "eval_tokens", "eval_every", "save_every"):
        value = getattr(args, name)
        may_be_open = name not in ("log_every", "keep_checkpoints", "max_skipped_steps")
        if value < 1 and not (may_be_open and value == -1):
            raise ValueError(f"{flag(name)} is {value}; it must be at least 1" + (", or -1" if may_be_open else ""))
    for name in ("warmup_ratio", "warmdown_ratio"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"{flag(name)} is {getattr(args, name)}; it is a share of the steps, from 0 to 1")
    for name in ("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr", "weight_decay"):
        if getattr(args, name) is not None:
            check_rate(args, name)
    check_rate(args, "price")
    if args.target_hours is not None:
        if args.num_iterations > 0:
            raise ValueError("--target-hours and --num-iterations both say how long the run is: drop one of them")
        if not 0 < args.target_hours < math.inf:
            raise ValueError(f"--target-hours is {args.target_hours}; it must be a number above 0")
    if not -2**62 <= args.seed < 2**62:
        raise ValueError(f"--seed is {args.seed}; it must be from -2^62 to 2^62")


def check_rate(args, name: str) -> None:
    """ValueError for a rate or weight that is negative, not finite, or more than fp32 holds."""
    if not 0 <= getattr(args, name) <= 1e30:
        raise ValueError(f"{flag(name)} is {getattr(args, name)}; it must be a finite number, 0 or more (and at most 1e30)")


def flag(name: str) -> str:
    """An argument's name as the flag that sets it."""
    return f"--{name.replace('_', '-')}"


class Run:
    """
    A training run in one folder. `settings` (all flags that change what is computed, and the source) are stored with
    every checkpoint; a resume with others is refused.
    """
    def __init__(self, folder: Path, args, extra_settings: dict):
        self.folder, self.args = own(folder), args
        settings = {k: v for k, v in vars(args).items() if k not in WATCHING | SPLIT} | extra_settings
        self.settings = json.loads(json.dumps(settings))
        self.start, self.meta, self.loader = 0, None, None  # loader: the data position of every rank
        step_checkpoint.check_shared(self.folder)
        if foreign := everyone(ckpt.foreign_files(self.folder))[0]:
            raise ValueError(f"{self.folder} holds another program's checkpoint ({foreign[0]}), which is not deleted or "
                             "overwritten: name this run otherwise with --tag, or move that away")
        if get_rank()[0] == 0:
            step_checkpoint.remove_leftovers(self.folder, everything=args.fresh)
            ckpt.remove_leftovers(self.folder, everything=args.fresh)
            if args.fresh:
                for name in ("metrics.jsonl", "curves.png"):
                    (self.folder / name).unlink(missing_ok=True)
        everyone(None)  # nobody looks before that is done
        found = step_checkpoint.find_whole(self.folder)
        if found is not None:
            self.start, self.meta = found
            self.path = step_checkpoint.path_of(self.folder, self.start)
            self.loader = [step_checkpoint.read_rank(self.path, r)["loader"] for r in range(self.meta["world"])]
            before = self.meta.get("settings", {})
            if changed := sorted(k for k in before.keys() | self.settings.keys() if before.get(k) != self.settings.get(k)
                                 and not (k == "data" and args.accept_changed_data)):
                k = changed[0]
                raise ValueError(f"{self.folder} holds a run with other settings ({', '.join(changed)}; {k} was "
                                 f"{before.get(k)!r}, now {self.settings.get(k)!r}): use the same flags to resume it, "
                                 "--fresh to start over, or another --tag")

    @property
    def evaluated(self) -> bool:
        """Whether the checkpoint to resume from knows what an evaluation at its step said."""
        return self.meta is not None and self.meta.get("evaluated", self.start) == self.start

    @property
    def finished(self) -> bool:
        """Whether the checkpoint to resume from is the run's last, and nothing is left to do after it."""
        return self.evaluated and self.start >= self.args.num_iterations

    def restore(self, model, optimizers: list) -> None:
        """Loads the checkpoint to resume from: weights, optimizers, this rank's random state."""
        step_checkpoint.load(self.path, model, optimizers)
        if self.start:  # as they were when it was saved: a run without a step left writes them with its export
            set_rates(optimizers, self.start - 1, self.args.num_iterations, self.args.warmup_ratio, self.args.warmdown_ratio)
        rank, world = get_rank()
        if world == self.meta["world"]:
            torch.set_rng_state(torch.tensor(list(bytes.fromhex(step_checkpoint.read_rank(self.path, rank)["rng"])),
                                             dtype=torch.uint8))
        else:
            print0(f"the checkpoint is of {self.meta['world']} processes, now there are {world}: weights and optimizers are "
                   "the same, the text goes on behind the furthest of them")
        print0(f"resuming {self.folder} after step {self.start}")

    def _open_data(self, tokenizer, data, sequence_len, device, data_from) -> DataLoader:
        """The training batches: where this run stopped, or behind an earlier phase's, or from the beginning."""
        where = tokenizer, data, "train", self.args.device_batch_size, sequence_len, *get_rank(), device
        loader, fault = None, None
        try:
            loader = DataLoader(*where, self.loader or data_from, seed=self.args.seed,
                                accept_changed=self.args.accept_changed_data)
        except ValueError as e:
            fault = str(e)
        faults = [f for f in everyone(fault) if f]  # all ranks go on, or none: they read one text
        if not faults:
            if self.meta is None and data_from:
                print0(f"the data goes on behind the {loader.tokens_read * get_rank()[1]:,} tokens of the phases before")
            return loader
        if self.meta is not None or data_from is None:
            raise ValueError(faults[0])
        print0(f"the data starts from its beginning, not where the phase before stopped: {faults[0]}")
        return DataLoader(*where, seed=self.args.seed)

    def train(self, model, optimizers, tokenizer, data, backward, evaluate, passes: int, sequence_len: int,
              data_from=None) -> dict:
        """
        Trains to args.num_iterations. backward(step, x, y, share) backpropagates one pass and returns its part of the step's
        losses, which add up over passes and ranks: 'loss' and others; 'flops', its FLOPs; 'a:b' with 'a', where 'a' is to be
        divided by it. evaluate() returns a dict with 'bpb', the same on all ranks. data_from: the loader states of all ranks
        of an earlier phase on the same data; this one goes on behind it, so that no text is seen twice before all has been
        seen once. Returns the run's figures: 'bpb' and 'first_bpb' (last and first evaluation), 'tok_per_s', 'steps',
        'skipped'. SystemExit (128 + the signal) when interrupted, after saving.
        """
        args, total = self.args, self.args.num_iterations
        loader = self._open_data(tokenizer, data, sequence_len, model.device, data_from)
        self.figures = dict(self.meta["figures"]) if self.meta else {}
        self.monitor = Monitor(self.folder, self.start, total, model.device, args.total_batch_size, args.run, self.settings)
        self.saver = step_checkpoint.Saver(self.folder, args.keep_checkpoints)
        self.saved = self.written = self.start  # the steps of the newest checkpoint that was begun, and that is whole
        in_a_row = stopping = 0
        with Stop() as stop:
            for step in range(self.start, total + 1):
                if step > self.start and (stopping or is_due(step, args.save_every, total)):
                    self._save(step, model, optimizers, loader)
                if stopping:
                    self._leave(step, stopping)
                # after the save: an evaluation that fails costs no step
                if (step == 0 or is_due(step, args.eval_every, total)) and not (step == self.start and self.evaluated):
                    self._evaluate(step, evaluate)
                if step == total:
                    break
                t0 = timer(model.device)
                batches = [(*next(loader), loader.live) for _ in range(passes)]
                losses = {}
                for (x, y, _), share in zip(batches, shares([live for _, _, live in batches])):
                    for k, v in backward(step, x, y, share).items():
                        losses[k] = losses.get(k, 0) + v
                reduce_whole(model.parameters())
                norm = float(gradient_norm(model.parameters()))
                losses, stopping = _over_ranks(losses, stop.signal, model.device)
                flops = losses.pop("flops", 0)
                scale = set_rates(optimizers, step, total, args.warmup_ratio, args.warmdown_ratio)
                if math.isfinite(norm) and math.isfinite(losses["loss"]):
                    for opt in optimizers:
                        opt.step()
                    in_a_row = 0
                else:
                    in_a_row += 1
                    self._skip(step, model, losses["loss"], norm, in_a_row)
                model.zero_grad(set_to_none=True)
                if in_a_row == 0:
                    self.monitor.step(step, timer(model.device) - t0, losses, scale, norm, flops,
                                      step % args.log_every == 0 or step == total - 1)
            self._settle()
        self.monitor.close()
        if self.start < total:
            self.loader = everyone(loader.state())
        return self.figures | {"steps": total}

    def _evaluate(self, step: int, evaluate) -> None:
        """Evaluates, and has the checkpoint of the step, if there is one, know the result."""
        self._settle(self._next_save(step))  # it is on the disk, whatever becomes of the evaluation
        t0 = time.perf_counter()
        result = evaluate()
        self.figures.setdefault("first_bpb", result["bpb"])
        self.figures["bpb"] = result["bpb"]
        self.monitor.say(f"step {step:5d}/{self.args.num_iterations} | validation {result['bpb']:.4f} bits/byte "
                         f"({time.perf_counter() - t0:.1f} s)")
        self.monitor.record({"step": step, **{f"val_{k}": v for k, v in result.items()}})
        if step and self.written == step:
            self.saver.amend(step, {"figures": self.figures, "evaluated": step})

    def _save(self, step: int, model, optimizers: list, loader: DataLoader) -> None:
        """Begins to write a checkpoint. ValueError for a model that is not finite."""
        self._settle(step)
        finite = torch.tensor(float(all(bool(local(p).isfinite().all()) for p in model.parameters())))
        if float(all_sum(finite.to(model.device))) < get_rank()[1]:
            raise ValueError(f"a weight is not finite at step {step}, nothing was saved: lower the learning "
                             f"rates; the checkpoints in {self.folder} are from before")
        if self.monitor.tok_per_s:
            self.figures["tok_per_s"] = self.monitor.tok_per_s
        meta = {"settings": self.settings, "figures": dict(self.figures), "evaluated": None,
                "kind": ckpt.model_kind(model.config), "model_config": asdict(model.config)}
        self.saver.save(step, model, optimizers, meta, {"loader": loader.state(), "rng": _rng()})
        self.saved = step
        self.monitor.draw()

    def _next_save(self, step: int) -> int | None:
        """The first step after this one whose checkpoint is due, None after the last."""
        every, total = self.args.save_every, self.args.num_iterations
        return None if step == total else min(total, (step // every + 1) * every) if every > 0 else total

    def _settle(self, following: int | None = None) -> None:
        """
        Waits until the checkpoint under way is written. One that could not be (a full disk) ends no run that goes on: it is
        said, and the next one is tried, at step `following`. OSError where there is none.
        """
        try:
            self.saver.wait()
            self.written = self.saved
        except OSError as e:
            self.saved = self.written
            if following is None:
                raise OSError(e.errno, f"{e.strerror}; then run the same command again, which goes on from "
                                       f"step {self.written}") from e
            self.monitor.say(f"warning: {e.strerror}; the run goes on, and saves again at step {following}")

    def _leave(self, step: int, number: int) -> None:
        """Ends the program after a signal: SystemExit, 128 + its number."""
        self._settle()
        self.monitor.close()
        print0(f"stopped by {signal.Signals(number).name}: step {step} is saved; the same command goes on from there")
        sys.exit(128 + number)

    def _skip(self, step: int, model, loss: float, norm: float, in_a_row: int) -> None:
        """Counts a step whose loss or gradient is not finite. ValueError where there were too many in a row."""
        self.figures["skipped"] = self.figures.get("skipped", 0) + 1
        self.monitor.say(f"step {step} is skipped: loss {loss}, gradient norm {norm} ({in_a_row} in a row, "
                         f"{self.figures['skipped']} in all)")
        self.monitor.record({"step": step, "skipped": self.figures["skipped"], "loss": str(loss), "grad_norm": str(norm)})
        if in_a_row >= self.args.max_skipped_steps:
            self._settle(self._next_save(step))
            raise ValueError(self._diagnosis(model, step, loss, norm))

    @torch.no_grad()
    def _diagnosis(self, model, step, loss, norm) -> str:
        bad = [name for name, p in model.named_parameters() if p.grad is not None and not local(p.grad).isfinite().all()]
        largest, name = max((float(local(p).abs().max()), name) for name, p in model.named_parameters() if local(p).numel())
        where = f"; not finite are the gradients of {len(bad)} tensors, {', '.join(bad[:3])} first" if bad else ""
        return (f"{self.args.max_skipped_steps} steps in a row, to {step}, had no finite loss and gradient (loss {loss}, "
                f"norm {norm}{where}; the largest weight is in {name}, {largest:.3g}): lower --matrix-lr and "
                f"--embedding-lr, or look at the data there; the checkpoints in {self.folder} are from before")


def _over_ranks(losses: dict, stop: int | None, device) -> tuple[dict[str, float], int]:
    """A step's losses over all ranks, and the signal that any of them got (0: none), in one exchange."""
    there = sorted(k for k, v in losses.items() if isinstance(v, torch.Tensor) and v.device.type != "cpu")
    here = sorted(losses.keys() - set(there))
    signals = [float(s == stop) for s in SIGNALS]
    values = [to_device(torch.tensor([float(losses[k]) for k in here] + signals, dtype=torch.float64), device)]
    if there:  # in one piece: on a GPU each would be a copy of its own
        values.insert(0, torch.stack([losses[k].double() for k in there]))
    values = all_sum(torch.cat(values)).tolist()
    got = [s for s, count in zip(SIGNALS, values[len(losses):]) if count]
    out = dict(zip(there + here, values))
    for key in [k for k in out if ":" in k]:
        weight = out.pop(key)
        name = key.partition(":")[0]
        out[name] = out[name] / weight if weight else 0.0
    return out, int(got[0]) if got else 0


def is_due(step: int, every: int, total: int) -> bool:
    """Whether what is done every so many steps (-1: never) is done at this one; at the last one it always is."""
    return step == total or (every > 0 and step % every == 0)


def _rng() -> str:
    return bytes(torch.get_rng_state().tolist()).hex()
