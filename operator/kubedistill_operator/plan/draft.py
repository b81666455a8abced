"""One pass over a DistillationJob: what was seen, and the plan being drawn up from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from kubedistill_api import names, reasons
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.runspec import ProgressReport
from kubedistill_api.status import Attempt, DistillationJobStatus

from kubedistill_operator.plan.actions import Action, Event, Plan, Refusal
from kubedistill_operator.plan.conditions import ConditionSet, Status
from kubedistill_operator.plan.times import format_time
from kubedistill_operator.plan.views import BatchJobView, PodView

_ATTEMPTS_KEPT = 10


@dataclass(frozen=True)
class Timing:
    """The operator's own times, in seconds."""

    poll: float = 5.0
    backoff_base: float = 10.0
    backoff_cap: float = 300.0
    grace: int = 60
    margin: int = 30
    elastic_wait: float = 120.0
    start_check: float = 10.0
    """Pods that have not started after this long may miss something that was deleted."""


@dataclass(frozen=True)
class OtherJob:
    """Another DistillationJob of the namespace, as its dependents see it."""

    name: str
    depends_on: tuple[str, ...] = ()
    succeeded: str = "Unknown"
    reason: str = ""
    message: str = ""
    model_uri: str = ""
    model_digest: str = ""


@dataclass(frozen=True)
class Contact:
    """What a pod answered when it was last asked, and when that was by the clock that plans go by.

    `stepped_at`: when an answer first told of its latest step; `moved`: whether one before it told
    of another.
    """

    report: ProgressReport
    reached_at: datetime
    stepped_at: datetime | None = None
    moved: bool = False


@dataclass(frozen=True)
class Unanswered:
    """A pod that has never answered, and since when it is asked, by the clock that plans go by."""

    pod: str
    since: datetime


@dataclass(frozen=True)
class Observed:
    """Everything a plan for one DistillationJob may use."""

    namespace: str
    name: str
    uid: str
    generation: int
    spec: Mapping[str, Any]
    status: DistillationJobStatus
    now: datetime
    batch_jobs: Mapping[str, BatchJobView] = field(default_factory=dict)
    deleted_batch_jobs: frozenset[str] = frozenset()
    pods: Sequence[PodView] = ()
    other_jobs: Mapping[str, OtherJob] = field(default_factory=dict)
    rank0: Contact | None = None
    teacher: Contact | None = None
    unanswered: Unanswered | None = None
    """Rank 0's pod, as long as it has never answered."""
    of_chain: bool = False
    """Whether a DistillationChain owns it."""
    waited_for_by: tuple[str, ...] = ()
    """Jobs that need its model and have not taken it yet."""
    refusal: Refusal | None = None
    service_due: bool = False
    """Whether it is time to look after the Service of a gang that runs."""

    def pods_of(self, role: str, attempt: int = 0) -> list[PodView]:
        """Pods of a role (and attempt), those that are gone included, by index."""
        found = [p for p in self.pods if p.role == role and p.attempt == attempt]
        return sorted(found, key=lambda p: (p.index, p.name))


class Draft:
    """The status, actions and events of one pass, collected and handed over together."""

    def __init__(self, seen: Observed, timing: Timing) -> None:
        self.seen = seen
        self.timing = timing
        self.now = seen.now
        self.status = seen.status
        self.conditions = ConditionSet(
            seen.status.conditions, reasons.CONDITION_TYPES, seen.generation, seen.now
        )
        self._actions: list[Action] = []
        self._events: list[Event] = []
        self._requeue: float | None = None

    def update(self, **fields: Any) -> None:
        self.status = self.status.model_copy(update=fields)

    def set(self, kind: str, status: Status, reason: str, message: str = "") -> bool:
        return self.conditions.set(kind, status, reason, message)

    def summary(self, reason: str, message: str = "") -> None:
        """Succeeded=Unknown with this reason: the STATE column."""
        self.set(reasons.SUCCEEDED, "Unknown", reason, message)

    def fail(self, reason: str, message: str) -> None:
        """Succeeded=False: the end, with an event the first time."""
        if self.set(reasons.SUCCEEDED, "False", reason, message):
            self.tell(reason, message, warning=True)
        if self.conditions[reasons.RUNNING].status != "Unknown":
            self.set(reasons.RUNNING, "False", reason)
        if self.status.start_time and not self.status.completion_time:
            self.update(completion_time=format_time(self.now))

    def act(self, action: Action) -> None:
        if action not in self._actions:
            self._actions.append(action)

    def tell(self, reason: str, message: str, *, warning: bool = False) -> None:
        self._events.append(Event(reason, message[:1000], warning))

    def look_again(self, seconds: float) -> None:
        """Ask for another pass after so long; the earliest wins."""
        seconds = max(0.1, seconds)
        self._requeue = seconds if self._requeue is None else min(self._requeue, seconds)

    @property
    def attempt(self) -> Attempt | None:
        """The newest attempt."""
        return self.status.attempts[-1] if self.status.attempts else None

    def change_attempt(self, **fields: Any) -> Attempt:
        """Change the newest attempt."""
        changed = self.status.attempts[-1].model_copy(update=fields)
        self.update(attempts=[*self.status.attempts[:-1], changed])
        return changed

    def add_attempt(self, nodes: int = 0, micro_batch_size: int = 0) -> Attempt:
        """The next attempt under the next fence; it exists once the status is written."""
        number = self.attempt.number + 1 if self.attempt else 1
        fence = self.status.fence + 1
        attempt = Attempt(
            number=number,
            fence=fence,
            start_time=format_time(self.now),
            nodes=nodes,
            micro_batch_size=micro_batch_size,
        )
        self.update(
            fence=fence,
            attempts=[*self.status.attempts, attempt][-_ATTEMPTS_KEPT:],
            restarts=number - 1,
        )
        return attempt

    @property
    def refused(self) -> Refusal | None:
        """The refusal of an action that this plan asks for again."""
        refusal = self.seen.refusal
        return refusal if refusal is not None and refusal.action in self._actions else None

    def attempt_name(self, number: int) -> str:
        return names.attempt_name(self.seen.name, number)

    def plan(self) -> Plan:
        self.conditions.confirm()
        self.update(conditions=self.conditions.to_list(), observed_generation=self.seen.generation)
        return Plan(self.status, tuple(self._actions), tuple(self._events), self._requeue)


@dataclass(frozen=True)
class Pass:
    """A draft with a spec that is known to be valid."""

    draft: Draft
    spec: DistillationJobSpec

    @property
    def seen(self) -> Observed:
        return self.draft.seen
