"""The dense float64 oracle of the tests and benchmarks: every tensor in full, autograd throughout."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kubedistill_trainer.losses.types import (
    FORWARD_KL,
    IGNORED,
    Divergence,
    Teacher,
    TeacherHidden,
    TeacherSampled,
    TeacherSparse,
)


def _dense_logits(hidden: Tensor, head: Tensor, vocab_size: int, softcap: float | None) -> Tensor:
    logits = hidden @ head.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits[:, :vocab_size]


def dense_loss(
    hidden_NH: Tensor,
    head_VH: Tensor,
    labels_N: Tensor,
    teacher: Teacher | None,
    *,
    temperature: float,
    soft_weight: float,
    normalizer: float,
    divergence: Divergence = FORWARD_KL,
    vocab_size: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The same loss as `distillation_loss`, in the inputs' own dtype, with dense logits."""
    size = head_VH.shape[0] if vocab_size is None else vocab_size
    logits = _dense_logits(hidden_NH, head_VH, size, softcap)
    valid = labels_N != IGNORED
    hard = cross_entropy(logits, labels_N, ignore_index=IGNORED, reduction="sum")
    if teacher is None or soft_weight == 0:
        return hard / normalizer
    log_q = torch.log_softmax(logits / temperature, dim=-1)
    if isinstance(teacher, TeacherHidden):
        dense = _dense_logits(teacher.hidden_NH, teacher.head_VH, size, teacher.softcap)
        log_p = torch.log_softmax(dense / temperature, dim=-1)
        soft_N = _of(log_p, log_q, divergence)
    elif isinstance(teacher, TeacherSampled):
        p = torch.zeros_like(log_q).scatter_add_(-1, teacher.ids_NK, teacher.shares_NK.to(log_q))
        soft_N = (torch.xlogy(p, p) - p * log_q).sum(-1)
    else:
        soft_N = _of(*_buckets(log_q, teacher, temperature), divergence)
    soft = temperature**2 * soft_N[valid].sum()
    return (soft_weight * soft + (1 - soft_weight) * hard) / normalizer


def _of(log_p: Tensor, log_q: Tensor, divergence: Divergence) -> Tensor:
    """The divergence over the last dimension, by its definition."""
    p, q, beta = log_p.exp(), log_q.exp(), divergence.beta
    log_m = (beta * p + (1 - beta) * q).log()
    terms = divergence.forward * p * (log_p - log_q) + divergence.reverse * q * (log_q - log_p)
    mixed = beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)
    return (terms + divergence.jsd * mixed).sum(-1)


def _buckets(log_q: Tensor, teacher: TeacherSparse, temperature: float) -> tuple[Tensor, Tensor]:
    """Both distributions over the kept tokens and, where there is one, the tail."""
    log_p = teacher.logprobs_NK / temperature - teacher.log_z_N[:, None]
    kept = log_q.gather(-1, teacher.ids_NK)
    if teacher.ids_NK.shape[-1] == log_q.shape[-1]:
        return log_p, kept
    p_tail = 1 - log_p.exp().sum(-1, keepdim=True)
    q_tail = log_q.scatter(-1, teacher.ids_NK, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([log_p, p_tail.log()], -1), torch.cat([kept, q_tail], -1)
