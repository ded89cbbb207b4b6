"""
Checkpoints: written whole or not at all, read as hostile until proven.

Three layouts, the first two beside the step_N/ folders that training resumes from (step_checkpoint.py):
  base_checkpoints/<tag>/      model_000650.pt  optim_000650.pt  meta_000650.json      (nanochat's names)
  fractal_checkpoints/<tag>/   model.pt  optim.pt  config.json  tokenizer/
  hybrid_checkpoints/<tag>/    model.pt  config.json  tokenizer/                       (surgery's output)
A step's meta file is written last and marks the checkpoint as whole. Every file is loaded with weights_only=True.
"""
import contextlib
import glob
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_args

import torch

from nanochat import vintages
from nanochat.common import atomic_write, fsync_dir, get_base_dir, get_rank, print0, raise_if_full, user_path
from nanochat.distributed import full_optimizer_state, full_state, local, local_rows
from nanochat.gpt import GPT, GPTConfig
from nanochat.hybrid_gpt import HybridConfig, HybridGPT
from nanochat.owner import own
from nanochat.weight_files import INDEX, Weights, check_specs, first_line, load_torch, open_weights, some

if TYPE_CHECKING:  # models load without the packages that text needs
    from nanochat.tokenizer import Tokenizer

EXPORT_FILES = {"model.pt", "config.json", "tokenizer", "optim.pt"}
_CONFIGS = {"gpt": (GPTConfig, GPT), "hybrid": (HybridConfig, HybridGPT)}
STEP_FILES = (".pt", ".safetensors", INDEX)  # what the name of a step's weights ends in
# Config fields that came with nanochat's later vintages: a config without them is of a model like d32.
LATER_FIELDS = {"rope_base", "softcap", "qk_scale", "windows", "x0_lambdas", "smear_gate", "smear_lambda", "backout_lambda",
                "value_embeds"}


# ---------------------------------------------------------------------------------------------------------------------
# Files

def save_torch(obj, path: Path) -> None:
    """torch.save, atomically. OSError when the disk is full; what `path` held before is then untouched."""
    with atomic_write(path) as f:
        _dump(obj, f)


def _dump(obj, f) -> None:
    # torch's zip writer turns the file's OSError into a RuntimeError; remember the true cause
    sink = _Sink(f)
    try:
        torch.save(obj, sink)
    except RuntimeError:
        if sink.error is not None:
            raise sink.error from None
        raise


class _Sink:
    """A binary file that keeps the OSError of a failed write."""
    def __init__(self, f):
        self.f, self.error = f, None

    def write(self, data):
        try:
            return self.f.write(data)
        except OSError as e:
            self.error = e
            raise

    def flush(self):
        self.f.flush()


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as f:
        digest = hashlib.sha256()
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def save_json(obj, path: Path) -> None:
    with atomic_write(path, "w") as f:
        json.dump(obj, f, indent=1)
        f.write("\n")


def load_json(path: Path) -> dict:
    """ValueError when the file is not a JSON object, FileNotFoundError when there is none."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path.name} in {path.parent}")
    try:
        obj = json.loads(path.read_text())
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is no valid JSON ({first_line(e)}): copy or write the checkpoint again") from e
    if not isinstance(obj, dict):
        raise ValueError(f"{path} holds no JSON object: copy or write the checkpoint again")
    return obj


# ---------------------------------------------------------------------------------------------------------------------
# Models

def config_from_dict(kind: str, fields: dict) -> GPTConfig:
    """
    The config of a checkpoint ('gpt' or 'hybrid'). Fields that this version does not know mean an architecture that it
    does not have: refused with ValueError, as are values of the wrong type.
    """
    if not isinstance(kind, str) or kind not in _CONFIGS:
        raise ValueError(f"unknown model kind {kind!r} in the checkpoint's config: known are {', '.join(_CONFIGS)}")
    cls = _CONFIGS[kind][0]
    known = cls.__dataclass_fields__
    if unknown := sorted(set(fields) - set(known)):
        raise ValueError(f"the checkpoint's config has fields this version does not support: {', '.join(unknown)}")
    if missing := sorted(set(known) - set(fields) - LATER_FIELDS):  # an earlier version wrote it, of a model like d32
        raise ValueError(f"the checkpoint's config lacks {', '.join(missing)}")
    return cls(**{name: _checked(name, known[name].type, value) for name, value in fields.items()})


def _checked(name: str, kind, value):
    """A config field's value, as JSON gives it, if it is of its kind. ValueError otherwise."""
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name} in the checkpoint's config is {value!r}; it must be true or false")
        return value
    if kind not in (int, float):  # a tuple of one of them
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{name} in the checkpoint's config is {value!r}; it must be a list of numbers")
        return tuple(_checked(name, get_args(kind)[0], v) for v in value)
    real = kind is float
    if isinstance(value, bool) or not isinstance(value, (int, float) if real else int) or not math.isfinite(value):
        raise ValueError(f"{name} in the checkpoint's config is {value!r}; it must be a "
                         f"{'finite' if real else 'whole'} number")
    return value


