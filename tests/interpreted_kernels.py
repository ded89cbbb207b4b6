"""
mamba-ssm's Triton kernels and our own in Triton's interpreter, on CPU tensors: against fp64 and against the PyTorch form.

Triton decides at its import whether kernels are interpreted, so this file runs in a process of its own, which
test_interpreted_kernels.py starts:

    python -m pytest tests/interpreted_kernels.py [--all]
    python tests/interpreted_kernels.py            prints the errors of each kernel and dtype

The interpreter covers the kernels' arithmetic, indexing and masks, and the launchers around them. It does not cover what the
compiler makes of them, TF32, races between threads, or the choice of a tuning configuration: the first one runs.
"""
import contextlib
import functools
import os
import sys
import types
from pathlib import Path

assert "triton" not in sys.modules, "triton was imported before TRITON_INTERPRET was set"
os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from test_mamba_block import naive_mixer, recurrence
from torch.utils.checkpoint import checkpoint
from triton.runtime import interpreter
from triton.runtime.autotuner import Autotuner

from nanochat import cpu_decode
from nanochat import mamba_kernels as kernels
from nanochat.mamba_block import GatedRMSNorm, Mamba2, choose_form, ssd

torch.set_num_threads(1)
OPS = torch.ops.adamba
# Relative error (of the 2-norm) against fp64 that a kernel may make: sums in fp32 of a few hundred terms that partly cancel
# (dD of two heads has 2e-6, most others a tenth of it); one bf16 rounding
# of inputs to matrix products and of the result is 2^-9 = 2e-3.
BOUND = {torch.float32: 4e-6, torch.bfloat16: 8e-3}


# --- a machine without a GPU ------------------------------------------------------------------------------------------

def _widen(handle):
    """The interpreter holds bf16 numbers as uint16: the same numbers as fp32."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _patch_bf16():
    """Triton 3.7's interpreter multiplies the uint16 of bf16 as integers in tl.dot, and truncates where a GPU rounds."""
    dot, cast = interpreter.InterpreterBuilder.create_dot, interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self, src, to):
        if src.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            data = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.uint16).numpy()
            return interpreter.TensorHandle(data.reshape(src.data.shape), tl.bfloat16)
        return _widen(src) if to.scalar == tl.float32 else cast(self, src, to)
    interpreter.InterpreterBuilder.cast_impl = cast_impl
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, _widen(a), _widen(b), *rest)


def _first_configuration():
    """An autotuner times its configurations, which means nothing here: it runs the first one."""
    run = Autotuner.run

    def first(self, *args, **kwargs):
        self.configs = self.configs[:1]
        return run(self, *args, **kwargs)
    Autotuner.run = first


_patch_bf16()
_first_configuration()
torch.cuda.device = lambda *_: contextlib.nullcontext()
torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=4)  # sizes of grids
kernels.why_no_cuda = lambda: None
Mamba2._on_kernels = lambda self, t: self.form == "cuda"
cpu_decode.serves = lambda *_: False  # the compiled CPU step is not what runs on a GPU
choose_form.cache_clear()


# --- each kernel's error ----------------------------------------------------------------------------------------------

def rel(got, want):
    got, want = got.detach().double(), want.detach().double()
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


def errors(got, plain, want):
    """For each named tensor of `want` (fp64): (error of the kernel, error of the PyTorch form in the same dtype)."""
    assert got.keys() == plain.keys() == want.keys()
    return {name: (rel(got[name], want[name]), rel(plain[name], want[name])) for name in want}


def run(function, inputs, differentiable, g):
    """{y, other outputs, and d<name> for each differentiable input} of function(**inputs) -> (y, {name: tensor})."""
    leaves = {n: inputs[n].detach().requires_grad_() for n in differentiable}
    y, others = function(**{**inputs, **leaves})
    grads = torch.autograd.grad(y, list(leaves.values()), g.to(y.dtype))
    return {"y": y, **others, **{f"d{n}": v for n, v in zip(leaves, grads)}}


def compare(kernel, plain, inputs, differentiable, g):
    exact = {n: v if v is None else v.double() for n, v in inputs.items()}
    return errors(run(kernel, inputs, differentiable, g), run(plain, inputs, differentiable, g),
                  run(plain, exact, differentiable, g.double()))


