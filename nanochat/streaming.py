"""
Checkpoints larger than memory: weights that are made, run and written one tensor at a time.

`State` is a state dict whose tensors come into being when they are asked for; `open_state` reads one from a file, surgery
turns one into another, `streamed` runs a model on one, and `save_lazy` writes one as an ordinary torch file. So what is
resident at any time is about one block, whatever the model's size.
"""
import contextlib
import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import skip_data

from nanochat.checkpoint_manager import build_model, check_state, weights_of
from nanochat.gpt import GPT, GPTConfig
from nanochat.hybrid_gpt import stays_fp32
from nanochat.weight_files import load_torch, open_weights

WRITE_BYTES = 1 << 26


class State:
    """
    A model's weights: shapes {name: torch.Size} and make(name, dtype) -> a tensor of that shape, which the caller must
    not write to. dtype: what the matrices are stored in.
    """
    def __init__(self, shapes: dict[str, torch.Size], make: Callable[[str, torch.dtype], torch.Tensor], dtype: torch.dtype):
        self.shapes, self.make, self.dtype = shapes, make, dtype

    def get(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        t = self.make(name, dtype)
        assert t.shape == self.shapes[name] and t.dtype == dtype, (name, t.shape, t.dtype)
        return t

    def stored(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype that `name` has in a file of this dtype: what the recurrence and the controls need stays fp32."""
        return torch.promote_types(dtype, torch.float32) if stays_fp32(name) else dtype

    def rounded(self, dtype: torch.dtype) -> "State":
        """This state as a file of `dtype` would give it back."""
        return State(self.shapes, lambda name, out: self.get(name, self.stored(name, dtype)).to(out), dtype)

    def nbytes(self, dtype: torch.dtype) -> int:
        return sum(shape.numel() * self.stored(name, dtype).itemsize for name, shape in self.shapes.items())

    @staticmethod
    def of(model: GPT) -> "State":
        """A model's own weights."""
        own = model.state_dict()
        return State({k: v.shape for k, v in own.items()}, lambda name, dtype: own[name].to(dtype),
                     own["lm_head.weight"].dtype)

    def dict(self, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """All of it, in memory."""
        return {name: self.get(name, dtype or self.dtype) for name in self.shapes}


def shapes_of(config: GPTConfig) -> dict[str, torch.Size]:
    """Name -> shape of the weights of a config's model."""
    return {k: v.shape for k, v in build_model(config, "meta").state_dict().items()}


def open_state(path: Path, config: GPTConfig, info: dict | None = None) -> State:
    """
    The state in a checkpoint file, of which each tensor is read when asked for. info: the config.json or meta that was found
    with it (None: the file is one of ours). What open_weights raises for damaged files; ValueError that names keys missing,
    extra or mis-shaped for `config`.
    """
    weights = open_weights(path) if info is None else weights_of(info, path)
    specs = check_state(build_model(config, "meta").state_dict(), weights.specs, path)
    return State({name: spec.shape for name, spec in specs.items()}, lambda name, dtype: weights.read(name).to(dtype),
                 specs["lm_head.weight"].dtype)


def _bytes(t: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(t.detach().reshape(-1).view(torch.uint8).numpy())


# ---------------------------------------------------------------------------------------------------------------------
# Running

def streamed(config: GPTConfig, state: State, device="cpu", dtype=torch.float32, report: Callable = lambda: None) -> GPT:
    """
    The model of a config whose blocks and tables have weights only while they run, taken from `state` in `dtype`; it
    computes by the model's own forward pass. `report` is called whenever a part has got its weights.
    """
    model = build_model(config, "meta")
    model.compute_dtype = dtype
    tables = dict(getattr(model, "value_embeds", {}))
    parts = {f"transformer.h.{i}.": block for i, block in enumerate(model.transformer.h)}
    parts |= {f"value_embeds.{i}.": table for i, table in tables.items()} | {"transformer.wte.": model.transformer.wte}

    def fill(module, prefix):
        module.load_state_dict({name[len(prefix):]: state.get(name, dtype).to(device) for name in state.shapes
                                if name.startswith(prefix)}, assign=True)
        report()
    for prefix, module in parts.items():
        module.register_forward_pre_hook(lambda m, _, prefix=prefix: fill(m, prefix))
        module.register_forward_hook(lambda m, *_: m.to("meta") and None)
    # the head is no module call: it stays while the whole model runs
    model.register_forward_pre_hook(lambda m, _: fill(m.lm_head, "lm_head."))
    model.register_forward_hook(lambda m, *_: m.lm_head.to("meta") and None)
    return model.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Writing

class Leaf(NamedTuple):
    """A tensor to be: `make` is called when its turn to be written has come."""
    shape: torch.Size
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]


def leaves(state: State, dtype: torch.dtype) -> dict[str, Leaf]:
    """A state as a file of `dtype` holds it."""
    def leaf(name, shape):
        stored = state.stored(name, dtype)
        return Leaf(shape, stored, lambda: state.get(name, stored))
    return {name: leaf(name, shape) for name, shape in state.shapes.items()}


def save_lazy(tree, path: Path, report: Callable[[int], None] = lambda n: None) -> None:
    """
    torch.save of nested dicts and lists whose tensors are Leafs: torch writes the file with a hole for each tensor, then
    each is made and put in its place. The file has torch's format and loads with weights_only=True, mapped or not; its
    zip entries carry no checksums of the tensors (torch reads none). Not atomic: write into a folder that is renamed
    when it is whole. report(n): n bytes more were written. OSError when the disk is full.
    """
    # The writer of holes is a prototype in torch and pinned with it; tests compare its files with torch.save's.
    with FakeTensorMode(), skip_data(materialize_fake_tensors=True):
        holes = _map(lambda leaf: torch.empty(leaf.shape, dtype=leaf.dtype), tree)
        try:
            torch.save(holes, path)
        except RuntimeError as e:  # torch's own writer of files, which hides the system's error
            raise OSError(errno.ENOSPC, f"no room left to write {path}") from e
    places = load_torch(path, without_data=True)
    with open(path, "r+b", buffering=0) as f:
        def put(leaf, place):
            t = leaf.make()
            assert t.shape == leaf.shape == place.shape and t.dtype == leaf.dtype == place.dtype
            data = _bytes(t.cpu().contiguous())
            at = place.untyped_storage()._checkpoint_offset
            for start in range(0, len(data), WRITE_BYTES):
                piece = data[start:start + WRITE_BYTES]
                done = 0
                while done < len(piece):
                    done += os.pwrite(f.fileno(), piece[done:], at + start + done)
                report(len(piece))
        _map(put, tree, places)
        os.fsync(f.fileno())


def _map(fn, tree, *others):
    if isinstance(tree, Leaf):
        return fn(tree, *others)
    if isinstance(tree, dict):
        return {k: _map(fn, v, *(o[k] for o in others)) for k, v in tree.items()}
    if isinstance(tree, list):
        return [_map(fn, v, *(o[i] for o in others)) for i, v in enumerate(tree)]
    assert not isinstance(tree, torch.Tensor), "a tensor that is no Leaf would be left out"
    return tree


@contextlib.contextmanager
def seeded(seed: int, name: str):
    """Within it torch's CPU generator depends on seed and name alone: tensors may be made in any order, and again."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, name))
        yield


def seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest(), "big")
