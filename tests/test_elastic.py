"""
Widths and depths that differ between rows and tokens: the parallel form equals step-by-step decode, mixed widths equal
a naive reference, and the rows of a batch are independent.
"""
import pytest
import torch
from conftest import language_parameters

from nanochat.cache import MatryoshkaKVCache
from nanochat.matryoshka import apply_rope, norm, rope_tables

N_BLOCK, LEVELS = 6, torch.tensor([16, 32, 64])


def draw(*shape, seed):
    return LEVELS[torch.randint(3, shape, generator=torch.Generator().manual_seed(seed))]


def decode(model, tokens, widths=None, exits=None, first=1):
    """One token at a time (after a first chunk), each with its own widths and exit."""
    cache, out = MatryoshkaKVCache(model, *tokens.shape), []
    at = [slice(0, first), *(slice(t, t + 1) for t in range(first, tokens.size(1)))]
    for s in at:
        w = widths[:, s] if isinstance(widths, torch.Tensor) and widths.dim() == 3 else widths
        out.append(model(tokens[:, s], widths=w, exits=None if exits is None else exits[:, s], cache=cache))
    return torch.cat(out, 1)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["exits", "row widths", "row widths and exits", "token widths and exits", "expanding rows"])
def test_parallel_form_equals_decode(hybrid, tokens, kind):
    B, T = tokens.shape
    exits = torch.randint(1, N_BLOCK + 1, (B, T), generator=torch.Generator().manual_seed(1)) if "exits" in kind else None
    widths = None
    if "row widths" in kind:
        widths = draw(B, N_BLOCK, seed=2)
    elif "token" in kind:
        widths = draw(B, T, N_BLOCK, seed=3)
    elif "expanding" in kind:  # one level up from some position on, as the gate does it
        widths = torch.full((B, T, N_BLOCK), 16)
        widths[0, 20:, 2:] = 32
        widths[1, 35:, 4:] = 64
    want = hybrid(tokens, widths=widths, exits=exits)
    assert (want - hybrid(tokens)).abs().max() > 0.1  # widths and exits do change the function
    assert (decode(hybrid, tokens, widths, exits, first=5) - want).abs().max() <= 1e-4


@torch.no_grad()
def test_an_exited_token_keeps_its_state_and_still_writes_memory(hybrid, tokens):
    """Its own logits are those of the shorter model; later tokens differ from those of a model that skipped its writes."""
    B, T = tokens.shape
    exits = torch.full((B, T), N_BLOCK)
    exits[:, 10] = 2
    got = hybrid(tokens, exits=exits)
    h = hybrid.hidden(tokens[:, :11], exits=torch.full((B, 11), 2))[:, 10]
    assert torch.equal(h, hybrid.hidden(tokens[:, :11], exits=2)[:, 10])  # a number for all
    torch.testing.assert_close(got[:, 10], hybrid.logits(h), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[:, :10], hybrid(tokens)[:, :10], atol=1e-5, rtol=1e-5)
    assert (got[:, 11:] - hybrid(tokens)[:, 11:]).abs().max() > 1e-3


