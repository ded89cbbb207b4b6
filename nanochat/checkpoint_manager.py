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
import os
import pickle
import re
import shutil
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch

from nanochat.common import atomic_write
from nanochat.gpt import GPT, GPTConfig
from nanochat.hybrid_gpt import HybridConfig, HybridGPT

_CONFIGS = {"gpt": (GPTConfig, GPT), "hybrid": (HybridConfig, HybridGPT)}


# ---------------------------------------------------------------------------------------------------------------------
# Files

def save_torch(obj, path: Path) -> None:
    """torch.save, atomically. OSError when the disk is full; what `path` held before is then untouched."""
    with atomic_write(path) as f:
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
        raise ValueError(f"{path} is refused: it is damaged or holds more than tensors ({str(e).splitlines()[0]}); "
                         "use a checkpoint from a source you trust") from e
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, KeyError) as e:
        raise ValueError(f"{path} is truncated or no checkpoint ({str(e).splitlines()[0][:120]}): "
                         "copy or download it again, or go back to an earlier one") from e


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
    except ValueError as e:
        raise ValueError(f"{path} is no valid JSON ({e}): copy or write the checkpoint again") from e
    if not isinstance(obj, dict):
        raise ValueError(f"{path} holds no JSON object: copy or write the checkpoint again")
    return obj


# ---------------------------------------------------------------------------------------------------------------------
# Models

def config_to_dict(config: GPTConfig) -> dict:
    return asdict(config)


def config_from_dict(kind: str, fields: dict) -> GPTConfig:
    """
    The config of a checkpoint ('gpt' or 'hybrid'). Fields that this version does not know mean an architecture that it
    does not have: refused with ValueError, as are values of the wrong type.
    """
    if kind not in _CONFIGS:
        raise ValueError(f"unknown model kind '{kind}' in the checkpoint's config: known are {', '.join(_CONFIGS)}")
    cls = _CONFIGS[kind][0]
    known = cls.__dataclass_fields__
    if unknown := sorted(set(fields) - set(known)):
        raise ValueError(f"the checkpoint's config has fields this version does not support: {', '.join(unknown)}")
    if missing := sorted(set(known) - set(fields)):
        raise ValueError(f"the checkpoint's config lacks {', '.join(missing)}")
    for name, value in fields.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{name} in the checkpoint's config is {value!r}; it must be a whole number")
    return cls(**fields)


def load_state(model: torch.nn.Module, state: dict, where) -> None:
    """
    Loads a state dict in place, in the parameters' own dtypes. Keys may carry torch.compile's `_orig_mod.` prefix.
    ValueError that names keys missing, extra or mis-shaped; then nothing has been loaded.
    """
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{where} is no state dict: it must map names to tensors")
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
    with torch.no_grad():
        for k, p in own.items():
            p.copy_(state[k])


def _some(names: list[str], n: int = 5) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def build_model(config: GPTConfig, device="cpu") -> GPT:
    """The model of a config, its weights allocated but not initialised."""
    cls = next(model for cfg, model in _CONFIGS.values() if cfg is type(config))
    with torch.device("meta"):
        model = cls(config)
    return model.to_empty(device=device)


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
        save_json({"step": step, "kind": model_kind(model.config), "model_config": config_to_dict(model.config), **meta},
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
    model = build_model(config_from_dict(meta.get("kind", "gpt"), meta["model_config"]), device)
    path = folder / f"model_{step:06d}.pt"
    load_state(model, load_torch(path), path)
    return model, meta


def load_optimizers(folder: Path, step: int, optimizers: list) -> None:
    """Optimizer states of a step, in place."""
    path = Path(folder) / f"optim_{step:06d}.pt"
    states = load_torch(path)
    if len(states) != len(optimizers):
        raise ValueError(f"{path} holds {len(states)} optimizers, this run has {len(optimizers)}: "
                         "resume with the flags the run was started with")
    for opt, state in zip(optimizers, states):
        opt.load_state_dict(state)


# ---------------------------------------------------------------------------------------------------------------------
# Exports: model.pt, config.json, tokenizer/

def save_export(folder: Path, model: GPT, tokenizer_dir: Path, info: dict) -> None:
    """
    Writes folder/{model.pt,config.json,tokenizer/}; config.json holds kind, config and `info` (provenance, proof) and
    is written last.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)  # until it is back, the folder is no export
    save_torch(model.state_dict(), folder / "model.pt")
    (folder / "tokenizer").mkdir(exist_ok=True)
    for path in sorted(Path(tokenizer_dir).iterdir()):
        if path.is_file() and path.resolve() != (folder / "tokenizer" / path.name).resolve():
            with atomic_write(folder / "tokenizer" / path.name) as f, open(path, "rb") as source:
                shutil.copyfileobj(source, f)
    save_json({"kind": model_kind(model.config), "config": config_to_dict(model.config), **info}, folder / "config.json")


def load_export(path: str | os.PathLike, device="cpu") -> tuple[GPT, dict]:
    """
    (model with its weights, config.json) of an export; `path` is its folder or the model.pt in it.
    """
    folder = Path(path).expanduser()
    folder = folder.parent if folder.suffix == ".pt" else folder
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no model folder {folder}: run `python -m scripts.surgery` or "
                                "`python -m scripts.fractal_train` first, or name another")
    info = load_json(folder / "config.json")
    if not isinstance(info.get("config"), dict):
        raise ValueError(f"config.json in {folder} has no config: write the export again")
    model = build_model(config_from_dict(info.get("kind"), info["config"]), device)
    load_state(model, load_torch(folder / "model.pt"), folder / "model.pt")
    return model, info


def load_any(path: str | os.PathLike, device="cpu") -> tuple[GPT, Path, dict]:
    """
    A model from an export's folder or from the newest step of a training folder: (model, tokenizer folder, info).
    """
    folder = Path(path).expanduser()
    folder = folder.parent if folder.suffix == ".pt" else folder
    if (folder / "config.json").is_file() or not list_steps(folder):
        model, info = load_export(folder, device)
    else:
        model, info = load_step(folder, last_step(folder), device)
    return model, folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder, info
