"""
How much memory a training step takes, without the memory and without the GPU: the real step runs on fake tensors (shapes and
dtypes, no data), and every storage's bytes are counted from its creation to its end.

    with traced() as trace:
        ...                                     # make the model, run the step
    trace.peak, trace.at_peak                   # bytes, and their parts by category

Floating-point tensors are fake. Integer and boolean ones that follow from no fake one (tokens, levels, exits, masks) stay
real, since the model's control flow reads them; they are counted too. The predictor's and the gate's decisions, which do
follow from fake ones, are real tensors that say the most expensive thing: full width, no exit. Not counted: the CUDA
context, cuBLAS's and NCCL's own buffers, and what the allocator loses to fragments.
"""
import contextlib
import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanochat import cpu_attention, loss_eval, mamba_kernels
from nanochat.mamba_block import Mamba2

CATEGORIES = ("parameters", "gradients", "optimizer", "gathered", "activations", "temporary")
aten = torch.ops.aten
_INTEGER_FACTORIES = (aten.arange, aten.full, aten.scalar_tensor, aten.randint, aten.randperm)  # by default


class MemoryTrace(TorchDispatchMode):
    """
    Counts while it is active; `live` (category -> bytes), `peak` and `at_peak` (`live` at the peak) hold what it saw. What a
    forward pass makes, a recomputed one too, is an activation, the rest temporary, unless `label` or `mark` say better.
    """
    def __init__(self, gpu_forms: bool):
        super().__init__()
        self.gpu_forms = gpu_forms
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.live = dict.fromkeys(CATEGORIES, 0)
        self.phase = None
        self._known: dict[int, list] = {}  # a storage's address -> [category, bytes, weak reference]
        self._drawn: set[int] = set()  # addresses of storages of random numbers, which have data
        self.reset_peak()

    def reset_peak(self) -> None:
        self.peak, self.at_peak = sum(self.live.values()), dict(self.live)

    @contextlib.contextmanager
    def label(self, category: str):
        """What is made inside is of `category`."""
        before, self.phase = self.phase, category
        try:
            yield
        finally:
            self.phase = before

    def mark(self, tensors, category: str) -> None:
        """The tensors are of `category`."""
        for t in tensors:
            storage = (t._local_tensor if isinstance(t, DTensor) else t).untyped_storage()
            self._see(storage, category)
            entry = self._known[storage._cdata]
            self.live[entry[0]] -= entry[1]
            self.live[category] += entry[1]
            entry[0] = category

    def _see(self, storage: torch.UntypedStorage, category: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        entry = self._known.get(key)
        if entry is None:
            self._known[key] = [category, 0, weakref.ref(storage, lambda _: self._gone(key))]
            entry = self._known[key]
        if size != entry[1]:
            self._grow(entry, size)

    def _gone(self, key: int) -> None:
        category, size, _ = self._known.pop(key)
        self._drawn.discard(key)
        self.live[category] -= size

    def _grow(self, entry: list, size: int) -> None:
        if size and self.phase:
            self.live[entry[0]] -= entry[1]
            entry[0], entry[1] = self.phase, 0
        self.live[entry[0]] += size - entry[1]
        entry[1] = size
        if (total := sum(self.live.values())) > self.peak:
            self.peak, self.at_peak = total, dict(self.live)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """To be called when a storage has changed its size in place."""
        if (entry := self._known.get(storage._cdata)) is not None:
            self._grow(entry, storage.nbytes())

    def workspace(self, size: int) -> None:
        """A kernel allocates `size` bytes for itself and frees them."""
        entry = ["temporary", 0]
        self._grow(entry, size)
        self.live[entry[0]] -= size

    # --- which operators run, and on what

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if any(isinstance(t, DTensor) for t in inputs):
            return NotImplemented  # it comes again with the local tensors
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) not in (None, self.fake):
            return func(*args, **kwargs)  # the sharding layer asks for shapes only
        if func.overloadpacket in _WORKSPACES:
            self.workspace(_WORKSPACES[func.overloadpacket](*args))
        out = self._run(func, inputs, args, kwargs)
        # In a backward pass gradients are off, except where a checkpointed forward is computed again.
        forward = torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled()
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self._see(t.untyped_storage(), self.phase or ("activations" if forward else "temporary"))
        return out

    def _run(self, func, inputs, args, kwargs):
        if not self.gpu_forms and func.overloadpacket in _FUNCTIONS:  # what it allocates inside counts
            with self:
                return _FUNCTIONS[func.overloadpacket](*args, **kwargs)
        if inputs:
            if not any(isinstance(t, FakeTensor) or t.is_meta for t in inputs):
                assert not any(self._is_large(t) for t in inputs), "a large tensor is not fake"
                return func(*args, **kwargs)
            if func is aten._local_scalar_dense.default:
                return 0.5  # a loss, for a log
            if func is aten.argmax.default:  # a plan, which control flow reads: the last level, full width
                index, = args[1:] or (None,)
                assert index is not None, "an index into a flattened tensor decides nothing here"
                shape = inputs[0].movedim(index, -1).shape
                return torch.full(shape[:-1], shape[-1] - 1)
            if func in (aten.gt.Scalar, aten.lt.Scalar):  # the gate against a threshold: no token exits, none is widened
                return torch.zeros(inputs[0].shape, dtype=torch.bool)
            if func is aten.index.Tensor:  # a mask's true entries are known here, and not to a fake operator
                masks = [i is not None and i.dtype == torch.bool and not isinstance(i, FakeTensor) for i in args[1]]
                args = (args[0], [j for i, m in zip(args[1], masks) for j in (i.nonzero().unbind(1) if m else (i,))])
        elif kwargs.get("generator") is not None:
            out = func(*args, **kwargs)
            self._drawn.add(out.untyped_storage()._cdata)
            return out
        elif _is_integer(func, kwargs.get("dtype")):
            return func(*args, **kwargs)
        with self.fake:
            return func(*args, **kwargs)

    def _is_large(self, t: torch.Tensor) -> bool:
        """Whether a tensor with data is as large as weights; random numbers for all ranks' rows may be."""
        return t.is_floating_point() and t.numel() > 1e6 and t.untyped_storage()._cdata not in self._drawn


