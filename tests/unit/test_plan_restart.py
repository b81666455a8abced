"""What is charged, how long is waited, and when it is enough: limits are obeyed to the one."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from kubedistill_api import names, reasons
from kubedistill_api.status import Attempt, CheckpointStatus
from kubedistill_operator.plan import restart
from kubedistill_operator.plan.actions import CreateGang, DeleteBatchJob
from kubedistill_operator.plan.draft import Observed
from kubedistill_operator.plan.job import plan_job
from kubedistill_operator.plan.times import format_time, parse_time
from kubedistill_operator.plan.views import BatchJobView
from test_plan_gang import FAILED, MODEL, report, suspend
from test_plan_kit import (
    NOW,
    TIMING,
    after,
    ended,
    gang_job,
    message,
    running,
    settled,
    spec,
    started,
    state,
    teacher_seen,
)

ONLINE = {"model": {"uri": "s3://models/big"}, "delivery": "Online"}


def job(**changes: Any) -> dict[str, Any]:
    return spec(teacher=ONLINE, **changes)


def attempt(
    number: int, start: float, end: float | None, reason: str = "", charged: bool = False
) -> Attempt:
    def at(seconds: float) -> str:
        return format_time(NOW + timedelta(seconds=seconds))

    return Attempt(
        number=number,
        start_time=at(start),
        end_time="" if end is None else at(end),
        reason=reason,
        charged=charged,
    )


ERROR, DISRUPTED = reasons.ERROR, reasons.DISRUPTED


@pytest.mark.parametrize(
    ("attempts", "expected"),
    [
        ([], None),
        ([attempt(1, 0, None)], None),
        ([attempt(1, 0, 100, reasons.GRACEFUL_CHECKPOINT)], None),
        ([attempt(1, 0, 100, ERROR, True)], 100),
        ([attempt(1, 0, 100, DISRUPTED)], 100),
        ([attempt(1, 0, 100, ERROR, True), attempt(2, 200, 500, DISRUPTED)], 200),
        # Time that ended otherwise counts, and the one that runs does not yet.
        ([attempt(1, 0, 300, reasons.INTERRUPTED), attempt(2, 300, 400, ERROR, True),
          attempt(3, 500, None)], 400),
        # What waited for room in vain did not run; memory that ran out will not again.
        ([attempt(1, 0, 120, reasons.UNSCHEDULABLE), attempt(2, 120, 130, ERROR, True)], 10),
        ([attempt(1, 0, 60, reasons.OUT_OF_MEMORY), attempt(2, 60, 160, ERROR, True)], 160),
        ([attempt(1, 5, 5, ERROR, True)], 1),
    ],
)  # fmt: skip
def test_mean_seconds_between_failures(attempts: list[Attempt], expected: float | None) -> None:
    assert restart.mean_seconds_between_failures(attempts) == expected


def test_ranks_that_were_killed_in_their_pods_are_failures_too() -> None:
    struck = attempt(1, 0, 1000, ERROR, True).model_copy(update={"rank_restarts": 9})
    assert restart.failures_seen([struck]) == 10
    assert restart.mean_seconds_between_failures([struck]) == 100


FREE = reasons.GRACEFUL_CHECKPOINT


@pytest.mark.parametrize(
    ("attempts", "failures", "expected"),
    [
        ([attempt(1, 0, 5, ERROR, True)], 0, 1),
        ([attempt(1, 0, 5, ERROR, True)], 3, 3),
        ([attempt(1, 0, 5, FREE)], 3, 0),
        ([attempt(n, n, n + 5, FREE) for n in range(2)], 0, 0),
        ([attempt(n, n, n + 5, FREE) for n in range(3)], 0, 1),
        ([attempt(n, n, n + 5, FREE) for n in range(5)], 0, 3),
        ([attempt(1, 0, 5, FREE), attempt(2, 0, 60, FREE), attempt(3, 0, 5, FREE)], 0, 0),
        ([*(attempt(n, n, n + 5, FREE) for n in range(4)),
          attempt(9, 0, 5, reasons.OUT_OF_MEMORY)], 0, 0),
    ],
)  # fmt: skip
def test_free_ends_are_followed_at_once_unless_they_come_in_a_row(
    attempts: list[Attempt], failures: int, expected: int
) -> None:
    assert restart.waits_counted(attempts, failures) == expected


@pytest.mark.parametrize(
    ("save", "grace"), [(None, 60), (0.0, 60), (14.9, 60), (20.0, 70), (300.0, 630)]
)
def test_the_grace_follows_from_the_longest_save(save: float | None, grace: int) -> None:
    assert restart.grace_seconds(60, save) == grace


def fail_once(seen: Observed, **outcome: Any) -> Observed:
    """The running attempt ends with an error; as seen when the next one's Job is there."""
    number = seen.status.attempts[-1].number
    pod = ended("p", 1, attempt=number, outcome={"progress": outcome} if outcome else None)
    failed = replace(seen, batch_jobs=gang_job(number, **FAILED), pods=(pod,))
    over = after(failed, seconds=1000)
    plan = plan_job(over, TIMING)
    jobs = gang_job(number + 1) if CreateGang(number + 1, number + 1) in plan.actions else {}
    return after(over, batch_jobs=jobs, pods=())


