"""
Checkpoints: written whole or not at all, read as hostile until proven.

Three layouts:
  base_checkpoints/<tag>/      model_000650.pt  optim_000650.pt  meta_000650.json      (nanochat's names)
  fractal_checkpoints/<tag>/   the same while training, then model.pt  config.json  tokenizer/
  hybrid_checkpoints/<tag>/    model.pt  config.json  tokenizer/                       (surgery's output)
A step's meta file is written last and marks the checkpoint as whole. Every file is loaded with weights_only=True.
"""
import hashlib
import json
import math
import os
import pickle
import re
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from nanochat.common import atomic_write
from nanochat.gpt import GPT, GPTConfig
from nanochat.hybrid_gpt import HybridConfig, HybridGPT
from nanochat.tokenizer import Tokenizer

_CONFIGS = {"gpt": (GPTConfig, GPT), "hybrid": (HybridConfig, HybridGPT)}


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


def load_torch(path: Path):
    """
    A memory-mapped torch.load with weights_only=True. FileNotFoundError, or ValueError for a file that is truncated,
    no checkpoint, or holds more than tensors and plain containers.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint file {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as e:
        raise ValueError(f"{path} is refused: it is damaged or holds more than tensors ({_line(e)}); "
                         "use a checkpoint from a source you trust") from e
    except Exception as e:  # damaged bytes end in almost any exception class
        raise ValueError(f"{path} is truncated or no checkpoint ({_line(e)}): "
                         "copy or download it again, or go back to an earlier one") from e


def _line(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0][:120]


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
        raise ValueError(f"{path} is no valid JSON ({_line(e)}): copy or write the checkpoint again") from e
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
    if missing := sorted(set(known) - set(fields)):
        raise ValueError(f"the checkpoint's config lacks {', '.join(missing)}")
    for name, value in fields.items():
        real = known[name].type is float
        if isinstance(value, bool) or not isinstance(value, (int, float) if real else int) or not math.isfinite(value):
            raise ValueError(f"{name} in the checkpoint's config is {value!r}; it must be a "
                             f"{'finite' if real else 'whole'} number")
    return cls(**fields)


def load_state(model: torch.nn.Module, state: dict, where, device=None) -> None:
    """
    Loads a state dict in place, in the parameters' own dtypes. Keys may carry torch.compile's `_orig_mod.` prefix.
    ValueError that names keys missing, extra or mis-shaped; then nothing has been loaded. With `device` a model on the
    meta device is materialised there first, but only once the state is known to fit: a hostile config allocates nothing.
    """
    if not isinstance(state, dict) or not all(
            isinstance(k, str) and isinstance(v, torch.Tensor) and v.layout == torch.strided and v.is_floating_point()
            for k, v in state.items()):
        raise ValueError(f"{where} is no state dict: it must map names to dense tensors of real numbers")
    state = {k.removeprefix("_orig_mod."): v for k, v in state.items()}
    own = model.state_dict()
    faults = []
    if missing := [k for k in own if k not in state]:
        faults.append(f"missing {_some(missing)}")
    if extra := [k for k in state if k not in own]:
        faults.append(f"unexpected {_some(extra)}")
    if bad := [f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
               for k in own if k in state and state[k].shape != own[k].shape]:
        faults.append(f"of another shape {_some(bad)}")
    if faults:
        raise ValueError(f"{where} does not fit the model of its config: {'; '.join(faults)}. "
                         "Use the checkpoint with the config it was saved with")
    if device is not None:
        own = model.to_empty(device=device).state_dict()
    with torch.no_grad():
        for k, p in own.items():
            p.copy_(state[k])


def _some(names: list[str], n: int = 5) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def build_model(config: GPTConfig, device="cpu") -> GPT:
    """The model of a config, its weights allocated on `device` (which may be 'meta') but not initialised."""
    with torch.device("meta"):
        model = _CONFIGS[model_kind(config)][1](config)
    return model if device == "meta" else model.to_empty(device=device)


def model_kind(config: GPTConfig) -> str:
    return next(kind for kind, (cfg, _) in _CONFIGS.items() if cfg is type(config))


# ---------------------------------------------------------------------------------------------------------------------
# Step checkpoints: model_000650.pt, optim_000650.pt, meta_000650.json

def save_step(folder: Path, step: int, model: GPT, optimizers: list, meta: dict, keep: int = 2) -> None:
    """
    Writes a whole step checkpoint, then removes all but the newest `keep`. meta gets the step, the model's kind and
    config. A failure (OSError when the disk is full) leaves the earlier checkpoints as they were.
    """
    folder = Path(folder)
    names = [folder / f"{stem}_{step:06d}.{ext}" for stem, ext in (("model", "pt"), ("optim", "pt"), ("meta", "json"))]
    try:
        save_torch(model.state_dict(), names[0])
        save_torch([opt.state_dict() for opt in optimizers], names[1])
        save_json({"step": step, "kind": model_kind(model.config), "model_config": asdict(model.config), **meta},
                  names[2])
    except OSError:
        for name in names:  # a checkpoint without its meta file is no checkpoint: give the room back
            name.unlink(missing_ok=True)
        raise
    for old in list_steps(folder)[:-keep]:
        for path in folder.glob(f"*_{old:06d}.*"):
            path.unlink()


def list_steps(folder: Path) -> list[int]:
    """Steps that have a whole checkpoint in `folder`, ascending."""
    steps = [int(m[1]) for p in Path(folder).glob("meta_*.json") if (m := re.fullmatch(r"meta_(\d+)\.json", p.name))]
    return sorted(s for s in steps if (Path(folder) / f"model_{s:06d}.pt").is_file())


def remove_leftovers(folder: Path, everything: bool = False) -> None:
    """
    Deletes what a killed run left half-written: temporary files and step files without their meta file. `everything`:
    also whole checkpoints and the export.
    """
    folder = Path(folder)
    keep = set() if everything else set(list_steps(folder))
    for path in list(folder.glob("*")):
        step = re.fullmatch(r"(?:model|optim|meta)_(\d+)\.(?:pt|json)", path.name)
        half = re.fullmatch(r"\.(?:model|optim|meta|config)[_\d]*\.(?:pt|json)\..*\.tmp", path.name)
        if half or (step and int(step[1]) not in keep) or (everything and path.name in ("model.pt", "config.json")):
            path.unlink()


def last_step(folder: Path) -> int:
    """The newest step of `folder`; FileNotFoundError with the remedy if there is none."""
    steps = list_steps(folder)
    if not steps:
        raise FileNotFoundError(f"there is no checkpoint in {folder}: train one first, or name another folder")
    return steps[-1]


def load_step(folder: Path, step: int, device="cpu") -> tuple[GPT, dict]:
    """(model with its weights, meta) of one step. nanochat's own files, whose meta has no 'kind', are base GPTs."""
    folder = Path(folder)
    meta = load_json(folder / f"meta_{step:06d}.json")
    if not isinstance(meta.get("model_config"), dict):
        raise ValueError(f"meta_{step:06d}.json in {folder} has no model_config: it is no nanochat checkpoint")
    model = build_model(config_from_dict(meta.get("kind", "gpt"), meta["model_config"]), "meta")
    path = folder / f"model_{step:06d}.pt"
    load_state(model, load_torch(path), path, device)
    return model, meta


