"""The plan of a DistillationJob, from validation to its end."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from kubedistill_api import names, reasons
from kubedistill_api.runspec import ProgressReport
from kubedistill_api.status import CheckpointStatus, TeacherStreamStatus
from kubedistill_operator.plan.actions import (
    CreateGang,
    CreatePreflight,
    CreateTeacher,
    DeleteBatchJob,
    SuspendBatchJob,
)
from kubedistill_operator.plan.draft import Contact, OtherJob
from kubedistill_operator.plan.job import plan_job
from kubedistill_operator.plan.views import BatchJobView, PodView
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
    reason,
    running,
    settled,
    spec,
    started,
    state,
)


def test_first_visit_sets_every_condition_and_the_summaries() -> None:
    plan = settled(observed(spec=spec(workers={"nodes": 4, "gpusPerNode": 8})))
    assert [c.type for c in plan.status.conditions] == list(reasons.CONDITION_TYPES)
    assert plan.status.student_summary == "teacher, 4 layers"
    assert plan.status.teacher_summary == "big"
    assert plan.status.gpus == 32
    assert reason(plan) == reasons.VALIDATING
    assert isinstance(plan.actions[0], CreatePreflight)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher": None}, ["spec.teacher", "needs a `teacher`"]),
        ({"fineTune": {}}, ["exactly one method"]),
        ({"training": {"globalBatchSize": 3}, "workers": {"nodes": 2}}, ["multiple of the 2 ranks"]),
        ({"training": {"learningRate": "1e-5x"}}, ["spec.training.learningRate", "2.0e-5"]),
        ({"nonsense": 1}, ["spec.nonsense", "no such field"]),
        ({"student": {}}, ["spec.student", "exactly one of"]),
    ],
)  # fmt: skip
def test_what_is_invalid_is_said_with_its_path(changes: dict[str, Any], words: list[str]) -> None:
    plan = settled(observed(spec=spec(**changes)))
    assert state(plan) == ("False", reasons.INVALID_SPEC)
    assert state(plan, reasons.VALIDATED) == ("False", reasons.INVALID_SPEC)
    assert all(word in message(plan) for word in words)
    assert plan.actions == ()


def test_a_mended_spec_is_looked_at_again() -> None:
    bad = observed(spec=spec(nonsense=1))
    mended = after(bad, spec=spec(), generation=2)
    assert reason(settled(mended)) == reasons.VALIDATING


FROM_A = {"fromJob": {"name": "a"}}


@pytest.mark.parametrize(
    ("other", "expected", "words"),
    [
        (None, reasons.DEPENDENCY_NOT_FOUND, "no DistillationJob a in namespace ml"),
        (OtherJob("a"), reasons.WAITING_FOR_DEPENDENCY, "a has not finished"),
        (OtherJob("a", succeeded="False", reason="Stalled", message="m"),
         reasons.DEPENDENCY_FAILED, "a failed (Stalled): m"),
    ],
)  # fmt: skip
def test_a_dependency_is_waited_for_readably(
    other: OtherJob | None, expected: str, words: str
) -> None:
    others = {"a": other} if other else {}
    plan = settled(observed(spec=spec(teacher=FROM_A), other_jobs=others))
    assert state(plan) == ("Unknown", expected)
    assert words in message(plan)
    assert plan.actions == ()


def test_a_finished_dependency_gives_its_model() -> None:
    done = OtherJob("a", succeeded="True", model_uri="s3://m/a", model_digest="abc")
    plan = settled(observed(spec=spec(teacher=FROM_A), other_jobs={"a": done}))
    action = plan.actions[0]
    assert isinstance(action, CreatePreflight)
    assert action.inputs.teacher is not None
    assert action.inputs.teacher.digest == "abc"


def test_a_cycle_is_printed_and_recovers() -> None:
    others = {
        "a": OtherJob("a", depends_on=("b",)),
        "b": OtherJob("b", depends_on=("small",)),
    }
    seen = observed(spec=spec(teacher=FROM_A), other_jobs=others)
    plan = settled(seen)
    assert state(plan) == ("False", reasons.DEPENDENCY_CYCLE)
    assert "small → a → b → small" in message(plan)
    broken = after(seen, other_jobs={"a": OtherJob("a")})
    assert reason(settled(broken)) == reasons.WAITING_FOR_DEPENDENCY


def preflight_seen(job: dict[str, Any], pod: PodView | None, **changes: Any) -> Any:
    seen = observed(**changes)
    name = preflight_name(seen)
    view = BatchJobView(name, names.ROLE_PREFLIGHT, 1, **{"tries": 1, "generation": 1} | job)
    pods = (replace(pod, name=f"{name}-x"),) if pod else ()
    return after(seen, batch_jobs={name: view}, pods=pods)


def test_unreadable_input_is_final_until_the_spec_changes() -> None:
    problem = {"field": "spec.data", "found": "nothing", "expected": "upload it"}
    pod = ended("p", 13, role=names.ROLE_PREFLIGHT, outcome={"problems": [problem]})
    seen = preflight_seen({"failed": True, "failing": True}, pod)
    plan = settled(seen)
    assert state(plan) == ("False", reasons.UNREADABLE_INPUT)
    assert message(plan) == "spec.data: found nothing; upload it"
    again = settled(after(seen, generation=2))
    assert reason(again) == reasons.VALIDATING
    assert isinstance(again.actions[0], DeleteBatchJob)


def test_a_store_that_is_down_is_tried_again_and_given_up() -> None:
    pod = ended("p", 15, role=names.ROLE_PREFLIGHT, outcome={"message": "no answer"})
    failed = {"failed": True, "failing": True, "finished_at": NOW}
    seen = preflight_seen(failed, pod)
    plan = settled(seen)
    assert state(plan) == ("Unknown", reasons.STORAGE_UNAVAILABLE)
    assert plan.requeue_after is not None
    later = plan_job(after(seen, seconds=60), TIMING)
    assert isinstance(later.actions[0], DeleteBatchJob)
    last = replace(pod, attempt=7)
    given_up = settled(preflight_seen(failed | {"tries": 7}, last))
    assert state(given_up) == ("False", reasons.BACKOFF_LIMIT_EXCEEDED)


def test_a_missing_secret_is_named() -> None:
    waiting = PodView(
        "p", names.ROLE_PREFLIGHT, 1, waiting_reason="CreateContainerConfigError",
        waiting_message='secret "s3" not found',
    )  # fmt: skip
    storage = {"uri": "s3://runs/x", "secretRef": {"name": "s3"}}
    plan = settled(preflight_seen({}, waiting, spec=spec(storage=storage)))
    assert state(plan) == ("Unknown", reasons.SECRET_NOT_FOUND)
    assert state(plan, reasons.VALIDATED)[0] == "False"
    assert "Secret s3 with AWS_ACCESS_KEY_ID" in message(plan)
    assert "namespace ml" in message(plan)


def test_accepted_inputs_start_the_teacher() -> None:
    plan = settled(accepted())
    assert plan.status.start_time
    assert plan.status.resolved is not None
    assert plan.status.resolved.inputs_digest
    assert state(plan, reasons.VALIDATED) == ("True", reasons.VALID)
    assert plan.actions == (CreateTeacher(),)
    assert reason(plan) == reasons.GENERATING


def teacher_seen(view: dict[str, Any], pods: tuple[PodView, ...] = (), **changes: Any) -> Any:
    name = names.teacher_name("small")
    jobs = {name: BatchJobView(name, names.ROLE_TEACHER, **view)}
    return after(accepted(), batch_jobs=jobs, pods=pods, **changes)


def test_first_shards_start_the_gang() -> None:
    stream = TeacherStreamStatus(uri="s3://s", tokens=5)
    contact = Contact(ProgressReport(phase="Generating", teacher_stream=stream), NOW)
    plan = settled(teacher_seen({}, teacher=contact))
    assert state(plan, reasons.TEACHER_READY) == ("True", reasons.SHARDS_COMMITTED)
    assert plan.actions == (CreateGang(1, 1),)
    assert plan.status.fence == 1


def test_a_complete_stream_is_recorded() -> None:
    pod = ended(
        "t", 0, role=names.ROLE_TEACHER, attempt=0,
        outcome={"progress": {"teacherStream": {"uri": "s3://s", "tokens": 9}}},
    )  # fmt: skip
    plan = settled(teacher_seen({"complete": True}, (pod,)))
    assert plan.status.teacher_stream is not None
    assert plan.status.teacher_stream.complete
    assert plan.status.teacher_stream.tokens == 9


def test_a_failed_teacher_is_final() -> None:
    pod = ended("t", 13, role=names.ROLE_TEACHER, attempt=0, outcome={"message": "no config"})
    plan = settled(teacher_seen({"failed": True}, (pod,)))
    assert state(plan) == ("False", reasons.TEACHER_FAILED)
    assert "no config" in message(plan)


def test_the_fence_is_in_the_status_with_the_decision() -> None:
    online = {"model": {"uri": "s3://models/big"}, "delivery": "Online"}
    plan = settled(accepted(spec=spec(teacher=online)))
    assert state(plan, reasons.TEACHER_READY) == ("True", reasons.NOT_NEEDED)
    assert plan.actions == (CreateGang(1, 1),)
    assert [a.number for a in plan.status.attempts] == [1]


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
    ("code", "why"), [(10, reasons.INVALID_SPEC), (12, reasons.FENCED), (13, reasons.UNREADABLE_INPUT)]
)  # fmt: skip
def test_what_is_never_retried(code: int, why: str) -> None:
    plan = settled(failed_gang(ended("p", code)))
    assert state(plan) == ("False", why)
    assert plan.status.completion_time


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
    assert plan_job(seen, TIMING).status.failures == 0


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
    assert plan.status.attempts[0].charged


def test_a_decided_attempt_without_its_job_is_created() -> None:
    plan = settled(started(batch_jobs={}))
    assert plan.actions == (CreateGang(1, 1),)
    assert len(plan.status.attempts) == 1


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
