"""Answers that a server sends piece by piece, as servers really do: when each piece came."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from endpoint_kit import Fault, Server
from kubedistill_api.teacher import Endpoint
from kubedistill_trainer.failures import InputsRefused
from kubedistill_trainer.teacher.endpoint import CHAT
from kubedistill_trainer.teacher.endpoint_client import Client, Patience
from kubedistill_trainer.teacher.endpoint_reply import Again, PromptRefused
from kubedistill_trainer.teacher.endpoint_stream import Timing

DONE = b"data: [DONE]\n\n"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream": True}
COUNTED = {"prompt_tokens": 60, "completion_tokens": 32}


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    endpoint = Endpoint.model_validate({"url": server.url, "model": "tiny", "timeoutSeconds": 10})
    found = Client(endpoint, Patience(whole_answer=0.2))
    try:
        yield found
    finally:
        found.close()


def event(piece: dict[str, Any], end: str = "\n\n") -> bytes:
    return f"data: {json.dumps(piece, ensure_ascii=False)}{end}".encode()


def said(content: Any, **more: Any) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": content}}], **more})


def used(**more: Any) -> bytes:
    return event({"choices": [], "usage": {**COUNTED, **more}})


def asked(client: Client, server: Server, parts: list[bytes], pause: float = 0.005) -> Timing:
    server.faults = [Fault("pieces", body=parts, pause=pause)]
    return client.start_timed(CHAT, BODY).result(30)


@pytest.mark.parametrize(
    "parts",
    [
        [said("a"), said("b"), used(), DONE],
        [said("a"), said("b"), used()],
        [part.replace(b"\n", b"\r\n") for part in (said("a"), said("b"), used(), DONE)],
        [part.replace(b"\n", b"\r") for part in (said("a"), said("b"), used(), DONE)],
        [b": keep-alive\n\n", said("a"), b": keep-alive\n\n", said("b"), used(), DONE],
        [part.replace(b"data: ", b"data:") for part in (said("a"), said("b"), used(), DONE)],
        [b"event: x\nid: 1\n" + said("a"), said("b"), used(), DONE],
        [event({"choices": [], "prompt_filter_results": []}), said("a"), said("b"), used(), DONE],
        [said("a", usage=None), said("b", usage=None), used(), DONE],
        [said("a", usage={**COUNTED, "completion_tokens": 1}), said("b"), used(), DONE],
        [said([{"type": "text", "text": "a"}]), said([{"type": "text", "text": "b"}]), used(), DONE],
        # What ends a line in Python and in no stream of events.
        [said("a\u2028"), said("b\u0085"), used(), DONE],
        [said("a")[:9], said("a")[9:], said("b"), used(), DONE],
    ],
)  # fmt: skip
def test_pieces_are_read_however_they_are_written(
    client: Client, server: Server, parts: list[bytes]
) -> None:
    found = asked(client, server, parts)
    assert len(found.times) == 2 and found.times[0] < found.times[1]
    assert (found.prompt_tokens, found.answer_tokens) == (60, 32)


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        ([said("a"), event({"error": {"message": "overloaded", "code": 503}}), DONE], "overloaded"),
        ([b"event: error\n" + event({"error": "overloaded"})], "overloaded"),
        ([event({"object": "error", "message": "overloaded", "code": 503})], "overloaded"),
        ([said("a"), b"data: {\n\n"], "not JSON"),
        ([b"data: " + b"[" * 100_000 + b"\n\n"], "not JSON"),
        ([b": keep-alive\n\n"], "before it had said anything"),
    ],
)
def test_an_answer_that_fails_on_its_way_is_none(
    client: Client, server: Server, parts: list[bytes], found: str
) -> None:
    with pytest.raises(Again, match=found):
        asked(client, server, parts)


def test_the_key_is_in_no_error(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "sk-secret")
    endpoint = Endpoint.model_validate({"url": server.url, "model": "tiny"})
    client = Client(endpoint)
    try:
        with pytest.raises(Again, match=r"no \*\*\*") as caught:
            asked(client, server, [event({"error": {"message": "no sk-secret"}})])
    finally:
        client.close()
    assert "sk-secret" not in str(caught.value)


def test_pieces_of_another_model_are_none_of_the_teachers(client: Client, server: Server) -> None:
    parts = [said("a", model="tiny"), said("b", model="somebody-else"), used(), DONE]
    with pytest.raises(InputsRefused, match="answers tiny with somebody-else"):
        asked(client, server, parts)


def test_an_answer_without_text_is_paid_for_and_does_not_pass(
    client: Client, server: Server
) -> None:
    ended = event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
    with pytest.raises(PromptRefused, match="without pieces of text") as caught:
        asked(client, server, [said(""), ended, used(), DONE])
    assert (caught.value.prompt_tokens, caught.value.answer_tokens) == (60, 32)
    # A server that knows no `stream`.
    server.streams = False
    with pytest.raises(PromptRefused, match="without pieces of text") as caught:
        client.start_timed(CHAT, BODY).result(30)
    assert caught.value.prompt_tokens > 0 and caught.value.answer_tokens > 0


def test_hidden_reasoning_is_paid_for_and_takes_no_time_between_pieces(
    client: Client, server: Server
) -> None:
    details = {"completion_tokens_details": {"reasoning_tokens": 30}}
    found = asked(client, server, [said("a"), said("b"), used(**details), DONE])
    assert (found.answer_tokens, found.said_tokens) == (32, 2)
    thought = event({"choices": [{"index": 0, "delta": {"reasoning_content": "hm"}}]})
    found = asked(client, server, [thought, said("a"), said("b"), used(**details), DONE])
    assert (found.answer_tokens, found.said_tokens) == (32, 32)
    details = {"completion_tokens_details": {"reasoning_tokens": 32}}
    found = asked(client, server, [said("a"), said("b"), used(**details), DONE])
    assert found.said_tokens == 2


def test_an_answer_that_drips_for_ever_is_given_up(client: Client, server: Server) -> None:
    began = time.monotonic()
    with pytest.raises(Again, match="no whole answer within 2 s"):
        asked(client, server, [b": keep-alive\n\n"] * 2000, pause=0.01)
    assert time.monotonic() - began < 8


def test_a_connection_is_used_again(client: Client, server: Server) -> None:
    for _ in range(3):
        client.start_timed(CHAT, BODY).result(30)
    assert len({seen.port for seen in server.seen}) == 1


def test_a_server_that_does_not_close_after_the_end_is_not_waited_for(
    client: Client, server: Server
) -> None:
    parts = [said("a"), said("b"), used(), DONE, *([b"\n"] * 2000)]
    assert len(asked(client, server, parts, pause=0.01).times) == 2


def test_what_a_server_asks_to_wait_holds_for_all(client: Client, server: Server) -> None:
    server.faults = [Fault(429, headers={"Retry-After": "0.5"})]
    with pytest.raises(Again):
        client.start_timed(CHAT, BODY).result(30)
    client.start_timed(CHAT, BODY).result(30)
    refused, answered = server.seen
    assert answered.came - refused.left > 0.4
