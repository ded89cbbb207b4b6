"""The chunked head loss against the plain formula, its gradients, bits per byte, and the step of teacher and students."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import language_parameters

from nanochat import loss_eval
from nanochat.loss_eval import (
    CHUNK,
    EXIT_WEIGHT,
    Original,
    Student,
    evaluate_bpb,
    head_logits,
    head_loss,
    matryoshka_backward,
)

CAP = 15.0


def problem(dtype=torch.float64, n=CHUNK + 37):
    g = torch.Generator().manual_seed(0)
    h = (torch.randn(1, n, 12, generator=g) * 3).to(dtype).requires_grad_()
    w = torch.randn(50, 12, generator=g).to(dtype).requires_grad_()
    y = torch.randint(50, (1, n), generator=g)
    y[0, ::7] = -1
    return h, w, y, torch.randn(1, n, 12, generator=g).to(dtype)


def test_a_gpu_gets_larger_chunks_of_the_same_loss(monkeypatch):
    """Each chunk reads and writes the fp32 gradient of the head, which on a GPU costs more than logits that fit no cache."""
    assert loss_eval.chunk_of(torch.device("cpu")) == CHUNK < loss_eval.chunk_of(torch.device("cuda")) == 2048
    h, w, y, teacher = problem()
    results = []
    for chunk in (CHUNK, 2048, 5):
        monkeypatch.setattr(loss_eval, "CHUNK", chunk)
        loss = head_loss(h, w, y, CAP, teacher, text=0.5)
        results.append((loss.detach(), *torch.autograd.grad(loss, (h, w))))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b)


def test_cross_entropy_and_gradients_equal_the_plain_ones():
    h, w, y, _ = problem()
    logits = CAP * torch.tanh(h @ w.T / CAP)
    want = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)
    got = head_loss(h, w, y, CAP)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(3 * got, (h, w)), torch.autograd.grad(3 * want, (h, w))):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(head_logits(h, w, CAP), logits)
    each = head_loss(h, w, y, CAP, reduction="none")
    torch.testing.assert_close(each, F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1, reduction="none"))


@pytest.mark.parametrize("text", [0.0, 0.3, 1.0])
def test_distillation_and_gradients_equal_the_plain_ones(text):
    """Also of a mean of both: what the text says and what the teacher does."""
    h, w, y, teacher = problem()
    log_p = torch.log_softmax(head_logits(h, w, CAP), -1)
    log_q = torch.log_softmax(head_logits(teacher, w.detach(), CAP), -1)
    each = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)[y >= 0]
    want = (1 - text) * each.mean() + text * head_loss(h, w, y, CAP)
    got = head_loss(h, w, y, CAP, teacher, text=text)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, (h, w)), torch.autograd.grad(want, (h, w))):
        torch.testing.assert_close(a, b)
    alone = (text * head_loss(teacher, w, y, CAP)).item()
    assert head_loss(teacher, w, y, CAP, teacher, text=text).item() == pytest.approx(alone, abs=1e-12)
    each = head_loss(h, w, y, CAP, teacher, "none", text)
    assert each.sum().item() / int((y >= 0).sum()) == pytest.approx(got.item()) and not each[y.flatten() < 0].any()


def test_another_models_head_teaches_from_states_of_another_width():
    h, w, y, _ = problem()
    g = torch.Generator().manual_seed(5)
    states = torch.randn(*h.shape[:-1], 7, generator=g, dtype=h.dtype)
    head = torch.nn.Linear(7, len(w), bias=False, dtype=h.dtype)
    head.softcap = 2 * CAP
    log_p = torch.log_softmax(head_logits(h, w, CAP), -1)
    log_q = torch.log_softmax(head_logits(states, head.weight.detach(), 2 * CAP), -1)
    each = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)[y >= 0]
    want = 0.75 * each.mean() + 0.25 * head_loss(h, w, y, CAP)
    got = head_loss(h, w, y, CAP, states, text=0.25, teacher_head=head)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, (h, w)), torch.autograd.grad(want, (h, w))):
        torch.testing.assert_close(a, b)
    assert head.weight.grad is None


def test_the_full_pass_learns_from_the_original_and_the_narrow_one_from_the_full_pass(hybrid, base, tokens):
    """Against the same losses written out with autograd."""
    x, y = tokens[:, :-1], tokens[:, 1:]
    out = matryoshka_backward(hybrid, x, y, [Student(widths="ghost")], 1.0, original=Original(base, 0.25))
    got = {n: p.grad.clone() for n, p in hybrid.named_parameters() if p.grad is not None}
    hybrid.zero_grad()
    logits = hybrid(x)
    full, narrow, said = (torch.log_softmax(v.flatten(0, 1), -1) for v in (logits, hybrid(x, widths="ghost"), base(x)))
    kept = F.kl_div(full, said.detach(), log_target=True, reduction="batchmean")
    text = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    shrunk = F.kl_div(narrow, full.detach(), log_target=True, reduction="batchmean")
    torch.testing.assert_close(out["loss"], (0.25 * kept + 0.75 * text).detach())
    (0.25 * kept + 0.75 * text + shrunk).backward()
    assert got and all(torch.allclose(g, dict(hybrid.named_parameters())[n].grad, atol=2e-5) for n, g in got.items())
    assert all(p.grad is None for p in base.parameters())


def test_bf16_is_near_fp64():
    h, w, y, _ = problem()
    want = torch.autograd.grad(head_loss(h, w, y, CAP), (h, w))
    hb, wf = h.detach().bfloat16().requires_grad_(), w.detach().float().requires_grad_()
    for a, b in zip(torch.autograd.grad(head_loss(hb, wf, y, CAP), (hb, wf)), want):
        assert (a.double() - b).norm() < 0.03 * b.norm()


def test_a_frozen_head_gets_no_gradient_and_no_grad_makes_none():
    h, w, y, _ = problem()
    loss = head_loss(h, w.detach(), y, CAP)
    assert torch.autograd.grad(loss, h)[0].abs().sum() > 0
    with torch.no_grad():
        assert not head_loss(h, w, y, CAP).requires_grad


def test_nothing_supervised_is_zero_not_nan():
    h, w, y, _ = problem()
    assert head_loss(h, w, torch.full_like(y, -1), CAP) == 0


def test_bits_per_byte_counts_bytes_not_tokens(base, tokens):
    sizes = torch.arange(300) % 4  # every fourth token has no bytes, as specials
    x, y = tokens[:, :-1], tokens[:, 1:]
    losses = F.cross_entropy(base(x).flatten(0, 1), y.flatten(), reduction="none")
    has = sizes[y.flatten()]
    want = (losses * (has > 0)).sum().item() / math.log(2) / int(has.sum())
    assert evaluate_bpb(base, [(x, y)] * 3, 2, sizes) == pytest.approx(want, rel=1e-5)


def test_step_is_teacher_plus_mean_of_students(hybrid, tokens):
    x, y = tokens[:, :-1], tokens[:, 1:]
    texts = {16: 0.0, 32: 0.25}
    out = matryoshka_backward(hybrid, x, y, [Student(d, text=text) for d, text in texts.items()], 0.5)
    got = {n: p.grad.clone() for n, p in language_parameters(hybrid).items()}
    hybrid.zero_grad()
    teacher = F.cross_entropy(hybrid(x).flatten(0, 1), y.flatten())
    q = torch.log_softmax(hybrid(x).detach(), -1)
    parts = []
    for d, text in texts.items():
        p = torch.log_softmax(hybrid(x, widths=d), -1)
        parts.append(text * F.nll_loss(p.flatten(0, 1), y.flatten())
                     + (1 - text) * F.kl_div(p, q, log_target=True, reduction="none").sum(-1).mean())
    (0.5 * (teacher + sum(parts) / 2)).backward()
    assert float(out["loss"]) == pytest.approx(teacher.item(), rel=1e-5)
    assert float(out["narrow"]) == pytest.approx(sum(parts).item() / 2, rel=1e-4)
    for n, p in language_parameters(hybrid).items():
        torch.testing.assert_close(got[n], p.grad, atol=2e-6, rtol=2e-3)


@pytest.mark.parametrize("weight", [EXIT_WEIGHT, 0.1])
def test_the_full_pass_learns_to_answer_at_its_exits(hybrid, tokens, weight):
    """As if it had been run once for each exit point, with all tokens leaving there."""
    x, y = tokens[:, :-1], tokens[:, 1:]
    at = torch.tensor([0, 3, 7, x.numel() - 1])
    out = matryoshka_backward(hybrid, x, y, [], 0.5, exit_at=at, at_scale=0.25, exit_weight=weight)
    got = {n: p.grad.clone() for n, p in language_parameters(hybrid).items()}
    hybrid.zero_grad()
    full, targets = hybrid(x), y.flatten()
    q, parts = torch.log_softmax(full.detach(), -1).flatten(0, 1)[at], []
    assert len(hybrid.config.exit_points) > 1
    for depth in hybrid.config.exit_points:
        p = torch.log_softmax(hybrid(x, exits=torch.full(x.shape, depth)), -1).flatten(0, 1)[at]
        parts.append((F.nll_loss(p, targets[at]) + F.kl_div(p, q, log_target=True, reduction="batchmean")) / 2)
    want = sum(parts) / len(parts)
    (0.5 * F.cross_entropy(full.flatten(0, 1), targets) + 0.25 * weight * want).backward()
    assert float(out["exits"]) == pytest.approx(want.item(), rel=1e-5)
    for n, p in language_parameters(hybrid).items():
        torch.testing.assert_close(got[n], p.grad, atol=2e-6, rtol=2e-3)


def test_a_batch_without_supervised_tokens_changes_nothing(hybrid, tokens):
    """A batch of questions only: every loss and every gradient is zero, none is NaN."""
    y, none = torch.full_like(tokens, -1), torch.empty(0, dtype=torch.int64)
    students = [Student("ghost"), Student("normal", start=1, stop=2)]
    losses = matryoshka_backward(hybrid, tokens, y, students, 1.0, none, none)
    assert {k: float(v) for k, v in losses.items()} == {"loss": 0, "exits": 0, "narrow": 0, "gate": 0}
    assert all(p.grad is None or not p.grad.any() for p in hybrid.parameters())
