"""Soft terms of a cached teacher, Sparse and Sampled: few passes over the vocabulary.

Letters as in divergence.py: z the student's logits, T the temperature, u = z / T, q = softmax(u), p
the teacher's distribution at T, K the tokens that the cache names, R the tokens of the block.

A cache names few tokens, so that the gradient is one factor a row times a softmax, plus a few
entries; and log Z follows from any entry whose probability did not underflow: log Z = u_v − log q_v.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kubedistill_trainer.losses.buckets import of_buckets, teacher_buckets
from kubedistill_trainer.losses.divergence import normalise, softmax
from kubedistill_trainer.losses.types import Divergence, TeacherSampled, TeacherSparse

_TINY = 1e-30
"""Below it a probability in fp32 loses digits, and then vanishes."""
_LOG_TINY = math.log(_TINY)


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


def log_normaliser(u_RV: Tensor, q_RV: Tensor, ids_RK: Tensor) -> Tensor:
    """log Σ exp(u_RV) [R, 1] (fp64), from q_RV = softmax(u_RV) at the likeliest of ids_RK [R, K].

    Where that underflowed, from the greatest entry of the row, which takes two passes to find.
    """
    u_RK = u_RV.gather(-1, ids_RK)
    top_R1, place_R1 = u_RK.max(-1, keepdim=True)
    q_R1 = q_RV.gather(-1, ids_RK.gather(-1, place_R1))
    if bool((q_R1 < _TINY).any()):
        top_R1, q_R1 = u_RV.amax(-1, keepdim=True), q_RV.amax(-1, keepdim=True)
    return top_R1.double() - q_R1.double().log()


def sampled_kl(u_RV: Tensor, teacher: TeacherSampled, out_RV: Tensor) -> SoftTerm:
    """KL(p̂ ‖ q), p̂ the shares of the draws; `base_RV` is out_RV, which becomes q.

    Its gradient q − p̂ is unbiased, as p̂ enters linearly; its value is not: of p̂'s own entropy.
    """
    softmax(u_RV, out_RV)
    log_z_R1 = log_normaliser(u_RV, out_RV, teacher.ids_NK)
    share_RK = teacher.shares_NK.double()
    log_q_RK = u_RV.gather(-1, teacher.ids_NK).double() - log_z_R1
    value_R = (torch.xlogy(share_RK, share_RK) - share_RK * log_q_RK).sum(-1)
    one = torch.ones_like(log_z_R1)
    nothing = torch.zeros_like(share_RK)
    return SoftTerm(value_R, log_z_R1, out_RV, one, one, teacher.ids_NK, -share_RK, nothing)


def sparse_divergence(
    u_RV: Tensor,
    teacher: TeacherSparse,
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
    ids_RK, count = teacher.ids_NK, teacher.ids_NK.shape[-1]
    u_RK = u_RV.gather(-1, ids_RK).double()
    log_p, log_pt_R1 = teacher_buckets(teacher, temperature)
    if count == u_RV.shape[-1]:
        out_RV.zero_()
        log_z_R1 = u_RK.logsumexp(-1, keepdim=True)
        log_q = u_RK - log_z_R1
        value_R, slope = of_buckets(log_p, log_q, divergence)
        one = torch.ones_like(log_z_R1)
        return SoftTerm(value_R, log_z_R1, out_RV, one, one, ids_RK, slope, log_q.exp())
    # By torch's own softmax: that its rows do not quite add up to 1 cancels, for nothing below but
    # shares of the tail is taken from it.
    torch.softmax(u_RV, -1, out=out_RV)
    log_z_R1 = log_normaliser(u_RV, out_RV, ids_RK)
    log_base_R1 = out_RV.scatter_(-1, ids_RK, 0.0).sum(-1, keepdim=True).double().log()
    log_tail_R1 = log_z_R1 + log_base_R1
    if bool((log_base_R1 < _LOG_TINY).any()):
        log_tail_R1 = normalise(u_RV.scatter(-1, ids_RK, float("-inf")), out_RV)
        log_base_R1 = torch.zeros_like(log_tail_R1)
    # Once more, of the buckets: then what rounding did to the tail's sum is divided out of q_t.
    log_z_R1 = torch.logaddexp(u_RK.logsumexp(-1, keepdim=True), log_tail_R1)
    log_q = torch.cat([u_RK, log_tail_R1], -1) - log_z_R1
    value_R, slope = of_buckets(torch.cat([log_p, log_pt_R1], -1), log_q, divergence)
    factor_R1 = slope[:, count:] * (-log_base_R1).exp()
    unit_R1 = (log_q[:, count:] - log_base_R1).exp()
    add_RK, kept_RK = slope[:, :count], log_q[:, :count].exp()
    return SoftTerm(value_R, log_z_R1, out_RV, factor_R1, unit_R1, ids_RK, add_RK, kept_RK)
