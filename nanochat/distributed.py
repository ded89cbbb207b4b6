"""
Training over several processes (DESIGN 10): all that knows of ranks and shards, and nothing of it is in the model.

    torchrun --nproc_per_node=8 -m scripts.fractal_train ...          # one machine; gloo on a CPU, NCCL on GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 -m scripts.fractal_train ...

Every block, the embedding, each value table and the head is a unit of FSDP2 (Zhao et al. 2023, arXiv 2304.11277): a rank
holds its rows of each matrix, in fp32, and a unit's matrices are whole, in the compute dtype, only while it runs. What
stays fp32 in compute too (SSM parameters, controls: under 0.1 % of the model) is held whole by every rank. Across nodes
the shards of one node are copies of the next one's (HSDP). Gradients are summed, not averaged: every loss is scaled by its
share of the global batch, so that any number of ranks makes the same step (in as many passes; see elastic_step.py).
"""
import atexit
import contextlib
import functools
import gc
import os
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import checkpoint

from nanochat.common import get_rank
from nanochat.hybrid_gpt import stays_fp32

# How long a rank waits for the others before the job is ended. Rank 0 alone fetches data and writes the export
# (103 GB at the end of stage 3: an hour at 30 MB/s), and NCCL's default of 10 minutes would end the job meanwhile.
# Dead ranks need no timeout: torchrun ends a job when one of its processes dies.
TIMEOUT = timedelta(hours=6)
_meshes: list[DeviceMesh] = []  # that this process has made


class Gpu(NamedTuple):
    """A GPU's name and its memory in bytes."""
    name: str
    memory: int