def check_state(own: dict, state: dict, where) -> dict:
    """
    `state` without the prefixes of torch.compile and DistributedDataParallel, once its names and shapes are those of `own`
    (a model's state dict, on any device). ValueError that names keys missing, extra or mis-shaped.
    """
    state = check_specs(state, where)
    faults = []
    if missing := [k for k in own if k not in state]:
        faults.append(f"missing {some(missing)}")
    if extra := [k for k in state if k not in own]:
        faults.append(f"unexpected {some(extra)}")
    if bad := [f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
               for k in own if k in state and state[k].shape != own[k].shape]:
        faults.append(f"of another shape {some(bad)}")
    if faults:
        raise ValueError(f"{where} does not fit the model of its config: {'; '.join(faults)}. "
                         "Use the checkpoint with the config it was saved with")
    return state


def load_weights(model: torch.nn.Module, weights: Weights, where, device=None) -> None:
    """
    Loads weights in place, one after the other, in the parameters' own dtypes. ValueError where check_state finds faults;
    then nothing has been loaded. With `device` a model on the meta device is materialised there first, but only once the
    weights are known to fit: a hostile config allocates nothing.
    """
    own = model.state_dict()
    check_state(own, weights.specs, where)
    if device is not None:
        own = model.to_empty(device=device).state_dict()
    with torch.no_grad():
        for k, p in own.items():
            p.copy_(weights.read(k))


def load_state(model: torch.nn.Module, state: dict, where, device=None) -> None:
    """`load_weights` of a state dict in memory."""
    load_weights(model, Weights.of(state, where), where, device)


def build_model(config: GPTConfig, device="cpu") -> GPT:
    """The model of a config, its weights allocated on `device` (which may be 'meta') but not initialised."""
    with torch.device("meta"):
        model = _CONFIGS[model_kind(config)][1](config)
    return model if device == "meta" else model.to_empty(device=device)


def model_kind(config: GPTConfig) -> str:
    return next(kind for kind, (cfg, _) in _CONFIGS.items() if cfg is type(config))


# ---------------------------------------------------------------------------------------------------------------------
# Step checkpoints: model_000650.pt, optim_000650.pt, meta_000650.json

def save_step(folder: Path, step: int, model: GPT, optimizers: list, meta: dict) -> None:
    """
    Writes a checkpoint under nanochat's names. meta gets the step, the model's kind and config. All ranks call, the first
    one writes. A failure (OSError when the disk is full) leaves the earlier checkpoints as they were.
    """
    folder = Path(folder)
    names = [folder / f"{stem}_{step:06d}.{ext}" for stem, ext in (("model", "pt"), ("optim", "pt"), ("meta", "json"))]
    state = full_state(model)
    try:
        if state is not None:
            save_torch(state, names[0])
        save_optimizers(names[1], optimizers)
        if state is not None:
            save_json({"step": step, "kind": model_kind(model.config), "model_config": asdict(model.config), **meta},
                      names[2])
    except OSError:
        for name in names:  # a checkpoint without its meta file is no checkpoint: give the room back
            name.unlink(missing_ok=True)
        raise


def list_steps(folder: Path) -> list[int]:
    """Steps that have a whole checkpoint in `folder`, ascending."""
    steps = [int(m[1]) for p in Path(folder).glob("meta_*.json") if (m := re.fullmatch(r"meta_(\d+)\.json", p.name))]
    return sorted(s for s in steps if weights_file(folder, s).is_file())


def remove_leftovers(folder: Path, everything: bool = False) -> None:
    """
    Deletes what a killed run left half-written: temporary files and step files without their meta file. `everything`:
    also whole checkpoints and the export.
    """
    folder = Path(folder)
    keep = set() if everything else set(list_steps(folder))
    for path in list(folder.glob("*")):
        step = re.fullmatch(r"(?:model|optim|meta)_(\d+)\.(?:pt|json)", path.name)
        half = re.fullmatch(r"\.(?:(?:model|optim|meta|config)[_\d]*\.(?:pt|json)|curves\.png)\..*\.tmp", path.name)
        if half or (step and int(step[1]) not in keep) or (everything and path.name in ("model.pt", "config.json")):
            path.unlink()
    for path in folder.glob("tokenizer/.token*.tmp"):
        path.unlink()


