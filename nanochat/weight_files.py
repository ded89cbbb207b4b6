"""
Reads files of weights as hostile until proven: torch's zip files, its older pickles, and safetensors (sharded, too).

`load_torch` loads a whole file of tensors and plain containers. `open_weights` opens a model's state dict, of which each
tensor is read when it is needed, so that a file may be larger than memory. What people have in place of weights is named:
a Git LFS pointer, a web page, 8-bit weights.
"""
import io
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

INDEX = ".safetensors.index.json"  # names the shards of a model; Hugging Face's format
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch's files began before they were zip files
SAMPLE = 512  # bytes looked at to tell what a file is


class Weights(NamedTuple):
    """
    A model's weights in a file. specs: {name: a tensor without data, of the stored shape and dtype}; read(name) -> that
    tensor, on the CPU, which the caller must not write to.
    """
    specs: dict[str, torch.Tensor]
    read: Callable[[str], torch.Tensor]

    @staticmethod
    def of(state: dict, where) -> "Weights":
        """Those of a state dict in memory. ValueError where it is none."""
        clean = check_specs(state, where)
        return Weights(clean, clean.__getitem__)


def first_line(e: Exception) -> str:
    """An exception's first line, or its type where it says nothing."""
    return (str(e).splitlines() or [type(e).__name__])[0][:120]


def some(names: list[str], n: int = 5) -> str:
    """The first of a list of names, in words."""
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def file_kind(path: Path) -> str:
    """
    What a file of weights is by its first bytes: 'zip' (torch.save), 'legacy' (torch.save before version 1.6),
    'safetensors', or 'unknown'. FileNotFoundError without the file; ValueError, naming it, for a Git LFS pointer or a page.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint file {path}")
    with open(path, "rb") as f:
        head = f.read(SAMPLE)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer and not the weights that it stands for: run `git lfs pull` in its "
                         "folder, or fetch the repository with `hf download`")
    if text.startswith((b"<!doctype html", b"<html", b"<?xml", b"<head")):
        raise ValueError(f"{path} is a web page and not weights: what answered the download was a page (for a login, say); "
                         "fetch the file with `hf download`")
    if head.startswith(b"PK"):
        return "zip"
    if head.startswith(LEGACY):
        return "legacy"
    return "safetensors" if head[8:9] == b"{" or Path(path).suffix == ".safetensors" else "unknown"


def load_torch(path: Path, without_data: bool = False):
    """
    A torch.load with weights_only=True, memory-mapped where the file's format allows it. FileNotFoundError, or ValueError
    for a file that is truncated, no checkpoint, or holds more than tensors and plain containers. without_data (zip files
    only): its tensors are fake ones, which know their shape, dtype and place in the file; a file larger than memory may not
    be mapped.
    """
    kind = file_kind(path)
    if kind == "safetensors":
        raise ValueError(f"{path} is a safetensors file, where one of torch.save is needed")
    place, mmap = path, kind != "legacy"
    try:
        str(path).encode()
    except UnicodeEncodeError:  # torch maps no file whose name is not UTF-8
        place, mmap = io.BytesIO(Path(path).read_bytes()), False
    try:
        if without_data:
            with FakeTensorMode():
                return torch.load(place, weights_only=True)
        return torch.load(place, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as e:
        raise ValueError(f"{path} is refused: it is damaged or holds more than tensors ({first_line(e)}); "
                         "use a checkpoint from a source you trust") from e
    except Exception as e:  # damaged bytes end in almost any exception class
        raise ValueError(f"{path} is truncated or no checkpoint ({first_line(e)}): "
                         "copy or download it again, or go back to an earlier one") from e


def clean_name(name: str) -> str:
    """A weight's name without the parts that torch.compile and DistributedDataParallel put into it, wherever they stand."""
    return re.sub(r"(^|\.)(?:(?:module|_orig_mod)\.)+", r"\1", name)


def check_specs(state: dict, where) -> dict[str, torch.Tensor]:
    """
    A state dict (its tensors may be without data) under clean names. ValueError for anything but names of dense tensors of
    real numbers, for two tensors of one name, and for 8-bit weights.
    """
    if isinstance(state, dict):
        small = [k for k, v in state.items() if isinstance(v, torch.Tensor) and v.dtype != torch.bool
                 and v.dtype.itemsize == 1]
        if small:
            dtype = str(state[small[0]].dtype).removeprefix("torch.")
            raise ValueError(f"{where} holds 8-bit weights ({small[0]} is {dtype}): they are quantised, which cannot be "
                             "undone; use the checkpoint they were made from (bf16 or fp32)")
    if not isinstance(state, dict) or not all(
            isinstance(k, str) and isinstance(v, torch.Tensor) and v.layout == torch.strided and v.is_floating_point()
            for k, v in state.items()):
        raise ValueError(f"{where} is no state dict: it must map names to dense tensors of real numbers")
    clean = {clean_name(k): v for k, v in state.items()}
    if len(clean) < len(state):
        names = [clean_name(k) for k in state]
        twice = next(k for k in clean if names.count(k) > 1)
        raise ValueError(f"{where} holds {twice} twice, with and without a wrapper's prefix: save the model's state dict "
                         "alone")
    return clean


