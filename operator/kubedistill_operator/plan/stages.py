"""A chain's stages: the jobs that each asks for, and where each stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kubedistill_api import reasons
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.status import Condition, DistillationJobStatus
from kubedistill_api.sweep import TrialStatus
from pydantic.alias_generators import to_camel

from kubedistill_operator.plan.inputs import parse_spec
from kubedistill_operator.plan.views import BatchJobView

GATES = ("gates",)
HANDED_ON = (
    *GATES,
    "on_gate_failure",
    "backoff_limit",
    "active_deadline_seconds",
    "stall_timeout_seconds",
)
"""What a chain keeps of its jobs as its own spec says, whatever they were made with."""


@dataclass(frozen=True)
class StageJob:
    """A stage's DistillationJob as observed."""

    spec: Mapping[str, Any]
    status: DistillationJobStatus
    ours: bool = True
    leaving: bool = False
    """Not ours, but of a chain of the same name that was deleted: on its way out, so waited for."""
    report: BatchJobView | None = None
    """The Job that writes a sweep into the reports; it belongs to the chosen trial."""

    @property
    def succeeded(self) -> Condition:
        for condition in self.status.conditions:
            if condition.type == reasons.SUCCEEDED:
                return condition
        return Condition(type=reasons.SUCCEEDED, status="Unknown", reason=reasons.PENDING)

    @property
    def ended(self) -> bool:
        return self.succeeded.status != "Unknown"

    @property
    def percentage(self) -> float:
        """How far it came, of 100; a failed one stays where it was."""
        if self.succeeded.status == "True":
            return 100.0
        return float(self.status.progress.percentage) if self.status.progress else 0.0

    def differs(self, wanted: DistillationJobSpec) -> bool:
        """Whether it was made from another spec. What a chain hands on any time does not count."""
        spec, _ = parse_spec(self.spec)
        handed_on = {name: getattr(wanted, name) for name in ("suspend", *HANDED_ON)}
        return spec is None or spec.model_copy(update=handed_on) != wanted

    def outdated(self, wanted: DistillationJobSpec, names: Sequence[str]) -> dict[str, Any]:
        """Of these fields, on the wire, those that the chain's spec now says otherwise; None: none."""
        spec, _ = parse_spec(self.spec)
        if spec is None:
            return {}
        wire = wanted.to_wire()
        differ = [name for name in names if getattr(spec, name) != getattr(wanted, name)]
        return {to_camel(name): wire.get(to_camel(name)) for name in differ}


Jobs = Mapping[str, StageJob]
"""By name."""


@dataclass(frozen=True)
class Part:
    """A job that a stage asks for: all of it, or one trial of its sweep."""

    name: str
    spec: DistillationJobSpec
    temperature: float | None = None
    retry: int = 0
    """Which of the stage's retries it is, counted from 1; 0 for the stage as it is."""


@dataclass(frozen=True)
class Standing:
    """Where a stage stands, and what is to be done about it."""

    job_name: str
    """The job that makes its student; empty while that is not known."""
    done: bool = False
    failure: str = ""
    """Why it cannot go on, beginning with "failed"."""
    start: tuple[Part, ...] = ()
    running: tuple[str, ...] = ()
    """Names of its jobs that have not ended."""
    progress: str = ""
    """What its jobs are doing, in a few words."""
    percentage: float = 0.0
    trials: tuple[TrialStatus, ...] = ()
    choice: str = ""


def standing_of_tries(parts: Sequence[Part], jobs: Jobs) -> Standing:
    """A stage that is tried again stands where the first try does that keeps its gates; without one,
    where the last one does that was started, or has to be."""
    standings = [standing_of_one(part, jobs) for part in parts]
    for index, (part, standing) in enumerate(zip(parts, standings, strict=True)):
        if standing.done:
            return replace(standing, choice=_taken(index, parts, jobs) if index else "")
        job = jobs.get(part.name)
        broke = job is not None and job.succeeded.reason == reasons.GATE_FAILED
        if not broke or index == len(parts) - 1:
            tried = _broken(parts[:index], jobs)
            if standing.failure:
                return replace(standing, failure="; ".join([standing.failure, *tried]))
            text = f"try {index + 1} of {len(parts)}: {standing.progress}" if index else ""
            return replace(
                standing, progress="; ".join([text, *tried]) if text else standing.progress
            )
    raise AssertionError("a stage has a job")


def _taken(index: int, parts: Sequence[Part], jobs: Jobs) -> str:
    told = _broken(parts[:index], jobs)
    return "; ".join([f"try {index + 1} of {len(parts)} was taken ({parts[index].name})", *told])


def _broken(parts: Sequence[Part], jobs: Jobs) -> list[str]:
    """What the tries before broke."""
    return [f"{part.name}: {jobs[part.name].succeeded.message}" for part in parts]


def standing_of_one(part: Part, jobs: Jobs) -> Standing:
    """A stage without a sweep stands where its job does."""
    job = jobs.get(part.name)
    if job is None:
        return Standing(part.name, start=(part,), progress="its job is created")
    condition = job.succeeded
    failed = condition.status == "False"
    return Standing(
        part.name,
        done=condition.status == "True",
        failure=f"failed ({condition.reason}): {condition.message}" if failed else "",
        running=() if job.ended else (part.name,),
        progress=condition.reason,
        percentage=job.percentage,
    )