def last_step(folder: Path) -> int:
    """The newest step of `folder`; FileNotFoundError with the remedy if there is none."""
    steps = list_steps(folder)
    if not steps:
        raise FileNotFoundError(f"there is no checkpoint in {folder}: train one first, or name another folder")
    return steps[-1]


def find_step(folder: Path, step: int, vintage: str | None = None) -> "Found":
    """
    One step's config, meta and file. nanochat's own files, whose meta has no 'kind', are base GPTs of a vintage that is told
    from the weights, or given by its letter where the user knows better; the meta then has it under 'vintage'.
    """
    meta = load_json(Path(folder) / f"meta_{step:06d}.json")
    if not isinstance(meta.get("model_config"), dict):
        raise ValueError(f"meta_{step:06d}.json in {folder} has no model_config: it is no nanochat checkpoint")
    file = weights_file(folder, step)
    if "kind" in meta:
        if vintage is not None:
            raise ValueError(f"--vintage {vintage} has no effect on {file}: this program wrote it")
        return Found(config_from_dict(meta["kind"], meta["model_config"]), meta, file)
    base = vintages.convert(open_weights(file), meta["model_config"], file, vintage)
    return Found(base.config, {**meta, "vintage": base.vintage.name, "vintage_notes": base.notes}, file)


def weights_file(folder: Path, step: int) -> Path:
    """The file of a step's weights: of torch.save, or else of safetensors."""
    names = [f"model_{step:06d}{end}" for end in STEP_FILES]
    return next((path for name in names if (path := Path(folder) / name).is_file()), Path(folder) / names[0])


def weights_of(info: dict, file: Path) -> Weights:
    """The weights of what was found, under the names that our models have. ValueError as in `open_weights`."""
    weights = open_weights(file)
    if "kind" in info:
        return weights
    return vintages.convert(weights, info["model_config"], file, info["vintage"]).weights


def load_step(folder: Path, step: int, device="cpu") -> tuple[GPT, dict]:
    """(model with its weights, meta) of one step."""
    config, meta, file = find_step(folder, step)
    model = build_model(config, "meta")
    load_weights(model, weights_of(meta, file), file, device)
    return model, meta


def save_optimizers(path: Path, optimizers: list) -> None:
    """
    Writes the optimizers' states, whole, named by their parameters; all ranks call, the first one writes. OSError when the
    disk is full.
    """
    states = [full_optimizer_state(opt) for opt in optimizers]
    if get_rank()[0] == 0:
        save_torch(states, path)


def carry_optimizers(path: Path, optimizers: list) -> int:
    """
    Takes over, by the parameters' names, the moments that an earlier phase left in an optimizer file, in place, and returns
    how many parameters had some; the others start afresh. ValueError for a file without names or of other shapes.
    """
    saved = {}
    try:
        for state in load_torch(path):
            saved |= {name: state["state"][i] for i, name in optimizer_names(state).items() if i in state["state"]}
    except (KeyError, TypeError, IndexError) as e:
        raise ValueError(f"{path} holds no optimizers' states ({first_line(e)}): remove it to start with fresh ones") from e
    carried = 0
    for opt in optimizers:
        for group in opt.param_groups:
            for name, p in zip(group["param_names"], group["params"]):
                moments = saved.get(name, {})
                if any(v.ndim and v.shape != p.shape for v in moments.values()):
                    raise ValueError(f"the optimizer's state of {name} in {path} is of another shape than {tuple(p.shape)}: "
                                     "it belongs to another model; remove it to start with fresh states")
                for k, v in moments.items():
                    # a count of steps too belongs on the parameter's device: the fused AdamW takes no other
                    opt.state[p][k] = torch.zeros_like(p) if v.ndim else v.to(p.device, copy=True)
                    if v.ndim:
                        local(opt.state[p][k]).copy_(v[local_rows(p)])
                carried += bool(moments)
    return carried


def optimizer_names(state: dict) -> dict[int, str]:
    """Index -> parameter's name in one optimizer's state dict. ValueError where it does not say."""
    try:
        return {i: name for g in state["param_groups"] for i, name in zip(g["params"], g["param_names"], strict=True)}
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError("the optimizer's state does not name its parameters (it was saved by an earlier version): train a "
                         "few steps more with this one, or leave its state behind") from e


