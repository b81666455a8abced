"""The plan for a DistillationChain: one stage after the other, each a job of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from kubedistill_api import reasons
from kubedistill_api.chain import DistillationChainSpec, DistillationChainStatus, StageStatus
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.names import stage_job_name
from kubedistill_api.status import Condition, DistillationJobStatus
from pydantic import ValidationError

from kubedistill_operator.plan.actions import (
    Action,
    ChainPlan,
    CreateStageJob,
    Event,
    SuspendStageJob,
)
from kubedistill_operator.plan.compose import compose
from kubedistill_operator.plan.conditions import ConditionSet
from kubedistill_operator.plan.inputs import parse_spec

_PENDING = "Pending"


@dataclass(frozen=True)
class StageJob:
    """A stage's DistillationJob as observed."""

    spec: Mapping[str, Any]
    status: DistillationJobStatus
    ours: bool = True
    leaving: bool = False
    """Not ours, but of a chain of the same name that was deleted: on its way out, so waited for."""

    @property
    def succeeded(self) -> Condition:
        for condition in self.status.conditions:
            if condition.type == reasons.SUCCEEDED:
                return condition
        return Condition(type=reasons.SUCCEEDED, status="Unknown", reason=reasons.PENDING)


@dataclass(frozen=True)
class ObservedChain:
    """Everything a plan for one chain may use. `jobs` are by name, whoever owns them."""

    namespace: str
    name: str
    generation: int
    spec: Mapping[str, Any]
    status: DistillationChainStatus
    now: datetime
    jobs: Mapping[str, StageJob] = field(default_factory=dict)


def plan_chain(seen: ObservedChain) -> ChainPlan:
    """What follows from what was seen. Pure: the same input gives the same plan."""
    return _ChainDraft(seen).plan()


