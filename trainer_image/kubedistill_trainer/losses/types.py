"""What the core takes and gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

IGNORED = -100
"""Label of a token that has nothing to predict."""


@dataclass(frozen=True)
class TeacherHidden:
    """The teacher as final hidden states [N, H_t] and LM head [V_t, H_t]: exact at every T.

    `softcap`: cap · tanh(logit / cap), where the architecture caps its final logits.
    `layers`: states [N, H_t] after inner layers, counted from 1, where they were asked for.
    """

    hidden_NH: Tensor
    head_VH: Tensor
    softcap: float | None = None
    layers: Mapping[int, Tensor] = field(default_factory=dict)


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


@dataclass(frozen=True)
class TeacherSampled:
    """An unbiased estimate of the teacher's distribution at the temperature that is asked for.

    ids_NK int64, shares_NK: share of the draws that fell on each; a row sums to 1. An id may stand
    twice in a row, if no more than one of them has a share.
    """

    ids_NK: Tensor
    shares_NK: Tensor


Teacher = TeacherHidden | TeacherSparse | TeacherSampled


@dataclass(frozen=True)
class Divergence:
    """D(p ‖ q) of the soft term, p the teacher's and q the student's distribution at T: a mix.

        forward · KL(p ‖ q) + reverse · KL(q ‖ p) + jsd · JSD_β(p, q)
        JSD_β = β · KL(p ‖ m) + (1 − β) · KL(q ‖ m),  m = β p + (1 − β) q

    JSD as in Agarwal et al. 2024, "On-Policy Distillation of Language Models", equation 1.
    Raises ValueError for weights that are negative or all 0, and for β outside (0, 1).
    """

    forward: float = 1.0
    reverse: float = 0.0
    jsd: float = 0.0
    beta: float = 0.5

    def __post_init__(self) -> None:
        weights = (self.forward, self.reverse, self.jsd)
        if min(weights) < 0 or max(weights) <= 0:
            raise ValueError(f"divergence: weights {weights}; give one or more that are positive")
        if not 0 < self.beta < 1:
            raise ValueError(f"beta: {self.beta} is not between 0 and 1")

    @property
    def is_forward_kl(self) -> bool:
        """Whether it is the plain KL(p ‖ q), which takes the shortest way."""
        return (self.forward, self.reverse, self.jsd) == (1, 0, 0)


FORWARD_KL = Divergence()


class LossParts(NamedTuple):
    """total = w · soft + (1 − w) · hard (+ features); `total` alone carries gradients.

    soft: T² · Σ D / normaliser; hard: Σ cross-entropy / normaliser. Neither is multiplied by its
    weight. A part whose weight is 0 costs a pass over the logits that nobody asked for: it is not
    computed, and is NaN.

    A tuple, because ZeRO-3 looks for a module's results in tuples, lists and dicts: it gathers the
    weights that the backward pass of that module needs when the gradient of such a result comes.
    """

    total: Tensor
    soft: Tensor
    hard: Tensor
    features: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """What the loss is, apart from its inputs. `soft_weight` is 0 where there is no teacher."""

    temperature: float
    soft_weight: float
    vocab_size: int
    softcap: float | None
    divergence: Divergence = FORWARD_KL
