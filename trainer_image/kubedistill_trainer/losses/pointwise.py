"""The pointwise part of a chunk: from the logits to the loss and the logits' gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from kubedistill_trainer.losses.cached import (
    SoftTerm,
    log_normaliser,
    sampled_kl,
    sparse_divergence,
)
from kubedistill_trainer.losses.divergence import Scratch, dense_divergence, softmax
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
        scratch = self._scratch.head(len(rows_R))
        cap = self._objective.softcap
        wide_RV = _widened(z_RV, self._student_RV)
        if cap is not None:
            # d(cap · tanh(x / cap)) / dx = 1 / cosh²(x / cap). As 1 − tanh² it would be lost where the
            # cap holds, and after the cap nobody knows x.
            slope_RV = wide_RV.div(cap).cosh_().square_().reciprocal_()
            _cap(wide_RV, cap)
        if isinstance(self._teacher, TeacherHidden):
            t_RV = _cap(_widened(t_RV, self._teacher_RV), self._teacher.softcap)
            self._dense(wide_RV, t_RV, scratch)
            soft = None
        else:
            soft = self._cached(wide_RV, rows_R, scratch)
        hard = self._objective.soft_weight < 1
        if hard:
            self._cross_entropy(wide_RV, labels_R1, soft, scratch)
        if self._scale is None:
            return
        self._write_gradient(wide_RV, labels_R1 if hard else None, soft, scratch)
        if cap is not None:
            wide_RV.mul_(slope_RV)
        if wide_RV.dtype != z_RV.dtype:
            z_RV.copy_(wide_RV)

    def _dense(self, z_RV: Tensor, t_RV: Tensor, scratch: Scratch) -> None:
        T = self._objective.temperature
        max_R1 = z_RV.amax(-1, keepdim=True)
        soft_R = dense_divergence(z_RV, max_R1, t_RV, T, self._objective.divergence, scratch)
        self.sums[0] += T * T * soft_R.sum()

    def _cached(self, z_RV: Tensor, rows_R: Tensor, scratch: Scratch) -> SoftTerm | None:
        """The soft term where the teacher is no TeacherHidden; None without a teacher.

        At T = 1 its base is `scratch.b_RV`, which cross-entropy shares, else `scratch.c_RV`.
        """
        T, teacher = self._objective.temperature, self._teacher
        if teacher is None:
            return None
        u_RV = z_RV if T == 1 else torch.mul(z_RV, 1 / T, out=scratch.a_RV)
        out_RV = scratch.b_RV if T == 1 else scratch.c_RV
        if isinstance(teacher, TeacherSampled):
            soft = sampled_kl(
                u_RV, TeacherSampled(teacher.ids_NK[rows_R], teacher.shares_NK[rows_R]), out_RV
            )
        else:
            assert isinstance(teacher, TeacherSparse)
            kept = _rows(teacher, rows_R)
            soft = sparse_divergence(u_RV, kept, T, self._objective.divergence, out_RV)
        self.sums[0] += T * T * soft.value_R.sum()
        return soft

    def _cross_entropy(
        self, z_RV: Tensor, labels_R1: Tensor, soft: SoftTerm | None, scratch: Scratch
    ) -> None:
        """Leaves softmax(z) in `scratch.b_RV`, but for T = 1 and a cached teacher."""
        if soft is not None and self._objective.temperature == 1:
            log_z_R1 = soft.log_z_R1
        else:
            q_RV = scratch.b_RV
            # dense_divergence has left it there for T = 1.
            if self._objective.temperature != 1 or not isinstance(self._teacher, TeacherHidden):
                softmax(z_RV, q_RV)
            log_z_R1 = log_normaliser(z_RV, q_RV, labels_R1)
        self.sums[1] += (log_z_R1 - z_RV.gather(-1, labels_R1)).sum()

    def _write_gradient(
        self, out_RV: Tensor, labels_R1: Tensor | None, soft: SoftTerm | None, scratch: Scratch
    ) -> None:
        """out_RV = scale · (w · T · ∂D/∂u + (1 − w) · ∂CE/∂z); no labels where w = 1."""
        assert self._scale is not None
        w, T = self._objective.soft_weight, self._objective.temperature
        soft_scale, hard_scale = self._scale * w * T, self._scale * (1 - w)
        shared = soft is not None and T == 1
        if soft is not None:
            factor_R1, add_RK = soft_scale * soft.factor_R1, soft_scale * soft.add_RK
            if shared:
                factor_R1 = factor_R1 + hard_scale * soft.unit_R1
                add_RK = add_RK + hard_scale * soft.kept_RK
            torch.mul(soft.base_RV, factor_R1.to(out_RV.dtype), out=out_RV)
            out_RV.scatter_add_(-1, soft.ids_RK, add_RK.to(out_RV.dtype))
        elif self._teacher is not None:
            torch.mul(scratch.c_RV, soft_scale, out=out_RV)
        if labels_R1 is None:
            return
        if self._teacher is None:
            torch.mul(scratch.b_RV, hard_scale, out=out_RV)
        elif not shared:
            out_RV.add_(scratch.b_RV, alpha=hard_scale)
        out_RV.scatter_add_(-1, labels_R1, out_RV.new_full(labels_R1.shape, -hard_scale))


def _widened(x_RV: Tensor, buffer_RV: Tensor | None) -> Tensor:
    """Logits in the wide type: as they are, unless there is a buffer for the wide type."""
    return x_RV if buffer_RV is None else buffer_RV[: len(x_RV)].copy_(x_RV)


def _cap(x_RV: Tensor, softcap: float | None) -> Tensor:
    """Capped in place."""
    return x_RV if softcap is None else x_RV.div_(softcap).tanh_().mul_(softcap)


def _rows(teacher: TeacherSparse, rows: Tensor) -> TeacherSparse:
    return TeacherSparse(teacher.ids_NK[rows], teacher.logprobs_NK[rows], teacher.log_z_N[rows])