def scan_errors(b, T, H, P, G, N, chunk, dtype, initial):
    """The state space scan; its fp64 reference is the recurrence, token by token, with autograd's gradients."""
    inputs = {"x": torch.randn(b, T, H, P), "dt": F.softplus(torch.randn(b, T, H) - 2), "A": -torch.rand(H) * 4 - 0.5,
              "B": torch.randn(b, T, G, N), "C": torch.randn(b, T, G, N), "D": torch.randn(H),
              "S": torch.randn(b, H, P, N) if initial else None}
    inputs |= {n: inputs[n].to(dtype) for n in ("x", "B", "C")}

    def kernel(x, dt, A, B, C, D, S):
        act = torch.cat([v.flatten(2) for v in (x, B, C)], -1)
        y, last = OPS.cuda_scan(act, dt, A, D, S, H * P, G, chunk)
        return y, {"final": last}

    def plain(x, dt, A, B, C, D, S):
        y, last = recurrence(x, dt, A, B, C, D, S) if x.dtype == torch.float64 else ssd(x, dt, A, B, C, D, chunk, S)
        return y, {"final": last}
    return compare(kernel, plain, inputs, ["x", "dt", "A", "B", "C", "D"], torch.randn(b, T, H, P, dtype=dtype))


def conv_reference(x, weight, bias, past):
    """silu(causal conv) by torch's own convolution."""
    past = x.new_zeros(x.size(0), weight.size(1) - 1, x.size(2)) if past is None else past
    full = torch.cat([past, x], 1).to(weight.dtype)
    return F.silu(F.conv1d(full.mT, weight.unsqueeze(1), bias, groups=len(weight))).mT.to(x.dtype)


def conv_errors(b, T, C, K, dtype, past):
    """Our convolution; x is a slice of wider rows that start at any address, past a transposed view, as in the mixer."""
    wide, window = torch.randn(b, T, C + 13, dtype=dtype), torch.randn(b, C, K, dtype=dtype)
    inputs = {"x": wide[..., 5:5 + C], "weight": torch.randn(C, K), "bias": torch.randn(C),
              "past": window[..., 1:].mT if past else None}
    return compare(lambda **kw: (OPS.cuda_conv(*kw.values()), {}), lambda **kw: (conv_reference(**kw), {}), inputs,
                   ["x", "weight", "bias"], torch.randn(b, T, C, dtype=dtype))


def norm_errors(rows, d, group, dtype):
    """mamba-ssm's gated norm against GatedRMSNorm; z is a slice of wider rows."""
    inputs = {"y": torch.randn(*rows, d, dtype=dtype), "z": torch.randn(*rows, d + 9, dtype=dtype)[..., :d],
              "weight": torch.randn(d)}

    def plain(y, z, weight):
        if y.dtype == torch.float64:  # from its definition: the module computes in fp32
            v = (y * F.silu(z)).unflatten(-1, (-1, group))
            return (v / (v.square().mean(-1, keepdim=True) + kernels.NORM_EPS).sqrt()).flatten(-2) * weight, {}
        norm = GatedRMSNorm(d, group)
        del norm.weight
        norm.weight = weight
        return norm(y, z), {}
    return compare(lambda y, z, weight: (OPS.cuda_norm(y, z, weight, group)[0], {}), plain, inputs, ["y", "z", "weight"],
                   torch.randn(*rows, d, dtype=dtype))


def step_errors(b, H, P, G, N, dtype):
    """One token through the conv window and the state; the reference is the recurrence of one token."""
    C = H * P + 2 * G * N
    xBC, dt = torch.randn(b, C + H, dtype=dtype)[:, :C], F.softplus(torch.randn(b, H) - 2)
    A_log, D, weight, bias = torch.randn(H), torch.randn(H), torch.randn(C, 4), torch.randn(C)
    conv, S = torch.randn(b, 4, C, dtype=dtype).mT, torch.randn(b, H, P, N)

    def reference(acc):
        window = torch.cat([conv[..., 1:], xBC.unsqueeze(-1)], -1)
        act = F.silu((window.to(acc) * weight.to(acc)).sum(-1) + bias.to(acc))
        x, B, C_ = (v.unflatten(-1, shape).unsqueeze(1) for v, shape in zip(
            act.split([H * P, G * N, G * N], -1), ((H, P), (G, N), (G, N))))
        y, last = recurrence(x, dt.to(acc).unsqueeze(1), -A_log.to(acc).exp(), B, C_, D.to(acc), S.to(acc))
        return {"y": y.squeeze(1), "conv window": window, "state": last}
    want, plain = reference(torch.float64), reference(torch.float32)
    conv_state, state = conv.clone(), S.clone()
    y = OPS.cuda_step(xBC, dt, A_log, D, weight, bias, conv_state, state, G)
    return errors({"y": y, "conv window": conv_state, "state": state}, plain, want)


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)