@pytest.mark.parametrize("limit", [0, 1, 2, 6])
def test_a_limit_of_n_is_n_retries(limit: int) -> None:
    seen = started(spec=job(backoffLimit=limit))
    for _ in range(limit):
        seen = fail_once(seen)
        assert state(plan_job(seen, TIMING))[0] == "Unknown"
    seen = fail_once(seen)
    plan = plan_job(seen, TIMING)
    assert state(plan) == ("False", reasons.BACKOFF_LIMIT_EXCEEDED)
    assert len(plan.status.attempts) == limit + 1
    assert not any(isinstance(a, CreateGang) for a in plan.actions)


def committed(step: int, **more: Any) -> dict[str, Any]:
    return {"checkpoint": {"uri": "s3://c", "step": step}, "totalSteps": 100} | more


@pytest.mark.parametrize("limit", [0, 2])
def test_after_progress_there_are_n_retries_again(limit: int) -> None:
    seen = started(spec=job(backoffLimit=limit))
    for _ in range(limit):
        seen = fail_once(seen)
    seen = fail_once(seen, **committed(40, attempt=limit + 1))
    for _ in range(limit):
        assert state(plan_job(seen, TIMING))[0] == "Unknown"
        seen = fail_once(seen)
    plan = plan_job(seen, TIMING)
    assert state(plan) == ("False", reasons.BACKOFF_LIMIT_EXCEEDED)
    assert len(plan.status.attempts) == (2 * limit + 1)


def test_an_attempt_that_never_said_where_it_began_makes_no_progress() -> None:
    """Its commit is that of the attempt before: a crash loop behind it must not go on for ever."""
    seen = started(spec=job(backoffLimit=2))
    seen = fail_once(seen, **committed(40, attempt=1))
    seen = fail_once(fail_once(seen))
    assert state(plan_job(seen, TIMING)) == ("False", reasons.BACKOFF_LIMIT_EXCEEDED)


def test_a_commit_that_is_lost_and_made_again_is_no_progress() -> None:
    seen = started(spec=job(backoffLimit=2))
    seen = fail_once(seen, **committed(40, attempt=1))
    for number in (2, 3):
        again = committed(30, attempt=number, resumedFromStep=20)
        seen = fail_once(seen, **again)
    assert state(plan_job(seen, TIMING)) == ("False", reasons.BACKOFF_LIMIT_EXCEEDED)


def test_progress_that_nobody_saw_is_seen_by_the_next_attempt() -> None:
    """The operator was down, and the pod left no last word; the next one resumes from its commit."""
    seen = fail_once(fail_once(started(spec=job())))
    assert seen.status.failures == 2
    contact = report(attempt=3, resumed_from_step=40, step=41)
    plan = plan_job(replace(seen, rank0=contact), TIMING)
    assert (plan.status.failures, plan.status.furthest_commit) == (1, 40)


