"""The teacher's writers: lost with a node, in trouble after their first shards, and failing."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from kubedistill_api import names, reasons
from kubedistill_api.runspec import ProgressReport
from kubedistill_api.status import TeacherStreamStatus
from kubedistill_operator.plan.actions import (
    AbandonPod,
    CreateGang,
    CreateTeacher,
    DeleteBatchJob,
    RestoreInputs,
)
from kubedistill_operator.plan.draft import Contact, Observed
from kubedistill_operator.plan.job import plan_job
from kubedistill_operator.plan.views import BatchJobView, PodView, batch_job_view, pod_view
from test_plan_kit import (
    NOW,
    TIMING,
    accepted,
    after,
    ended,
    gang_job,
    message,
    observed,
    preflight_name,
    running,
    settled,
    spec,
    state,
)

TEACHER = names.teacher_name("small")
STREAM = TeacherStreamStatus(uri="s3://s", tokens=10)


def writer(name: str = "w-0", **fields: Any) -> PodView:
    return running(
        name, **{"role": names.ROLE_TEACHER, "attempt": 0, "uid": f"uid-{name}"} | fields
    )


def failed(name: str = "w-0", code: int = 1, **fields: Any) -> PodView:
    base: dict[str, Any] = {
        "role": names.ROLE_TEACHER,
        "attempt": 0,
        "outcome": {"message": "boom"},
    }
    return ended(name, code, **base | fields)


def lost(pod: PodView) -> PodView:
    """Given up by Kubernetes at NOW, with a node that cannot say that it has ended."""
    return replace(pod, disrupted=True, deleting=True, deleting_since=NOW, grace_seconds=30)


def answered(tokens: int) -> Contact:
    stream = STREAM.model_copy(update={"tokens": tokens})
    return Contact(ProgressReport(phase="Generating", teacher_stream=stream), NOW)


def writing(
    *pods: PodView, limit: int = 6, job: dict[str, Any] | None = None, **more: Any
) -> Observed:
    """Writers at work, before their first shard."""
    first = accepted(spec=spec(backoffLimit=limit))
    jobs = jobs_of(**{"completions": len(pods) or 1} | (job or {}))
    return after(first, batch_jobs=jobs, pods=pods, **more)


def shards_there(seen: Observed, *more: BatchJobView, **changes: Any) -> Observed:
    """The same after the first committed shards, when the student runs."""
    early = after(seen, teacher=answered(10))
    jobs = dict(early.batch_jobs) | gang_job()
    pods = (*early.pods, running("s-0"))
    return after(replace(early, batch_jobs=jobs, pods=pods), **changes)


def jobs_of(**view: Any) -> dict[str, BatchJobView]:
    return {TEACHER: BatchJobView(TEACHER, names.ROLE_TEACHER, **{"completions": 1} | view)}


# Of a lost node


def test_a_writer_that_cannot_go_with_its_lost_node_is_given_up() -> None:
    """With a podFailurePolicy its Job makes no other one before it has ended."""
    seen = writing(lost(writer()), writer("w-1", index=1))
    early = settled(after(seen, seconds=50))
    assert early.actions == ()
    assert early.requeue_after is not None
    told = state(early, reasons.TEACHER_READY), message(early, reasons.TEACHER_READY)
    assert told[0] == ("False", reasons.DISRUPTED)
    assert "pod w-0 was evicted and has not ended" in told[1]
    plan = settled(after(seen, seconds=62))
    assert plan.actions == (AbandonPod("w-0", "uid-w-0"),)
    assert any("pod w-0" in e.message and e.reason == reasons.DISRUPTED for e in plan.events)


@pytest.mark.parametrize("job", [{"deleting_since": NOW}, {"failing": True}, {"complete": True}])
def test_it_is_given_up_whatever_its_job_waits_for(job: dict[str, Any]) -> None:
    seen = after(writing(lost(writer()), job=job), seconds=62)
    assert AbandonPod("w-0", "uid-w-0") in plan_job(seen, TIMING).actions


def test_a_writer_that_ends_in_its_grace_is_left_alone() -> None:
    gone = replace(lost(failed(code=18)), phase="Failed")
    assert settled(after(writing(gone), seconds=100)).actions == ()


@pytest.mark.parametrize("job", [{}, {"failing": True}, {"failed": True, "failing": True}])
def test_a_preflight_that_is_lost_with_its_node_is_given_up_and_free(job: dict[str, Any]) -> None:
    seen = observed(spec=spec(backoffLimit=0))
    name = preflight_name(seen)
    view = BatchJobView(name, names.ROLE_PREFLIGHT, 1, tries=1, generation=1, **job)
    pod = lost(running(f"{name}-x", role=names.ROLE_PREFLIGHT, uid="u"))
    seen = after(seen, batch_jobs={name: view}, pods=(pod,))
    early = settled(after(seen, seconds=30))
    assert early.actions == ()
    assert "was evicted and has not ended" in message(early, reasons.VALIDATED)
    late = after(seen, seconds=62)
    assert settled(late).actions == (AbandonPod(pod.name, "u"),)
    over = replace(view, failed=True, failing=True, finished_at=NOW)
    gone = after(late, seconds=400, batch_jobs={name: over}, pods=(replace(pod, gone=True),))
    plan = settled(gone)
    assert plan.actions == (DeleteBatchJob(name),)
    assert plan.status.failures == 0


# After the first shards


def test_what_a_later_writer_misses_is_given_back() -> None:
    """A ConfigMap that was deleted, and a writer that was evicted after its first shards."""
    waiting = writer(phase="Pending", placed=True, placed_at=NOW)
    plan = settled(after(shards_there(writing(waiting)), seconds=20))
    assert RestoreInputs(names.ROLE_TEACHER) in plan.actions
    assert state(plan, reasons.TEACHER_READY) == ("True", reasons.SHARDS_COMMITTED)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"phase": "Pending", "unschedulable": "0/3 nodes: no GPU"}, "0/3 nodes: no GPU"),
        ({"phase": "Pending", "waiting_reason": "ImagePullBackOff"}, "ImagePullBackOff"),
    ],
)
def test_trouble_of_a_later_writer_is_told(change: dict[str, Any], words: str) -> None:
    seen = shards_there(writing(writer(**change), writer("w-1", index=1)))
    plan = settled(seen)
    assert state(plan, reasons.TEACHER_READY) == ("True", reasons.SHARDS_COMMITTED)
    assert words in message(plan, reasons.TEACHER_READY)
    well = settled(after(seen, pods=(writer(), writer("w-1", index=1), running("s-0"))))
    assert words not in message(well, reasons.TEACHER_READY)


def starved(*writers: PodView, job: dict[str, Any] | None = None) -> Observed:
    """The student's attempt ended because nothing more of the stream came."""
    seen = shards_there(writing(*writers, job=job))
    end = ended("s-0", 16, outcome={"message": "nothing was committed for 900 s"})
    jobs = dict(seen.batch_jobs) | gang_job(failed=True, failing=True)
    return after(seen, batch_jobs=jobs, pods=(*writers, end))


