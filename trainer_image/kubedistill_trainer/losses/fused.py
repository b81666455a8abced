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

from kubedistill_trainer.losses.buckets import centred, of_buckets, teacher_buckets
from kubedistill_trainer.losses.close import CLOSE_MIXED, GREATEST, series, shifted_away
from kubedistill_trainer.losses.divergence import GREATEST_LOG_RATIO, TINY, jsd_origin
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
            t = _capped(teacher[0].to(wide), caps[1])
            soft_C, slope = _dense(z, t, T, divergence)
        elif len(teacher) == 2:
            soft_C, slope = _sampled(_below(z, T), *teacher)
        else:
            soft_C, slope = _sparse(_below(z, T), TeacherSparse(*teacher), T, divergence)
        soft = T * T * soft_C.sum()
        grad = w * T * slope
    if w < 1:
        others, rest_C1, minus_log_C1 = _apart(_below(z, 1), labels_C1)
        hard = minus_log_C1.double().sum()
        grad = grad + (1 - w) * torch.where(_at(labels_C1, z), -rest_C1, others)
    if scale is not None:
        if caps[0] is not None:
            # d(cap · tanh(x / cap)) / dx, which 1 − tanh² would lose where the cap holds.
            grad = grad / torch.cosh(x / caps[0]).square()
        z_CV.copy_((grad * scale).to(z_CV.dtype))
    return torch.stack([soft, hard])


def _capped(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)


def _below(x: Tensor, temperature: float) -> Tensor:
    return (x - x.amax(-1, keepdim=True)) / temperature


def _at(token_C1: Tensor, like: Tensor) -> Tensor:
    """[C, V]: whether a column is that of the row's token."""
    return torch.arange(like.shape[-1], device=like.device) == token_C1


def _apart(x: Tensor, token_C1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(x) [C, V] with 0 at one token, what it adds up to, and −log of the token's own [C, 1];
    x ≤ 0. See `divergence.Softmax`."""
    own = x.gather(-1, token_C1)
    others = torch.where(_at(token_C1, x), 0.0, x.exp())
    rest = others.sum(-1, keepdim=True)
    total = rest + own.exp()
    minus_log = torch.where(own.exp() < TINY, total.log() - own, torch.log1p(rest / own.exp()))
    return others / total, rest / total, minus_log


def _dense(
    z: Tensor, t: Tensor, temperature: float, divergence: Divergence
) -> tuple[Tensor, Tensor]:
    """D [C] (fp64) and ∂D/∂u [C, V]; the formulas are those of `divergence.py`."""
    x, y = _below(t, temperature), _below(z, temperature)
    log_zp, log_zq = x.logsumexp(-1, keepdim=True), y.logsumexp(-1, keepdim=True)
    p, q = (x - log_zp).exp(), (y - log_zq).exp()
    between = t.amax(-1, keepdim=True).double() - z.amax(-1, keepdim=True).double()
    offset = (between / temperature + log_zp.double() - log_zq.double()).to(z.dtype)
    half = ((z - t) / temperature + offset) / 2
    s = torch.tanh(half)
    plain = (p + q) * s
    total = plain.sum(-1, keepdim=True)
    kl = (plain - 2 * p * half).sum(-1).double()
    value = divergence.forward * kl
    slope = divergence.forward * (plain - (p + q) * total / 2)
    top = q.argmax(-1, keepdim=True)
    if divergence.reverse:
        value = value + divergence.reverse * (2 * q * half - plain).sum(-1).double()
        slope = slope - 2 * divergence.reverse * q * centred(half, q, top)[1]
    if divergence.jsd:
        beta = divergence.beta
        d0, k, l0 = jsd_origin(half.gather(-1, top) * -2, beta)
        d = (-2 * half - d0).clamp(max=GREATEST_LOG_RATIO)
        log_m_q = torch.log1p(k * torch.expm1(d))
        terms = beta * p * (d - log_m_q) - (1 - beta) * q * log_m_q
        jsd = terms.sum(-1).double() + (beta * d0.double() - l0).squeeze(-1)
        value = value + divergence.jsd * jsd
        slope = slope + divergence.jsd * (1 - beta) * q * centred(log_m_q, q, top)[1]
    near = ((p + q) * series(s, divergence)).sum(-1).double()
    near = near - shifted_away(total.squeeze(-1), divergence)
    holds = (s.abs().amax(-1) < GREATEST) & (kl < CLOSE_MIXED)
    return torch.where(holds, near, value), slope


def _sampled(u: Tensor, ids_CK: Tensor, shares_CK: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p̂ ‖ q), p̂ the shares of the draws."""
    kept = u.gather(-1, ids_CK).double()
    own, place = kept.max(-1, keepdim=True)
    others, rest, minus_log = _apart(u, ids_CK.gather(-1, place))
    share = shares_CK.double()
    log_q = kept - own - minus_log.double()
    value = (torch.xlogy(share, share) - share * log_q).sum(-1)
    add = (-share).scatter_add(-1, place, 1 - rest.double())
    return value, others.scatter_add(-1, ids_CK, add.to(u.dtype))


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
    total = (rest - top).exp().sum(-1, keepdim=True).double()
    # As `cached._flat_tail`, where the tail all but has one value.
    count = u.shape[-1] - ids.shape[-1]
    above = torch.where(rest == float("-inf"), 0.0, torch.expm1(rest - top))
    flat = count + above.sum(-1, keepdim=True).double()
    log_tail = top.double() + torch.where(total > count / 2, flat, total).log()
    joint = torch.log_softmax(torch.cat([kept, log_tail], -1), -1)
    value, slope = of_buckets(torch.cat([log_p, log_p_tail], -1), joint, divergence)
    slope = slope.to(u.dtype)
    spread = torch.softmax(rest, -1) * slope[:, -1:]
    return value, spread.scatter(-1, ids, slope[:, :-1])
