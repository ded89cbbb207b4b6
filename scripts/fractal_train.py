r"""
Trains a hybrid so that all its widths work: stage 1 trains what surgery added and keeps the base as it was; stages 2 and 3
train what growth added, and Mamba; --unfreeze trains everything at a lower learning rate; --controls then fits the predictor
and the gate of mode auto.

    python -m scripts.fractal_train --checkpoint \
        $NANOCHAT_BASE_DIR/hybrid_checkpoints/d4_256 --matryoshka --sample-dim
    torchrun --nproc_per_node=8 -m scripts.fractal_train --checkpoint \
        ~/.cache/nanochat/hybrid_checkpoints/d32_2048/model.pt --expanded-dim=2048 --matryoshka --sample-dim
    python -m scripts.fractal_train --checkpoint \
        $NANOCHAT_BASE_DIR/fractal_checkpoints/d4_256 --unfreeze --matryoshka --sample-dim
    python -m scripts.fractal_train --checkpoint \
        $NANOCHAT_BASE_DIR/fractal_checkpoints/d4_256_unfrozen --controls

--teacher CHECKPOINT has whole passes learn from another model, too, such as the one before surgery.

Each step is a full pass and, with --matryoshka, a narrow one at sampled widths and exits: --recipe says of which rows, and
whether the narrow pass learns from the text or from the full one; some tokens of the full pass, where there is one, also
learn to answer at its exit points. With --controls the model stays as it is, and gate and predictor learn on the passes that
they decide themselves. The result is model.pt, optim.pt, config.json and
tokenizer/ in fractal_checkpoints/<tag>_<width>[_unfrozen][_auto]/ under NANOCHAT_BASE_DIR, beside the step_N/ folders that
the same command resumes from, on any number of processes.
"""
import argparse
import itertools
from pathlib import Path
from typing import NamedTuple

import torch

from nanochat import checkpoint_manager as ckpt
from nanochat import distributed, stages
from nanochat.common import cli, find_device_type, get_base_dir, get_compute_dtype, get_rank, print0
from nanochat.confidence_probe import budget_grid, by_frequency, calibrate_prices
from nanochat.dataloader import DataLoader
from nanochat.elastic_step import DEFAULT_RECIPE, RECIPES, TAUGHT, ElasticStep
from nanochat.engine import prepare_inference
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import EXIT_WEIGHT, Original, evaluate_bpb
from nanochat.mamba_block import announce_form
from nanochat.mixture import default_data, prepare_mixture
from nanochat.optim import setup_optimizers, state_bytes
from nanochat.owner import gives_back
from nanochat.step_estimate import Workload, fit, measured_speed
from nanochat.training import Run, add_training_args, check_rate, derive_batch, derive_length, flag, memory_advice

RATES = {"matrix_lr": {"matrix"}, "embedding_lr": {"embedding"}, "unembedding_lr": {"unembedding"}, "scalar_lr": {"scalar"},
         "weight_decay": {"matrix", "embedding", "unembedding"}}


