"""The divergence of two distributions that are all but equal.

D is then of second order in their difference: at logits of 0.01 and T = 20 it is 1e-9, summed from
terms p · log(p / q) of 1e-4. In fp32 nothing is left of it. As a power series in

    s = (q − p) / (q + p) = tanh(½ log(q / p))

it has no term of first order, and each token's own is ≥ 0:

    D = Σ_v (p_v + q_v) · (a₂ s_v² + a₃ s_v³ + …)

With p = (p + q)(1 − s) / 2 and q = (p + q)(1 + s) / 2, and less the terms q − p whose sum is 0,

    KL(p ‖ q):  s + (1 − s) ½ log((1 − s) / (1 + s))    = s² − s³/3 + s⁴/3 − s⁵/5 + s⁶/5 − …
    KL(q ‖ p):  the same of −s
    JSD_β:      ½ Σ_n (β + (1 − β)(−1)ⁿ − (2β − 1)ⁿ) / (n (n − 1)) · sⁿ

the last from (1 + y) log(1 + y) = y + Σ_n (−y)ⁿ / (n (n − 1)), for p, q and their mixture.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kubedistill_trainer.losses.types import Divergence

GREATEST = 1 / 8
"""Of |s|. The terms from s⁹ on are then below 1e-6 of the first."""
CLOSE, CLOSE_MIXED = 1e-4, 1e-3
"""Of KL(p ‖ q), where D is plain KL(p ‖ q) and where not. Above it the sum as it is written in
`divergence.py` keeps its digits: it has fewer where a divergence is a small part of KL(p ‖ q)."""
_DEGREE = 8


def coefficients(divergence: Divergence) -> list[float]:
    """a₂, a₃, …"""
    beta, power, found = divergence.beta, 2 * divergence.beta - 1, []
    for n in range(2, _DEGREE + 1):
        # (2β − 1)ⁿ; a compiler takes β for a variable, and no `**` of it.
        power = power * (2 * beta - 1)
        even = n % 2 == 0
        forward = 1 / (n - 1) if even else -1 / n
        mixed = beta + (1 - beta) * (1 if even else -1) - power
        found.append(
            divergence.forward * forward
            + divergence.reverse * abs(forward)
            + divergence.jsd * mixed / (2 * n * (n - 1))
        )
    return found


def series(s_RV: Tensor, divergence: Divergence) -> Tensor:
    """a₂ s² + a₃ s³ + … [R, V]."""
    first, *others = reversed(coefficients(divergence))
    value_RV = s_RV * first
    for a in others:
        value_RV.add_(a).mul_(s_RV)
    return value_RV.mul_(s_RV)


def shifted_away(total_R: Tensor, divergence: Divergence) -> Tensor:
    """What a common error of log(q / p) adds to the series of a row: total_R is Σ (p + q) s, which is
    0 without it.

    With s + ε for s it is a₂ Σ (p + q)(2 s ε + ε²) = 2 a₂ ε², and the total 2 ε.
    """
    return coefficients(divergence)[0] * total_R.double().square() / 2


def close_divergence(
    slope_RV: Tensor, sum_RV: Tensor, divergence: Divergence
) -> tuple[Tensor, Tensor]:
    """D [R, 1] (fp64), and in which rows it holds; slope_RV: q − p, sum_RV: q + p."""
    tiny = torch.finfo(sum_RV.dtype).tiny
    s_RV = slope_RV / sum_RV.clamp_min(tiny)
    least_R1, most_R1 = torch.aminmax(s_RV, dim=-1, keepdim=True)
    near_R1 = torch.maximum(-least_R1, most_R1) < GREATEST
    return series(s_RV, divergence).mul_(sum_RV).sum(-1, keepdim=True).double(), near_R1