def _is_integer(func, dtype: torch.dtype | None) -> bool:
    return func.overloadpacket in _INTEGER_FACTORIES if dtype is None else not dtype.is_floating_point


def _scan_workspace(act, dt, A, D, initial, d_inner, ngroups, chunk_size) -> int:
    """What mamba-ssm's forward scan allocates inside: two fp32 arrays like dt, chunk states in fp32 and bf16, C B^T."""
    (b, T, width), H = act.shape, len(D)
    chunks, cells = -(-T // chunk_size), b * d_inner * (width - d_inner) // (2 * ngroups)
    return 8 * dt.numel() + 6 * chunks * cells + 4 * b * chunks * ngroups * chunk_size ** 2 + 4 * b * H


def _scan_backward_workspace(dout, out, act, dt, A, D, initial, d_inner, ngroups, chunk_size) -> int:
    """Its backward: those, the states' gradients (fp32 in and out), C B^T's, dB and dC in fp32, and four more like dt."""
    b, T, width = act.shape
    chunks, cells = -(-T // chunk_size), b * d_inner * (width - d_inner) // (2 * ngroups)
    return (24 * dt.numel() + 18 * chunks * cells + 8 * b * chunks * ngroups * chunk_size ** 2
            + 4 * b * T * (width - d_inner) + 2 * dout.numel())


def _conv_backward_workspace(dout, xBC, weight, bias, past) -> int:
    """Our convolution's backward: the weights' gradient in parts, one per SPAN = 256 tokens of a row, and their sum."""
    b, T, C = xBC.shape
    return 4 * (b * -(-T // 256) + 1) * C * (weight.size(1) + 1)


def _norm_backward_workspace(dout, y, z, weight, rstd, group_size) -> int:
    """mamba-ssm's gated norm: the weight's gradient in parts, one per program that an H100's 132 processors run."""
    block = 1 << (group_size - 1).bit_length()
    warps = min(max(block // 256, 1), 8)
    return 4 * len(weight) * -(-132 * -(-4 // warps) // (len(weight) // group_size))


_FUNCTIONS = {torch.ops.adamba.mixer: mamba_kernels.mixer._init_fn,
              torch.ops.adamba.mixer_backward: mamba_kernels.mixer_backward._init_fn}
_WORKSPACES = {torch.ops.adamba.cuda_scan: _scan_workspace,
               torch.ops.adamba.cuda_scan_backward: _scan_backward_workspace,
               torch.ops.adamba.cuda_conv_backward: _conv_backward_workspace,
               torch.ops.adamba.cuda_norm_backward: _norm_backward_workspace}


@contextlib.contextmanager
def traced(gpu_forms: bool = True):
    """
    A MemoryTrace that is active, with FSDP's buffers in their categories. gpu_forms: the forms that a GPU runs (the Mamba
    kernels, by the shapes registered for them and the workspace that mamba-ssm's source allocates; torch's fused attention),
    though the fake device is a CPU, since a torch without CUDA cannot pretend to have one. Else the CPU's own.
    """
    trace = MemoryTrace(gpu_forms)
    resize, group = torch.UntypedStorage.resize_, _fsdp_param_group

    def tracked_resize(storage, size):
        resize(storage, size)
        trace.resized(storage)

    def labelled(function, category):
        def inner(*args, **kwargs):
            with trace.label(category):
                return function(*args, **kwargs)
        return inner
    changes = [(torch.UntypedStorage, "resize_", tracked_resize)]
    for name, category in (("foreach_all_gather", "gathered"), ("foreach_all_gather_copy_out", "gathered"),
                           ("foreach_reduce", "gradients")):
        changes.append((group, name, labelled(getattr(group, name), category)))
    if gpu_forms:
        changes += [(Mamba2, "_on_kernels", lambda self, t: True), (Mamba2, "_chunk", lambda self, device: 256),
                    (cpu_attention, "MAX_TOKENS", 0), (loss_eval, "CHUNK", loss_eval.GPU_CHUNK)]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        with trace:
            yield trace
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
