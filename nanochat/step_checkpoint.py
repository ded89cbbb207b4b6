"""
What an interrupted run resumes from: step_000650/ folders, complete, on any number of ranks.

    step_000650/  meta.json            step, settings, figures, config; every other file's size and CRC-32
                  .metadata *.distcp   weights and optimizer state (torch.distributed.checkpoint), a file for each rank
                  rank_0.json ...      each rank's data position and random state

A folder gets its name when all in it is written and fsynced, so one with that name is whole unless bytes were lost later,
which the sums tell. Files are read as hostile: .metadata is a pickle, and only torch's own few classes may come out of it.
"""
import errno
import io
import json
import os
import pickle
import re
import shutil
import socket
import threading
import time
import uuid
import warnings
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as md

from nanochat.checkpoint_manager import load_json, save_json
from nanochat.common import fsync_dir, get_rank, print0
from nanochat.distributed import TIMEOUT, everyone
from nanochat.optim import OPTIMIZERS

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process saves alone: that is meant

_TENSORS = re.compile(r"__\d+_\d+\.distcp")  # files that torch.distributed.checkpoint writes
_SAFE = {(c.__module__, c.__qualname__): c for c in (
    md.Metadata, md.TensorStorageMetadata, md.TensorProperties, md.ChunkStorageMetadata, md.MetadataIndex, md.StorageMeta,
    md._MEM_FORMAT_ENCODING, filesystem._StorageInfo, torch.Size)}
_SAFE["torch.serialization", "_get_layout"] = torch.serialization._get_layout
_SAFE["collections", "OrderedDict"] = dict


# ---------------------------------------------------------------------------------------------------------------------
# Reading

class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) in _SAFE:
            return _SAFE[module, name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if module == "pathlib" or module.startswith("pathlib."):
            return _text  # the folder's name when it was written: nobody needs it
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid):
        raise pickle.UnpicklingError("it refers to something outside")


def _text(*parts) -> str:
    return "/".join(map(str, parts))


class Reader(dcp.FileSystemReader):
    """torch's, except that .metadata can run no code and names no file outside its folder. ValueError for one that would."""
    def read_metadata(self, *args, **kwargs):
        path = Path(self.path) / ".metadata"
        try:
            metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
            tensors = metadata.state_dict_metadata
            if not all(isinstance(t, md.TensorStorageMetadata) for t in tensors.values()):
                raise ValueError("it holds more than tensors")
            if not all(isinstance(info, filesystem._StorageInfo) and _TENSORS.fullmatch(info.relative_path)
                       and (path.parent / info.relative_path).is_file() and not getattr(info, "transform_descriptors", None)
                       for info in metadata.storage_data.values()):
                raise ValueError("it names files outside its folder, or that are none")
        except Exception as e:  # damaged bytes end in almost any exception class
            raise ValueError(f"{path} is refused: it is damaged or would do more than list tensors ({e}); use a checkpoint "
                             "from a source you trust, or --fresh to start over") from e
        metadata.storage_meta = md.StorageMeta(load_id=self.load_id)
        return metadata


def steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint in `folder`, ascending."""
    return [s for s in _all_steps(folder) if (path_of(folder, s) / "meta.json").is_file()]


def _all_steps(folder: Path) -> list[int]:
    return sorted(int(m[1]) for p in Path(folder).glob("step_*") if (m := re.fullmatch(r"step_(\d+)", p.name)))


def path_of(folder: Path, step: int) -> Path:
    return Path(folder) / f"step_{step:06d}"


def remove_leftovers(folder: Path, everything: bool = False) -> None:
    """
    Deletes what a killed run left half-written or half-deleted; `everything`: whole checkpoints too. What has no meta.json
    is half-deleted only where others have one: a run deletes none before the next is written.
    """
    others = bool(steps(folder))
    for path in Path(folder).glob("*"):
        if re.fullmatch(r"\.seen_by_all_\w+\.tmp", path.name):
            path.unlink()
        half = re.fullmatch(r"\.step_\d+\.tmp", path.name)
        step = re.fullmatch(r"(?:step|damaged)_\d+", path.name)
        if half or (step and (everything or (others and not (path / "meta.json").is_file()))):
            _delete(path)


def _delete(path: Path) -> None:
    (path / "meta.json").unlink(missing_ok=True)  # first: from now on it is no checkpoint
    shutil.rmtree(path)


def check_shared(folder: Path, seconds: float = 20) -> None:
    """
    ValueError, on all ranks, unless each of them sees in `folder` what the first one writes there, within so many seconds:
    on several machines without a common folder, what one saves would be damage to the next.
    """
    rank, world = get_rank()
    if world == 1:
        return
    name = None
    if rank == 0:
        name = f".seen_by_all_{uuid.uuid4().hex}.tmp"  # new each time, so that no machine remembers that it was not there
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    name = everyone(name)[0]
    until = time.monotonic() + seconds
    while not (sees := (folder / name).is_file()) and time.monotonic() < until:
        time.sleep(0.2)
    seen = everyone((sees, socket.gethostname()))
    if rank == 0:
        (folder / name).unlink()
    if blind := sorted({machine for sees, machine in seen if not sees}):
        raise ValueError(f"{', '.join(blind)} did not see in {folder} what {seen[0][1]} wrote there, and a run has one "
                         "folder: set NANOCHAT_BASE_DIR to one that all machines share")


def find_whole(folder: Path) -> tuple[int, dict] | None:
    """
    The newest checkpoint of `folder` that is whole, as (step, meta); None where there is none at all. Damaged newer ones are
    reported, and renamed to damaged_N; ValueError where there are damaged ones only, which then stay as they are. All ranks
    ask together and share the reading.
    """
    rank, world = get_rank()
    damaged = []
    for step in reversed(everyone(_all_steps(folder))[0]):
        path = path_of(folder, step)
        meta, fault = None, None
        try:
            meta = read_meta(path)
            for name in sorted(meta["files"])[rank::world]:
                if not (path / name).is_file():  # a device or a pipe might never end
                    raise ValueError(f"{name} is no file, or not there")
                if list(_sum(path / name)) != meta["files"][name]:
                    raise ValueError(f"{name} has another size or sum than when it was written")
        except (OSError, ValueError) as e:
            fault = str(e)
        faults = [f for f in everyone(fault) if f]
        if not faults:
            break
        damaged.append((step, faults[0]))
    else:
        if damaged:
            raise ValueError("; ".join(f"{path_of(folder, step)} is damaged ({fault})" for step, fault in damaged) + ": no "
                             "checkpoint is left to go on from; put an undamaged copy there, or start over with --fresh")
        return None
    for broken, fault in damaged:
        print0(f"warning: {path_of(folder, broken)} is damaged ({fault}): it is set aside as damaged_{broken:06d}, and a "
               "checkpoint before it is used")
        if rank == 0:
            aside = Path(folder) / f"damaged_{broken:06d}"
            if aside.exists():
                shutil.rmtree(aside)
            os.rename(path_of(folder, broken), aside)
    everyone(None)
    return step, meta


def read_meta(path: Path) -> dict:
    """meta.json of a step's folder; ValueError where it is not as it was written."""
    meta = load_json(path / "meta.json")
    files, world = meta.get("files"), meta.get("world")
    if not isinstance(files, dict) or type(world) is not int or meta.pop("crc32", None) != _crc(meta):
        raise ValueError("meta.json is not as it was written")
    own = {name for name in files if not _TENSORS.fullmatch(name)}
    if own != {".metadata", *(f"rank_{r}.json" for r in range(len(own) - 1))} or world != len(own) - 1 or world < 1:
        raise ValueError(f"meta.json lists other files than a checkpoint of {world} processes has")
    return meta


def _save_meta(meta: dict, path: Path) -> None:
    meta = json.loads(json.dumps(meta))
    save_json({**meta, "crc32": _crc(meta)}, path / "meta.json")


def _crc(obj) -> int:
    return zlib.crc32(json.dumps(obj, sort_keys=True).encode())


def _sum(path: Path) -> tuple[int, int]:
    """(size, CRC-32) of a file: what damage shows by. It proves nothing against an attacker, whom Reader is for."""
    size = crc = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def settle(args, folder: Path) -> bool:
    """
    Gives the batch flags and the optimizer that `args` leave open the values of the run that is to be resumed, on however
    many ranks, and the number of steps if both derive it from the same --target-hours; returns whether there is a run.
    """
    for step in reversed(steps(folder)):
        try:
            settings = read_meta(path_of(folder, step))["settings"]
            found = {name: settings[name] for name in ("total_batch_size", "eval_tokens", "num_iterations")}
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged: find_whole will say so
        if not all(type(value) is int and value > 0 for value in found.values()):
            raise ValueError(f"the settings in {path_of(folder, step)}/meta.json are none ({found}): use a checkpoint from "
                             "a source you trust, or --fresh to start over")
        if args.target_hours is None or settings.get("target_hours") != args.target_hours:
            del found["num_iterations"]
        for name, value in found.items():
            if getattr(args, name) == -1:
                setattr(args, name, value)
        if args.optimizer is None and settings.get("optimizer") in OPTIMIZERS:
            args.optimizer = settings["optimizer"]
        return True
    return False


def read_rank(path: Path, rank: int) -> dict:
    """{'loader', 'rng'} of one rank."""
    return load_json(path / f"rank_{rank}.json")


def load(path: Path, model, optimizers: list) -> None:
    """
    Weights and optimizer states, in place; each rank reads its own part. ValueError for a checkpoint of another model.
    """
    saved = Reader(path).read_metadata().state_dict_metadata
    state = {f"model.{name}": p.detach() for name, p in model.state_dict().items()}
    for optimizer in optimizers:
        for name, p in _named(optimizer):
            for key in saved:
                if key.startswith(f"optim.{name}/"):
                    what = key.rpartition("/")[2]
                    if what not in optimizer.state[p]:
                        # a moment has its parameter's shape, a count of steps none: the fused AdamW wants both on its device
                        optimizer.state[p][what] = \
                            torch.zeros_like(p) if saved[key].size else torch.zeros((), device=p.device)
                    state[key] = optimizer.state[p][what]
    wrong = sorted(saved.keys() ^ state.keys()) or [k for k in state if saved[k].size != state[k].shape]
    if wrong:
        raise ValueError(f"{path} is of another model or another phase ({wrong[0]} differs): use the flags that it was "
                         "started with, or --fresh to start over")
    try:
        dcp.load(state, storage_reader=Reader(path), no_dist=not dist.is_initialized())
    except dcp.api.CheckpointException as e:
        raise ValueError(f"{path} could not be read ({_cause(e)}): remove it to use the checkpoint before, or start over "
                         "with --fresh") from e