class _ChainDraft:
    def __init__(self, seen: ObservedChain) -> None:
        self.seen = seen
        self.conditions = ConditionSet(
            seen.status.conditions, reasons.CHAIN_CONDITION_TYPES, seen.generation, seen.now
        )
        self.status = seen.status
        self.actions: list[Action] = []
        self.events: list[Event] = []

    def plan(self) -> ChainPlan:
        parsed = self._parse()
        if parsed is not None:
            chain, specs = parsed
            leaving = [name for name, job in self.seen.jobs.items() if job.leaving]
            if leaving:
                self._wait(leaving)
            else:
                self._report(chain)
                self._advance(chain, specs)
        self.conditions.confirm()
        status = self.status.model_copy(
            update={
                "conditions": self.conditions.to_list(),
                "observed_generation": self.seen.generation,
            }
        )
        states = {stage.name: stage.state for stage in status.stages}
        return ChainPlan(status, tuple(self.actions), tuple(self.events), stage_states=states)

    def _parse(self) -> tuple[DistillationChainSpec, list[DistillationJobSpec]] | None:
        try:
            chain = DistillationChainSpec.model_validate(self.seen.spec)
        except ValidationError as error:
            self._invalid([f"spec: {error.errors()[0]['msg']}"])
            return None
        problems, specs = [], []
        for index, stage in enumerate(chain.stages):
            spec, found = parse_spec(compose(self.seen.name, chain, index))
            problems += [f"stage {stage.name}: {problem.sentence()}" for problem in found]
            if spec is not None:
                specs.append(spec)
            job = self._job(stage.name)
            if job is not None and not job.ours and not job.leaving:
                problems.append(
                    f"stage {stage.name}: there is a DistillationJob "
                    f"{stage_job_name(self.seen.name, stage.name)} that is not of this chain: "
                    "delete it, or rename the stage or the chain"
                )
        if problems:
            self._invalid(problems)
            return None
        return chain, specs

    def _invalid(self, problems: list[str]) -> None:
        message = "; ".join(problems)
        self.conditions.set(reasons.VALIDATED, "False", reasons.INVALID_SPEC, message)
        if self.conditions.set(reasons.SUCCEEDED, "False", reasons.INVALID_SPEC, message):
            self._tell(reasons.INVALID_SPEC, message, warning=True)

    def _wait(self, leaving: list[str]) -> None:
        message = f"waits until jobs of the deleted chain before it are gone: {', '.join(leaving)}"
        self.conditions.set(reasons.SUCCEEDED, "Unknown", reasons.WAITING_FOR_DEPENDENCY, message)

    def _job(self, stage: str) -> StageJob | None:
        return self.seen.jobs.get(stage_job_name(self.seen.name, stage))

    def _tell(self, reason: str, message: str, *, warning: bool = False) -> None:
        self.events.append(Event(reason, message[:1000], warning))

    def _report(self, chain: DistillationChainSpec) -> None:
        stages, done = [], 0.0
        for stage in chain.stages:
            job = self._job(stage.name)
            stages.append(_stage_status(self.seen.name, stage.name, job))
            done += _percentage(job)
        self.status = self.status.model_copy(
            update={"stages": stages, "progress": int(done / len(chain.stages))}
        )

    def _advance(self, chain: DistillationChainSpec, specs: list[DistillationJobSpec]) -> None:
        self._say_differences(chain, specs)
        count = len(chain.stages)
        for index, stage in enumerate(chain.stages):
            job = self._job(stage.name)
            if job is not None and job.succeeded.status == "True":
                continue
            place = f"{stage.name} {index + 1}/{count}"
            if job is None:
                self._start(chain, specs[index], stage.name, place)
            else:
                self._follow(chain, job, stage.name, place)
            return
        self._completed(chain)

    def _start(
        self, chain: DistillationChainSpec, spec: DistillationJobSpec, stage: str, place: str
    ) -> None:
        self.status = self.status.model_copy(
            update={"current_stage": place, "estimated_remaining": ""}
        )
        if chain.suspend:
            self._suspended(f"stage {stage} is not started")
            return
        self.actions.append(CreateStageJob(stage, spec.to_wire()))
        self.conditions.set(reasons.SUSPENDED, "False", reasons.NOT_SUSPENDED)
        self._running(f"stage {place}: its job is created")
        self._tell("StageStarted", f"stage {place} starts")

    def _follow(self, chain: DistillationChainSpec, job: StageJob, stage: str, place: str) -> None:
        progress, condition = job.status.progress, job.succeeded
        self.status = self.status.model_copy(
            update={
                "current_stage": place,
                "estimated_remaining": progress.estimated_remaining if progress else "",
            }
        )
        name = stage_job_name(self.seen.name, stage)
        if condition.status == "False":
            message = f"stage {stage} failed ({condition.reason}): {condition.message}"
            self.conditions.set(reasons.RUNNING, "False", reasons.STAGE_FAILED)
            if self.conditions.set(reasons.SUCCEEDED, "False", reasons.STAGE_FAILED, message):
                self._tell(reasons.STAGE_FAILED, message, warning=True)
            return
        if bool(job.spec.get("suspend")) != chain.suspend:
            self.actions.append(SuspendStageJob(name, chain.suspend))
        if chain.suspend:
            waiting = condition.reason != reasons.IS_SUSPENDED
            self._suspended(f"stage {stage} {'is being suspended' if waiting else 'is suspended'}")
            return
        self.conditions.set(reasons.SUSPENDED, "False", reasons.NOT_SUSPENDED)
        self._running(f"stage {place}: {condition.reason}")

    def _running(self, message: str) -> None:
        self.conditions.set(reasons.RUNNING, "True", reasons.STAGE_RUNNING, message)
        self.conditions.set(reasons.SUCCEEDED, "Unknown", reasons.STAGE_RUNNING, message)

    def _suspended(self, message: str) -> None:
        if self.conditions.set(reasons.SUSPENDED, "True", reasons.IS_SUSPENDED, message):
            self._tell(reasons.IS_SUSPENDED, message)
        self.conditions.set(reasons.RUNNING, "False", reasons.IS_SUSPENDED)
        self.conditions.set(reasons.SUCCEEDED, "Unknown", reasons.IS_SUSPENDED, message)

    def _completed(self, chain: DistillationChainSpec) -> None:
        count = len(chain.stages)
        last = chain.stages[-1].name
        self.status = self.status.model_copy(
            update={"current_stage": f"{last} {count}/{count}", "estimated_remaining": ""}
        )
        message = f"{count} stages; the last model is at {self.status.stages[-1].model}"
        self.conditions.set(reasons.SUSPENDED, "False", reasons.NOT_SUSPENDED)
        self.conditions.set(reasons.RUNNING, "False", reasons.COMPLETED)
        if self.conditions.set(reasons.SUCCEEDED, "True", reasons.COMPLETED, message):
            self._tell(reasons.COMPLETED, message)

    def _say_differences(
        self, chain: DistillationChainSpec, specs: list[DistillationJobSpec]
    ) -> None:
        changed = [
            stage.name
            for stage, spec in zip(chain.stages, specs, strict=True)
            if (job := self._job(stage.name)) is not None and _differs(job, spec)
        ]
        message = ""
        if changed:
            message = (
                f"stage {', '.join(changed)}: started with another spec and is left as it is; "
                "delete its job to run it again with the new one"
            )
        self.conditions.set(reasons.VALIDATED, "True", reasons.VALID, message)


def _differs(job: StageJob, wanted: DistillationJobSpec) -> bool:
    spec, _ = parse_spec(job.spec)
    return spec is None or spec.model_copy(update={"suspend": wanted.suspend}) != wanted


def _percentage(job: StageJob | None) -> float:
    if job is None:
        return 0.0
    if job.succeeded.status == "True":
        return 100.0
    return float(job.status.progress.percentage) if job.status.progress else 0.0


def _stage_status(chain: str, stage: str, job: StageJob | None) -> StageStatus:
    if job is None:
        return StageStatus(name=stage, job_name=stage_job_name(chain, stage), state=_PENDING)
    metrics = {metric.name: metric.value for metric in job.status.metrics}
    model = job.status.model
    return StageStatus(
        name=stage,
        job_name=stage_job_name(chain, stage),
        state=job.succeeded.reason or _PENDING,
        model=model.uri if model else "",
        perplexity=metrics.get("perplexity"),
        parameters=model.parameters if model else 0,
    )
