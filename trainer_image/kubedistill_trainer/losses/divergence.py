"""Loss and analytic logit gradient of a block of tokens, in memory that is handed in.

Letters: z the student's logits, T the temperature, q = softmax(z / T), p the teacher's distribution
at T, y the label, R the tokens of the block. Everything here is fp32 (fp64 for fp64 inputs) over the
vocabulary and fp64 for the few numbers a token has.

**One exponential a softmax.** `torch.softmax` gives e^(x − max) / Z without a second pass for the
logarithm; its own greatest entry is 1 / Z, hence log Z = max x − log max softmax(x).

**KL as a Bregman sum.** KL = Σ_v [p_v (log p_v − log q_v) − p_v + q_v]. The last two terms sum to 0
on paper; on a machine they make every term ≥ 0 and cancel the rounding of both log Z to first order.
At T = 10 KL is about 1/1000 of log Z, and the plain sum keeps three digits in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kubedistill_trainer.losses.types import TeacherSparse


@dataclass(frozen=True)
class Scratch:
    """Three buffers [R, V] of the wide type, overwritten by every call."""

    a_RV: Tensor
    b_RV: Tensor
    c_RV: Tensor

    def head(self, rows: int) -> Scratch:
        return Scratch(self.a_RV[:rows], self.b_RV[:rows], self.c_RV[:rows])


def normalise(x_RV: Tensor, out_RV: Tensor, max_R1: Tensor | None = None) -> Tensor:
    """out_RV = softmax(x_RV); log Σ exp(x) [R, 1] in fp64. `max_R1`: x's row maximum, if known."""
    torch.softmax(x_RV, -1, out=out_RV)
    max_R1 = x_RV.amax(-1, keepdim=True) if max_R1 is None else max_R1
    return max_R1.double() - out_RV.amax(-1, keepdim=True).double().log()


def dense_kl(
    z_RV: Tensor, zmax_R1: Tensor, t_RV: Tensor, temperature: float, scratch: Scratch
) -> Tensor:
    """KL of each token [R] (fp64) for teacher logits t_RV.

    Leaves q in `scratch.b_RV` and q − p in `scratch.c_RV`; t_RV is used up, z_RV is not touched.
    """
    p_RV, q_RV, x_RV = scratch.a_RV, scratch.b_RV, scratch.c_RV
    log_zp_R1 = normalise(t_RV.div_(temperature), p_RV)
    # The same rounding as the row's maximum got, or log Z would not belong to q.
    log_zq_R1 = normalise(torch.div(z_RV, temperature, out=x_RV), q_RV, zmax_R1 / temperature)
    offset_R1 = log_zp_R1 - log_zq_R1
    rounded_R1 = offset_R1.to(t_RV.dtype)
    log_ratio_RV = t_RV.sub_(x_RV).sub_(rounded_R1)
    kl_R = log_ratio_RV.mul_(p_RV).sum(-1).double()
    kl_R += (rounded_R1.double() - offset_R1).squeeze(-1)
    return kl_R + torch.sub(q_RV, p_RV, out=x_RV).sum(-1)


def sparse_kl(z_RV: Tensor, teacher: TeacherSparse, temperature: float, scratch: Scratch) -> Tensor:
    """KL of each token [R] (fp64) with all but the K kept tokens as one bucket, the tail.

        KL = Σ_k p_k (log p_k − log q_k) + p_t (log p_t − log q_t)

    p_t = 1 − Σ_k p_k is the mass that the teacher's exact log Z leaves over. q_t = Σ_{v ∉ K} q_v is
    summed over the rest: 1 − Σ_k q_k would cancel to nothing for a confident student.

    Gradient with respect to u = z / T. With Z = Σ_v e^{u_v}: log q_k = u_k − log Z and
    log q_t = log Σ_{v ∉ K} e^{u_v} − log Z, so that

        ∂ log q_k / ∂u_v = [v = k] − q_v        ∂ log q_t / ∂u_v = [v ∉ K] · q_v / q_t − q_v

    and, as Σ_k p_k + p_t = 1,

        ∂KL / ∂u_v = q_v − p_v              for v ∈ K
        ∂KL / ∂u_v = q_v − p_t · q_v / q_t  for v ∉ K:  (q_t − p_t) · r_v,  r_v = q_v / q_t

    r is a softmax over the tail alone: one pass over the vocabulary gives it and q_t, and both stay
    exact however little mass is left. With K = V there is no tail and it is the full KL.

    Leaves ∂KL / ∂u in `scratch.c_RV`; z_RV is not touched.
    """
    grad_RV, u_RV, ids_RK = scratch.c_RV, scratch.a_RV, teacher.ids_NK
    torch.div(z_RV, temperature, out=u_RV)
    u_RK = u_RV.gather(-1, ids_RK).double()
    log_z_R1 = u_RK.logsumexp(-1, keepdim=True)
    log_p_RK, log_pt_R1 = _teacher_buckets(teacher, temperature)
    if ids_RK.shape[-1] < z_RV.shape[-1]:
        tail_R1 = normalise(u_RV.scatter_(-1, ids_RK, float("-inf")), grad_RV)
        log_z_R1 = torch.logaddexp(log_z_R1, tail_R1)
        log_qt_R1 = tail_R1 - log_z_R1
        grad_RV.mul_((log_qt_R1.exp() - log_pt_R1.exp()).to(grad_RV.dtype))
    else:
        log_pt_R1 = torch.full_like(log_z_R1, float("-inf"))
        log_qt_R1 = log_pt_R1
    log_q_RK = u_RK - log_z_R1
    grad_RV.scatter_(-1, ids_RK, (log_q_RK.exp() - log_p_RK.exp()).to(grad_RV.dtype))
    return _bregman(torch.cat([log_p_RK, log_pt_R1], -1), torch.cat([log_q_RK, log_qt_R1], -1)).sum(
        -1
    )


def _teacher_buckets(teacher: TeacherSparse, temperature: float) -> tuple[Tensor, Tensor]:
    """log p of the K tokens [R, K] and of the tail [R, 1], fp64; they sum to 1.

    Quantised log-probabilities may sum to a little over 1: they are then scaled back to 1.
    """
    log_p_RK = teacher.logprobs_NK.double() / temperature - teacher.log_z_N[:, None].double()
    log_kept_R1 = log_p_RK.logsumexp(-1, keepdim=True)
    log_p_RK = log_p_RK - log_kept_R1.clamp_min(0)
    return log_p_RK, (-torch.expm1(log_kept_R1.clamp_max(0))).log()


def _bregman(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p − log q) − p + q, with 0 · log 0 = 0."""
    p, q = log_p.exp(), log_q.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0) - p + q