@pytest.mark.parametrize(
    ("writers", "job", "charged"),
    [
        ([writer()], {}, True),
        ([writer(), writer("w-1", index=1)], {}, True),
        ([writer(phase="Pending")], {}, False),
        ([writer(), writer("w-1", index=1, phase="Pending")], {}, False),
        ([writer(unreachable=True)], {}, False),
        ([lost(writer())], {}, False),
        ([failed()], {}, False),
        # One that has done its part is not missed, also where its pod was removed.
        ([failed(code=0), writer("w-1", index=1)], {}, True),
        ([writer("w-1", index=1)], {"completions": 2, "succeeded": 1}, True),
        ([writer("w-1", index=1)], {"completions": 2}, False),
    ],
)
def test_a_student_without_its_writer_is_not_charged(
    writers: list[PodView], job: dict[str, Any], charged: bool
) -> None:
    plan = plan_job(starved(*writers, job=job), TIMING)
    attempt = plan.status.attempts[0]
    assert (attempt.reason, attempt.charged) == (reasons.STALLED, charged)
    assert ("writer" in attempt.message) == (not charged)
    assert plan.status.failures == int(charged)
    # Its next attempt would wait in vain, and hold its GPUs meanwhile.
    assert CreateGang(2, 2) not in plan.actions


@pytest.mark.parametrize(
    ("change", "silent", "charged"),
    [
        ({"phase": "Pending"}, False, False),
        ({"phase": "Pending"}, True, True),  # nobody knows what it waited for
        ({}, False, True),
    ],
)
def test_a_student_that_the_operator_ends_without_its_writer_is_not_charged(
    change: dict[str, Any], silent: bool, charged: bool
) -> None:
    """The stream's reader has the same patience, and has waited since after the last step."""
    seen = shards_there(writing(writer(**change)))
    later = after(seen, seconds=1000)
    stepped = NOW + timedelta(seconds=5)
    heard = stepped if silent else later.now
    last = {"phase": "Training", "attempt": 1, "step": 3, "lastStepTime": stepped.timestamp()}
    contact = Contact(ProgressReport.model_validate(last), heard, stepped, moved=True)
    plan = settled(replace(later, rank0=contact))
    attempt = plan.status.attempts[0]
    assert (attempt.reason, attempt.charged) == (reasons.STALLED, charged)