def test_a_commit_before_ranks_came_back_in_their_pods_is_followed_by_no_failure_yet() -> None:
    """The commit and the kill were within one poll: with a limit of 1 there is one retry left."""
    seen = fail_once(started(spec=job(backoffLimit=1)))
    contact = report(attempt=2, resumed_from_step=40, step=41, rank_restarts=1)
    seen = replace(seen, rank0=contact, pods=(running("p", attempt=2),))
    plan = plan_job(seen, TIMING)
    assert (plan.status.failures, plan.status.furthest_commit) == (0, 40)
    seen = fail_once(after(seen, pods=()))
    assert seen.status.failures == 1
    assert state(plan_job(seen, TIMING))[0] == "Unknown"


def test_a_commit_that_nobody_saw_before_a_free_end_is_followed_by_no_failure() -> None:
    seen = fail_once(started(spec=job()))
    free = ended("p", 137, attempt=2, disrupted=True)
    seen = after(replace(seen, batch_jobs=gang_job(2, **FAILED), pods=(free,)))
    seen = replace(
        seen, batch_jobs=gang_job(3), rank0=report(attempt=3, resumed_from_step=40, step=41)
    )
    plan = plan_job(seen, TIMING)
    assert (plan.status.failures, plan.status.furthest_commit) == (0, 40)


def test_a_commit_resets_the_count_when_it_is_seen() -> None:
    seen = started(pods=(running("p"),))
    seen = replace(seen, status=seen.status.model_copy(update={"failures": 5}))
    contact = report(checkpoint=CheckpointStatus(uri="s3://c", step=30))
    plan = settled(replace(seen, rank0=contact))
    assert (plan.status.failures, plan.status.furthest_commit) == (0, 30)


def test_a_resume_that_is_refused_ends_the_job_until_somebody_edits_it() -> None:
    """What is committed cannot be gone on from: no GPU waits for a person, and no step is lost."""
    refused = ended("p", 23, outcome={"message": "s3://b/log: step 40 was committed, and is gone"})
    seen = started(spec=job(backoffLimit=6), pods=(refused,))
    seen = replace(seen, batch_jobs=gang_job(1, **FAILED))
    plan = settled(seen)
    assert state(plan) == ("False", reasons.RESUME_REFUSED)
    assert state(plan, reasons.CHECKPOINT_CURRENT) == ("False", reasons.RESUME_REFUSED)
    assert "step 40 was committed" in message(plan)
    assert not any(isinstance(a, CreateGang) for a in plan.actions)
    edited = after(seen, batch_jobs={}, pods=(), generation=seen.generation + 1)
    edited = replace(edited, status=plan.status, spec=job(backoffLimit=7))
    again = plan_job(edited, TIMING)
    assert CreateGang(2, 2) in again.actions
    assert state(again)[0] == "Unknown"
    assert again.status.failures == 0


def test_free_ends_do_not_change_the_count() -> None:
    seen = fail_once(started(spec=job()))
    pod = ended("p", 137, attempt=2, disrupted=True)
    plan = settled(replace(seen, batch_jobs=gang_job(2, **FAILED), pods=(pod,)))
    assert plan.status.failures == 1
    assert CreateGang(3, 3) in plan.actions


@pytest.mark.parametrize(
    ("seconds", "over"), [(1, False), (98, False), (99, False), (100, True), (200, True)]
)
def test_a_deadline_is_kept_to_the_second(seconds: float, over: bool) -> None:
    seen = started(spec=job(activeDeadlineSeconds=100), pods=(running("p"),), rank0=report())
    begun = parse_time(seen.status.start_time)
    assert begun is not None
    plan = settled(replace(seen, now=begun + timedelta(seconds=seconds)))
    if over:
        assert state(plan) == ("False", reasons.DEADLINE_EXCEEDED)
        assert DeleteBatchJob("small-a1") in plan.actions
        assert plan.status.completion_time
    else:
        assert state(plan)[0] == "Unknown"
        assert plan.requeue_after is not None
        assert plan.requeue_after <= 100 - seconds


