"""Sums over held-out tokens, and the figures that come of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from kubedistill_api.status import Metric
from torch import Tensor
from torch.nn.functional import one_hot

BINS = 15
"""Equal-width bins of confidence, as in Guo et al. 2017."""
WEAKEST_BY = ("perplexity", "perplexityRatio")
FEWEST_TOKENS = 100
"""A slice with fewer says too little to be called the weakest."""
_COLUMNS = (
    "tokens", "nll", "hits", "agreements",
    "teacherTokens", "exactTokens", "teacherNll", "divergence",
)  # fmt: skip
_BIN_COLUMNS = 3
_GREATEST_NLL = 50.0
Model = Literal["student", "teacher"]


class Sums:
    """By source [S, columns], and by confidence bin [15, (tokens, confidence, hits)]; float64.

    Their size depends on the number of sources only, so that one all-reduce adds them up.
    """

    def __init__(self, sources: int, device: torch.device | str = "cpu") -> None:
        size = sources * len(_COLUMNS) + 2 * BINS * _BIN_COLUMNS
        self.vector = torch.zeros(size, dtype=torch.float64, device=device)
        by_source, student, teacher = torch.split(
            self.vector, [sources * len(_COLUMNS), BINS * _BIN_COLUMNS, BINS * _BIN_COLUMNS]
        )
        self._by_source = by_source.view(sources, len(_COLUMNS))
        self._bins: dict[Model, Tensor] = {
            "student": student.view(BINS, _BIN_COLUMNS),
            "teacher": teacher.view(BINS, _BIN_COLUMNS),
        }

    def add(self, sources: Tensor, **columns: Tensor) -> None:
        """Values [N] of tokens that come from `sources` [N]; names as of `_COLUMNS`."""
        for name, values in columns.items():
            column = self._by_source[:, _COLUMNS.index(name)]
            column += _grouped(sources, values[:, None], len(column))[:, 0]

    def add_confidence(self, model: Model, confidence: Tensor, hits: Tensor) -> None:
        """The probability [N] of each token's likeliest guess, and whether it was right."""
        inner = torch.linspace(0, 1, BINS + 1, device=confidence.device)[1:-1]
        # A bin is open below and closed above.
        index = torch.bucketize(confidence, inner)
        values = torch.stack([torch.ones_like(confidence), confidence, hits.to(confidence)], -1)
        self._bins[model] += _grouped(index, values, BINS)

    def reduce(self, group: Any) -> Sums:
        """The same sums over all ranks of `group`, on the CPU."""
        total = Sums(len(self._by_source))
        total.vector += self.vector.cpu()
        dist.all_reduce(total.vector, group=group)
        return total

    def evaluation(self, names: tuple[str, ...]) -> Evaluation:
        """Figures in all and of each source; `names` of the sources."""
        student, teacher = (
            Calibration(tuple(Bin(*row) for row in bins.tolist())) for bins in self._bins.values()
        )
        rows = [dict(zip(_COLUMNS, row, strict=True)) for row in self._by_source.tolist()]
        figures = _figures(dict(zip(_COLUMNS, self._by_source.sum(0).tolist(), strict=True)))
        figures["ece"] = student.ece
        if teacher.tokens:
            figures["teacherEce"] = teacher.ece
        return Evaluation(
            {name: round(value, 6) for name, value in figures.items()},
            tuple(
                Slice(name, int(row["tokens"]), _finite(_figures(row)) if row["tokens"] else {})
                for name, row in zip(names, rows, strict=True)
            ),
            student,
            teacher if teacher.tokens and math.isfinite(teacher.confidence) else None,
        )


@dataclass(frozen=True)
class Bin:
    """Sums of the tokens whose likeliest guess has a probability within the bin."""

    tokens: float
    confidence: float
    hits: float


@dataclass(frozen=True)
class Calibration:
    """How often a model is right, against how sure it is."""

    bins: tuple[Bin, ...]

    @property
    def tokens(self) -> float:
        return sum(part.tokens for part in self.bins)

    @property
    def ece(self) -> float:
        """Expected calibration error: mean |accuracy − confidence| of the bins, by tokens."""
        gaps = sum(abs(part.hits - part.confidence) for part in self.bins)
        return gaps / max(1.0, self.tokens)

    @property
    def accuracy(self) -> float:
        return sum(part.hits for part in self.bins) / max(1.0, self.tokens)

    @property
    def confidence(self) -> float:
        return sum(part.confidence for part in self.bins) / max(1.0, self.tokens)


@dataclass(frozen=True)
class Slice:
    """The held-out tokens of one source, and those of its figures that are numbers; no figures where
    there is no token."""

    name: str
    tokens: int
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Evaluation:
    """Held-out figures in all, by source, and the calibration of both models."""

    figures: Mapping[str, float]
    slices: tuple[Slice, ...]
    student: Calibration
    teacher: Calibration | None
    """None where its whole distribution is not known, or is not a number."""

    @property
    def metrics(self) -> list[Metric]:
        return [Metric(name=name, value=value) for name, value in self.figures.items()]

    def weakest(self) -> dict[str, Slice]:
        """The worst slice by each of `WEAKEST_BY`, where there are two or more to compare."""
        result: dict[str, Slice] = {}
        for figure in WEAKEST_BY:
            known = [s for s in self.slices if figure in s.figures and s.tokens >= FEWEST_TOKENS]
            if len(known) > 1:
                result[figure] = max(known, key=lambda s: s.figures[figure])
        return result


def _grouped(index: Tensor, values: Tensor, groups: int) -> Tensor:
    """Sum of values [N, C] by index [N]: [groups, C]. A product, which adds in a fixed order on
    every device; `index_add_` does not. A NaN, which times 0 is one everywhere, stays in its group."""
    mine, values = one_hot(index, groups).double().T, values.double()
    number = values.isfinite()
    sums = mine @ values.where(number, 0.0)
    return sums.masked_fill(mine @ (~number).double() > 0, math.nan)


def _figures(sums: Mapping[str, float]) -> dict[str, float]:
    """perplexity, accuracy; with a teacher agreement; with its whole distribution the rest."""
    count = max(1.0, sums["tokens"])
    values = {"perplexity": _perplexity(sums["nll"] / count), "accuracy": sums["hits"] / count}
    if sums["teacherTokens"]:
        values["teacherAgreement"] = sums["agreements"] / sums["teacherTokens"]
    if exact := sums["exactTokens"]:
        values["teacherKL"] = sums["divergence"] / exact
        values["teacherPerplexity"] = _perplexity(sums["teacherNll"] / exact)
        if exact == sums["tokens"]:
            values["perplexityRatio"] = values["perplexity"] / values["teacherPerplexity"]
    return {name: round(value, 6) for name, value in values.items()}


def _finite(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _perplexity(mean_nll: float) -> float:
    # In this order: of a NaN, which is no figure, min() would make one.
    return math.exp(_GREATEST_NLL if mean_nll > _GREATEST_NLL else mean_nll)
