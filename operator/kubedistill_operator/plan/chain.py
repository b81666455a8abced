"""The plan for a DistillationChain: one stage after the other, each a job of its own or a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from kubedistill_api import reasons
from kubedistill_api.chain import (
    DistillationChainSpec,
    DistillationChainStatus,
    StageStatus,
)
from kubedistill_api.sweep import SweepTable
from pydantic import ValidationError

from kubedistill_operator.plan.actions import (
    Action,
    ChainPlan,
    CreateReport,
    CreateStageJob,
    Event,
    Refusal,
    SetStageFields,
    SuspendStageJob,
)
from kubedistill_operator.plan.conditions import ConditionSet
from kubedistill_operator.plan.layout import Laid, lay_out
from kubedistill_operator.plan.stages import GATES, HANDED_ON, StageJob
from kubedistill_operator.plan.sweep import overruled

_PENDING = "Pending"


@dataclass(frozen=True)
class ObservedChain:
    """Everything a plan for one chain may use.

    `jobs`, by name, are those that it owns and those that have a name of its own.
    """

    namespace: str
    name: str
    generation: int
    spec: Mapping[str, Any]
    status: DistillationChainStatus
    now: datetime
    jobs: Mapping[str, StageJob] = field(default_factory=dict)
    refusal: Refusal | None = None


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
        self.before = {stage.name: stage for stage in seen.status.stages}
        self.actions: list[Action] = []
        self.events: list[Event] = []

    def plan(self) -> ChainPlan:
        parsed = self._parse()
        if parsed is not None:
            chain, laid = parsed
            leaving = [name for name, job in self.seen.jobs.items() if job.leaving]
            if leaving:
                self._wait(leaving)
            else:
                self._report(chain, laid)
                self._tell_of_trials(laid)
                self._advance(chain, laid)
                self._say_refusal()
        self.conditions.confirm()
        status = self.status.model_copy(
            update={
                "conditions": self.conditions.to_list(),
                "observed_generation": self.seen.generation,
            }
        )
        states = {stage.name: stage.state for stage in status.stages}
        return ChainPlan(status, tuple(self.actions), tuple(self.events), stage_states=states)

    def _parse(self) -> tuple[DistillationChainSpec, list[Laid]] | None:
        try:
            chain = DistillationChainSpec.model_validate(self.seen.spec)
        except ValidationError as error:
            self._invalid([f"spec: {error.errors()[0]['msg']}"])
            return None
        laid, problems = lay_out(self.seen.name, chain, self.seen.jobs, self.before)
        if problems:
            self._invalid(problems)
            return None
        return chain, laid

    def _invalid(self, problems: list[str]) -> None:
        message = "; ".join(problems)
        self.conditions.set(reasons.VALIDATED, "False", reasons.INVALID_SPEC, message)
        if self.conditions.set(reasons.SUCCEEDED, "False", reasons.INVALID_SPEC, message):
            self._tell(reasons.INVALID_SPEC, message, warning=True)

    def _wait(self, leaving: list[str]) -> None:
        message = f"waits until jobs of the deleted chain before it are gone: {', '.join(leaving)}"
        self.conditions.set(reasons.SUCCEEDED, "Unknown", reasons.WAITING_FOR_DEPENDENCY, message)

    def _tell(self, reason: str, message: str, *, warning: bool = False) -> None:
        self.events.append(Event(reason, message[:1000], warning))

    def _say_refusal(self) -> None:
        """Of an action that this plan asks for again: what the API server said to it."""
        refused = self.seen.refusal
        unknown = self.conditions[reasons.SUCCEEDED].status == "Unknown"
        if refused is None or refused.action not in self.actions or not unknown:
            return
        before = next((c for c in self.seen.status.conditions if c.type == reasons.SUCCEEDED), None)
        self.conditions.set(reasons.SUCCEEDED, "Unknown", refused.reason, refused.message)
        if before is None or before.message != refused.message:
            self._tell(refused.reason, refused.message, warning=True)

    def _report(self, chain: DistillationChainSpec, laid: Sequence[Laid]) -> None:
        stages = [self._stage_status(one) for one in laid]
        done = sum(one.standing.percentage for one in laid)
        self.status = self.status.model_copy(
            update={"stages": stages, "progress": int(done / len(chain.stages))}
        )

    def _stage_status(self, one: Laid) -> StageStatus:
        standing = one.standing
        shown = StageStatus(
            name=one.stage.name,
            job_name=standing.job_name,
            state=_PENDING,
            trials=list(standing.trials),
            choice=standing.choice,
        )
        # A sweep without a choice is in the state of the trial that runs.
        name = standing.job_name or next(iter(standing.running), "")
        job = self.seen.jobs.get(name)
        if job is None:
            state = reasons.STAGE_FAILED if standing.failure else _PENDING
            return shown.model_copy(update={"state": state})
        metrics = {metric.name: metric.value for metric in job.status.metrics}
        model = job.status.model
        return shown.model_copy(
            update={
                "state": job.succeeded.reason or _PENDING,
                "model": model.uri if model else "",
                "perplexity": metrics.get("perplexity"),
                "parameters": model.parameters if model else 0,
                "report": _report_state(job) if standing.trials and standing.done else "",
            }
        )

    def _tell_of_trials(self, laid: Sequence[Laid]) -> None:
        """Events of trials that failed and of choices, each once."""
        for one in laid:
            before = self.before.get(one.stage.name) or StageStatus(name=one.stage.name)
            states = {trial.job_name: trial.state for trial in before.trials}
            for trial in one.standing.trials:
                job = self.seen.jobs.get(trial.job_name)
                failed = job is not None and job.succeeded.status == "False"
                if job and failed and states.get(trial.job_name) != trial.state:
                    self._tell(
                        "TrialFailed",
                        f"stage {one.stage.name}: trial T = {trial.temperature:g} failed "
                        f"({trial.state}): {job.succeeded.message}",
                        warning=True,
                    )
            if one.standing.choice and one.standing.choice != before.choice:
                self._tell("TrialChosen", f"stage {one.stage.name}: {one.standing.choice}")

    def _advance(self, chain: DistillationChainSpec, laid: Sequence[Laid]) -> None:
        self._say_differences(laid)
        self._hand_on(chain, laid)
        self._write_reports(chain, laid)
        count = len(chain.stages)
        for index, one in enumerate(laid):
            if one.standing.done:
                continue
            place = f"{one.stage.name} {index + 1}/{count}"
            running = [self.seen.jobs[name] for name in one.standing.running]
            progress = running[0].status.progress if running else None
            self.status = self.status.model_copy(
                update={
                    "current_stage": place,
                    "estimated_remaining": progress.estimated_remaining if progress else "",
                }
            )
            self._go_on(chain, one, place, _choices(laid))
            return
        self._completed(chain, laid)

    def _go_on(
        self, chain: DistillationChainSpec, one: Laid, place: str, choices: Sequence[str]
    ) -> None:
        stage, standing = one.stage.name, one.standing
        if standing.failure:
            message = f"stage {stage} {standing.failure}"
            self.conditions.set(reasons.RUNNING, "False", reasons.STAGE_FAILED)
            if self.conditions.set(reasons.SUCCEEDED, "False", reasons.STAGE_FAILED, message):
                self._tell(reasons.STAGE_FAILED, message, warning=True)
            return
        running = {name: self.seen.jobs[name] for name in standing.running}
        for name, job in running.items():
            if bool(job.spec.get("suspend")) != chain.suspend:
                self.actions.append(SuspendStageJob(name, chain.suspend))
        if chain.suspend:
            stopping = any(j.succeeded.reason != reasons.IS_SUSPENDED for j in running.values())
            state = "being suspended" if stopping else "suspended" if running else "not started"
            self._suspended(f"stage {stage} is {state}")
            return
        for part in standing.start:
            self.actions.append(CreateStageJob(part.name, stage, part.spec.to_wire()))
            if part.temperature is not None:
                self._tell("TrialStarted", f"stage {place}: trial T = {part.temperature:g} starts")
            elif part.retry:
                self._tell("StageRetried", f"stage {place}: {standing.progress}", warning=True)
            else:
                self._tell("StageStarted", f"stage {place} starts")
        self.conditions.set(reasons.SUSPENDED, "False", reasons.NOT_SUSPENDED)
        self._running("; ".join([f"stage {place}: {standing.progress}", *choices]))

    def _running(self, message: str) -> None:
        self.conditions.set(reasons.RUNNING, "True", reasons.STAGE_RUNNING, message)
        self.conditions.set(reasons.SUCCEEDED, "Unknown", reasons.STAGE_RUNNING, message)

    def _suspended(self, message: str) -> None:
        if self.conditions.set(reasons.SUSPENDED, "True", reasons.IS_SUSPENDED, message):
            self._tell(reasons.IS_SUSPENDED, message)
        self.conditions.set(reasons.RUNNING, "False", reasons.IS_SUSPENDED)
        self.conditions.set(reasons.SUCCEEDED, "Unknown", reasons.IS_SUSPENDED, message)

    def _completed(self, chain: DistillationChainSpec, laid: Sequence[Laid]) -> None:
        count = len(chain.stages)
        last = chain.stages[-1].name
        self.status = self.status.model_copy(
            update={"current_stage": f"{last} {count}/{count}", "estimated_remaining": ""}
        )
        message = f"{count} stages; the last model is at {self.status.stages[-1].model}"
        message = "; ".join([message, *_choices(laid)])
        self.conditions.set(reasons.SUSPENDED, "False", reasons.NOT_SUSPENDED)
        self.conditions.set(reasons.RUNNING, "False", reasons.COMPLETED)
        if self.conditions.set(reasons.SUCCEEDED, "True", reasons.COMPLETED, message):
            self._tell(reasons.COMPLETED, message)

    def _write_reports(self, chain: DistillationChainSpec, laid: Sequence[Laid]) -> None:
        """The table of a finished sweep goes into the reports of its trials."""
        for one, status in zip(laid, self.status.stages, strict=True):
            if not one.standing.done or not one.standing.trials:
                continue
            job = self.seen.jobs[one.standing.job_name]
            if job.report is None and not chain.suspend:
                table = SweepTable(
                    stage=one.stage.name,
                    choice=one.standing.choice,
                    trials=list(one.standing.trials),
                )
                self.actions.append(CreateReport(one.standing.job_name, table))
            known = self.before.get(one.stage.name)
            if status.report == "Failed" and (known is None or known.report != "Failed"):
                why = job.report.failure_message if job.report else ""
                self._tell(
                    "ReportFailed",
                    f"stage {one.stage.name}: the reports lack the table of trials: {why}; "
                    "it is in the chain's status",
                    warning=True,
                )

    def _hand_on(self, chain: DistillationChainSpec, laid: Sequence[Laid]) -> None:
        """What may change of a job at any time: gates, and limits, by which a failed one goes on.

        Limits only of a stage that is not done (a trial that failed before another was chosen is
        over), and in a suspended chain only of jobs that run.
        """
        for one in laid:
            for part in one.parts:
                job = self.seen.jobs.get(part.name)
                if job is None or not job.ours:
                    continue
                over = one.standing.done or (chain.suspend and job.ended)
                fields = job.outdated(part.spec, GATES if over else HANDED_ON)
                if fields:
                    self.actions.append(SetStageFields(part.name, fields))

    def _say_differences(self, laid: Sequence[Laid]) -> None:
        overtaken = [o for o in laid if o.stage.sweep and overruled(o.stage.sweep, o.standing)]
        changed = [
            one.stage.name
            for one in laid
            if one.taught and one not in overtaken and self._differs(one)
        ]
        told = []
        if changed:
            told.append(
                f"stage {', '.join(changed)}: started with another spec and is left as it is; "
                "delete its job to run it again with the new one"
            )
        told += [
            f"stage {one.stage.name}: its sweep was changed after the choice, which stands; delete "
            f"job {one.standing.job_name} to choose anew"
            for one in overtaken
        ]
        known = {name for one in laid for name in one.job_names}
        left = sorted(
            name for name, job in self.seen.jobs.items() if job.ours and name not in known
        )
        if left:
            told.append(f"of no stage any more, and left as they are: {', '.join(left)}")
        self.conditions.set(reasons.VALIDATED, "True", reasons.VALID, "; ".join(told))

    def _differs(self, one: Laid) -> bool:
        return any(
            job.differs(part.spec)
            for part in one.parts
            if (job := self.seen.jobs.get(part.name)) is not None
        )


def _report_state(job: StageJob) -> str:
    if job.report is None or not job.report.finished:
        return "Writing"
    return "Written" if job.report.complete else "Failed"


def _choices(laid: Sequence[Laid]) -> list[str]:
    return [f"stage {o.stage.name}: {o.standing.choice}" for o in laid if o.standing.choice]
