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

from kubedistill_trainer.losses.types import Divergence, TeacherSampled, TeacherSparse

_GREATEST_LOG_RATIO = 40.0


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


def dense_divergence(
    z_RV: Tensor,
    zmax_R1: Tensor,
    t_RV: Tensor,
    temperature: float,
    divergence: Divergence,
    scratch: Scratch,
) -> Tensor:
    """D of each token [R] (fp64) for teacher logits t_RV.

    Leaves q in `scratch.b_RV` and ∂D/∂u, u = z / T, in `scratch.c_RV`; t_RV is used up, z_RV is not
    touched.
    """
    d_RV, excess_R1 = _log_ratio(z_RV, zmax_R1, t_RV, temperature, scratch)
    if not divergence.is_forward_kl:
        return _mixed(d_RV, excess_R1, divergence, scratch)
    p_RV, q_RV, grad_RV = scratch.a_RV, scratch.b_RV, scratch.c_RV
    kl_R = d_RV.mul_(p_RV).sum(-1).double() + excess_R1.squeeze(-1)
    return kl_R + torch.sub(q_RV, p_RV, out=grad_RV).sum(-1)


def _log_ratio(
    z_RV: Tensor, zmax_R1: Tensor, t_RV: Tensor, temperature: float, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """log p − log q, in t_RV's memory, and what its rounding took off each [R, 1] (fp64).

    Leaves p in `scratch.a_RV` and q in `scratch.b_RV`.
    """
    p_RV, q_RV, x_RV = scratch.a_RV, scratch.b_RV, scratch.c_RV
    log_zp_R1 = normalise(t_RV.div_(temperature), p_RV)
    # The same rounding as the row's maximum got, or log Z would not belong to q.
    log_zq_R1 = normalise(torch.div(z_RV, temperature, out=x_RV), q_RV, zmax_R1 / temperature)
    offset_R1 = log_zp_R1 - log_zq_R1
    rounded_R1 = offset_R1.to(t_RV.dtype)
    return t_RV.sub_(x_RV).sub_(rounded_R1), rounded_R1.double() - offset_R1


def _mixed(d_RV: Tensor, excess_R1: Tensor, divergence: Divergence, scratch: Scratch) -> Tensor:
    """The weighted sum of the three divergences, from d = log p − log q.

        ∂KL(p ‖ q) / ∂u_v = q_v − p_v
        ∂KL(q ‖ p) / ∂u_v = q_v · (Σ q d − d_v)
        ∂JSD_β / ∂u_v     = (1 − β) · q_v · (Σ q L − L_v),  L_v = log(m_v / q_v) = log(1 + β (e^d − 1))

    The last two follow from ∂D / ∂u_v = q_v (g_v − Σ q g) with g = ∂D / ∂q. JSD in terms of q, d and
    L alone has no 0 · ∞ where a probability underflows; e^d is bounded for the same reason (its term
    of the sum is then p · log 1/β whatever d is).
    """
    p_RV, q_RV, grad_RV = scratch.a_RV, scratch.b_RV, scratch.c_RV
    total_R1 = torch.zeros_like(excess_R1)
    grad_RV.zero_()
    if divergence.forward:
        torch.sub(q_RV, p_RV, out=grad_RV)
        forward_R1 = (d_RV * p_RV + grad_RV).sum(-1, keepdim=True).double() + excess_R1
        total_R1 += divergence.forward * forward_R1
        grad_RV.mul_(divergence.forward)
    if divergence.reverse:
        mean_R1 = (d_RV * q_RV).sum(-1, keepdim=True)
        excess = (p_RV - q_RV).sum(-1, keepdim=True).double() - excess_R1
        total_R1 += divergence.reverse * (excess - mean_R1.double())
        grad_RV.addcmul_(q_RV, mean_R1 - d_RV, value=divergence.reverse)
    if divergence.jsd:
        beta = divergence.beta
        d_RV.clamp_(max=_GREATEST_LOG_RATIO)
        l_RV = torch.expm1(d_RV).mul_(beta).log1p_()
        mean_R1 = (q_RV * l_RV).sum(-1, keepdim=True)
        teacher_R1 = (p_RV * (d_RV - l_RV)).sum(-1, keepdim=True)
        total_R1 += divergence.jsd * (beta * teacher_R1 - (1 - beta) * mean_R1).double()
        grad_RV.addcmul_(q_RV, mean_R1 - l_RV, value=divergence.jsd * (1 - beta))
    return total_R1.squeeze(-1)


def sparse_divergence(
    z_RV: Tensor,
    teacher: TeacherSparse,
    temperature: float,
    divergence: Divergence,
    scratch: Scratch,
) -> Tensor:
    """D of each token [R] (fp64) with all but the K kept tokens as one bucket, the tail.

    The divergence of the distributions over K + 1 buckets. p_t = 1 − Σ_k p_k is the mass that the
    teacher's exact log Z leaves over. q_t = Σ_{v ∉ K} q_v is summed over the rest: 1 − Σ_k q_k would
    cancel to nothing for a confident student.

    Gradient with respect to u = z / T. With Z = Σ_v e^{u_v}: log q_k = u_k − log Z and
    log q_t = log Σ_{v ∉ K} e^{u_v} − log Z, so that

        ∂ log q_k / ∂u_v = [v = k] − q_v        ∂ log q_t / ∂u_v = [v ∉ K] · q_v / q_t − q_v

    and, with s_b = q_b (∂D/∂q_b − Σ q ∂D/∂q) of a bucket b (for KL(p ‖ q): q_b − p_b),

        ∂D / ∂u_v = s_v              for v ∈ K
        ∂D / ∂u_v = s_t · r_v        for v ∉ K,  r_v = q_v / q_t

    r is a softmax over the tail alone: one pass over the vocabulary gives it and q_t, and both stay
    exact however little mass is left. With K = V there is no tail and it is the full divergence.

    Leaves ∂D / ∂u in `scratch.c_RV`; z_RV is not touched.
    """
    grad_RV, u_RV, ids_RK = scratch.c_RV, scratch.a_RV, teacher.ids_NK
    torch.div(z_RV, temperature, out=u_RV)
    u_RK = u_RV.gather(-1, ids_RK).double()
    log_z_R1 = u_RK.logsumexp(-1, keepdim=True)
    log_p_RK, log_pt_R1 = _teacher_buckets(teacher, temperature)
    has_tail = ids_RK.shape[-1] < z_RV.shape[-1]
    if has_tail:
        tail_R1 = normalise(u_RV.scatter_(-1, ids_RK, float("-inf")), grad_RV)
        log_z_R1 = torch.logaddexp(log_z_R1, tail_R1)
        log_p = torch.cat([log_p_RK, log_pt_R1], -1)
        log_q = torch.cat([u_RK, tail_R1], -1) - log_z_R1
    else:
        log_p, log_q = log_p_RK, u_RK - log_z_R1
    value_R, slope = _of_buckets(log_p, log_q, divergence)
    if has_tail:
        grad_RV.mul_(slope[:, -1:].to(grad_RV.dtype))
        slope = slope[:, :-1]
    grad_RV.scatter_(-1, ids_RK, slope.to(grad_RV.dtype))
    return value_R


def sampled_kl(
    z_RV: Tensor, teacher: TeacherSampled, temperature: float, scratch: Scratch
) -> Tensor:
    """KL(p̂ ‖ q) of each token [R] (fp64), p̂ the shares of the draws. Leaves q − p̂ in `c_RV`.

    Its gradient is unbiased, as p̂ enters linearly; its value is not: of p̂'s own entropy.
    """
    u_RV, grad_RV = torch.div(z_RV, temperature, out=scratch.a_RV), scratch.c_RV
    log_z_R1 = normalise(u_RV, grad_RV)
    share_RK = teacher.shares_NK.double()
    log_q_RK = u_RV.gather(-1, teacher.ids_NK).double() - log_z_R1
    grad_RV.scatter_add_(-1, teacher.ids_NK, -teacher.shares_NK.to(grad_RV.dtype))
    return (torch.xlogy(share_RK, share_RK) - share_RK * log_q_RK).sum(-1)


def _of_buckets(
    log_p_RB: Tensor, log_q_RB: Tensor, divergence: Divergence
) -> tuple[Tensor, Tensor]:
    """D [R] and s_b [R, B] (see `sparse_divergence`), fp64, from log-probabilities of buckets.

    A bucket without teacher mass counts in KL(q ‖ p) as if it had e^-40: infinite on paper.
    """
    p, q = log_p_RB.exp(), log_q_RB.exp()
    value_R, slope = torch.zeros_like(p[:, 0]), torch.zeros_like(p)
    if divergence.forward:
        value_R += divergence.forward * _bregman(log_p_RB, log_q_RB).sum(-1)
        slope += divergence.forward * (q - p)
    d = (log_p_RB - log_q_RB).clamp(-_GREATEST_LOG_RATIO, _GREATEST_LOG_RATIO)
    if divergence.reverse:
        mean_R1 = (q * d).sum(-1, keepdim=True)
        value_R -= divergence.reverse * mean_R1.squeeze(-1)
        slope += divergence.reverse * q * (mean_R1 - d)
    if divergence.jsd:
        beta, log_m_q = divergence.beta, torch.log1p(divergence.beta * torch.expm1(d))
        mean_R1 = (q * log_m_q).sum(-1, keepdim=True)
        teacher_R = (p * (d - log_m_q)).sum(-1)
        value_R += divergence.jsd * (beta * teacher_R - (1 - beta) * mean_R1.squeeze(-1))
        slope += divergence.jsd * (1 - beta) * q * (mean_R1 - log_m_q)
    return value_R, slope


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