# ---------------------------------------------------------------------------------------------------------------------
# Exports: model.pt, config.json, tokenizer/

def save_export(folder: Path, model: GPT, tokenizer: "Tokenizer", info: dict) -> None:
    """
    Writes folder/{model.pt,config.json,tokenizer/}; config.json holds kind, config and `info` (provenance, proof). An
    earlier export there stays whole until both files have been written (OSError when the disk is full). config.json takes
    its place last: what it says is true of the weights beside it. All ranks call, the first one writes.
    """
    folder, state = Path(folder), full_state(model)
    if state is None:
        return
    tokenizer.save(folder / "tokenizer")
    with atomic_write(folder / "config.json", "w") as g, atomic_write(folder / "model.pt") as f:
        _dump(state, f)
        json.dump({"kind": model_kind(model.config), "config": asdict(model.config), **info}, g, indent=1)


class Found(NamedTuple):
    """Where a model's weights are: its config, its config.json or meta, and the file."""
    config: GPTConfig
    info: dict
    file: Path


def find(path: str | os.PathLike, step: int | None = None, vintage: str | None = None) -> Found:
    """
    An export (its folder, or the model.pt in it) or a training folder (its newest step, or the one given, or a model_NNNNNN
    file in it). vintage: see find_step. FileNotFoundError if there is none, ValueError for damaged files and for a folder
    that holds two models.
    """
    path = Path(path).expanduser()
    folder = path
    if path.name.endswith(STEP_FILES) and not path.is_dir():
        match = re.fullmatch(rf"model_(\d+)(?:{'|'.join(map(re.escape, STEP_FILES))})", path.name)
        if not path.is_file() or not (match or path.name == "model.pt"):
            raise FileNotFoundError(f"there is no checkpoint file {path}: name a folder, its model.pt or a model_NNNNNN.pt")
        folder, step = path.parent, int(match[1]) if match else None
    elif step is None:
        step = _step_of(folder)
    if step is not None:
        return find_step(folder, step, vintage)
    info = load_json(folder / "config.json")
    if not isinstance(info.get("config"), dict):
        raise ValueError(f"config.json in {folder} has no config: write the export again")
    if vintage is not None:
        raise ValueError(f"--vintage {vintage} has no effect on {folder}: this program wrote it")
    return Found(config_from_dict(info.get("kind"), info["config"]), info, folder / "model.pt")


def _step_of(folder: Path) -> int | None:
    """
    The newest step of a training folder, or None of an export. A folder of nanochat's may hold the config.json of another
    program, too. ValueError where the folder holds two models.
    """
    steps, export = list_steps(folder), (folder / "config.json").is_file()
    if export and steps:
        with contextlib.suppress(ValueError):
            export = "kind" in load_json(folder / "config.json")
        if export and (folder / "model.pt").is_file():
            raise ValueError(f"{folder} holds two models, model.pt and {weights_file(folder, steps[-1]).name}: name the "
                             "file")
        return steps[-1]
    if not export and not steps:
        raise FileNotFoundError(f"there is no model in {folder}: run `python -m scripts.surgery` or "
                                "`python -m scripts.fractal_train` first, or name another folder")
    if len(steps) > 1:
        refuse_two_models(folder, steps)
    return steps[-1] if steps else None


def refuse_two_models(folder: Path, steps: list[int]) -> None:
    """ValueError where the newest steps of a folder are not of one model: their meta files tell of other shapes."""
    old, new = (load_json(folder / f"meta_{step:06d}.json").get("model_config") for step in steps[-2:])
    if old != new:
        raise ValueError(f"{folder} holds two models (steps {steps[-2]} and {steps[-1]} differ in their model_config): say "
                         f"which with --step, or name the file, such as {weights_file(folder, steps[-1])}")


# What nanochat calls a model's source, and ours: the folder under NANOCHAT_BASE_DIR that holds it.
SOURCES = {"base": "base_checkpoints", "mid": "mid_checkpoints", "sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints",
           "hybrid": "hybrid_checkpoints", "fractal": "fractal_checkpoints"}
CHAT_SOURCES = ("mid", "sft", "rl")  # those that have been taught to chat


