"""Early stopping: what was seen of the held-out loss, and what follows from it."""

from __future__ import annotations

import math

from kubedistill_api.training import EarlyStopping
from pydantic import BaseModel, ConfigDict, JsonValue, TypeAdapter, ValidationError

_ROWS = TypeAdapter(list[tuple[int, float | None]])


class Look(BaseModel):
    """The mean held-out loss a token, in nats, after `step` optimizer steps.

    One that is not finite is worse than any other, and never the best.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    step: int
    loss: float


class Watch:
    """All looks of a run; it goes into every commit, so that a resume decides alike."""

    def __init__(self, rule: EarlyStopping | None, looks: tuple[Look, ...] = ()) -> None:
        self._rule = rule
        self.looks = looks

    @property
    def min_delta(self) -> float:
        """A fall of the loss that counts as one, in nats a token."""
        return 0.0 if self._rule is None else self._rule.min_delta

    def due(self, step: int, total_steps: int) -> bool:
        """Whether the held-out loss is to be measured after this step, and has not been."""
        if self._rule is None or any(look.step == step for look in self.looks):
            return False
        return step % self._rule.interval_steps == 0 or step == total_steps

    def record(self, step: int, loss: float) -> bool:
        """Add a look; whether it is the best so far."""
        self.looks = (*self.looks, Look(step=step, loss=loss))
        return self.best_step == step

    @property
    def best_step(self) -> int | None:
        """The step of the last look that improved on all before it by more than `minDelta`.

        None while no look was finite.
        """
        best = self._best()
        return None if best is None else self.looks[best].step

    @property
    def stopped(self) -> bool:
        """Whether the loss has not improved for `patience` looks."""
        if self._rule is None:
            return False
        best = self._best()
        in_vain = len(self.looks) if best is None else len(self.looks) - 1 - best
        return in_vain >= self._rule.patience

    def to_cursor(self) -> JsonValue:
        """JSON for a commit's cursor, which knows no NaN and no infinity: null stands for both."""
        return [[look.step, look.loss if math.isfinite(look.loss) else None] for look in self.looks]

    @staticmethod
    def from_cursor(rule: EarlyStopping | None, value: JsonValue) -> Watch:
        """The watch in a cursor; one without looks where there is none."""
        try:
            rows = _ROWS.validate_python(value)
        except ValidationError:
            rows = []
        looks = tuple(
            Look(step=step, loss=math.nan if loss is None else loss) for step, loss in rows
        )
        return Watch(rule, looks)

    def _best(self) -> int | None:
        best: int | None = None
        for index, look in enumerate(self.looks):
            if not math.isfinite(look.loss):
                continue
            if best is None or look.loss < self.looks[best].loss - self.min_delta:
                best = index
        return best
