"""
Which form the Mamba-2 block runs, and its kernels on a GPU. Without one, tests/interpreted_kernels.py runs the same kernels
in Triton's interpreter.
"""
import re

import pytest
import torch
from test_mamba_block import make, rel

from nanochat import common, mamba_block
from nanochat import mamba_kernels as kernels
from nanochat.kernels import upstream
from nanochat.mamba_block import Mamba2, announce_form, choose_form

pytestmark = pytest.mark.usefixtures("same_start")


# --- the form ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def gpu_here(monkeypatch):
    """A GPU that computes bf16, as far as the choice of a form asks; nothing runs on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA Example")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    for module in (common, mamba_block):
        monkeypatch.setattr(module, "has_native_bf16", lambda device: True)
    for remembered in (choose_form, upstream.load, mamba_block._say_once):
        remembered.cache_clear()
    yield
    for remembered in (choose_form, upstream.load, mamba_block._say_once):
        remembered.cache_clear()


def slow_mixer(monkeypatch):
    monkeypatch.setattr(kernels, "why_no_cuda", lambda: ImportError("no kernels for this test"))
    return make(backend="auto")


def test_on_a_gpu_the_form_is_printed_once_with_the_reason(gpu_here, monkeypatch, capsys):
    mixer = slow_mixer(monkeypatch)
    assert mixer.form == "torch" and capsys.readouterr().out == ""
    for _ in range(2):
        announce_form(mixer, "cuda")
    assert capsys.readouterr().out == "Mamba-2 runs its PyTorch form, which is slower: no kernels for this test\n"
    announce_form(mixer, "cuda", training=True)
    assert capsys.readouterr().out.startswith("warning: Mamba-2 runs its PyTorch form")
    mixer.form = "cuda"
    announce_form(mixer, "cuda")
    assert capsys.readouterr().out == "Mamba-2 runs its Triton kernels\n"


def test_on_a_cpu_nothing_is_printed(capsys):
    announce_form(make(backend="auto"), "cpu", training=True)
    assert capsys.readouterr().out == ""


def test_a_large_model_trains_in_the_slow_form_only_if_that_is_allowed(gpu_here, monkeypatch, capsys):
    mixer = slow_mixer(monkeypatch)
    monkeypatch.setattr(mamba_block, "SLOW_LIMIT", sum(p.numel() for p in mixer.parameters()) - 1)
    with pytest.raises(ValueError, match="no kernels for this test; or accept that with --allow-slow-mamba"):
        announce_form(mixer, "cuda", training=True)
    announce_form(mixer, "cuda", training=True, allow_slow=True)
    announce_form(mixer, "cuda")  # decoding
    monkeypatch.setattr(mamba_block, "SLOW_LIMIT", sum(p.numel() for p in mixer.parameters()))
    announce_form(mixer, "cuda", training=True)
    assert "--allow-slow-mamba" not in capsys.readouterr().out


@pytest.mark.parametrize("demanded, words", [("", "warning: this GPU (NVIDIA Example) has no bf16"),
                                             ("bfloat16", "NANOCHAT_DTYPE=bfloat16 is set, but this GPU")])
def test_a_gpu_without_bf16_is_told(gpu_here, monkeypatch, capsys, demanded, words):
    monkeypatch.setenv("NANOCHAT_DTYPE", demanded)
    for module in (common, mamba_block):
        monkeypatch.setattr(module, "has_native_bf16", lambda device: False)
    mixer = slow_mixer(monkeypatch)
    if demanded:
        with pytest.raises(ValueError, match=re.escape(words)):
            announce_form(mixer, "cuda")
    else:
        announce_form(mixer, "cuda")
        assert words in capsys.readouterr().out


def test_kernels_asked_for_without_a_gpu(gpu_here, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"CUDA device.*install a CUDA build.*python -m scripts.get_kernels"):
        make(backend="cuda")


def test_kernels_asked_for_without_their_files(gpu_here, monkeypatch, tmp_path):
    pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")
    monkeypatch.setenv("NANOCHAT_KERNELS", str(tmp_path))
    with pytest.raises(ImportError, match=f"files are not in {tmp_path}: run `python -m scripts.get_kernels`"):
        make(backend="cuda")


def test_kernels_refuse_what_they_cannot_do(gpu_here, monkeypatch):
    monkeypatch.setattr(kernels, "why_no_cuda", lambda: None)
    with torch.device("meta"):
        with pytest.raises(ValueError, match="groups of at most 16384 channels, got 16512"):
            Mamba2(8256, d_state=8, backend="cuda")
        assert Mamba2(8256, d_state=8).form == "torch" and Mamba2(8256, d_state=8, ngroups=2).form == "cuda"
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
