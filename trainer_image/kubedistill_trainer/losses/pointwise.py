"""The pointwise part of a chunk: from the logits to the loss and the logits' gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from kubedistill_trainer.losses.divergence import (
    Scratch,
    dense_divergence,
    sampled_kl,
    sparse_divergence,
)
from kubedistill_trainer.losses.types import (
    Objective,
    Teacher,
    TeacherHidden,
    TeacherSampled,
    TeacherSparse,
)


class Pointwise:
    """Takes a chunk's tokens a block at a time: on a CPU a block stays in the cache from the first
    pass to the last, on a GPU it is the chunk.

    `sums`: of the soft and of the hard loss so far, fp64 [2].
    """

    def __init__(
        self,
        teacher: Teacher | None,
        objective: Objective,
        scale: float | None,
        block_tokens: int,
        wide: torch.dtype,
        device: torch.device,
        dtypes: tuple[torch.dtype, torch.dtype],
    ) -> None:
        """`scale`: factor of the gradient, None where none is wanted. `dtypes`: of the student's and
        the teacher's logits."""
        self._teacher = teacher
        self._objective = objective
        self._scale = scale
        self._block_tokens = block_tokens
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)

        def buffer() -> Tensor:
            return torch.empty(block_tokens, objective.vocab_size, dtype=wide, device=device)

        self._scratch = Scratch(buffer(), buffer(), buffer())
        self._student_RV, self._teacher_RV = (None if d == wide else buffer() for d in dtypes)

    def add(self, z_CV: Tensor, t_CV: Tensor, rows_C: Tensor, labels_C: Tensor) -> None:
        """Add the loss of the tokens at rows_C [C] to the sums; z_CV becomes its gradient.

        t_CV: the teacher's logits where it is a TeacherHidden, else empty.
        """
        for start in range(0, len(z_CV), self._block_tokens):
            block = slice(start, start + self._block_tokens)
            self._block(z_CV[block], t_CV[block], rows_C[block], labels_C[block, None])

    def _block(self, z_RV: Tensor, t_RV: Tensor, rows_R: Tensor, labels_R1: Tensor) -> None:
        """Adds the block's loss to the sums and overwrites its logits by their gradient."""
        w, T = self._objective.soft_weight, self._objective.temperature
        divergence = self._objective.divergence
        scratch = self._scratch.head(len(rows_R))
        wide_RV = _widened(z_RV, self._student_RV, self._objective.softcap)
        max_R1 = wide_RV.amax(-1, keepdim=True)
        if isinstance(self._teacher, TeacherHidden):
            wide_t_RV = _widened(t_RV, self._teacher_RV, self._teacher.softcap)
            soft_R = dense_divergence(wide_RV, max_R1, wide_t_RV, T, divergence, scratch)
            self.sums[0] += T * T * soft_R.sum()
        elif isinstance(self._teacher, TeacherSampled):
            drawn = TeacherSampled(self._teacher.ids_NK[rows_R], self._teacher.shares_NK[rows_R])
            self.sums[0] += T * T * sampled_kl(wide_RV, drawn, T, scratch).sum()
        elif self._teacher is not None:
            kept = _rows(self._teacher, rows_R)
            self.sums[0] += T * T * sparse_divergence(wide_RV, kept, T, divergence, scratch).sum()
        if w < 1:
            q1_RV = scratch.b_RV
            # dense_divergence has left it there for T = 1.
            if T != 1 or not isinstance(self._teacher, TeacherHidden):
                torch.softmax(wide_RV, -1, out=q1_RV)
            log_z_R1 = max_R1.double() - q1_RV.amax(-1, keepdim=True).double().log()
            self.sums[1] += (log_z_R1 - wide_RV.gather(-1, labels_R1)).sum()
            q1_RV.scatter_add_(-1, labels_R1, q1_RV.new_full(labels_R1.shape, -1.0))
        if self._scale is not None:
            self._write_gradient(z_RV, wide_RV, scratch)

    def _write_gradient(self, z_RV: Tensor, wide_RV: Tensor, scratch: Scratch) -> None:
        """z_RV = scale · (w · T · ∂D/∂u + (1 − w) · ∂CE/∂z), from c_RV and b_RV of the scratch."""
        w, cap = self._objective.soft_weight, self._objective.softcap
        assert self._scale is not None
        soft, hard = self._scale * w * self._objective.temperature, self._scale * (1 - w)
        if cap is not None:
            # d(cap · tanh(x / cap)) / dx = 1 − (z / cap)², where z is what the cap let through.
            torch.div(wide_RV, cap, out=scratch.a_RV).square_().neg_().add_(1)
        if w == 0:
            torch.mul(scratch.b_RV, hard, out=wide_RV)
        else:
            torch.mul(scratch.c_RV, soft, out=wide_RV)
            if w < 1:
                wide_RV.add_(scratch.b_RV, alpha=hard)
        if cap is not None:
            wide_RV.mul_(scratch.a_RV)
        if wide_RV.dtype != z_RV.dtype:
            z_RV.copy_(wide_RV)


def _widened(x_RV: Tensor, buffer_RV: Tensor | None, softcap: float | None) -> Tensor:
    """Logits in the wide type, capped; in place unless there is a buffer for the wide type."""
    if buffer_RV is not None:
        x_RV = buffer_RV[: len(x_RV)].copy_(x_RV)
    return x_RV if softcap is None else x_RV.div_(softcap).tanh_().mul_(softcap)


def _rows(teacher: TeacherSparse, rows: Tensor) -> TeacherSparse:
    return TeacherSparse(teacher.ids_NK[rows], teacher.logprobs_NK[rows], teacher.log_z_N[rows])
