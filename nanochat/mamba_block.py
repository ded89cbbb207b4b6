"""
The Mamba-2 mixer (Dao & Gu 2024, arXiv 2405.21060, section 7): in_proj -> causal conv + silu -> state space scan ->
gated norm -> out_proj, with the parameter names, shapes, segment order and initialisation of `mamba_ssm.Mamba2`.

One call serves any chunk of T >= 1 tokens: without a state it is the parallel form used in training; with a MambaState
it continues from that state and advances it in place, be it prefill, one decoded token, a catch-up or a verification.
What runs between the projections is in mamba_kernels.py: a chunked PyTorch form for every device, and on a GPU the
Triton kernels of mamba-ssm and our own where they can be imported. Documents packed into one row share the state, as
they share attention; a per-document reset would be one more argument of forward (the kernels' seq_idx), and is not built.
"""
import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat import cpu_decode
from nanochat import mamba_kernels as kernels
from nanochat.common import get_compute_dtype, has_native_bf16, print0
from nanochat.mamba_kernels import NORM_EPS, ssd  # noqa: F401  (ssd is part of this module's interface)

# Stay fp32 when a model is cast to bf16: the recurrence is sensitive to them, and they are small.
FP32_PARAMS = ("A_log", "dt_bias", "D", "norm.weight", "conv1d.weight", "conv1d.bias")
SLOW_LIMIT = 1e9  # parameters above which a training run in the PyTorch form must be confirmed
WINDOW = 16  # how many tokens a state can be rolled back by default


