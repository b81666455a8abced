"""The plan of a DistillationJob, from validation to its end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from kubedistill_api import names, reasons
from kubedistill_api.runspec import ProgressReport
from kubedistill_api.status import TeacherStreamStatus
from kubedistill_operator.plan.actions import (
    CreateGang,
    CreatePreflight,
    CreateTeacher,
    DeleteBatchJob,
)
from kubedistill_operator.plan.draft import Contact, Observed, OtherJob
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
    settled,
    spec,
    state,
    teacher_seen,
)


def test_first_visit_sets_every_condition_and_the_summaries() -> None:
    plan = settled(observed(spec=spec(workers={"nodes": 4, "gpusPerNode": 8})))
    assert [c.type for c in plan.status.conditions] == list(reasons.CONDITION_TYPES)
    assert plan.status.student_summary == "teacher, 4 layers"
    assert plan.status.teacher_summary == "big"
    assert plan.status.gpus == 32
    assert reason(plan) == reasons.VALIDATING
    assert isinstance(plan.actions[0], CreatePreflight)


def scored(teacher: dict[str, Any]) -> dict[str, Any]:
    """What makes a job learn the logits of an endpoint, with changes of its teacher."""
    endpoint = {"url": "http://x/v1", "model": "m"}
    return {
        "teacher": {"endpoint": endpoint, "payload": "Sparse", **teacher},
        "student": {"config": {"model_type": "llama"}},
        "distill": {"objective": {"temperature": 1}},
        "data": {"sources": [{"uri": "s3://data/x.jsonl"}], "tokenizer": {"uri": "s3://models/t"}},
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher": None}, ["spec.teacher", "needs a `teacher`"]),
        ({"fineTune": {}}, ["exactly one method"]),
        ({"training": {"globalBatchSize": 3}, "workers": {"nodes": 2}}, ["multiple of the 2 ranks"]),
        ({"training": {"learningRate": "1e-5"}}, ["spec.training.learningRate", "2.0e-5"]),
        ({"training": {"learningRate": True}}, ["spec.training.learningRate", "true", "2.0e-5"]),
        ({"nonsense": 1}, ["spec.nonsense", "no such field"]),
        ({"student": {}}, ["spec.student", "exactly one of"]),
        (
            {"distill": {"objective": {"features": [{}]}}},
            ["spec.distill.objective.features", "delivery: Stream", "delivery: Online"],
        ),
        (
            {"distill": {"objective": {"features": [{}, {"studentLayer": 1}]}}},
            ["spec.distill.objective.features[1]", "give both"],
        ),
        (
            {"teacher": {"endpoint": {"url": "http://x/v1", "model": "m", "maxCost": 3}}},
            ["spec.teacher.endpoint.price", "give it beside `maxCost`"],
        ),
        (
            {"distill": {"objective": {"loss": "Mix"}}},
            ["spec.distill.objective.mix", "found nothing", "loss: Mix"],
        ),
        (
            {"distill": {"objective": {"loss": "Mix", "mix": {}}}},
            ["spec.distill.objective.mix", "no weight above 0"],
        ),
        (
            {
                "teacher": {"endpoint": {"url": "http://x/v1", "model": "m"}},
                "distill": {"objective": {"temperature": 4}},
            },
            ["spec.teacher.payload", "found Hidden", "payload: Sparse",
             "spec.distill.objective.temperature: found 4", "spec.data.tokenizer"],
        ),
        (
            scored({"temperatures": [1, 2]}),
            ["spec.distill.objective.temperature: found 2", "spec.teacher.temperatures"],
        ),
        (scored({"delivery": "Online"}), ["spec.teacher.payload", "delivery: Online"]),
        (
            scored({"endpoint": {"url": "http://x/v1", "model": "m", "maxCost": 1}}),
            ["spec.teacher.endpoint.maxCost"],
        ),
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


def test_an_evicted_preflight_is_free() -> None:
    """Also where no retries are allowed; and its end is not taken for that of the next one."""
    pod = ended("p", 137, role=names.ROLE_PREFLIGHT, disrupted=True, owner_uid="first")
    limit = spec(backoffLimit=0)
    failed = {"failed": True, "finished_at": NOW, "uid": "first"}
    seen = preflight_seen(failed, pod, spec=limit)
    plan = settled(seen)
    assert state(plan) == ("Unknown", reasons.DISRUPTED)
    assert plan.status.failures == 0
    later = plan_job(after(seen, seconds=60), TIMING)
    assert isinstance(later.actions[0], DeleteBatchJob)
    [name] = seen.batch_jobs
    gone = (replace(seen.pods[0], gone=True),)
    asked = plan_job(after(seen, batch_jobs={}, pods=gone), TIMING).actions[0]
    assert isinstance(asked, CreatePreflight)
    assert asked.tries == 1
    again = BatchJobView(name, names.ROLE_PREFLIGHT, 1, tries=1, generation=1, uid="second")
    assert reason(settled(after(seen, batch_jobs={name: again}, pods=gone))) == reasons.VALIDATING


def test_a_preflight_that_says_nothing_is_tried_again_and_given_up() -> None:
    """Such as one of an image that is not ours; it would be waited for without end."""
    pod = ended("p", 0, role=names.ROLE_PREFLIGHT)
    seen = preflight_seen({"complete": True, "finished_at": NOW}, pod)
    plan = settled(seen)
    assert state(plan) == ("Unknown", reasons.ERROR)
    assert "without saying what it found" in message(plan)
    later = plan_job(after(seen, seconds=60), TIMING)
    assert isinstance(later.actions[0], DeleteBatchJob)
    last = preflight_seen(
        {"complete": True, "tries": 7, "finished_at": NOW}, replace(pod, attempt=7)
    )
    assert state(settled(last)) == ("False", reasons.BACKOFF_LIMIT_EXCEEDED)


@pytest.mark.parametrize("gone", [None, PodView("p", names.ROLE_PREFLIGHT, 1, gone=True)])
def test_a_preflight_whose_words_are_gone_with_its_pod_is_asked_again(
    gone: PodView | None,
) -> None:
    done = {"complete": True, "finished_at": NOW}
    seen = preflight_seen(done, gone)
    assert isinstance(settled(seen).actions[0], DeleteBatchJob)


def test_a_failed_preflight_is_judged_when_the_end_of_its_pod_is_known() -> None:
    """The Job's end may be seen before the pod's: an eviction was taken for an error, and counted."""
    failed = {"failed": True, "failing": True, "finished_at": NOW}
    still = PodView("p", names.ROLE_PREFLIGHT, 1, phase="Running")
    plan = settled(preflight_seen(failed, still))
    assert (plan.actions, plan.requeue_after, plan.status.failures) == ((), 2.0, 0)
    evicted = ended("p", 143, role=names.ROLE_PREFLIGHT, disrupted=True, gone=True)
    plan = settled(preflight_seen(failed, evicted))
    assert (state(plan), plan.status.failures) == (("Unknown", reasons.DISRUPTED), 0)


def test_logits_of_an_endpoint_are_learnt_where_it_is_said_how() -> None:
    plan = settled(observed(spec=spec(**scored({}))))
    assert reason(plan) == reasons.VALIDATING


@pytest.mark.parametrize(
    ("told", "named"),
    [
        ('secret "vendor" not found', "vendor with API_KEY"),
        ("couldn't find key API_KEY in Secret ml/both", "both with API_KEY"),
        ('secret "s3" not found', "s3 with AWS_ACCESS_KEY_ID and"),
        ("couldn't find key AWS_ACCESS_KEY_ID in Secret ml/both", "both with AWS_ACCESS_KEY_ID"),
        ('secret "of-a-volume" not found', ""),
    ],
)
def test_of_two_secrets_the_missing_one_is_named(told: str, named: str) -> None:
    waiting = PodView(
        "p", names.ROLE_PREFLIGHT, 1, waiting_reason="CreateContainerConfigError",
        waiting_message=told,
    )  # fmt: skip
    vendor, store = ("both", "both") if "both" in told else ("vendor", "s3")
    changes = scored({})
    changes["teacher"]["endpoint"]["secretRef"] = {"name": vendor}
    changes["storage"] = {"uri": "s3://runs/x", "secretRef": {"name": store}}
    plan = settled(preflight_seen({}, waiting, spec=spec(**changes)))
    if named:
        assert state(plan) == ("Unknown", reasons.SECRET_NOT_FOUND)
        assert f"Secret {named}" in message(plan)
        field = "teacher.endpoint" if "API_KEY" in named else "storage"
        assert f"spec.{field}.secretRef.name" in message(plan)
    else:
        assert state(plan) == ("Unknown", reasons.POD_NOT_STARTING)
        assert "of-a-volume" in message(plan)


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


def test_a_short_last_word_does_not_shorten_the_table_of_payloads() -> None:
    rows = [
        {"payload": "Hidden, int8", "temperature": t, "bytesPerToken": 9, "keptMass": 1,
         "gradientError": 0, "angleDegrees": 0}
        for t in (2, 4)
    ]  # fmt: skip
    whole = {"digest": "d", "tokens": 9, "probe": rows}
    last = {"progress": {"teacherStream": whole | {"probe": rows[1:]}}}
    pod = ended("t", 0, role=names.ROLE_TEACHER, attempt=0, outcome=last)
    before = teacher_seen({"complete": True}, (pod,))
    known = before.status.model_copy(
        update={"teacher_stream": TeacherStreamStatus.model_validate(whole)}
    )
    plan = settled(replace(before, status=known))
    assert plan.status.teacher_stream is not None
    assert [row.temperature for row in plan.status.teacher_stream.probe] == [2, 4]


def test_a_failed_teacher_is_final() -> None:
    pod = ended("t", 13, role=names.ROLE_TEACHER, attempt=0, outcome={"message": "no config"})
    plan = settled(teacher_seen({"failed": True}, (pod,)))
    assert state(plan) == ("False", reasons.TEACHER_FAILED)
    assert "no config" in message(plan)


def _damaged(tries: int, *, written_here: bool) -> Observed:
    """A job whose first attempt just found its stream damaged, with a teacher's Job or none."""
    first = accepted()
    if written_here:
        writer = ended("t", 0, role=names.ROLE_TEACHER, attempt=0)
        first = teacher_seen({"complete": True, "tries": tries}, (writer,))
        jobs = dict(first.batch_jobs)
    else:
        status = plan_job(first, TIMING).status
        assert status.resolved is not None
        there = status.resolved.model_copy(update={"stream_complete": True})
        first, jobs = after(first, status=status.model_copy(update={"resolved": there})), {}
    running = after(first, batch_jobs={**jobs, **gang_job()}, pods=())
    pod = ended("small-1-0-x", 19, outcome={"message": "s3://x: the shard is missing"})
    failed = gang_job(failed=True, failing=True)
    return after(running, batch_jobs={**jobs, **failed}, pods=(pod,))


