"""
Depthwise causal convolution and SiLU as Triton kernels: forward, backward, and the update by one token.

    y[t, c] = silu(bias[c] + sum_j weight[c, j] x[t - K + 1 + j, c]),  where x before token 0 is `past`, or zero.

All three are bound by memory traffic. A program computes a tile of tokens x channels and loads its inputs once per tap,
shifted by a token; the repeats come from the cache. Any strides, numbers of channels and taps are served. Inputs,
outputs and gradients are in the activations' dtype, arithmetic and sums in fp32. Offsets of rows and tiles are int64: a
batch may have more than 2^31 elements. Nothing is tuned at run time: the tile sizes are constants.
"""
import torch
import triton
import triton.language as tl

FORWARD_TOKENS, BACKWARD_TOKENS, CHANNELS = 32, 16, 64  # a tile
SPAN = 256  # tokens whose sums for the weights' gradient one program of the backward makes
STEP_CHANNELS = 256


@triton.jit
def _load_inputs(x, past, t, c, T, C, K: tl.constexpr, x_t, x_c, past_t, past_c, HAS_PAST: tl.constexpr):
    """The inputs (tokens, channels) at positions t >= -(K - 1), fp32; zero after the end and where nothing came before."""
    channel = (c < C)[None, :]
    out = tl.load(x + t[:, None] * x_t + c[None, :] * x_c, mask=((t >= 0) & (t < T))[:, None] & channel, other=0.)
    out = out.to(tl.float32)
    if HAS_PAST:
        before = tl.load(past + (t + K - 1)[:, None] * past_t + c[None, :] * past_c,
                         mask=((t < 0) & (t + K - 1 >= 0))[:, None] & channel, other=0.)
        out += before.to(tl.float32)
    return out


