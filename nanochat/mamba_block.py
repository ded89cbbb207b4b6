"""
The Mamba-2 mixer: in_proj -> causal conv + silu -> state space scan -> gated norm -> out_proj.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

FP32_PARAMS = ("A_log", "dt_bias", "D", "norm.weight", "conv1d.weight", "conv1d.bias")


def ssd(x, dt, A, B, C, D, chunk_size, initial_state=None):
    b, T, H, P = x.shape
    G, N = B.shape[2:]
    R = H // G
    acc = torch.promote_types(x.dtype, torch.float32)
    S = x.new_zeros(b, H, P, N, dtype=acc) if initial_state is None else initial_state.to(acc)
    S = S.reshape(b * G, R * P, N)
    ys = []
    dtf = dt.to(acc)
    for xc, dtc, Bc, Cc in zip(*(t.split(chunk_size, dim=1) for t in (x, dtf, B, C))):
        Q = xc.size(1)
        a = (dtc * A.to(acc)).transpose(1, 2)                              # (b,H,Q)
        cum = a.cumsum(-1)
        Bg = Bc.transpose(1, 2).reshape(b * G, Q, N)
        Cg = Cc.transpose(1, 2).reshape(b * G, Q, N)
        scores = torch.tril(Cg @ Bg.mT).view(b, G, 1, Q, Q)
        L = (cum.unsqueeze(-1) - cum.unsqueeze(-2)).clamp(max=0).exp() * dtc.transpose(1, 2).unsqueeze(-2)
        M = (scores * L.view(b, G, R, Q, Q)).to(x.dtype).view(b, H, Q, Q)
        y = (M @ xc.transpose(1, 2)).transpose(1, 2)                       # (b,Q,H,P)
        off = (Cg @ S.to(x.dtype).mT).view(b, G, Q, R, P).transpose(1, 2).reshape(b, Q, H, P)
        y = y + off * cum.exp().transpose(1, 2).unsqueeze(-1) + xc * D.to(acc).unsqueeze(-1)
        ys.append(y.to(x.dtype))
        w = (cum[..., -1:] - cum).exp() * dtc.transpose(1, 2)              # (b,H,Q)
        xw = (xc * w.transpose(1, 2).unsqueeze(-1)).to(x.dtype)
        xw = xw.view(b, Q, G, R * P).transpose(1, 2).reshape(b * G, Q, R * P)
        S = (S.view(b, H, P, N) * cum[..., -1].exp()[..., None, None]).view(b * G, R * P, N) + (xw.mT @ Bg).to(acc)
    return torch.cat(ys, 1), S.view(b, H, P, N)


class MambaState:
    def __init__(self, conv_state, ssm_state):
        self.conv_state, self.ssm_state = conv_state, ssm_state

    def clone(self):
        return MambaState(self.conv_state.clone(), self.ssm_state.clone())

    def copy_(self, other):
        self.conv_state.copy_(other.conv_state)
        self.ssm_state.copy_(other.ssm_state)
        return self

    def __getitem__(self, rows):
        return MambaState(self.conv_state[rows], self.ssm_state[rows])

    def __setitem__(self, rows, other):
        self.conv_state[rows] = other.conv_state
        self.ssm_state[rows] = other.ssm_state


class _Linear(nn.Linear):
    def reset_parameters(self):
        pass


class _Conv1d(nn.Conv1d):
    def reset_parameters(self):
        pass


class GatedRMSNorm(nn.Module):
    def __init__(self, size, group_size, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.group_size, self.eps = group_size, eps

    def forward(self, y, z):
        v = y.float() * F.silu(z.float())
        v = F.rms_norm(v.unflatten(-1, (-1, self.group_size)), (self.group_size,), eps=self.eps).flatten(-2)
        return (v * self.weight.float()).to(y.dtype)


class Mamba2(nn.Module):
    def __init__(self, d_model, d_state=128, d_conv=4, expand=2, headdim=64, ngroups=1, chunk_size=None,
                 backend="auto"):
        super().__init__()
        d_inner = expand * d_model
        for a, b, what in ((d_inner, headdim, "d_inner by headdim"), (d_inner, ngroups, "d_inner by ngroups")):
            if a % b:
                raise ValueError(f"{what}: {a} % {b} != 0")
        if (d_inner // headdim) % ngroups:
            raise ValueError("heads by groups")
        self.d_model, self.d_state, self.d_conv, self.headdim, self.ngroups = d_model, d_state, d_conv, headdim, ngroups
        self.d_inner, self.nheads, self.conv_dim = d_inner, d_inner // headdim, d_inner + 2 * ngroups * d_state
        self.chunk_size, self.backend = chunk_size or 64, backend
        self.dt_bias = nn.Parameter(torch.empty(self.nheads))
        self.A_log = nn.Parameter(torch.empty(self.nheads))
        self.D = nn.Parameter(torch.empty(self.nheads))
        self.in_proj = _Linear(d_model, d_inner + self.conv_dim + self.nheads, bias=False)
        self.conv1d = _Conv1d(self.conv_dim, self.conv_dim, d_conv, groups=self.conv_dim, padding=d_conv - 1)
        self.norm = GatedRMSNorm(d_inner, d_inner // ngroups)
        self.out_proj = _Linear(d_inner, d_model, bias=False)
        self._mark()

    def _mark(self):
        for p in (self.A_log, self.dt_bias, self.D):
            p._no_weight_decay = True

    @torch.no_grad()
    def init_weights(self):
        nn.init.kaiming_uniform_(self.in_proj.weight, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.conv1d.weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(self.d_conv)
        nn.init.uniform_(self.conv1d.bias, -bound, bound)
        dt = torch.exp(torch.rand_like(self.dt_bias) * (math.log(0.1) - math.log(1e-3)) + math.log(1e-3)).clamp(min=1e-4)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        self.A_log.uniform_(1, 16).log_()
        self.D.fill_(1)
        self.norm.weight.fill_(1)
        nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
        self._mark()

    def new_state(self, batch, device, dtype):
        return MambaState(torch.zeros(batch, self.conv_dim, self.d_conv, device=device, dtype=dtype),
                          torch.zeros(batch, self.nheads, self.headdim, self.d_state, device=device))

    def flops_per_token(self, write_only=False):
        z, C = (0, 0) if write_only else (self.d_inner, self.ngroups * self.d_state)
        return {"in_proj": 2 * self.d_model * (z + self.conv_dim + self.nheads),
                "conv": 2 * self.d_conv * (self.conv_dim - (self.ngroups * self.d_state - C)),
                "scan": 2 * self.d_inner * self.d_state * (1 if write_only else 2),
                "out_proj": 0 if write_only else 2 * self.d_inner * self.d_model}

    def forward(self, u, state=None, write_only=False, lengths=None):
        b, T, _ = u.shape
        zxbcdt = F.linear(u, self.in_proj.weight.to(u.dtype))
        z, xBC, dt = zxbcdt.split([self.d_inner, self.conv_dim, self.nheads], dim=-1)
        dt = F.softplus(dt.float() + self.dt_bias.float())
        if lengths is not None:
            dt = dt * (torch.arange(T, device=u.device) < lengths[:, None]).unsqueeze(-1)
        past = xBC.new_zeros(b, self.d_conv, self.conv_dim) if state is None else state.conv_state.mT
        full = torch.cat([past, xBC], 1)                                   # (b, d_conv+T, conv_dim)
        w = self.conv1d.weight.squeeze(1).float()
        conv = self.conv1d.bias.float() + sum(full[:, j + 1:j + 1 + T].float() * w[:, j] for j in range(self.d_conv))
        conv = F.silu(conv).to(u.dtype)
        GN = self.ngroups * self.d_state
        x, B, C = conv.split([self.d_inner, GN, GN], dim=-1)
        y, last = ssd(x.reshape(b, T, self.nheads, self.headdim), dt, -torch.exp(self.A_log.float()),
                      B.reshape(b, T, self.ngroups, -1), C.reshape(b, T, self.ngroups, -1), self.D.float(),
                      self.chunk_size, None if state is None else state.ssm_state.clone())
        if state is not None:
            with torch.no_grad():
                if lengths is None:
                    tail = full[:, -self.d_conv:]
                else:
                    idx = lengths[:, None] + torch.arange(self.d_conv, device=u.device)
                    tail = full.gather(1, idx.unsqueeze(-1).expand(-1, -1, self.conv_dim))
                state.conv_state.copy_(tail.mT)
                state.ssm_state.copy_(last)
        if write_only:
            return None
        y = self.norm(y.reshape(b, T, self.d_inner), z)
        return F.linear(y, self.out_proj.weight.to(y.dtype))
