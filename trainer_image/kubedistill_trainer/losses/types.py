"""What the core takes and gives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

IGNORED = -100
"""Label of a token that has nothing to predict."""


@dataclass(frozen=True)
class TeacherHidden:
    """The teacher as final hidden states [N, H_t] and LM head [V_t, H_t]: exact at every T.

    `softcap`: cap · tanh(logit / cap), where the architecture caps its final logits.
    """

    hidden_NH: Tensor
    head_VH: Tensor
    softcap: float | None = None


@dataclass(frozen=True)
class TeacherSparse:
    """The teacher as its top K tokens, and all else as one tail bucket.

    ids_NK int64 (distinct in a row, below the vocabulary size), logprobs_NK: log p at T = 1.
    log_z_N: log Σ_v exp(log p_v / T) over the WHOLE vocabulary at the temperature that is asked
    for, so that log p_T(k) = logprob / T − log_z is exact for each kept token.
    """

    ids_NK: Tensor
    logprobs_NK: Tensor
    log_z_N: Tensor


Teacher = TeacherHidden | TeacherSparse


@dataclass(frozen=True)
class LossParts:
    """total = w · soft + (1 − w) · hard; `total` alone carries gradients.

    soft: T² · Σ KL / normaliser; hard: Σ cross-entropy / normaliser. Neither is multiplied by its
    weight. A part whose weight is 0 costs a pass over the logits that nobody asked for: it is not
    computed, and is NaN.
    """

    total: Tensor
    soft: Tensor
    hard: Tensor


@dataclass(frozen=True)
class Objective:
    """What the loss is, apart from its inputs. `soft_weight` is 0 where there is no teacher."""

    temperature: float
    soft_weight: float
    vocab_size: int
    softcap: float | None
