"""The chunked linear core: w · T² · KL(teacher(T) ‖ student(T)) + (1 − w) · CE in one pass.

Tokens are taken a chunk at a time. The student's logits of a chunk are made, used for both terms
and for the analytic gradient of the logits, multiplied back into the gradients of the hidden
states and of the LM head, and dropped: no [tokens × vocabulary] tensor of either model exists, and
nothing but the two gradients is kept for the backward pass. A chunk has as many tokens as fit
`CHUNK_BYTES` of fp32 logits, so that the peak does not grow with the vocabulary.

With z the student's logits, q = softmax(z / T), p the teacher's distribution at T, and y the label:

    ∂(T² · KL) / ∂z = T · (q − p)                     Hinton et al. 2015, section 2.1
    ∂CE / ∂z        = softmax(z) − onehot(y)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kubedistill_trainer.losses.sparse import sparse_terms
from kubedistill_trainer.losses.types import IGNORED, LossParts, TeacherHidden, TeacherSparse

CHUNK_BYTES = 16 << 20
"""fp32 logits of a chunk; measured: larger chunks are not faster on a CPU, smaller ones are slower."""
_LEAST_CHUNK_TOKENS = 16
_SUM_DTYPES = {torch.float64: torch.float64}


@dataclass(frozen=True)
class _Objective:
    temperature: float
    soft_weight: float
    vocab_size: int
    softcap: float | None


def distillation_loss(
    hidden_NH: Tensor,
    head_VH: Tensor,
    labels_N: Tensor,
    teacher: TeacherHidden | TeacherSparse | None,
    *,
    temperature: float,
    soft_weight: float,
    normalizer: Tensor | float,
    vocab_size: int | None = None,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> LossParts:
    """Sum of the loss over the tokens with a label, divided by `normalizer`.

    hidden_NH [N, H] and head_VH [V, H] of the student; rows of either head from `vocab_size` on
    count as −inf. `normalizer` is the number of valid tokens of the whole optimizer step over all
    ranks: with it the sum over any split into micro-batches and ranks is the same. Without a
    teacher, or with soft_weight 0, it is cross-entropy alone. A batch without any label gives 0 and
    zero gradients.
    """
    objective = _Objective(
        temperature=temperature,
        soft_weight=soft_weight if teacher is not None else 0.0,
        vocab_size=head_VH.shape[0] if vocab_size is None else vocab_size,
        softcap=softcap,
    )
    rows_M = (labels_N != IGNORED).nonzero().flatten()
    chunk = chunk_tokens or max(_LEAST_CHUNK_TOKENS, CHUNK_BYTES // (4 * objective.vocab_size))
    total, soft, hard = _ChunkedLoss.apply(
        hidden_NH, head_VH, labels_N, rows_M, teacher, objective, float(normalizer), chunk
    )
    return LossParts(total, soft.detach(), hard.detach())


class _ChunkedLoss(torch.autograd.Function):
    """Gradients are made in the forward pass; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        head_VH: Tensor,
        labels_N: Tensor,
        rows_M: Tensor,
        teacher: TeacherHidden | TeacherSparse | None,
        objective: _Objective,
        normalizer: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        need_hidden, need_head = ctx.needs_input_grad[:2]
        sums = torch.zeros(2, dtype=torch.float64, device=hidden_NH.device)
        wide = _SUM_DTYPES.get(hidden_NH.dtype, torch.float32)
        grad_hidden = torch.zeros_like(hidden_NH) if need_hidden else None
        grad_head = torch.zeros_like(head_VH, dtype=wide) if need_head else None
        visible_VH = head_VH[: objective.vocab_size]
        for rows in torch.split(rows_M, chunk):
            hidden_CH = hidden_NH[rows]
            grad_CV, soft, hard = _chunk(
                hidden_CH, visible_VH, labels_N[rows], _rows_of(teacher, rows), objective
            )
            sums += torch.stack([soft, hard])
            grad_CV = (grad_CV / normalizer).to(hidden_NH.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_CV @ visible_VH
            if grad_head is not None:
                _accumulate(grad_head[: objective.vocab_size], grad_CV, hidden_CH)
        soft, hard = (sums / normalizer).unbind()
        w = objective.soft_weight
        total = w * soft + ((1 - w) * hard if w < 1 else 0.0)
        ctx.save_for_backward(
            grad_hidden, None if grad_head is None else grad_head.to(head_VH.dtype)
        )
        ctx.mark_non_differentiable(soft, hard)
        return total.to(wide), soft, hard

    @staticmethod
    def backward(
        ctx: Any, grad_total: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_total.to(grad_hidden.dtype),
            None if grad_head is None else grad_head * grad_total.to(grad_head.dtype),
            *[None] * 6,
        )


def _accumulate(grad_VH: Tensor, grad_CV: Tensor, hidden_CH: Tensor) -> None:
    """grad_VH += grad_CVᵀ · hidden_CH, in place where the types allow it."""
    if grad_VH.dtype == grad_CV.dtype:
        grad_VH.addmm_(grad_CV.T, hidden_CH)
    else:
        grad_VH += grad_CV.T @ hidden_CH


def _rows_of(
    teacher: TeacherHidden | TeacherSparse | None, rows: Tensor
) -> TeacherHidden | TeacherSparse | None:
    if isinstance(teacher, TeacherHidden):
        return TeacherHidden(teacher.hidden_NH[rows], teacher.head_VH, teacher.softcap)
    if isinstance(teacher, TeacherSparse):
        return TeacherSparse(teacher.ids_NK[rows], teacher.logprobs_NK[rows], teacher.log_z_N[rows])
    return None


def _logits(hidden_CH: Tensor, head_VH: Tensor, softcap: float | None) -> Tensor:
    """fp32 (fp64 for fp64) logits [C, V]."""
    logits = hidden_CH.to(head_VH.dtype) @ head_VH.T
    logits = logits.to(_SUM_DTYPES.get(logits.dtype, torch.float32))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _chunk(
    hidden_CH: Tensor,
    head_VH: Tensor,
    labels_C: Tensor,
    teacher: TeacherHidden | TeacherSparse | None,
    objective: _Objective,
) -> tuple[Tensor, Tensor, Tensor]:
    """(∂total/∂raw logits [C, V] before normalising, Σ T²·KL, Σ CE) of one chunk."""
    w, T = objective.soft_weight, objective.temperature
    logits_CV = _logits(hidden_CH, head_VH, objective.softcap)
    zero = logits_CV.new_zeros((), dtype=torch.float64)
    soft, hard = zero, zero
    grad_CV: Tensor | None = None
    if teacher is not None and w > 0:
        log_q_CV = torch.log_softmax(logits_CV if T == 1 else logits_CV / T, dim=-1)
        hard_log_q = log_q_CV if T == 1 else None
        if isinstance(teacher, TeacherHidden):
            raw = _logits(teacher.hidden_NH, teacher.head_VH[: head_VH.shape[0]], teacher.softcap)
            log_p_CV = torch.log_softmax(raw if T == 1 else raw.div_(T), dim=-1)
            del raw
            p_CV = log_p_CV.exp()
            soft = T * T * (p_CV * log_p_CV.sub_(log_q_CV)).sum(dtype=torch.float64)
            del log_p_CV
            q_CV = log_q_CV.exp() if hard_log_q is not None else log_q_CV.exp_()
            grad_CV = q_CV.sub_(p_CV).mul_(w * T)
        else:
            kl, grad = sparse_terms(log_q_CV, teacher, T)
            soft = T * T * kl
            grad_CV = grad.mul_(w * T)
    else:
        hard_log_q = None
    if w < 1:
        log_q1_CV = torch.log_softmax(logits_CV, dim=-1) if hard_log_q is None else hard_log_q
        hard = -log_q1_CV.gather(-1, labels_C[:, None]).sum(dtype=torch.float64)
        hard_grad = log_q1_CV.exp_()
        hard_grad.scatter_add_(-1, labels_C[:, None], -torch.ones_like(hard_grad[:, :1]))
        grad_CV = hard_grad.mul_(1 - w) if grad_CV is None else grad_CV.add_(hard_grad, alpha=1 - w)
    else:
        hard = zero + float("nan")
    assert grad_CV is not None
    if objective.softcap is not None:
        # d(cap · tanh(z / cap)) / dz = 1 − (capped / cap)²
        grad_CV = grad_CV * (1 - (logits_CV / objective.softcap) ** 2)
    return grad_CV, soft, hard
