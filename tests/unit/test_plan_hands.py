"""What somebody else does to the children: deleted, edited, hidden, refused."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from kubedistill_api import names, reasons
from kubedistill_api.status import CheckpointStatus, TeacherStreamStatus
from kubedistill_operator.plan.actions import (
    CreateGang,
    CreatePreflight,
    CreateTeacher,
    DeleteBatchJob,
    DeletePod,
    Refusal,
    RestoreInputs,
    RestoreService,
    ScaleBatchJob,
    SuspendBatchJob,
)
from kubedistill_operator.plan.draft import Contact, Unanswered
from kubedistill_operator.plan.job import plan_job
from kubedistill_operator.plan.views import PodView, batch_job_view, pod_view
from kubedistill_operator.progress import contact_of
from test_plan_gang import MODEL, report
from test_plan_job import preflight_seen
from test_plan_kit import (
    NOW,
    TIMING,
    after,
    ended,
    gang_job,
    message,
    observed,
    running,
    settled,
    spec,
    started,
    state,
    teacher_seen,
)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"suspended": True}, "somebody suspended its Job"),
        ({"parallelism": 0, "completions": 1}, "somebody set parallelism of its Job to 0"),
        ({"parallelism": 0, "completions": 0}, "somebody set completions of its Job to 0"),
        ({"parallelism": 2, "completions": 2}, "somebody set completions of its Job to 2"),
    ],
)
@pytest.mark.parametrize("pod", [running("p"), ended("p", 11)], ids=["running", "committed"])
def test_an_edited_gang_is_made_anew_for_free(
    edit: dict[str, Any], words: str, pod: PodView
) -> None:
    """Also where its pods had ended by the time that the edit was seen."""
    seen = started(batch_jobs=gang_job(**edit), pods=(pod,), rank0=report())
    plan = settled(seen)
    assert plan.actions == (DeleteBatchJob("small-a1"),)
    assert words in plan.status.attempts[0].message
    assert state(plan, reasons.RUNNING) == ("False", reasons.INTERRUPTED)
    gone = after(seen, batch_jobs={}, pods=(), deleted_batch_jobs=frozenset({"small-a1"}))
    plan = settled(gone)
    assert plan.actions == (CreateGang(2, 2),)
    assert not plan.status.attempts[0].charged


@pytest.mark.parametrize(
    "edit", [{}, {"parallelism": 1, "completions": 1}, {"parallelism": 5, "completions": 1}]
)
def test_a_gang_that_is_all_there_is_left_alone(edit: dict[str, Any]) -> None:
    seen = started(batch_jobs=gang_job(**edit), pods=(running("p"),), rank0=report())
    assert settled(seen).actions == ()


def test_independent_pods_are_scaled_back() -> None:
    plan = settled(teacher_seen({"parallelism": 0, "completions": 3}))
    assert plan.actions == (ScaleBatchJob("small-teacher", 3),)
    plan = settled(preflight_seen({"suspended": True}, None))
    assert [a for a in plan.actions if isinstance(a, SuspendBatchJob)]


def test_an_attempt_without_its_job_waits_for_its_pods() -> None:
    """Deleted in the background: two attempts at once would share the GPUs."""
    pods = (running("p0"), running("p1", index=1, owned=False, uid="u"))
    seen = started(batch_jobs={}, pods=pods, deleted_batch_jobs=frozenset({"small-a1"}))
    plan = settled(seen)
    assert plan.actions == (DeletePod("p1", "u"),)
    assert not plan.status.attempts[-1].end_time
    assert plan.requeue_after is not None
    ending = tuple(replace(p, deleting=True, deleting_since=NOW) for p in pods)
    waiting = after(seen, pods=ending)
    assert len(settled(waiting).status.attempts) == 1
    over = settled(after(waiting, pods=tuple(replace(p, gone=True) for p in ending)))
    assert [bool(a.end_time) for a in over.status.attempts] == [True, False]
    lost = plan_job(after(waiting, seconds=TIMING.grace + TIMING.margin + 1), TIMING)
    assert lost.status.attempts[0].end_time


def test_a_job_that_outlives_its_attempt_is_ended() -> None:
    pods = (ended("p0", 1), running("p1", index=1))
    seen = started(batch_jobs=gang_job(), pods=pods)
    late = after(seen, seconds=TIMING.grace + TIMING.margin + 5)
    assert late.status.attempts[0].reason == ""
    closed = after(late, seconds=60)
    plan = plan_job(closed, TIMING)
    assert [a.number for a in plan.status.attempts] == [1, 2]
    assert DeleteBatchJob("small-a1") in plan.actions


def test_pods_get_as_long_as_their_own_grace() -> None:
    """A save that takes five minutes must not be fenced off after one."""
    pods = (ended("p0", 1), running("p1", index=1, deleting=True, grace_seconds=600))
    seen = started(batch_jobs=gang_job(failing=True), pods=pods)
    early = plan_job(after(seen, seconds=300), TIMING)
    assert not early.status.attempts[-1].end_time
    late = plan_job(after(seen, seconds=600 + TIMING.margin + 5), TIMING)
    assert late.status.attempts[0].end_time


def test_orphans_of_a_finished_job_go_too() -> None:
    done = started(batch_jobs=gang_job(complete=True), pods=(ended("p", 0, outcome=MODEL),))
    left = ended("q", 0, role=names.ROLE_TEACHER, attempt=0, owned=False, uid="q-uid")
    plan = settled(after(done, pods=(ended("p", 0, outcome=MODEL), left)))
    assert plan.actions == (DeletePod("q", "q-uid"),)


def pending(role: str = names.ROLE_STUDENT, **fields: Any) -> PodView:
    return PodView("p", role, placed=True, placed_at=NOW, **fields)


def test_pods_that_do_not_start_get_back_what_was_deleted() -> None:
    seen = started(pods=(pending(attempt=1),))
    soon = settled(replace(seen, now=NOW + timedelta(seconds=4)))
    assert soon.actions == ()
    assert soon.requeue_after == 6
    late = replace(seen, now=NOW + timedelta(seconds=10))
    assert settled(late).actions == (RestoreInputs(names.ROLE_STUDENT, 1),)
    teacher = teacher_seen({}, (pending(names.ROLE_TEACHER),))
    late = replace(teacher, now=NOW + timedelta(seconds=20))
    assert settled(late).actions == (RestoreInputs(names.ROLE_TEACHER),)
    check = preflight_seen({}, pending(names.ROLE_PREFLIGHT, attempt=1))
    first = plan_job(observed(), TIMING).actions[0]
    assert isinstance(first, CreatePreflight)
    plan = settled(replace(check, now=NOW + timedelta(seconds=20)))
    assert plan.actions == (RestoreInputs(names.ROLE_PREFLIGHT, inputs=first.inputs),)


@pytest.mark.parametrize(
    ("due", "pod", "looks"),
    [
        (True, running("p"), True),
        (False, running("p"), False),
        (True, running("p", deleting=True), False),
        (True, pending(attempt=1), False),
    ],
)
def test_the_service_of_a_gang_that_runs_is_looked_after(
    due: bool, pod: PodView, looks: bool
) -> None:
    """Ranks that are started again in their pods look for their peers by its names."""
    seen = started(pods=(pod,), rank0=report(), service_due=due)
    assert settled(seen).actions == ((RestoreService(),) if looks else ())
    suspended = after(seen, spec=dict(seen.spec) | {"suspend": True}, generation=2)
    assert RestoreService() not in plan_job(suspended, TIMING).actions


def test_a_service_that_cannot_be_made_is_told_while_the_gang_trains() -> None:
    taken = Refusal(RestoreService(), reasons.NAME_TAKEN, "Service ml/small belongs to another")
    seen = started(pods=(running("p"),), rank0=report(), service_due=True, refusal=taken)
    assert state(settled(seen)) == ("Unknown", reasons.NAME_TAKEN)


def test_a_job_that_makes_no_pods_is_told() -> None:
    seen = started(batch_jobs=gang_job(created_at=NOW))
    assert settled(replace(seen, now=NOW + timedelta(seconds=10))).requeue_after == 20
    plan = settled(replace(seen, now=NOW + timedelta(seconds=30)))
    assert state(plan) == ("Unknown", reasons.POD_NOT_STARTING)
    assert "none of 1 pods for 30 s: `kubectl describe job small-a1`" in message(plan)
    hidden = started(batch_jobs=gang_job(created_at=NOW, active=1))
    assert state(settled(replace(hidden, now=NOW + timedelta(seconds=60))))[1] == reasons.STARTING


def test_a_refusal_is_told_once_and_clears() -> None:
    seen = started(batch_jobs={})
    refusal = Refusal(CreateGang(1, 1), reasons.CREATION_REFUSED, "exceeded quota: gpus")
    refused = replace(seen, refusal=refusal)
    plan = settled(refused)
    assert state(plan) == ("Unknown", reasons.CREATION_REFUSED)
    assert message(plan) == "exceeded quota: gpus"
    assert [e.reason for e in plan.events] == [reasons.CREATION_REFUSED]
    assert plan.actions == (CreateGang(1, 1),)
    made = settled(after(refused, batch_jobs=gang_job(), refusal=None))
    assert state(made)[1] == reasons.STARTING
    stale = settled(after(refused, batch_jobs=gang_job()))
    assert state(stale)[1] == reasons.STARTING


def test_a_complete_job_whose_rank_0_is_gone_is_run_again() -> None:
    """It would be waited for without end."""
    other = ended("p1", 0, index=1)
    plan = settled(started(batch_jobs=gang_job(complete=True), pods=(other,)))
    assert plan.status.attempts[0].end_time
    assert "deleted before their outcome was read" in plan.status.attempts[0].message
    late = settled(
        started(batch_jobs=gang_job(complete=True), pods=(running("p0"), other))
    )  # its end is on its way
    assert not late.status.attempts[0].end_time
    assert late.requeue_after is not None


def test_a_deleted_teacher_is_made_again_and_a_complete_one_is_not() -> None:
    stream = TeacherStreamStatus(uri="s3://s", tokens=5)
    seen = teacher_seen({})
    seen = replace(seen, status=seen.status.model_copy(update={"teacher_stream": stream}))
    plan = plan_job(after(seen, batch_jobs={}), TIMING)
    assert CreateTeacher() in plan.actions
    done = after(teacher_seen({"complete": True}))
    assert settled(after(done, batch_jobs=gang_job())).actions == ()


def test_the_last_word_of_a_writer_that_is_late_is_waited_for() -> None:
    """The watch of Jobs may run ahead of that of pods, also between a look for it and the plan."""
    known = TeacherStreamStatus(uri="s3://s", tokens=10)
    pod = running("t", role=names.ROLE_TEACHER, attempt=0)
    seen = teacher_seen({"complete": True}, (pod,))
    seen = replace(seen, status=seen.status.model_copy(update={"teacher_stream": known}))
    plan = settled(seen)
    assert plan.status.teacher_stream == known
    assert plan.requeue_after is not None
    last = {"progress": {"teacherStream": {"uri": "s3://s", "tokens": 50}}}
    pod = ended("t", 0, role=names.ROLE_TEACHER, attempt=0, outcome=last)
    plan = settled(after(seen, pods=(pod,)))
    assert plan.status.teacher_stream is not None
    assert (plan.status.teacher_stream.tokens, plan.status.teacher_stream.complete) == (50, True)


def test_clocks_of_nodes_may_be_an_hour_apart() -> None:
    """A healthy gang on a node whose clock is slow is no stalled one, and a stalled one is found."""
    behind = report(last_step_time=NOW.timestamp() - 3600, checkpoint=CheckpointStatus(step=5))
    fresh = Contact(behind.report, NOW + timedelta(seconds=3), NOW + timedelta(seconds=3))
    assert settled(started(pods=(running("p"),), rank0=fresh)).actions == ()
    ahead = report(last_step_time=NOW.timestamp() + 3600)
    still = Contact(ahead.report, NOW + timedelta(seconds=1000), NOW + timedelta(seconds=3))
    seen = started(pods=(running("p"),), rank0=replace(still, reached_at=NOW))
    plan = settled(after(seen, seconds=1000, rank0=still))
    assert plan.status.attempts[0].reason == reasons.STALLED


@pytest.mark.parametrize(("limit", "bound"), [(900, 900), (15, 300)])
def test_a_rank_0_that_never_answers_is_stalled(limit: int, bound: int) -> None:
    """A frozen process before its first step: no step is missing yet, and the GPUs idle all the same."""
    online = {"model": {"uri": "s3://models/big"}, "delivery": "Online"}
    given = spec(teacher=online, stallTimeoutSeconds=limit)
    seen = started(spec=given, pods=(running("p"),), unanswered=Unanswered("p", NOW))
    assert settled(after(seen, seconds=bound - 10)).actions == ()
    of_before = Unanswered("of the attempt before", NOW)
    assert settled(after(seen, seconds=bound + 10, unanswered=of_before)).actions == ()
    plan = settled(after(seen, seconds=bound + 10))
    assert plan.status.attempts[0].reason == reasons.STALLED
    assert f"has not answered in {bound} s" in plan.status.attempts[0].message


def test_a_sign_of_life_between_steps_counts() -> None:
    """Of a gang that waits for its last upload: the status does not change with it."""
    first = report()
    seen = started(pods=(running("p"),), rank0=first)
    later = NOW + timedelta(seconds=990)
    alive = contact_of(
        report(last_step_time=NOW.timestamp() + 990).report,
        contact_of(first.report, None, NOW),
        later,
    )
    assert alive.moved
    assert settled(after(seen, seconds=1000, rank0=alive)).actions == ()
    silent = contact_of(alive.report, alive, NOW + timedelta(seconds=2000))
    plan = settled(after(seen, seconds=2000, rank0=silent))
    assert plan.status.attempts[0].reason == reasons.STALLED


def test_a_pods_place_grace_and_owner_are_read() -> None:
    raw = {
        "metadata": {
            "name": "p", "uid": "u", "ownerReferences": [{"kind": "Job"}],
            "deletionTimestamp": "2026-01-02T03:05:05Z", "deletionGracePeriodSeconds": 60,
        },
        "spec": {"terminationGracePeriodSeconds": 600},
        "status": {"conditions": [{"type": "PodScheduled", "status": "True",
                                   "lastTransitionTime": "2026-01-02T03:04:05Z"}]},
    }  # fmt: skip
    view = pod_view(raw)
    assert (view.placed, view.placed_at, view.grace_seconds) == (True, NOW, 600)
    assert (view.deleting_since, view.owned, view.uid) == (NOW, True, "u")
    orphan = pod_view({"metadata": {"name": "p"}})
    assert not orphan.owned


def test_a_jobs_width_is_read() -> None:
    raw = {
        "metadata": {"name": "j", "creationTimestamp": "2026-01-02T03:04:05Z"},
        "spec": {"parallelism": 0, "completions": 3, "suspend": True},
        "status": {"active": 2},
    }
    view = batch_job_view(raw)
    assert (view.parallelism, view.completions, view.active) == (0, 3, 2)
    assert (view.suspended, view.created_at) == (True, NOW)
