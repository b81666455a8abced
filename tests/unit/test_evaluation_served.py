"""A model behind a real server, asked as one in this process is: the same answers, as sure."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from endpoint_kit import Fault, Mind, Server
from kubedistill_api.teacher import Endpoint, Price
from kubedistill_trainer.data.template import ChatTemplate
from kubedistill_trainer.evaluation.gym import load_task
from kubedistill_trainer.evaluation.measure import Plan, measure, measure_voice
from kubedistill_trainer.evaluation.prompts import TO_RECALL, Asking
from kubedistill_trainer.evaluation.questions import (
    SHOTS,
    Answered,
    Question,
    QuestionSet,
    score,
)
from kubedistill_trainer.evaluation.results import Abilities, Prompting
from kubedistill_trainer.evaluation.served import ServedVoice
from kubedistill_trainer.evaluation.served_answer import confidence_of
from kubedistill_trainer.teacher.endpoint_client import Patience
from kubedistill_trainer.teacher.tab import Tab

QUICK = Patience(first_wait=0.01, longest_wait=0.02, jitter=0.0)
QUESTIONS = QuestionSet(
    "built-in", "q", tuple(Question(f"What is {n}?", (f"number {n}",)) for n in range(4))
)


def nothing() -> None:
    """Nobody watches."""


def plan(**changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "tasks": (load_task("chain_sum", 3),), "questions": QUESTIONS, "max_answer_tokens": 12,
        "latency": False, **changes,
    }  # fmt: skip
    return Plan(**fields)


def endpoint(server: Server, **settings: Any) -> Endpoint:
    fields = {"url": server.url, "model": "tiny", "maxRetries": 1, "timeoutSeconds": 20, **settings}
    return Endpoint.model_validate(fields)


@contextmanager
def voice(
    server: Server, prompting: Prompting = "ChatTemplate", tab: Tab | None = None, **settings: Any
) -> Iterator[ServedVoice]:
    found = ServedVoice(endpoint(server, **settings), prompting, 12, tab or Tab(), nothing, QUICK)
    try:
        yield found
    finally:
        found.close()


def in_process(mind: Mind, prompting: Prompting) -> Asking:
    template = ChatTemplate(mind.tokenizer, mind.template, "t")
    return Asking(mind.tokenizer, template if prompting == "ChatTemplate" else None)


def asked(server: Server, prompting: Prompting = "ChatTemplate", **settings: Any) -> Abilities:
    with voice(server, prompting, **settings) as found:
        return measure_voice(found, plan())


@pytest.mark.parametrize("prompting", ["ChatTemplate", "Examples"])
def test_a_server_is_measured_as_its_model_is(
    server: Server, mind: Mind, prompting: Prompting
) -> None:
    server.templates = prompting == "ChatTemplate"
    here = measure(mind.model, in_process(mind, prompting), plan(), nothing)
    there = asked(server, prompting)
    assert not here.problems and not there.problems
    assert there.tasks == here.tasks
    assert there.questions is not None and here.questions is not None
    assert there.questions.right == here.questions.right
    assert there.questions.hallucinated == here.questions.hallucinated
    # Blanks around an answer are no part of it here.
    assert there.questions.confidence == pytest.approx(here.questions.confidence, rel=0.05)
    assert there.prompting == prompting and not there.again
    [sent] = {seen.path for seen in server.seen}
    assert sent == ("/v1/chat/completions" if prompting == "ChatTemplate" else "/v1/completions")
    assert all(seen.body["temperature"] == 0 for seen in server.seen)


@pytest.mark.parametrize("prompting", ["ChatTemplate", "Examples"])
@pytest.mark.parametrize("says", ["kept", "refused"])
def test_a_server_that_does_not_say_how_sure_it_is_has_no_hallucination_rate(
    server: Server, says: Any, prompting: Prompting
) -> None:
    server.logprobs = says
    found = asked(server, prompting)
    assert not found.problems
    assert found.questions is not None
    assert (found.questions.hallucinated, found.questions.confidence) == (None, None)
    assert found.figures().keys() == {"simpleAccuracy", "questionAccuracy"}


def test_settings_that_a_server_does_not_take_are_left_out(server: Server) -> None:
    refusals = [
        ("temperature", "Unsupported value: 'temperature' does not support 0 with this model."),
        ("top_p", "Unsupported parameter: 'top_p'"),
        # As Gemini says it, within a list.
        ("", "Logprobs is not enabled for models/tiny"),
    ]
    server.knows_seed = False
    server.only_max_completion_tokens = True
    server.faults = [
        Fault(400, body=[{"error": {"message": words, "param": name}}]) for name, words in refusals
    ]
    found = asked(server, concurrency=1, maxRetries=0)
    assert not found.problems
    last = server.seen[-1].body
    assert not {"temperature", "top_p", "seed", "max_tokens", "logprobs"} & last.keys()
    assert last["max_completion_tokens"] == 12


def test_reasoning_is_no_part_of_the_answer(server: Server) -> None:
    said = {
        "model": "tiny",
        "choices": [
            {
                "message": {"content": "<think>\nLima or Cusco\n</think>\n\nLima"},
                "logprobs": {
                    "content": [
                        {"token": "<think>\nLima or Cusco\n</think>\n\n", "logprob": -9.0},
                        {"token": "Li", "logprob": math.log(0.5)},
                        {"token": "ma", "logprob": math.log(0.125)},
                        {"token": "<|end|>", "logprob": -9.0},
                    ]
                },
                "finish_reason": "stop",
            }
        ],
    }
    server.faults = [Fault("other-body", body=said)]
    with voice(server) as found:
        [answer] = found.ask(["What is the capital of Peru?"], SHOTS, TO_RECALL)
    assert answer.said == "Lima"
    assert answer.confidence == pytest.approx(0.25)
    said["choices"][0]["message"]["content"] = "<think>\nLima or"  # type: ignore[index]
    server.faults = [Fault("other-body", body=said)]
    with voice(server) as found:
        assert found.ask(["?"], SHOTS, TO_RECALL) == [Answered("", 0.0)]


@pytest.mark.parametrize(
    ("tokens", "said", "confidence"),
    [
        ([(b"a", 0.0)], "b", None),
        ([], "a", None),
        ([(b"a", math.log(0.5)), (b"b", math.log(0.125))], "ab", 0.25),
        # A character over two tokens; what is said last counts.
        ([(b"\xc3", math.log(0.5)), (b"\xa9", math.log(0.125))], "é", 0.25),
        ([(b"a", -8.0), (b" ", -8.0), (b"a", math.log(0.5))], "a", 0.5),
        ([(b" a", math.log(0.5)), (b"\n", -8.0)], "a", 0.5),
        ([(b"a", -math.inf)], "a", 1e-30),
        # Cut within a character.
        ([(b"a", math.log(0.5)), (b"\xc3", math.log(0.125))], "a\ufffd", 0.25),
    ],
)
def test_the_confidence_is_that_of_the_tokens_that_say_it(
    tokens: list[tuple[bytes, float]], said: str, confidence: float | None
) -> None:
    found = confidence_of(tokens, said)
    assert found == (None if confidence is None else pytest.approx(confidence))


def test_without_a_confidence_only_what_needs_none_is_told() -> None:
    asked = [Question("a?", ("b",)), Question("c?", ("d",)), Question("e?", ("f",))]
    right = score(asked, [Answered("b", None), Answered("I do not know", None), Answered("f", 0.9)])
    # Nobody was wrong but who abstained.
    assert (right.right, right.hallucinated, right.confidence) == (2, 0, None)
    wrong = score(asked, [Answered("b", 0.9), Answered("x", None), Answered("y", 0.9)])
    assert (wrong.right, wrong.hallucinated, len(wrong.slips)) == (1, None, 1)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault(503), "2 tries in a row failed"),
        (Fault(401), "refuses the key"),
        (Fault("other-model"), "answers tiny with somebody-else"),
        (Fault("no-choices"), "JSON without choices"),
    ],
)
def test_a_server_that_fails_costs_its_figures_and_nothing_else(
    server: Server, fault: Fault, said: str
) -> None:
    server.faults = [fault] * 40
    found = asked(server)
    assert not found.tasks and found.questions is None
    assert said in found.problems["chain_sum"] and said in found.problems["questions"]
    assert found.again


def test_what_fails_for_one_part_leaves_the_others(server: Server, mind: Mind) -> None:
    server.faults = [Fault(400, where="What is", body={"error": {"message": "filtered"}})] * 4
    found = asked(server)
    assert [task.name for task in found.tasks] == ["chain_sum"]
    assert "the server refuses all of it: 400: filtered" in found.problems["questions"]


def test_one_refused_question_is_one_without_an_answer(server: Server) -> None:
    server.faults = [Fault(400, where="What is 2", body={"error": {"message": "filtered"}})]
    with voice(server) as found:
        answers = found.ask([f"What is {n}?" for n in range(4)], SHOTS, TO_RECALL)
    assert answers[2] == Answered("", 0.0)
    assert all(answer.said for answer in (*answers[:2], answers[3]))


def test_nothing_more_is_asked_once_the_money_is_spent(server: Server) -> None:
    price = Price(input_per_million=1e6, output_per_million=1e6)
    tab = Tab(price=price, left=1.0)
    with voice(server, tab=tab, concurrency=1, price=price.to_wire(), maxCost=9) as found:
        abilities = measure_voice(found, plan(latency=True))
    assert abilities.again
    assert set(abilities.problems) == {"performance", "chain_sum", "questions"}
    assert all("maxCost" in why for why in abilities.problems.values())
    assert len(server.paid) == 1
    assert tab.paid.tokens > 12


@pytest.mark.parametrize("prompting", ["ChatTemplate", "Examples"])
def test_a_server_is_timed_by_the_pieces_of_its_answers(
    server: Server, prompting: Prompting
) -> None:
    with voice(server, prompting) as found:
        speed = found.speed()
    assert [pace.batch for pace in speed.paces] == [1, 8]
    assert all(p.first_token_seconds > 0 and p.tokens_per_second > 0 for p in speed.paces)
    assert speed.device == "the server of tiny" and speed.answer_tokens > 8
    assert speed.memory_bytes is None
    assert server.open_most == 8
    assert len(server.paid) == 1 + 3 + 8 * 4


def test_a_batch_is_no_larger_than_the_server_may_be_asked_at_once(server: Server) -> None:
    with voice(server, concurrency=4) as found:
        assert [pace.batch for pace in found.speed().paces] == [1]
    assert server.open_most == 1


def test_a_server_that_counts_no_tokens_of_pieces_is_timed_by_them(server: Server) -> None:
    refused = {"detail": [{"loc": ["body", "stream_options"], "msg": "Extra inputs"}]}
    server.faults = [Fault(422, body=refused)]
    server.only_max_completion_tokens = True
    with voice(server, concurrency=1) as found:
        speed = found.speed()
    assert speed.answer_tokens > 8
    assert "stream_options" not in server.seen[-1].body


@pytest.mark.parametrize(
    ("fault", "said"),
    [(Fault(503), "503"), (Fault(401), "refuses the key"), (Fault("half"), "no whole answer"),
     (Fault("reset"), "no whole answer")],
)  # fmt: skip
def test_a_server_that_is_not_timed_says_why(server: Server, fault: Fault, said: str) -> None:
    server.faults = [fault]
    with voice(server) as found:
        abilities = measure_voice(found, plan(latency=True))
    assert said in abilities.problems["performance"] and abilities.again


@pytest.mark.parametrize("fault", [Fault("hang", pause=60), Fault(503), Fault(429)])
def test_figures_are_not_waited_for_without_end(server: Server, fault: Fault) -> None:
    # Long before its many tries are over.
    patience = Patience(first_wait=1.0, jitter=0.0, in_all=3.0)
    server.faults = [*[None] * 3, *[fault] * 99]
    spec, began = endpoint(server, maxRetries=99, timeoutSeconds=1, concurrency=1), time.monotonic()
    found = ServedVoice(spec, "ChatTemplate", 12, Tab(), nothing, patience)
    try:
        abilities = measure_voice(found, plan(latency=True))
    finally:
        found.close()
    assert time.monotonic() - began < 20
    assert all("within 3 s" in abilities.problems[name] for name in ("chain_sum", "questions"))
    assert abilities.again
