"""Bounds on the figures of a finished student, and whether they hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from pydantic import Field

from kubedistill_api.base import ApiModel, cel, rules
from kubedistill_api.metrics import TEACHERS

MAX_GATES = 16
_RELATIVE = {"Teacher": " ÷ the teacher's", "FirstTeacher": " ÷ the first teacher's"}


class Gate(ApiModel):
    """A bound that a figure of the evaluation has to keep: `min`, `max`, or both."""

    model_config = rules(
        [
            cel(
                "has(self.min) || has(self.max)",
                "a gate needs a bound: give `min` or `max`, such as "
                "`{metric: perplexityRatio, max: 1.15}`",
            ),
            cel(
                "!has(self.min) || !has(self.max) || self.min <= self.max",
                "`min` is above `max`: no figure is between them",
                ".min",
            ),
        ]
    )
    metric: str = Field(min_length=1, max_length=64, description="A name in status.metrics.")
    min: float | None = Field(None, strict=True, description="Least value that passes.")
    max: float | None = Field(None, strict=True, description="Greatest value that passes.")
    relative_to: Literal["Teacher", "FirstTeacher"] | None = Field(
        None,
        description="The figure is divided by the same figure of the teacher, or of the first teacher "
        "of the chain, before it is held against the bounds.",
    )
    reference: float | None = Field(
        None, description="The first teacher's figure, which a chain fills in for its jobs."
    )


class GateResult(Gate):
    """A gate and the figure that it was held against; None for one that was not measured."""

    value: float | None = Field(None, description="The figure, divided by what it is relative to.")
    passed: bool = Field(description="Whether it keeps the gate's bounds.")

    @property
    def name(self) -> str:
        """The figure, and what it is relative to."""
        return self.metric + (_RELATIVE[self.relative_to] if self.relative_to else "")

    def sentence(self) -> str:
        """Figure and bound, such as `perplexityRatio 1.31 > 1.15`."""
        if self.value is None:
            return f"{self.name} was not measured"
        if math.isnan(self.value):
            return f"{self.name} is not a number"
        if self.min is not None and self.value < self.min:
            return f"{self.name} {_digits(self.value, self.min)} < {self.min:g}"
        if self.max is not None and self.value > self.max:
            return f"{self.name} {_digits(self.value, self.max)} > {self.max:g}"
        bounds = [f"≥ {self.min:g}"] if self.min is not None else []
        bounds += [f"≤ {self.max:g}"] if self.max is not None else []
        return f"{self.name} {self.value:.4g} {' and '.join(bounds)}"


def judged(gates: Sequence[Gate], figures: Mapping[str, float]) -> list[GateResult]:
    """Each gate against its figure. A figure that is missing, or is not a number, fails its gate."""
    return [_judged(gate, figure_of(gate, figures)) for gate in gates]


def figure_of(gate: Gate, figures: Mapping[str, float]) -> float | None:
    """What a gate's bounds are held against; None where it, or what it is relative to, is missing.

    Relative to a figure that is not above 0 there is none.
    """
    value = figures.get(gate.metric)
    if value is None or gate.relative_to is None:
        return value
    if gate.relative_to == "Teacher":
        reference = figures.get(TEACHERS.get(gate.metric, ""))
    else:
        reference = gate.reference
    return value / reference if reference is not None and reference > 0 else None


def failures(results: Iterable[GateResult]) -> list[GateResult]:
    """The gates that do not hold."""
    return [result for result in results if not result.passed]


def _judged(gate: Gate, value: float | None) -> GateResult:
    passed = (
        value is not None
        and not math.isnan(value)
        and (gate.min is None or value >= gate.min)
        and (gate.max is None or value <= gate.max)
    )
    return GateResult(**gate.model_dump(), value=value, passed=passed)


def _digits(value: float, bound: float) -> str:
    """Four digits, or as many as tell the value from the bound."""
    short = f"{value:.4g}"
    return short if float(short) != bound else f"{value:.12g}"
