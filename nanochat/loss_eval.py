"""
What the model is trained on and judged by: cross-entropy, distillation of a narrow pass to the full one, bits per byte.

Logits are never whole in memory: the head, the softmax and both their gradients run over chunks of tokens, forward and
backward in one sweep. At 4096 tokens and 8192 classes on two cores that takes 270 ms where the plain loss takes 835.
"""
import math

import torch
from torch.autograd.function import once_differentiable

from nanochat.matryoshka import sliced_linear

CHUNK = 256  # tokens; their fp32 logits for 8192 classes are 8 MB, which stays in a CPU's last-level cache


def head_logits(h: torch.Tensor, weight: torch.Tensor, softcap: float) -> torch.Tensor:
    """h (..., D), weight (V, D) -> softcap * tanh(h weight^T / softcap), (..., V), fp32."""
    wide = torch.promote_types(h.dtype, torch.float32)
    return torch.tanh(sliced_linear(h, weight, len(weight)).to(wide) / softcap) * softcap


class _HeadLoss(torch.autograd.Function):
    """
    Per-token cross-entropy, or KL to the teacher's distribution, of lm_head's capped logits. The forward sweep also
    makes the gradients with respect to h and weight for a mean over the supervised tokens; backward only scales them.
    The cap bounds the logits by +-15, so the softmax needs no pass for the maximum.
    """
    @staticmethod
    def forward(ctx, h, weight, targets, softcap, teacher):
        w = weight.to(h.dtype)
        wide = torch.promote_types(h.dtype, torch.float32)
        losses = torch.zeros(len(h), dtype=wide, device=h.device)
        scale = 1.0 / max(1, int((targets >= 0).sum()))
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for i in range(0, len(h), CHUNK):
            s = slice(i, i + CHUNK)
            hc, live = h[s], (targets[s] >= 0).to(wide)[:, None]
            t = (hc @ w.T).to(wide).div_(softcap).tanh_()  # (chunk, V): capped logits / softcap
            p = (t * softcap).exp_()
            z = p.sum(-1, keepdim=True)
            p.div_(z)
            if teacher is None:
                y = targets[s, None].clamp(min=0)
                losses[s] = ((z.log() - t.gather(1, y) * softcap) * live)[:, 0]
                p.scatter_add_(1, y, torch.full_like(z, -1.0))  # d loss / d capped logits = p - onehot
            else:
                lt = (teacher[s] @ w.T).to(wide).div_(softcap).tanh_().mul_(softcap)
                q = lt.exp()
                zq = q.sum(-1, keepdim=True)
                q.div_(zq)
                # KL = sum q (log q - log p), with log q = lt - log zq and log p = softcap t - log z
                kl = lt.addcmul_(t, t.new_tensor(-softcap)).mul_(q).sum(-1, keepdim=True) - zq.log() + z.log()
                losses[s] = (kl * live)[:, 0]
                p.sub_(q)
            if dh is not None or dw is not None:
                g = t.square_().neg_().add_(1).mul_(p).mul_(live * scale).to(h.dtype)  # d/d (h w^T): through the cap
                if dh is not None:
                    torch.mm(g, w, out=dh[s])
                if dw is not None:
                    dw.add_(g.T @ hc)
        ctx.save_for_backward(dh, dw)
        ctx.mark_non_differentiable(losses)
        return losses, losses.sum() * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, _, g):
        dh, dw = ctx.saved_tensors
        return (None if dh is None else dh * g.to(dh.dtype)), (None if dw is None else dw * g), None, None, None


def head_loss(h, weight, targets, softcap, teacher=None, reduction="mean") -> torch.Tensor:
    """
    h (B, T, D); weight (V, D); targets (B, T) int64, -1 where a position is not supervised. Without teacher:
    cross-entropy in nats. With teacher (B, T, D) hidden states, which get no gradient: KL(teacher || student) of the
    two distributions. reduction 'mean' over the supervised positions (a scalar), or 'none': (B*T,), zero where
    unsupervised, without gradient.
    """
    if not torch.is_grad_enabled():
        weight = weight.detach()  # or the sweep would make a gradient that nobody asks for
    flat = None if teacher is None else teacher.detach().flatten(0, -2)
    losses, mean = _HeadLoss.apply(h.flatten(0, -2), weight, targets.flatten(), softcap, flat)
    return mean if reduction == "mean" else losses


@torch.no_grad()
def evaluate_bpb(model, batches, steps: int, token_bytes: torch.Tensor, **forward_args) -> float:
    """
    Bits per byte of text: summed cross-entropy / (ln 2 * bytes of the target tokens), which does not depend on the
    tokenizer. Special tokens (0 bytes) are not counted. batches yields (x, y); token_bytes is (V,).
    """
    nats, count = 0.0, 0
    for _, (x, y) in zip(range(steps), batches):
        losses, _ = model(x, y, reduction="none", **forward_args)
        size = torch.where(y.flatten() >= 0, token_bytes.to(y.device)[y.flatten().clamp(min=0)], 0)
        nats += float((losses * (size > 0)).sum())
        count += int(size.sum())
    assert count > 0, "the evaluation saw no text"
    return nats / (math.log(2) * count)


def matryoshka_backward(model, x, y, students: list, scale: float) -> dict[str, torch.Tensor]:
    """
    One training step's losses (DESIGN 8), backward included, each multiplied by `scale`: cross-entropy of the full
    pass (the teacher), then for each entry of `students` (widths, see GPT.resolve_widths) the KL of that narrow pass
    to the teacher's detached distribution, averaged over the students. The teacher's graph is freed before a student's
    is built. Returns the losses, detached, as 'loss' and 'kl'.
    """
    loss, teacher = model(x, y)
    (loss * scale).backward()
    out = {"loss": loss.detach()}
    for widths in students:
        kl, _ = model(x, y, widths=widths, teacher=teacher)
        (kl * (scale / len(students))).backward()
        out["kl"] = out.get("kl", 0) + kl.detach() / len(students)
    return out
