"""What a teacher stream can carry for each position of a sample, and how each kind is set.

`Sparse` is the top of the teacher's distribution with exact normalisers; `Hidden` the teacher's
last hidden state, exact at every temperature once the LM head is applied. A stream may carry both.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SparseSpec(_Spec):
    """Top-k log-probabilities at T = 1 and log Z_T for a grid of temperatures."""

    kind: Literal["Sparse"] = "Sparse"
    k: int = Field(default=100, ge=1, le=65535)
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Strictly rising; the student may train at these and no other."""
    levels: int = Field(default=128, ge=8, le=256)
    """Quantisation levels of a log-probability; fine at the top of the distribution."""

    @field_validator("temperatures")
    @classmethod
    def _rising(cls, grid: tuple[float, ...]) -> tuple[float, ...]:
        if not grid or grid[0] <= 0 or any(b <= a for a, b in itertools.pairwise(grid)):
            raise ValueError(f"temperatures {grid} must be positive and strictly rising")
        return grid


class HiddenSpec(_Spec):
    """Final-norm hidden state: int8 with one fp16 scale a group, or bfloat16."""

    kind: Literal["Hidden"] = "Hidden"
    precision: Literal["int8", "bfloat16"] = "int8"
    group_size: int = Field(default=32, ge=1, le=65535)
    """Neighbouring channels that share a scale."""


PayloadSpec = Annotated[SparseSpec | HiddenSpec, Field(discriminator="kind")]


@dataclass(frozen=True, slots=True)
class Sparse:
    """N positions, K kept tokens each.

    `token_ids` int64 [N, K], strictly rising along K; `log_probs` float32 [N, K], log p at T = 1
    (−inf for a padded entry); `log_z` float32 [N, G] with log Z_T = logsumexp_v(log p_v / T) over
    the WHOLE vocabulary for each T of `temperatures` (G of them), so that
    log p_T(v) = log p_v / T − log Z_T.
    """

    token_ids: Tensor
    log_probs: Tensor
    log_z: Tensor
    temperatures: tuple[float, ...]

    def log_probs_at(self, temperature: float) -> Tensor:
        """log p_T of the kept tokens, float32 [N, K]. ValueError for a T outside the grid."""
        return self.log_probs / temperature - self.log_z_at(temperature)[:, None]

    def log_z_at(self, temperature: float) -> Tensor:
        """log Z_T, float32 [N]. ValueError for a T outside the grid."""
        for column, known in enumerate(self.temperatures):
            if math.isclose(known, temperature, rel_tol=1e-9):
                return self.log_z[:, column]
        raise ValueError(
            f"temperature {temperature} is not in this stream's grid {list(self.temperatures)}; "
            "use one of these, or a stream with the Hidden payload, which is exact at every T"
        )


@dataclass(frozen=True, slots=True)
class Hidden:
    """`states` float [N, H]: the teacher's hidden states after its final norm."""

    states: Tensor


@dataclass(frozen=True, slots=True)
class TeacherOutputs:
    """All that a stream says about one sample of N positions; None where it has no such payload."""

    sparse: Sparse | None = None
    hidden: Hidden | None = None

    @property
    def positions(self) -> int:
        """N. ValueError when the payloads disagree or there is none."""
        counts = set()
        if self.sparse is not None:
            counts.add(int(self.sparse.token_ids.shape[0]))
        if self.hidden is not None:
            counts.add(int(self.hidden.states.shape[0]))
        if len(counts) != 1:
            raise ValueError(f"payloads of one sample have {sorted(counts) or 'no'} positions")
        return counts.pop()


def sparse_of_logits(
    logits: Tensor,
    k: int,
    temperatures: tuple[float, ...],
    *,
    visible_vocab_size: int | None = None,
) -> Sparse:
    """Sparse payload of logits float [n, V], in float32; call it a chunk of positions at a time.

    Entries from `visible_vocab_size` on (padding of the teacher's vocabulary) count as −inf.
    Raises ValueError where k exceeds the vocabulary or a row has NaN, +inf or no finite entry.
    """
    visible = logits.shape[-1] if visible_vocab_size is None else visible_vocab_size
    if not 1 <= k <= visible <= logits.shape[-1]:
        raise ValueError(
            f"k = {k} and visible_vocab_size = {visible} do not fit logits of {logits.shape[-1]}"
        )
    log_probs = torch.log_softmax(logits[:, :visible].float(), dim=-1)
    # log_softmax gives NaN for a row with NaN, +inf, or nothing but −inf
    bad = torch.isnan(log_probs).any(dim=-1)
    if bool(bad.any()):
        raise ValueError(
            f"teacher logits at position {int(bad.nonzero()[0])} hold NaN, +inf or no finite value"
        )
    log_z = [
        # exactly 0 by definition; computing it would leave rounding in the file
        log_probs.new_zeros(log_probs.shape[0])
        if temperature == 1.0
        else torch.logsumexp(log_probs / temperature, dim=-1)
        for temperature in temperatures
    ]
    top, ids = log_probs.topk(k, dim=-1)
    ids, order = ids.sort(dim=-1)
    return Sparse(ids, top.gather(-1, order), torch.stack(log_z, dim=-1), temperatures)
