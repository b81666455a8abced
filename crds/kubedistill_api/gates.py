"""Bounds on the figures of a finished student, and whether they hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from pydantic import Field

from kubedistill_api.base import ApiModel, cel, rules

MAX_GATES = 16


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


class GateResult(Gate):
    """A gate and the figure that it was held against; None for one that was not measured."""

    value: float | None = Field(None, description="The figure.")
    passed: bool = Field(description="Whether it keeps the gate's bounds.")

    def sentence(self) -> str:
        """Figure and bound, such as `perplexityRatio 1.31 > 1.15`."""
        if self.value is None:
            return f"{self.metric} was not measured"
        if math.isnan(self.value):
            return f"{self.metric} is not a number"
        if self.min is not None and self.value < self.min:
            return f"{self.metric} {_digits(self.value, self.min)} < {self.min:g}"
        if self.max is not None and self.value > self.max:
            return f"{self.metric} {_digits(self.value, self.max)} > {self.max:g}"
        bounds = [f"≥ {self.min:g}"] if self.min is not None else []
        bounds += [f"≤ {self.max:g}"] if self.max is not None else []
        return f"{self.metric} {self.value:.4g} {' and '.join(bounds)}"


def judged(gates: Sequence[Gate], figures: Mapping[str, float]) -> list[GateResult]:
    """Each gate against its figure. A figure that is missing, or is not a number, fails its gate."""
    return [_judged(gate, figures.get(gate.metric)) for gate in gates]


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
    return GateResult(metric=gate.metric, min=gate.min, max=gate.max, value=value, passed=passed)


def _digits(value: float, bound: float) -> str:
    """Four digits, or as many as tell the value from the bound."""
    short = f"{value:.4g}"
    return short if float(short) != bound else f"{value:.12g}"