def test_the_next_attempt_follows_when_the_writer_runs_again() -> None:
    seen = starved(writer(phase="Pending", unschedulable="no GPU"))
    plan = settled(seen)
    assert state(plan, reasons.RUNNING) == ("False", reasons.RESTARTING)
    assert "no GPU" in message(plan)
    waits = after(seen, seconds=500)
    assert settled(waits).actions == ()
    back = after(waits, pods=(writer(), *waits.pods[1:]))
    assert CreateGang(2, 2) in settled(back).actions


# backoffLimit


def strike(seen: Observed, *pods: PodView, tokens: int | None = None) -> Observed:
    return after(seen, pods=pods, teacher=None if tokens is None else answered(tokens))


def verdict(seen: Observed) -> tuple[str, str]:
    return state(plan_job(seen, TIMING))


@pytest.mark.parametrize("limit", [0, 1, 2, 6])
def test_a_limit_of_n_is_n_retries_of_a_writer(limit: int) -> None:
    seen = writing(writer(), limit=limit)
    for before in range(limit):
        seen = strike(seen, failed(failures_before=before))
        assert verdict(seen)[0] == "Unknown"
        assert f"{before + 1} time" in message(plan_job(seen, TIMING), reasons.TEACHER_READY)
        seen = strike(seen, writer(failures_before=before + 1))
    seen = strike(seen, failed(failures_before=limit))
    plan = settled(seen)
    assert state(plan) == ("False", reasons.BACKOFF_LIMIT_EXCEEDED)
    assert state(plan, reasons.TEACHER_READY) == ("False", reasons.TEACHER_FAILED)
    assert f"backoffLimit {limit}" in message(plan)
    assert "boom" in message(plan)
    assert DeleteBatchJob(TEACHER) in plan.actions


@pytest.mark.parametrize("limit", [1, 2])
def test_shards_set_the_count_of_writers_back(limit: int) -> None:
    seen, before = writing(writer(), limit=limit), 0
    for tokens in (10, 20):
        for _ in range(limit):
            seen = strike(seen, failed(failures_before=before))
            before += 1
            seen = strike(seen, writer(failures_before=before))
            assert verdict(seen)[0] == "Unknown"
        seen = strike(seen, writer(failures_before=before), tokens=tokens)
        assert plan_job(seen, TIMING).status.forgiven_failures == [before]
    for _ in range(limit):
        seen = strike(seen, failed(failures_before=before))
        assert verdict(seen)[0] == "Unknown"
        before += 1
    seen = strike(seen, failed(failures_before=before))
    assert verdict(seen) == ("False", reasons.BACKOFF_LIMIT_EXCEEDED)


def test_without_retries_the_first_failure_ends_it_also_beside_new_shards() -> None:
    seen = strike(writing(writer(), limit=0), failed(), tokens=10)
    assert verdict(seen) == ("False", reasons.BACKOFF_LIMIT_EXCEEDED)


def test_a_complete_stream_leaves_no_count() -> None:
    seen = strike(writing(writer()), failed())
    assert plan_job(seen, TIMING).status.teacher_failures == [1]
    done = after(seen, batch_jobs=jobs_of(complete=True), pods=(failed(code=0, failures_before=1),))
    assert settled(done).status.teacher_failures == []


def test_the_same_tokens_again_are_no_progress() -> None:
    seen = strike(writing(writer(), limit=1), writer(), tokens=10)
    seen = strike(seen, failed(), tokens=10)
    seen = strike(seen, failed(failures_before=1), tokens=10)
    assert verdict(seen) == ("False", reasons.BACKOFF_LIMIT_EXCEEDED)


def test_writers_that_fail_together_are_counted_by_part() -> None:
    """A store that was away for a minute fails each of them once."""
    pods = [failed(f"w-{i}", 15, index=i) for i in range(4)]
    assert verdict(writing(*pods, limit=1))[0] == "Unknown"


@pytest.mark.parametrize(
    "pod", [failed(code=18), failed(disrupted=True), failed(code=137, disrupted=True)]
)
def test_ends_of_writers_that_are_free(pod: PodView) -> None:
    assert verdict(writing(pod, limit=0))[0] == "Unknown"


def test_pods_of_a_job_that_is_made_again_are_not_counted() -> None:
    old = failed(failures_before=9, owner_uid="old")
    assert verdict(writing(old, limit=0, job={"uid": "new"}))[0] == "Unknown"
    going = writing(failed(failures_before=9), limit=0, job={"deleting_since": NOW})
    assert verdict(going)[0] == "Unknown"


def test_a_larger_limit_lets_the_writers_go_on() -> None:
    seen = writing(failed(), limit=0)
    assert verdict(seen) == ("False", reasons.BACKOFF_LIMIT_EXCEEDED)
    raised = spec(backoffLimit=1)
    gone = after(seen, seconds=60, spec=raised, generation=2, batch_jobs={}, pods=())
    plan = settled(gone)
    assert CreateTeacher() in plan.actions
    assert state(plan)[0] == "Unknown"
    failed_again = after(gone, batch_jobs=jobs_of(), pods=(failed(),))
    assert plan_job(failed_again, TIMING).status.teacher_failures == [2]
    assert verdict(failed_again) == ("False", reasons.BACKOFF_LIMIT_EXCEEDED)