def load_optimizers(folder: Path, step: int, optimizers: list) -> None:
    """Optimizer states of a step, in place."""
    path = Path(folder) / f"optim_{step:06d}.pt"
    states = load_torch(path)
    try:
        assert len(states) == len(optimizers)
        for opt, state in zip(optimizers, states):
            opt.load_state_dict(state)
    except Exception as e:
        raise ValueError(f"{path} does not hold this run's {len(optimizers)} optimizers ({_line(e)}): resume with the flags "
                         "that the run was started with, or start over with --fresh") from e


# ---------------------------------------------------------------------------------------------------------------------
# Exports: model.pt, config.json, tokenizer/

def save_export(folder: Path, model: GPT, tokenizer: Tokenizer, info: dict) -> None:
    """
    Writes folder/{model.pt,config.json,tokenizer/}; config.json holds kind, config and `info` (provenance, proof). An
    earlier export there stays whole until both files have been written (OSError when the disk is full).
    """
    folder = Path(folder)
    tokenizer.save(folder / "tokenizer")
    with atomic_write(folder / "model.pt") as f, atomic_write(folder / "config.json", "w") as g:
        _dump(model.state_dict(), f)
        json.dump({"kind": model_kind(model.config), "config": asdict(model.config), **info}, g, indent=1)


class Loaded(NamedTuple):
    """A model, its tokenizer, its config.json or meta, and the file that its weights came from."""
    model: GPT
    tokenizer: Tokenizer
    info: dict
    file: Path


def load(path: str | os.PathLike, device="cpu") -> Loaded:
    """
    From an export (its folder, or the model.pt in it) or a training folder (its newest step, or a model_NNNNNN.pt in it).
    FileNotFoundError if there is none, ValueError for damaged files or a tokenizer of another size.
    """
    path = Path(path).expanduser()
    folder, step = path, None
    if path.suffix == ".pt":
        folder, match = path.parent, re.fullmatch(r"model_(\d+)\.pt", path.name)
        if not path.is_file() or not (match or path.name == "model.pt"):
            raise FileNotFoundError(f"there is no checkpoint file {path}: name a folder, its model.pt or a model_NNNNNN.pt")
        step = int(match[1]) if match else None
    elif not (folder / "config.json").is_file():
        if not list_steps(folder):
            raise FileNotFoundError(f"there is no model in {folder}: run `python -m scripts.surgery` or "
                                    "`python -m scripts.fractal_train` first, or name another folder")
        step = last_step(folder)
    if step is None:
        info = load_json(folder / "config.json")
        if not isinstance(info.get("config"), dict):
            raise ValueError(f"config.json in {folder} has no config: write the export again")
        file = folder / "model.pt"
        model = build_model(config_from_dict(info.get("kind"), info["config"]), "meta")
        load_state(model, load_torch(file), file, device)
    else:
        file = folder / f"model_{step:06d}.pt"
        model, info = load_step(folder, step, device)
    return Loaded(model, load_tokenizer(folder, model.config), info, file)


def load_tokenizer(folder: Path, config: GPTConfig) -> Tokenizer:
    """The tokenizer in folder/tokenizer or in the folder itself; ValueError if it is not of the model's size."""
    inside = Path(folder) / "tokenizer"
    tokenizer = Tokenizer.from_directory(inside if inside.is_dir() else folder)
    if tokenizer.get_vocab_size() != config.vocab_size:
        raise ValueError(f"the tokenizer in {folder} has {tokenizer.get_vocab_size()} ids, the model {config.vocab_size}: "
                         "put the tokenizer there that the model was trained with")
    return tokenizer
