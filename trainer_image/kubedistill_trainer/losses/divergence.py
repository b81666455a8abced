"""Loss and analytic logit gradient of a block of tokens, in memory that is handed in.

Letters: z the student's logits, T the temperature, q = softmax(z / T), p the teacher's distribution
at T, y the label, R the tokens of the block. Everything here is fp32 (fp64 for fp64 inputs) over the
vocabulary and fp64 for the few numbers a token has.

**One exponential a softmax.** `softmax` gives e^(x − max) / Z without a second pass for the
logarithm; its own greatest entry is 1 / Z, hence log Z = max x − log max softmax(x).

**Rows whose sum is 1.** torch adds up the exponentials of a row a lane at a time, in fp32: with
150,000 entries Z is off by 2e-5. That scales all of q, and where q − p is multiplied by the head most
of q cancels and the error does not. So long rows are divided by their sum, which `torch.sum` takes by
pairs; where a row is multiplied by something afterwards, by a factor of that.

**KL as a Bregman sum.** KL = Σ_v [p_v (log p_v − log q_v) − p_v + q_v]. The last two terms sum to 0
on paper; on a machine they make every term ≥ 0 and cancel the rounding of both log Z to first order.
At T = 10 KL is about 1/1000 of log Z, and the plain sum keeps three digits in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kubedistill_trainer.losses.types import Divergence

GREATEST_LOG_RATIO = 40.0
_LONG_ROW = 4096
"""From here on a row of softmax is divided by its sum."""


@dataclass(frozen=True)
class Scratch:
    """Three buffers [R, V] of the wide type, overwritten by every call; those that nobody needs have
    no rows."""

    a_RV: Tensor
    b_RV: Tensor
    c_RV: Tensor

    def head(self, rows: int) -> Scratch:
        return Scratch(self.a_RV[:rows], self.b_RV[:rows], self.c_RV[:rows])


def tempered(z_RV: Tensor, temperature: float, out_RV: Tensor) -> Tensor:
    """z / T, in out_RV where it is not z itself; a softmax may then overwrite it."""
    return z_RV if temperature == 1 else torch.mul(z_RV, 1 / temperature, out=out_RV)


def softmax(x_RV: Tensor, out_RV: Tensor) -> Tensor:
    """out_RV = softmax(x_RV), but for the factor of each row [R, 1] that is returned: with it a row
    adds up to 1 within a few roundings however long it is."""
    torch.softmax(x_RV, -1, out=out_RV)
    if x_RV.shape[-1] < _LONG_ROW:
        return out_RV.new_ones(len(out_RV), 1)
    return out_RV.sum(-1, keepdim=True).reciprocal_()


def normalise(x_RV: Tensor, out_RV: Tensor, max_R1: Tensor | None = None) -> Tensor:
    """out_RV = softmax(x_RV); log Σ exp(x) [R, 1] in fp64. `max_R1`: x's row maximum, if known."""
    out_RV.mul_(softmax(x_RV, out_RV))
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
    if not divergence.is_forward_kl:
        d_RV, excess_R1 = _exact_log_ratio(z_RV, zmax_R1, t_RV, temperature, scratch)
        return _mixed(d_RV, excess_R1, divergence, scratch)
    d_RV, excess_R1 = _log_ratio(z_RV, zmax_R1, t_RV, temperature, scratch)
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


def _exact_log_ratio(
    z_RV: Tensor, zmax_R1: Tensor, t_RV: Tensor, temperature: float, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """As `_log_ratio`, by two passes more, with each row's greatest logits taken off first.

    Logits of 100 are rounded by 4e-6, and so is log Z of such a row. What is left once the maximum is
    off is exact where a probability counts, and log Z is at most log V. KL(p ‖ q) takes the shorter
    way, for its gradient q − p is made without d.
    """
    p_RV, q_RV, x_RV = scratch.a_RV, scratch.b_RV, scratch.c_RV
    tmax_R1 = t_RV.div_(temperature).amax(-1, keepdim=True)
    xmax_R1 = zmax_R1 / temperature
    log_zp_R1 = normalise(t_RV, p_RV, tmax_R1) - tmax_R1.double()
    log_zq_R1 = normalise(torch.div(z_RV, temperature, out=x_RV), q_RV, xmax_R1) - xmax_R1.double()
    offset_R1 = log_zp_R1 - log_zq_R1
    rounded_R1 = offset_R1.to(t_RV.dtype)
    d_RV = t_RV.sub_(tmax_R1).sub_(x_RV.sub_(xmax_R1)).sub_(rounded_R1)
    return d_RV, rounded_R1.double() - offset_R1


def centred(x_RV: Tensor, q_RV: Tensor, top_R1: Tensor) -> tuple[Tensor, Tensor]:
    """Σ q x [R, 1] (fp64), and Σ q x − x [R, V]; top_R1 [R, 1]: places of the greatest q.

    A student that is sure of a token has Σ q x ≈ x there, and their difference is of the size of what
    q leaves to all others: lost in fp32, unless x is counted from its value at that place.
    """
    x_top_R1 = x_RV.gather(-1, top_R1)
    x_RV = x_RV - x_top_R1
    mean_R1 = (q_RV * x_RV).sum(-1, keepdim=True)
    return x_top_R1.double() + mean_R1.double(), mean_R1 - x_RV


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
    top_R1 = q_RV.argmax(-1, keepdim=True)
    grad_RV.zero_()
    if divergence.forward:
        torch.sub(q_RV, p_RV, out=grad_RV)
        forward_R1 = (d_RV * p_RV + grad_RV).sum(-1, keepdim=True).double() + excess_R1
        total_R1 += divergence.forward * forward_R1
        grad_RV.mul_(divergence.forward)
    if divergence.reverse:
        mean_R1, slope_RV = centred(d_RV, q_RV, top_R1)
        excess = (p_RV - q_RV).sum(-1, keepdim=True).double() - excess_R1
        total_R1 += divergence.reverse * (excess - mean_R1)
        grad_RV.addcmul_(q_RV, slope_RV, value=divergence.reverse)
    if divergence.jsd:
        beta = divergence.beta
        d_RV.clamp_(max=GREATEST_LOG_RATIO)
        l_RV = torch.expm1(d_RV).mul_(beta).log1p_()
        mean_R1, slope_RV = centred(l_RV, q_RV, top_R1)
        teacher_R1 = (p_RV * (d_RV - l_RV)).sum(-1, keepdim=True).double()
        total_R1 += divergence.jsd * (beta * teacher_R1 - (1 - beta) * mean_R1)
        grad_RV.addcmul_(q_RV, slope_RV, value=divergence.jsd * (1 - beta))
    return total_R1.squeeze(-1)
