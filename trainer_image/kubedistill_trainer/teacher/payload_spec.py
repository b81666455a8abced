"""How each kind of payload is set; part of a stream's identity, and known without torch."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


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


class SampledSpec(_Spec):
    """Tokens drawn from the teacher's distribution at one temperature, with replacement.

    An unbiased estimate of that distribution, so the student trains at this temperature and no
    other. Anshumann et al. 2025, "Sparse Logit Sampling", with the proposal equal to the target.
    """

    kind: Literal["Sampled"] = "Sampled"
    draws: int = Field(default=50, ge=1, le=4096)
    temperature: float = Field(default=1.0, gt=0)


PayloadSpec = Annotated[SparseSpec | SampledSpec | HiddenSpec, Field(discriminator="kind")]
