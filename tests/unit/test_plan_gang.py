"""The plan of a job whose inputs are accepted: attempts, restarts, suspension, the end."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from kubedistill_api import names, reasons
from kubedistill_api.names import START_SECONDS
from kubedistill_api.runspec import ProgressReport
from kubedistill_api.status import CheckpointStatus
from kubedistill_operator.plan.actions import (
    CreateGang,
    DeleteBatchJob,
    Plan,
    SuspendBatchJob,
)
from kubedistill_operator.plan.draft import Contact
from kubedistill_operator.plan.job import plan_job
from kubedistill_operator.plan.views import PodView
from test_plan_kit import (
    NOW,
    TIMING,
    after,
    ended,
    gang_job,
    message,
    observed,
    reason,
    running,
    settled,
    spec,
    started,
    state,
    teacher_seen,
)


def report(**fields: Any) -> Contact:
    given: dict[str, Any] = {"phase": "Training", "attempt": 1, "step": 30, "total_steps": 100}
    given |= {"loss": 3.21449, "tokens_per_second": 12345.6, "last_step_time": NOW.timestamp()}
    return Contact(ProgressReport(**given | fields), NOW + timedelta(seconds=3))


def test_progress_is_readable() -> None:
    contact = report(estimated_remaining_seconds=11520)
    plan = settled(started(pods=(running("p"),), rank0=contact))
    progress = plan.status.progress
    assert progress is not None
    assert progress.percentage == 30
    assert progress.tokens_per_second == 12300
    assert progress.loss_text == "3.214"
    assert progress.estimated_remaining == "3h12m"
    assert state(plan) == ("Unknown", reasons.TRAINING)
    assert state(plan, reasons.RUNNING) == ("True", reasons.TRAINING)
    assert plan.requeue_after == 5


def test_a_method_that_does_not_train_says_what_it_does_and_commits_nothing() -> None:
    student = {"model": {"uri": "s3://models/own"}}
    one = spec(distill=None, teacher=None, quantize={}, student=student)
    contact = report(phase="Compressing", step=0, total_steps=0, loss=None)
    plan = settled(started(spec=one, pods=(running("p"),), rank0=contact))
    assert state(plan) == ("Unknown", reasons.COMPRESSING)
    assert state(plan, reasons.CHECKPOINT_CURRENT) == ("True", reasons.NOT_NEEDED)
    assert plan.status.progress is None


def test_the_same_report_later_changes_nothing() -> None:
    seen = started(pods=(running("p"),), rank0=report())
    first = plan_job(seen, TIMING)
    later = plan_job(after(seen, seconds=5), TIMING)
    assert later.status == first.status


def test_an_unschedulable_pod_says_what_is_short() -> None:
    pod = PodView("p", names.ROLE_STUDENT, 1, unschedulable="0/3 nodes: Insufficient gpu")
    plan = settled(started(pods=(pod,)))
    assert state(plan) == ("Unknown", reasons.UNSCHEDULABLE)
    assert "Insufficient gpu" in message(plan)


MODEL = {"model": {"uri": "s3://m", "digest": "d", "parameters": 1000}}


def test_success() -> None:
    outcome = MODEL | {"metrics": [{"name": "perplexity", "value": 12.5}]}
    pods = (ended("p0", 0, outcome=outcome), ended("p1", 0, index=1))
    seen = started(batch_jobs=gang_job(complete=True), pods=pods, rank0=report())
    plan = settled(seen)
    assert state(plan) == ("True", reasons.COMPLETED)
    assert "perplexity 12.5" in message(plan)
    assert plan.status.model is not None
    assert plan.status.progress is not None
    assert plan.status.progress.percentage == 100
    assert plan.status.completion_time
    assert settled(after(seen)).actions == ()


FAILED = {"failed": True, "failing": True, "finished_at": NOW}


def failed_gang(*pods: PodView, **changes: Any) -> Any:
    return started(batch_jobs=gang_job(**FAILED), pods=pods, **changes)


def test_a_charged_end_waits_and_restarts() -> None:
    seen = failed_gang(ended("p", 1))
    plan = settled(seen)
    assert state(plan) == ("Unknown", reasons.RESTARTING)
    assert plan.status.failures == 1
    assert plan.status.attempts[-1].charged
    assert plan.requeue_after is not None
    assert 8 <= plan.requeue_after <= 12
    later = plan_job(after(seen, seconds=30), TIMING)
    assert later.actions == (CreateGang(2, 2),)
    assert later.status.restarts == 1


@pytest.mark.parametrize(
    ("pod", "why"),
    [
        (ended("p", 137, disrupted=True), reasons.DISRUPTED),
        (ended("p", 11), reasons.GRACEFUL_CHECKPOINT),
        (ended("p", 18), reasons.INTERRUPTED),
    ],
)
def test_a_free_end_restarts_at_once(pod: PodView, why: str) -> None:
    plan = settled(failed_gang(pod))
    assert plan.actions == (CreateGang(2, 2),)
    assert plan.status.failures == 0
    assert plan.status.attempts[0].reason == why
    assert not plan.status.attempts[0].charged


@pytest.mark.parametrize(
    ("code", "why"), [(10, reasons.INVALID_SPEC), (13, reasons.UNREADABLE_INPUT)]
)  # fmt: skip
def test_what_is_never_retried(code: int, why: str) -> None:
    plan = settled(failed_gang(ended("p", code)))
    assert state(plan) == ("False", why)
    assert plan.status.completion_time


def test_a_newest_attempt_that_was_fenced_is_followed_by_one_with_a_higher_fence() -> None:
    """Its Job was made anew under its number (somebody had deleted it while no operator looked, and
    nothing was known of it yet): the log knows its fence, and the job ended for good."""
    seen = failed_gang(ended("p", 12))
    [attempt] = settled(seen).status.attempts
    assert (attempt.reason, attempt.charged) == (reasons.FENCED, True)
    assert plan_job(after(seen, seconds=30), TIMING).actions == (CreateGang(2, 2),)


def test_too_many_failures_end_the_job_and_a_larger_limit_revives_it() -> None:
    seen = failed_gang(ended("p", 1), spec=spec(teacher={"model": {"uri": "s3://models/big"},
                       "delivery": "Online"}, backoffLimit=0))  # fmt: skip
    plan = settled(seen)
    assert state(plan) == ("False", reasons.BACKOFF_LIMIT_EXCEEDED)
    assert "exit code 1" in message(plan)
    raised = after(seen, seconds=60, generation=2, spec=dict(seen.spec) | {"backoffLimit": 2})
    revived = plan_job(raised, TIMING)
    assert revived.actions == (CreateGang(2, 2),)
    assert revived.status.completion_time is None


def test_progress_is_not_failure() -> None:
    commit = {"checkpoint": {"uri": "s3://c", "step": 40}, "attempt": 1, "totalSteps": 100}
    pod = ended("p", 1, outcome={"progress": commit})
    seen = failed_gang(pod)
    seen = replace(seen, status=seen.status.model_copy(update={"failures": 5}))
    # The failure after the progress is the first of a new row.
    assert plan_job(seen, TIMING).status.failures == 1


def test_an_attempt_ends_only_when_all_pods_have() -> None:
    pods = (ended("p0", 14), running("p1", index=1, deleting=True))
    waiting = started(batch_jobs=gang_job(failing=True), pods=pods)
    plan = settled(waiting)
    assert not plan.status.attempts[-1].end_time
    assert reason(plan) == reasons.RESTARTING
    forced = plan_job(after(waiting, seconds=TIMING.grace + TIMING.margin + 5), TIMING)
    assert forced.status.attempts[0].end_time


def test_a_job_deleted_by_hand_is_not_created_again_under_its_fence() -> None:
    seen = started(batch_jobs={}, deleted_batch_jobs=frozenset({"small-a1"}))
    plan = settled(seen)
    assert plan.status.attempts[0].end_time
    assert plan.status.attempts[0].reason == reasons.INTERRUPTED
    assert (plan.status.attempts[0].charged, plan.status.failures) == (False, 0)
    going = started(
        batch_jobs=gang_job(deleting_since=NOW), pods=(PodView("p", "student", 1, gone=True),)
    )
    assert not settled(going).status.attempts[0].charged


def test_a_decided_attempt_without_its_job_is_created() -> None:
    plan = settled(started(batch_jobs={}))
    assert plan.actions == (CreateGang(1, 1),)
    assert len(plan.status.attempts) == 1


@pytest.mark.parametrize("limit", [10, 900])
def test_a_gang_that_starts_does_not_wait_for_a_frozen_peer_for_ever(limit: int) -> None:
    """Rank 0 has loaded what it needs: its peers have as long again as a start may take."""
    seen = started(pods=(running("p"),))
    seen = replace(seen, spec=dict(seen.spec) | {"stallTimeoutSeconds": limit})
    patience = max(limit, START_SECONDS)

    def later(seconds: float, **fields: Any) -> Plan:
        told = report(phase="Starting", step=0, total_steps=0, **fields)
        now = seen.now + timedelta(seconds=seconds)
        contact = replace(told, reached_at=now, stepped_at=seen.now)
        return settled(after(seen, seconds=seconds, rank0=contact))

    early = later(patience - 1).status.attempts[-1]
    assert early.reason == "", early.message
    stalled = later(patience + 1).status.attempts[-1]
    assert (stalled.reason, stalled.charged) == (reasons.STALLED, True)
    assert "waits for another rank to load" in stalled.message
    # Its own load has the time that it takes.
    assert later(patience + 1, last_step_time=None).status.attempts[-1].reason == ""


def test_a_stall_ends_the_attempt_and_is_charged() -> None:
    seen = started(pods=(running("p"),), rank0=report())
    contact = Contact(report().report, NOW + timedelta(seconds=1000))
    stalled = after(seen, seconds=1000, rank0=contact)
    plan = settled(stalled)
    assert plan.actions == (DeleteBatchJob("small-a1"),)
    assert plan.status.attempts[0].reason == reasons.STALLED
    over = after(stalled, batch_jobs={}, pods=(), deleted_batch_jobs=frozenset({"small-a1"}))
    ended_plan = settled(over)
    assert ended_plan.status.failures == 1
    assert ended_plan.status.attempts[0].charged


def suspend(seen: Any, value: bool = True, **changes: Any) -> Any:
    whole = dict(seen.spec) | {"suspend": value}
    return after(seen, spec=whole, generation=seen.generation + 1, **changes)


def test_suspension_waits_for_the_commit_and_resumes() -> None:
    seen = suspend(started(pods=(running("p"),), rank0=report()))
    plan = settled(seen)
    assert plan.actions == (DeleteBatchJob("small-a1"),)
    commit = {"checkpoint": {"step": 33, "uri": "s3://c"}, "attempt": 1, "totalSteps": 100}
    gone = ended("p", 11, gone=True, outcome={"progress": commit})
    off = after(seen, batch_jobs={}, deleted_batch_jobs=frozenset({"small-a1"}), pods=(gone,))
    plan = settled(off)
    assert state(plan) == ("Unknown", reasons.IS_SUSPENDED)
    assert state(plan, reasons.SUSPENDED)[0] == "True"
    assert plan.status.attempts[0].reason == reasons.GRACEFUL_CHECKPOINT
    assert plan.status.checkpoint is not None
    assert plan.status.checkpoint.step == 33
    assert plan.status.failures == 0
    on = settled(suspend(off, False))
    assert on.actions == (CreateGang(2, 2),)
    assert state(on, reasons.SUSPENDED)[0] == "False"


def test_a_lost_exit_code_under_suspension_is_an_interruption() -> None:
    seen = suspend(started(pods=(running("p"),), rank0=report()))
    plan = settled(after(seen, batch_jobs={}, pods=()))
    assert plan.status.attempts[0].reason == reasons.INTERRUPTED
    assert not plan.status.attempts[0].charged


def test_suspension_before_the_start_starts_nothing() -> None:
    plan = settled(observed(spec=spec(suspend=True)))
    assert plan.actions == ()
    assert state(plan) == ("Unknown", reasons.IS_SUSPENDED)


def test_suspension_reaches_the_teacher() -> None:
    plan = settled(suspend(teacher_seen({})))
    assert plan.actions == (SuspendBatchJob("small-teacher", True),)


def test_the_deadline_ends_everything() -> None:
    online = {"model": {"uri": "s3://models/big"}, "delivery": "Online"}
    seen = started(
        spec=spec(teacher=online, activeDeadlineSeconds=100), pods=(running("p"),), rank0=report()
    )
    late = after(seen, seconds=200)
    plan = settled(late)
    assert state(plan) == ("False", reasons.DEADLINE_EXCEEDED)
    assert DeleteBatchJob("small-a1") in plan.actions
    over = settled(after(late, batch_jobs={}, pods=(), deleted_batch_jobs=frozenset({"small-a1"})))
    assert over.status.attempts[0].end_time


def test_a_rejected_checkpoint_is_shown() -> None:
    contact = report(rejected_checkpoints=["s3://c/40"], checkpoint=CheckpointStatus(step=30))
    plan = settled(started(pods=(running("p"),), rank0=contact))
    assert state(plan, reasons.CHECKPOINT_CURRENT) == ("False", reasons.CHECKPOINT_REJECTED)


def test_old_attempts_are_removed_but_for_the_last() -> None:
    seen = started()
    attempts = [seen.status.attempts[0].model_copy(update={"number": 3, "fence": 3})]
    status = seen.status.model_copy(update={"attempts": attempts, "fence": 3})
    jobs = gang_job(1, failed=True) | gang_job(2, failed=True) | gang_job(3)
    plan = plan_job(replace(seen, status=status, batch_jobs=jobs), TIMING)
    assert plan.actions == (DeleteBatchJob("small-a1"),)


def test_a_pod_that_cannot_go_with_its_lost_node_ends_the_attempt_for_free() -> None:
    """Its Job would fail when it has ended: the gang stood until its stall, and that counted."""
    lost = running(
        "b", index=1, disrupted=True, deleting=True, deleting_since=NOW, grace_seconds=60
    )
    seen = started(pods=(running("a"), lost))
    assert plan_job(seen, TIMING).status.attempts[-1].reason == ""
    late = after(seen, seconds=70)
    plan = settled(late)
    assert plan.actions == (DeleteBatchJob("small-a1"),)
    attempt = plan.status.attempts[-1]
    assert (attempt.reason, attempt.charged, attempt.end_time) == (reasons.DISRUPTED, False, "")
    # The other one is asked to go now, and gets its own time to commit.
    asked = replace(running("a"), deleting=True, deleting_since=late.now, grace_seconds=60)
    job = gang_job(deleting_since=late.now)
    ending = after(late, pods=(asked, lost), batch_jobs=job)
    assert plan_job(ending, TIMING).status.attempts[-1].end_time == ""
    done = after(ending, pods=(ended("a", 11, deleting_since=late.now), lost), batch_jobs=job)
    closed = plan_job(after(done, seconds=60), TIMING).status.attempts
    assert (closed[0].reason, closed[0].charged, len(closed)) == (reasons.DISRUPTED, False, 2)