def newest(base: Path, source: str | None = None, tag: str | None = None) -> Path:
    """
    The folder of the newest model of a source (a name of SOURCES; None: of any) whose name is `tag` or begins with `tag_`
    (None: any). FileNotFoundError that says where it looked.
    """
    found = []
    for name in SOURCES.values() if source is None else [SOURCES[source]]:
        for folder in (base / name).glob("*"):
            if tag is None or folder.name == tag or folder.name.startswith(f"{tag}_"):
                files = [folder / "config.json"] if (folder / "model.pt").is_file() else []
                files += [folder / f"meta_{step:06d}.json" for step in list_steps(folder)]
                found += [(file.stat().st_mtime_ns, folder) for file in files if file.is_file()]
    if not found:
        where = base / SOURCES[source] if source else base
        raise FileNotFoundError(f"there is no model{f' of tag {tag}' if tag else ''} in {where}: name one with "
                                "--checkpoint, or train one first")
    return max(found)[1]


def add_model_args(p) -> None:
    """--checkpoint, and nanochat's -i, -g and -s, to an argument parser: which model a script takes."""
    p.add_argument("--checkpoint", default=None,
                   help="a model's folder (export or training), or the model file in it (default: the newest of -i and -g)")
    p.add_argument("-i", "--source", choices=list(SOURCES), default=None,
                   help="the kind of model, by the folder that holds it (default: any)")
    p.add_argument("-g", "--model-tag", default=None, help="its tag, such as d32 or d32_2048_unfrozen (default: any)")
    p.add_argument("-s", "--step", type=int, default=None, help="its step, of a training folder (default: the last)")


def chosen_model(args) -> Path:
    """The path that the flags of add_model_args name; printed where it had to be looked for. Raises as `newest`."""
    if args.checkpoint is not None:
        if (args.source, args.model_tag, args.step) != (None, None, None):
            raise ValueError("--checkpoint names the model, and so do -i, -g and -s: drop the one or the others")
        return user_path(args.checkpoint)
    folder = newest(get_base_dir(), args.source, args.model_tag)
    path = folder if args.step is None else folder / f"model_{args.step:06d}.pt"
    print0(f"model: {path}")
    return path


class Loaded(NamedTuple):
    """A model, its tokenizer, its config.json or meta, and the file that its weights came from."""
    model: GPT
    tokenizer: "Tokenizer"
    info: dict
    file: Path


def load(path: str | os.PathLike, device="cpu") -> Loaded:
    """The model that `find` finds, with its tokenizer. ValueError also for a tokenizer of another size."""
    config, info, file = find(path)
    model = build_model(config, "meta")
    load_weights(model, weights_of(info, file), file, device)
    return Loaded(model, load_tokenizer(file.parent, config), info, file)


@contextlib.contextmanager
def replace_folder(folder: Path):
    """
    Gives an empty folder to write an export into, which becomes `folder` (where it points, if it is a link) in one step once
    all is written; on any error it is removed. An earlier export there stays until then. What a killed run left is removed,
    and was never called `folder`. The caller owns it (owner.py). ValueError for a folder that holds anything but an export;
    OSError when the disk is full.
    """
    folder = own(folder)
    old = folder.parent / f".{folder.name}.old"
    if folder.exists() and (not folder.is_dir() or {p.name for p in folder.iterdir()} - EXPORT_FILES):
        raise ValueError(f"{folder} exists and is no export (it holds other files): name another folder with --dst")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if old.exists() and not folder.exists():
        os.rename(old, folder)  # an earlier run was killed between the two renames below
    for left in (old, *folder.parent.glob(f".{glob.escape(folder.name)}.*.new")):
        shutil.rmtree(left, ignore_errors=True)
    new = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.new"
    try:
        new.mkdir()
        yield new
        fsync_dir(new)
        if folder.exists():
            os.rename(folder, old)
        os.rename(new, folder)
        fsync_dir(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as e:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        raise_if_full(e, folder)
        raise


def load_tokenizer(folder: Path, config: GPTConfig) -> "Tokenizer":
    """The tokenizer in folder/tokenizer or in the folder itself; ValueError if it is not of the model's size."""
    from nanochat.tokenizer import Tokenizer
    inside = Path(folder) / "tokenizer"
    tokenizer = Tokenizer.from_directory(inside if inside.is_dir() else folder)
    if tokenizer.get_vocab_size() != config.vocab_size:
        raise ValueError(f"the tokenizer in {folder} has {tokenizer.get_vocab_size()} ids, the model {config.vocab_size}: "
                         "put the tokenizer there that the model was trained with")
    return tokenizer