def params(*cases):
    """[(id, slow, arguments), ...] as pytest parameters."""
    return [pytest.param(*args, id=name, marks=pytest.mark.slow if slow else ()) for name, slow, args in cases]


BOTH = pytest.mark.parametrize("dtype", [pytest.param(torch.float32, id="fp32"),
                                         pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.slow)])
# b, T, H, P, G, N, chunk, initial: T below, at and above a chunk, one token, and the groups of stages 1, 2 and 3
SCANS = params(("from a state", False, (1, 18, 2, 16, 2, 16, 16, True)),
               ("below", True, (2, 9, 4, 16, 2, 16, 16, True)), ("above", True, (1, 37, 2, 16, 1, 16, 16, False)),
               ("one token", True, (2, 1, 4, 16, 2, 16, 16, True)), ("at", True, (2, 16, 4, 16, 2, 16, 16, False)),
               ("two chunks", True, (1, 32, 4, 16, 1, 16, 16, True)),
               ("8 groups", True, (1, 21, 8, 16, 8, 16, 16, True)), ("10 groups", True, (1, 18, 10, 16, 10, 16, 16, False)),
               ("16 groups", True, (1, 18, 16, 16, 16, 16, 16, True)),
               ("odd sizes", True, (1, 21, 6, 24, 2, 20, 16, True)),
               ("d32's sizes", True, (1, 300, 2, 64, 2, 128, 256, True)),
               ("d32's, a part of a chunk", True, (1, 40, 2, 64, 1, 128, 256, False)))
# b, T, C, K, past
CONVS = params(("past", False, (2, 21, 70, 4, True)), ("no past", False, (1, 5, 36, 4, False)),
               ("one token", True, (1, 1, 68, 4, True)), ("two spans", True, (1, 300, 64, 4, True)),
               ("K 2", True, (2, 7, 20, 2, True)), ("K 3", True, (1, 35, 20, 3, False)), ("K 5", True, (1, 35, 20, 5, True)))
# rows, d, group
NORMS = params(("2 groups", False, ((2, 5), 96, 48)), ("1 group", True, ((1, 3), 64, 64)),
               ("decoding", True, ((2,), 96, 48)), ("stage 1", True, ((1, 2), 6144, 768)),
               ("16 groups", True, ((40,), 256, 16)))
# b, H, P, G, N
STEPS = params(("2 groups", False, (2, 4, 16, 2, 16)), ("d32's", True, (1, 8, 64, 8, 128)),
               ("10 groups", True, (2, 20, 16, 10, 16)), ("16 groups", True, (1, 16, 16, 16, 16)),
               ("odd sizes", True, (3, 3, 24, 1, 20)))


def check(found, dtype):
    """Where the PyTorch form itself is near the bound (sums over a chunk of 256), half again its error is allowed."""
    wrong = {name: e for name, e in found.items() if not e[0] <= max(BOUND[dtype], 1.5 * e[1])}
    assert not wrong, f"relative errors of (the kernel, the PyTorch form) against fp64, {BOUND[dtype]} allowed: {wrong}"


@BOTH
@pytest.mark.parametrize("b,T,H,P,G,N,chunk,initial", SCANS)
def test_scan(b, T, H, P, G, N, chunk, initial, dtype):
    check(scan_errors(b, T, H, P, G, N, chunk, dtype, initial), dtype)


@BOTH
@pytest.mark.parametrize("b,T,C,K,past", CONVS)
def test_conv(b, T, C, K, past, dtype):
    check(conv_errors(b, T, C, K, dtype, past), dtype)


@BOTH
@pytest.mark.parametrize("rows,d,group", NORMS)
def test_norm(rows, d, group, dtype):
    check(norm_errors(rows, d, group, dtype), dtype)


@BOTH
@pytest.mark.parametrize("b,H,P,G,N", STEPS)
def test_step(b, H, P, G, N, dtype):
    check(step_errors(b, H, P, G, N, dtype), dtype)


# --- the whole mixer in its kernel form -------------------------------------------------------------------------------

def pair(**sizes):
    """The same mixer in the kernel form and in the PyTorch form."""
    out = []
    for backend in ("auto", "torch"):
        torch.manual_seed(0)
        small = {"d_state": 16, "headdim": 16, "chunk_size": 16, "ngroups": 2, "expand": 3}
        m = Mamba2(32, **{**small, **sizes}, backend=backend)
        m.init_weights()
        for p in (m.D, m.norm.weight):
            torch.nn.init.normal_(p, 1, 0.3)
        out.append(m)
    assert [m.form for m in out] == ["cuda", "torch"]
    return out


