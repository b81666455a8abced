"""KL against a teacher that is known by its top K tokens and the mass of the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from kubedistill_trainer.losses.types import TeacherSparse


def sparse_terms(
    log_q_CV: Tensor, teacher: TeacherSparse, temperature: float
) -> tuple[Tensor, Tensor]:
    """(Σ KL, q − p̂ [C, V]) with the tail as one bucket; `log_q_CV` is the student's log q at T.

    KL = Σ_k p_k (log p_k − log q_k) + p_t (log p_t − log q_t), with p_t = 1 − Σ_k p_k the mass that
    the teacher's exact log Z leaves, and q_t = Σ_{v ∉ K} q_v by log-sum-exp over the rest (1 − Σ q_k
    would cancel to nothing for a confident student). For v ∈ K the gradient of KL with respect to
    z / T is q_v − p_v; for v ∉ K it is q_v − p_t · q_v / q_t: the tail's mass is spread as the
    student spreads it.

    With K = V there is no tail and it is the full KL.
    """
    ids_CK = teacher.ids_NK
    log_p_CK = teacher.logprobs_NK.to(log_q_CV.dtype) / temperature - teacher.log_z_N[:, None].to(
        log_q_CV.dtype
    )
    p_CK = log_p_CK.exp()
    log_q_CK = log_q_CV.gather(-1, ids_CK)
    # 0 · log 0 = 0: a padded entry has probability 0 and says nothing.
    terms_CK = torch.where(p_CK > 0, p_CK * (log_p_CK - log_q_CK), 0.0)
    kl = terms_CK.sum(dtype=torch.float64)
    if ids_CK.shape[-1] == log_q_CV.shape[-1]:
        grad_CV = log_q_CV.exp()
        grad_CV.scatter_add_(-1, ids_CK, -p_CK)
        return kl, grad_CV
    # Quantised log-probabilities may sum to a little over 1.
    p_tail_C = (1 - p_CK.sum(-1)).clamp_min(0)
    rest_CV = log_q_CV.scatter(-1, ids_CK, float("-inf"))
    log_q_tail_C = rest_CV.logsumexp(-1)
    log_p_tail_C = p_tail_C.clamp_min(torch.finfo(p_tail_C.dtype).tiny).log()
    tail_C = torch.where(p_tail_C > 0, p_tail_C * (log_p_tail_C - log_q_tail_C), 0.0)
    kl = kl + tail_C.sum(dtype=torch.float64)
    # Σ_k p_k + p_t, which is 1 but for the quantisation of the log-probabilities.
    mass_C = p_CK.sum(-1) + p_tail_C
    spread_CV = (rest_CV + (log_p_tail_C - log_q_tail_C)[:, None]).exp_()
    spread_CV = torch.where(p_tail_C[:, None] > 0, spread_CV, 0.0)
    grad_CV = log_q_CV.exp().mul_(mass_C[:, None]).sub_(spread_CV)
    grad_CV.scatter_add_(-1, ids_CK, -p_CK)
    return kl, grad_CV