def _named(optimizer):
    for group in optimizer.param_groups:
        yield from zip(group["param_names"], group["params"])


# ---------------------------------------------------------------------------------------------------------------------
# Writing

class Saver:
    """
    Writes checkpoints of one run beside the training: `save` copies the tensors to the CPU and returns; a thread writes
    them. All ranks call alike. An OSError of the thread is raised by the next call; what was there before is untouched.
    """
    def __init__(self, folder: Path, keep: int):
        assert keep > 0, keep
        self.folder, self.keep = Path(folder), keep
        # of its own: the thread's exchanges must not mix with the training's
        self.group = dist.new_group(backend="gloo", timeout=TIMEOUT) if dist.is_initialized() else None
        self.thread = self.error = None

    def save(self, step: int, model, optimizers: list, meta: dict, own: dict) -> None:
        """Starts to write a checkpoint. meta: what is the same on all ranks; own: this rank's."""
        self.wait()
        state = {f"model.{name}": p for name, p in model.state_dict().items()}
        for optimizer in optimizers:
            for name, p in _named(optimizer):
                state |= {f"optim.{name}/{key}": v for key, v in optimizer.state.get(p, {}).items()}
        state = {name: t.detach().to("cpu", copy=True) for name, t in state.items()}
        self.thread = threading.Thread(target=self._run, args=(step, state, {"step": step, **meta}, own))
        self.thread.start()

    def wait(self) -> None:
        """Until what was started is written. OSError where it could not be."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def amend(self, step: int, more: dict) -> None:
        """Adds to the meta.json of a checkpoint that is written, in place, what became known after it. All ranks call."""
        fault = None
        if get_rank()[0] == 0:
            try:
                path = path_of(self.folder, step)
                _save_meta({**read_meta(path), **more}, path)
            except (OSError, ValueError) as e:
                fault = str(e)
        if fault := everyone(fault)[0]:
            print0(f"warning: {fault}: a run that is resumed from step {step} evaluates it again")

    def _run(self, step, state, meta, own):
        try:
            self._write(step, state, meta, own)
        except BaseException as e:  # CheckpointException is no Exception
            self.error = e

    def _write(self, step, state, meta, own):
        rank, world = get_rank()
        final, new = path_of(self.folder, step), self.folder / f".step_{step:06d}.tmp"
        fault, sums = None, {}
        try:
            if rank == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(new, ignore_errors=True)
                new.mkdir()
        except OSError as e:
            fault = e
        self._agree(fault, new, final)
        try:
            # The tensors are on the CPU. Copying ahead would open a CUDA context in this thread, on GPU 0 for every rank.
            writer = dcp.FileSystemWriter(new, per_thread_copy_ahead=0)
            dcp.save(state, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
            save_json(own, new / f"rank_{rank}.json")
            names = [f"rank_{rank}.json", *(p.name for p in new.glob(f"__{rank}_*.distcp")), *([".metadata"] * (rank == 0))]
            sums = {name: _sum(new / name) for name in names}
        except dcp.api.CheckpointException as e:
            fault = _cause(e)
        except OSError as e:
            fault = e
        sums = self._agree(fault, new, final, sums)
        try:
            if rank == 0:
                _save_meta({**meta, "world": world, "files": {k: list(v) for part in sums for k, v in part.items()}}, new)
                fsync_dir(new)
                if final.exists():
                    _delete(final)
                os.rename(new, final)
                fsync_dir(self.folder)
                for old in steps(self.folder)[:-self.keep]:
                    _delete(path_of(self.folder, old))
        except OSError as e:
            fault = e
        self._agree(fault, new, final)

    def _agree(self, fault, new, final, value=None):
        """Everyone's values, or the same OSError on all ranks if one of them has a fault."""
        told = everyone((None if fault is None else (getattr(fault, "errno", None), str(fault)), value), self.group)
        faults = [f for f, _ in told if f]
        if not faults:
            return [v for _, v in told]
        if get_rank()[0] == 0:
            shutil.rmtree(new, ignore_errors=True)  # gives the room back
        number, text = faults[0]
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space left" in text or "File too large" in text:
            raise OSError(errno.ENOSPC, f"no room left to write {final}; the checkpoints before it are untouched: free some "
                                        "disk space")
        raise OSError(number or errno.EIO, f"{final} could not be written ({text}); the checkpoints before it are "
                                           "untouched: see to its disk")


def _cause(e) -> Exception:
    """The first error inside a CheckpointException."""
    return next((fault[0] for fault in e.failures.values()), e)
