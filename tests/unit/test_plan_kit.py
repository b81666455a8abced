"""Builders of what plans look at, and checks that every plan must pass."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from kubedistill_api import names
from kubedistill_api.status import DistillationJobStatus
from kubedistill_operator.plan.actions import Plan
from kubedistill_operator.plan.draft import Observed, Timing
from kubedistill_operator.plan.job import plan_job
from kubedistill_operator.plan.views import BatchJobView, PodView

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
TIMING = Timing(poll=5, backoff_base=10, backoff_cap=300, grace=60, margin=30)
UID = "11111111-2222-3333-4444-555555555555"


def spec(**changes: Any) -> dict[str, Any]:
    """The smallest distilling spec, with changes; None removes a part."""
    whole: dict[str, Any] = {
        "distill": {},
        "teacher": {"model": {"uri": "s3://models/big"}},
        "student": {"fromTeacher": {"layers": 4}},
        "data": {"sources": [{"uri": "s3://data/x.jsonl"}]},
        "storage": {"uri": "s3://runs/x"},
        **changes,
    }
    return {k: v for k, v in whole.items() if v is not None}


def observed(**changes: Any) -> Observed:
    fields: dict[str, Any] = {
        "namespace": "ml",
        "name": "small",
        "uid": UID,
        "generation": 1,
        "spec": spec(),
        "status": DistillationJobStatus(),
        "now": NOW,
    }
    return Observed(**fields | changes)


def after(seen: Observed, seconds: float = 1.0, **changes: Any) -> Observed:
    """Later, with the status that the plan of before wrote."""
    status = changes.pop("status", plan_job(seen, TIMING).status)
    return replace(seen, status=status, now=seen.now + timedelta(seconds=seconds), **changes)


def reason(plan: Plan, kind: str = "Succeeded") -> str:
    return next(c.reason for c in plan.status.conditions if c.type == kind)


def state(plan: Plan, kind: str = "Succeeded") -> tuple[str, str]:
    condition = next(c for c in plan.status.conditions if c.type == kind)
    return condition.status, condition.reason


def message(plan: Plan, kind: str = "Succeeded") -> str:
    return next(c.message for c in plan.status.conditions if c.type == kind)


def settled(seen: Observed) -> Plan:
    """The plan, after checking that planning on its own result changes and tells nothing."""
    plan = plan_job(seen, TIMING)
    again = plan_job(replace(seen, status=plan.status), TIMING)
    assert again.status == plan.status
    assert again.events == ()
    assert set(again.actions) <= set(plan.actions)
    return plan


def ended(name: str, code: int, **fields: Any) -> PodView:
    """A pod that ended with a code; `outcome` is its termination message."""
    outcome = fields.pop("outcome", None)
    text = json.dumps({"reason": "x"} | outcome) if outcome is not None else ""
    defaults: dict[str, Any] = {
        "role": names.ROLE_STUDENT,
        "attempt": 1,
        "phase": "Succeeded" if code == 0 else "Failed",
        "exit_code": code,
        "end_message": text,
        "finished_at": NOW,
    }
    return PodView(name, **defaults | fields)


def running(name: str, **fields: Any) -> PodView:
    defaults: dict[str, Any] = {
        "role": names.ROLE_STUDENT, "attempt": 1, "phase": "Running", "ip": "10.0.0.1",
    }  # fmt: skip
    return PodView(name, **defaults | fields)


def gang_job(number: int = 1, **fields: Any) -> dict[str, BatchJobView]:
    name = names.attempt_name("small", number)
    return {name: BatchJobView(name, names.ROLE_STUDENT, number, **fields)}


RESOLVED = {"studentParameters": 10, "totalSteps": 100, "trainingTokens": 5}


def preflight_name(seen: Observed) -> str:
    """The name of the preflight Job that the plan asks for."""
    action = plan_job(seen, TIMING).actions[0]
    return names.preflight_name(seen.name, action.inputs.digest)  # type: ignore[union-attr]


def accepted(**changes: Any) -> Observed:
    """A job whose preflight has just succeeded."""
    seen = observed(**changes)
    name = preflight_name(seen)
    job = BatchJobView(name, names.ROLE_PREFLIGHT, 1, complete=True, tries=1, generation=1)
    pod = ended(f"{name}-x", 0, role=names.ROLE_PREFLIGHT, outcome={"resolved": RESOLVED})
    return after(seen, batch_jobs={name: job}, pods=(pod,))


def started(**changes: Any) -> Observed:
    """An online job whose first attempt's Job is there."""
    online = {"model": {"uri": "s3://models/big"}, "delivery": "Online"}
    whole = changes.pop("spec", spec(teacher=online))
    first = after(accepted(spec=whole))
    return after(
        replace(first, **{"batch_jobs": gang_job(), "pods": (), **changes}), status=first.status
    )


def teacher_seen(view: dict[str, Any], pods: tuple[PodView, ...] = (), **changes: Any) -> Any:
    name = names.teacher_name("small")
    jobs = {name: BatchJobView(name, names.ROLE_TEACHER, **view)}
    return after(accepted(), batch_jobs=jobs, pods=pods, **changes)
