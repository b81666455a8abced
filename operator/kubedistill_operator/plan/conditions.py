"""Conditions as in metav1: by type, with the time of the last change of status."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Literal

from kubedistill_api import reasons
from kubedistill_api.status import Condition

from kubedistill_operator.plan.times import format_time

Status = Literal["True", "False", "Unknown"]
_MESSAGE_LIMIT = 4096


class ConditionSet:
    """Conditions being changed by one pass over an object of one generation."""

    def __init__(
        self,
        conditions: Iterable[Condition],
        types: tuple[str, ...],
        generation: int,
        now: datetime,
    ) -> None:
        self._types = types
        self._generation = generation
        self._now = format_time(now)
        self._by_type = {condition.type: condition for condition in conditions}
        for kind in types:
            if kind not in self._by_type:
                self.set(kind, "Unknown", reasons.PENDING)

    def __getitem__(self, kind: str) -> Condition:
        return self._by_type[kind]

    def set(self, kind: str, status: Status, reason: str, message: str = "") -> bool:
        """Set a condition; True when its status or reason is new."""
        old = self._by_type.get(kind)
        same = old is not None and old.status == status
        self._by_type[kind] = Condition(
            type=kind,
            status=status,
            reason=reason,
            message=message[:_MESSAGE_LIMIT],
            last_transition_time=old.last_transition_time if same and old else self._now,
            observed_generation=self._generation,
        )
        return not same or (old is not None and old.reason != reason)

    def confirm(self) -> None:
        """Say of every condition that it speaks of this generation."""
        for kind, condition in self._by_type.items():
            if condition.observed_generation != self._generation:
                self._by_type[kind] = condition.model_copy(
                    update={"observed_generation": self._generation}
                )

    def to_list(self) -> list[Condition]:
        known = [self._by_type[kind] for kind in self._types]
        return known + [c for kind, c in self._by_type.items() if kind not in self._types]
