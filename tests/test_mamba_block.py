"""
The Mamba-2 block against independent oracles: the recurrence token by token in fp64, the transformers library, and
itself in another order of calls. Its CUDA kernels have test_mamba_kernels.py.
"""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat import cpu_decode
from nanochat import mamba_kernels as kernels
from nanochat.mamba_block import FP32_PARAMS, Mamba2, MambaState, ssd
from nanochat.native import library

CHUNK = 16
pytestmark = pytest.mark.usefixtures("same_start")


def make(d_model=32, dtype=torch.float32, randomise=True, **kw):
    m = Mamba2(d_model, **{"d_state": 8, "headdim": 8, "chunk_size": CHUNK, **kw})
    m.init_weights()
    if randomise:  # what initialisation makes uniform must not hide a mistake
        for p in (m.D, m.norm.weight):
            nn.init.normal_(p, 1, 0.3)
    return m.to(dtype)


def rel(got, want):
    """max |difference| as a share of the largest wanted value."""
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-30)).item()


def recurrence(x, dt, A, B, C, D, S=None):
    """y_t = C_t S_t + D x_t, S_t = exp(dt_t A) S_(t-1) + dt_t x_t B_t, one token after another."""
    b, T, H, P = x.shape
    S = x.new_zeros(b, H, P, B.size(-1)) if S is None else S
    B, C = (v.repeat_interleave(H // B.size(2), dim=2) for v in (B, C))
    ys = []
    for t in range(T):
        S = S * torch.exp(dt[:, t] * A)[..., None, None] + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        ys.append(torch.einsum("bhpn,bhn->bhp", S, C[:, t]) + D[:, None] * x[:, t])
    return torch.stack(ys, 1), S


def naive_mixer(m, u):
    """The whole mixer from its definition, in u's dtype: no chunks, torch's conv1d, the recurrence above."""
    p = {k: v.to(u.dtype) for k, v in m.named_parameters()}
    b, T, _ = u.shape
    z, xBC, dt = (u @ p["in_proj.weight"].T).split([m.d_inner, m.conv_dim, m.nheads], -1)
    xBC = F.conv1d(xBC.mT, p["conv1d.weight"], p["conv1d.bias"], padding=m.d_conv - 1, groups=m.conv_dim)[..., :T].mT
    x, B, C = F.silu(xBC).split([m.d_inner, m.ngroups * m.d_state, m.ngroups * m.d_state], -1)
    y, _ = recurrence(x.reshape(b, T, m.nheads, m.headdim), F.softplus(dt + p["dt_bias"]), -torch.exp(p["A_log"]),
                      B.reshape(b, T, m.ngroups, -1), C.reshape(b, T, m.ngroups, -1), p["D"])
    y = (y.reshape(b, T, -1) * F.silu(z)).reshape(b, T, m.ngroups, -1)
    y = y / torch.sqrt(y.square().mean(-1, keepdim=True) + 1e-5)
    return (y.reshape(b, T, -1) * p["norm.weight"]) @ p["out_proj.weight"].T


def scan_inputs(b, T, H, P, G, N, dtype=torch.float64):
    x, B, C = (torch.randn(b, T, *s, dtype=torch.float64) for s in ((H, P), (G, N), (G, N)))
    dt = F.softplus(torch.randn(b, T, H, dtype=torch.float64))
    A, D = -torch.rand(H, dtype=torch.float64) * 4, torch.randn(H, dtype=torch.float64)
    S = torch.randn(b, H, P, N, dtype=torch.float64)
    return [v.to(dtype) for v in (x, dt, A, B, C, D)], S.to(dtype)


# --- the function ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("G", [1, 8])
@pytest.mark.parametrize("T", [1, 2, 3, 5, CHUNK - 1, CHUNK, CHUNK + 1, 4 * CHUNK + 7])
def test_chunked_scan_is_the_recurrence(T, G, initial):
    args, S = scan_inputs(2, T, 8, 4, G, 6, torch.float32)
    S = S if initial else None
    y, last = ssd(*args, CHUNK, S)
    want, want_last = recurrence(*(a.double() for a in args), S if S is None else S.double())
    assert last.dtype == torch.float32
    assert rel(y, want) <= 1e-5 and rel(last, want_last) <= 1e-5


def test_strong_decay_stays_finite():
    """exp of the summed decays over- and underflows fp32 over one chunk; the result must not."""
    args, _ = scan_inputs(1, 3 * CHUNK, 2, 4, 1, 6, torch.float32)
    args[1] = args[1] * 40
    x = args[0].requires_grad_()
    y, last = ssd(*args, CHUNK)
    (dx,) = torch.autograd.grad(y.sum() + last.sum(), x)
    want, _ = recurrence(*(a.detach().double() for a in args))
    assert rel(y, want) <= 1e-5 and dx.isfinite().all()


@pytest.mark.parametrize("G", [1, 2])
def test_scan_gradcheck(G):
    args, S = scan_inputs(1, 5, 4, 2, G, 2)
    args = [a.requires_grad_() for a in (*args, S)]
    assert torch.autograd.gradcheck(lambda *a: ssd(*a[:6], 2, a[6]), args)


@pytest.mark.parametrize("chunk", [2, 16])
def test_mixer_gradcheck(chunk):
    """Through the fused conv, scan and gated norm, to the in_proj output and every parameter, ragged chunks included."""
    m = make(2, torch.float64, d_state=2, headdim=1, ngroups=2, chunk_size=chunk)
    params = [m.conv1d.weight, m.conv1d.bias, m.dt_bias, m.A_log, m.D, m.norm.weight]
    zxbcdt = torch.randn(1, 5, m.in_proj.out_features, dtype=torch.float64, requires_grad=True)
    state = m.new_state(1, "cpu", torch.float64)
    state.conv_state.normal_()
    state.ssm_state.normal_()
    assert torch.autograd.gradcheck(lambda *a: kernels.mixer(
        *a, state.conv_state, state.ssm_state, torch.tensor([4]), 2, chunk, False, True)[0][:, :4], [zxbcdt, *params])


@pytest.mark.parametrize("T", [1, 2, 3, 5, CHUNK - 1, CHUNK, CHUNK + 1, 4 * CHUNK + 7])
def test_mixer_is_its_definition(T):
    m = make(ngroups=2)
    u = torch.randn(2, T, 32)
    assert rel(m(u), naive_mixer(m, u.double())) <= 1e-5


def test_gradients_are_those_of_the_definition():
    m = make(ngroups=2, dtype=torch.float64)
    u = torch.randn(2, 2 * CHUNK + 3, 32, dtype=torch.float64, requires_grad=True)
    inputs, g = [u, *m.parameters()], torch.randn_like(u)
    got, want = torch.autograd.grad(m(u), inputs, g), torch.autograd.grad(naive_mixer(m, u), inputs, g)
    for a, b in zip(got, want, strict=True):
        assert rel(a, b) < 1e-12


@pytest.mark.parametrize("G", [1, 4])
def test_equals_transformers(G):
    """The same weights in the transformers library's mixer: outputs and gradients, its state dict loads strictly."""
    hf = pytest.importorskip("transformers.models.mamba2.modeling_mamba2", reason="needs transformers (pip extra: dev)")
    m = make(ngroups=G)
    config = hf.Mamba2Config(hidden_size=32, expand=2, head_dim=8, num_heads=8, n_groups=G, state_size=8, conv_kernel=4,
                             chunk_size=CHUNK, num_hidden_layers=1, layer_norm_epsilon=1e-5)
    oracle = hf.Mamba2Mixer(config, 0)
    oracle.load_state_dict(m.state_dict(), strict=True)
    u = torch.randn(2, 3 * CHUNK + 5, 32)
    g = torch.randn_like(u)
    y, want = m(u), oracle(u)
    assert rel(y, want) <= 1e-5
    y.backward(g)
    want.backward(g)
    grads = dict(oracle.named_parameters())
    for name, p in m.named_parameters():
        assert rel(p.grad, grads[name].grad) <= 1e-4, name
    assert {k: v.shape for k, v in m.state_dict().items()} == {k: v.shape for k, v in oracle.state_dict().items()}


def test_state_dict_is_mamba_ssms():
    """Names, order and shapes of mamba_ssm.Mamba2(2048)'s state dict, written down from its source; made on meta."""
    with torch.device("meta"):
        m = Mamba2(2048)
    assert [(k, tuple(v.shape), v.dtype) for k, v in m.state_dict().items()] == [
        ("dt_bias", (64,), torch.float32), ("A_log", (64,), torch.float32), ("D", (64,), torch.float32),
        ("in_proj.weight", (8512, 2048), torch.float32), ("conv1d.weight", (4352, 1, 4), torch.float32),
        ("conv1d.bias", (4352,), torch.float32), ("norm.weight", (4096,), torch.float32),
        ("out_proj.weight", (2048, 4096), torch.float32)]
    assert set(FP32_PARAMS) <= set(m.state_dict())


def test_init_is_mamba_ssms():
    """The same draws as torch's own layers and mamba_ssm's formulas make in its order, from the same seed."""
    m = Mamba2(16, d_state=4, headdim=4, ngroups=2)
    before = torch.random.get_rng_state()
    m.init_weights()
    torch.random.set_rng_state(before)
    want = {"in_proj.weight": nn.Linear(16, 32 + 48 + 8, bias=False).weight}
    conv = nn.Conv1d(48, 48, 4, groups=48)
    want |= {"conv1d.weight": conv.weight, "conv1d.bias": conv.bias}
    dt = (0.001 * 100 ** torch.rand(8)).clamp(min=1e-4)
    assert torch.allclose(F.softplus(m.dt_bias), dt, rtol=1e-4)
    assert torch.allclose(m.A_log.exp(), torch.empty(8).uniform_(1, 16))
    want |= {"out_proj.weight": nn.Linear(32, 16, bias=False).weight, "D": torch.ones(8), "norm.weight": torch.ones(32)}
    for name, value in want.items():
        assert torch.equal(m.state_dict()[name], value), name
    assert {n for n, p in m.named_parameters() if getattr(p, "_no_weight_decay", False)} == {"dt_bias", "A_log", "D"}


def test_meta_then_empty_keeps_the_marks():
    with torch.device("meta"):
        m = Mamba2(16, d_state=4, headdim=4)
    m.to_empty(device="cpu").init_weights()
    assert all(p._no_weight_decay for p in (m.dt_bias, m.A_log, m.D))
    assert m(torch.randn(1, 3, 16)).isfinite().all()


# --- dtypes and compile ----------------------------------------------------------------------------------------------

def bf16(m):
    """A copy as decoding has it: big matrices in bf16, FP32_PARAMS not."""
    half = Mamba2(m.d_model, m.d_state, headdim=m.headdim, ngroups=m.ngroups, chunk_size=m.chunk_size)
    half.load_state_dict(m.state_dict())
    for name, p in half.named_parameters():
        p.data = p.data if name in FP32_PARAMS else p.data.bfloat16()
    return half


@pytest.mark.parametrize("how", ["bf16 input", "bf16 weights", "bf16 everywhere", "autocast"])
def test_bf16(how):
    m = make(ngroups=2)
    u = torch.randn(2, 3 * CHUNK + 1, 32)
    want = naive_mixer(m, u.double())
    g = torch.randn_like(u)
    m(u).backward(g)
    reference = {n: p.grad for n, p in m.named_parameters()}
    m.zero_grad()
    half = bf16(m) if how == "bf16 weights" else m.bfloat16() if how == "bf16 everywhere" else m
    state = half.new_state(2, "cpu", torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        v = u if how == "autocast" else u.bfloat16()
        y = half(v)
        with torch.no_grad():
            parts = torch.cat([half(c, state) for c in v.split([20, 1, 1, 27], 1)], 1)
    assert y.dtype == torch.bfloat16 and state.ssm_state.dtype == torch.float32
    assert rel(y, want) < 0.03 and rel(parts, want) < 0.03
    y.backward(g.bfloat16())
    for name, p in half.named_parameters():
        assert rel(p.grad, reference[name]) < 0.05, name


def test_decay_is_not_rounded_to_bf16():
    """1000 decays of exp(-0.001): in bf16 each would round to 1 and the state would not fade."""
    args, S = scan_inputs(1, 1000, 1, 4, 1, 4, torch.bfloat16)
    args[0], args[1], args[2] = args[0] * 0, torch.full((1, 1000, 1), 1e-3), torch.tensor([-1.0])
    _, last = ssd(*args, 64, S.float())
    assert rel(last, S.double() * torch.tensor(-1.0).exp()) < 1e-5


def test_compiles_to_one_graph(monkeypatch):
    """fullgraph=True raises at any graph break; aot_eager, so that no C++ compiler is needed. Both in the PyTorch form."""
    monkeypatch.setattr(cpu_decode, "library", lambda: None)
    m = make(ngroups=2)
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    u = torch.randn(2, CHUNK + 5, 32, requires_grad=True)
    y, want = compiled(u), m(u)
    assert torch.equal(y, want)
    inputs = [u, *m.parameters()]
    for a, b in zip(torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(want.sum(), inputs), strict=True):
        assert rel(a, b) < 1e-6
    states = [m.new_state(2, "cpu", torch.float32) for _ in range(2)]
    with torch.no_grad():
        for part in u.split([9, 1, 11], 1):  # prefill, decode, catch-up
            assert rel(compiled(part, states[0]), m(part, states[1])) < 1e-6
    assert rel(states[0].ssm_state, states[1].ssm_state) < 1e-6
    assert torch.equal(states[0].conv_state, states[1].conv_state)


@pytest.mark.parametrize("op", ["training", "state", "write_only"])
def test_operators_are_well_formed(op):
    """torch's own checker: schema, fake shapes, autograd registration, under tracing."""
    m = make(8, d_state=3, headdim=4, ngroups=2)
    u = torch.randn(2, 5, m.in_proj.out_features, requires_grad=True)
    params = [m.conv1d.weight, m.conv1d.bias, m.dt_bias, m.A_log, m.D, m.norm.weight]
    s = m.new_state(2, "cpu", torch.float32)
    if op == "training":
        torch.library.opcheck(kernels.mixer, (u, *params, None, None, None, 2, 3, False, True))
        y, ys, states, _ = kernels.mixer(u, *params, None, None, None, 2, 3, False, True)
        tensors = [v.detach() for v in (torch.randn_like(y), ys, states, u, *params)]
        torch.library.opcheck(kernels.mixer_backward, (*tensors, None, None, 2, 3))
        return
    args = [v.detach() for v in (u[..., 16:] if op == "write_only" else u, *params)]
    torch.library.opcheck(kernels.mixer, (*args, s.conv_state, s.ssm_state, torch.tensor([2, 5]), 2, 3,
                                          op == "write_only", False))


# --- the state -------------------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("parts", [[37], [1] * 37, [3, 1, 1, 2, 14, 16], [36, 1], [1, 36], [2, 35], [17, 20]])
def test_any_split_is_one_call(parts):
    m = make(ngroups=2)
    u = torch.randn(2, 37, 32)
    whole, state = m.new_state(2, "cpu", torch.float32), m.new_state(2, "cpu", torch.float32)
    want = m(u)
    assert rel(m(u, whole), want) < 1e-6
    y = torch.cat([m(c, state) for c in u.split(parts, 1)], 1)
    assert rel(y, want) < 1e-5 and rel(state.ssm_state, whole.ssm_state) < 1e-5
    assert torch.allclose(state.conv_state, whole.conv_state, atol=1e-6)
    xBC = F.linear(u, m.in_proj.weight)[..., m.d_inner:-m.nheads]
    assert torch.allclose(state.conv_state, xBC[:, -4:].mT, atol=1e-6)  # mamba_ssm's layout: newest last


@torch.no_grad()
def test_decoding_512_tokens_is_the_parallel_form():
    m = make(ngroups=4)
    u = torch.randn(1, 512, 32)
    state = m.new_state(1, "cpu", torch.float32)
    y = torch.cat([m(u[:, t:t + 1], state) for t in range(512)], 1)
    assert rel(y, m(u)) < 1e-5


@torch.no_grad()
def test_one_token_after_a_long_prefill_equals_the_definition():
    m = make()
    u = torch.randn(2, 300, 32)
    state = m.new_state(2, "cpu", torch.float32)
    m(u[:, :-1], state)
    assert rel(m(u[:, -1:], state), naive_mixer(m, u.double())[:, -1:]) < 1e-5


def test_training_on_from_a_state():
    """With gradients on, the state is a constant and advances all the same."""
    m = make(dtype=torch.float64)
    u = torch.randn(1, 2 * CHUNK, 32, dtype=torch.float64)
    g = torch.randn(1, CHUNK, 32, dtype=torch.float64)
    state = m.new_state(1, "cpu", torch.float64)
    with torch.no_grad():
        m(u[:, :CHUNK], state)
    v = u[:, CHUNK:].clone().requires_grad_()
    y = m(v, state)
    assert not state.ssm_state.requires_grad
    (got,) = torch.autograd.grad(y, v, g)
    full = u.clone().requires_grad_()
    (want,) = torch.autograd.grad(naive_mixer(m, full)[:, CHUNK:], full, g)
    assert rel(got, want[:, CHUNK:]) < 1e-12
    whole = m.new_state(1, "cpu", torch.float64)
    m(u, whole)
    assert rel(state.ssm_state, whole.ssm_state) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("parts", [[9], [1] * 9, [5, 1, 3]])
def test_write_only_leaves_the_state_of_a_full_call(parts):
    m = make(ngroups=2)
    u = torch.randn(3, 9, 32)
    full, written = m.new_state(3, "cpu", torch.float32), m.new_state(3, "cpu", torch.float32)
    m(u, full)
    assert all(m(c, written, write_only=True) is None for c in u.split(parts, 1))
    assert rel(written.ssm_state, full.ssm_state) < 1e-5
    assert torch.allclose(written.conv_state, full.conv_state, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("write_only", [False, True])
def test_lengths_are_calls_of_each_row_alone(write_only):
    m = make(ngroups=2)
    u = torch.randn(5, CHUNK + 4, 32)
    before = torch.randn(5, 6, 32)
    lengths = torch.tensor([0, 1, 3, CHUNK + 4, CHUNK])
    state = m.new_state(5, "cpu", torch.float32)
    m(before, state)
    start = state.clone()
    y = m(u, state, write_only=write_only, lengths=lengths)
    for r, n in enumerate(lengths.tolist()):
        alone = start[r:r + 1].clone()
        if n:
            want = m(u[r:r + 1, :n], alone)
            assert write_only or rel(y[r:r + 1, :n], want) < 1e-5
        assert rel(state.ssm_state[r:r + 1], alone.ssm_state) < 1e-5
        assert torch.allclose(state.conv_state[r:r + 1], alone.conv_state, atol=1e-6)
    assert torch.equal(state.ssm_state[0], start.ssm_state[0])
    assert torch.equal(state.conv_state[0], start.conv_state[0])


@torch.no_grad()
def test_rows_are_independent():
    m = make(ngroups=2)
    u = torch.randn(3, 20, 32)
    state = m.new_state(3, "cpu", torch.float32)
    y = torch.cat([m(c, state) for c in u.split([7, 1, 12], 1)], 1)
    for r in range(3):
        alone = m.new_state(1, "cpu", torch.float32)
        assert rel(y[r:r + 1], torch.cat([m(c, alone) for c in u[r:r + 1].split([7, 1, 12], 1)], 1)) < 1e-5
        assert rel(state.ssm_state[r:r + 1], alone.ssm_state) < 1e-5


@torch.no_grad()
def test_copying_and_writing_rows():
    m = make()
    state = m.new_state(3, "cpu", torch.float32)
    m(torch.randn(3, 5, 32), state)
    picked = state[[2, 0]]
    assert torch.equal(picked.ssm_state, state.ssm_state[[2, 0]])
    assert torch.equal(picked.conv_state, state.conv_state[[2, 0]])
    other = m.new_state(3, "cpu", torch.float32).copy_(picked[0:1])  # one prompt, three samples
    assert all(torch.equal(other.ssm_state[r], state.ssm_state[2]) for r in range(3))
    clone = state.clone()
    m(torch.randn(1, 4, 32), state[1:2])  # a slice is a view: only row 1 advances
    assert torch.equal(state.ssm_state[[0, 2]], clone.ssm_state[[0, 2]])
    assert not torch.equal(state.ssm_state[1], clone.ssm_state[1])
    assert not torch.equal(state.conv_state[1], clone.conv_state[1])
    state[torch.tensor([1])] = clone[1:2]
    assert torch.equal(state.ssm_state, clone.ssm_state) and torch.equal(state.conv_state, clone.conv_state)
    assert not state.zero_().ssm_state.any() and not state.conv_state.any() and clone.ssm_state.any()


# --- rollback --------------------------------------------------------------------------------------------------------

def assert_same(a: MambaState, b: MambaState):
    assert rel(a.ssm_state, b.ssm_state) < 1e-5 and torch.allclose(a.conv_state, b.conv_state, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("parts", [[6], [1] * 6, [2, 1, 3]])
@pytest.mark.parametrize("keep", [0, 1, 4, 6])
def test_rollback_is_never_having_gone_ahead(keep, parts):
    m = make(ngroups=2)
    prompt, draft, after = torch.randn(2, 9, 32), torch.randn(2, 6, 32), torch.randn(2, 5, 32)
    state = m.new_state(2, "cpu", torch.float32)
    m(prompt, state)
    honest = state.clone()
    state.checkpoint()
    for c in draft.split(parts, 1):
        m(c, state)
    m.rollback(state, keep)
    if keep:
        m(draft[:, :keep], honest)
    assert_same(state, honest)
    assert rel(m(after, state), m(after, honest)) < 1e-5
    assert_same(state, honest)


@torch.no_grad()
def test_rollback_per_row_again_and_again():
    """Rounds of drafting with other counts per row, a round that accepts nothing after one that did among them."""
    m = make(ngroups=2)
    state = m.new_state(3, "cpu", torch.float32)
    histories = [torch.zeros(1, 0, 32) for _ in range(3)]
    state.checkpoint()
    for keep in ([2, 0, 4], [0, 0, 0], [4, 1, 3], [1, 4, 0]):
        draft = torch.randn(3, 4, 32)
        m(draft[:, :1], state)
        m(draft[:, 1:], state, write_only=True)
        m.rollback(state, torch.tensor(keep))
        histories = [torch.cat([h, draft[r:r + 1, :n]], 1) for r, (h, n) in enumerate(zip(histories, keep))]
    for r, h in enumerate(histories):
        alone = m.new_state(1, "cpu", torch.float32)
        m(h, alone)
        assert_same(state[r:r + 1], alone)


@torch.no_grad()
def test_rollback_of_ragged_calls():
    m = make(ngroups=2)
    u = torch.randn(3, 8, 32)
    lengths, keep = [[3, 0, 2], [1, 5, 0]], [2, 4, 2]
    state = m.new_state(3, "cpu", torch.float32)
    state.checkpoint()
    m(u[:, :3], state, lengths=torch.tensor(lengths[0]))
    m(u[:, 3:], state, lengths=torch.tensor(lengths[1]))
    m.rollback(state, torch.tensor(keep))
    for r in range(3):
        alone = m.new_state(1, "cpu", torch.float32)
        m(torch.cat([u[r:r + 1, :lengths[0][r]], u[r:r + 1, 3:3 + lengths[1][r]]], 1)[:, :keep[r]], alone)
        assert_same(state[r:r + 1], alone)
    with pytest.raises(ValueError, match="0 to the number of tokens"):
        m.rollback(state, 1)  # the checkpoint moved: nothing was recorded since


@torch.no_grad()
def test_checkpoint_errors():
    m = make()
    state = m.new_state(2, "cpu", torch.float32)
    with pytest.raises(ValueError, match="needs a checkpoint"):
        m.rollback(state, 0)
    state.checkpoint(window=4)
    m(torch.randn(2, 3, 32), state)
    before = state.clone()
    for n in (2, 5):
        with pytest.raises(ValueError, match="exceed its window of 4"):
            m(torch.randn(2, n, 32), state)
    assert torch.equal(state.ssm_state, before.ssm_state)  # refused before anything changed
    for keep in (4, -1, torch.tensor([0, 4]), torch.tensor([1])):
        with pytest.raises(ValueError, match="keep must hold"):
            m.rollback(state, keep)
    state.drop_checkpoint()
    m(torch.randn(2, 5, 32), state)
    assert state.recorded == 0


# --- decode's cost, accounting ----------------------------------------------------------------------------------------

@pytest.mark.skipif(library() is None, reason="of the compiled step")
@torch.no_grad()
@pytest.mark.parametrize("write_only", [False, True])
def test_decode_allocates_two_vectors(write_only):
    """Its output and in_proj's; nothing of a state's or a matrix's size."""
    m = make(64, ngroups=2)
    state = m.new_state(1, "cpu", torch.float32)
    u = torch.randn(1, 1, 64)
    m(u, state, write_only=write_only)  # the library keeps its own buffers
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        m(u, state, write_only=write_only)
    sizes = [e.nbytes() for e in prof.profiler.kineto_results.events() if e.name() == "[memory]" and e.nbytes() > 0]
    vectors = [m.in_proj.out_features - m.d_inner] if write_only else [64, m.in_proj.out_features]
    assert sizes == [-(-4 * n // 64) * 64 for n in vectors]


def test_flops():
    """Counted by hand for one size: d_inner 64, 8 heads, 2 groups of 8 states, conv over 96 channels."""
    m = make(ngroups=2)
    assert m.flops_per_token() == {"in_proj": 2 * 32 * (64 + 64 + 16 + 16 + 8), "conv": 2 * 4 * 96,
                                   "scan": 5 * 64 * 8 + 2 * 64, "out_proj": 2 * 64 * 32}
    assert m.flops_per_token(write_only=True) == {"in_proj": 2 * 32 * (64 + 16 + 16 + 8), "conv": 2 * 4 * 80,
                                                  "scan": 3 * 64 * 8, "out_proj": 0}


def test_matrix_flops_are_those_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode
    m = make(ngroups=2)
    with FlopCounterMode(display=False) as counter:
        m(torch.randn(1, 5, 32))
    f = m.flops_per_token()
    assert counter.get_flop_counts()["Global"][torch.ops.aten.mm] == 5 * (f["in_proj"] + f["out_proj"])


# --- refusals --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kw,words", [
    ({"headdim": 24}, "d_inner = expand \\* d_model = 64 does not divide by headdim = 24"),
    ({"ngroups": 3}, "d_inner = expand \\* d_model = 64 does not divide by ngroups = 3"),
    ({"ngroups": 16}, "nheads = d_inner / headdim = 8 does not divide by ngroups = 16"),
    ({"chunk_size": 0}, "chunk_size = 0"),
    ({"backend": "triton"}, "choose auto, torch or cuda")])
def test_bad_sizes_say_which(kw, words):
    with pytest.raises(ValueError, match=words):
        make(**kw)


@pytest.mark.parametrize("break_it,word", [
    (lambda m: m.new_state(3, "cpu", torch.float32), "batch"),
    (lambda m: m.new_state(2, "cpu", torch.bfloat16), "dtype"),
    (lambda m: MambaState(m.new_state(2, "cpu", torch.float32).conv_state,
                          m.new_state(2, "cpu", torch.float32).ssm_state.bfloat16()), "dtype"),
    (lambda m: m.new_state(2, "meta", torch.float32), "device"),
    (lambda m: make(d_state=4).new_state(2, "cpu", torch.float32), "size")])
@pytest.mark.parametrize("T", [1, 5])
def test_wrong_states_are_refused(break_it, word, T):
    m = make()
    with torch.no_grad(), pytest.raises(ValueError, match=f"the state has {word}"):
        m(torch.randn(2, T, 32), break_it(m))


def test_other_bad_inputs_are_refused():
    m = make()
    u, state = torch.randn(2, 5, 32), m.new_state(2, "cpu", torch.float32)
    with pytest.raises(ValueError, match="give it one"):
        m(u, write_only=True)
    with pytest.raises(ValueError, match="T must be at least 1"):
        m(u[:, :0], state)
    for lengths in (torch.tensor([1, 6]), torch.tensor([-1, 2]), torch.tensor([1]), torch.tensor([1., 2.])):
        with pytest.raises(ValueError, match="lengths must"):
            m(u, state, lengths=lengths)
    with pytest.raises(ValueError, match=r"write state\[1:1 \+ 1\]"):
        state[1]
