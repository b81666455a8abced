"""Soft terms of a cached teacher, Sparse and Sampled: few passes over the vocabulary.

Letters as in divergence.py: z the student's logits, T the temperature, u = z / T, q = softmax(u), p
the teacher's distribution at T, K the tokens that the cache names, R the tokens of the block.

A cache names few tokens, so that the gradient is one factor a row times a softmax, plus a few
entries; and log Z follows from any entry whose probability did not underflow: log Z = u_v − log q_v.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from kubedistill_trainer.losses.buckets import of_buckets, teacher_buckets
from kubedistill_trainer.losses.divergence import TINY, Softmax, normalise, tempered
from kubedistill_trainer.losses.types import Divergence, TeacherSampled, TeacherSparse

_LOG_TINY = math.log(TINY)
_FLAT = 0.25
"""Greatest less least u, below which a student counts as all but uniform. Above it the sum of e^u has the
digits, and a fresh student at T = 4, whose u is not far above it, is spared the passes."""


@dataclass(frozen=True)
class _Tokens:
    """What is known of the tokens that a cache names before any pass over the vocabulary.

    It is made for many rows at once: an operator on [R, K] costs as much for five rows as for
    hundreds, and there are dozens of them. ids_RK; u_RK (fp64): the student's u there; place_R1,
    top_R1 and u_top_R1 (fp64): place, id and u of the likeliest of them.
    """

    ids_RK: Tensor
    u_RK: Tensor
    place_R1: Tensor
    top_R1: Tensor
    u_top_R1: Tensor

    def blocks(self, rows: int) -> Iterator[Self]:
        """The same, `rows` at a time."""
        return map(type(self), *(getattr(self, f.name).split(rows) for f in fields(self)))


@dataclass(frozen=True)
class SampledTokens(_Tokens):
    """`share_RK`: of the draws, fp64."""

    share_RK: Tensor

    @classmethod
    def of(cls, teacher: TeacherSampled, u_RK: Tensor) -> SampledTokens:
        """`u_RK`: the student's u at the teacher's ids."""
        return cls(*_student(teacher.ids_NK, u_RK), teacher.shares_NK.double())


@dataclass(frozen=True)
class SparseTokens(_Tokens):
    """`log_p_RB`: of the K tokens, and of the tail where there is one; `log_kept_R1`: log Σ_k e^{u_k}.
    Both fp64."""

    log_p_RB: Tensor
    log_kept_R1: Tensor

    @classmethod
    def of(
        cls, teacher: TeacherSparse, u_RK: Tensor, temperature: float, vocab_size: int
    ) -> SparseTokens:
        """`u_RK`: the student's u at the teacher's ids."""
        log_p, log_pt_R1 = teacher_buckets(teacher, temperature)
        if log_p.shape[-1] < vocab_size:
            log_p = torch.cat([log_p, log_pt_R1], -1)
        log_kept_R1 = u_RK.double().logsumexp(-1, keepdim=True)
        return cls(*_student(teacher.ids_NK, u_RK), log_p, log_kept_R1)


def _student(ids_RK: Tensor, u_RK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    u_RK = u_RK.double()
    u_top_R1, place_R1 = u_RK.max(-1, keepdim=True)
    return ids_RK, u_RK, place_R1, ids_RK.gather(-1, place_R1), u_top_R1


@dataclass(frozen=True)
class SoftTerm:
    """D of each token and its gradient ∂D / ∂u = factor · base + (`add` at `ids`).

    value_R [R], log_z_R1 [R, 1] and factor_R1 [R, 1] fp64, base_RV [R, V], ids_RK and add_RK [R, K].
    The student's own q = unit · base + (`kept` at `ids`): so at T = 1 cross-entropy needs no softmax.
    """

    value_R: Tensor
    log_z_R1: Tensor
    base_RV: Tensor
    factor_R1: Tensor
    unit_R1: Tensor
    ids_RK: Tensor
    add_RK: Tensor
    kept_RK: Tensor


def log_normaliser(
    z_RV: Tensor, temperature: float, q_RV: Tensor, top_R1: Tensor, u_top_R1: Tensor
) -> Tensor:
    """log Σ exp(z_RV / T) [R, 1] (fp64), from q_RV = softmax(z_RV / T) at top_R1, where u is u_top_R1.

    Where that underflowed, from the greatest entry of the row, which takes two passes to find.
    """
    q_R1 = q_RV.gather(-1, top_R1)
    if float(q_R1.min()) < TINY:
        u_top_R1 = z_RV.amax(-1, keepdim=True) * (1 / temperature)
        q_R1 = q_RV.amax(-1, keepdim=True)
    return u_top_R1.double() - q_R1.double().log()


def sampled_kl(z_RV: Tensor, tokens: SampledTokens, temperature: float, out_RV: Tensor) -> SoftTerm:
    """KL(p̂ ‖ q), p̂ the shares of the draws; `base_RV` is out_RV.

    Its gradient q − p̂ is unbiased, as p̂ enters linearly; its value is not: of p̂'s own entropy.
    """
    torch.softmax(tempered(z_RV, temperature, out_RV), -1, out=out_RV)
    log_z_R1 = log_normaliser(z_RV, temperature, out_RV, tokens.top_R1, tokens.u_top_R1)
    q = Softmax.apart(out_RV, tokens.top_R1)
    log_z_R1 -= q.unit_R1.log()
    share_RK, log_q_RK = tokens.share_RK, tokens.u_RK - log_z_R1
    value_R = (torch.xlogy(share_RK, share_RK) - share_RK * log_q_RK).sum(-1)
    kept_RK = torch.zeros_like(share_RK).scatter_(-1, tokens.place_R1, 1 - q.rest_R1)
    return SoftTerm(
        value_R, log_z_R1, out_RV, q.unit_R1, q.unit_R1, tokens.ids_RK, kept_RK - share_RK, kept_RK
    )


def sparse_divergence(
    z_RV: Tensor,
    tokens: SparseTokens,
    temperature: float,
    divergence: Divergence,
    out_RV: Tensor,
) -> SoftTerm:
    """D with all but the K kept tokens as one bucket, the tail; `base_RV` is out_RV.

    The divergence of the distributions over K + 1 buckets. p_t = 1 − Σ_k p_k is the mass that the
    teacher's exact log Z leaves over. q_t = Σ_{v ∉ K} q_v is summed over the rest: 1 − Σ_k q_k would
    cancel to nothing for a confident student.

    Gradient with respect to u. With log q_k = u_k − log Z and
    log q_t = log Σ_{v ∉ K} e^{u_v} − log Z,

        ∂ log q_k / ∂u_v = [v = k] − q_v        ∂ log q_t / ∂u_v = [v ∉ K] · q_v / q_t − q_v

    and, with s_b = q_b (∂D/∂q_b − Σ q ∂D/∂q) of a bucket b (for KL(p ‖ q): q_b − p_b),

        ∂D / ∂u_v = s_v                  for v ∈ K
        ∂D / ∂u_v = (s_t / q_t) · q_v    for v ∉ K

    Where q_t underflows it is made anew by a softmax over the tail alone, which stays exact however
    little mass is left. With K = V there is no tail and it is the full divergence.
    """
    ids_RK, count = tokens.ids_RK, tokens.ids_RK.shape[-1]
    if count == z_RV.shape[-1]:
        out_RV.zero_()
        log_q = tokens.u_RK - tokens.log_kept_R1
        value_R, slope = of_buckets(tokens.log_p_RB, log_q, divergence)
        one = torch.ones_like(tokens.log_kept_R1)
        return SoftTerm(value_R, tokens.log_kept_R1, out_RV, one, one, ids_RK, slope, log_q.exp())
    # That its rows do not quite add up to 1 cancels, for nothing below but shares of the tail is
    # taken from it.
    torch.softmax(tempered(z_RV, temperature, out_RV), -1, out=out_RV)
    log_z_R1 = log_normaliser(z_RV, temperature, out_RV, tokens.top_R1, tokens.u_top_R1)
    log_base_R1 = out_RV.scatter_(-1, ids_RK, 0.0).sum(-1, keepdim=True).double().log()
    log_tail_R1 = log_z_R1 + log_base_R1
    if float(log_base_R1.min()) < _LOG_TINY:
        u_RV = tempered(z_RV, temperature, torch.empty_like(z_RV))
        log_tail_R1 = normalise(u_RV.scatter(-1, ids_RK, float("-inf")), out_RV)
        log_base_R1 = torch.zeros_like(log_tail_R1)
    elif float((tokens.u_top_R1 - log_z_R1).max()) < _FLAT - math.log(z_RV.shape[-1]):
        log_tail_R1 = _flat_tail(z_RV, ids_RK, temperature, log_tail_R1)
    # Once more, of the buckets: then what rounding did to the tail's sum is divided out of q_t.
    log_z_R1 = torch.logaddexp(tokens.log_kept_R1, log_tail_R1)
    log_q = torch.cat([tokens.u_RK, log_tail_R1], -1) - log_z_R1
    value_R, slope = of_buckets(tokens.log_p_RB, log_q, divergence)
    q = log_q.exp()
    base_R1 = log_base_R1.exp()
    return SoftTerm(
        value_R, log_z_R1, out_RV, slope[:, count:] / base_R1, q[:, count:] / base_R1,
        ids_RK, slope[:, :count], q[:, :count],
    )  # fmt: skip


def _flat_tail(z_RV: Tensor, ids_RK: Tensor, temperature: float, log_tail_R1: Tensor) -> Tensor:
    """The same log Σ_{v ∉ K} e^{u_v} as log_tail_R1, to more digits where u all but has one value.

    The divergence of such a student from such a teacher is of second order in u's spread, its gradient
    of first order: e^u in fp32 has no more than a few digits of it, e^(u − max) − 1 has all.
    """
    u_RV = z_RV * (1 / temperature)
    least_R, most_R = torch.aminmax(u_RV, dim=-1)
    most_R1 = most_R[:, None]
    above_RV = u_RV.sub_(most_R1).expm1_().scatter_(-1, ids_RK, 0.0)
    count = z_RV.shape[-1] - ids_RK.shape[-1]
    flat_R1 = most_R1 + (count + above_RV.sum(-1, keepdim=True, dtype=torch.float64)).log()
    return torch.where((most_R - least_R < _FLAT)[:, None], flat_R1, log_tail_R1)
