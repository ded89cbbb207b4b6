"""The compiled CPU operators: each equals its layer's PyTorch form; how they are built, rebuilt, or done without."""
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize

from nanochat import cpu_decode, native
from nanochat.cache import MatryoshkaKVCache
from nanochat.checkpoint_manager import build_model
from nanochat.engine import prepare_inference
from nanochat.gpt import GPTConfig
from nanochat.hybrid_gpt import HybridConfig
from nanochat.loss_eval import head_logits
from nanochat.mamba_block import Mamba2
from nanochat.matryoshka import MLP, norm

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # with the tolerance relative to the largest value


def assert_close(got, want, dtype):
    assert got.shape == want.shape and got.dtype == want.dtype
    assert (got.double() - want.double()).abs().max() <= DTYPES[dtype] * want.double().abs().max().clamp(min=1e-3)


def both(monkeypatch, run):
    """run() with the operators, which must have been called, and in the layers' PyTorch forms."""
    called, operator = [], cpu_decode.operator
    with torch.no_grad(), monkeypatch.context() as m:
        m.setattr(cpu_decode, "operator", lambda name, dtype: called.append(name) or operator(name, dtype))
        ours = run()
        assert called
        m.setattr(cpu_decode, "library", lambda: None)
        called.clear()
        theirs = run()
        assert not called
    return ours, theirs


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(dtype):
    """All numbers of rows up to a whole set of tiles, sizes that fill no vector, slices, and addresses off any border."""
    torch.manual_seed(0)
    sizes = [(n, k, m) for n in (1, 3, 8) for k, m in ((1, 1), (16, 24), (33, 7), (2100, 5))]
    for n, k, m in sizes + [(n, 70, 53) for n in range(1, 18)]:
        storage = torch.randn((m + 2) * (k + 5) + 1).to(dtype)
        weight = storage[1:].view(m + 2, k + 5)[:m, :k]
        x = torch.randn(n, k + 3).to(dtype)[:, 1:k + 1]
        want = (x.double() @ weight.double().T).to(dtype)
        assert_close(cpu_decode.linear(x, weight), want, dtype)
        assert_close(cpu_decode.linear(x.T.contiguous().T, weight), want, dtype)  # columns contiguous
    assert cpu_decode.linear(torch.randn(2, 3, 8).to(dtype), torch.randn(5, 8).to(dtype)).shape == (2, 3, 5)


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_logits(dtype):
    """Capped, of every size from far below the cap, where a quotient loses digits, to far above."""
    torch.manual_seed(0)
    for scale in (1e-4, 0.02, 0.1, 1, 30):
        h, weight = torch.randn(3, 2, 40).to(dtype), (scale * torch.randn(53, 40)).to(dtype)
        x = (h.double() @ weight.double().T).to(dtype)
        got = head_logits(h, weight, 15.0)
        assert got.dtype == torch.float32 and got.shape == (3, 2, 53)
        near = 2e-6 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(got, (15 * torch.tanh(x.double() / 15)).float(), rtol=near, atol=near * scale)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(dtype, monkeypatch):
    for shape in ((1, 1, 64), (2, 3, 21), (17, 5)):
        x = torch.randn(*shape).to(dtype) * 3
        for view in (x, x.transpose(0, 1), x[..., :4], torch.zeros_like(x)):
            assert_close(*both(monkeypatch, lambda view=view: norm(view, 64, 1e-6)), dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp_at_every_level(hybrid_config, dtype, monkeypatch):
    mlp = MLP(hybrid_config).to(dtype)
    for n, d in ((1, 16), (5, 32), (17, 64)):
        x = torch.randn(1, n, 64).to(dtype)
        assert_close(*both(monkeypatch, lambda x=x, d=d: mlp(x, d)), dtype)
    mixed = torch.tensor([[16, 64, 32, 16]])
    assert_close(*both(monkeypatch, lambda: mlp(torch.ones(1, 4, 64, dtype=dtype), mixed)), dtype)


MODELS = {"base": GPTConfig(64, 300, 2, 4, 4, 64), "grouped": GPTConfig(64, 300, 2, 6, 2, 60),
          "hybrid": HybridConfig.from_base(GPTConfig(64, 300, 2, 4, 4, 64)),
          "grown": replace(HybridConfig.from_base(GPTConfig(64, 300, 2, 8, 8, 128)), d_ref=64)}
# chunks of (T, lengths or None, widths, exit): what a cache has seen when the last ones come
STEPS = {"one token": [(9, None, "think", None)] + [(1, None, "think", None)] * 3,
         "narrow": [(9, None, "normal", None)] + [(1, None, "normal", None)] * 3,
         "several tokens": [(5, None, "normal", None), (3, None, "normal", None), (2, None, "normal", None)],
         "ragged": [(7, [2, 7, 5], "think", None), (1, None, "think", None), (3, [0, 3, 1], "think", None)],
         "memory only": [(6, None, "think", None), (1, None, "think", 1), (1, None, "think", None)],
         "mixed heads": [(5, None, "ghost", None), (1, None, "think", None), (1, None, "normal", None),
                         (2, [1, 2, 0], "think", None), (1, None, "think", None)]}


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind", MODELS)
def test_models(kind, steps, dtype, monkeypatch):
    """Logits of valid tokens, and the whole cache, after the same chunks."""
    model = randomize(build_model(MODELS[kind]))
    prepare_inference(model, "cpu", dtype)

    def run():
        g, out, cache = torch.Generator().manual_seed(3), [], MatryoshkaKVCache(model, 3, 40)
        for T, lengths, widths, depth in STEPS[steps]:
            idx = torch.randint(300, (3, T), generator=g)
            exits = None if depth is None else torch.full((3, T), depth)
            logits = model(idx, widths=widths, exits=exits, cache=cache, lengths=lengths)
            out += [row[:n] for row, n in zip(logits, lengths or [T] * 3)]
        memory = [(v.k, v.v) if hasattr(v, "k") else (v.state.conv_state, v.state.ssm_state) for v in cache.views]
        return torch.cat(out), [t.float() for pair in memory for t in pair]

    (logits, memory), (want, want_memory) = both(monkeypatch, run)
    assert_close(logits, want, dtype)
    for a, b in zip(memory, want_memory):
        assert_close(a, b, dtype)


@needs_compiler
@pytest.mark.parametrize("sizes", [{"d_state": 8, "headdim": 8, "ngroups": 2}, {"d_state": 21, "headdim": 12, "ngroups": 1},
                                   {"d_state": 32, "headdim": 16, "ngroups": 3, "d_conv": 2}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixer_step(sizes, dtype, monkeypatch):
    """Outputs, states, and the record that a rollback replays; some tokens only write."""
    torch.manual_seed(0)
    m = Mamba2(48, **sizes)
    m.init_weights()
    m.in_proj.weight.data, m.out_proj.weight.data = m.in_proj.weight.data.to(dtype), m.out_proj.weight.data.to(dtype)
    u = torch.randn(3, 6, 48).to(dtype)

    def run():
        state = m.new_state(3, "cpu", dtype)
        out = [m(u[:, t:t + 1], state, write_only=t == 2) for t in range(4)]
        state.checkpoint()
        m(u[:, 4:5], state, write_only=True)
        m(u[:, 5:6], state)
        after = state.clone()
        m.rollback(state, 1)
        return torch.cat([y for y in out if y is not None]), [after.conv_state, after.ssm_state, state.conv_state,
                                                              state.ssm_state]

    (y, states), (want, want_states) = both(monkeypatch, run)
    assert_close(y, want, dtype)
    for a, b in zip(states, want_states):
        assert_close(a, b, dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_the_same_to_the_last_bit_however_they_are_cut(dtype):
    """A model's logits and memory, one token at a time or several; and the same after a draft was taken back in part."""
    model = randomize(build_model(MODELS["hybrid"]))
    prepare_inference(model, "cpu", dtype)
    idx = torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(3))

    def run(parts):
        out, cache = [], MatryoshkaKVCache(model, 3, 40)
        for part in idx.split(parts, 1):
            out.append(model(part, cache=cache))
        memory = [(v.k[:, :, :20], v.v[:, :, :20]) if hasattr(v, "k") else (v.state.conv_state, v.state.ssm_state)
                  for v in cache.views]
        return torch.cat(out, 1), [t for pair in memory for t in pair]

    with torch.no_grad():
        logits, memory = run([1] * 20)
        for parts in ([5, 1, 7, 2, 3, 2], [8, 6, 6], [4, 16]):
            got, its = run(parts)
            assert torch.equal(got, logits) and all(map(torch.equal, its, memory))
        cache = MatryoshkaKVCache(model, 3, 40)
        model(idx[:, :9], cache=cache)
        cache.checkpoint()
        model(idx[:, 9:14], cache=cache)
        cache.truncate([10, 13, 9])
        for row, n in enumerate((10, 13, 9)):
            alone = MatryoshkaKVCache(model, 1, 40)
            for part in idx[row:row + 1, :n].split(1, 1):
                model(part, cache=alone)
            for view, its in zip(cache.views[1::2], alone.views[1::2]):
                assert torch.equal(view.state.conv_state[row], its.state.conv_state[0])
                assert torch.equal(view.state.ssm_state[row], its.state.ssm_state[0])


@needs_compiler
def test_what_the_operators_leave_alone():
    x, w = torch.randn(1, 8), torch.randn(4, 8)
    assert not cpu_decode.serves(x, w)  # with gradients
    with torch.no_grad():
        assert cpu_decode.serves(x, w)
        for a, b in ((x.double(), w.double()), (x, w.bfloat16()), (x, w.mT.contiguous().mT),
                     (x.expand(cpu_decode.MAX_ROWS + 1, 8), w), (x.to("meta"), w), (x[:0], w)):
            assert not cpu_decode.serves(a, b)
        with torch.autocast("cpu"):
            assert not cpu_decode.serves(x, w)


# --- building --------------------------------------------------------------------------------------------------------

@pytest.fixture
def build(monkeypatch, tmp_path):
    """native.library() of a source of one function, without what earlier calls remember."""
    source = tmp_path / "tiny.cpp"
    source.write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setattr(native, "SOURCE", source)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return native.library.__wrapped__


@needs_compiler
def test_a_library_is_built_once_and_again_when_damaged_or_stale(build, tmp_path):
    folder = tmp_path / "base" / "native"
    assert build().answer() == 42
    (first,) = folder.iterdir()
    built = first.stat().st_mtime_ns
    assert build().answer() == 42 and first.stat().st_mtime_ns == built
    first.unlink()  # a new file: the loaded one must not change under the process
    first.write_bytes(b"\x7fELF, but not all of it")
    assert build().answer() == 42
    assert [p for p in folder.iterdir() if p.read_bytes().startswith(b"\x7fELF, but")] == []
    native.SOURCE.write_text('extern "C" int answer() { return 43; }')
    assert build().answer() == 43


def test_without_a_compiler_one_line_says_so(build, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build() is None
    assert capsys.readouterr().err == ("CPU decoding runs its PyTorch form, which is slower: there is no C++ compiler "
                                       "no-such-compiler (CXX names another)\n")


@needs_compiler
def test_a_failing_compiler_is_quoted(build, capsys):
    native.SOURCE.write_text("int answer() { return forty_two; }")
    assert build() is None
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("compiling") and "forty_two" in last and last.startswith("CPU decoding runs its PyTorch form")


def test_models_run_without_the_library(hybrid, tokens, monkeypatch):
    monkeypatch.setattr(cpu_decode, "library", lambda: None)
    cache = MatryoshkaKVCache(hybrid, 2, 48)
    with torch.no_grad():
        got = torch.cat([hybrid(t, cache=cache) for t in tokens[:, :12].split(1, 1)], 1)
        assert F.mse_loss(got, hybrid(tokens[:, :12])) < 1e-10
