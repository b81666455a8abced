"""A teacher behind a real server: whatever the server does, every prompt is answered once, alike."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from endpoint_kit import Fault, Mind, Server, Trouble, serving
from kubedistill_api.exit_codes import ExitCode
from kubedistill_api.generation import Generation
from kubedistill_trainer.data.conversation import Message
from kubedistill_trainer.failures import InputsRefused, RunFailure
from kubedistill_trainer.teacher.endpoint import EndpointAnswerer
from kubedistill_trainer.teacher.endpoint_client import Ask, Client, Patience
from kubedistill_trainer.teacher.endpoint_reply import Reply
from kubedistill_trainer.teacher.text import TextAnswer, TextRequest
from prometheus_client import REGISTRY
from unit.test_endpoint_kit import GENERATION, KEY, PROMPTS, QUICK, asked, endpoint, requests

DRIP = Fault("drip", pause=0.05)
HANG = Fault("hang", pause=60)
APART = ("drip", "hang", "other-model", "other-body")


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", KEY)


def limits(fault: Fault) -> tuple[int, Patience]:
    """(timeoutSeconds, patience) by which a fault shows soon, and an answer of a busy machine not."""
    whole = replace(QUICK, whole_answer=0.1)
    return {"hang": (1, QUICK), "drip": (15, whole)}.get(str(fault.what), (60, QUICK))


@pytest.fixture(scope="module")
def calm(mind: Mind) -> dict[tuple[int, int], TextAnswer]:
    with serving(mind) as server:
        return asked(endpoint(server))


def test_the_answers_are_the_models_own(
    server: Server, mind: Mind, calm: dict[tuple[int, int], TextAnswer]
) -> None:
    for (prompt, _), answer in calm.items():
        ids = mind.prompt([{"role": "user", "content": f"question {prompt}"}])
        said, ended = mind.says(ids, {"max_tokens": 6, "temperature": 0})
        assert answer == TextAnswer(
            mind.text(said), finished=ended, prompt_tokens=len(ids), answer_tokens=len(said)
        )
    assert any(answer.text for answer in calm.values())


@pytest.mark.parametrize(
    "fault",
    [
        Fault(429, {"Retry-After": "0.05"}), Fault(429), Fault(500), Fault(503), Fault(529),
        Fault(503, {"retry-after-ms": "20"}),
        *(Fault(what) for what in Trouble.__args__ if what not in APART),
        DRIP, HANG,
    ],
    ids=lambda fault: f"{fault.what}-{len(fault.headers)}",
)  # fmt: skip
def test_every_fault_ends_in_the_same_answers(
    server: Server, calm: dict[tuple[int, int], TextAnswer], fault: Fault
) -> None:
    server.faults = [None, fault, None, fault, fault]
    seconds, patience = limits(fault)
    assert asked(endpoint(server, timeoutSeconds=seconds), patience=patience) == calm
    assert len(server.paid) == PROMPTS
    troubles = 0 if fault.what == "late" else 3
    assert len(server.seen) == PROMPTS + troubles
    assert server.open_most <= 3


def test_draws_follow_the_seed_and_the_settings(server: Server) -> None:
    drawn = Generation(max_tokens=6, temperature=1.0, top_p=0.9)
    wanted = requests(4, samples=2)
    first = asked(endpoint(server), drawn, wanted)
    again = asked(endpoint(server, concurrency=1), drawn, wanted)
    assert first == again
    assert len({answer.text for answer in first.values()}) > 4
    body = server.seen[-1].body
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (1.0, 0.9, 6)
    assert {seen.body["seed"] for seen in server.seen} == {r.seed for r in wanted}


def test_as_many_are_open_as_allowed_and_no_more(server: Server) -> None:
    server.faults = [Fault("late", pause=0.3)] * 12
    asked(endpoint(server, concurrency=4), wanted=requests(12))
    assert server.open_most == 4


def test_requests_are_read_no_further_than_is_asked(server: Server) -> None:
    read: list[int] = []

    def lazily() -> Iterator[TextRequest]:
        for request in requests():
            read.append(request.prompt)
            yield request

    answerer = EndpointAnswerer(endpoint(server), GENERATION, QUICK)
    answers = answerer.answers(lazily())
    for given in range(1, 5):
        next(answers)
        assert len(read) <= given + 2
    answers.close()
    answerer.close()
    assert len(server.seen) <= len(read)


def test_a_refusal_for_its_rate_slows_everybody(
    server: Server, calm: dict[tuple[int, int], TextAnswer]
) -> None:
    """`calm`: the model has warmed up, so that the others are answered well within the wait."""
    server.faults = [Fault(429, {"Retry-After": "1.2"}), *[Fault("late", pause=0.2)] * 2]
    assert asked(endpoint(server)) == calm
    refused = next(seen for seen in server.seen if seen.fault == 429)
    later = [seen.came - refused.left for seen in server.seen[3:]]
    assert len(server.paid) == PROMPTS and len(later) == PROMPTS - 2
    assert min(later) > 1.19


def test_a_rate_is_kept_to_before_it_is_refused(server: Server) -> None:
    spent = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "400ms"}
    server.faults = [Fault("late", spent, pause=0.01)]
    asked(endpoint(server, concurrency=1), wanted=requests(2))
    first, second = server.seen
    assert second.came - first.left > 0.39


@pytest.mark.timeout(30)
@pytest.mark.parametrize("status", [429, 503])
def test_a_wait_of_hours_ends_the_pod_and_not_what_it_was_answered(
    server: Server, status: int
) -> None:
    body = {"error": {"message": "the day's share is used up"}}
    asks = Fault(status, {"Retry-After": "86400"}, body)
    server.faults = [None, None, None, asks, *[Fault("late", pause=0.3)] * 2]
    answerer = EndpointAnswerer(endpoint(server), GENERATION, QUICK)
    given = []
    with pytest.raises(RunFailure) as met:
        for request, _ in answerer.answers(requests()):
            given.append(request.prompt)
    answerer.close()
    assert met.value.code == ExitCode.ENDPOINT_UNAVAILABLE
    assert "86,400 s" in met.value.message and "600 s" in met.value.message
    assert f"{status}: the day's share is used up" in met.value.message
    assert len(given) == len(server.paid) >= 3 and len(server.seen) == len(given) + 1


@pytest.mark.timeout(30)
def test_a_wait_of_hours_beside_an_answer_leaves_the_answer(server: Server) -> None:
    spent = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "10h"}
    server.faults = [None, Fault("late", spent, pause=0.01)]
    found = endpoint(server, concurrency=1)
    answerer = EndpointAnswerer(found, GENERATION, QUICK)
    given = []
    with pytest.raises(RunFailure, match="36,000 s") as met:
        for request, _ in answerer.answers(requests()):
            given.append(request.prompt)
    answerer.close()
    assert met.value.code == ExitCode.ENDPOINT_UNAVAILABLE
    assert given == [0, 1] and len(server.seen) == 2
    # Where nothing more is to be asked, nobody has to wait.
    server.faults = [None, Fault("late", spent, pause=0.01)]
    asked(found, wanted=requests(2))


def test_the_key_is_what_is_wrong_however_long_the_server_wants_peace(server: Server) -> None:
    server.faults = [Fault(401, {"Retry-After": "86400"})]
    with pytest.raises(InputsRefused, match=r"endpoint\.secretRef"):
        asked(endpoint(server))


def test_a_server_with_a_rate_limit_is_asked_no_more_than_it_allows(server: Server) -> None:
    server.limit = (4, 1.0)
    asked(endpoint(server, maxRetries=20))
    times = [seen.came for seen in server.paid]
    assert len(times) == PROMPTS
    refused = [seen for seen in server.seen if seen.fault == 429]
    # Those that were open at once, each time that the limit was met: never a hail of them.
    assert 0 < len(refused) <= 3 * (PROMPTS - 4)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(500), "500"), (Fault("reset"), "no answer"), (Fault("half"), "no answer"),
        (Fault("not-json"), "not JSON"), (Fault("no-choices"), "without choices"),
        (Fault("no-message"), "without a message"), (Fault("list"), "without choices"),
        (DRIP, "no whole answer"), (HANG, "without a byte"),
        (Fault(429), "429"),
    ],
    ids=lambda value: str(value.what) if isinstance(value, Fault) else "",
)  # fmt: skip
def test_a_server_that_stays_so_is_named_and_asked_by_a_later_pod(
    server: Server, fault: Fault, words: str
) -> None:
    server.faults = [fault] * 50
    seconds, patience = limits(fault)
    with pytest.raises(RunFailure) as met:
        found = endpoint(server, maxRetries=2, concurrency=1, timeoutSeconds=seconds)
        asked(found, patience=patience)
    assert met.value.code == ExitCode.ENDPOINT_UNAVAILABLE
    assert "spec.teacher.endpoint.url" in met.value.message and server.url in met.value.message
    assert words in met.value.message and "3 tries" in met.value.message
    assert len(server.seen) == 3


def test_a_server_that_is_gone_is_named(mind: Mind) -> None:
    with serving(mind) as server:
        gone = endpoint(server, maxRetries=1)
    with pytest.raises(RunFailure) as met:
        asked(gone)
    assert met.value.code == ExitCode.ENDPOINT_UNAVAILABLE


@pytest.mark.parametrize(
    ("fault", "field"),
    [
        (Fault(401), "secretRef"), (Fault(403), "secretRef"),
        (Fault(404, body={"error": {"message": "x", "code": "model_not_found"}}), "endpoint.model"),
        (Fault("other-model"), "somebody-else"),
    ],
    ids=["401", "403", "404", "other-model"],
)  # fmt: skip
def test_what_nobody_mends_ends_it_at_once(server: Server, fault: Fault, field: str) -> None:
    server.faults = [None, None, fault, *[None] * 3]
    answerer = EndpointAnswerer(endpoint(server, concurrency=1), GENERATION, QUICK)
    given = []
    with pytest.raises(InputsRefused) as met:
        for request, _ in answerer.answers(requests()):
            given.append(request.prompt)
    answerer.close()
    assert field in met.value.message
    assert met.value.code == ExitCode.BAD_CONFIGURATION
    assert given == [0, 1] and len(server.seen) == 3


def test_a_server_that_turns_every_prompt_away_is_left_after_a_few(server: Server) -> None:
    said = {"error": {"message": "the service is closed on Sundays"}}
    server.faults = [None] * 2 + [Fault(400, body=said)] * 40
    answerer = EndpointAnswerer(endpoint(server), GENERATION, QUICK)
    given = []
    with pytest.raises(InputsRefused, match="closed on Sundays") as met:
        for _, answer in answerer.answers(requests(40)):
            given.append(answer.refusal)
    answerer.close()
    assert "spec.teacher.endpoint.url" in met.value.message
    # The third is asked beside the first two, and may be answered sooner.
    assert given == ["", ""] and len(server.seen) <= 2 + 8 + 2


def test_an_answer_that_comes_after_the_end_brings_no_refusals_with_it(server: Server) -> None:
    late = Fault("late", pause=1.5)
    server.faults = [late, *[Fault(400)] * 40]
    answerer = EndpointAnswerer(endpoint(server), GENERATION, QUICK)
    given = []
    with pytest.raises(InputsRefused, match="in a row"):
        for _, answer in answerer.answers(requests(40)):
            given.append(answer.refusal)
    answerer.close()
    assert given == [""]


def test_what_was_paid_for_is_given_out_before_the_end(server: Server) -> None:
    server.faults = [Fault("late", pause=0.3), Fault("late", pause=0.3), Fault(401)]
    answerer = EndpointAnswerer(endpoint(server), GENERATION, QUICK)
    given = []
    with pytest.raises(InputsRefused):
        for request, _ in answerer.answers(requests()):
            given.append(request.prompt)
    answerer.close()
    assert sorted(given) == sorted({0, 1, 2} - {_prompt_of(server, 401)})
    assert len(server.paid) == len(given) == 2


def _prompt_of(server: Server, fault: int) -> int:
    [seen] = [seen for seen in server.seen if seen.fault == fault]
    return int(seen.body["messages"][0]["content"].rsplit(" ", 1)[1])


def test_one_prompt_that_does_not_fit_is_refused_alone(
    server: Server, calm: dict[tuple[int, int], TextAnswer]
) -> None:
    long = TextRequest(99, 0, (Message("user", "word " * 600),), seed=0)
    answers = asked(endpoint(server), wanted=[*requests(3), long, *requests()[3:]])
    refused = answers.pop((99, 0))
    assert "maximum context length is 512" in refused.refusal and not refused.text
    assert answers == calm
    assert len(server.seen) == PROMPTS + 1


def test_reasoning_is_kept_apart(server: Server) -> None:
    server.reasons = "one thing after the other"
    answers = asked(endpoint(server), wanted=requests(2))
    assert {answer.reasoning for answer in answers.values()} == {"one thing after the other"}


def test_a_limit_by_another_name_is_found_out(
    server: Server, calm: dict[tuple[int, int], TextAnswer]
) -> None:
    server.only_max_completion_tokens = True
    assert asked(endpoint(server)) == calm
    assert len(server.paid) == PROMPTS and len(server.seen) <= PROMPTS + 3


def test_a_server_that_knows_no_seed_does_without(
    server: Server, calm: dict[tuple[int, int], TextAnswer]
) -> None:
    server.knows_seed = False
    assert asked(endpoint(server)) == calm
    assert len(server.paid) == PROMPTS and len(server.seen) <= PROMPTS + 3
    seedy = {"error": {"message": "no word of a seed here, please"}}
    # The first is told off, and asked again without.
    server.faults = [None, None, Fault(400, body=seedy)]
    answers = asked(endpoint(server, concurrency=1), wanted=requests(3)[1:])
    assert [bool(answer.refusal) for answer in answers.values()] == [False, True]


@pytest.mark.timeout(20)
def test_what_is_open_is_given_up_at_the_end(server: Server) -> None:
    server.faults = [Fault("hang", pause=60), Fault(429, {"Retry-After": "60"})]
    client = Client(endpoint(server, timeoutSeconds=90), QUICK)
    body = {"model": "tiny", "messages": []}
    futures = [client.start(Ask("chat/completions", Reply.json, lambda: body)) for _ in range(2)]
    while len(server.seen) < 2:
        time.sleep(0.01)
    client.close()
    client.close()
    assert [future.cancelled() for future in futures] == [True, True]


def test_what_was_asked_and_paid_is_counted(
    server: Server, calm: dict[tuple[int, int], TextAnswer]
) -> None:
    def counts() -> dict[str, float]:
        return {
            label: REGISTRY.get_sample_value(f"distill_endpoint_{name}_total", {key: label}) or 0
            for name, key, labels in (
                ("requests", "result", ("answered", "refused", "retried", "failed")),
                ("tokens", "kind", ("prompt", "answer")),
            )
            for label in labels
        }

    before = counts()
    server.faults = [None, Fault(500), Fault("half"), None, Fault(400)]
    asked(endpoint(server, concurrency=1))
    found = {name: count - before[name] for name, count in counts().items()}
    # In order: the second prompt is asked for three times, and the third is refused.
    kept = [answer for (prompt, _), answer in calm.items() if prompt != 2]
    assert found == {
        "answered": PROMPTS - 1, "refused": 1, "retried": 2, "failed": 0,
        "prompt": sum(answer.prompt_tokens for answer in kept),
        "answer": sum(answer.answer_tokens for answer in kept),
    }  # fmt: skip
