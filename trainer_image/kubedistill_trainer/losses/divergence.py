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
At T = 10 KL is about 1/1000 of log Z, and the plain sum keeps three digits in fp32. Where the two
distributions are closer still not even that is enough: `close.py`.

**q − p from their ratio.** q − p = (q + p) · tanh(½ log(q / p)), with log(q / p) from the difference of
the logits. Subtracted, q and p leave nothing but their own rounding where they all but agree: at
logits of 0.01 and T = 20 it is a thousandth of q − p. What is left is an error ε of both log Z, the
same for all tokens of a row. It adds ½ ε (q + p) to each of them, and ε to their sum, which is 0 on
paper: so much is taken off again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kubedistill_trainer.losses.close import CLOSE, CLOSE_MIXED, close_divergence
from kubedistill_trainer.losses.types import Divergence

LEAST_LOG_RATIO, GREATEST_LOG_RATIO = -40.0, 80.0
"""e^80 is finite in fp32, and what it stands for is then a term of 1e-17 or less."""
_APART = -4.0
"""Of d; above it log(1 + β (e^d − 1)) has the digits that count."""
TINY = 1e-30
"""Below it a probability in fp32 loses digits, and then vanishes."""
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


@dataclass(frozen=True)
class Softmax:
    """A softmax with the entry of one token in each row taken out, set to 0.

    The others are `unit_R1` times what stands there and add up to `rest_R1` (both [R, 1], fp64). The
    token's own is 1 − rest, which in fp32 nobody could tell from 1 where a model is sure of it.
    """

    unit_R1: Tensor
    rest_R1: Tensor

    @classmethod
    def apart(cls, q_RV: Tensor, token_R1: Tensor) -> Softmax:
        """`q_RV`: as `torch.softmax` leaves it, or but for a factor of each row."""
        own_R1 = q_RV.gather(-1, token_R1).double()
        rest_R1 = q_RV.scatter_(-1, token_R1, 0.0).sum(-1, keepdim=True).double()
        unit_R1 = 1 / (own_R1 + rest_R1)
        return cls(unit_R1, rest_R1 * unit_R1)


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
) -> tuple[Tensor, Tensor]:
    """D of each token [R] (fp64) for teacher logits t_RV, and the factor [R, 1] that makes ∂D/∂u,
    u = z / T, of `scratch.c_RV`.

    Leaves q but for a factor of each row in `scratch.b_RV`; t_RV is used up, z_RV is not touched.
    """
    p_RV, q_RV, slope_RV = scratch.a_RV, scratch.b_RV, scratch.c_RV
    half_RV, p_unit_R1, q_unit_R1 = _half_log_ratio(z_RV, zmax_R1, t_RV, temperature, scratch)
    torch.tanh(half_RV, out=slope_RV)
    plain = divergence.is_forward_kl
    if not plain:
        p_RV.mul_(p_unit_R1)
        q_RV.mul_(q_unit_R1)
        p_unit_R1 = q_unit_R1 = torch.ones_like(p_unit_R1)
    work_RV = half_RV if plain else torch.empty_like(half_RV)
    kl_R1 = torch.mul(half_RV, p_RV, out=work_RV).sum(-1, keepdim=True).double() * -2
    # From here on p + q and q − p are both divided by p's factor.
    sum_RV = torch.addcmul(p_RV, q_RV, q_unit_R1 / p_unit_R1, out=p_RV if plain else work_RV)
    total_R1 = slope_RV.mul_(sum_RV).sum(-1, keepdim=True)
    slope_RV.addcmul_(sum_RV, total_R1 * p_unit_R1 / -2)
    value_R1 = kl_R1 = p_unit_R1 * (kl_R1 + total_R1)
    near = None
    if float(kl_R1.max()) < (CLOSE if plain else CLOSE_MIXED):
        near = close_divergence(slope_RV, sum_RV, divergence)
    if not plain:
        value_R1 = _mixed(half_RV, kl_R1, total_R1, divergence, scratch, work_RV)
    if near is not None:
        value_R1 = torch.where(near[1], p_unit_R1 * near[0], value_R1)
    return value_R1.squeeze(-1), p_unit_R1


def _half_log_ratio(
    z_RV: Tensor, zmax_R1: Tensor, t_RV: Tensor, temperature: float, scratch: Scratch
) -> tuple[Tensor, Tensor, Tensor]:
    """½ (log q − log p), in t_RV's memory, and the factors [R, 1] that make p of `scratch.a_RV` and q
    of `scratch.b_RV`.

    From the logits' own difference: of two that are alike it is exact.
    """
    p_RV, q_RV, x_RV = scratch.a_RV, scratch.b_RV, scratch.c_RV
    tmax_R1 = t_RV.amax(-1, keepdim=True)
    p_unit_R1 = softmax(_below(t_RV, tmax_R1, temperature, x_RV), p_RV)
    log_zp_R1 = _log_z(x_RV, p_RV) - p_unit_R1.double().log()
    q_unit_R1 = softmax(_below(z_RV, zmax_R1, temperature, x_RV), q_RV)
    log_zq_R1 = _log_z(x_RV, q_RV) - q_unit_R1.double().log()
    between_R1 = (tmax_R1.double() - zmax_R1.double()) / temperature
    offset_R1 = ((between_R1 + log_zp_R1 - log_zq_R1) / 2).to(t_RV.dtype)
    torch.sub(z_RV, t_RV, out=t_RV)
    torch.add(offset_R1, t_RV, alpha=0.5 / temperature, out=t_RV)
    return t_RV, p_unit_R1, q_unit_R1


