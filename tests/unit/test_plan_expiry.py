"""The object of a finished job is deleted when its time is over, and not before."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from kubedistill_api import names, reasons
from kubedistill_operator.plan.actions import DeleteFinished
from kubedistill_operator.plan.draft import Observed
from kubedistill_operator.plan.job import plan_job
from test_plan_gang import FAILED, MODEL
from test_plan_job import preflight_seen
from test_plan_kit import (
    TIMING,
    after,
    ended,
    gang_job,
    observed,
    running,
    settled,
    spec,
    started,
    state,
    teacher_seen,
)


def online(**changes: Any) -> dict[str, Any]:
    return spec(teacher={"model": {"uri": "s3://models/big"}, "delivery": "Online"}, **changes)


def done(ttl: int | None, **changes: Any) -> Observed:
    whole = online(ttlSecondsAfterFinished=ttl)
    pods = (ended("p", 0, outcome=MODEL),)
    seen = started(spec=whole, batch_jobs=gang_job(complete=True), pods=pods, **changes)
    return after(seen)


@pytest.mark.parametrize(
    ("ttl", "seconds", "deleted"),
    [(0, 0, True), (60, 0, False), (60, 58, False), (60, 60, True), (60, 1000, True),
     (None, 10**6, False)],
)  # fmt: skip
def test_a_finished_job_is_deleted_on_time(ttl: int | None, seconds: float, deleted: bool) -> None:
    seen = done(ttl)
    plan = settled(replace(seen, now=seen.now + timedelta(seconds=seconds)))
    assert (DeleteFinished() in plan.actions) == deleted
    if ttl and not deleted:
        assert plan.requeue_after is not None
        assert plan.requeue_after <= ttl - seconds


def test_a_failed_one_too_once_its_pods_have_ended() -> None:
    whole = online(ttlSecondsAfterFinished=0, activeDeadlineSeconds=100)
    late = after(started(spec=whole, pods=(running("p"),)), seconds=200)
    plan = settled(late)
    assert DeleteFinished() not in plan.actions
    gone = after(late, batch_jobs={}, pods=(), deleted_batch_jobs=frozenset({"small-a1"}))
    assert DeleteFinished() in settled(gone).actions
    failed = started(spec=online(ttlSecondsAfterFinished=0), batch_jobs=gang_job(**FAILED),
                     pods=(ended("p", 13),))  # fmt: skip
    assert DeleteFinished() in settled(failed).actions


def test_one_whose_inputs_were_refused_too() -> None:
    pod = ended("p", 13, role=names.ROLE_PREFLIGHT, outcome={"message": "no data"})
    seen = preflight_seen({"failed": True}, pod, spec=spec(ttlSecondsAfterFinished=30))
    assert DeleteFinished() not in settled(seen).actions
    assert DeleteFinished() in settled(after(seen, seconds=40)).actions


def test_an_invalid_one_waits_to_be_mended() -> None:
    seen = observed(spec=spec(nonsense=1, ttlSecondsAfterFinished=0))
    assert settled(after(seen, seconds=1000)).actions == ()


def test_one_that_the_preflight_finds_invalid_waits_too() -> None:
    pod = ended("p", 10, role=names.ROLE_PREFLIGHT, outcome={"message": "no such field"})
    seen = preflight_seen({"failed": True}, pod, spec=spec(ttlSecondsAfterFinished=0))
    assert state(settled(seen)) == ("False", reasons.INVALID_SPEC)
    assert DeleteFinished() not in settled(after(seen, seconds=1000)).actions


def test_one_that_its_own_attempt_finds_invalid_does_not() -> None:
    """Its inputs are fixed by then: there is nothing left to be corrected in it."""
    failed = started(spec=online(ttlSecondsAfterFinished=0), batch_jobs=gang_job(**FAILED),
                     pods=(ended("p", 10),))  # fmt: skip
    assert DeleteFinished() in settled(failed).actions


def test_an_edit_that_lifts_nothing_starts_no_time_anew() -> None:
    """Nor does it make pods of the teacher for a moment."""
    whole = spec(backoffLimit=2, ttlSecondsAfterFinished=100)
    complete = teacher_seen({"complete": True}, spec=whole)
    gang = after(complete, batch_jobs=gang_job(**FAILED), pods=(ended("p", 1),))
    spent = gang.status.model_copy(update={"failures": 2})
    failed = after(replace(gang, status=spent))
    assert state(settled(failed)) == ("False", reasons.BACKOFF_LIMIT_EXCEEDED)
    over = settled(failed).status.completion_time
    gates = [{"metric": "perplexity", "max": 9}]
    edited = after(failed, seconds=60, generation=2, batch_jobs={}, pods=(),
                   spec=whole | {"gates": gates})  # fmt: skip
    plan = settled(edited)
    assert state(plan) == ("False", reasons.BACKOFF_LIMIT_EXCEEDED)
    assert plan.status.completion_time == over
    assert (plan.events, plan.actions) == ((), ())
    assert plan.requeue_after is not None
    assert plan.requeue_after <= 40
    assert DeleteFinished() in settled(after(edited, seconds=60)).actions
    # The same where it was a writer of the teacher that failed too often.
    writers = failed.status.model_copy(update={"failures": 0, "teacher_failures": [0, 3]})
    writers = settled(replace(failed, status=writers)).status
    assert settled(replace(edited, status=writers)).status.completion_time == over


def test_a_chains_job_stays_with_its_chain() -> None:
    assert DeleteFinished() not in settled(done(0, of_chain=True)).actions


def test_a_model_that_another_job_is_about_to_take_stays() -> None:
    plan = settled(done(0, waited_for_by=("next",)))
    assert DeleteFinished() not in plan.actions
    assert plan.requeue_after == 30


def test_a_failed_one_is_not_kept_for_those_who_wait() -> None:
    failed = started(spec=online(ttlSecondsAfterFinished=0), batch_jobs=gang_job(**FAILED),
                     pods=(ended("p", 13),), waited_for_by=("next",))  # fmt: skip
    assert DeleteFinished() in settled(failed).actions


def test_a_job_that_works_is_never_deleted() -> None:
    seen = started(spec=online(ttlSecondsAfterFinished=0), pods=(running("p"),))
    assert plan_job(after(seen, seconds=100), TIMING).actions == ()
    assert reasons.COMPLETED not in {a.reason for a in seen.status.attempts}