@triton.jit
def _forward_kernel(x, past, weight, bias, out, T, C, x_b, x_t, x_c, past_b, past_t, past_c, w_c, w_k,
                    K: tl.constexpr, HAS_PAST: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    row = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    acc = tl.zeros((TOKENS, CHANNELS), tl.float32)
    acc += tl.load(bias + c, mask=c < C, other=0.).to(tl.float32)[None, :]
    for j in tl.static_range(K):
        w = tl.load(weight + c * w_c + j * w_k, mask=c < C, other=0.).to(tl.float32)
        acc += w[None, :] * _load_inputs(x + row * x_b, past + row * past_b, t + (j - (K - 1)), c, T, C, K, x_t, x_c,
                                         past_t, past_c, HAS_PAST)
    acc *= tl.sigmoid(acc)
    tl.store(out + (row * T + t)[:, None] * C + c[None, :], acc.to(out.dtype.element_ty),
             mask=(t < T)[:, None] & (c < C)[None, :])


@triton.jit
def _backward_kernel(dout, x, past, weight, bias, dx, sums, T, C, g_b, g_t, g_c, x_b, x_t, x_c, past_b, past_t, past_c,
                     w_c, w_k, K: tl.constexpr, HAS_PAST: tl.constexpr, SPAN: tl.constexpr, TOKENS: tl.constexpr,
                     CHANNELS: tl.constexpr):
    """
    dx[s] = sum_k weight[K - 1 - k] dpre[s + k], where dpre = dout * silu'(pre) and pre is computed again from the inputs.
    sums (rows * spans, K + 1, C) receives this program's part of the weights' gradients, and last the bias's.
    """
    row = tl.program_id(2).to(tl.int64)
    span = tl.program_id(0)
    x += row * x_b
    past += row * past_b
    dout += row * g_b
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    channel = (c < C)[None, :]
    b = tl.load(bias + c, mask=c < C, other=0.).to(tl.float32)[None, :]
    sums += (row * tl.num_programs(0) + span) * (K + 1) * C
    taps = tl.arange(0, triton.next_power_of_2(K + 1))
    total = tl.zeros((triton.next_power_of_2(K + 1), CHANNELS), tl.float32)
    for start in range(0, tl.minimum(SPAN, T - span * SPAN), TOKENS):
        t = span.to(tl.int64) * SPAN + start + tl.arange(0, TOKENS)
        grad = tl.zeros((TOKENS, CHANNELS), tl.float32)
        for k in tl.static_range(K):
            pre = tl.zeros((TOKENS, CHANNELS), tl.float32) + b
            for j in tl.static_range(K):
                w = tl.load(weight + c * w_c + j * w_k, mask=c < C, other=0.).to(tl.float32)
                pre += w[None, :] * _load_inputs(x, past, t + (k + j - (K - 1)), c, T, C, K, x_t, x_c, past_t, past_c,
                                                 HAS_PAST)
            s = tl.sigmoid(pre)
            g = tl.load(dout + (t + k)[:, None] * g_t + c[None, :] * g_c, mask=(t + k < T)[:, None] & channel, other=0.)
            dpre = g.to(tl.float32) * s * (1 + pre * (1 - s))
            w = tl.load(weight + c * w_c + (K - 1 - k) * w_k, mask=c < C, other=0.).to(tl.float32)
            grad += w[None, :] * dpre
            if k == 0:
                for j in tl.static_range(K):
                    window = _load_inputs(x, past, t + (j - (K - 1)), c, T, C, K, x_t, x_c, past_t, past_c, HAS_PAST)
                    total += tl.where(taps[:, None] == j, tl.sum(dpre * window, 0)[None, :], 0.)
                total += tl.where(taps[:, None] == K, tl.sum(dpre, 0)[None, :], 0.)
        tl.store(dx + (row * T + t)[:, None] * C + c[None, :], grad.to(dx.dtype.element_ty), mask=(t < T)[:, None] & channel)
    tl.store(sums + taps[:, None] * C + c[None, :], total, mask=(taps <= K)[:, None] & channel)


@triton.jit
def _step_kernel(x, state, weight, bias, out, C, x_b, x_c, s_b, s_c, s_k, w_c, w_k, K: tl.constexpr,
                 CHANNELS: tl.constexpr):
    """Moves the window of each channel on by one token, in place, then computes that token's output."""
    row = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    k = tl.arange(0, triton.next_power_of_2(K))
    inside = (k < K)[:, None] & (c < C)[None, :]
    new = tl.load(x + row * x_b + c * x_c, mask=c < C, other=0.)
    at = state + row * s_b + k[:, None] * s_k + c[None, :] * s_c
    window = tl.load(at + s_k, mask=inside & (k < K - 1)[:, None], other=0.)
    window = tl.where((k == K - 1)[:, None], new[None, :], window)
    tl.debug_barrier()  # the entry that one thread overwrites may be another one's to read
    tl.store(at, window, mask=inside)
    w = tl.load(weight + c[None, :] * w_c + k[:, None] * w_k, mask=inside, other=0.).to(tl.float32)
    acc = tl.sum(w * window.to(tl.float32), 0) + tl.load(bias + c, mask=c < C, other=0.).to(tl.float32)
    tl.store(out + row * C + c, (acc * tl.sigmoid(acc)).to(out.dtype.element_ty), mask=c < C)


def _past(past: torch.Tensor | None, x: torch.Tensor) -> tuple:
    """The pointer and strides that the kernels take for `past`; without one they never look at them."""
    return (x, 0, 0, 0) if past is None else (past, *past.stride())


def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, past: torch.Tensor | None) -> torch.Tensor:
    """x (b,T,C), weight (C,K), bias (C), past (b,K-1,C) or None, the inputs before token 0 -> y (b,T,C), contiguous."""
    b, T, C = x.shape
    out = x.new_empty(x.shape)
    past, *past_strides = _past(past, x)
    grid = triton.cdiv(T, FORWARD_TOKENS), triton.cdiv(C, CHANNELS), b
    with torch.cuda.device(x.device.index):
        _forward_kernel[grid](x, past, weight, bias, out, T, C, *x.stride(), *past_strides, *weight.stride(),
                              K=weight.size(1), HAS_PAST=past is not x, TOKENS=FORWARD_TOKENS, CHANNELS=CHANNELS,
                              num_warps=4)
    return out


def backward(dout: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, past: torch.Tensor | None,
             ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x (contiguous, x's dtype), weight and bias (their dtypes) from dout (b,T,C); the rest as in forward."""
    (b, T, C), K = x.shape, weight.size(1)
    spans = triton.cdiv(T, SPAN)
    dx, sums = x.new_empty(x.shape), x.new_empty(b * spans, K + 1, C, dtype=torch.float32)
    past, *past_strides = _past(past, x)
    with torch.cuda.device(x.device.index):
        _backward_kernel[spans, triton.cdiv(C, CHANNELS), b](
            dout, x, past, weight, bias, dx, sums, T, C, *dout.stride(), *x.stride(), *past_strides, *weight.stride(),
            K=K, HAS_PAST=past is not x, SPAN=SPAN, TOKENS=BACKWARD_TOKENS, CHANNELS=CHANNELS, num_warps=4)
    total = sums.sum(0)
    return dx, total[:K].mT.to(weight.dtype).contiguous(), total[K].to(bias.dtype, copy=True)  # no view into `total`


def step(x: torch.Tensor, state: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """One token: x (b,C); state (b,C,K), the last K inputs, newest last, advanced in place -> y (b,C), contiguous."""
    b, C = x.shape
    out = x.new_empty(x.shape)
    with torch.cuda.device(x.device.index):
        _step_kernel[triton.cdiv(C, STEP_CHANNELS), b](
            x, state, weight, bias, out, C, *x.stride(), *state.stride(), *weight.stride(), K=weight.size(1),
            CHANNELS=STEP_CHANNELS, num_warps=4)
    return out
