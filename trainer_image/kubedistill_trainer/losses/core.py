"""The chunked linear core: w · T² · D(teacher(T) ‖ student(T)) + (1 − w) · CE in one pass.

Tokens are taken a chunk at a time. The logits of a chunk are made, used for both terms and for the
analytic gradient, multiplied back into the gradients of the hidden states and of the LM head, and
overwritten by the next chunk: no [tokens × vocabulary] tensor of either model exists, and nothing
but the two gradients is kept for the backward pass.

    ∂(T² · KL) / ∂z = T · (q − p)                     Hinton et al. 2015, section 2.1
    (other divergences: divergence.py)
    ∂CE / ∂z        = softmax(z) − onehot(y)

A chunk has as many tokens as fit the workspace, so that the peak does not grow with the vocabulary.
The vocabulary is not cut into tiles: that would need a second projection of the logits (half as many
FLOPs again), and even a million entries leave tens of tokens a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kubedistill_trainer.losses.chunk import ChunkRunner, wide_dtype
from kubedistill_trainer.losses.types import (
    FORWARD_KL,
    IGNORED,
    Divergence,
    LossParts,
    Objective,
    Teacher,
    TeacherHidden,
    TeacherSampled,
    TeacherSparse,
)


def distillation_loss(
    hidden_NH: Tensor,
    head_VH: Tensor,
    labels_N: Tensor,
    teacher: Teacher | None,
    *,
    temperature: float,
    soft_weight: float,
    normalizer: Tensor | float,
    divergence: Divergence = FORWARD_KL,
    vocab_size: int | None = None,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> LossParts:
    """Sum of the loss over the tokens with a label, divided by `normalizer`.

    hidden_NH [N, H] and head_VH [V, H] of the student; labels_N [N] already shifted, -100 where
    there is nothing to predict. Rows of either head from `vocab_size` on count as −inf.
    `normalizer` is the number of valid tokens of the whole optimizer step over all ranks: with it
    the sum over any split into micro-batches and ranks is the same.

    Without a teacher, or with soft_weight 0, it is cross-entropy alone. A batch without any label
    gives 0 and zero gradients (not none: every parameter must have one). `chunk_tokens` is the
    number of tokens a chunk; by default as many as fit the workspace.

    Raises ValueError for a temperature or normaliser that is not positive, a weight outside
    [0, 1], or a vocabulary that one of the heads does not cover.
    """
    size = head_VH.shape[0] if vocab_size is None else vocab_size
    scale = 1.0 / _checked(temperature, soft_weight, float(normalizer))
    _check_teacher(size, head_VH, teacher)
    if isinstance(teacher, TeacherSampled) and not divergence.is_forward_kl:
        raise ValueError(f"divergence: {divergence}; draws estimate the plain KL(p ‖ q) only")
    objective = Objective(temperature, soft_weight if teacher else 0.0, size, softcap, divergence)
    rows_M = (labels_N != IGNORED).nonzero().flatten()
    needs = (
        torch.is_grad_enabled() and hidden_NH.requires_grad,
        torch.is_grad_enabled() and head_VH.requires_grad,
    )
    total, soft, hard = _ChunkedLoss.apply(
        hidden_NH, head_VH, labels_N, rows_M, teacher, objective, scale, chunk_tokens, needs
    )
    return LossParts(total, soft, hard)


def _checked(temperature: float, soft_weight: float, normalizer: float) -> float:
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature} is not positive")
    if not 0 <= soft_weight <= 1:
        raise ValueError(f"soft_weight: {soft_weight} is not within 0…1")
    if not normalizer > 0:
        raise ValueError(
            f"normalizer: {normalizer} is not positive; "
            "give the valid tokens of the whole step, or 1 where there are none"
        )
    return normalizer


def _check_teacher(vocab_size: int, head_VH: Tensor, teacher: Teacher | None) -> None:
    heads = {"student": head_VH}
    if isinstance(teacher, TeacherHidden):
        heads["teacher"] = teacher.head_VH
    for name, head in heads.items():
        if head.shape[0] < vocab_size:
            raise ValueError(
                f"vocab_size: {vocab_size}, but the {name}'s head has {head.shape[0]} rows; "
                "give the size that student and teacher share"
            )
    if isinstance(teacher, TeacherSparse) and teacher.log_z_N.dim() != 1:
        raise ValueError(
            f"teacher.log_z_N: shape {list(teacher.log_z_N.shape)}, expected [N]; "
            "give the column of the temperature that is used"
        )


class _ChunkedLoss(torch.autograd.Function):
    """Gradients are made in the forward pass; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        head_VH: Tensor,
        labels_N: Tensor,
        rows_M: Tensor,
        teacher: Teacher | None,
        objective: Objective,
        scale: float,
        chunk_tokens: int | None,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        w = objective.soft_weight
        runner = ChunkRunner(hidden_NH, head_VH, teacher, objective, scale, needs, chunk_tokens)
        for rows_C in torch.split(rows_M, runner.chunk_tokens):
            runner.add(rows_C, labels_N[rows_C])
        ctx.save_for_backward(*runner.gradients())
        soft, hard = (runner.sums * scale).to(wide_dtype(hidden_NH.dtype)).unbind()
        total = w * soft + (1 - w) * hard
        nan = torch.full_like(soft, float("nan"))
        soft, hard = soft if w > 0 else nan, hard if w < 1 else nan
        ctx.mark_non_differentiable(soft, hard)
        return total, soft, hard

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.saved_tensors
        # Multiplying would hold the head's gradient twice; without loss scaling the factor is 1.
        if bool(grad_total != 1):
            grads = [None if grad is None else grad * grad_total for grad in grads]
        return (*grads, *[None] * 7)
