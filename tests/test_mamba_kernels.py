"""
Which form the Mamba-2 block runs, and its CUDA kernels: tested where there is a GPU; elsewhere their wrapping is, against
stand-ins that check what the real functions require of their arguments.
"""
import concurrent.futures
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from test_mamba_block import assert_same, make, recurrence, rel

from nanochat import mamba_kernels as kernels
from nanochat.mamba_block import Mamba2, choose_form

pytestmark = pytest.mark.usefixtures("same_start")


# --- the form ---------------------------------------------------------------------------------------------------------

def test_the_form_is_chosen_once_and_printed_once(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "why_no_cuda", lambda: ValueError("no kernels for this test"))
    choose_form.cache_clear()
    assert [make(backend="auto").form for _ in range(3)] == ["torch"] * 3
    assert capsys.readouterr().out == "Mamba-2 runs its PyTorch form: no kernels for this test\n"
    choose_form.cache_clear()


def test_kernels_asked_for_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    choose_form.cache_clear()
    with pytest.raises(ValueError, match=r"CUDA device.*pip install -e '.\[cuda\]' --no-build-isolation"):
        make(backend="cuda")
    choose_form.cache_clear()


def test_kernels_asked_for_without_their_packages(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)  # makes its import fail
    choose_form.cache_clear()
    with pytest.raises(ImportError, match=r"mamba_ssm.*pip install -e '.\[cuda\]' --no-build-isolation"):
        make(backend="cuda")
    choose_form.cache_clear()


# --- the CUDA kernels' wrapping, against stand-ins --------------------------------------------------------------------

def elsewhere(f):
    """Runs f in a fresh thread: inside a custom op autograd is switched off for this one."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(f).result()


def conv_stand_in(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):
    """causal_conv1d_fn: x (b,C,T), weight (C,K), initial_states (b,C,K-1)."""
    assert activation == "silu" and seq_idx is None and weight.dim() == 2 and x.size(1) == weight.size(0) == bias.size(0)
    assert x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0, "channel-last strides, multiples of 8"
    shape = (*x.shape[:2], weight.size(1) - 1)
    if initial_states is None:
        initial_states = x.new_zeros(shape[0], shape[2], shape[1]).mT
    assert initial_states.shape == shape and initial_states.stride(1) == 1 and initial_states.dtype == x.dtype
    full = torch.cat([initial_states, x], -1).to(weight.dtype)
    y = F.silu(F.conv1d(full, weight.unsqueeze(1), bias, groups=len(weight))).to(x.dtype)
    return torch.empty_like(x).copy_(y) if not x.requires_grad else y


def conv_backward_stand_in(x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, return_dinitial, silu):
    assert silu is True and return_dinitial is False and (seq_idx, dfinal_states, dx) == (None, None, None)
    assert dout.shape == x.shape and dout.stride(1) == 1 and dout.stride(0) % 8 == 0 and dout.stride(2) % 8 == 0

    def run():
        leaves = [v.detach().requires_grad_() for v in (x, weight, bias)]
        return torch.autograd.grad(conv_stand_in(*leaves, initial_states=initial_states, activation="silu"), leaves, dout)
    dx, dw, db = elsewhere(run)
    return torch.empty_like(x).copy_(dx), dw, db, None


def conv_update_stand_in(x, conv_state, weight, bias=None, activation=None):
    assert activation == "silu" and x.dim() == 2 and conv_state.shape == (*x.shape, weight.size(1))
    conv_state.copy_(torch.cat([conv_state[..., 1:], x.unsqueeze(-1)], -1))
    return F.silu((conv_state.float() * weight).sum(-1) + bias).to(x.dtype)


def scan_forward_stand_in(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, **rest):
    assert not rest and z is None and dt_bias is None and dt.dtype == A.dtype == torch.float32
    assert dt.shape == x.shape[:3] and A.shape == D.shape == x.shape[2:3] and x.stride(-1) == B.stride(-1) == 1
    y, last = recurrence(x.float(), dt, A, B.float(), C.float(), D, initial_states)
    return y.to(x.dtype), None, None, None, None, last


def scan_backward_stand_in(dout, x, dt, A, B, C, out, chunk_size, D=None, initial_states=None, dx=None, dB=None, dC=None,
                           **rest):
    assert not rest and dout.shape == out.shape == x.shape and dout.stride(-1) == 1
    assert dx.shape == x.shape and dB.shape == B.shape and dC.shape == C.shape

    def run():
        leaves = [v.detach().float().requires_grad_() for v in (x, dt, A, B, C, D)]
        return torch.autograd.grad(recurrence(*leaves, initial_states)[0], leaves, dout.float())
    grads = elsewhere(run)
    for into, value in zip((dx, dB, dC), (grads[0], grads[3], grads[4])):
        into.copy_(value)
    return dx, grads[1], grads[2], dB, dC, grads[5], None, None, None


def state_update_stand_in(state, x, dt, A, B, C, D=None):
    b, H, P, N = state.shape
    assert x.shape == dt.shape == (b, H, P) and A.shape == (H, P, N) and D.shape == (H, P) and B.shape == C.shape
    assert A.stride()[1:] == (0, 0) and dt.stride(-1) == 0, "one A and dt per head, as an expanded view"
    B, C = (v.repeat_interleave(H // v.size(1), 1).unsqueeze(2).float() for v in (B, C))
    state.copy_(state * torch.exp(dt.unsqueeze(-1) * A) + (dt * x).unsqueeze(-1) * B)
    return ((state * C).sum(-1) + D * x).to(x.dtype)


@pytest.fixture
def stand_ins(monkeypatch):
    """The packages' public layout with the stand-ins in it, and mixers that use the kernel form for CPU tensors."""
    modules = {"mamba_ssm": {}, "mamba_ssm.ops": {}, "mamba_ssm.ops.triton": {},
               "mamba_ssm.ops.triton.ssd_combined": {"_mamba_chunk_scan_combined_fwd": scan_forward_stand_in,
                                                     "_mamba_chunk_scan_combined_bwd": scan_backward_stand_in},
               "mamba_ssm.ops.triton.selective_state_update": {"selective_state_update": state_update_stand_in},
               "causal_conv1d": {"causal_conv1d_fn": conv_stand_in, "causal_conv1d_update": conv_update_stand_in},
               "causal_conv1d.cpp_functions": {"causal_conv1d_bwd_function": conv_backward_stand_in}}
    for name, members in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(kernels, "why_no_cuda", lambda: None)
    monkeypatch.setattr(Mamba2, "_on_kernels", lambda self, t: self.form == "cuda")
    choose_form.cache_clear()
    yield
    choose_form.cache_clear()


