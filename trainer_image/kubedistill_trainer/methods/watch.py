"""Early stopping: what was seen of the held-out loss, and what follows from it."""

from __future__ import annotations

from kubedistill_api.job import EarlyStopping
from pydantic import BaseModel, ConfigDict, JsonValue, TypeAdapter, ValidationError

_ROWS = TypeAdapter(list[tuple[int, float]])


class Look(BaseModel):
    """The mean held-out loss a token, in nats, after `step` optimizer steps."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    step: int
    loss: float


class Watch:
    """All looks of a run; it goes into every commit, so that a resume decides alike."""

    def __init__(self, rule: EarlyStopping | None, looks: tuple[Look, ...] = ()) -> None:
        self._rule = rule
        self.looks = looks

    def due(self, step: int, total_steps: int) -> bool:
        """Whether the held-out loss is to be measured after this step."""
        return self._rule is not None and (
            step % self._rule.interval_steps == 0 or step == total_steps
        )

    def record(self, step: int, loss: float) -> bool:
        """Add a look; whether it is the best so far."""
        self.looks = (*self.looks, Look(step=step, loss=loss))
        return self.best_step == step

    @property
    def best_step(self) -> int | None:
        """The step of the last look that improved on all before it by more than `minDelta`."""
        best = self._best()
        return None if best is None else self.looks[best].step

    @property
    def stopped(self) -> bool:
        """Whether the loss has not improved for `patience` looks."""
        best = self._best()
        if self._rule is None or best is None:
            return False
        return len(self.looks) - 1 - best >= self._rule.patience

    def to_cursor(self) -> JsonValue:
        """JSON for a commit's cursor."""
        return [[look.step, look.loss] for look in self.looks]

    @staticmethod
    def from_cursor(rule: EarlyStopping | None, value: JsonValue) -> Watch:
        """The watch in a cursor; one without looks where there is none."""
        try:
            rows = _ROWS.validate_python(value)
        except ValidationError:
            rows = []
        looks = tuple(Look(step=step, loss=loss) for step, loss in rows)
        return Watch(rule, looks)

    def _best(self) -> int | None:
        best: int | None = None
        for index, look in enumerate(self.looks):
            delta = self._rule.min_delta if self._rule is not None else 0.0
            if best is None or look.loss < self.looks[best].loss - delta:
                best = index
        return best