def test_no_pod_is_started_after_the_deadline() -> None:
    seen = started(spec=job(activeDeadlineSeconds=100), batch_jobs={})
    plan = settled(after(seen, seconds=200))
    assert plan.actions == ()
    assert state(plan) == ("False", reasons.DEADLINE_EXCEEDED)
    failed = started(
        spec=job(activeDeadlineSeconds=100), batch_jobs=gang_job(**FAILED), pods=(ended("p", 1),)
    )
    waiting = after(failed)
    late = plan_job(after(waiting, seconds=200), TIMING)
    assert not any(isinstance(a, CreateGang) for a in late.actions)
    assert state(late) == ("False", reasons.DEADLINE_EXCEEDED)


def test_a_student_that_is_there_is_not_thrown_away_by_the_deadline() -> None:
    """The operator was down when the gang ended in time."""
    seen = started(
        spec=job(activeDeadlineSeconds=100),
        batch_jobs=gang_job(complete=True),
        pods=(ended("p", 0, outcome=MODEL),),
    )
    plan = settled(replace(seen, now=NOW + timedelta(seconds=500)))
    assert state(plan) == ("True", reasons.COMPLETED)


def test_suspension_stops_the_clock_and_starts_it_anew() -> None:
    """As batch/v1 Job has it."""
    seen = started(spec=job(activeDeadlineSeconds=100), pods=(running("p"),), rank0=report())
    off = suspend(seen)
    gone = after(off, batch_jobs={}, pods=(), deleted_batch_jobs=frozenset({"small-a1"}))
    long = after(gone, seconds=5000)
    assert state(settled(long)) == ("Unknown", reasons.IS_SUSPENDED)
    on = suspend(long, False)
    plan = plan_job(on, TIMING)
    assert CreateGang(2, 2) in plan.actions
    assert plan.requeue_after == 100
    running_again = after(on, seconds=90, batch_jobs=gang_job(2), pods=())
    assert state(plan_job(running_again, TIMING))[0] == "Unknown"
    late = after(running_again, seconds=20)
    assert state(plan_job(late, TIMING)) == ("False", reasons.DEADLINE_EXCEEDED)


@pytest.mark.parametrize("seconds", [50, 150])
def test_a_suspension_taken_back_before_the_pods_have_ended_counts_too(seconds: float) -> None:
    """Their save takes a while, and the deadline may pass meanwhile."""
    seen = started(spec=job(activeDeadlineSeconds=100), pods=(running("p"),), rank0=report())
    off = suspend(seen)
    assert state(settled(off), reasons.SUSPENDED) == ("Unknown", reasons.IS_SUSPENDED)
    ending = after(off, seconds=seconds, batch_jobs=gang_job(deleting_since=NOW))
    on = suspend(ending, False)
    plan = settled(on)
    assert state(plan)[0] == "Unknown"
    assert state(plan, reasons.SUSPENDED) == ("False", reasons.NOT_SUSPENDED)
    gone = after(on, seconds=90, batch_jobs={}, pods=(), deleted_batch_jobs=frozenset({"small-a1"}))
    assert settled(gone).actions == (CreateGang(2, 2),)
    late = after(gone, seconds=20, batch_jobs=gang_job(2))
    assert state(plan_job(late, TIMING)) == ("False", reasons.DEADLINE_EXCEEDED)


def test_a_job_that_fails_while_it_is_being_suspended_is_not_suspended() -> None:
    pod = ended("t", 13, role=names.ROLE_TEACHER, attempt=0, outcome={"message": "gone"})
    seen = suspend(teacher_seen({}, (running("t", role=names.ROLE_TEACHER, attempt=0),)))
    failed = {names.teacher_name("small"): BatchJobView(
        names.teacher_name("small"), names.ROLE_TEACHER, failed=True
    )}  # fmt: skip
    plan = settled(after(seen, batch_jobs=failed, pods=(pod,)))
    assert state(plan) == ("False", reasons.TEACHER_FAILED)
    assert state(plan, reasons.SUSPENDED) == ("False", reasons.NOT_SUSPENDED)


