"""Divergences of distributions over few buckets: the kept tokens, and the tail."""

from __future__ import annotations

import torch
from torch import Tensor

from kubedistill_trainer.losses.types import Divergence, TeacherSparse

_UNKNOWN = -40.0
"""log p − log q of a bucket without teacher mass."""
_GREATEST = 700.0
"""e^700 is finite in fp64."""


def of_buckets(log_p_RB: Tensor, log_q_RB: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """D [R] and s_b [R, B] (see `cached.sparse_divergence`), fp64, from log-probabilities of buckets.

    A bucket without teacher mass counts in KL(q ‖ p) as if it had e^-40 of the student's: infinite
    on paper. What a kept token has is known, and counts in full however little it is.
    """
    p, q = log_p_RB.exp(), log_q_RB.exp()
    slope = q - p
    # A Bregman sum (see `divergence.py`), with 0 · log 0 = 0.
    value_R = (torch.where(p > 0, p * (log_p_RB - log_q_RB), 0.0) + slope).sum(-1)
    if divergence.is_forward_kl:
        return value_R, slope
    value_R, slope = divergence.forward * value_R, divergence.forward * slope
    d = torch.where(log_p_RB == float("-inf"), _UNKNOWN, log_p_RB - log_q_RB)
    top_R1 = q.argmax(-1, keepdim=True)
    if divergence.reverse:
        mean_R1, away = centred(d, q, top_R1)
        value_R -= divergence.reverse * mean_R1.squeeze(-1)
        slope += divergence.reverse * q * away
    if divergence.jsd:
        d = d.clamp_max(_GREATEST)  # e^d is finite; the term is p · log 1/β beyond it
        beta, log_m_q = divergence.beta, torch.log1p(divergence.beta * torch.expm1(d))
        teacher_R = (p * (d - log_m_q)).sum(-1)
        mean_R1, away = centred(log_m_q, q, top_R1)
        value_R += divergence.jsd * (beta * teacher_R - (1 - beta) * mean_R1.squeeze(-1))
        slope += divergence.jsd * (1 - beta) * q * away
    return value_R, slope


def centred(x: Tensor, q: Tensor, top_R1: Tensor) -> tuple[Tensor, Tensor]:
    """Σ q x [R, 1] and Σ q x − x [R, B]; top_R1: places of the greatest q.

    A student that is sure of a token has Σ q x ≈ x there, and their difference is of the size of what
    q leaves to all others: lost, unless x is counted from its value at that place.
    """
    x_top_R1 = x.gather(-1, top_R1)
    away = x - x_top_R1
    mean_R1 = (q * away).sum(-1, keepdim=True)
    return x_top_R1 + mean_R1, mean_R1 - away


def teacher_buckets(teacher: TeacherSparse, temperature: float) -> tuple[Tensor, Tensor]:
    """log p of the K tokens [R, K] and of the tail [R, 1], fp64; they sum to 1.

    Quantised log-probabilities may sum to a little over 1: they are then scaled back to 1.
    """
    log_p_RK = teacher.logprobs_NK.double() / temperature - teacher.log_z_N[:, None].double()
    log_kept_R1 = log_p_RK.logsumexp(-1, keepdim=True)
    log_p_RK = log_p_RK - log_kept_R1.clamp_min(0)
    return log_p_RK, (-torch.expm1(log_kept_R1.clamp_max(0))).log()
