"""What a server's answers cost, and where it ends: a real server, a real store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import data_kit
import pytest
from endpoint_kit import Fault, Server
from kubedistill_api.exit_codes import ExitCode
from kubedistill_api.runspec import RunSpec
from kubedistill_api.status import TeacherStreamStatus
from kubedistill_trainer.data.sources import read_prompts
from kubedistill_trainer.exporter import ProgressBoard
from kubedistill_trainer.failures import RunFailure
from kubedistill_trainer.methods.write_text import run_endpoint_teacher
from kubedistill_trainer.preflight import run_preflight
from kubedistill_trainer.store import Store
from kubedistill_trainer.teacher.learn import learn
from kubedistill_trainer.teacher.text import TextAnswer
from kubedistill_trainer.teacher.text_reader import read_text, wait_for_text
from s3_fixture import S3Server, s3  # noqa: F401  (s3 is a fixture)
from text_kit import context_of, identity_of, put_prompts, text_job, view_of

PROMPTS = 40
PRICE = {"inputPerMillion": 1000, "outputPerMillion": 4000}


@pytest.fixture
def store(s3: S3Server) -> Store:  # noqa: F811
    return s3.store()


def job(store: Store, server: Server, replicas: int = 1, **endpoint: Any) -> RunSpec:
    found = {"url": server.url, "model": "tiny", "concurrency": 2, "price": PRICE, **endpoint}
    teacher = {"endpoint": found, "workers": {"replicas": replicas}}
    return text_job(store, put_prompts(store, PROMPTS), teacher=teacher)


def teach(run: RunSpec, store: Store, scratch: Path, partition: int = 0) -> TeacherStreamStatus:
    board = ProgressBoard()
    try:
        run_endpoint_teacher(context_of(run, store, scratch, partition), board)
    finally:
        stream = board.report.teacher_stream
    assert stream is not None
    return stream


def asked(server: Server) -> list[str]:
    return [seen.body["messages"][-1]["content"] for seen in server.paid]


def cost(stream: TeacherStreamStatus) -> float:
    return (stream.prompt_tokens * 1000 + stream.answer_tokens * 4000) / 1e6


def test_tokens_and_cost_are_the_servers(store: Store, server: Server, tmp_path: Path) -> None:
    stream = teach(job(store, server), store, tmp_path)
    ids = [len(server.mind.prompt(seen.body["messages"])) for seen in server.paid]
    assert (stream.answers, stream.prompt_tokens) == (PROMPTS, sum(ids))
    assert stream.cost == pytest.approx(cost(stream)) and stream.cost > 0


def test_at_its_limit_nothing_more_is_asked_and_all_is_kept(
    store: Store, server: Server, tmp_path: Path
) -> None:
    whole = teach(job(store.child("whole"), server), store.child("whole"), tmp_path).cost or 0.0
    server.seen.clear()
    limit = whole / 2
    with pytest.raises(RunFailure) as stopped:
        teach(job(store, server, maxCost=limit), store, tmp_path)
    assert stopped.value.code == ExitCode.COST_LIMIT
    paid = len(server.paid)
    # What was open when the limit was reached is paid for, and kept.
    assert PROMPTS / 4 < paid < PROMPTS - 5
    assert f"{paid} of {PROMPTS} answers are there and kept in s3://" in stopped.value.message
    assert f"of at most {limit:g} by spec.teacher.endpoint.maxCost" in stopped.value.message
    # What an earlier attempt paid counts: the next one asks for nothing.
    with pytest.raises(RunFailure):
        teach(job(store, server, maxCost=limit), store, tmp_path)
    assert len(server.paid) == paid
    run = job(store, server, maxCost=2 * whole)
    stream = teach(run, store, tmp_path)
    assert len(asked(server)) == len(set(asked(server))) == PROMPTS
    assert stream.cost == pytest.approx(whole)
    answers = read_text(wait_for_text(store, identity_of(run, store), stall_seconds=0))
    assert len(answers) == PROMPTS


def test_a_limit_that_the_last_answer_reaches_is_no_failure(
    store: Store, server: Server, tmp_path: Path
) -> None:
    whole = teach(job(store.child("whole"), server), store.child("whole"), tmp_path).cost or 0.0
    assert teach(job(store, server, maxCost=whole), store, tmp_path).complete


def test_what_other_partitions_paid_counts(store: Store, server: Server, tmp_path: Path) -> None:
    whole = teach(job(store.child("whole"), server), store.child("whole"), tmp_path).cost or 0.0
    server.seen.clear()
    run = job(store, server, replicas=2, maxCost=whole / 4)
    with pytest.raises(RunFailure):
        teach(run, store, tmp_path, 0)
    paid = len(server.paid)
    with pytest.raises(RunFailure) as second:
        teach(run, store, tmp_path, 1)
    assert second.value.code == ExitCode.COST_LIMIT
    assert len(server.paid) == paid


def test_a_server_that_gives_up_leaves_what_it_answered(
    store: Store, server: Server, tmp_path: Path
) -> None:
    run = job(store, server, maxRetries=0)
    server.faults += [None] * 5 + [Fault(500)] * 100
    with pytest.raises(RunFailure) as failure:
        teach(run, store, tmp_path)
    assert failure.value.code == ExitCode.ENDPOINT_UNAVAILABLE
    server.faults.clear()
    assert teach(run, store, tmp_path).complete
    assert len(asked(server)) == len(set(asked(server))) == PROMPTS


def test_a_prompt_that_the_server_refuses_is_not_asked_again(
    store: Store, server: Server, tmp_path: Path
) -> None:
    run = job(store, server)
    body = {"error": {"code": "content_filter", "message": "not this"}}
    server.faults.append(Fault(400, body=body, where="question 7"))
    stream = teach(run, store, tmp_path)
    assert (stream.answers, len(asked(server))) == (PROMPTS, PROMPTS - 1)
    answers = read_text(wait_for_text(store, identity_of(run, store), stall_seconds=0))
    [refused] = [n for n, answer in answers.items() if answer.refusal]
    assert "not this" in answers[refused].refusal
    assert teach(run, store, tmp_path).complete
    assert len(asked(server)) == PROMPTS - 1


def test_damage_is_not_repaired_beyond_the_limit(
    store: Store, server: Server, tmp_path: Path
) -> None:
    run = job(store, server)
    whole = teach(run, store, tmp_path).cost or 0.0
    view = view_of(run, store)
    assert view is not None
    view.repairs[0].ask(view.logs[0].shards[0], "missing")
    view.stream.delete([view.logs[0].shards[0].key])
    with pytest.raises(RunFailure) as failure:
        teach(job(store, server, maxCost=whole), store, tmp_path)
    assert failure.value.code == ExitCode.COST_LIMIT
    assert len(server.paid) == PROMPTS
    stream = teach(job(store, server, maxCost=2 * whole), store, tmp_path)
    assert stream.complete and (stream.cost or 0.0) > whole


def test_a_server_that_refuses_all_from_some_point_on_spoils_nothing(
    store: Store, server: Server, tmp_path: Path
) -> None:
    run = job(store, server)
    server.faults += [None] * 5 + [Fault(400)] * 100
    with pytest.raises(RunFailure, match="scripted 400") as failure:
        teach(run, store, tmp_path)
    assert failure.value.code == ExitCode.BAD_CONFIGURATION
    server.faults.clear()
    stream = teach(run, store, tmp_path)
    answers = read_text(wait_for_text(store, identity_of(run, store), stall_seconds=0))
    assert stream.complete and not any(answer.refusal for answer in answers.values())
    assert len(asked(server)) == len(set(asked(server))) == PROMPTS


@pytest.mark.parametrize("fault", [Fault(401), Fault(429, {"Retry-After": "86400"})])
def test_what_was_answered_before_the_end_is_committed_and_reported(
    store: Store, server: Server, tmp_path: Path, fault: Fault
) -> None:
    server.faults += [None] * 5 + [fault] * 3
    board = ProgressBoard()
    with pytest.raises(RunFailure):
        run_endpoint_teacher(context_of(job(store, server), store, tmp_path), board)
    view = view_of(job(store, server), store)
    stream = board.report.teacher_stream
    assert view is not None and stream is not None
    assert view.totals.answers == stream.answers == len(server.paid) == 5


def test_long_prompts_that_are_left_for_a_later_pod_are_refused_by_it(
    store: Store, server: Server, tmp_path: Path
) -> None:
    run = job(store, server)
    body = {"error": {"message": "maximum context length is 9", "code": "context_length_exceeded"}}
    server.faults += [None] * 16 + [Fault(401)]
    with pytest.raises(RunFailure):
        teach(run, store, tmp_path)
    server.faults = [Fault(400, body=body)] * PROMPTS
    assert teach(run, store, tmp_path).complete


@pytest.mark.parametrize(
    ("said", "field", "advice"),
    [
        ("maximum context length is 9 tokens, you asked for {n}", "distill.generation.maxTokens",
         "lower spec.distill.generation.maxTokens"),
        ("not on Sundays ({n})", "spec.teacher", "mend what the refusal names"),
    ],
)  # fmt: skip
def test_where_all_is_refused_the_student_is_told_why(
    store: Store, said: str, field: str, advice: str
) -> None:
    refused = {n: TextAnswer("", refusal=f"400: {said.format(n=n)}") for n in range(6)}
    answers = {**refused, 6: TextAnswer("cut", finished=False), 7: TextAnswer("", refusal="else")}
    run = text_job(store, put_prompts(store, 8))
    prompts = read_prompts(run.spec.data, context_of(run, store, Path()).open_store)
    with pytest.raises(RunFailure) as met:
        learn(run.spec, prompts, answers, data_kit.tokenizer())
    assert (
        f"{field}: found nothing to learn from: kept 0 of 8 answers: 7 refused" in met.value.message
    )
    assert f"6 times as in “400: {said.format(n=0)}”" in met.value.message
    assert advice in met.value.message and "raise" not in met.value.message


def said(content: Any, end: str = "stop", **usage: Any) -> dict[str, Any]:
    """A reply of 10 and 5 tokens."""
    message = {"role": "assistant", "content": content}
    counts = {"prompt_tokens": 10, "completion_tokens": 5} | usage
    return {"choices": [{"message": message, "finish_reason": end}], "usage": counts}


def test_half_a_character_in_an_answer_spoils_no_batch(
    store: Store, server: Server, tmp_path: Path
) -> None:
    run = job(store, server)
    server.faults.append(Fault("other-body", body=said("hi \ud83d"), where="question 7"))
    withheld = {"error": {"code": "content_filter", "message": "not \udc00 this"}}
    server.faults.append(Fault(400, body=withheld, where="question 9"))
    assert teach(run, store, tmp_path).complete
    answers = read_text(wait_for_text(store, identity_of(run, store), stall_seconds=0))
    assert answers[7].text == "hi \ufffd" and "not \ufffd this" in answers[9].refusal


def test_an_answer_without_text_is_paid_for_and_not_asked_again(
    store: Store, server: Server, tmp_path: Path
) -> None:
    run = job(store, server)
    server.faults.append(Fault("other-body", body=said(None, "tool_calls"), where="question 7"))
    stream = teach(run, store, tmp_path)
    answers = read_text(wait_for_text(store, identity_of(run, store), stall_seconds=0))
    assert stream.complete and len(server.seen) == PROMPTS
    assert "tool_calls" in answers[7].refusal
    assert (answers[7].prompt_tokens, answers[7].answer_tokens) == (10, 5)
    assert stream.cost == pytest.approx(cost(stream))


@pytest.mark.parametrize(
    "usage", [{"completion_tokens": None}, {"completion_tokens": -5}, {"prompt_tokens": True}]
)
def test_a_limit_on_what_is_not_counted_is_refused(
    store: Store, server: Server, tmp_path: Path, usage: dict[str, Any]
) -> None:
    server.faults = [Fault("other-body", body=said("hi", **usage))] * PROMPTS
    with pytest.raises(RunFailure, match=r"endpoint\.maxCost") as stopped:
        teach(job(store, server, maxCost=10), store, tmp_path)
    assert stopped.value.code == ExitCode.BAD_CONFIGURATION
    assert len(server.seen) <= 3


def test_a_count_that_cannot_be_counts_for_nothing(
    store: Store, server: Server, tmp_path: Path
) -> None:
    server.faults = [Fault("other-body", body=said("hi", prompt_tokens=-1))] * PROMPTS
    stream = teach(job(store, server), store, tmp_path)
    assert (stream.prompt_tokens, stream.answer_tokens) == (0, 5 * PROMPTS)


def test_the_preflight_pays_after_all_that_is_free(
    store: Store, server: Server, tmp_path: Path
) -> None:
    """The tasks are the last of what is checked without asking anybody."""
    tokenizer = data_kit.tokenizer()
    for name, body in tokenizer.files.items():
        store.put(f"tokenizer/{name}", body)
    store.put("data/a.txt", b"one two three four five six seven " * 99)
    folder = {"uri": store.uri_of("tokenizer")}
    sizes = {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    prompts = {"uri": put_prompts(store, 8), "origin": "Teacher", "promptField": "q"}
    text = {"signal": "Responses", "generation": {"maxTokens": 16}}
    logits = {"signal": "Logits", "objective": {"temperature": 1}}
    found = {"url": server.url, "model": "tiny"}
    for distill, source, extra in (
        (text, prompts, {}),
        (logits, {"uri": store.uri_of("data/a.txt")},
         {"payload": "Sparse", "topK": 8, "delivery": "Stream"}),
    ):  # fmt: skip
        data = {"sources": [source], "tokenizer": folder, "sequenceLength": 64}
        parts = {
            "distill": distill, "data": data, "student": {"config": sizes},
            "teacher": {"endpoint": found, "workers": {"replicas": 1}, **extra},
        }  # fmt: skip
        questions = {"questions": {"uri": store.uri_of("nowhere.jsonl")}}
        bad = text_job(store, prompts["uri"], **parts, evaluation=questions)
        with pytest.raises(RunFailure, match=r"spec\.evaluation\.questions"):
            run_preflight(context_of(bad, store, tmp_path))
        assert not server.seen
        run_preflight(context_of(text_job(store, prompts["uri"], **parts), store, tmp_path))
        assert server.seen
        server.seen.clear()
