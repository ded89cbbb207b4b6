"""
How the Mamba-2 mixer computes between its two projections: causal conv + silu, state space scan, gated norm.

The PyTorch form (`mixer`) runs on any device: chunked SSD (Dao & Gu 2024, arXiv 2405.21060, section 6), one chunk of
tokens after another. Inside a chunk everything is matrix products; between chunks only the state is carried. All the
steps of one chunk are done before the next begins, so their temporaries stay in the CPU's cache and no large tensor is
made besides what is returned: on a CPU, writing and faulting in large temporaries costs more than the arithmetic. The
backward pass walks the chunks in reverse, recomputing conv, decay and scores from the in_proj output.
Forward and backward are torch.library custom ops: torch.compile sees one node for each and keeps one graph.

Shape letters: b batch, T tokens, Q tokens of a chunk, H heads, P headdim, G groups, R = H/G heads of a group, N d_state,
K conv width. dtype = that of the activations (matrix products), acc = at least fp32 (decay, cumsum, states, norm).
"""
import torch
import torch.nn.functional as F

from nanochat.kernels import upstream

NORM_EPS = 1e-5

# ---------------------------------------------------------------------------------------------------------------------
# one chunk of the scan, forward and backward


def _to(out, a, b):
    """out <- a * b, converting; two passes are faster than letting torch.mul convert."""
    if out.dtype == a.dtype == b.dtype:
        return torch.mul(a, b, out=out)
    return out.copy_(a * b)


