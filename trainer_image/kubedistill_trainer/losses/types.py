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

    ids_NK int64 (distinct in a row), logprobs_NK: log p at T = 1. log_z_N: log Σ_v exp(log p_v / T)
    over the WHOLE vocabulary at the temperature that is asked for, so that
    log p_T(k) = logprob / T − log_z is exact for each kept token.
    """

    ids_NK: Tensor
    logprobs_NK: Tensor
    log_z_N: Tensor


@dataclass(frozen=True)
class LossParts:
    """total = w · soft + (1 − w) · hard; `total` alone carries gradients.

    soft: T² · KL over the normaliser; hard: cross-entropy over the normaliser, NaN when its weight
    is 0 (it would cost a pass that nobody asked for).
    """

    total: Tensor
    soft: Tensor
    hard: Tensor