def training_gradients(function, mixer, u, g):
    y = function(u)
    return [y, *torch.autograd.grad(y, [u, *mixer.parameters()], g)]


@pytest.mark.parametrize("how", params(("eager", True, ("eager",)), ("checkpointed", True, ("checkpointed",)),
                                       ("compiled", True, ("compiled",)), ("checkpointed and compiled", True, ("both",))))
def test_training(how):
    """Outputs and every gradient are the PyTorch form's, and nearer than 1e-5 to the definition in fp64."""
    fast, plain = pair()
    u, g = torch.randn(2, 21, 32, requires_grad=True), torch.randn(2, 21, 32)
    call = torch.compile(fast, fullgraph=True, backend="aot_eager") if how in ("compiled", "both") else fast
    if how in ("checkpointed", "both"):
        inner, call = call, lambda u: checkpoint(inner, u, use_reentrant=False)
    got = training_gradients(call, fast, u, g)
    assert rel(got[0], naive_mixer(plain, u.detach().double())) < 1e-5
    for a, b in zip(got, training_gradients(plain, plain, u, g), strict=True):
        assert rel(a, b) < 1e-5


@pytest.mark.slow
def test_training_in_bf16():
    """Against the definition in fp64, from the same rounded inputs, no gradient is twice as far as the PyTorch form's."""
    fast, plain = pair()
    u, g = (torch.randn(2, 21, 32, dtype=torch.bfloat16) for _ in range(2))
    exact = training_gradients(lambda u: naive_mixer(plain, u), plain, u.double().requires_grad_(), g.double())
    got, theirs = (training_gradients(m, m, u.clone().requires_grad_(), g) for m in (fast, plain))
    for a, b, c in zip(got, theirs, exact, strict=True):
        assert rel(a, c) < max(BOUND[torch.bfloat16], 2 * rel(b, c))


def assert_same(states, tol):
    assert rel(states[0].ssm_state, states[1].ssm_state) < tol and rel(states[0].conv_state, states[1].conv_state) < tol


# 12 heads: rows of in_proj's output at odd distances, as in models whose number of SSM heads is no multiple of 8
@pytest.mark.parametrize("rows,sizes,dtype", params(
    ("two rows", True, (2, {}, torch.float32)), ("one row", True, (1, {"expand": 6}, torch.float32)),
    ("bf16", True, (2, {"ngroups": 1}, torch.bfloat16))))
@torch.no_grad()
def test_every_kind_of_call_advances_the_same_state(rows, sizes, dtype):
    """Prefill, decode, ragged and write-only calls, rollback to a count per row; each against the PyTorch form's state."""
    both, tol = pair(**sizes), 1e-5 if dtype == torch.float32 else 0.02
    u = torch.randn(rows, 40, 32).to(dtype)
    states = [m.new_state(rows, "cpu", dtype) for m in both]
    ragged, kept = torch.tensor([4, 0][:rows]), torch.tensor([3, 1][:rows])

    def each(*args, **kwargs):
        outs = [m(*args, s, **kwargs) for m, s in zip(both, states)]
        assert_same(states, tol)
        return outs
    assert rel(*each(u[:, :18])) < tol
    assert rel(*each(u[:, 18:19])) < tol
    valid = (torch.arange(4) < ragged[:, None]).unsqueeze(-1)
    assert rel(*(y * valid for y in each(u[:, 19:23], lengths=ragged))) < tol
    assert each(u[:, 23:27], write_only=True) == each(u[:, 27:28], write_only=True) == [None, None]
    for s in states:
        s.checkpoint()
    for t in range(28, 32):
        each(u[:, t:t + 1])
    for m, s in zip(both, states):
        m.rollback(s, kept)
    assert_same(states, tol)
    each(u[:, 32:36], lengths=ragged)
    assert rel(*each(u[:, 36:37])) < tol


@torch.no_grad()
@pytest.mark.slow
def test_rollback_of_one_token_of_a_single_row():
    """A replay of a single token, whose strides causal-conv1d refused."""
    both = pair(expand=6)
    u, states = torch.randn(1, 12, 32), []
    for m in both:
        states.append(m.new_state(1, "cpu", torch.float32))
        m(u[:, :11], states[-1])
        states[-1].checkpoint()
        m(u[:, 11:], states[-1])
        m._replay(states[-1], states[-1]._record, torch.tensor([1]))
    assert_same(states, 1e-5)


