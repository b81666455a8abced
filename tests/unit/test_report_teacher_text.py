"""A teacher's text in the report: signal, filters, tokens, cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from data_kit import job
from kubedistill_api.status import TeacherStreamStatus
from kubedistill_trainer.data.conversation import Conversation
from kubedistill_trainer.report.card import card
from kubedistill_trainer.report.document import Finished, document
from kubedistill_trainer.report.page import page
from kubedistill_trainer.teacher.filters import Learnt
from kubedistill_trainer.teacher.learn import TaughtText
from report_kit import finished

STREAM = TeacherStreamStatus(
    uri="s3://runs/streams/abc", digest="abc", payload="Text", bytes=4000, tokens=900, complete=True,
    answers=1000, prompt_tokens=12345, answer_tokens=67890, cost=1.25,
)  # fmt: skip
DROPPED = {"wrong": 120, "unfinished": 68}
LEARNT = Learnt(tuple((0, Conversation(())) for _ in range(812)), 1000, DROPPED, unreasoned=3)


def taught(signal: str, **distill: Any) -> Finished:
    source = {"uri": "s3://data/q.jsonl", "promptField": "q", "origin": "Teacher"}
    endpoint = {"url": "http://vllm:8000/v1", "model": "big"}
    run = job(
        source, fineTune=None, distill={"signal": signal, **distill}, teacher={"endpoint": endpoint}
    )
    one = finished(teacher=False)
    work = replace(one.work, taught=TaughtText(LEARNT, STREAM))
    return replace(one, run=one.run.model_copy(update={"spec": run.spec}), work=work)


def content(signal: str = "ChainOfThought", **distill: Any) -> dict[str, Any]:
    made = taught(signal, **distill)
    # The files of the kit's data are three; this job has one.
    sources = [made.run.spec.data.sources[0]] * 3
    data = made.run.spec.data.model_copy(update={"sources": sources})
    spec = made.run.spec.model_copy(update={"data": data})
    return document(replace(made, run=made.run.model_copy(update={"spec": spec})))


def test_the_document_says_what_was_learnt_and_what_it_took() -> None:
    thought = {"minAgreement": 0.6, "maxReasoningTokens": 99}
    generation = {"samples": 3, "temperature": 0.7}
    found = content(chainOfThought=thought, generation=generation)
    text = found["teacherText"]
    assert (text["asked"], text["kept"], text["dropped"]) == (1000, 812, DROPPED)
    assert (text["promptTokens"], text["answerTokens"], text["cost"]) == (12345, 67890, 1.25)
    assert (text["filters"]["minAgreement"], text["filters"]["checkAnswer"]) == (0.6, True)
    assert (text["generation"]["samples"], text["generation"]["maxTokens"]) == (3, 512)
    assert text["withoutReasoning"] == 3
    assert text["stream"] == {"uri": "s3://runs/streams/abc", "digest": "abc", "bytes": 4000}
    assert found["teacher"] == {
        "uri": "http://vllm:8000/v1", "model": "big", "delivery": "Stream", "payload": "Text",
    }  # fmt: skip


def test_responses_have_no_filters_of_reasoning() -> None:
    text = content("Responses")["teacherText"]
    assert (text["filters"], text["withoutReasoning"]) == (None, None)


def test_other_jobs_have_none_of_it() -> None:
    found = document(finished())
    assert found["teacherText"] is None
    assert "Teacher text" not in page(found)


@pytest.mark.parametrize("signal", ["Responses", "ChainOfThought"])
def test_the_page_shows_it(signal: str) -> None:
    shown = page(content(signal))
    for words in (
        "Teacher text", "812 of 1,000 answers", "wrong", "120", "12.0%", "68",
        "12,345 of prompts, 67,890 of answers", "1.25", "big at http://vllm:8000/v1",
    ):  # fmt: skip
        assert words in shown, words
    assert ("minAgreement" in shown) == (signal == "ChainOfThought")
    assert "soft weight" not in shown and "soft weight" not in card_text(signal)


def card_text(signal: str) -> str:
    made = taught(signal)
    return card(made.run, made.dataset, made.metrics, made.parameters, made.compared)


def test_the_card_names_signal_and_teacher() -> None:
    text = card_text("Responses")
    assert "distillation, on the teacher’s answers" in text
    assert "`big` at http://vllm:8000/v1" in text
    assert "`s3://data/q.jsonl`, answered by the teacher" in text