def _below(x_RV: Tensor, max_R1: Tensor, temperature: float, out_RV: Tensor) -> Tensor:
    """(x − max) / T, in one pass, and rounded once where there is a fused multiply-add."""
    factor = 1 / temperature
    return torch.add(max_R1 * -factor, x_RV, alpha=factor, out=out_RV)


def _log_z(x_RV: Tensor, q_RV: Tensor) -> Tensor:
    """log Z [R, 1] (fp64) of q = e^x / Z: from any entry that did not underflow, else the greatest."""
    x_R1, q_R1 = x_RV[:, :1], q_RV[:, :1]
    if float(q_R1.min()) < TINY:
        x_R1, q_R1 = x_RV.amax(-1, keepdim=True), q_RV.amax(-1, keepdim=True)
    return x_R1.double() - q_R1.double().log()


def _centred(x_RV: Tensor, q_RV: Tensor, top_R1: Tensor, work_RV: Tensor, out_RV: Tensor) -> Tensor:
    """out_RV = Σ q x − x as `buckets.centred`, and Σ q x [R, 1] (fp64). work_RV is overwritten; out_RV
    may be x_RV.

    The sum that is returned is of x itself: small where x is, which x less its value at the top is not.
    """
    value_R1 = torch.mul(q_RV, x_RV, out=work_RV).sum(-1, keepdim=True).double()
    torch.sub(x_RV, x_RV.gather(-1, top_R1), out=out_RV)
    mean_R1 = torch.mul(q_RV, out_RV, out=work_RV).sum(-1, keepdim=True)
    torch.sub(mean_R1, out_RV, out=out_RV)
    return value_R1


def _mixed(
    half_RV: Tensor,
    kl_R1: Tensor,
    total_R1: Tensor,
    divergence: Divergence,
    scratch: Scratch,
    work_RV: Tensor,
) -> Tensor:
    """The weighted sum of the three divergences [R, 1], from ½ (log q − log p) =: −d / 2, used up.

    kl_R1 is KL(p ‖ q), total_R1 the sum of q − p as it enters there. `scratch.c_RV` has q − p, and
    becomes the gradient.

        ∂KL(p ‖ q) / ∂u_v = q_v − p_v
        ∂KL(q ‖ p) / ∂u_v = q_v · (Σ q d − d_v)
        ∂JSD_β / ∂u_v     = (1 − β) · q_v · (Σ q L − L_v),  L_v = log(m_v / q_v) = log(1 + β (e^d − 1))

    The last two follow from ∂D / ∂u_v = q_v (g_v − Σ q g) with g = ∂D / ∂q. JSD in terms of q, d and
    L alone has no 0 · ∞ where a probability underflows; e^d is bounded for the same reason (its term
    of the sum is then p · log 1/β whatever d is).
    """
    q_RV, grad_RV = scratch.b_RV, scratch.c_RV
    top_R1 = q_RV.argmax(-1, keepdim=True)
    value_R1 = divergence.forward * kl_R1
    grad_RV.mul_(divergence.forward)
    other_RV = torch.empty_like(work_RV)
    if divergence.reverse:
        mean_R1 = _centred(half_RV, q_RV, top_R1, work_RV, other_RV)
        value_R1 += divergence.reverse * (2 * mean_R1 - total_R1)
        grad_RV.addcmul_(q_RV, other_RV, value=-2 * divergence.reverse)
    if divergence.jsd:
        jsd_R1 = _jsd(half_RV, scratch, top_R1, divergence.beta, work_RV, other_RV)
        value_R1 += divergence.jsd * jsd_R1
        grad_RV.addcmul_(q_RV, work_RV, value=divergence.jsd * (1 - divergence.beta))
    return value_R1


def _jsd(
    half_RV: Tensor, scratch: Scratch, top_R1: Tensor, beta: float, out_RV: Tensor, work_RV: Tensor
) -> Tensor:
    """JSD_β [R, 1] (fp64); out_RV = Σ q L − L. half_RV is used up, work_RV overwritten."""
    p_RV, q_RV = scratch.a_RV, scratch.b_RV
    d0_R1, k_R1, l0_R1 = jsd_origin(half_RV.gather(-1, top_R1) * -2, beta)
    d_RV = torch.add(-d0_R1, half_RV, alpha=-2, out=half_RV).clamp_(max=GREATEST_LOG_RATIO)
    torch.expm1(d_RV, out=out_RV).mul_(k_R1).log1p_()
    teacher_R1 = torch.sub(d_RV, out_RV, out=d_RV).mul_(p_RV).sum(-1, keepdim=True)
    mean_R1 = _centred(out_RV, q_RV, top_R1, work_RV, out_RV)
    return beta * (teacher_R1 + d0_R1.double()) - (1 - beta) * mean_R1 - l0_R1


def jsd_origin(d_top_R1: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """d₀, k and L₀ (fp64) [R, 1], where L = L₀ + log(1 + k (e^(d − d₀) − 1)); d_top_R1: d of the
    student's likeliest token.

    A student that is sure of what the teacher all but excludes has L = log(1 − β) for all that it
    thinks likely: then L is counted from there, else d₀ = 0.
    """
    d0_R1 = torch.where(d_top_R1 < _APART, d_top_R1.clamp_min(LEAST_LOG_RATIO), 0.0)
    l0_R1 = torch.log1p(beta * torch.expm1(d0_R1.double()))
    return d0_R1, (beta * torch.exp(d0_R1 - l0_R1)).to(d0_R1.dtype), l0_R1
