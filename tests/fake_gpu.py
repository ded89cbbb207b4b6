"""
A GPU without data, for counting what a pass asks of it: tensors on 'cuda' have shapes, dtypes and strides only, those on the
CPU are real. Like a GPU it refuses operators that mix devices. It counts

    launches   operators that are no views (a custom operator counts as one)
    syncs      a value on the device that the CPU reads, so that it waits for all that was launched
    copies     from pageable memory to the device, which wait for it too; those from pinned memory are free
    bytes      that the operators read and write

Values are dummies: 1 where an integer is read, 0.5 where a float is, true where a bool is. There are no CUDA streams, so
that FSDP and NCCL cannot run, and no CUDA generator, so that decoding is greedy.

Import it before torch, in a process of its own: the library that it loads cannot be unloaded, and is looked for once only.
NANOCHAT_FAKE_GPU is the path where the library is, or is built.
"""
import ctypes
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def build(path: Path) -> None:
    """Compiles the library, which takes two seconds; all or nothing."""
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    include, lib = torch_folder / "include", torch_folder / "lib"
    source = Path(__file__).with_suffix(".cpp")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        subprocess.run(["g++", "-O0", "-std=c++20", "-shared", "-fPIC", f"-I{include}",
                        f"-I{include / 'torch/csrc/api/include'}", source, "-o", made, f"-L{lib}", "-ltorch_cpu", "-lc10"],
                       check=True, capture_output=True)
        made.rename(path)


def _load() -> None:
    """Loads the library and those of torch that it needs, before torch itself."""
    path = Path(os.environ["NANOCHAT_FAKE_GPU"])
    if not path.exists():
        build(path)
    lib = Path(importlib.util.find_spec("torch").origin).parent / "lib"
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(lib / name, mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(path)


_load()

import collections
import contextlib
import types

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
FREE = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided, aten.detach,
        aten._unsafe_view, aten.alias, aten.view, aten.lift_fresh, aten.lift}
WAITING = {aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.equal}  # their result's shape is data
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm}


def _value(t: torch.Tensor) -> bool | float | int:
    return True if t.dtype == torch.bool else 0.5 if t.is_floating_point() else 1


class Counts:
    """What a device was asked to do; where: the lines of our code that made it wait."""
    def __init__(self):
        self.launches, self.syncs, self.copies, self.bytes, self.product_bytes = 0, 0, 0, 0, 0
        self.where, self.operators = collections.Counter(), collections.Counter()

    def per(self, n: int = 1) -> dict:
        """The counts, divided by n."""
        return {name: getattr(self, name) / n for name in ("launches", "syncs", "copies", "bytes", "product_bytes")} | {
            "where": dict(self.where.most_common(8))}


