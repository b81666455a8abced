"""The pointwise part of a chunk: from the logits to the loss and the logits' gradient."""

from __future__ import annotations

from itertools import repeat

import torch
from torch import Tensor

from kubedistill_trainer.losses.cached import (
    SampledTokens,
    SoftTerm,
    SparseTokens,
    log_normaliser,
    sampled_kl,
    sparse_divergence,
)
from kubedistill_trainer.losses.divergence import Scratch, Softmax, dense_divergence
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
        self._hard = objective.soft_weight < 1
        self._block_tokens = block_tokens
        self._wide = wide
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)

        def buffer(wanted: bool = True) -> Tensor:
            rows = block_tokens if wanted else 0
            return torch.empty(rows, objective.vocab_size, dtype=wide, device=device)

        dense = isinstance(teacher, TeacherHidden)
        apart = teacher is not None and objective.temperature != 1
        self._scratch = Scratch(buffer(dense), buffer(), buffer(dense or apart))
        self._student_RV, self._teacher_RV = (None if d == wide else buffer() for d in dtypes)

    def add(self, z_CV: Tensor, t_CV: Tensor, rows_C: Tensor, labels_C: Tensor) -> None:
        """Add the loss of the tokens at rows_C [C] to the sums; z_CV becomes its gradient.

        t_CV: the teacher's logits where it is a TeacherHidden, else empty.
        """
        size, labels_C1, T = self._block_tokens, labels_C[:, None], self._objective.temperature
        z_label_C1 = self._student_at(z_CV, labels_C1).double()
        tokens = self._tokens(z_CV, rows_C)
        named = repeat(None) if tokens is None else tokens.blocks(size)
        soft: list[Tensor] = []
        log_z: list[Tensor] = []
        for start, some in zip(range(0, len(z_CV), size), named, strict=False):
            block = slice(start, start + size)
            soft_R, log_z_R1 = self._block(
                z_CV[block], t_CV[block], some, labels_C1[block], z_label_C1[block]
            )
            soft += [] if soft_R is None else [soft_R]
            log_z += [] if log_z_R1 is None else [log_z_R1]
        if soft:
            self.sums[0] += T * T * torch.cat(soft).sum()
        if log_z:
            self.sums[1] += (torch.cat(log_z) - z_label_C1).sum()

    def _tokens(self, z_CV: Tensor, rows_C: Tensor) -> SampledTokens | SparseTokens | None:
        """What a cache names of these rows."""
        teacher, T = self._teacher, self._objective.temperature
        if teacher is None or isinstance(teacher, TeacherHidden):
            return None
        ids_CK = teacher.ids_NK[rows_C]
        u_CK = self._student_at(z_CV, ids_CK) * (1 / T)
        if isinstance(teacher, TeacherSampled):
            return SampledTokens.of(TeacherSampled(ids_CK, teacher.shares_NK[rows_C]), u_CK)
        kept = TeacherSparse(ids_CK, teacher.logprobs_NK[rows_C], teacher.log_z_N[rows_C])
        return SparseTokens.of(kept, u_CK, T, z_CV.shape[-1])

    def _student_at(self, z_CV: Tensor, ids_CK: Tensor) -> Tensor:
        """The student's logits at ids_CK, as `_block` gets to see them."""
        found_CK = z_CV.gather(-1, ids_CK).to(self._wide)
        return _capped(found_CK, self._objective.softcap)

    def _block(
        self,
        z_RV: Tensor,
        t_RV: Tensor,
        tokens: SampledTokens | SparseTokens | None,
        labels_R1: Tensor,
        z_label_R1: Tensor,
    ) -> tuple[Tensor | None, Tensor | None]:
        """D of each token [R] and the student's log Z [R, 1], as far as they are wanted; the logits
        are overwritten by their gradient."""
        scratch = self._scratch.head(len(z_RV))
        cap = self._objective.softcap
        wide_RV = _widened(z_RV, self._student_RV)
        if cap is not None:
            # d(cap · tanh(x / cap)) / dx = 1 / cosh²(x / cap). As 1 − tanh² it would be lost where the
            # cap holds, and after the cap nobody knows x.
            slope_RV = wide_RV.div(cap).cosh_().square_().reciprocal_()
            _capped(wide_RV, cap)
        soft, soft_R, unit_R1 = None, None, None
        if isinstance(self._teacher, TeacherHidden):
            t_RV = _capped(_widened(t_RV, self._teacher_RV), self._teacher.softcap)
            soft_R, unit_R1 = self._dense(wide_RV, t_RV, scratch)
        elif tokens is not None:
            soft = self._cached(wide_RV, tokens, scratch)
            soft_R = soft.value_R
        log_z_R1, q = None, None
        if self._hard:
            log_z_R1, q = self._cross_entropy(wide_RV, labels_R1, z_label_R1, soft, scratch)
        if self._scale is not None:
            self._write_gradient(wide_RV, labels_R1, soft, unit_R1, q, scratch)
            if cap is not None:
                wide_RV.mul_(slope_RV)
            if wide_RV.dtype != z_RV.dtype:
                z_RV.copy_(wide_RV)
        return soft_R, log_z_R1

    def _dense(self, z_RV: Tensor, t_RV: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
        T, max_R1 = self._objective.temperature, z_RV.amax(-1, keepdim=True)
        return dense_divergence(z_RV, max_R1, t_RV, T, self._objective.divergence, scratch)

    def _cached(
        self, z_RV: Tensor, tokens: SampledTokens | SparseTokens, scratch: Scratch
    ) -> SoftTerm:
        """At T = 1 its base is `scratch.b_RV`, which cross-entropy shares, else `scratch.c_RV`."""
        T = self._objective.temperature
        out_RV = scratch.b_RV if T == 1 else scratch.c_RV
        if isinstance(tokens, SampledTokens):
            return sampled_kl(z_RV, tokens, T, out_RV)
        return sparse_divergence(z_RV, tokens, T, self._objective.divergence, out_RV)

    def _cross_entropy(
        self,
        z_RV: Tensor,
        labels_R1: Tensor,
        z_label_R1: Tensor,
        soft: SoftTerm | None,
        scratch: Scratch,
    ) -> tuple[Tensor, Softmax | None]:
        """log Z [R, 1], and softmax(z) in `scratch.b_RV`.

        At T = 1 a cached teacher's `soft` has all that is needed.
        """
        T = self._objective.temperature
        if soft is not None and T == 1:
            return soft.log_z_R1, None
        if T != 1 or not isinstance(self._teacher, TeacherHidden):
            torch.softmax(z_RV, -1, out=scratch.b_RV)
        # Else dense_divergence has left it there.
        log_z_R1 = log_normaliser(z_RV, 1, scratch.b_RV, labels_R1, z_label_R1)
        q = Softmax.apart(scratch.b_RV, labels_R1)
        return log_z_R1 - q.unit_R1.log(), q

    def _write_gradient(
        self,
        out_RV: Tensor,
        labels_R1: Tensor,
        soft: SoftTerm | None,
        unit_R1: Tensor | None,
        q: Softmax | None,
        scratch: Scratch,
    ) -> None:
        """out_RV = scale · (w · T · ∂D/∂u + (1 − w) · ∂CE/∂z). `unit_R1`: of a dense teacher's ∂D/∂u.

        At the label softmax(z) − 1 is made from what all others have: in fp32 nothing is left of it
        where a student is sure of the label.
        """
        assert self._scale is not None
        w, T = self._objective.soft_weight, self._objective.temperature
        soft_scale, hard_scale = self._scale * w * T, self._scale * (1 - w)
        label_R1 = torch.full_like(labels_R1, -hard_scale, dtype=torch.float64)
        if soft is not None:
            factor_R1, add_RK = soft_scale * soft.factor_R1, soft_scale * soft.add_RK
            if q is None and self._hard:
                factor_R1 += hard_scale * soft.unit_R1
                named_RK = _first(soft.ids_RK == labels_R1)
                add_RK += hard_scale * (soft.kept_RK - named_RK)
                label_R1 *= 1 - named_RK.sum(-1, keepdim=True)
            torch.mul(soft.base_RV, factor_R1.to(out_RV.dtype), out=out_RV)
            out_RV.scatter_add_(-1, soft.ids_RK, add_RK.to(out_RV.dtype))
        elif unit_R1 is not None:
            torch.mul(scratch.c_RV, soft_scale * unit_R1, out=out_RV)
        if not self._hard:
            return
        if q is not None:
            factor_R1 = (hard_scale * q.unit_R1).to(out_RV.dtype)
            if self._teacher is None:
                torch.mul(scratch.b_RV, factor_R1, out=out_RV)
            else:
                out_RV.addcmul_(scratch.b_RV, factor_R1)
            label_R1 = -hard_scale * q.rest_R1
        out_RV.scatter_add_(-1, labels_R1, label_R1.to(out_RV.dtype))


def _widened(x_RV: Tensor, buffer_RV: Tensor | None) -> Tensor:
    """Logits in the wide type: as they are, unless there is a buffer for the wide type."""
    return x_RV if buffer_RV is None else buffer_RV[: len(x_RV)].copy_(x_RV)


def _first(found_RK: Tensor) -> Tensor:
    """1 (fp64) at the first True of each row: a cache of draws may name a token twice."""
    return (found_RK & (found_RK.cumsum(-1) == 1)).double()


def _capped(x_RV: Tensor, softcap: float | None) -> Tensor:
    """In place."""
    return x_RV if softcap is None else x_RV.div_(softcap).tanh_().mul_(softcap)