def test_kernel_wrapping_computes_the_same(stand_ins):
    m = make(ngroups=2)
    assert m.form == "cuda"
    plain = make(ngroups=2, backend="torch")
    plain.load_state_dict(m.state_dict())
    u = torch.randn(2, 21, 32, requires_grad=True)
    g = torch.randn_like(u)
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(plain(u), [u, *plain.parameters()], g)
    for f in (m, compiled):
        y = f(u)
        assert rel(y, plain(u)) < 1e-5
        for a, b in zip(torch.autograd.grad(y, [u, *m.parameters()], g), want, strict=True):
            assert rel(a, b) < 1e-4
    states = [m.new_state(2, "cpu", torch.float32) for _ in range(2)]
    lengths = torch.tensor([3, 0])
    with torch.no_grad():
        for s, f in zip(states, (m, plain)):
            s.checkpoint()
            f(u[:, :6], s)
            f(u[:, 6:7], s)
            f(u[:, 7:8], s, write_only=True)
            f.rollback(s, torch.tensor([8, 5]))
            f(u[:, 8:12], s, lengths=lengths)
        assert_same(*states)
        assert rel(m(u[:, 12:13], states[0]), plain(u[:, 12:13], states[1])) < 1e-5
        assert rel(compiled(u[:, 13:14], states[0]), plain(u[:, 13:14], states[1])) < 1e-5
        assert_same(*states)


def test_kernels_refuse_what_they_cannot_do(stand_ins):
    with pytest.raises(ValueError, match="divisible by 8, got 4 and 76"):
        make(ngroups=2, d_state=3, backend="cuda")
    assert make(ngroups=2, d_state=3, backend="auto").form == "torch"
    m = make(ngroups=2, backend="cuda")
    with pytest.raises(ValueError, match="u is on cpu"):
        m(torch.randn(1, 3, 32))


# --- on a GPU --------------------------------------------------------------------------------------------------------

def gpu_pair(dtype):
    """The same mixer in the kernel form and in the PyTorch form on the GPU, or a skip that says why."""
    error = kernels.why_no_cuda()
    if error:
        pytest.skip(str(error))
    pair = []
    for backend in ("cuda", "torch"):
        torch.manual_seed(0)
        m = Mamba2(256, d_state=64, expand=3, headdim=64, ngroups=4, backend=backend)
        m.init_weights()
        pair.append(m.cuda())
    return pair, torch.randn(2, 700, 256, device="cuda").to(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype,tol", [(torch.float32, 2e-3), (torch.bfloat16, 3e-2)])
def test_gpu_kernels_equal_the_pytorch_form(dtype, tol):
    """Tolerances: Triton's dot products run fp32 in TF32, and bf16 rounds between the kernels."""
    (fast, plain), u = gpu_pair(dtype)
    g = torch.randn_like(u)
    for f in (fast, torch.compile(fast, fullgraph=True)):
        u = u.detach().requires_grad_()
        y, want = f(u), plain(u)
        assert rel(y, want) < tol
        got = torch.autograd.grad(y, [u, *fast.parameters()], g)
        for a, b in zip(got, torch.autograd.grad(want, [u, *plain.parameters()], g), strict=True):
            assert rel(a, b) < 2 * tol


@pytest.mark.gpu
@torch.no_grad()
def test_gpu_decode_and_rollback():
    (fast, plain), u = gpu_pair(torch.float32)
    states = [m.new_state(2, "cuda", torch.float32) for m in (fast, plain)]
    for m, s in zip((fast, plain), states):
        m(u[:, :300], s)
        s.checkpoint()
        for t in range(300, 308):
            m(u[:, t:t + 1], s)
        m.rollback(s, torch.tensor([8, 3]))
        m(u[:, 308:320], s, lengths=torch.tensor([12, 5], device="cuda"))
    assert rel(states[0].ssm_state, states[1].ssm_state) < 2e-3
    assert rel(fast(u[:, 320:321], states[0]), plain(u[:, 320:321], states[1])) < 2e-3