def init_processes(device_type: str) -> torch.device:
    """This process's device, after it has joined the others that torchrun started, if it did."""
    if device_type == "cuda":
        configure_cuda()
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        device_type = f"cuda:{torch.cuda.current_device()}"
    rank, world = get_rank()
    if world > 1 and not dist.is_initialized():
        atexit.register(_free_groups)
        backend = "cpu:gloo,cuda:nccl" if device_type.startswith("cuda") else "gloo"
        attempt, one_node = os.environ.get("TORCHELASTIC_RESTART_COUNT"), os.environ.get("LOCAL_WORLD_SIZE") == str(world)
        if attempt is None or not one_node:
            dist.init_process_group(backend, timeout=TIMEOUT)
        else:
            # torch 2.13's launcher keeps one store over its restarts: ranks would wait for the addresses of dead ones
            store, _, _ = next(dist.rendezvous("env://"))
            store = dist.PrefixStore(f"attempt_{attempt}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    return torch.device(device_type)


def configure_cuda() -> None:
    """
    Settings of this process for CUDA, before its first use: memory segments that grow, so that less of it is lost
    to fragments (unless the environment configures the allocator), and TF32 for what is left of fp32 products.
    """
    if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    torch.set_float32_matmul_precision("high")


def smallest_gpu() -> Gpu:
    """Of the GPUs that the ranks hold, the one with the least memory; all ranks call."""
    own = torch.cuda.get_device_properties(torch.cuda.current_device())
    return min(everyone(Gpu(own.name, own.total_memory)), key=lambda gpu: gpu.memory)


def barrier() -> None:
    """
    Returns when all ranks are here. They wait in gloo, on the CPU. To be called after a long write by one rank: in a
    collective on the GPUs the others would wait under NCCL's watchdog, which ends the job.
    """
    everyone(None)


def make_mesh(device_type: str, nodes: int | None = None) -> DeviceMesh | None:
    """
    The ranks as a mesh: ('shard',) on one node, ('replicate', 'shard') over several, None for a single process. nodes: how
    many groups of ranks hold the model once each (None: the machines that torchrun runs on).
    """
    world = get_rank()[1]
    if world == 1:
        return None
    if nodes is None:
        nodes = world // int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if nodes > 1:
        mesh = init_device_mesh(device_type, (nodes, world // nodes), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device_type, (world,), mesh_dim_names=("shard",))
    _meshes.append(mesh)
    return mesh


# ---------------------------------------------------------------------------------------------------------------------
# The model

def units(model) -> list[torch.nn.Module]:
    """The modules that are gathered one at a time, in the order in which a pass meets them."""
    tables = getattr(model, "value_embeds", {})
    out = [model.transformer.wte]
    for i, block in enumerate(model.transformer.h):
        out += [tables[str(i)], block] if str(i) in tables else [block]
    return [*out, model.lm_head]


def checkpoint_blocks(model) -> None:
    """
    Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): backward computes each block again, and only the
    residual stream between the blocks is kept.
    """
    for block in model.transformer.h:
        block.forward = functools.partial(_checkpointed, block.forward)


def _checkpointed(forward, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def compile_blocks(model, backend: str = "inductor") -> None:
    """
    Compiles each block's forward as one graph, with one static variant per level that it meets. Blocks of one kind share
    the compiled code, so the number of variants does not grow with depth, but a level has several: with and without value
    embeddings and exits, with gradients of nothing, of weights, or of the input too, and for up to three numbers of rows
    (recipe both). tests/test_compile.py counts at most half of the limit.
    """
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 32 * len(model.config.levels))
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, dynamo.recompile_limit)
    for block in model.transformer.h:
        compiled = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=backend)
        block.forward = functools.partial(_compiled, compiled, block.forward)


def _compiled(compiled, plain, x, level, *args, **kwargs):
    """A block's compiled forward; the plain one where tokens differ in width, since which are how wide is data."""
    per_token = isinstance(level, torch.Tensor) and not level.is_floating_point()
    return (plain if per_token else compiled)(x, level, *args, **kwargs)


def shard_model(model, mesh: DeviceMesh | None, compute_dtype: torch.dtype = torch.bfloat16,
                gradient_checkpointing: bool = False, compile: bool = False, backend: str = "inductor"):
    """
    Prepares a model for training, in place, and returns it: compiled blocks, activation checkpointing, sharding over `mesh`
    (None: one process, nothing is sharded). The model may be on the meta device (then call to_empty and load its weights
    with load_shards) or hold the same weights on all ranks. requires_grad must be set before, and not changed after: a unit
    that was frozen at its first pass cannot learn later.
    """
    model.compute_dtype = compute_dtype
    if compile:  # innermost: hooks of checkpointing and sharding are no part of the graph
        compile_blocks(model, backend)
    if gradient_checkpointing:
        checkpoint_blocks(model)
    if mesh is None:
        return model
    whole = {p for name, p in model.named_parameters() if stays_fp32(name)}
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options = {"mesh": mesh, "mp_policy": policy, "ignored_params": whole, "reshard_after_forward": True}
    made = [fully_shard(module, **options) for module in (*units(model), model)]
    for module in made:
        module.set_gradient_divide_factor(1.0)  # sums
        module.set_force_sum_reduction_for_comms(True)
        if not hasattr(module, "kind"):  # no block: what backward of a table or of the head needs was made in forward
            module.set_unshard_in_backward(False)
    register_fsdp_forward_method(model, "hidden")
    register_fsdp_forward_method(model.lm_head, "loss")
    assert all(isinstance(p, DTensor) != (p in whole) for p in model.parameters()), "a parameter has no unit"
    return model


@contextlib.contextmanager
def gathered_once(model):
    """
    Inside, the units of a model that is sharded over CPU processes stay whole behind their first forward pass, so that the
    passes of an evaluation do not gather them again and again: with gloo that takes most of its time. On GPUs nothing
    changes, whose links are fast, and whose memory is planned for one whole block.
    """
    modules = [m for m in model.modules() if isinstance(m, FSDPModule)] if model.device.type == "cpu" else []
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


@torch.no_grad()
def load_shards(model, state: dict) -> None:
    """Fills a model's parameters, whole or sharded, from whole tensors, of which each rank reads its rows only."""
    for name, p in model.state_dict().items():
        local(p).copy_(state[name][local_rows(p)])


def local(t: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor: its shard, or all of a plain one. Shares memory."""
    return t.to_local() if isinstance(t, DTensor) else t


def local_rows(t: torch.Tensor) -> slice:
    """Which rows of the whole tensor local(t) is."""
    if not isinstance(t, DTensor):
        return slice(None)
    shape, offset = compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)
    return slice(offset[0], offset[0] + shape[0])


def whole(t: torch.Tensor) -> torch.Tensor:
    """The whole tensor, on every rank; all ranks must ask for it."""
    return t.full_tensor() if isinstance(t, DTensor) else t


# ---------------------------------------------------------------------------------------------------------------------
# Steps

def reduce_whole(params) -> None:
    """Sums over all ranks the gradients of the parameters that every rank holds whole, in one exchange."""
    if not dist.is_initialized():
        return
    grads = [p.grad for p in params if p.grad is not None and not isinstance(p, DTensor)]
    if grads:
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for g, part in zip(grads, flat.split([g.numel() for g in grads])):
            g.copy_(part.view_as(g))


@torch.no_grad()
def gradient_norm(params) -> torch.Tensor:
    """The norm of all gradients, a scalar, the same on every rank; not finite if any entry anywhere is not."""
    params = [p for p in params if p.grad is not None]
    sharded = [p for p in params if isinstance(p, DTensor)]
    device, whole = local(params[0]).device, [p for p in params if not isinstance(p, DTensor)]
    total = torch.stack([_squares([local(p.grad) for p in some], device) for some in (sharded, whole)])
    if sharded:
        mesh = sharded[0].device_mesh
        dist.all_reduce(total[0], group=mesh.get_group("shard"))
    return total.sum().sqrt()


def _squares(tensors, device) -> torch.Tensor:
    if not tensors:
        return torch.zeros((), dtype=torch.float32, device=device)
    return torch.stack(torch._foreach_norm([t.float() for t in tensors])).square().sum()


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """Elementwise sum over the ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def everyone(value, group=None) -> list:
    """What each rank gives, a list on all of them."""
    if not dist.is_initialized():
        return [value]
    out = [None] * dist.get_world_size()
    dist.all_gather_object(out, value, group=group)
    return out


def first_alone(make):
    """make() on every rank, on the first before all others: what it puts on the disk is then there already."""
    if get_rank()[0] == 0:
        made = make()
    everyone(None)
    return made if get_rank()[0] == 0 else make()


def full_state(model) -> dict[str, torch.Tensor] | None:
    """The whole weights on the CPU of rank 0, None elsewhere; all ranks must ask. Rank 0 needs room for all of them."""
    return _gather(model.state_dict())


def full_optimizer_state(optimizer) -> dict | None:
    """An optimizer's state dict with whole tensors on rank 0, None elsewhere."""
    state = optimizer.state_dict()
    whole_state = {i: _gather(moments) for i, moments in state["state"].items()}
    return {**state, "state": whole_state} if get_rank()[0] == 0 else None


def _gather(tensors: dict) -> dict | None:
    out = {name: whole(t.detach()) for name, t in tensors.items()} if not dist.is_initialized() else {}
    for name, t in tensors.items() if dist.is_initialized() else ():
        full = whole(t.detach())
        if get_rank()[0] == 0:
            out[name] = full.cpu()
    return out if get_rank()[0] == 0 else None


def leave() -> None:
    """Ends what init_processes began, once all ranks are here."""
    if dist.is_initialized():
        everyone(None)
        dist.destroy_process_group()


def _free_groups() -> None:
    """
    Frees the groups of ranks before the interpreter ends: threads of gloo's that outlive it make a process crash after its
    work is done. A mesh holds its group, and caches of DTensor's hold the mesh, whatever becomes of the model.
    """
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache  # not above: it imports triton
    for mesh in _meshes:
        getattr(mesh, "_pg_registry", {}).clear()  # torch's own, of the pinned version
    _clear_sharding_prop_cache()
    gc.collect()