def uncalibrated(model, tokenizer, data, rows: int = 64) -> dict:
    """What mode auto needs before any threshold is calibrated: the prices that make plans meet a budget on held-out text."""
    T = model.config.sequence_len
    x, _ = next(iter(DataLoader(tokenizer, data, "val", rows, T, device=model.device)))
    return {"budget": 1.0, "prices": calibrate_prices(model, x[:, :max(1, T // 4)].tolist(), budget_grid(model))}


def is_export_of(folder, step: int, source: str) -> bool:
    """Whether the export in `folder` is a run's after so many steps; its config.json is what is written last."""
    try:
        provenance = ckpt.load_json(folder / "config.json").get("provenance")
    except (FileNotFoundError, ValueError):
        return False
    return (isinstance(provenance, dict) and (provenance.get("steps"), provenance.get("source_sha256")) == (step, source)
            and (folder / "model.pt").is_file())


class Teacher(NamedTuple):
    """The model of --teacher, which stays as it is: where its weights are, and its size in the compute dtype."""
    config: GPTConfig
    info: dict
    file: Path
    bytes: int

    @staticmethod
    def find(path: str, config: GPTConfig, tokenizer, dtype: torch.dtype) -> "Teacher":
        """ValueError for a model that cannot teach one of `config`: of another tokenizer or a shorter context."""
        own, info, file = ckpt.find(path)
        if ckpt.load_tokenizer(file.parent, own, info).fingerprint != tokenizer.fingerprint:
            raise ValueError(f"--teacher {path} has another tokenizer than the model, so its tokens mean something else: "
                             "name the model that this one was made from")
        if own.sequence_len < config.sequence_len:
            raise ValueError(f"--teacher {path} has a context of {own.sequence_len} tokens, the model one of "
                             f"{config.sequence_len}: name one with as long a context")
        size = sum(p.numel() for p in ckpt.build_model(own, "meta").parameters()) * dtype.itemsize
        return Teacher(own, info, file, size)

    def load(self, device: torch.device, dtype: torch.dtype) -> GPT:
        """The model, whole on every rank, without gradients."""
        model = ckpt.build_model(self.config, "meta")
        ckpt.load_weights(model, ckpt.weights_of(self.info, self.file), self.file, device)
        prepare_inference(model, device.type, dtype)
        return model


def parse_args(argv) -> tuple[argparse.Namespace, set[str]]:
    """The flags, and the names of those that were given another value than their default."""
    p = argparse.ArgumentParser(description="Train a hybrid at sampled widths, stage by stage.")
    p.add_argument("--checkpoint", required=True, help="the hybrid: an export's folder or the model.pt in it")
    p.add_argument("--expanded-dim", type=int, default=None,
                   help="the hybrid's width, as a check: another one is an error (default: the checkpoint's)")
    p.add_argument("--stage", type=int, choices=[1, 2, 3], default=None,
                   help="1: train the Mamba blocks and value embeddings, the base frozen; 2 and 3: what the last "
                        "growth added and the Mamba mixers, all else frozen (default: by the checkpoint's provenance)")
    p.add_argument("--unfreeze", action="store_true", help="train everything instead, at --lr-scale times the rates")
    p.add_argument("--lr-scale", type=float, default=None,
                   help="multiplies every learning rate (default: 1; 0.3 with --unfreeze)")
    p.add_argument("--matryoshka", action="store_true", help="also train narrow widths")
    p.add_argument("--sample-dim", action="store_true",
                   help="sample one width per block and step, instead of a pass at every level in every step")
    p.add_argument("--dim-levels", default=None,
                   help="the widths that narrow passes learn, such as 128,512,1024 (default: all levels of the model)")
    p.add_argument("--recipe", choices=list(RECIPES), default=None,
                   help="; ".join(f"{k}: {v}" for k, v in RECIPES.items()) + f" (default: {DEFAULT_RECIPE}; both without "
                        f"--sample-dim or with --draft-exit, where {DEFAULT_RECIPE} cannot be)")
    p.add_argument("--student-every", type=int, default=4, help="of --recipe every (default: 4)")
    p.add_argument("--draft-exit", type=int, default=None, metavar="BLOCKS",
                   help="also teach the full width what the whole model says already after so many blocks: good drafts "
                        "for lossless decoding")
    p.add_argument("--exit-weight", type=float, default=EXIT_WEIGHT,
                   help="with --matryoshka: weight of answering at the exit points beside the full pass's cross-entropy; "
                        "less is better for whole passes and worse for early exits, 0 leaves exits to narrow passes "
                        f"(default: {EXIT_WEIGHT})")
    p.add_argument("--controls", action="store_true",
                   help="train the predictor and the gate alone, for mode auto, and leave the model as it is")
    p.add_argument("--predictor", choices=["value", "gumbel"], default="value",
                   help="with --controls: how the predictor learns, by regression on what plans cost, or by "
                        "straight-through Gumbel-softmax (default: value, the better one)")
    p.add_argument("--energy-lambda", type=float, default=1.0,
                   help="with --predictor gumbel: weight of the distance between a plan's cost and its budget (default: 1)")
    p.add_argument("--teacher", default=None, metavar="CHECKPOINT",
                   help="a model that stays as it is, such as the one before surgery: whole passes also learn what it says, "
                        "so that what it knows is not lost")
    p.add_argument("--teacher-weight", type=float, default=0.5,
                   help="with --teacher: its share in what whole passes learn; the rest is the text (default: 0.5)")
    p.add_argument("--export", action="store_true",
                   help="write model.pt from the run's newest checkpoint, whole or not, and train no further")
    p.add_argument("--allow-slow-mamba", action="store_true",
                   help="on a GPU, train a model of more than 1 B parameters even if Mamba-2's kernels cannot run "
                        "(`python -m scripts.get_kernels` brings them)")
    p.add_argument("--tag", default=None, help="name of the family (default: the checkpoint's)")
    add_training_args(p, data=None)
    args = p.parse_args(argv)
    if args.sample_dim and not args.matryoshka:
        raise ValueError("--sample-dim has no effect without --matryoshka: add it, or drop --sample-dim")
    if args.controls and (args.matryoshka or args.unfreeze or args.draft_exit):
        raise ValueError("--controls trains nothing but the controls: drop --matryoshka, --sample-dim, --draft-exit and "
                         "--unfreeze")
    if args.predictor != "value" and not args.controls:
        raise ValueError("--predictor has no effect without --controls: add it, or drop --predictor")
    given = {k for k, v in vars(args).items() if v != p.get_default(k)}
    if args.recipe is None:
        args.recipe = DEFAULT_RECIPE if args.sample_dim and args.draft_exit is None else "both"
    if args.recipe not in TAUGHT and args.matryoshka and not args.sample_dim:
        raise ValueError(f"--recipe {args.recipe} has passes at sampled widths only: add --sample-dim")
    if args.recipe in ("lean", "split") and args.matryoshka and args.device_batch_size == 1:
        raise ValueError(f"--recipe {args.recipe} needs at least two rows: raise --device-batch-size, or use --recipe both")
    if args.export and args.fresh:
        raise ValueError("--fresh deletes the checkpoints that --export is to write from: drop one of them")
    if args.draft_exit is not None and args.matryoshka and args.recipe not in TAUGHT:
        raise ValueError("--draft-exit learns what the full pass of the same rows says, and a step of --recipe "
                         f"{args.recipe} has none: drop --draft-exit, "
                         f"or choose --recipe {', '.join(r for r in RECIPES if r in TAUGHT)}")
    if args.teacher is not None and (args.controls or (args.matryoshka and args.recipe == "single")):
        raise ValueError("--teacher teaches whole passes, and there are none with --controls or --recipe single: drop it")
    if not 0 < args.teacher_weight <= 1:
        raise ValueError(f"--teacher-weight is {args.teacher_weight}; it is a share above 0, at most 1")
    if args.student_every < 1:
        raise ValueError(f"--student-every is {args.student_every}; it must be at least 1")
    if args.lr_scale is None:
        args.lr_scale = 0.3 if args.unfreeze else 1.0
    for name in ("lr_scale", "energy_lambda", "exit_weight"):
        check_rate(args, name)
    return args, given


def find_phase(args, config, info) -> tuple[str, dict | None]:
    """What is trained, for stages.set_trained: the phase, and what is old in stages 2 and 3. ValueError for a wrong one."""
    if args.expanded_dim not in (None, config.n_embd):
        raise ValueError(f"--expanded-dim {args.expanded_dim} is not the checkpoint's width {config.n_embd}: name another "
                         f"checkpoint, or grow this one first (`python -m scripts.surgery --expand-from={config.n_embd} "
                         f"--new-dim={args.expanded_dim}`)")
    if args.controls or args.unfreeze:
        return "controls" if args.controls else "unfrozen", None
    known = stages.stage_of(config, info.get("provenance")) if args.stage is None or config.n_embd == config.d_ref else None
    if known is not None and args.stage is None:
        print0(f"stage {known}, by the checkpoint's provenance")
    elif (args.stage == 1) != (config.n_embd == config.d_ref):
        raise ValueError(f"--stage {args.stage} does not fit: the checkpoint's width is {config.n_embd} and its base's "
                         f"{config.d_ref}; stage 1 is for a hybrid of its base's width, stages 2 and 3 for a grown one")
    stage = args.stage or known
    return f"stage {stage}", stages.frozen_boxes(config, info.get("provenance")) if stage > 1 else None


def find_levels(spec: str | None, config) -> tuple[int, ...] | None:
    """--dim-levels as widths; ValueError for one that the model does not have."""
    if spec is None:
        return None
    try:
        levels = {int(w) for w in spec.split(",")}
    except ValueError:
        levels = {0}
    if not levels <= set(config.levels):
        raise ValueError(f"--dim-levels {spec}: the model's levels are {','.join(map(str, config.levels))}; name some of "
                         "these")
    return tuple(sorted(levels | {config.top_width}))


def say_without_effect(given: set[str], args, phase: str, groups: set[str]) -> None:
    """A line for each flag that was given and changes nothing in this phase."""
    idle = {name: "nothing of its kind is trained" for name, kinds in RATES.items() if not kinds & groups}
    if phase in ("unfrozen", "controls"):
        idle["stage"] = "it is for training with a frozen part"
    if args.predictor != "gumbel":
        idle["energy_lambda"] = "it is for --controls --predictor gumbel"
    if phase == "controls":
        idle["lr_scale"] = "the controls have a rate of their own"
    if not args.matryoshka:
        idle |= dict.fromkeys(("dim_levels", "recipe", "exit_weight"), "it is for --matryoshka")
    if args.recipe == "single":
        idle["exit_weight"] = "--recipe single has no full pass"
    if args.teacher is None:
        idle["teacher_weight"] = "it is for --teacher"
    if args.recipe != "every":
        idle["student_every"] = "it is for --recipe every"
    for name in sorted(given & idle.keys()):
        print0(f"note: {flag(name)} has no effect in phase {phase}: {idle[name]}")


@gives_back
def train(args, given: set[str], folder: Path | None = None, watch=None, label: str | None = None) -> dict:
    """
    Trains as the flags say, writes the export into `folder` (None: see above), and returns the run's figures. watch: called
    at every evaluation with (model, tokenizer, {mode: bits per byte}), and returns more figures to record. label: what the
    export's provenance calls the training (None: its phase).
    """
    config, info, file = ckpt.find(args.checkpoint)
    if ckpt.model_kind(config) != "hybrid":
        raise ValueError(f"{args.checkpoint} holds a base GPT: make a hybrid of it with "
                         "`python -m scripts.surgery --src ...`")
    tokenizer, T = ckpt.load_tokenizer(file.parent, config, info), config.sequence_len
    phase, boxes = find_phase(args, config, info)
    levels = find_levels(args.dim_levels, config)
    if args.draft_exit is not None and args.draft_exit not in config.exit_points:
        raise ValueError(f"--draft-exit {args.draft_exit} is no exit point of this model: choose one of "
                         f"{', '.join(map(str, config.exit_points))}")
    if args.controls and not config.exit_points:
        raise ValueError("a model of one layer has no exit point for --controls to decide at: train one of two or more")
    args.tag = args.tag or info.get("tag", f"d{config.n_layer}")
    source_is_unfrozen = str(info.get("provenance", {}).get("trained", "")).startswith("unfrozen")
    suffix = ("_unfrozen" if args.unfreeze or (args.controls and source_is_unfrozen) else "") + "_auto" * args.controls
    folder = folder or get_base_dir() / "fractal_checkpoints" / f"{args.tag}_{config.n_embd}{suffix}"
    if folder.resolve() == file.parent.resolve():
        raise ValueError(f"{folder} is both the source and the destination: name another family with --tag")
    recipe = f"controls {args.predictor}" if args.controls else args.recipe if args.matryoshka else None
    workload = Workload(config, phase, stages.grown_from(info.get("provenance")) if boxes else None,
                        args.matryoshka and args.recipe in TAUGHT, recipe, args.sample_dim or not args.matryoshka,
                        args.draft_exit, args.exit_weight)
    dtype = get_compute_dtype(find_device_type(args.device_type))
    teacher = None if args.teacher is None else Teacher.find(args.teacher, config, tokenizer, dtype)

    def fit_beside(total, given, gpu):
        return fit(workload, total, given, gpu._replace(memory=gpu.memory - (teacher.bytes if teacher else 0)))
    device, dtype, passes = derive_batch(args, T, folder, fit_beside)
    rank, world = get_rank()

    model = ckpt.build_model(config, "meta")
    announce_form(model, device.type, training=not args.export, allow_slow=args.allow_slow_mamba)
    stages.set_trained(model, phase, workload.gate, boxes)
    trained = stages.trained_entries(model, boxes)
    print0("parameters " + ", ".join(f"{k} {v:,}" for k, v in model.num_params().items()) + f"; trained {trained:,}")
    needed, whole = state_bytes(model, args.optimizer)
    print0(f"{phase}: the optimizer's state is {needed / 1e9:.2f} GB over all processes, {1 - needed / whole:.0%} less than "
           "if everything were trained" + (f"; the old entries of {len(boxes)} tensors stay as they are" if boxes else ""))
    step = ElasticStep(model, args.seed, 1, recipe, args.sample_dim, levels, args.student_every, args.energy_lambda,
                       args.draft_exit, args.exit_weight)
    if teacher is not None and not args.export:
        print0(f"teacher {teacher.file}: {teacher.bytes / 1e9:.2f} GB on each device; its share in whole passes is "
               f"{args.teacher_weight:g}")
        step.original = Original(teacher.load(device, dtype), args.teacher_weight)
    step.steps = derive_length(args, trained, 20, step.flops_per_token(), lambda: measured_speed(
        workload, distributed.make_mesh("cpu"), args.device_batch_size, passes, dtype), device)
    print0(f"levels {', '.join(map(str, levels or config.levels))}"
           + (f"; recipe {args.recipe}: {RECIPES[args.recipe]}" if args.sample_dim else ""))
    args.data = args.data or default_data(device.type)
    # an export of what is trained reads no text, but for the controls' prices
    data = None
    if not args.export or args.controls:
        data = distributed.first_alone(lambda: prepare_mixture(args.data, args.skip_bad_rows))

    source = distributed.everyone(ckpt.sha256(file) if rank == 0 else None)[0]
    run = Run(folder, args, {"source_sha256": source, "dtype": str(dtype), "phase": phase})
    distributed.shard_model(model, distributed.make_mesh(device.type), dtype, args.gradient_checkpointing, args.compile)
    state = ckpt.check_state(model.state_dict(), ckpt.load_torch(file), file)
    model.to_empty(device=device)
    rates = [lr * args.lr_scale for lr in (args.matrix_lr, args.embedding_lr, args.unembedding_lr, args.scalar_lr)]
    optimizers = setup_optimizers(model, *rates, weight_decay=args.weight_decay, frozen=boxes, optimizer=args.optimizer)
    say_without_effect(given, args, phase, {g["name"] for o in optimizers for g in o.param_groups})
    if run.meta is not None:
        run.restore(model, optimizers)
    elif args.export:
        raise FileNotFoundError(f"there is no checkpoint in {folder} to export: train first, without --export")
    else:
        distributed.load_shards(model, state)
        if args.controls:
            model.predictor.admit_new_levels()
        if any(p.requires_grad for p in model.gate.parameters()):
            model.gate.admit_new_units()
            if not bool(model.gate.c_proj.weight.any()):  # never trained
                x, _ = next(iter(DataLoader(tokenizer, data, "train", 64, T)))  # the same text on all ranks
                model.gate.resemble(state["lm_head.weight"][by_frequency(x)])
        if (moments := file.parent / "optim.pt").is_file():
            print0(f"{ckpt.carry_optimizers(moments, optimizers)} parameters go on with the optimizer's state in {moments}; "
                   "--warmup-ratio raises the rate anew")
    del state

    token_bytes = tokenizer.token_bytes()
    eval_steps = -(-max(1, args.eval_tokens // (args.device_batch_size * T)) // world)
    names = list(config.distinct_modes) if args.matryoshka else ["god"]

    def evaluate():
        out = {}
        with distributed.gathered_once(model):
            for mode in names:
                val = DataLoader(tokenizer, data, "val", args.device_batch_size, T, device=device)
                out[mode] = evaluate_bpb(model, itertools.islice(val, rank, None, world), eval_steps, token_bytes,
                                         distributed.all_sum, widths=mode)
        print0("  " + ", ".join(f"{k} {v:.4f}" for k, v in out.items()))
        if rows := int(distributed.all_sum(step.unsupervised.clone())):
            print0(f"  note: {rows} rows so far had no token to learn: their conversations are longer than a row")
        more = watch(model, tokenizer, out) if watch else {}
        return {"bpb": out[names[-1]], **out, **more}  # the last is the full width

    if args.export or run.finished:
        figures = run.meta["figures"]
        print0(f"{folder} is trained " + ("already" if run.finished else "so far") + f" ({run.start} steps)"
               + ("; --fresh starts over" if run.finished else ""))
    else:
        with memory_advice(args, workload.least_rows):
            figures = run.train(model, optimizers, tokenizer, data, step, evaluate, passes, T,
                                data_from=info.get("loader"))
    if run.finished and distributed.everyone(is_export_of(folder, run.start, source))[0]:
        distributed.leave()  # what was added to it since, such as a calibration, stays
        return figures
    ckpt.save_optimizers(folder / "optim.pt", optimizers)
    distributed.barrier()
    ckpt.save_export(folder, model, tokenizer, {
        "tag": args.tag, "provenance": {"trained": label or suffix[1:] or phase, "steps": figures.get("steps", run.start),
                                        "source_sha256": source, "from": info.get("provenance")},
        "figures": figures, "loader": run.loader,
        **({"calibration": uncalibrated(model, tokenizer, data)} if args.controls else {})})
    distributed.barrier()
    said = f": {figures['first_bpb']:.4f} -> {figures['bpb']:.4f} bits/byte at full width" if "bpb" in figures else ""
    print0(f"wrote {folder}{said}")
    distributed.leave()
    return figures


@cli
def main(argv=None):
    return train(*parse_args(argv))


if __name__ == "__main__":
    main()
