"""The pointwise part of a chunk on a GPU: one function, which torch.compile makes into few kernels.

Step by step it is what `pointwise.py` does in blocks that stay in a CPU's cache. There every operator
writes into memory that is reused; here the operators only say what is computed, so that the compiler
can fuse them: a softmax with its reductions and what follows is two or three passes over the logits,
and the temporaries between them never reach memory. Nothing waits for the GPU: what `cached.py` asks
of the values (did the tail underflow?) is computed here in the way that always holds.

Letters as in `divergence.py` and `cached.py`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from kubedistill_trainer.losses.buckets import of_buckets, teacher_buckets
from kubedistill_trainer.losses.divergence import GREATEST_LOG_RATIO, centred
from kubedistill_trainer.losses.types import (
    Divergence,
    Objective,
    Teacher,
    TeacherHidden,
    TeacherSampled,
    TeacherSparse,
)


def worth_fusing(device: torch.device) -> bool:
    """Whether the compiled form is taken: on a GPU for which Triton makes kernels."""
    return device.type == "cuda" and has_triton()


class FusedPointwise:
    """As `Pointwise`; a block is the chunk. `sums`: of the soft and the hard loss so far, fp64 [2]."""

    def __init__(
        self,
        teacher: Teacher | None,
        objective: Objective,
        scale: float | None,
        wide: torch.dtype,
        device: torch.device,
    ) -> None:
        """`scale`: factor of the gradient, None where none is wanted."""
        self._teacher = teacher
        self._objective = objective
        self._wide = wide
        # A tensor: as a number it would be compiled in, and it differs from step to step.
        self._scale = None if scale is None else torch.tensor(scale, dtype=wide, device=device)
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, z_CV: Tensor, t_CV: Tensor, rows_C: Tensor, labels_C: Tensor) -> None:
        """Add the loss of the tokens at rows_C [C] to the sums; z_CV becomes its gradient.

        t_CV: the teacher's logits where it is a TeacherHidden, else empty.
        """
        o, teacher = self._objective, self._teacher
        teacher_cap = teacher.softcap if isinstance(teacher, TeacherHidden) else None
        self.sums += _compiled()(
            z_CV, _rows(teacher, t_CV, rows_C), labels_C[:, None], self._scale, o.temperature,
            o.soft_weight, o.divergence, (o.softcap, teacher_cap), self._wide,
        )  # fmt: skip


def _rows(teacher: Teacher | None, t_CV: Tensor, rows_C: Tensor) -> tuple[Tensor, ...]:
    """What is known of the teacher at rows_C, as `fused_chunk` takes it."""
    match teacher:
        case TeacherHidden():
            return (t_CV,)
        case TeacherSampled(ids, shares):
            return ids[rows_C], shares[rows_C]
        case TeacherSparse(ids, logprobs, log_z):
            return ids[rows_C], logprobs[rows_C], log_z[rows_C]
    return ()


@cache
def _compiled() -> Any:
    # Dynamic: the last chunk of a batch is shorter than the others.
    return torch.compile(fused_chunk, dynamic=True)


def fused_chunk(
    z_CV: Tensor,
    teacher: tuple[Tensor, ...],
    labels_C1: Tensor,
    scale: Tensor | None,
    temperature: float,
    soft_weight: float,
    divergence: Divergence,
    caps: tuple[float | None, float | None],
    wide: torch.dtype,
) -> Tensor:
    """Sums of T² · D and of the cross-entropy over the chunk, fp64 [2]; z_CV becomes

        scale · (w · T · ∂D/∂u + (1 − w) · ∂CE/∂z),  u = z / T

    `teacher`: () for none, (logits [C, V],) for Hidden, (ids, shares) [C, K] for Sampled,
    (ids, logprobs [C, K], log Z [C]) for Sparse. `caps`: of the student's and the teacher's logits.
    """
    T, w = temperature, soft_weight
    x = z_CV.to(wide)
    z = _capped(x, caps[0])
    soft = hard = z.new_zeros((), dtype=torch.float64)
    grad = torch.zeros_like(z)
    if teacher:
        if len(teacher) == 1:
            soft_C, slope = _dense(z / T, _capped(teacher[0].to(wide), caps[1]) / T, divergence)
        elif len(teacher) == 2:
            soft_C, slope = _sampled(z / T, *teacher)
        else:
            soft_C, slope = _sparse(z / T, TeacherSparse(*teacher), T, divergence)
        soft = T * T * soft_C.sum()
        grad = w * T * slope
    if w < 1:
        log_q = torch.log_softmax(z, -1)
        hard = -log_q.gather(-1, labels_C1).double().sum()
        ones = torch.ones_like(labels_C1, dtype=wide)
        grad = grad + (1 - w) * log_q.exp().scatter_add(-1, labels_C1, -ones)
    if scale is not None:
        if caps[0] is not None:
            # d(cap · tanh(x / cap)) / dx, which 1 − tanh² would lose where the cap holds.
            grad = grad / torch.cosh(x / caps[0]).square()
        z_CV.copy_((grad * scale).to(z_CV.dtype))
    return torch.stack([soft, hard])


def _capped(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)


def _dense(u: Tensor, t: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """D [C] (fp64) and ∂D/∂u [C, V]; the formulas are those of `divergence.py`."""
    log_p, log_q = torch.log_softmax(t, -1), torch.log_softmax(u, -1)
    p, q, d = log_p.exp(), log_q.exp(), log_p - log_q
    value = torch.zeros_like(p[:, 0], dtype=torch.float64)
    slope = torch.zeros_like(p)
    if divergence.forward:
        value = value + divergence.forward * (p * d - p + q).sum(-1).double()
        slope = slope + divergence.forward * (q - p)
    if divergence.reverse:
        value = value + divergence.reverse * (p - q - q * d).sum(-1).double()
        slope = slope + divergence.reverse * q * centred(d, q, q.argmax(-1, keepdim=True))[1]
    if divergence.jsd:
        beta, d = divergence.beta, d.clamp(max=GREATEST_LOG_RATIO)
        log_m_q = torch.log1p(beta * torch.expm1(d))
        terms = beta * p * (d - log_m_q) - (1 - beta) * q * log_m_q
        value = value + divergence.jsd * terms.sum(-1).double()
        slope = (
            slope
            + divergence.jsd * (1 - beta) * q * (centred(log_m_q, q, q.argmax(-1, keepdim=True))[1])
        )
    return value, slope


def _sampled(u: Tensor, ids_CK: Tensor, shares_CK: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p̂ ‖ q), p̂ the shares of the draws."""
    log_q = torch.log_softmax(u, -1)
    share = shares_CK.double()
    value = (torch.xlogy(share, share) - share * log_q.gather(-1, ids_CK).double()).sum(-1)
    return value, log_q.exp().scatter_add(-1, ids_CK, -shares_CK.to(u.dtype))


def _sparse(
    u: Tensor, teacher: TeacherSparse, temperature: float, divergence: Divergence
) -> tuple[Tensor, Tensor]:
    """D over the kept tokens and the tail, see `cached.sparse_divergence`."""
    ids = teacher.ids_NK
    kept = u.gather(-1, ids).double()
    log_p, log_p_tail = teacher_buckets(teacher, temperature)
    if ids.shape[-1] == u.shape[-1]:
        value, slope = of_buckets(log_p, torch.log_softmax(kept, -1), divergence)
        return value, torch.zeros_like(u).scatter(-1, ids, slope.to(u.dtype))
    rest = u.scatter(-1, ids, float("-inf"))
    # Two numbers: a log Z of a hundred has no more than five digits behind the point in fp32.
    top = rest.amax(-1, keepdim=True)
    log_tail = top.double() + (rest - top).logsumexp(-1, keepdim=True).double()
    joint = torch.log_softmax(torch.cat([kept, log_tail], -1), -1)
    value, slope = of_buckets(torch.cat([log_p, log_p_tail], -1), joint, divergence)
    slope = slope.to(u.dtype)
    spread = torch.softmax(rest, -1) * slope[:, -1:]
    return value, spread.scatter(-1, ids, slope[:, :-1])
