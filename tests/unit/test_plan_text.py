"""The plan of a job that learns what its teacher says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kubedistill_api import names, reasons
from kubedistill_api.runspec import ProgressReport
from kubedistill_api.status import TeacherStreamStatus
from kubedistill_operator.plan.actions import (
    CreateGang,
    DeleteBatchJob,
)
from kubedistill_operator.plan.draft import Contact, Observed
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
    running,
    settled,
    spec,
    state,
)

ASKED = {"uri": "s3://data/q.jsonl", "origin": "Teacher", "promptField": "q"}
TEXT = spec(
    distill={"signal": "Responses"},
    student={"config": {"model_type": "llama"}},
    data={"sources": [ASKED], "tokenizer": {"uri": "s3://data/tokenizer"}},
)


def _text_seen(view: dict[str, Any], pods: tuple[PodView, ...] = (), **changes: Any) -> Observed:
    name = names.teacher_name("small")
    jobs = {name: BatchJobView(name, names.ROLE_TEACHER, **view)}
    return after(accepted(spec=TEXT), batch_jobs=jobs, pods=pods, **changes)


def test_a_student_of_text_is_not_started_before_all_of_it_is_there() -> None:
    stream = TeacherStreamStatus(uri="s3://s", tokens=50, answers=5, answer_tokens=50, cost=0.25)
    contact = Contact(ProgressReport(phase="Generating", teacher_stream=stream), NOW)
    seen = _text_seen({}, (running("t", role=names.ROLE_TEACHER, attempt=0),), teacher=contact)
    plan = settled(seen)
    assert state(plan, reasons.TEACHER_READY) == ("False", reasons.GENERATING)
    assert plan.actions == ()
    assert plan.status.teacher_stream is not None
    assert plan.status.teacher_stream.answers == 5
    said = stream.model_copy(
        update={"complete": True, "answers": 9, "tokens": 90, "answer_tokens": 90}
    )
    pod = ended(
        "t", 0, role=names.ROLE_TEACHER, attempt=0,
        outcome={"progress": {"teacherStream": said.to_wire()}},
    )  # fmt: skip
    name = names.teacher_name("small")
    done = {name: BatchJobView(name, names.ROLE_TEACHER, complete=True)}
    plan = settled(after(seen, batch_jobs=done, pods=(pod,)))
    assert plan.actions == (CreateGang(1, 1),)
    assert state(plan, reasons.TEACHER_READY) == ("True", reasons.STREAM_COMPLETE)
    assert message(plan, reasons.TEACHER_READY) == "9 answers of 90 tokens, at a cost of 0.25"


def test_text_that_is_there_needs_no_teacher_and_no_number_of_steps() -> None:
    first = accepted(spec=TEXT)
    status = plan_job(first, TIMING).status
    assert status.resolved is not None
    there = status.resolved.model_copy(update={"stream_complete": True, "total_steps": 0})
    plan = settled(after(first, status=status.model_copy(update={"resolved": there}), pods=()))
    assert plan.actions == (CreateGang(1, 1),)
    assert state(plan, reasons.TEACHER_READY) == ("True", reasons.NOT_NEEDED)


def test_spent_money_is_an_end_with_a_reason_of_its_own() -> None:
    stream = {"digest": "d", "tokens": 50, "answers": 5, "cost": 3.5}
    pod = ended(
        "t", 21, role=names.ROLE_TEACHER, attempt=0,
        outcome={"message": "3.5 is spent, of at most 3", "progress": {"teacherStream": stream}},
    )  # fmt: skip
    plan = settled(_text_seen({"failed": True, "failing": True}, (pod,)))
    assert state(plan) == ("False", reasons.COST_LIMIT_REACHED)
    assert state(plan, reasons.TEACHER_READY) == ("False", reasons.COST_LIMIT_REACHED)
    assert "3.5 is spent, of at most 3" in message(plan)
    assert plan.status.teacher_stream is not None
    assert plan.status.teacher_stream.cost == 3.5


def test_damage_takes_the_answers_back_until_they_are_asked_again() -> None:
    known = TeacherStreamStatus(uri="s3://s", tokens=90, answers=9, complete=True)
    pod = ended("small-1-0-x", 19, outcome={"message": "s3://x: the shard is missing"})
    seen = _text_seen({"complete": True}, (ended("t", 0, role=names.ROLE_TEACHER, attempt=0),))
    seen = replace(seen, status=seen.status.model_copy(update={"teacher_stream": known}))
    jobs = dict(seen.batch_jobs)
    begun = after(seen, batch_jobs={**jobs, **gang_job()}, pods=())
    failed = {**jobs, **gang_job(failed=True, failing=True)}
    plan = settled(after(begun, batch_jobs=failed, pods=(pod,)))
    assert plan.actions == (DeleteBatchJob(names.teacher_name("small")),)
    stream = plan.status.teacher_stream
    assert stream is not None
    assert (stream.answers, stream.tokens, stream.complete) == (0, 0, False)