@pytest.mark.slow
def test_training_on_from_a_state():
    both, u = pair(), torch.randn(1, 30, 32)
    results, states = [], []
    for m in both:
        state = m.new_state(1, "cpu", torch.float32)
        with torch.no_grad():
            m(u[:, :18], state)
        results.append(training_gradients(functools.partial(m, state=state), m, u[:, 18:].clone().requires_grad_(),
                                          torch.ones(1, 12, 32)))
        states.append(state)
    for a, b in zip(*results, strict=True):
        assert rel(a, b) < 1e-5
    assert_same(states, 1e-5)


# --- what torch.compile and autograd are promised ---------------------------------------------------------------------

def operator_calls(b=2, T=5, H=2, P=16, G=2, N=16, dtype=torch.bfloat16):
    """name -> (operator, arguments) as the mixer makes them: slices of in_proj's output, views of a state."""
    d, C = H * P, H * P + 2 * G * N
    rows = torch.randn(b, T, d + C + H, dtype=dtype)
    z, xBC = rows[..., :d], rows[..., d:d + C]
    weight, bias, past = torch.randn(C, 4), torch.randn(C), torch.randn(b, 4, C, dtype=dtype)[:, 1:]
    act, dt = torch.randn(b, T, C, dtype=dtype), torch.rand(b, T, H)
    A, D, S, y = -torch.rand(H) - 0.5, torch.randn(H), torch.randn(b, H, P, N), torch.randn(b, T, H, P, dtype=dtype)
    flat, norm_w = y.view(b, T, d), torch.randn(d)

    def leaf(t):
        return t.detach().requires_grad_()
    return {
        "conv": (OPS.cuda_conv, (leaf(xBC), leaf(weight), leaf(bias), None)),
        "conv after past": (OPS.cuda_conv, (leaf(xBC), leaf(weight), leaf(bias), past)),
        "conv backward": (OPS.cuda_conv_backward, (torch.randn(b, T, C, dtype=dtype), xBC, weight, bias, past)),
        "scan": (OPS.cuda_scan, (leaf(act), leaf(dt), leaf(A), leaf(D), None, d, G, 16)),
        "scan from a state": (OPS.cuda_scan, (leaf(act), leaf(dt), leaf(A), leaf(D), S, d, G, 16)),
        "scan backward": (OPS.cuda_scan_backward, (torch.randn_like(y), y, act, dt, A, D, None, d, G, 16)),
        "norm": (OPS.cuda_norm, (leaf(flat), leaf(z), leaf(norm_w), d // G)),
        "norm backward": (OPS.cuda_norm_backward, (torch.randn_like(flat), flat, z, norm_w, torch.rand(b * T * G), d // G)),
        "step": (OPS.cuda_step, (xBC[:, 0], dt[:, 0], A, D, weight, bias, torch.randn(b, 4, C, dtype=dtype).mT, S, G))}


@pytest.mark.parametrize("rows,tokens", params(("two rows", True, (2, 5)), ("one token of one row", True, (1, 1))))
@pytest.mark.parametrize("name", operator_calls())
def test_operator_is_well_formed(name, rows, tokens):
    """torch's own checker: the schema's promises of mutation, fake shapes and dtypes, autograd, and tracing."""
    torch.library.opcheck(*operator_calls(rows, tokens)[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conv backward", "scan backward", "norm backward", "norm"])
def test_results_have_the_promised_strides(name):
    """Compiled code reads results by the strides that the fake operator gave."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    op, args = operator_calls()[name]
    with torch.no_grad(), FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
    with torch.no_grad():
        real = op(*args)
    assert [(r.shape, r.stride(), r.storage_offset(), r.dtype) for r in real] == [
        (f.shape, f.stride(), f.storage_offset(), f.dtype) for f in fake]


def print_table():
    print(f"{'kernel':28s} {'dtype':9s} {'worst':12s} {'kernel':>9s} {'PyTorch form':>13s}   (relative errors against fp64)")
    for name, function, cases, at in (("scan", scan_errors, SCANS, 7), ("conv", conv_errors, CONVS, 4),
                                      ("gated norm", norm_errors, NORMS, 3), ("step", step_errors, STEPS, 5)):
        for case in cases:
            for dtype in BOUND:
                torch.manual_seed(0)
                found = function(*case.values[:at], dtype, *case.values[at:])
                worst = max(found, key=lambda n: found[n][0])
                print(f"{name + ', ' + case.id:28s} {str(dtype)[6:]:9s} {worst:12s} {found[worst][0]:9.1e} "
                      f"{found[worst][1]:13.1e}", flush=True)


if __name__ == "__main__":
    print_table()
