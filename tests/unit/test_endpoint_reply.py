"""What a reply's status, headers and names mean: pure functions."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from kubedistill_api.exit_codes import ExitCode
from kubedistill_trainer.failures import InputsRefused
from kubedistill_trainer.teacher.endpoint_answer import read_answer
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
        (200, {"x-ratelimit-remaining": "0", "x-ratelimit-reset": f"{NOW.timestamp() + 5:.0f}000"}, 5),
        (200, {"x-ratelimit-remaining": "0", "x-ratelimit-reset": "1735689600000"}, 0),
        (200, {"x-ratelimit-remaining": "0", "x-ratelimit-reset": "1000000000"}, 0),
        (429, {"retry-after": str(int(NOW.timestamp()) + 60)}, 60),
        (429, {"retry-after": "99999999"}, 99_999_999),
        (429, {"retry-after": "1e400"}, None),
        (429, {"retry-after": "  "}, None),
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
        (reply(400, {"error": {"message": "API key not valid. Please pass a valid API key.",
                               "code": 400, "status": "INVALID_ARGUMENT"}}),
         "endpoint.secretRef", "API key not valid"),
        (reply(400, error("Incorrect API key provided")), "endpoint.secretRef", "Incorrect"),
        (reply(400, error("no", "invalid_api_key")), "endpoint.secretRef", "no"),
        (reply(422, error("the api_key is expired")), "endpoint.secretRef", "expired"),
        (reply(400, error("big is not a valid model ID")), "endpoint.model", "not a valid"),
        (reply(400, error("The model `big` does not exist")), "endpoint.model", "no big"),
        (reply(400, error("choose another", param="model")), "endpoint.model", "choose"),
        (reply(422, {"detail": [{"loc": ["body", "model"], "msg": "unknown model"}]}),
         "endpoint.model", "unknown model"),
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
        reply(400, error("This model's maximum context length is 9: not a valid model input")),
        reply(400, error("the model was not able to read what the keys of the piano are")),
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
        ("gpt-4", "gpt-4-0613", True),
        ("x", "x@20240101", True),
        ("x", "x-20240101-preview", True),
        ("m", "m:latest", True),
        ("m:latest", "m", True),
        ("m", "m:7b", False),
        ("bloom", "bloom-560", False),
        ("pythia", "pythia-1000", False),
        ("llama-3", "llama-3-8000", False),
        ("qwen2", "qwen2-72000", False),
        ("x", "x-12345678", False),
    ],
)
def test_versions_are_the_model_and_siblings_are_not(wanted: str, found: str, same: bool) -> None:
    assert same_model(wanted, found) is same


def chat(message: object, end: object = "stop", **more: object) -> Reply:
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
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert read_answer(chat({"content": parts}), "big", "u").text == "one two"


@pytest.mark.parametrize(
    ("end", "finished"),
    [
        ("stop", True), (None, True), ("length", False), ("max_tokens", False), ("error", False),
        ("tool_calls", False), ({"type": "stop"}, False),
    ],
)  # fmt: skip
def test_what_did_not_stop_is_unfinished(end: object, finished: bool) -> None:
    assert read_answer(chat({"content": "half an ans"}, end), "big", "u").finished is finished
    bare = reply(200, {"choices": [{"message": {"content": "whole"}}]})
    assert read_answer(bare, "big", "u").finished


@pytest.mark.parametrize(
    ("message", "end"),
    [
        ({"content": None}, None), ({"content": None}, "error"), ({"content": 5}, "stop"),
        ({}, None), ({"content": "x", "reasoning": 5}, "stop"), ({"content": [None]}, "stop"),
        ({"content": ["x"]}, "stop"), ({"content": [{"type": "text", "text": 5}]}, "stop"),
        ({"content": [{"type": "image", "url": "u"}]}, "stop"),
    ],
)  # fmt: skip
def test_a_message_of_another_shape_is_asked_again(message: object, end: object) -> None:
    with pytest.raises(Again):
        read_answer(chat(message, end), "big", "u")


USAGE = {"prompt_tokens": 7, "completion_tokens": 2}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (chat({"content": ""}, "content_filter", usage=USAGE), "content filter"),
        (chat({"refusal": "no \ud83d"}, usage=USAGE), "no \ufffd"),
        (chat({"content": [{"type": "refusal", "refusal": "no"}]}, usage=USAGE), "no"),
        (chat({"content": None}, usage=USAGE), "without text"),
        (chat({"content": None, "tool_calls": [{"id": "x"}]}, "tool_calls", usage=USAGE),
         "tool_calls"),
    ],
)  # fmt: skip
def test_what_the_server_withholds_is_a_refusal_and_paid_for(found: Reply, words: str) -> None:
    with pytest.raises(PromptRefused, match=words) as met:
        read_answer(found, "big", "u")
    assert (met.value.prompt_tokens, met.value.answer_tokens) == (7, 2)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (rb"hi \ud83d", "hi \ufffd"), (rb"\ude00 hi", "\ufffd hi"), (b"\xed\xa0\xbdA", "\ufffdA"),
        (rb"\ud83d\ude00 \ud83dA", "\U0001f600 \ufffdA"), (rb"\\ud83d", r"\ud83d"),
    ],
)  # fmt: skip
def test_halves_of_characters_are_marked(raw: bytes, text: str) -> None:
    body = b'{"choices":[{"message":{"content":"%s","reasoning":"%s"}}]}' % (raw, raw)
    found = read_answer(Reply(200, {}, body), "big", "u")
    assert (found.text, found.reasoning) == (text, text)
    found.text.encode()
    said = complaint_of(b'{"error":{"message":"%s","code":"%s","param":"%s"}}' % (raw, raw, raw))
    assert (said.message, said.code, said.setting) == (text, text, text)


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        (USAGE, (7, 2)), (None, (0, 0)), ([], (0, 0)), ({"prompt_tokens": 7}, (7, 0)),
        ({"prompt_tokens": -7, "completion_tokens": -2}, (0, 0)),
        ({"prompt_tokens": True, "completion_tokens": 2.5}, (0, 0)),
        ({"prompt_tokens": 2**40, "completion_tokens": 2**40 + 1}, (2**40, 0)),
        ({"prompt_tokens": "7", "completion_tokens": None}, (0, 0)),
    ],
)  # fmt: skip
def test_counts_that_cannot_be_are_none(usage: object, counts: tuple[int, int]) -> None:
    found = read_answer(chat({"content": "x"}, usage=usage), "big", "u")
    assert (found.prompt_tokens, found.answer_tokens) == counts
    assert not isinstance(found.prompt_tokens, bool)


def test_what_is_nested_too_deeply_is_of_another_shape() -> None:
    deep = b"[" * 200_000
    with pytest.raises(Again, match="not JSON"):
        read_answer(Reply(200, {}, deep), "big", "u")
    assert complaint_of(deep).message.startswith("[[[")
    assert isinstance(met(Reply(503, {}, deep)), Again)
    assert isinstance(met(Reply(400, {}, deep)), PromptRefused)
    half = b'{"error":{"message":"\\ud83d","x":' + b"[" * 900 + b"]" * 900 + b"}}"
    assert complaint_of(half).message