def naive_attention(attn, x, levels, value):
    """Token by token and head by head, straight from DESIGN 3 and 7."""
    T, hd = len(x), attn.head_dim
    cos, sin = rope_tables(torch.arange(T), hd, 10000.0)
    q, k, v = {}, {}, {}
    for t in range(T):
        d = int(levels[t])
        u = norm(x[t, :d], attn.d_ref, attn.eps)
        for j in range(d // hd):
            rows = slice(j * hd, (j + 1) * hd)
            rope = (cos[t:t + 1], sin[t:t + 1])
            q[t, j], k[t, j] = (norm(apply_rope((u @ w.weight[rows, :d].T).view(1, 1, hd), rope).flatten(), hd, attn.eps)
                                for w in (attn.c_q, attn.c_k))
            v[t, j] = u @ attn.c_v.weight[rows, :d].T
            if attn.ve_gate is not None:
                c = attn.ve_gate.in_features
                scaled = u[:c] * (d / attn.d_ref) ** 0.5
                v[t, j] = v[t, j] + 2 * torch.sigmoid(attn.ve_gate.weight[j] @ scaled) * value[t, rows]
    out = torch.zeros_like(x)
    for t in range(T):
        d = int(levels[t])
        heads = []
        for j in range(d // hd):
            seen = [s for s in range(t + 1) if (s, j) in k]
            p = torch.softmax(torch.stack([q[t, j] @ k[s, j] for s in seen]) / hd ** 0.5, 0)
            heads.append(sum(w * v[s, j] for w, s in zip(p, seen)))
        out[t, :d] = torch.cat(heads) @ attn.c_proj.weight[:d, :d].T
    return out


@torch.no_grad()
@pytest.mark.parametrize("block", [0, 4])
def test_mixed_widths_follow_the_rule(hybrid, block):
    """A head sees the positions that have it, narrowing and widening in mid-sequence."""
    attn, T = hybrid.transformer.h[block].attn, 12
    x, value = torch.randn(1, T, 64), torch.randn(1, T, 64)
    assert (attn.ve_gate is not None) == (block in (0, 4))
    levels = torch.tensor([[16, 16, 32, 32, 64, 16, 64, 64, 32, 16, 64, 32]])
    got = attn(x, levels, rope_tables(torch.arange(T), 16, 10000.0), value)
    want = naive_attention(attn, x[0], levels[0], value[0])
    assert (got[0] - want).abs().max() <= 1e-5 < want.abs().max()


def test_gradients_flow_through_mixed_widths_and_stay_finite(hybrid, tokens):
    widths = draw(*tokens.shape, N_BLOCK, seed=5)
    exits = torch.randint(1, N_BLOCK + 1, tokens.shape, generator=torch.Generator().manual_seed(1))
    loss, _ = hybrid(tokens[:, :-1], tokens[:, 1:], widths=widths[:, :-1], exits=exits[:, :-1])
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in language_parameters(hybrid).values())


def test_row_widths_equal_separate_rows(hybrid, tokens):
    """Also in the gradients: one mixed batch against each row run alone at its own widths."""
    widths = draw(2, N_BLOCK, seed=6)
    x, y = tokens[:, :-1], tokens[:, 1:]
    loss, _ = hybrid(x, y, widths=widths)
    loss.backward()
    got = {n: p.grad.clone() for n, p in language_parameters(hybrid).items()}
    hybrid.zero_grad()
    for r in range(2):
        part, _ = hybrid(x[r:r + 1], y[r:r + 1], widths=widths[r].tolist())
        (part / 2).backward()
    for n, p in language_parameters(hybrid).items():
        torch.testing.assert_close(got[n], p.grad, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_ragged_rows_equal_single_rows(hybrid, tokens):
    """Chunks of different lengths per row, some of them empty, against each row alone."""
    rows = [tokens[0, :30], tokens[1, :11], tokens[0, 5:25], tokens[1, 20:48]]
    cache, done, got = MatryoshkaKVCache(hybrid, 4, 48), [0] * 4, [[] for _ in rows]
    g = torch.Generator().manual_seed(0)
    while any(d < len(r) for d, r in zip(done, rows)):
        n = [min(int(torch.randint(0, 9, (), generator=g)), len(r) - d) for d, r in zip(done, rows)]
        if max(n) == 0:
            continue
        chunk = torch.zeros(4, max(n), dtype=torch.long)
        for i, r in enumerate(rows):
            chunk[i, :n[i]] = r[done[i]:done[i] + n[i]]
        out = hybrid(chunk, widths="normal", cache=cache, lengths=n)
        for i in range(4):
            got[i].append(out[i, :n[i]])
            done[i] += n[i]
    assert cache.pos == [len(r) for r in rows]
    for i, r in enumerate(rows):
        want = hybrid(r[None], widths="normal")[0]
        assert (torch.cat(got[i]) - want).abs().max() <= 1e-4


@torch.no_grad()
def test_rows_come_and_go(hybrid, tokens):
    """After keep and append every row goes on as if it had always been alone, also with mixed widths."""
    widths = torch.full((1, 48, N_BLOCK), 16)
    widths[:, 12:] = 32
    alone = [hybrid(tokens[i:i + 1], widths=w) for i, w in ((0, "normal"), (1, widths))]
    a, b = MatryoshkaKVCache(hybrid, 2, 48), MatryoshkaKVCache(hybrid, 1, 48)
    hybrid(tokens[[1, 0], :10], widths="normal", cache=a)
    hybrid(tokens[1:, :20], widths=widths[:, :20], cache=b)
    a.keep([1])
    a.append(b)
    assert a.pos == [10, 20]
    spare = a.clone()
    step = torch.stack((tokens[0, 10:20], tokens[1, 20:30]))
    for cache in (a, spare):  # the clone shares nothing with what the original has become
        out = hybrid(step, widths="normal", cache=cache)
        assert (out[0] - alone[0][0, 10:20]).abs().max() <= 1e-4
        assert (out[1] - alone[1][0, 20:30]).abs().max() <= 1e-4


def test_bad_arguments_are_named(hybrid, tokens):
    for widths, words in ((torch.full((2, 5), 64), "do not fit"), (torch.full((2, N_BLOCK), 48), "48 is not a level")):
        with pytest.raises(ValueError, match=words):
            hybrid(tokens, widths=widths)
    with pytest.raises(ValueError, match="exits must be"):
        hybrid(tokens, exits=torch.zeros(2, 48, dtype=torch.long))
    cache = MatryoshkaKVCache(hybrid, 2, 10)
    with pytest.raises(ValueError, match="11 tokens do not fit the cache of 10"):
        hybrid(tokens[:, :11], cache=cache)


@torch.no_grad()
def test_going_back_is_as_never_having_gone_on(hybrid, tokens):
    """Rows go back by different amounts, some not at all, and then go on: also with widths that had changed meanwhile."""
    cache, plain = MatryoshkaKVCache(hybrid, 2, 48), MatryoshkaKVCache(hybrid, 2, 48)
    for c in (cache, plain):
        hybrid(tokens[:, :20], widths="normal", cache=c)
    cache.checkpoint()
    hybrid(torch.zeros_like(tokens[:, :7]), widths="think", cache=cache)
    cache.truncate([20, 20])
    hybrid(tokens[:, 20:26], widths="normal", cache=cache)
    hybrid(tokens[:, 20:26], widths="normal", cache=plain)
    cache.truncate([26, 22])  # the last checkpoint moved along
    ragged = torch.stack((tokens[0, 26:30], tokens[1, 22:26]))
    hybrid(ragged, widths="normal", cache=cache)
    hybrid(tokens[:, 26:30], widths="normal", cache=plain)
    want = hybrid(tokens[:, 30:34], widths="normal", cache=plain)
    hybrid(tokens[:, 26:30], widths="normal", cache=cache, lengths=[0, 4])
    assert cache.pos == [30, 30]
    assert (hybrid(tokens[:, 30:34], widths="normal", cache=cache) - want).abs().max() <= 1e-4


def test_positions_that_cannot_be_reached_are_named(hybrid, tokens):
    cache = MatryoshkaKVCache(hybrid, 2, 48)
    hybrid(tokens[:, :20], cache=cache)
    with pytest.raises(ValueError, match="between the last checkpoint"):
        cache.truncate([10, 10])
    cache.checkpoint(4)
    hybrid(tokens[:, 20:23], cache=cache)
    for pos in ([19, 22], [23, 24]):
        with pytest.raises(ValueError, match="cannot go back"):
            cache.truncate(pos)
    with pytest.raises(ValueError, match="exceed its window of 4"):
        hybrid(tokens[:, 23:25], cache=cache)