def open_weights(path: Path) -> Weights:
    """
    The state dict in a file of torch.save, in a safetensors file, or in the shards that a *.safetensors.index.json names.
    What `load_torch` and `check_specs` raise; `read` raises ValueError for a file that has been truncated since.
    """
    path = Path(path)
    if path.name.endswith(INDEX):
        return _open_shards(path)
    kind = file_kind(path)
    if kind == "safetensors":
        return _open_safetensors(path)
    if kind == "legacy" or _has_odd_name(path):
        return Weights.of(load_torch(path), path)
    places = load_torch(path, without_data=True)
    check_specs(places, path)
    size = path.stat().st_size
    for name, t in places.items():
        storage = t.untyped_storage()
        if not 0 <= storage._checkpoint_offset <= size - storage.nbytes():
            raise ValueError(f"{path} is truncated or no checkpoint ({name} lies beyond its end): copy or download it "
                             "again, or go back to an earlier one")
    clean = {clean_name(k): v for k, v in places.items()}
    return Weights(clean, lambda name: _read_place(path, name, clean[name]))


def _has_odd_name(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return True
    return False


def _read_place(path: Path, name: str, place: torch.Tensor) -> torch.Tensor:
    """Reads what a fake tensor stands for; of a view the whole storage, of others only their own bytes."""
    # not mapped: the kernel refuses to map privately what is larger than memory, and pages read would stay resident
    whole, at = place.is_contiguous(), place.untyped_storage()._checkpoint_offset
    if whole:
        t, at = torch.empty(place.shape, dtype=place.dtype), at + place.storage_offset() * place.itemsize
    else:
        t = torch.empty(place.untyped_storage().nbytes() // place.itemsize, dtype=place.dtype)
    data, done = memoryview(t.reshape(-1).view(torch.uint8).numpy()), 0
    with open(path, "rb", buffering=0) as f:
        f.seek(at)
        while done < len(data):
            n = f.readinto(data[done:])
            if not n:
                raise ValueError(f"{path} is truncated in {name}: copy or download it again")
            done += n
    return t if whole else t.as_strided(place.shape, place.stride(), place.storage_offset())


def _open_safetensors(path: Path) -> Weights:
    """A safetensors file; the library checks that sizes and places fit the file."""
    import safetensors  # not above: gpu_check does without
    from safetensors.torch import safe_open

    def opened():
        try:
            return safe_open(path, framework="pt")
        except (safetensors.SafetensorError, OSError, UnicodeError) as e:
            raise ValueError(f"{path} is truncated or no safetensors file ({first_line(e)}): copy or download it "
                             "again") from e

    def read(name):
        with opened() as f:
            return f.get_tensor(raw[name])
    with opened() as f:
        slices = {k: f.get_slice(k) for k in f.keys()}
        dtypes = {k: _dtype(s.get_dtype(), path, k) for k, s in slices.items()}
        specs = {k: torch.empty(s.get_shape(), dtype=dtypes[k], device="meta") for k, s in slices.items()}
    clean = check_specs(specs, path)
    raw = {clean_name(k): k for k in specs}
    return Weights(clean, read)


def _dtype(code: str, path, name) -> torch.dtype:
    known = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
             "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
             "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
    if code not in known:
        raise ValueError(f"{path} holds {name} as {code}, which torch does not know: use a checkpoint in bf16 or fp32")
    return known[code]


def _open_shards(index: Path) -> Weights:
    """The shards that an index names. ValueError for one outside its folder, or without what it should hold."""
    try:
        owner = json.loads(index.read_text())["weight_map"]
        files = sorted(set(owner.values()))
        assert all(Path(name).name == name for name in files)
    except FileNotFoundError as e:
        raise FileNotFoundError(f"there is no checkpoint file {index}") from e
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError) as e:
        raise ValueError(f"{index} is no index of safetensors files: copy or download it again") from e
    parts = {name: open_weights(index.parent / name) for name in files}
    places = {clean_name(k): parts[name] for k, name in owner.items()}
    for name, part in places.items():
        if name not in part.specs:
            raise ValueError(f"{index} names {name}, which its file does not hold: copy or download both again")
    return Weights({k: part.specs[k] for k, part in places.items()}, lambda name: places[name].read(name))
