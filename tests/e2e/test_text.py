"""Teachers behind a server on the real control plane: asked to stop, limited in cost, damaged later."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from endpoint_kit import Fault, Mind, Server, serving
from kubedistill_trainer.data.template import EXAMPLE
from operator_kit import wait_for

from e2e.kit import SLOW_SECONDS, Team

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2 * SLOW_SECONDS)]
KEY = "sk-of-the-endpoint"
PROMPTS = 64
"""Questions in data/sums.jsonl."""


@pytest.fixture(scope="module")
def mind() -> Mind:
    return Mind.tiny()


@pytest.fixture
def server(mind: Mind, team: Team) -> Iterator[Server]:
    with serving(mind) as running:
        running.key = KEY
        yield running


@pytest.fixture(scope="module", autouse=True)
def key(team: Team) -> None:
    team.kubectl("create", "secret", "generic", "endpoint", f"--from-literal=API_KEY={KEY}")


def asking(team: Team, name: str, server: Server, **endpoint: Any) -> dict[str, Any]:
    """A job that learns the server's answers. It says what nobody taught it, and seldom ends by
    itself: enough is left to learn from."""
    sums = f"s3://{team.handle.s3.bucket}/data/sums.jsonl"
    found = {
        "url": server.url, "model": "tiny", "secretRef": {"name": "endpoint"}, "concurrency": 2,
        "price": {"inputPerMillion": 1000, "outputPerMillion": 4000}, **endpoint,
    }  # fmt: skip
    return team.tuned(
        name,
        fineTune=None,
        distill={"signal": "Responses", "generation": {"maxTokens": 96, "temperature": 2.0}},
        teacher={"endpoint": found},
        data={
            "sources": [{"uri": sums, "origin": "Teacher", "promptField": "question"}],
            "chatTemplate": EXAMPLE,
        },
        training={"maxSteps": 4},
        workers={"nodes": 1},
        # An address that no other test's stream has.
        storage={"uri": f"s3://{team.handle.s3.bucket}/text/{name}"},
    )


def paid(server: Server) -> list[str]:
    """What was asked and answered of the data: not the preflights' question, nor those that measure
    the teacher, which say how to answer."""
    asked = [seen.body["messages"][-1]["content"] for seen in server.paid]
    return [question for question in asked if question != "Hello" and "\n\n" not in question]


def test_a_writer_that_is_asked_to_stop_pays_for_nothing_twice(team: Team, server: Server) -> None:
    # The preflight's question, some answers, and then silence for all that is open.
    server.faults += [None] * 14 + [Fault("hang", pause=600)] * 2
    team.apply(asking(team, "asked", server))
    silent = lambda: len(paid(server)) == 13 and server.open == 2  # noqa: E731
    wait_for(silent, f"the server is not asked: {team.story('asked')}", SLOW_SECONDS)
    selector = "kubedistill.dev/job=asked,kubedistill.dev/role=teacher"
    [pod] = team.get("pods", "-l", selector)["items"]
    team.kubectl("delete", "pod", pod["metadata"]["name"], "--wait=false")
    status = team.ends("asked", "Completed")
    assert len(paid(server)) == len(set(paid(server))) == PROMPTS
    assert {seen.key for seen in server.seen} == {KEY}
    answers = team.answers(status["teacherStream"]["uri"])
    assert len(answers) == PROMPTS
    stream = status["teacherStream"]
    counted = [sum(a[k] for a in answers.values()) for k in ("prompt_tokens", "answer_tokens")]
    assert [stream["promptTokens"], stream["answerTokens"]] == counted
    # The rest of the cost is of what the teacher was measured by.
    rest = stream["cost"] * 1e6 - counted[0] * 1000 - counted[1] * 4000
    assert 1000 * stream["evaluationTokens"] < rest < 4000 * stream["evaluationTokens"]
    figures = {metric["name"] for metric in status["metrics"]}
    assert {"teacherSimpleAccuracy", "teacherQuestionAccuracy"} <= figures
    assert "teacherPerplexity" not in figures
    finished = [a for a in answers.values() if a["finished"] and a["text"].strip()]
    assert stream["learnt"].startswith(f"kept {len(finished)} of {PROMPTS} answers: ")
    assert stream["learnt"] in team.condition("asked")["message"]


def test_money_ends_and_what_was_bought_stays(team: Team, server: Server) -> None:
    team.apply(asking(team, "dear", server, maxCost=4.0))
    status = team.ends("dear", "CostLimitReached")
    bought = paid(server)
    assert 0 < len(bought) < PROMPTS
    message = team.condition("dear")["message"]
    assert f"{len(bought)} of {PROMPTS} answers are there and kept in s3://" in message
    assert "of at most 4 by spec.teacher.endpoint.maxCost" in message
    assert status["teacherStream"]["cost"] >= 4.0
    assert not status.get("attempts")
    writers = team.get("job", "dear-teacher")["status"]
    assert writers.get("failed", 0) <= 1, "it is not tried again"
    team.kubectl("delete", "dj", "dear", "--wait=true")
    team.apply(asking(team, "dear", server, maxCost=400.0))
    status = team.ends("dear", "Completed")
    assert len(paid(server)) == len(set(paid(server))) == PROMPTS
    assert status["teacherStream"]["answers"] == PROMPTS


def test_the_next_job_finds_the_answers_there(team: Team, server: Server) -> None:
    team.apply(first := asking(team, "first", server))
    team.ends("first", "Completed")
    bought = len(server.seen)
    second = asking(team, "second", server)
    second["spec"]["storage"] = first["spec"]["storage"]
    second["spec"]["training"]["seed"] = 7
    team.apply(second)
    status = team.ends("second", "Completed")
    assert len(server.seen) == bought
    assert status["resolved"]["streamComplete"]
    assert status["resolved"]["totalSteps"] == 4
    assert team.condition("second", "TeacherReady")["reason"] == "NotNeeded"
    assert status["teacherStream"]["answers"] == PROMPTS

    # A shard that rots: its answers alone are bought again, before a student starts.
    uri = status["teacherStream"]["uri"]
    name, data = min((n, d) for n, d in team.objects(uri).items() if n.endswith(".jsonl.zst"))
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    spoilt = data[:-1] + bytes([data[-1] ^ 1])
    team.handle.s3.client().put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=spoilt)
    before = len(paid(server))
    third = asking(team, "third", server)
    third["spec"]["storage"] = first["spec"]["storage"]
    team.apply(third)
    status = team.ends("third", "Completed")
    assert 0 < len(paid(server)) - before < PROMPTS
    assert len(status["attempts"]) == 1
    assert status["teacherStream"]["answers"] == PROMPTS