@pytest.mark.parametrize("written_here", [True, False])
def test_a_damaged_stream_is_written_again_before_the_next_attempt(written_here: bool) -> None:
    name = names.teacher_name("small")
    seen = _damaged(0, written_here=written_here)
    plan = settled(seen)
    [attempt] = plan.status.attempts
    assert (attempt.reason, attempt.charged) == (reasons.STREAM_DAMAGED, True)
    assert "the shard is missing" in attempt.message
    if written_here:
        assert plan.actions == (DeleteBatchJob(name),)
        seen = after(seen, 100, batch_jobs=gang_job(failed=True), pods=())
        plan = settled(seen)
    assert plan.actions == (CreateTeacher(1),)
    assert state(plan, reasons.TEACHER_READY) == ("False", reasons.GENERATING)
    again = BatchJobView(name, names.ROLE_TEACHER, tries=1)
    waiting = after(seen, 100, batch_jobs={name: again}, pods=())
    assert settled(waiting).actions == ()
    done = after(waiting, 100, batch_jobs={name: replace(again, complete=True)})
    plan = settled(done)
    assert plan.actions == (CreateGang(2, 2),)
    assert state(plan, reasons.TEACHER_READY) == ("True", reasons.STREAM_COMPLETE)


def test_the_fence_is_in_the_status_with_the_decision() -> None:
    online = {"model": {"uri": "s3://models/big"}, "delivery": "Online"}
    plan = settled(accepted(spec=spec(teacher=online)))
    assert state(plan, reasons.TEACHER_READY) == ("True", reasons.NOT_NEEDED)
    assert plan.actions == (CreateGang(1, 1),)
    assert [a.number for a in plan.status.attempts] == [1]
