"""What a reply's status, headers and names mean: pure functions."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from kubedistill_api.exit_codes import ExitCode
from kubedistill_trainer.failures import InputsRefused
from kubedistill_trainer.teacher.endpoint import read_answer
from kubedistill_trainer.teacher.endpoint_pace import Pace, asked_wait
from kubedistill_trainer.teacher.endpoint_reply import (
    Again,
    PromptRefused,
    Reply,
    check_status,
    complaint_of,
    same_model,
)

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("status", "headers", "wait"),
    [
        (429, {"retry-after": "7"}, 7),
        (429, {"retry-after": "0.25"}, 0.25),
        (503, {"retry-after": "Sun, 01 Mar 2026 12:01:30 GMT"}, 90),
        (503, {"retry-after": "Sun, 01 Mar 2026 11:00:00 GMT"}, 0),
        (429, {"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        (429, {"retry-after": "soon"}, None),
        (429, {"retry-after": "-3"}, None),
        (429, {}, None),
        (200, {"retry-after": "7"}, None),
        (200, {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0s"}, 360),
        (200, {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "20ms"}, 0.02),
        (200, {"x-ratelimit-remaining-requests": "3", "x-ratelimit-reset-requests": "6m0s"}, None),
        (
            200,
            {
                "x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1s",
                "x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "2m59.56s",
            },
            179.56,
        ),
        (200, {"x-ratelimit-remaining": "0", "x-ratelimit-reset": str(int(NOW.timestamp()) + 5)}, 5),
        (200, {"x-ratelimit-remaining": "0", "x-ratelimit-reset": "2026-03-01T12:00:10Z"}, 10),
        (200, {"x-ratelimit-remaining": "0"}, None),
    ],
)  # fmt: skip
def test_what_a_server_asks_for(status: int, headers: dict[str, str], wait: float | None) -> None:
    found = asked_wait(status, headers, NOW)
    assert found is wait is None or found == pytest.approx(wait, abs=1e-6)


async def test_a_hold_is_everybodys_and_only_grows() -> None:
    now = 0.0
    pace = Pace(lambda: now)
    pace.hold(0.02)
    pace.hold(0.01)
    assert pace._until == 0.02
    now = 1.0
    await pace.ready()


def reply(status: int, content: object = None, text: str = "") -> Reply:
    return Reply(status, {}, text.encode() if content is None else json.dumps(content).encode())


def error(message: str, code: str = "", param: str = "") -> dict[str, object]:
    return {"error": {"message": message, "code": code, "param": param, "type": "t"}}


def met(found: Reply) -> Exception | None:
    try:
        check_status(found, "http://s/v1", "big", None)
    except (Again, PromptRefused, InputsRefused) as raised:
        return raised
    return None


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 529])
def test_what_may_pass(status: int) -> None:
    found = met(reply(status, error("busy")))
    assert isinstance(found, Again)
    assert found.everybody == (status == 429)


@pytest.mark.parametrize(
    ("found", "field", "words"),
    [
        (reply(401, error("wrong key")), "endpoint.secretRef", "wrong key"),
        (reply(403, text="forbidden"), "endpoint.secretRef", "forbidden"),
        (reply(402, text=""), "endpoint.secretRef", "paid"),
        (reply(429, error("pay", "insufficient_quota")), "endpoint.secretRef", "top the account"),
        (reply(404, error("no", "model_not_found")), "endpoint.model", "no big"),
        (reply(404, {"object": "error", "message": "The model `big` does not exist."}),
         "endpoint.model", "does not exist"),
        (reply(404, {"detail": "Not Found"}), "endpoint.url", "Not Found"),
        (reply(405, text="no"), "endpoint.url", "/v1"),
        (reply(301, text=""), "endpoint.url", "301"),
        (reply(501, text=""), "endpoint.url", "501"),
        (reply(400, error("no", "unsupported_value", "temperature")),
         "spec.distill.generation.temperature", "does not take temperature"),
    ],
)  # fmt: skip
def test_what_a_person_has_to_mend(found: Reply, field: str, words: str) -> None:
    refused = met(found)
    assert isinstance(refused, InputsRefused)
    assert refused.code == ExitCode.BAD_CONFIGURATION
    assert field in refused.message and words in refused.message


@pytest.mark.parametrize(
    "found",
    [
        reply(400, error("too long", "context_length_exceeded", "messages")),
        reply(400, error("max_tokens is too large: the context length is 9", param="max_tokens")),
        reply(400, error("filtered", "content_filter")),
        reply(422, {"detail": [{"msg": "bad"}]}),
        reply(413, text="Payload Too Large"),
    ],
)
def test_what_is_about_one_prompt(found: Reply) -> None:
    assert isinstance(met(found), PromptRefused)


def test_words_of_many_shapes() -> None:
    assert complaint_of(b'{"error": "plain"}').message == "plain"
    assert complaint_of(b"<html>\n busy </html>").message == "<html> busy </html>"
    assert complaint_of(b'["x"]').message == '["x"]'
    assert complaint_of(b"").message == ""
    assert len(complaint_of(b"x" * 10_000).message) <= 300


@pytest.mark.parametrize(
    ("wanted", "found", "same"),
    [
        ("gpt-4o", "gpt-4o", True),
        ("gpt-4o", "gpt-4o-2024-08-06", True),
        ("gpt-4o", "gpt-4o-mini", False),
        ("gpt-4o", "gpt-4o-mini-2024-07-18", False),
        ("gpt-4", "gpt-4-1106-preview", True),
        ("gpt-4", "gpt-4o", False),
        ("gpt-4o-2024-05-13", "gpt-4o-2024-08-06", False),
        ("mistral-large-latest", "mistral-large-2411", True),
        ("llama-3", "llama-3-405b", False),
        ("meta/llama-3-8b", "llama-3-8b", True),
        ("meta/llama-3-8b", "other/llama-3-8b", False),
        ("Tiny", "tiny", True),
    ],
)
def test_versions_are_the_model_and_siblings_are_not(wanted: str, found: str, same: bool) -> None:
    assert same_model(wanted, found) is same


def chat(message: object, end: str = "stop", **more: object) -> Reply:
    choices = [{"message": message, "finish_reason": end}]
    return reply(200, {"model": "big", "choices": choices, **more})


def test_answers_as_servers_write_them() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 9}
    for name in ("reasoning", "reasoning_content"):
        found = read_answer(chat({"content": "4", name: "2+2"}, usage=usage), "big", "u")
        assert (found.text, found.reasoning, found.finished) == ("4", "2+2", True)
        assert (found.prompt_tokens, found.answer_tokens) == (3, 9)
    cut = read_answer(chat({"content": None, "reasoning": "so"}, "length"), "big", "u")
    assert (cut.text, cut.reasoning, cut.finished) == ("", "so", False)


@pytest.mark.parametrize(
    "message", [{"content": None}, {"content": 5}, {}, {"content": "x", "reasoning": 5}]
)
def test_a_message_of_another_shape_is_asked_again(message: object) -> None:
    with pytest.raises(Again):
        read_answer(chat(message), "big", "u")


@pytest.mark.parametrize(
    "found", [chat({"content": ""}, "content_filter"), chat({"refusal": "no"})]
)
def test_what_the_server_withholds_is_a_refusal(found: Reply) -> None:
    with pytest.raises(PromptRefused):
        read_answer(found, "big", "u")