def test_a_job_whose_time_is_over_does_not_go_on_for_being_suspended() -> None:
    seen = started(spec=job(activeDeadlineSeconds=100), pods=(running("p"),), rank0=report())
    over = after(seen, seconds=200)
    gone = after(over, batch_jobs={}, pods=(), deleted_batch_jobs=frozenset({"small-a1"}))
    off = suspend(gone)
    assert state(settled(off)) == ("False", reasons.DEADLINE_EXCEEDED)
    on = suspend(after(off, seconds=50), False)
    assert state(settled(on)) == ("False", reasons.DEADLINE_EXCEEDED)
    larger = after(on, spec=dict(on.spec) | {"activeDeadlineSeconds": 900}, generation=9)
    assert state(settled(larger))[0] == "Unknown"


MEMORY = ended("p", 14, outcome={"message": "CUDA out of memory"})
SHRINK = {"globalBatchSize": 48, "microBatchSize": 4, "onOutOfMemory": "Shrink"}


def out_of_memory(number: int = 1, pod: Any = MEMORY, **training: Any) -> Observed:
    workers = {"nodes": 2, "gpusPerNode": 1}
    return started(
        spec=job(training=SHRINK | training, workers=workers),
        batch_jobs=gang_job(number, **FAILED),
        pods=(pod,),
    )


@pytest.mark.parametrize("pod", [MEMORY, ended("p", 137, end_reason="OOMKilled")])
def test_out_of_memory_shrinks_the_micro_batch_at_once_and_once(pod: Any) -> None:
    seen = out_of_memory(pod=pod)
    plan = settled(seen)
    first, second = plan.status.attempts
    assert (first.reason, first.charged, second.micro_batch_size) == ("OutOfMemory", False, 2)
    assert "take 2 in place of 4 sequences at once" in first.message
    assert (plan.status.failures, plan.status.micro_batch_limit) == (0, 2)
    assert plan.actions == (CreateGang(2, 2),)
    again = replace(pod, attempt=2)
    plan = settled(after(seen, batch_jobs=gang_job(2, **FAILED), pods=(again,)))
    assert [a.charged for a in plan.status.attempts] == [False, True]
    assert plan.status.failures == 1
    assert "with a micro-batch of 2, made smaller before, too" in plan.status.attempts[-1].message
    later = after(seen, batch_jobs=gang_job(2, **FAILED), pods=(again,))
    third = plan_job(after(later, seconds=60), TIMING).status.attempts[-1]
    assert (third.number, third.micro_batch_size) == (3, 2)


@pytest.mark.parametrize(
    ("training", "words"),
    [({"microBatchSize": 1}, "1 sequence at once already"), ({"onOutOfMemory": "Retry"}, "CUDA")],
)
def test_out_of_memory_without_a_smaller_micro_batch_is_a_failure(
    training: dict[str, Any], words: str
) -> None:
    plan = settled(out_of_memory(**training))
    [only] = plan.status.attempts
    assert only.charged
    assert words in only.message
    assert plan.status.failures == 1
    assert plan.status.micro_batch_limit == 0
    assert plan.actions == ()


def test_a_shrink_with_no_retries_left_is_still_free() -> None:
    seen = out_of_memory()
    plan = plan_job(replace(seen, spec=dict(seen.spec) | {"backoffLimit": 0}), TIMING)
    assert state(plan)[0] == "Unknown", message(plan)
    assert CreateGang(2, 2) in plan.actions


def test_a_long_message_of_memory_fits_the_schema() -> None:
    plan = plan_job(out_of_memory(pod=ended("p", 14, outcome={"message": "x" * 3000})), TIMING)
    assert len(plan.status.attempts[0].message) <= 1024
    assert plan.status.attempts[0].message.endswith("(training.onOutOfMemory: Shrink)")