class MambaState:
    """
    The memory of one mixer: conv_state (B, conv_dim, d_conv) in the activations' dtype, the last d_conv inputs of the
    conv, newest last; ssm_state (B, nheads, headdim, d_state) fp32. Made by Mamba2.new_state, advanced by its forward.

    Rollback: `checkpoint()` remembers both states; from then on each forward also records its in_proj outputs (xBC and
    dt), so that `Mamba2.rollback(state, keep)` can restore the checkpoint and replay the first `keep` tokens without
    in_proj. At most `window` tokens per row may follow a checkpoint; `drop_checkpoint()` ends the recording.
    Copies and selections carry the two states only, never a checkpoint.

    A checkpoint copies nothing: the state has two memories, and the first forward behind a checkpoint goes on in the other
    one. So conv_state and ssm_state are other tensors after a checkpoint or a rollback.
    """

    def __init__(self, conv_state: torch.Tensor, ssm_state: torch.Tensor):
        self.conv_state, self.ssm_state = conv_state, ssm_state
        self._saved = None      # the states at the checkpoint, once a token has followed it
        self._spare = None      # the other memory, until then
        self._window = 0
        self._record = None     # list of (xBC (B,T,conv_dim), dt (B,T,nheads), lengths or None) since the checkpoint

    @property
    def batch(self) -> int:
        return self.ssm_state.size(0)

    def clone(self) -> "MambaState":
        return MambaState(self.conv_state.clone(), self.ssm_state.clone())

    def __getitem__(self, rows) -> "MambaState":
        """The rows of a slice as a view that shares memory; of an index tensor, list or mask as a copy."""
        if isinstance(rows, int):
            raise ValueError(f"a state keeps its batch dimension: write state[{rows}:{rows} + 1], not state[{rows}]")
        return MambaState(self.conv_state.mT[rows].mT, self.ssm_state[rows])

    def __setitem__(self, rows, other: "MambaState") -> None:
        """Overwrites rows (anything a tensor can be indexed with) with the rows of another state; drops a checkpoint."""
        self.conv_state[rows] = other.conv_state
        self.ssm_state[rows] = other.ssm_state
        self.drop_checkpoint()

    def copy_(self, other: "MambaState") -> "MambaState":
        """Overwrites all rows; a batch of 1 is copied into every row (one prompt, many samples). Drops a checkpoint."""
        self.conv_state.copy_(other.conv_state)
        self.ssm_state.copy_(other.ssm_state)
        self.drop_checkpoint()
        return self

    def zero_(self) -> "MambaState":
        self.conv_state.zero_()
        self.ssm_state.zero_()
        self.drop_checkpoint()
        return self

    def checkpoint(self, window: int = WINDOW) -> None:
        """Remembers the present state and starts recording, for at most `window` tokens per row."""
        self._release()
        self._window, self._record = window, []

    def drop_checkpoint(self) -> None:
        """Forgets the checkpoint and stops recording."""
        self._release()
        self._record = None

    def _release(self) -> None:
        if self._saved is not None:
            self._spare, self._saved = self._saved, None

    def _go_on(self) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Called by whoever is about to write: the states (conv, ssm) to go on from. What conv_state and ssm_state are now must
        be written anew; without a fresh checkpoint they are the same tensors.
        """
        before = self.conv_state, self.ssm_state
        if self._record is None or self._saved is not None:
            return before
        if self._spare is None:
            self._spare = torch.empty_like(self.conv_state.mT).mT, torch.empty_like(self.ssm_state)
        self._saved, (self.conv_state, self.ssm_state), self._spare = before, self._spare, None
        return before

    def _go_on_copying(self) -> None:
        """Likewise, for writers in place."""
        before = self._go_on()
        if before[0] is not self.conv_state:
            self.conv_state.copy_(before[0])
            self.ssm_state.copy_(before[1])

    @property
    def recorded(self) -> int:
        """How many tokens were recorded since the checkpoint (the longest row of ragged calls); 0 without one."""
        return sum(xBC.size(1) for xBC, _, _ in self._record or ())

    def _check_room(self, T: int) -> None:
        if self._record is not None and self.recorded + T > self._window:
            raise ValueError(f"{self.recorded} + {T} tokens since the checkpoint exceed its window of {self._window}: "
                             "take a new checkpoint() first, or drop_checkpoint()")


# Modules that allocate and nothing else: init_weights alone initialises.
class _Linear(nn.Linear):
    def reset_parameters(self):
        pass


class _Conv1d(nn.Conv1d):
    def reset_parameters(self):
        pass


class GatedRMSNorm(nn.Module):
    """norm(y * silu(z)) * weight, RMS over each group of group_size channels, computed in fp32, returned in y's dtype."""

    def __init__(self, size: int, group_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.group_size = group_size

    def forward(self, y, z):
        v = (y.float() * F.silu(z.float())).unflatten(-1, (-1, self.group_size))  # (..., groups, group_size)
        return (F.rms_norm(v, (self.group_size,), eps=NORM_EPS).flatten(-2) * self.weight.float()).to(y.dtype)


@functools.cache
def choose_form(backend: str) -> str:
    """
    "torch" or "cuda": which form the mixers run, decided once per process; announce_form prints it.
    Raises ValueError for an unknown backend, or "cuda" without a CUDA device; ImportError for "cuda" without its packages.
    """
    if backend not in ("auto", "torch", "cuda"):
        raise ValueError(f"backend {backend!r} is not known; choose auto, torch or cuda")
    if backend == "torch":
        return "torch"
    error = kernels.why_no_cuda()
    if error and backend == "cuda":
        raise error
    return "torch" if error else "cuda"


def announce_form(model: nn.Module, device_type: str, training: bool = False, allow_slow: bool = False) -> None:
    """
    Prints in one line which form the model's mixers run on a GPU, and why where it is the PyTorch form; warns of a GPU
    without bf16. On a CPU, where there is no choice, nothing is printed; a line is printed once per process.
    Raises ValueError where training more than SLOW_LIMIT parameters would run the PyTorch form, unless allow_slow.
    """
    mixers = [m for m in model.modules() if isinstance(m, Mamba2)]
    if device_type != "cuda" or not mixers:
        return
    _check_bf16()
    slow = next((m for m in mixers if m.form != "cuda"), None)
    if slow is None:
        _say_once("Mamba-2 runs its Triton kernels")
        return
    why = kernels.why_no_cuda() or slow.sizes_error or "the PyTorch form was chosen (backend='torch')"
    if training and not allow_slow and sum(p.numel() for p in model.parameters()) > SLOW_LIMIT:
        raise ValueError(f"Mamba-2 would train in its PyTorch form, at least twice as slow, because {why}; or accept that "
                         "with --allow-slow-mamba")
    _say_once(f"{'warning: ' if training else ''}Mamba-2 runs its PyTorch form, which is slower: {why}")


def _check_bf16() -> None:
    """A warning for a GPU that computes no bf16, or a ValueError where bf16 was demanded of it."""
    if has_native_bf16("cuda"):
        return
    name = torch.cuda.get_device_name()
    if get_compute_dtype("cuda") == torch.bfloat16:
        raise ValueError(f"NANOCHAT_DTYPE=bfloat16 is set, but this GPU ({name}) has no bf16: unset it to compute in fp32, "
                         "or use a GPU of compute capability 8.0 or later")
    _say_once(f"warning: this GPU ({name}) has no bf16, so everything is computed in fp32, with twice the memory and "
              "several times slower: a GPU of compute capability 8.0 or later has it")


def use_torch_form(model: nn.Module) -> None:
    """Makes all mixers of a model run their PyTorch form, whatever could run on its device."""
    for module in model.modules():
        if isinstance(module, Mamba2):
            module.form = "torch"


@functools.cache
def _say_once(line: str) -> None:
    print0(line)


class Mamba2(nn.Module):
    """
    d_inner = expand * d_model channels in nheads = d_inner / headdim heads; B and C are shared by the heads of a group,
    and the gated norm works per group. chunk_size None: chosen for the device. backend: "auto" (the kernels where they
    can run), "torch" or "cuda". __init__ only allocates (meta-device safe); call init_weights, or load weights.
    Master weights may be fp32 under any activation dtype (they are cast at use; for decoding, cast them once instead,
    all but FP32_PARAMS). Raises ValueError where sizes do not divide, and what choose_form raises.
    """

    def __init__(self, d_model: int, d_state: int = 128, d_conv: int = 4, expand: int = 2, headdim: int = 64,
                 ngroups: int = 1, chunk_size: int | None = None, backend: str = "auto"):
        super().__init__()
        d_inner = expand * d_model
        nheads = d_inner // headdim
        if d_inner % headdim:
            raise ValueError(f"d_inner = expand * d_model = {d_inner} does not divide by headdim = {headdim}")
        if d_inner % ngroups:
            raise ValueError(f"d_inner = expand * d_model = {d_inner} does not divide by ngroups = {ngroups}")
        if nheads % ngroups:
            raise ValueError(f"nheads = d_inner / headdim = {nheads} does not divide by ngroups = {ngroups}")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size = {chunk_size}: give a positive number of tokens, or None for the default")
        self.d_model, self.d_state, self.d_conv, self.headdim, self.ngroups = d_model, d_state, d_conv, headdim, ngroups
        self.d_inner, self.nheads, self.conv_dim = d_inner, nheads, d_inner + 2 * ngroups * d_state
        self.chunk_size = chunk_size
        self.form = choose_form(backend)
        self.sizes_error = None
        if self.form == "cuda":
            self.sizes_error = kernels.why_no_cuda_sizes(d_inner // ngroups)
            if self.sizes_error and backend == "cuda":
                raise ValueError(self.sizes_error)
            self.form = "torch" if self.sizes_error else "cuda"
        self.forced = backend == "cuda"
        # In mamba_ssm's order of a state dict: direct parameters first.
        self.dt_bias = nn.Parameter(torch.empty(nheads))
        self.A_log = nn.Parameter(torch.empty(nheads))
        self.D = nn.Parameter(torch.empty(nheads))
        self.in_proj = _Linear(d_model, d_inner + self.conv_dim + nheads, bias=False)  # z, x, B, C, dt
        self.conv1d = _Conv1d(self.conv_dim, self.conv_dim, d_conv, groups=self.conv_dim, padding=d_conv - 1)
        self.norm = GatedRMSNorm(d_inner, d_inner // ngroups)
        self.out_proj = _Linear(d_inner, d_model, bias=False)
        self._mark()

    def _mark(self):
        for p in (self.dt_bias, self.A_log, self.D):
            p._no_weight_decay = True

    @torch.no_grad()
    def init_weights(self) -> None:
        """
        mamba_ssm's initialisation, drawn in its order: linear and conv as torch's defaults; dt log-uniform in
        [1e-3, 0.1], stored through the inverse of softplus; A uniform in [1, 16]; D and the norm one.
        """
        nn.init.kaiming_uniform_(self.in_proj.weight, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.conv1d.weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(self.d_conv)
        nn.init.uniform_(self.conv1d.bias, -bound, bound)
        lo, hi = math.log(1e-3), math.log(0.1)
        dt = torch.exp(torch.rand_like(self.dt_bias, dtype=torch.float32) * (hi - lo) + lo).clamp_(min=1e-4)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        self.A_log.copy_(torch.empty_like(self.A_log, dtype=torch.float32).uniform_(1, 16).log_())
        self.D.fill_(1)
        self.norm.weight.fill_(1)
        nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
        self._mark()  # again: moving off the meta device makes new Parameters

    def new_state(self, batch: int, device, dtype: torch.dtype) -> MambaState:
        """A zero state; dtype is that of the activations. Channels are contiguous in the conv state's memory."""
        conv = torch.zeros(batch, self.d_conv, self.conv_dim, device=device, dtype=dtype).mT
        return MambaState(conv, torch.zeros(batch, self.nheads, self.headdim, self.d_state, device=device,
                                            dtype=torch.promote_types(dtype, torch.float32)))

    def flops_per_token(self, write_only: bool = False) -> dict[str, int]:
        """
        FLOPs of one token's forward, by part, in the recurrent form, whatever form runs: 2 for a multiply-add, 1 for a
        multiply. in_proj and out_proj: matrix products. conv: d_conv multiply-adds a channel. scan, per entry of the
        state: decay and input (1 + 2), readout (2); and D's skip. Activations, norm and dt (all O(d_inner)) are not
        counted. write_only: no z, no C in the conv, no readout, no out_proj.
        """
        GN, cells = self.ngroups * self.d_state, self.d_inner * self.d_state
        if write_only:
            return {"in_proj": 2 * self.d_model * (self.conv_dim + self.nheads),
                    "conv": 2 * self.d_conv * (self.conv_dim - GN), "scan": 3 * cells, "out_proj": 0}
        return {"in_proj": 2 * self.d_model * (self.d_inner + self.conv_dim + self.nheads),
                "conv": 2 * self.d_conv * self.conv_dim, "scan": 5 * cells + 2 * self.d_inner,
                "out_proj": 2 * self.d_inner * self.d_model}

    def forward(self, u: torch.Tensor, state: MambaState | None = None, write_only: bool = False,
                lengths: torch.Tensor | None = None) -> torch.Tensor | None:
        """
        u (B,T,d_model), T >= 1 -> y (B,T,d_model) in u's dtype (autocast's under autocast).
        state: continued from, and advanced in place; gradients do not flow into or through it.
        write_only: the state is advanced and nothing else computed (no z, gated norm, out_proj); returns None.
        lengths (B,) int64 on u's device: row b has lengths[b] valid leading tokens (0 allowed); the rest do not touch its
        state, and their outputs are unspecified.
        Raises ValueError for a state of another batch, dtype, size or device, for lengths outside 0..T (checked on a CPU
        only), for write_only without a state, for more recorded tokens than a checkpoint's window.
        """
        b, T, _ = u.shape
        if T < 1:
            raise ValueError("u has no tokens: T must be at least 1")
        device = u.device.type
        autocast = torch.is_autocast_enabled(device)
        if state is None:
            if write_only:
                raise ValueError("write_only advances a state and returns nothing: give it one")
        else:
            self._check_state(state, u, torch.get_autocast_dtype(device) if autocast else u.dtype)
            state._check_room(T)
        if lengths is not None:
            self._check_lengths(lengths, b, T)
        if self.form == "cuda" and self.forced and device != "cuda":
            raise ValueError(f"backend='cuda' computes on a CUDA device, but u is on {u.device}: move it, or choose 'auto'")
        if state is not None and lengths is None and not autocast and not torch.is_grad_enabled():
            if self._compiled(u, state.conv_state):
                y, projected = cpu_decode.mamba(self, u, state._go_on(), (state.conv_state, state.ssm_state), write_only,
                                                NORM_EPS)
                self._record_step(state, projected)
                return y
            if T == 1:
                return self._step(u, state, write_only)
        if write_only:
            with torch.no_grad():
                xBC_dt = F.linear(u, self.in_proj.weight[self.d_inner:].to(u.dtype))  # the rows of x, B, C, dt
                return self._advance(xBC_dt, state, lengths)
        zxbcdt = F.linear(u, self.in_proj.weight.to(u.dtype))  # (B,T,z+x+B+C+dt)
        y = self._mix(zxbcdt, state, lengths)
        return F.linear(y, self.out_proj.weight.to(y.dtype))

    def _check_state(self, state, u, dtype):
        conv, ssm = state.conv_state, state.ssm_state
        b = u.size(0)
        for name, got, want in (
                ("batch", (conv.size(0), ssm.size(0)), (b, b)),
                ("size", (tuple(conv.shape[1:]), tuple(ssm.shape[1:])),
                 ((self.conv_dim, self.d_conv), (self.nheads, self.headdim, self.d_state))),
                ("dtype", (conv.dtype, ssm.dtype), (dtype, torch.promote_types(dtype, torch.float32))),
                ("device", (conv.device, ssm.device), (u.device, u.device))):
            if got != want:
                raise ValueError(f"the state has {name} {got} (conv, ssm) but the input needs {want}: make it with "
                                 "new_state(batch, device, dtype of the activations)")

    @staticmethod
    def _check_lengths(lengths, b, T):
        if lengths.shape != (b,) or lengths.dtype != torch.int64:
            raise ValueError(f"lengths must be int64 of shape ({b},), got {lengths.dtype} {tuple(lengths.shape)}")
        if lengths.device.type == "cpu" and not torch.compiler.is_compiling() \
                and not 0 <= int(lengths.min()) <= int(lengths.max()) <= T:
            raise ValueError(f"lengths must lie in 0..T = {T}, got {lengths.tolist()}")

    def _on_kernels(self, t):
        return self.form == "cuda" and t.is_cuda

    def _chunk(self, device):
        # CPU: 64 to 128 measured best, the chunk's temporaries then fit the cache. GPU: mamba_ssm's default.
        return self.chunk_size or (64 if device.type == "cpu" else 256)

    def _mix(self, zxbcdt, state, lengths):
        """What lies between the projections: (B,T,z+x+B+C+dt) -> (B,T,d_inner); advances and records into the state."""
        conv_state, ssm_state = (None, None) if state is None else (state.conv_state, state.ssm_state)
        if state is not None and torch.is_grad_enabled():  # backward must not see what _store writes below
            conv_state, ssm_state = conv_state.clone(), ssm_state.clone()
        if self._on_kernels(zxbcdt):
            z, xBC, dt_raw = zxbcdt.split([self.d_inner, self.conv_dim, self.nheads], -1)
            y, last = self._cuda_scan(xBC, dt_raw, conv_state, ssm_state, lengths)
            y = self._cuda_norm(y, z)
        else:
            y, _, _, last = kernels.mixer(
                zxbcdt, self.conv1d.weight, self.conv1d.bias, self.dt_bias, self.A_log, self.D, self.norm.weight,
                conv_state, ssm_state, lengths, self.ngroups, self._chunk(zxbcdt.device), False,
                torch.is_grad_enabled())
        if state is not None:
            self._store(state, zxbcdt[..., self.d_inner:], last, lengths)
        return y

    def _advance(self, xBC_dt, state, lengths):
        """Writes tokens into the state from their in_proj outputs (B,T,x+B+C+dt) alone."""
        if self._on_kernels(xBC_dt):
            xBC, dt_raw = xBC_dt.split([self.conv_dim, self.nheads], -1)
            _, last = self._cuda_scan(xBC, dt_raw, state.conv_state, state.ssm_state, lengths)
        else:
            _, _, _, last = kernels.mixer(
                xBC_dt, self.conv1d.weight, self.conv1d.bias, self.dt_bias, self.A_log, self.D, self.norm.weight,
                state.conv_state, state.ssm_state, lengths, self.ngroups, self._chunk(xBC_dt.device), True, False)
        self._store(state, xBC_dt, last, lengths)

    def _cuda_scan(self, xBC, dt_raw, conv_state, ssm_state, lengths):
        b, T, _ = xBC.shape
        dt = F.softplus(dt_raw.float() + self.dt_bias.float())
        if lengths is not None:
            dt = dt * (torch.arange(T, device=dt.device) < lengths[:, None]).unsqueeze(-1)
        past = None if conv_state is None else conv_state.mT[:, 1:]
        act = kernels.cuda_conv(xBC, self.conv1d.weight.squeeze(1), self.conv1d.bias, past)
        y, last = kernels.cuda_scan(act, dt, -torch.exp(self.A_log.float()), self.D.float(), ssm_state, self.d_inner,
                                    self.ngroups, self._chunk(xBC.device))
        return y.reshape(b, T, self.d_inner), last

    def _cuda_norm(self, y, z):
        return kernels.cuda_norm(y, z, self.norm.weight, self.norm.group_size)[0]

    @torch.no_grad()
    def _store(self, state, xBC_dt, last, lengths):
        """Puts what follows these tokens into the state: the last d_conv inputs of each row's conv, and the scan's end."""
        K, T = self.d_conv, xBC_dt.size(1)
        xBC, dt_raw = xBC_dt.detach().split([self.conv_dim, self.nheads], -1)
        window = state._go_on()[0].mT                                           # (B,K,conv_dim)
        if lengths is not None:
            at = lengths[:, None] + torch.arange(K, device=xBC.device)          # row b ends at its own token
            tail = torch.cat([window, xBC], 1).gather(1, at.unsqueeze(-1).expand(-1, -1, self.conv_dim))
        else:
            tail = xBC[:, -K:] if T >= K else torch.cat([window[:, T:], xBC], 1)
        state.conv_state.mT.copy_(tail)
        state.ssm_state.copy_(last.detach())
        if state._record is not None:
            state._record.append((xBC.clone(), dt_raw.clone(), None if lengths is None else lengths.clone()))

    def _step(self, u, state, write_only):
        """forward for one token without gradients: (B,1,d_model) -> the same or None."""
        state._go_on_copying()
        conv, S, G, dtype = state.conv_state, state.ssm_state, self.ngroups, u.dtype
        W = self.in_proj.weight[self.d_inner if write_only else 0:]
        projected = F.linear(u[:, 0], W.to(dtype))
        xBC, dt_raw = projected[:, -self.conv_dim - self.nheads:-self.nheads], projected[:, -self.nheads:]
        dt = F.softplus(dt_raw.to(S.dtype) + self.dt_bias)
        if self._on_kernels(u):
            y = kernels.cuda_step(xBC, dt, self.A_log, self.D, self.conv1d.weight.squeeze(1), self.conv1d.bias, conv, S, G)
            norm = self._cuda_norm
        else:
            norm = self.norm
            conv.copy_(torch.cat([conv[..., 1:], xBC.unsqueeze(-1)], -1))
            act = F.silu((conv * self.conv1d.weight.squeeze(1)).sum(-1) + self.conv1d.bias)
            x, B, C = act.split([self.d_inner, G * self.d_state, G * self.d_state], -1)
            x = x.view(len(u), self.nheads, -1)                                 # (B,H,P)
            S.mul_(torch.exp(dt * -self.A_log.exp())[..., None, None])
            # the heads of a group in one: (B,G,RP,N) += (B,G,RP,1) * (B,G,1,N)
            heads, B, C = S.view(len(u), G, -1, self.d_state), B.view(len(u), G, 1, -1), C.view(len(u), G, 1, -1)
            heads.addcmul_((x * dt.unsqueeze(-1)).view(len(u), G, -1, 1), B.to(S.dtype))
            y = (C.to(S.dtype) @ heads.mT).view_as(x) + x * self.D.unsqueeze(-1)
        self._record_step(state, projected[:, None])
        if write_only:
            return None
        y = norm(y.view(len(u), self.d_inner), projected[:, :self.d_inner]).to(dtype)
        return F.linear(y, self.out_proj.weight.to(dtype)).unsqueeze(1)

    def _record_step(self, state, projected):
        if state._record is not None:
            xBC_dt = projected[..., -self.conv_dim - self.nheads:].clone()
            state._record.append((*xBC_dt.split([self.conv_dim, self.nheads], -1), None))

    def _compiled(self, u, conv) -> bool:
        """Whether the compiled operators take these activations and this conv_state."""
        fp32 = self.A_log.dtype == self.conv1d.weight.dtype == torch.float32  # FP32_PARAMS were not cast with the rest
        return fp32 and conv.stride(1) == 1 and cpu_decode.serves(u, self.in_proj.weight, self.out_proj.weight)

    @torch.no_grad()
    def rollback(self, state: MambaState, keep: int | torch.Tensor) -> None:
        """
        Takes the state back to `keep` tokens after its checkpoint, in place: an int, or per row an int64 (B,), each
        from 0 to the number of tokens recorded in that row (checked on a CPU only). The checkpoint moves there too.
        Raises ValueError without a checkpoint, or for keep outside its range.
        """
        if state._record is None:
            raise ValueError("rollback needs a checkpoint(): take one before the tokens that may be taken back")
        b, record = state.batch, state._record
        device = state.ssm_state.device
        keep = torch.full((b,), keep, device=device) if isinstance(keep, int) else keep.to(device)
        counts = [xBC.size(1) if n is None else n for xBC, _, n in record]
        total = sum(counts) + torch.zeros_like(keep)                            # (B,) tokens recorded in each row
        if keep.shape != (b,) or (device.type == "cpu" and bool(((keep < 0) | (keep > total)).any())):
            raise ValueError(f"keep must hold, for each of {b} rows, 0 to the number of tokens since the checkpoint "
                             f"({total.tolist()}), got {keep.tolist()}")
        if state._saved is not None and (device.type != "cpu" or bool((keep < total).any())):
            state._spare = state.conv_state, state.ssm_state
            (state.conv_state, state.ssm_state), state._saved, state._record = state._saved, None, None
            self._replay(state, record, keep)
        state.checkpoint(state._window)

    def _replay(self, state, record, keep) -> None:
        device = keep.device
        if device.type == "cpu" and not bool(keep.any()):
            return
        xBC_dt = torch.cat([torch.cat([xBC, dt], -1) for xBC, dt, _ in record], 1)       # (B,W,x+B+C+dt)
        if any(n is not None for _, _, n in record):
            # Ragged calls left gaps: bring each row's valid tokens to its front, in order.
            valid = torch.cat([torch.arange(xBC.size(1), device=device).expand(state.batch, -1)
                               < (xBC.size(1) if n is None else n[:, None]) for xBC, _, n in record], 1)
            order = valid.logical_not().long().argsort(dim=1, stable=True)
            xBC_dt = xBC_dt.gather(1, order.unsqueeze(-1).expand_as(xBC_dt))
        if self._compiled(xBC_dt[:1, :1], state.conv_state):
            cpu_decode.replay(self, xBC_dt, (state.conv_state, state.ssm_state), keep)
        else:
            self._advance(xBC_dt, state, keep)
