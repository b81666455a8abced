"""What is wrong with an endpoint is said in one message, before anything is paid for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import data_kit
import pytest
from endpoint_kit import Fault, Mind, Server, serving
from kubedistill_api.exit_codes import ExitCode
from kubedistill_api.job import DistillationJobSpec
from kubedistill_trainer.failures import InputsRefused, RunFailure
from kubedistill_trainer.teacher.endpoint_client import Patience
from kubedistill_trainer.teacher.endpoint_preflight import check_endpoint

QUICK = Patience(first_wait=0.01, longest_wait=0.02, jitter=0.0)


@pytest.fixture
def server(mind: Mind, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("API_KEY", "sk-1")
    with serving(mind) as running:
        yield running


def spec(server: Server, model: str = "tiny", **generation: Any) -> DistillationJobSpec:
    prompts = {"uri": "s3://data/p.jsonl", "promptField": "q", "origin": "Teacher"}
    run = data_kit.job(
        prompts,
        fineTune=None,
        distill={"signal": "Responses", "generation": {"maxTokens": 6, **generation}},
        teacher={"endpoint": {"url": server.url, "model": model}},
    )
    return run.spec


def check(server: Server, **changes: Any) -> None:
    check_endpoint(spec(server, **changes), data_kit.tokenizer(), QUICK)


@pytest.mark.parametrize("says", [False, True])
def test_a_sound_endpoint_is_asked_one_thing(server: Server, says: bool) -> None:
    """For one token where it says how large its context is; else for what the run will ask for."""
    server.says_context = server.mind.context if says else None
    check(server, temperature=0.3, topP=0.5, maxTokens=20)
    [seen] = server.seen
    assert seen.body["max_tokens"] == (1 if says else 20)
    assert (seen.body["temperature"], seen.body["top_p"]) == (0.3, 0.5)


def test_a_job_without_endpoint_asks_nobody(server: Server) -> None:
    run = data_kit.job({"uri": "s3://data/a.txt"})
    check_endpoint(run.spec, data_kit.tokenizer(), QUICK)
    assert not server.seen


@pytest.mark.parametrize("lists", [True, False])
def test_no_such_model(server: Server, lists: bool) -> None:
    server.lists_models = lists
    server.other_models = ["huge"]
    with pytest.raises(InputsRefused) as met:
        check(server, model="tony")
    assert "spec.teacher.endpoint.model" in met.value.message and "tony" in met.value.message
    assert ("write one of: huge, tiny" in met.value.message) == lists
    assert len(server.seen) == (0 if lists else 1)


@pytest.mark.parametrize("lists", [True, False])
def test_the_key_is_refused(server: Server, lists: bool) -> None:
    server.lists_models = lists
    server.key = "sk-2"
    with pytest.raises(InputsRefused, match=r"endpoint\.secretRef") as met:
        check(server)
    assert "sk-1" not in met.value.message


def test_another_model_answers(server: Server) -> None:
    server.answers_as = "tiny-mini"
    with pytest.raises(InputsRefused, match="answers tiny with tiny-mini"):
        check(server)
    server.answers_as = "tiny-2024-08-06"
    check(server)


def test_nobody_is_there(mind: Mind) -> None:
    with serving(mind) as gone:
        pass
    with pytest.raises(RunFailure, match=r"endpoint\.url") as met:
        check(gone)
    assert met.value.code == ExitCode.ENDPOINT_UNAVAILABLE


def test_another_server_is_there(server: Server) -> None:
    server.lists_models = False
    server.faults = [Fault(404, body={"detail": "Not Found"})]
    with pytest.raises(InputsRefused, match=r"spec\.teacher\.endpoint\.url"):
        check(server)


def test_a_setting_that_the_server_does_not_take(server: Server) -> None:
    said = {"message": "only 1 is supported", "param": "temperature", "code": "unsupported_value"}
    server.faults = [Fault(400, body={"error": said})]
    with pytest.raises(InputsRefused, match=r"spec\.distill\.generation\.temperature"):
        check(server)


@pytest.mark.parametrize("says", [False, True])
def test_more_tokens_than_the_context_has(server: Server, says: bool) -> None:
    server.says_context = server.mind.context if says else None
    with pytest.raises(InputsRefused, match=r"spec\.distill\.generation\.maxTokens") as met:
        check(server, maxTokens=4096)
    words = "max_model_len 512" if says else "maximum context length is 512 tokens, and you asked"
    assert words in met.value.message and "4096" in met.value.message
    assert not server.paid and len(server.seen) == (0 if says else 1)


def test_a_context_that_is_none_says_nothing(server: Server) -> None:
    server.says_context = -5
    check(server, maxTokens=20)
    assert server.seen[0].body["max_tokens"] == 20


def test_a_fault_that_passes_is_none(server: Server) -> None:
    server.faults = [Fault(503), Fault("reset")]
    check(server)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("wait", ["86400", "45", "Fri, 31 Dec 2066 23:59:59 GMT"])
def test_nobody_waits_long_for_the_preflight(server: Server, wait: str) -> None:
    server.faults = [Fault(429, {"Retry-After": wait}, {"error": {"message": "used up"}})]
    with pytest.raises(RunFailure, match=r"endpoint\.url") as met:
        check(server)
    assert met.value.code == ExitCode.ENDPOINT_UNAVAILABLE
    assert "used up" in met.value.message and "30 s" in met.value.message
    assert len(server.seen) == 1
