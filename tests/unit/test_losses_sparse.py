"""The K kept tokens and the tail bucket."""

from __future__ import annotations

import pytest
import torch
from kubedistill_trainer.losses import Divergence, TeacherHidden, TeacherSparse, distillation_loss
from kubedistill_trainer.losses.buckets import of_buckets
from torch import Tensor
from unit.test_losses_kit import TEMPERATURES, case, error, evaluate, sparse_of


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_all_tokens_kept_is_the_dense_loss(temperature: float, weight: float) -> None:
    c = case(vocab=97)
    options = {"temperature": temperature, "soft_weight": weight}
    dense = evaluate(c, c.teacher, **options)
    sparse = evaluate(c, sparse_of(c.teacher, 97, temperature), **options)
    for a, b in zip(sparse, dense, strict=True):
        assert error(a, b) < 1e-10


def _logit_gradient(logits: Tensor, teacher: TeacherSparse, temperature: float) -> Tensor:
    """Through an identity head: the hidden states are the logits."""
    hidden = logits.clone().requires_grad_()
    labels = torch.zeros(len(logits), dtype=torch.int64)
    distillation_loss(
        hidden, torch.eye(logits.shape[1]).to(logits), labels, teacher, temperature=temperature,
        soft_weight=1.0, normalizer=1.0,
    ).total.backward()  # fmt: skip
    assert hidden.grad is not None
    return hidden.grad


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_tails_gradient_is_autograds(temperature: float) -> None:
    torch.manual_seed(1)
    logits, truth = 3 * torch.randn(2, 6, 50).double()
    teacher = sparse_of(TeacherHidden(truth, torch.eye(50).double()), 7, temperature)
    leaf = logits.clone().requires_grad_()
    log_q = torch.log_softmax(leaf / temperature, -1)
    log_p = torch.log_softmax(truth / temperature, -1)
    outside = torch.ones_like(truth, dtype=torch.bool).scatter(-1, teacher.ids_NK, False)
    tail_p = (log_p.exp() * outside).sum(-1)
    tail_q = (log_q.exp() * outside).sum(-1)
    kept = (log_p.exp() * (log_p - log_q) * ~outside).sum()
    loss = temperature**2 * (kept + (tail_p * (tail_p.log() - tail_q.log())).sum())
    loss.backward()
    assert leaf.grad is not None
    assert error(_logit_gradient(logits, teacher, temperature), leaf.grad) < 1e-10


def test_a_confident_student_has_an_exact_tail() -> None:
    """In fp32 1 − Σ q_k is 0 here, and 1 − Σ p_k has no digit right."""
    logits = torch.zeros(1, 40)
    logits[0, 3] = 60.0
    truth = torch.zeros(1, 40).double()
    truth[0, 3] = 25.0
    teacher = sparse_of(TeacherHidden(truth, torch.eye(40).double()), 1, 1.0)
    hidden = logits.clone().requires_grad_()
    parts = distillation_loss(
        hidden, torch.eye(40), torch.tensor([3]), teacher, temperature=1.0, soft_weight=1.0,
        normalizer=1.0,
    )  # fmt: skip
    parts.total.backward()
    log_p, log_q = torch.log_softmax(truth, -1), torch.log_softmax(logits.double(), -1)
    assert float(parts.soft) == pytest.approx(
        float((log_p.exp() * (log_p - log_q)).sum()), rel=1e-4
    )
    assert hidden.grad is not None
    expected = (log_q.exp() - log_p.exp())[0, 4]
    assert float(hidden.grad[0, 4]) == pytest.approx(float(expected), rel=1e-4)


def test_quantised_probabilities_above_one_are_scaled_back() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 30).double()
    exact = sparse_of(TeacherHidden(logits, torch.eye(30).double()), 29, 1.0)
    rounded = TeacherSparse(exact.ids_NK, exact.logprobs_NK + 0.05, exact.log_z_N)
    gradient = _logit_gradient(logits, rounded, 1.0)
    assert torch.isfinite(gradient).all()
    # A gradient of logits sums to 0 for each token.
    assert float(gradient.sum(-1).abs().max()) < 1e-12


def test_an_entry_of_minus_infinity_has_probability_zero() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 30)
    kept = sparse_of(TeacherHidden(logits, torch.eye(30)), 5, 2.0)
    log_probs = kept.logprobs_NK.clone()
    log_probs[:, -1] = float("-inf")
    gradient = _logit_gradient(logits, TeacherSparse(kept.ids_NK, log_probs, kept.log_z_N), 2.0)
    assert torch.isfinite(gradient).all()
    assert float(gradient.sum(-1).abs().max()) < 1e-5


def test_a_grid_of_normalisers_is_refused() -> None:
    c = case()
    kept = sparse_of(c.teacher, 3, 1.0)
    grid = TeacherSparse(kept.ids_NK, kept.logprobs_NK, kept.log_z_N[:, None])
    with pytest.raises(ValueError, match="log_z_N: shape"):
        evaluate(c, grid, temperature=1.0, soft_weight=0.5)


@pytest.mark.parametrize("divergence", [Divergence(0, 1), Divergence(0, 0, 1)])
def test_a_student_sure_of_what_the_teacher_excludes_has_the_little_gradient_that_is_left(
    divergence: Divergence,
) -> None:
    """e^-60 and less, of which the likeliest bucket's is what the others add up to."""
    log_q = torch.tensor([[90.0, 30.0, 0.0, 20.0]]).double().log_softmax(-1)
    log_p = torch.tensor([[0.0, 3.0, 90.0, 1.0]]).double().log_softmax(-1)
    slope = of_buckets(log_p, log_q, divergence)[1]
    assert 0 < float(slope.abs().max()) < 1e-20
    assert float(slope.sum().abs()) < 1e-10 * float(slope.abs().max())
