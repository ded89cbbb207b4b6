"""
The layers' forward for a few tokens on a CPU without gradients, in one call of csrc/decode.cpp each. The layers ask
`serves` first, and run their PyTorch form where it says no; both compute the same function, up to rounding.

All shapes, dtypes and devices are the caller's promise: tensors come from the layers themselves, which own the weights.
"""
import ctypes
import functools
from array import array

import torch

from nanochat.native import library

# Rows (batch x tokens) up to which the operators are used. On two Zen 4 cores they are 1.5x (bf16) to 2x (fp32) as fast as
# torch's products at 16, level (bf16) to 1.5x at 48; beyond, torch's gain.
MAX_ROWS = 48

# Numbers of pointers, sizes and floats that each takes, in this order.
_OPERATORS = {"norm": (2, 2, 2), "linear": (3, 5, 0), "head": (3, 5, 1), "mlp": (4, 6, 2), "attention": (16, 15, 2),
              "mamba": (15, 12, 1), "replay": (8, 9, 0), "predictor": (13, 7, 3), "blocks": (12, 8, 5),
              "greedy": (9, 2, 6)}
PREDICTOR = "c_in.weight", "c_mid.weight", "c_mid.bias", "out_weight", "out_bias"  # the weights of that operator, in order
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def _allowed() -> bool:
    """Whether neither gradients nor a compiler nor autocast need torch's own operators."""
    return (not torch.compiler.is_compiling() and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"))


def _free(t: torch.Tensor) -> bool:
    """Whether t is a plain tensor on a CPU, and nobody needs torch's own operators."""
    return type(t) is torch.Tensor and t.device.type == "cpu" and _allowed()


def plain(weight: torch.Tensor) -> bool:
    """Whether the operators can take a whole weight by its address: a sharded one, for instance, they cannot."""
    return type(weight) in (torch.nn.Parameter, torch.Tensor) and weight.device.type == "cpu" and weight.is_contiguous()


def serves(x: torch.Tensor, *weights: torch.Tensor) -> bool:
    """Whether the operators take x (..., k) with these weights: on a CPU, no gradients, few rows, all of one dtype."""
    return (_free(x) and x.dtype in DTYPES and 0 < x.numel() <= MAX_ROWS * x.size(-1)
            and all(w.dtype == x.dtype and w.stride(-1) == 1 for w in weights) and library() is not None)


def serves_tokens(idx: torch.Tensor) -> bool:
    """Whether a run of blocks (see block_run.py) takes tokens idx (B, T), if it takes their states' dtype."""
    return (type(idx) is torch.Tensor and idx.device.type == "cpu" and idx.dtype in (torch.int64, torch.int32)
            and serves_rows(idx.numel()))


def serves_rows(n: int) -> bool:
    """Likewise, n tokens that need no tensor."""
    return _allowed() and 0 < n <= MAX_ROWS and library() is not None


def serves_prompts(idx: torch.Tensor, table: torch.Tensor, dtype: torch.dtype, control) -> bool:
    """Whether `predictor` takes prompts idx (B, T), the table of their embeddings, used in this dtype, and the control."""
    return (_free(idx) and idx.dtype == torch.int64 and dtype in DTYPES and table.dtype == dtype and plain(table)
            and all(plain(w) and w.dtype == torch.float32 for w in control.parameters())
            and 0 <= int(idx.min()) <= int(idx.max()) < len(table) and library() is not None)


@functools.cache
def operator(name: str, dtype: torch.dtype):
    """The function of csrc/decode.cpp."""
    pointers, sizes, floats = _OPERATORS[name]
    types = [ctypes.c_void_p] * pointers + [ctypes.c_int64] * sizes + [ctypes.c_float] * floats
    address = ctypes.c_void_p.in_dll(library(), f"{name}_{DTYPES[dtype]}").value
    return ctypes.CFUNCTYPE(None, *types)(address)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x (..., k) as (n, k) whose rows are contiguous."""
    x = x.reshape(-1, x.size(-1))
    return x if x.stride(-1) == 1 else x.contiguous()


def norm(x: torch.Tensor, d_ref: int, eps: float) -> torch.Tensor:
    """matryoshka.norm: x (..., d) of any strides -> the same shape, contiguous."""
    x = x.contiguous()
    y = torch.empty_like(x)
    operator("norm", x.dtype)(x.data_ptr(), y.data_ptr(), x.numel() // x.size(-1), x.size(-1), d_ref, eps)
    return y


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (..., k) times weight (m, k)^T, whose rows may lie apart -> (..., m)."""
    y, flat = x.new_empty(*x.shape[:-1], weight.size(0)), _rows(x)
    operator("linear", x.dtype)(flat.data_ptr(), weight.data_ptr(), y.data_ptr(), flat.size(0), flat.size(1),
                                weight.size(0), flat.stride(0), weight.stride(0))
    return y


def head(x: torch.Tensor, weight: torch.Tensor, softcap: float) -> torch.Tensor:
    """The capped logits of x (..., k) and weight (m, k): (..., m), fp32."""
    y, flat = x.new_empty(*x.shape[:-1], weight.size(0), dtype=torch.float32), _rows(x)
    operator("head", x.dtype)(flat.data_ptr(), weight.data_ptr(), y.data_ptr(), flat.size(0), flat.size(1), weight.size(0),
                              flat.stride(0), weight.stride(0), softcap)
    return y


def mlp(x: torch.Tensor, c_fc: torch.Tensor, c_proj: torch.Tensor, d: int, d_ref: int, eps: float) -> torch.Tensor:
    """The update of an MLP at width d, its norm included: x (..., >= d) -> (..., d)."""
    y, flat = x.new_empty(*x.shape[:-1], d), _rows(x)
    operator("mlp", x.dtype)(flat.data_ptr(), c_fc.data_ptr(), c_proj.data_ptr(), y.data_ptr(), flat.size(0), d, 4 * d,
                             flat.stride(0), c_fc.stride(0), c_proj.stride(0), d_ref, eps)
    return y


def attention(attn, x: torch.Tensor, d: int, rope, value: torch.Tensor | None, view,
              write_only: bool) -> torch.Tensor | None:
    """
    matryoshka.Attention.forward at width d, its norm included, for the tokens that `view` (cache.KVView) expects: writes
    their keys and values and gives the update (B, T, d), or None if write_only.
    """
    y = None if write_only else x.new_empty(*x.shape[:-1], d)
    flat, gate = _rows(x), None if attn.ve_gate is None else attn.ve_gate.weight
    value = None if gate is None else _rows(value)
    row, position = view.owner.chunk.places
    cos, sin = rope
    operator("attention", x.dtype)(
        flat.data_ptr(), _pointer(y), *(m.weight.data_ptr() for m in (attn.c_q, attn.c_k, attn.c_v, attn.c_proj)),
        _pointer(gate), _pointer(value), None, cos.data_ptr(), sin.data_ptr(), view.k.data_ptr(), view.v.data_ptr(),
        _pointer(view.heads), row.data_ptr(), position.data_ptr(),
        flat.size(0), d, flat.stride(0), attn.c_q.in_features, attn.head_dim, attn.group,
        0 if gate is None else gate.size(1), 0 if value is None else value.stride(0), cos.numel() // cos.size(-1),
        view.k.stride(0), view.k.stride(1), view.k.size(2), write_only, 0, 0, attn.d_ref, attn.eps)
    return y


def mamba(mixer, x: torch.Tensor, before, after, write_only: bool,
          eps: float) -> tuple[torch.Tensor | None, torch.Tensor]:
    """
    mamba_block.Mamba2 for x (B, T, d_model): gives the output (None if write_only) and in_proj's [z,] x, B, C, dt
    (B, T, width), and writes the states behind these tokens into `after`. before, after: (conv_state (B, conv_dim, d_conv),
    channels contiguous, ssm_state), of like strides; they may be the same tensors. Each token's result is the same to
    the last bit however the tokens are cut into calls.
    """
    y, flat = None if write_only else x.new_empty(x.shape), _rows(x)
    weight = mixer.in_proj.weight[mixer.d_inner:] if write_only else mixer.in_proj.weight
    projected = x.new_empty(*x.shape[:2], weight.size(0))
    small = (mixer.conv1d.weight, mixer.conv1d.bias, mixer.dt_bias, mixer.A_log, mixer.D, mixer.norm.weight)
    operator("mamba", x.dtype)(
        flat.data_ptr(), weight.data_ptr(), mixer.out_proj.weight.data_ptr(), _pointer(y), projected.data_ptr(),
        *(state[i].data_ptr() for i in (0, 1) for state in (before, after)), *(p.data_ptr() for p in small),
        flat.size(0), x.size(1), mixer.d_model, mixer.d_inner, mixer.nheads, mixer.d_state, mixer.ngroups, mixer.d_conv,
        flat.stride(0), after[0].stride(0), after[1].stride(0), write_only, eps)
    return y, projected


def replay(mixer, xBC_dt: torch.Tensor, state, counts: torch.Tensor) -> None:
    """
    Advances state (see `mamba`) in place by the first counts[row] (B,) int64 of the tokens whose in_proj outputs are
    xBC_dt (B, T, x + B + C + dt).
    """
    xBC_dt, (conv, ssm) = xBC_dt.contiguous(), state
    small = (mixer.conv1d.weight, mixer.conv1d.bias, mixer.dt_bias, mixer.A_log)
    operator("replay", xBC_dt.dtype)(
        xBC_dt.data_ptr(), conv.data_ptr(), ssm.data_ptr(), counts.data_ptr(), *(p.data_ptr() for p in small),
        *xBC_dt.shape[:2], mixer.d_inner, mixer.nheads, mixer.d_state, mixer.ngroups, mixer.d_conv, conv.stride(0),
        ssm.stride(0))


def predictor(control, table: torch.Tensor, idx: torch.Tensor, valid: torch.Tensor, budget: torch.Tensor, d_ref: int,
              eps: float) -> torch.Tensor:
    """
    confidence_probe.LayerDimPredictor's values (B, n_block, n_levels) for prompts idx (B, T) int64, valid (B, T) bool, whose
    embeddings are rows of `table`, in one call; budget (B,) fp32.
    """
    n_block, gains, hidden = control.out_weight.shape
    idx, valid, budget = idx.contiguous(), valid.contiguous(), budget.contiguous()
    values, weights = budget.new_empty(len(idx), n_block, gains + 1), dict(control.named_parameters())
    operator("predictor", table.dtype)(
        idx.data_ptr(), valid.data_ptr(), table.data_ptr(), *(weights[name].data_ptr() for name in PREDICTOR),
        budget.data_ptr(), values.data_ptr(), None, None, None, *idx.shape, table.size(1), hidden, control.BUMPS, n_block,
        gains, d_ref, eps, control.CAP)
    return values


def address(words: array) -> int:
    """Where its values lie."""
    return words.buffer_info()[0]


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
