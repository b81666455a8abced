"""Loss and learning rate of a run's steps, in bounded memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

LIMIT = 500
"""Points kept at most; half of them are dropped when there are more."""
_DIGITS = 6


@dataclass(frozen=True)
class Point:
    """Mean losses a token of one optimizer step; None for a part that has no weight."""

    step: int
    soft: float | None
    hard: float | None
    total: float | None
    learning_rate: float


class _Cursor(BaseModel):
    """As it lies in a commit."""

    model_config = ConfigDict(extra="forbid")
    every: int
    points: list[tuple[int, float | None, float | None, float | None, float]]


class History:
    """Step 1, every `every`-th step, and the latest one.

    What is kept depends on the steps alone, so a resumed run has the history of one that never
    stopped.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._every = 1
        self._points: list[Point] = []

    @property
    def points(self) -> tuple[Point, ...]:
        return tuple(self._points)

    @property
    def latest_loss(self) -> float | None:
        """The mean loss a token of the latest step, the same before and after a resume."""
        return self._points[-1].total if self._points else None

    def record(
        self, step: int, soft: float, hard: float, total: float, learning_rate: float
    ) -> None:
        """Add the step after the latest one; steps count from 1."""
        if self._points and not self._kept(self._points[-1]):
            del self._points[-1]
        self._points.append(
            Point(step, _short(soft), _short(hard), _short(total), _rounded(learning_rate))
        )
        if len(self._points) > self._limit:
            self._every *= 2
            self._points = [p for p in self._points[:-1] if self._kept(p)] + self._points[-1:]

    def to_cursor(self) -> JsonValue:
        """JSON for a commit's cursor."""
        rows: list[JsonValue] = [
            [p.step, p.soft, p.hard, p.total, p.learning_rate] for p in self._points
        ]
        return {"every": self._every, "points": rows}

    @staticmethod
    def from_cursor(value: JsonValue, limit: int = LIMIT) -> History:
        """The history in a cursor; an empty one where there is none."""
        history = History(limit)
        try:
            cursor = _Cursor.model_validate(value)
        except ValidationError:
            return history
        history._every = max(1, cursor.every)
        history._points = [Point(*row) for row in cursor.points]
        return history

    def _kept(self, point: Point) -> bool:
        return point.step == 1 or point.step % self._every == 0


def _short(value: float) -> float | None:
    """Few digits, for a commit is small; JSON knows no NaN."""
    return _rounded(value) if math.isfinite(value) else None


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