def test_another_edit_does_not() -> None:
    seen = writing(failed(), limit=0)
    edited = spec(backoffLimit=0, stallTimeoutSeconds=60)
    gone = after(seen, seconds=60, spec=edited, generation=2, batch_jobs={}, pods=())
    plan = settled(gone)
    assert state(plan) == ("False", reasons.BACKOFF_LIMIT_EXCEEDED)
    assert CreateTeacher() not in plan.actions


def test_a_job_that_somebody_deletes_takes_no_failure_with_it() -> None:
    seen = writing(failed("w-1", index=1, failures_before=1), limit=3)
    again = after(seen, batch_jobs={}, pods=())
    assert CreateTeacher() in settled(again).actions
    seen = after(again, batch_jobs=jobs_of(), pods=(failed("w-1", index=1),))
    assert plan_job(seen, TIMING).status.teacher_failures == [0, 3]
    grown = strike(seen, writer("w-1", index=1, failures_before=1), tokens=10)
    assert plan_job(grown, TIMING).status.teacher_failures == []


# What is read of the API's objects


def pod_raw(**status: Any) -> dict[str, Any]:
    note = {"batch.kubernetes.io/job-index-failure-count": "2"}
    return {"metadata": {"name": "p", "annotations": note}, "spec": {}, "status": status}


def conditions(ready: str, containers: str) -> list[dict[str, str]]:
    return [{"type": "Ready", "status": ready}, {"type": "ContainersReady", "status": containers}]


@pytest.mark.parametrize(
    ("phase", "ready", "containers", "unreachable"),
    [
        ("Running", "False", "True", True),  # said by the node controller
        ("Running", "True", "True", False),
        ("Running", "False", "False", False),  # said by its own kubelet
        ("Pending", "False", "True", False),
    ],
)
def test_a_node_that_is_not_ready_is_read_off_its_pods(
    phase: str, ready: str, containers: str, unreachable: bool
) -> None:
    raw = pod_raw(phase=phase, conditions=conditions(ready, containers))
    assert pod_view(raw).unreachable == unreachable
    assert pod_view(raw).failures_before == 2
    gated = raw | {"spec": {"readinessGates": [{"conditionType": "x"}]}}
    assert not pod_view(gated).unreachable


def test_the_parts_that_are_done_are_read() -> None:
    assert batch_job_view({"metadata": {"name": "t"}, "status": {"succeeded": 2}}).succeeded == 2


def test_a_late_pass_changes_nothing() -> None:
    seen = shards_there(writing(writer()))
    assert settled(replace(seen, now=NOW + timedelta(seconds=30))).actions == ()


# Whose end is seen after the job's


def over_before_its_writer() -> Observed:
    """A student that is done while the news are that its teacher still writes."""
    early = shards_there(writing(writer()))
    word = {"model": {"uri": "s3://m", "digest": "d", "parameters": 1}}
    jobs = dict(early.batch_jobs) | gang_job(complete=True)
    return after(early, batch_jobs=jobs, pods=(writer(), ended("s-0", 0, outcome=word)))


def test_words_of_writers_that_come_after_the_jobs_end_are_taken() -> None:
    """The API server was away as they ended: news of the student's end came first."""
    over = over_before_its_writer()
    plan = settled(over)
    assert state(plan)[0] == "True"
    assert state(plan, reasons.TEACHER_READY) == ("True", reasons.SHARDS_COMMITTED)
    assert DeleteBatchJob(TEACHER) not in plan.actions, "its own end may be the next news"
    assert plan.requeue_after is not None
    assert DeleteBatchJob(TEACHER) in settled(after(over, seconds=6)).actions
    stream = {"uri": "s3://s", "tokens": 50, "bytes": 100, "complete": True}
    last = failed(code=0, gone=True, outcome={"progress": {"teacherStream": stream}})
    plan = settled(after(over, batch_jobs=gang_job(complete=True), pods=(last, over.pods[1])))
    assert state(plan, reasons.TEACHER_READY) == ("True", reasons.STREAM_COMPLETE)
    assert plan.status.teacher_stream is not None
    assert (plan.status.teacher_stream.tokens, plan.status.teacher_stream.complete) == (50, True)


def test_a_stream_that_its_job_did_not_need_to_its_end_is_not_called_whole() -> None:
    over = over_before_its_writer()
    stopped = failed(code=18, gone=True)
    plan = settled(after(over, batch_jobs=gang_job(complete=True), pods=(stopped, over.pods[1])))
    assert state(plan, reasons.TEACHER_READY) == ("True", reasons.SHARDS_COMMITTED)