class FakeGPU(TorchDispatchMode):
    """See the module; `counts` is a Counts that `reset` makes anew."""
    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.pinned = set()  # data pointers of CPU tensors in pinned memory; held, lest one is given out again
        self._kept = []
        self.reset()

    def reset(self) -> None:
        self.counts = Counts()

    def pin(self, t: torch.Tensor) -> torch.Tensor:
        copy = t.clone()
        self.pinned.add(copy.untyped_storage().data_ptr())
        self._kept.append(copy)
        return copy

    def _wait(self, kind: str) -> None:
        setattr(self.counts, kind, getattr(self.counts, kind) + 1)
        ours, frame = [], sys._getframe(1)
        while frame is not None and len(ours) < 2:
            folder, name = frame.f_code.co_filename.rsplit("/", 2)[-2:] if "/" in frame.f_code.co_filename else ("", "")
            if folder in ("nanochat", "scripts", "tiny_experiment", "kernels"):
                ours.append(f"{name}:{frame.f_lineno}")
            frame = frame.f_back
        self.counts.where[f"{kind} {' < '.join(ours)}"] += 1

    def _dummy(self, t: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """What the CPU reads of a tensor."""
        return torch.full(t.shape, _value(t), dtype=dtype or t.dtype)

    def _fake_indices(self, indices) -> list:
        """Indices as the fake operator takes them: a mask waits for its number of true entries, which here is all."""
        out = []
        for i in indices:
            if i is not None and i.dtype == torch.bool:
                self._wait("syncs")
                n, dims = i.numel(), i.dim()
            elif i is not None and i.device.type == "cpu":
                self._wait("copies")
                n, dims = i.shape, 1
            else:
                out.append(i)
                continue
            with self.fake:
                out += [torch.empty(n, dtype=torch.int64, device="cuda") for _ in range(dims)]
        return out

    def _lift(self, t):
        return self.fake.from_tensor(t) if isinstance(t, torch.Tensor) and not isinstance(t, FakeTensor) else t

    def __torch_dispatch__(self, func, types_, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet, inputs = func.overloadpacket, [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        there = any(t.device.type == "cuda" for t in inputs)
        device = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
        if not there and device != "cuda":
            return func(*args, **kwargs)
        if packet is aten._local_scalar_dense:
            self._wait("syncs")
            return _value(args[0])
        if packet is aten._to_copy and there and device == "cpu":
            self._wait("syncs")
            return self._dummy(args[0], kwargs.get("dtype"))
        if packet is aten.copy_ and args[0].device.type == "cpu":
            self._wait("syncs")
            return args[0].copy_(self._dummy(args[1]))
        source = args[1] if packet is aten.copy_ else args[0] if packet is aten._to_copy else None
        if source is not None and source.device.type == "cpu" and (source.dim() or packet is aten._to_copy):
            if source.untyped_storage().data_ptr() not in self.pinned or not kwargs.get("non_blocking"):
                self._wait("copies")
        if packet in WAITING:
            self._wait("syncs")
            if packet is aten.nonzero:
                with self.fake:
                    return torch.empty(args[0].numel(), args[0].dim(), dtype=torch.int64, device="cuda")
        if packet in (aten.index, aten.index_put, aten.index_put_):
            args = (args[0], self._fake_indices(args[1]), *args[2:])
        with self.fake:
            args, kwargs = tree_map(self._lift, (args, kwargs))
            out = func(*args, **kwargs)
        if func.namespace != "prim" and not getattr(func, "is_view", False) and packet not in FREE:
            self.counts.launches += 1
            self.counts.operators[str(packet)] += 1
            tensors = {id(t): t.numel() * t.element_size() for t in tree_leaves((args, kwargs, out))
                       if isinstance(t, torch.Tensor)}
            self.counts.bytes += sum(tensors.values())
            if packet in PRODUCTS or func.namespace in ("adamba", "fake_gpu"):
                self.counts.product_bytes += sum(tensors.values())
        return out


# ---------------------------------------------------------------------------------------------------------------------
# Fused attention, one kernel each way on a GPU: without one torch would take it apart

@torch.library.custom_op("fake_gpu::attention", mutates_args=())
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    raise NotImplementedError


@attention.register_fake
def _(q, k, v, mask):
    return torch.empty_like(q)


@torch.library.custom_op("fake_gpu::attention_backward", mutates_args=())
def attention_backward(g: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor,
                       mask: torch.Tensor | None) -> list[torch.Tensor]:
    raise NotImplementedError


@attention_backward.register_fake
def _(g, q, k, v, y, mask):
    return [torch.empty_like(t) for t in (q, k, v)]


def _attention_setup(ctx, inputs, output):
    *qkv, mask = inputs
    ctx.save_for_backward(*qkv, output, mask)


attention.register_autograd(lambda ctx, g: (*torch.ops.fake_gpu.attention_backward(g, *ctx.saved_tensors), None),
                            setup_context=_attention_setup)


def _sdpa(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
    assert len({t.device for t in (q, k, v, *([] if attn_mask is None else [attn_mask]))}) == 1, "mixed devices"
    return attention(q, k, v, attn_mask)


@contextlib.contextmanager
def fake_gpu():
    """A FakeGPU that is active, in a process that believes to have an H100 and the Mamba kernels."""
    import nanochat.cpu_attention as cpu_attention
    from nanochat import common, mamba_block, mamba_kernels
    gpu = FakeGPU()
    properties = types.SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=85_520_809_984)
    torch.cuda._lazy_init = lambda: None
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.device = lambda *_: contextlib.nullcontext()
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_name = lambda *_: properties.name
    torch.cuda.get_device_properties = lambda *_: properties
    FakeTensor.tolist = lambda t: t.cpu().tolist()  # one copy, as on a real device
    torch.Tensor.pin_memory = lambda t, *_: gpu.pin(t)
    torch.inference_mode = lambda on=True: torch.no_grad() if on else contextlib.nullcontext()  # else operators come whole
    torch.nn.functional.scaled_dot_product_attention = _sdpa
    cpu_attention.MAX_TOKENS = 0
    mamba_kernels.why_no_cuda = lambda: None
    mamba_block.choose_form.cache_clear()
    common.has_native_bf16 = mamba_block.has_native_bf16 = lambda _: True
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is a copy, which is then seen
    with gpu:
        yield gpu