def _chunk_terms(x, dt, A, B, C, dtype):
    """What both directions need of one chunk. x (b,Q,H,P), dt (b,Q,H), B and C (b,Q,G,N) in acc; C may be None."""
    b, Q, H, P = x.shape
    G, N = B.shape[2:]
    cum = (dt * A).transpose(1, 2).cumsum(-1)                                   # (b,H,Q) log decay since the chunk began
    grow = cum.exp().transpose(1, 2).unsqueeze(-1)                              # (b,Q,H,1) decay of the incoming state
    fade = (cum[..., -1:] - cum).exp().transpose(1, 2).unsqueeze(-1)            # (b,Q,H,1) decay until the chunk's end
    Bg = x.new_empty(b, G, Q, N, dtype=dtype).copy_(B.transpose(1, 2)).view(b * G, Q, N)
    Xt = torch.mul(x, dt.unsqueeze(-1), out=x.new_empty(b, Q, H, P))
    Xf = x.new_empty(b, G, Q, H // G, P, dtype=dtype)                           # inputs faded to the chunk's end
    _to(Xf.transpose(1, 2), Xt.view(b, Q, G, -1, P), fade.view(b, Q, G, -1, 1))
    Xf = Xf.view(b * G, Q, -1)                                                  # (bG,Q,RP)
    if C is None:
        return cum, grow, fade, Bg, Xf, None, None, None, None
    Cg = x.new_empty(b, G, Q, N, dtype=dtype).copy_(C.transpose(1, 2)).view(b * G, Q, N)
    Xh = x.new_empty(b, H, Q, P, dtype=dtype).copy_(Xt.transpose(1, 2)).view(b * H, Q, P)
    scores = torch.bmm(Cg, Bg.mT).tril_().to(x.dtype).view(b, G, 1, Q, Q)       # one per group, not per head
    # Above the diagonal the exponent is positive and could overflow; the clamp makes it finite, scores' zeros kill it.
    L = (cum.unsqueeze(-1) - cum.unsqueeze(-2)).clamp_(max=0).exp_().view(b, G, -1, Q, Q)
    return cum, grow, fade, Bg, Xf, Cg, Xh, scores, L


def _chunk_forward(x, dt, A, B, C, D, S, S_copy):
    """
    Advances S (bG,RP,N; acc) in place over one chunk and returns y (b,Q,H,P) in acc, None if C is None.
    S_copy (bG,RP,N) in the compute dtype receives the incoming state.
    """
    b, Q, H, P = x.shape
    G, dtype = B.size(2), S_copy.dtype
    _, grow, _, Bg, Xf, Cg, Xh, scores, L = _chunk_terms(x, dt, A, B, C, dtype)
    y = None
    if C is not None:
        S_copy.copy_(S)
        M = x.new_empty(b, G, H // G, Q, Q, dtype=dtype)
        _to(M, L, scores)
        intra = torch.bmm(M.view(b * H, Q, Q), Xh).view(b, H, Q, P)
        inter = torch.bmm(Cg, S_copy.mT).view(b, G, Q, H // G, P)
        y = x.new_empty(b, Q, H, P)     # token-major whatever the layouts of its terms
        torch.mul(inter.transpose(1, 2), grow.view(b, Q, G, -1, 1), out=y.view(b, Q, G, -1, P))
        y.add_(intra.transpose(1, 2)).addcmul_(x, D.unsqueeze(-1))
    S.view(b, H, -1).mul_(grow[:, -1])
    if dtype == S.dtype:
        S.baddbmm_(Xf.mT, Bg)
    else:
        S.add_(torch.bmm(Xf.mT, Bg))
    return y


def _chunk_backward(dy, x, dt, A, B, C, D, S, dS, dx, dB, dC, dA, dD):
    """
    dy (b,Q,H,P) acc; S (bG,RP,N) the incoming state in the compute dtype; dS (bG,RP,N) acc: gradient of the outgoing
    state, turned in place into that of the incoming one. Writes dx, dB, dC, adds to dA, dD (H), returns ddt (b,Q,H).
    """
    b, Q, H, P = x.shape
    G, N = B.shape[2:]
    R, dtype = H // G, S.dtype
    cum, grow, fade, Bg, Xf, Cg, Xh, scores, L = _chunk_terms(x, dt, A, B, C, dtype)
    dyh = dy.new_empty(b, H, Q, P, dtype=dtype).copy_(dy.transpose(1, 2)).view(b * H, Q, P)
    dyg = dy.new_empty(b, G, Q, R, P, dtype=dtype)
    _to(dyg.transpose(1, 2), dy.view(b, Q, G, R, P), grow.view(b, Q, G, R, 1))
    dyg = dyg.view(b * G, Q, R * P)
    dSc = dS.to(dtype)

    # state -> output: y += grow * C S^T
    inter = torch.bmm(Cg, S.mT)
    dcum = inter.to(dS.dtype).mul_(dyg).view(b, G, Q, R, P).sum(-1).transpose(2, 3).reshape(b, H, Q)
    dCg = torch.bmm(dyg, S)
    # input -> state: S' = exp(cum_last) S + Xf^T B
    dXf = torch.bmm(Bg, dSc.mT)                                                  # (bG,Q,RP)
    dBg = torch.bmm(Xf, dSc)
    q = dXf.to(dS.dtype).mul(Xf).view(b, G, Q, R, P).sum(-1).transpose(2, 3).reshape(b, H, Q)
    dcum -= q
    last = q.sum(-1)
    last += (dS * S).view(b, H, -1).sum(-1) * cum[..., -1].exp()
    dS.view(b, H, -1).mul_(grow[:, -1])
    if dtype == dS.dtype:
        dS.baddbmm_(dyg.mT, Cg)
    else:
        dS.add_(torch.bmm(dyg.mT, Cg))
    # inside the chunk: y += (scores * L) X
    dM = torch.bmm(dyh, Xh.mT).view(b, G, R, Q, Q)
    K = dM * L
    dscores = K.sum(2).tril_().to(dtype).view(b * G, Q, Q)
    K *= scores
    K = K.view(b, H, Q, Q)
    dcum += K.sum(-1)
    dcum -= K.sum(-2)
    dcum[..., -1] += last
    M = dy.new_empty(b, G, R, Q, Q, dtype=dtype)
    _to(M, L, scores)
    dXt = dy.new_empty(b, Q, H, P)
    torch.mul(dXf.view(b, G, Q, R, P).transpose(1, 2), fade.view(b, Q, G, R, 1), out=dXt.view(b, Q, G, R, P))
    dXt.add_(torch.bmm(M.view(b * H, Q, Q).mT, dyh).view(b, H, Q, P).transpose(1, 2))
    dB.copy_(dBg.add_(torch.bmm(dscores.mT, Cg)).view(b, G, Q, N).transpose(1, 2))
    dC.copy_(dCg.add_(torch.bmm(dscores, Bg)).view(b, G, Q, N).transpose(1, 2))
    ddt = (dXt * x).sum(-1)                                                      # (b,Q,H)
    torch.mul(dXt, dt.unsqueeze(-1), out=dx)
    dx.addcmul_(dy, D.unsqueeze(-1))
    dD += (dy * x).sum((0, 1, 3))
    da = dcum.flip(-1).cumsum(-1).flip(-1).transpose(1, 2)                       # (b,Q,H)
    dA += (da * dt).sum((0, 1))
    return ddt.addcmul_(da, A)


# ---------------------------------------------------------------------------------------------------------------------
# the scan alone


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, chunk_size, initial_state):
        b, T, H, P = x.shape
        G, N = B.shape[2:]
        acc = torch.promote_types(x.dtype, torch.float32)
        A, D = A.to(acc), D.to(acc)
        S = x.new_zeros(b * G, H // G * P, N, dtype=acc)
        if initial_state is not None:
            S.view(b, H, P, N).copy_(initial_state)
        states = x.new_empty(-(-T // chunk_size), *S.shape)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        for i, t in enumerate(range(0, T, chunk_size)):
            c = slice(t, min(t + chunk_size, T))
            y[:, c] = _chunk_forward(*(v[:, c].to(acc) for v in (x, dt)), A, *(v[:, c].to(acc) for v in (B, C)), D,
                                     S, states[i])
        ctx.save_for_backward(x, dt, A, B, C, D, states)
        ctx.chunk_size, ctx.state_dtype = chunk_size, None if initial_state is None else initial_state.dtype
        return y, S.view(b, H, P, N)

    @staticmethod
    def backward(ctx, dy, dS):
        x, dt, A, B, C, D, states = ctx.saved_tensors
        b, T, H, P = x.shape
        acc = A.dtype
        dS = dS.to(acc).reshape(states.shape[1:]).clone()
        dx, ddt, dB, dC = (torch.empty_like(v, dtype=acc) for v in (x, dt, B, C))
        dA, dD = torch.zeros_like(A), torch.zeros_like(D)
        for i in reversed(range(states.size(0))):
            c = slice(i * ctx.chunk_size, min((i + 1) * ctx.chunk_size, T))
            xc, dtc, Bc, Cc, dyc = (v[:, c].to(acc) for v in (x, dt, B, C, dy))
            ddt[:, c] = _chunk_backward(dyc, xc, dtc, A, Bc, Cc, D, states[i], dS, dx[:, c], dB[:, c], dC[:, c], dA, dD)
        dS = dS.view(b, H, P, -1).to(ctx.state_dtype) if ctx.state_dtype else None
        return dx.to(x.dtype), ddt.to(dt.dtype), dA, dB.to(B.dtype), dC.to(C.dtype), dD, None, dS


def ssd(x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor,
        chunk_size: int, initial_state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The selective state space scan in chunks (arXiv 2405.21060, section 6): per head h of group g
        S_t = exp(dt_t A_h) S_(t-1) + dt_t x_t B_t^T,    y_t = S_t C_t + D_h x_t.
    x (b,T,H,P), dt (b,T,H) >= 0, A (H) < 0, B and C (b,T,G,N), D (H), initial_state (b,H,P,N) or None for zeros
    -> y (b,T,H,P) in x's dtype, final state (b,H,P,N) in fp32 (fp64 for fp64 x). Any T >= 1; time and memory O(T).
    Matrix products run in x's dtype, the rest in fp32. Exact gradients for every tensor, initial_state included.
    """
    with torch.autocast(x.device.type, enabled=False):
        return _SSD.apply(x, dt, A, B, C, D, chunk_size, initial_state)


# ---------------------------------------------------------------------------------------------------------------------
# conv, scan and gated norm


def _conv_chunk(xBC, past, t0, t1, weight, bias):
    """
    The inputs of tokens t0-K+1..t1-1 in acc (b,K-1+Q,cd), and the causal depthwise conv of tokens t0..t1-1 (b,Q,cd).
    past (b,K-1,cd): inputs before token 0. weight (K,cd), bias (cd) in acc; cd channels may be the leading part.
    """
    K, cd = weight.shape
    src = xBC[:, t0 - K + 1:t1] if t0 >= K - 1 else torch.cat([past, xBC[:, :t1]], 1)[:, t0:]
    win = src[..., :cd].to(weight.dtype)
    pre = torch.addcmul(bias, win[:, :t1 - t0], weight[0])
    for j in range(1, K):
        pre.addcmul_(win[:, j:j + t1 - t0], weight[j])
    return win, pre


def _gated_norm(y, z, groups):
    """What RMSNorm over each group of y * silu(z) needs, all acc: silu(z), y * silu(z) and 1 / rms (b,Q,G,1)."""
    gate = F.silu(z)
    v = y * gate
    length = torch.linalg.vector_norm(v.view(*v.shape[:-1], groups, -1), dim=-1, keepdim=True)  # (b,Q,G,1)
    r = length.square_().mul_(groups / v.size(-1)).add_(NORM_EPS).rsqrt_()
    return gate, v, r


def _acc(t, acc):
    return t.detach().to(acc)


@torch.library.custom_op("adamba::mixer", mutates_args=())
def mixer(zxbcdt: torch.Tensor, conv_w: torch.Tensor, conv_b: torch.Tensor, dt_bias: torch.Tensor, A_log: torch.Tensor,
          D: torch.Tensor, norm_w: torch.Tensor, conv_state: torch.Tensor | None, ssm_state: torch.Tensor | None,
          lengths: torch.Tensor | None, ngroups: int, chunk_size: int, write_only: bool, save: bool,
          ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    zxbcdt (b,T,z+x+B+C+dt) -> out (b,T,d_inner) normed, ready for out_proj; y before the gated norm and the chunks'
    incoming states (what backward needs, if save); final state (b,H,P,N). write_only: zxbcdt comes without z, and only
    the final state is computed. No gradient flows into or out of the states. Parameters as in Mamba2, any dtype.
    """
    d_inner, H, G = norm_w.numel(), D.numel(), ngroups
    conv_dim, K = conv_w.shape[0], conv_w.shape[-1]
    N, P = (conv_dim - d_inner) // (2 * G), d_inner // H
    b, T, _ = zxbcdt.shape
    dtype = zxbcdt.dtype
    acc = torch.promote_types(dtype, torch.float32)
    z = None if write_only else zxbcdt[..., :d_inner]
    xBC, dt_raw = zxbcdt[..., -H - conv_dim:-H], zxbcdt[..., -H:]
    cd = conv_dim - G * N if write_only else conv_dim
    with torch.no_grad(), torch.autocast(zxbcdt.device.type, enabled=False):
        wt, bias = _acc(conv_w[:cd], acc).squeeze(1).t().contiguous(), _acc(conv_b[:cd], acc)
        dt = F.softplus(dt_raw.to(acc) + _acc(dt_bias, acc))
        if lengths is not None:
            dt.masked_fill_((torch.arange(T, device=dt.device) >= lengths[:, None]).unsqueeze(-1), 0)
        A, Dp, nw = -_acc(A_log, acc).exp(), _acc(D, acc), _acc(norm_w, acc)
        past = xBC.new_zeros(b, K - 1, conv_dim) if conv_state is None else conv_state[..., 1:].mT
        S = zxbcdt.new_zeros(b * G, d_inner // G, N, dtype=acc)
        if ssm_state is not None:
            S.view(b, H, P, N).copy_(ssm_state)
        nc = -(-T // chunk_size)
        states = zxbcdt.new_empty((nc, *S.shape) if save else 0)
        S_copy = torch.empty_like(S, dtype=dtype)
        ys = zxbcdt.new_empty((b, T, d_inner) if save else 0)
        out = zxbcdt.new_empty((b, T, d_inner) if not write_only else 0)
        for i, t0 in enumerate(range(0, T, chunk_size)):
            t1 = min(t0 + chunk_size, T)
            Q = t1 - t0
            _, pre = _conv_chunk(xBC, past, t0, t1, wt, bias)
            act = F.silu(pre, inplace=True)
            x, B = act[..., :d_inner].view(b, Q, H, P), act[..., d_inner:d_inner + G * N].view(b, Q, G, N)
            C = None if write_only else act[..., d_inner + G * N:].view(b, Q, G, N)
            y = _chunk_forward(x, dt[:, t0:t1], A, B, C, Dp, S, states[i] if save else S_copy)
            if write_only:
                continue
            y = y.view(b, Q, d_inner)
            if save:
                ys[:, t0:t1] = y
            _, v, r = _gated_norm(y, z[:, t0:t1].to(acc), G)
            v.view(b, Q, G, -1).mul_(r)
            _to(out[:, t0:t1], v, nw)
    return out, ys, states, S.view(b, H, P, N)


@mixer.register_fake
def _(zxbcdt, conv_w, conv_b, dt_bias, A_log, D, norm_w, conv_state, ssm_state, lengths, ngroups, chunk_size,
      write_only, save):
    b, T, _ = zxbcdt.shape
    d_inner, H, conv_dim = norm_w.numel(), D.numel(), conv_w.shape[0]
    N, acc = (conv_dim - d_inner) // (2 * ngroups), torch.promote_types(zxbcdt.dtype, torch.float32)
    nc = -(-T // chunk_size)
    return (zxbcdt.new_empty((b, T, d_inner) if not write_only else 0), zxbcdt.new_empty((b, T, d_inner) if save else 0),
            zxbcdt.new_empty((nc, b * ngroups, d_inner // ngroups, N) if save else 0),
            zxbcdt.new_empty(b, H, d_inner // H, N, dtype=acc))


@torch.library.custom_op("adamba::mixer_backward", mutates_args=())
def mixer_backward(dout: torch.Tensor, ys: torch.Tensor, states: torch.Tensor, zxbcdt: torch.Tensor,
                   conv_w: torch.Tensor, conv_b: torch.Tensor, dt_bias: torch.Tensor, A_log: torch.Tensor,
                   D: torch.Tensor, norm_w: torch.Tensor, conv_state: torch.Tensor | None,
                   lengths: torch.Tensor | None, ngroups: int, chunk_size: int) -> list[torch.Tensor]:
    d_inner, H, G = norm_w.numel(), D.numel(), ngroups
    cd, K = conv_w.shape[0], conv_w.shape[-1]
    N, P = (cd - d_inner) // (2 * G), d_inner // H
    b, T, _ = zxbcdt.shape
    acc = torch.promote_types(zxbcdt.dtype, torch.float32)
    z, xBC, dt_raw = zxbcdt.split([d_inner, cd, H], -1)
    with torch.no_grad(), torch.autocast(zxbcdt.device.type, enabled=False):
        wt, bias = _acc(conv_w, acc).squeeze(1).t().contiguous(), _acc(conv_b, acc)
        dt_in = dt_raw.to(acc) + _acc(dt_bias, acc)
        dt = F.softplus(dt_in)
        if lengths is not None:
            dead = (torch.arange(T, device=dt.device) >= lengths[:, None]).unsqueeze(-1)
            dt.masked_fill_(dead, 0)
        A, Dp, nw = -_acc(A_log, acc).exp(), _acc(D, acc), _acc(norm_w, acc)
        past = xBC.new_zeros(b, K - 1, cd) if conv_state is None else conv_state[..., 1:].mT
        dS = torch.zeros_like(states[0], dtype=acc)
        grad = torch.empty_like(zxbcdt)
        dz, dxBC, ddt_raw = grad.split([d_inner, cd, H], -1)
        dA, dD, dnw, dbias, dwt = (torch.zeros_like(p) for p in (A, Dp, nw, bias, wt))
        ddt = torch.empty_like(dt)
        after = zxbcdt.new_zeros(b, K - 1, cd, dtype=acc)   # gradients of the next chunk's first conv outputs
        for i in reversed(range(states.size(0))):
            t0, t1 = i * chunk_size, min((i + 1) * chunk_size, T)
            Q = t1 - t0
            win, pre = _conv_chunk(xBC, past, t0, t1, wt, bias)
            act = F.silu(pre)
            x, B, C = act.split([d_inner, G * N, G * N], -1)
            y, zc, g = (v[:, t0:t1].to(acc) for v in (ys, z, dout))
            # gated norm: out = v r w, v = y silu(z)
            gate, v, r = _gated_norm(y, zc, G)
            u = (v.view(b, Q, G, -1) * r)                                       # (b,Q,G,d_inner/G) normed
            gu = g * u.view(b, Q, d_inner)
            dnw += gu.sum((0, 1))
            m = gu.mul_(nw).view(b, Q, G, -1).mean(-1, keepdim=True)
            dv = (g * nw).view(b, Q, G, -1).sub_(u.mul_(m)).mul_(r).view(b, Q, d_inner)
            dz[:, t0:t1] = torch.ops.aten.silu_backward(y * dv, zc)
            dy = dv.mul_(gate).view(b, Q, H, P)
            dact = torch.empty_like(act)
            dx, dB, dC = dact.split([d_inner, G * N, G * N], -1)
            ddt[:, t0:t1] = _chunk_backward(
                dy, x.view(b, Q, H, P), dt[:, t0:t1], A, B.view(b, Q, G, N), C.view(b, Q, G, N), Dp, states[i], dS,
                dx.view(b, Q, H, P), dB.view(b, Q, G, N), dC.view(b, Q, G, N), dA, dD)
            # conv: pre_t = bias + sum_j w_j x_(t-K+1+j)
            own = torch.ops.aten.silu_backward(dact, pre)
            dpre = torch.cat([own, after], 1)
            after = dpre[:, :K - 1].clone()
            dbias += own.sum((0, 1))
            dw = torch.mul(dpre[:, K - 1:], wt[0])
            for j in range(K):
                dwt[j] += (own * win[:, j:j + Q]).sum((0, 1))
                if j:
                    dw.addcmul_(dpre[:, K - 1 - j:K - 1 - j + Q], wt[j])
            dxBC[:, t0:t1] = dw
        if lengths is not None:
            ddt.masked_fill_(dead, 0)
        ddt.mul_(torch.sigmoid(dt_in))
        ddt_raw.copy_(ddt)
    dweight = torch.empty_like(conv_w).copy_(dwt.t().unsqueeze(1))  # compiled code relies on the strides promised below
    return [grad, dweight, dbias.to(conv_b.dtype), ddt.sum((0, 1)).to(dt_bias.dtype),
            (dA * A).to(A_log.dtype), dD.to(D.dtype), dnw.to(norm_w.dtype)]


@mixer_backward.register_fake
def _(dout, ys, states, zxbcdt, conv_w, conv_b, dt_bias, A_log, D, norm_w, conv_state, lengths, ngroups, chunk_size):
    return [torch.empty_like(v) for v in (zxbcdt, conv_w, conv_b, dt_bias, A_log, D, norm_w)]


def _mixer_setup(ctx, inputs, output):
    *tensors, ngroups, chunk_size, write_only, save = inputs
    assert save and not write_only, "gradients need save=True"
    zxbcdt, conv_w, conv_b, dt_bias, A_log, D, norm_w, conv_state, _, lengths = tensors
    ctx.save_for_backward(output[1], output[2], zxbcdt, conv_w, conv_b, dt_bias, A_log, D, norm_w, conv_state, lengths)
    ctx.sizes = ngroups, chunk_size


def _mixer_grad(ctx, dout, *_):
    grads = torch.ops.adamba.mixer_backward(dout, *ctx.saved_tensors, *ctx.sizes)
    return (*grads, *[None] * 7)


mixer.register_autograd(_mixer_grad, setup_context=_mixer_setup)


# ---------------------------------------------------------------------------------------------------------------------
# the kernel form: Triton kernels of mamba-ssm and our own, each a custom operator that torch.compile does not look inside


def why_no_cuda() -> Exception | None:
    """None where the kernels can run, else the error that says what is missing, why, and the command that helps."""
    if not torch.cuda.is_available():
        return ValueError(f"the Mamba kernels need a CUDA device, and torch {torch.__version__} sees none here; on a "
                          f"machine that has one, install a CUDA build of torch, then run `{upstream.COMMAND}`")
    if torch.version.cuda and torch.cuda.get_device_capability() < (8, 0):
        return ValueError(f"Triton, which compiles the Mamba kernels, needs a GPU of compute capability 8.0 or later, and "
                          f"this one ({torch.cuda.get_device_name()}) is older")
    try:
        _conv()
        upstream.load()
    except ImportError as e:
        return ImportError(f"the Mamba kernels cannot be used: {e}")
    return None


def why_no_cuda_sizes(group_size: int) -> str | None:
    """None if the kernels take these sizes, else a sentence."""
    if group_size > 16384:
        return (f"mamba-ssm's gated norm takes groups of at most 16384 channels, got {group_size}: choose more groups, or "
                "backend='torch'")
    return None


def _conv():
    """Our convolution kernels; imported at the first use, since Triton exists for Linux only."""
    try:
        from nanochat.kernels import causal_conv
    except ModuleNotFoundError as e:
        raise ImportError(f"the Python package {e.name} is missing: run `pip install {e.name}`") from e
    return causal_conv


@torch.library.custom_op("adamba::cuda_conv", mutates_args=())
def cuda_conv(xBC: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, past: torch.Tensor | None) -> torch.Tensor:
    """silu(causal conv): xBC (b,T,C), weight (C,K), bias (C), past (b,K-1,C) inputs before token 0 -> (b,T,C)."""
    return _conv().forward(xBC, weight, bias, past)


@cuda_conv.register_fake
def _(xBC, weight, bias, past):
    return xBC.new_empty(xBC.shape)


@torch.library.custom_op("adamba::cuda_conv_backward", mutates_args=())
def cuda_conv_backward(dout: torch.Tensor, xBC: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor,
                       past: torch.Tensor | None) -> list[torch.Tensor]:
    return list(_conv().backward(dout, xBC, weight, bias, past))


@cuda_conv_backward.register_fake
def _(dout, xBC, weight, bias, past):
    return [v.new_empty(v.shape) for v in (xBC, weight, bias)]


def _cuda_conv_grad(ctx, dout):
    return (*torch.ops.adamba.cuda_conv_backward(dout, *ctx.saved_tensors), None)


cuda_conv.register_autograd(_cuda_conv_grad, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def _split_heads(act, H, d_inner, G):
    """(b,T,x+B+C) -> views x (b,T,H,P), B and C (b,T,G,N)."""
    GN = (act.size(-1) - d_inner) // 2
    x, B, C = act.split([d_inner, GN, GN], -1)
    return x.unflatten(-1, (H, -1)), B.unflatten(-1, (G, -1)), C.unflatten(-1, (G, -1))


@torch.library.custom_op("adamba::cuda_scan", mutates_args=())
def cuda_scan(act: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, D: torch.Tensor, initial: torch.Tensor | None,
              d_inner: int, ngroups: int, chunk_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    act (b,T,x+B+C), dt (b,T,H) after softplus, A and D (H), all but act fp32 -> y (b,T,H,P), final state (b,H,P,N) fp32.
    No gradient flows through the states.
    """
    x, B, C = _split_heads(act, D.numel(), d_inner, ngroups)
    out, _, _, _, _, final, *_ = upstream.load().ssd_combined._mamba_chunk_scan_combined_fwd(
        x, dt, A, B, C, chunk_size, D=D, initial_states=initial)
    return out, final.float()


@cuda_scan.register_fake
def _(act, dt, A, D, initial, d_inner, ngroups, chunk_size):
    (b, T, width), H = act.shape, D.numel()
    P, N = d_inner // H, (width - d_inner) // (2 * ngroups)
    return act.new_empty(b, T, H, P), act.new_empty(b, H, P, N, dtype=torch.float32)


@torch.library.custom_op("adamba::cuda_scan_backward", mutates_args=())
def cuda_scan_backward(dout: torch.Tensor, out: torch.Tensor, act: torch.Tensor, dt: torch.Tensor, A: torch.Tensor,
                       D: torch.Tensor, initial: torch.Tensor | None, d_inner: int, ngroups: int, chunk_size: int,
                       ) -> list[torch.Tensor]:
    dact = torch.empty_like(act)
    (x, B, C), (dx, dB, dC) = (_split_heads(a, D.numel(), d_inner, ngroups) for a in (act, dact))
    _, ddt, dA, _, _, dD, *_ = upstream.load().ssd_combined._mamba_chunk_scan_combined_bwd(
        dout.contiguous(), x, dt, A, B, C, out, chunk_size, D=D, initial_states=initial, dx=dx, dB=dB, dC=dC)
    return [dact, ddt, dA, dD]


@cuda_scan_backward.register_fake
def _(dout, out, act, dt, A, D, initial, d_inner, ngroups, chunk_size):
    return [torch.empty_like(v) for v in (act, dt, A, D)]


def _only_first(ctx, output):
    """Gradients come for output[0] alone: else autograd would fill one with zeros for the other in every backward pass."""
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _cuda_scan_setup(ctx, inputs, output):
    _only_first(ctx, output)
    ctx.save_for_backward(output[0], *inputs[:5])
    ctx.sizes = inputs[5:]


def _cuda_scan_grad(ctx, dout, _):
    return (*torch.ops.adamba.cuda_scan_backward(dout, *ctx.saved_tensors, *ctx.sizes), *[None] * 4)


cuda_scan.register_autograd(_cuda_scan_grad, setup_context=_cuda_scan_setup)


@torch.library.custom_op("adamba::cuda_norm", mutates_args=())
def cuda_norm(y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, group_size: int,
              ) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The gated norm in one pass: norm(y * silu(z)) * weight, RMS over each group of channels, computed in fp32. y and z
    (..., d), whose rows may lie apart -> the same in y's dtype, contiguous; and 1 / rms (groups * rows) fp32 for backward.
    """
    out = y.new_empty(y.shape)
    _, _, rstd = upstream.load().layernorm_gated._layer_norm_fwd(
        _rows(y), weight, None, NORM_EPS, z=_rows(z), out=_rows(out), group_size=group_size, norm_before_gate=False,
        is_rms_norm=True)
    return out, rstd


def _rows(t):
    """(..., d) as (rows, d), channels contiguous: a view wherever the rows lie at equal distances."""
    t = t.reshape(-1, t.size(-1))
    return t if t.stride(-1) == 1 else t.contiguous()


@cuda_norm.register_fake
def _(y, z, weight, group_size):
    return y.new_empty(y.shape), y.new_empty(y.numel() // group_size, dtype=torch.float32)


@torch.library.custom_op("adamba::cuda_norm_backward", mutates_args=())
def cuda_norm_backward(dout: torch.Tensor, y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor,
                       group_size: int) -> list[torch.Tensor]:
    dz = z.new_empty(z.shape)
    dy, dweight, _, _ = upstream.load().layernorm_gated._layer_norm_bwd(
        _rows(dout), _rows(y), weight, None, NORM_EPS, None, rstd, z=_rows(z), group_size=group_size,
        norm_before_gate=False, is_rms_norm=True, dz=_rows(dz))
    return [dy.contiguous().view(y.shape), dz, dweight]


@cuda_norm_backward.register_fake
def _(dout, y, z, weight, rstd, group_size):
    return [v.new_empty(v.shape) for v in (y, z, weight)]


def _cuda_norm_setup(ctx, inputs, output):
    y, z, weight, ctx.group_size = inputs
    ctx.save_for_backward(y, z, weight, output[1])
    _only_first(ctx, output)


def _cuda_norm_grad(ctx, dout, _):
    return (*torch.ops.adamba.cuda_norm_backward(dout, *ctx.saved_tensors, ctx.group_size), None)


cuda_norm.register_autograd(_cuda_norm_grad, setup_context=_cuda_norm_setup)


@torch.library.custom_op("adamba::cuda_step", mutates_args=("conv_state", "ssm_state"))
def cuda_step(xBC: torch.Tensor, dt: torch.Tensor, A_log: torch.Tensor, D: torch.Tensor, weight: torch.Tensor,
              bias: torch.Tensor, conv_state: torch.Tensor, ssm_state: torch.Tensor, ngroups: int) -> torch.Tensor:
    """One token: xBC (b,C), dt (b,H) fp32 after softplus -> y (b,H,P) in xBC's dtype; both states advance in place."""
    H, P, N = ssm_state.shape[1:]
    act = _conv().step(xBC, conv_state, weight, bias)
    x, B, C = (v.squeeze(1) for v in _split_heads(act.unsqueeze(1), H, H * P, ngroups))
    A = -torch.exp(A_log.float())
    # Upstream reads dt_bias's strides even where there is none. Stride 0 selects its kernel for one dt and A per head.
    no_bias = A.new_zeros(()).expand(H, P)
    return upstream.load().selective_state_update.selective_state_update(
        ssm_state, x, dt.unsqueeze(-1).expand(-1, -1, P), A.view(H, 1, 1).expand(H, P, N), B, C,
        D.float().unsqueeze(-1).expand(H, P), dt_bias=no_bias).contiguous()


@cuda_step.register_fake
def _(xBC, dt, A_log, D, weight, bias, conv_state, ssm_state, ngroups):
    return xBC.new_empty(ssm_state.shape[:3])
