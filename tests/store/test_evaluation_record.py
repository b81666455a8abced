"""A teacher's figures in a real store: found by who asks the same, waited for a little."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from data_kit import TURNS, tokenizer
from kubedistill_api.evaluation import Evaluation
from kubedistill_api.exit_codes import ExitCode
from kubedistill_api.runspec import ResolvedModel
from kubedistill_trainer.evaluation import record, teacher
from kubedistill_trainer.evaluation.measure import Plan
from kubedistill_trainer.evaluation.questions import Question, QuestionSet
from kubedistill_trainer.evaluation.results import Abilities, TaskScore
from kubedistill_trainer.failures import RunFailure
from s3_fixture import S3Server, s3  # noqa: F401  (s3 is a fixture)
from text_kit import context_of, text_job


def abilities(right: int) -> Abilities:
    task = TaskScore(name="chain_sum", group="simple", examples=8, right=right)
    return Abilities(prompting="Examples", tasks=(task,), problems={"questions": "why"})


def request(template: str | None = TURNS, **changes: Any) -> record.Request:
    asked = QuestionSet("built-in", changes.pop("questions", "q"), (Question("a?", ("b",)),))
    plan = Plan((), asked, changes.pop("tokens", 64), changes.pop("latency", True))
    settings = Evaluation(examples=changes.pop("examples", 32))
    own: dict[str, Any] = {"teacher_digest": "t", "precision": "BF16"}
    return record.request_of(settings, plan, tokenizer(template), **own | changes)


def nothing() -> None:
    """Nobody watches."""


def test_what_is_written_first_holds(s3: S3Server) -> None:  # noqa: F811
    store = s3.store()
    assert record.read(store, request()) is None
    record.publish(store, request(), abilities(5))
    record.publish(store, request(), abilities(6))
    assert record.read(store, request()) == abilities(5)
    assert record.awaited(store, request(), nothing) == abilities(5)


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher_digest": "u"}, {"precision": "FP32"}, {"examples": 31}, {"questions": "r"},
        {"tokens": 65}, {"latency": False}, {"template": None},
    ],
)  # fmt: skip
def test_another_question_has_another_answer(changes: dict[str, Any]) -> None:
    assert request(**changes).key != request().key
    assert request().key == request().key


def test_a_student_waits_for_a_teacher_that_has_begun(s3: S3Server) -> None:  # noqa: F811
    store = s3.store()
    record.claim(store, request(), "a pod")
    waited = threading.Event()

    def write() -> None:
        waited.wait(30)
        record.publish(store, request(), abilities(3))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert record.awaited(store, request(), waited.set) == abilities(3)
    finally:
        waited.set()
        writer.join()
    assert waited.is_set()


def test_nobody_waits_where_no_teacher_has_begun(s3: S3Server) -> None:  # noqa: F811
    def never() -> None:
        raise AssertionError("it waits")

    assert record.awaited(s3.store(), request(), never) is None


@pytest.mark.parametrize("limit", ["_WAIT_SECONDS", "_OLD_SECONDS"])
def test_the_wait_ends(
    s3: S3Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
) -> None:
    """After a while, and at once where the teacher began so long ago that it was given up."""
    store = s3.store()
    record.claim(store, request(), "a pod")
    monkeypatch.setattr(record, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(record, limit, -5.0)
    assert record.awaited(store, request(), nothing) is None


def test_who_comes_second_does_not_measure_beside_the_first(s3: S3Server) -> None:  # noqa: F811
    store = s3.store()
    first = record.claim(store, request(), "one")
    assert first is not None and first.times == 1
    assert record.claim(store, request(), "other") is None
    # A pod that comes back is the same one.
    again = record.claim(store, request(), "one")
    assert again is not None and again.times == 2
    again.give_back()
    once_more = record.claim(store, request(), "one")
    assert once_more is not None and once_more.times == 2
    once_more.end()
    other = record.claim(store, request(), "other")
    assert other is not None and other.times == 1


def test_of_two_who_come_in_the_same_moment_one_measures(
    s3: S3Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, look = s3.store(), record._mark
    others: list[record.Claim | None] = []

    def looked(*arguments: Any) -> Any:
        found = look(*arguments)
        if not others:
            monkeypatch.setattr(record, "_mark", look)
            others.append(record.claim(store, request(), "other"))
        return found

    monkeypatch.setattr(record, "_mark", looked)
    assert record.claim(store, request(), "one") is None
    assert others[0] is not None and others[0].times == 1


def test_a_mark_of_an_earlier_version_is_one_that_lapses(
    s3: S3Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = s3.store()
    store.put(request().mark, b"3")
    assert record.claim(store, request(), "one") is None
    monkeypatch.setattr(record, "_OLD_SECONDS", -5.0)
    mine = record.claim(store, request(), "one")
    assert mine is not None and mine.times == 1


def test_a_claim_lapses_unless_it_is_renewed(
    s3: S3Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = s3.store()
    claim = record.claim(store, request(), "one")
    assert claim is not None
    monkeypatch.setattr(record, "_OLD_SECONDS", 1.5)
    monkeypatch.setattr(record, "_RENEW_SECONDS", 0.0)
    time.sleep(2.5)
    assert not record.is_coming(store, request())
    claim.renew()
    assert record.is_coming(store, request())
    assert record.claim(store, request(), "other") is None
    time.sleep(2.5)
    assert record.claim(store, request(), "other") is not None


def test_what_could_not_be_had_is_asked_again_and_waited_for(s3: S3Server) -> None:  # noqa: F811
    store = s3.store()
    some = abilities(5).model_copy(update={"again": True})
    record.publish(store, request(), some)
    assert record.awaited(store, request(), nothing) == some
    record.claim(store, request(), "next job")

    def write() -> None:
        record.publish(store, request(), abilities(6))

    assert record.awaited(store, request(), write) == abilities(6)
    record.publish(store, request(), abilities(7))
    assert record.read(store, request()) == abilities(6)


def test_figures_that_do_not_parse_are_none(s3: S3Server) -> None:  # noqa: F811
    store = s3.store()
    store.put(request().key, b'{"prompting": "Sung"}')
    assert record.read(store, request()) is None


@pytest.mark.parametrize(
    ("error", "tries"),
    [(RunFailure(ExitCode.PEER_LOST, "x"), 3), (RunFailure(ExitCode.INTERRUPTED, "x"), 6)],
)
def test_a_teacher_that_no_attempt_survives_is_given_up(
    error: RunFailure,
    tries: int,
    s3: S3Server,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = s3.store()
    store.put("teacher/model.safetensors", b"")
    run = text_job(store, "s3://nowhere/q", evaluation={"examples": 2, "tasks": ["chain_sum"]})
    source = ResolvedModel(uri=store.uri_of("teacher"), digest="t" * 64)
    context = context_of(run.model_copy(update={"teacher_model": source}), store, tmp_path)
    asked: list[int] = []

    def dies() -> Any:
        asked.append(1)
        raise error

    for _ in range(tries):
        with pytest.raises(RunFailure):
            teacher.measure_teacher(context, dies, tokenizer(TURNS), nothing)
    plan = teacher.plan_of(run.spec.evaluation, context.open_store)
    wanted = teacher.request_of_teacher(context, plan, tokenizer(TURNS))
    assert record.read(store, wanted) is None
    if error.code == ExitCode.INTERRUPTED:
        return
    teacher.measure_teacher(context, dies, tokenizer(TURNS), nothing)
    found = record.read(store, wanted)
    assert len(asked) == tries
    assert found is not None
    assert found.problems["chain_sum"] == "3 attempts to ask it ended in the middle"
