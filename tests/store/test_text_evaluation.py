"""A server's model is asked tasks and questions once its text is there: a real server and store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from endpoint_kit import Fault, Server
from kubedistill_api.exit_codes import ExitCode
from kubedistill_api.runspec import RunSpec
from kubedistill_api.status import TeacherStreamStatus
from kubedistill_trainer.evaluation import record, served, teacher
from kubedistill_trainer.evaluation.measure import plan_of
from kubedistill_trainer.evaluation.results import Abilities
from kubedistill_trainer.exporter import ProgressBoard
from kubedistill_trainer.failures import RunFailure
from kubedistill_trainer.methods.stream_report import StreamReporter
from kubedistill_trainer.methods.write_text import run_endpoint_teacher
from kubedistill_trainer.store import Store
from kubedistill_trainer.store.errors import StoreUnavailable
from kubedistill_trainer.teacher.learn import status_of
from s3_fixture import S3Server, s3  # noqa: F401  (s3 is a fixture)
from text_kit import context_of, put_prompts, text_job, view_of

PROMPTS, EXAMPLES = 6, 3
PRICE = {"inputPerMillion": 1000, "outputPerMillion": 4000}
ASKED = {"tasks": ["chain_sum", "gsm_symbolic"], "examples": EXAMPLES, "latency": False}
OF_FIGURES = 3 * EXAMPLES
TO_RECALL, TO_SOLVE = "and nothing else", "in the form"


@pytest.fixture
def store(s3: S3Server) -> Store:  # noqa: F811
    return s3.store()


def job(
    store: Store, server: Server, replicas: int = 1, uid: str = "u", **endpoint: Any
) -> RunSpec:
    found = {
        "url": server.url, "model": "tiny", "concurrency": 1, "price": PRICE, "maxRetries": 0,
        **endpoint,
    }  # fmt: skip
    parts = {"endpoint": found, "workers": {"replicas": replicas}}
    prompts = put_prompts(store, PROMPTS)
    run = text_job(store, prompts, teacher=parts, evaluation=ASKED)
    return run.model_copy(update={"uid": uid})


def teach(run: RunSpec, store: Store, scratch: Path, partition: int = 0) -> TeacherStreamStatus:
    board = ProgressBoard()
    run_endpoint_teacher(context_of(run, store, scratch, partition), board)
    stream = board.report.teacher_stream
    assert stream is not None
    return stream


def figures(run: RunSpec, store: Store) -> Abilities | None:
    context = context_of(run, store, Path())
    plan = plan_of(run.spec.evaluation, context.open_store)
    return record.read(store, teacher.request_of_teacher(context, plan, None))


def about_figures(server: Server) -> list[str]:
    said = [seen.body["messages"][-1]["content"] for seen in server.paid]
    return [text for text in said if TO_RECALL in text or TO_SOLVE in text]


def test_its_figures_are_paid_for_beside_the_stream(
    store: Store, server: Server, tmp_path: Path
) -> None:
    run = job(store, server)
    stream = teach(run, store, tmp_path)
    found = figures(run, store)
    assert found is not None and not found.problems
    assert [task.name for task in found.tasks] == ["chain_sum", "gsm_symbolic"]
    assert found.questions is not None and found.questions.hallucinated is not None
    assert len(about_figures(server)) == OF_FIGURES
    # The answers' own tokens are what they were; the cost is of all.
    mine = [seen for seen in server.paid if "question" in seen.body["messages"][-1]["content"]]
    assert len(mine) == PROMPTS == stream.answers
    own = (stream.prompt_tokens * 1000 + stream.answer_tokens * 4000) / 1e6
    assert stream.evaluation_tokens > 0 and stream.cost is not None and stream.cost > own
    # The student says the same of it.
    view = view_of(run, store)
    assert view is not None
    assert status_of(view, run.spec, complete=True).cost == stream.cost
    # Neither a second job nor a second attempt pays again.
    paid = len(server.paid)
    assert teach(job(store, server, uid="v"), store, tmp_path).cost == stream.cost
    assert len(server.paid) == paid


def test_only_who_ends_the_stream_asks(store: Store, server: Server, tmp_path: Path) -> None:
    run = job(store, server, replicas=2)
    teach(run, store, tmp_path, 0)
    assert not about_figures(server) and figures(run, store) is None
    teach(run, store, tmp_path, 1)
    assert len(about_figures(server)) == OF_FIGURES
    teach(run, store, tmp_path, 0)
    assert len(about_figures(server)) == OF_FIGURES


def test_two_jobs_that_end_at_once_pay_once(
    store: Store, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = job(store, server), job(store, server, uid="v")
    began: list[str] = []

    def both(voice: Any, plan: Any, keep: Any) -> Abilities:
        began.append("first")
        teach(second, store, tmp_path / "second")
        return Abilities(prompting="ChatTemplate")

    monkeypatch.setattr(teacher, "measure_voice", both)
    teach(first, store, tmp_path)
    assert began == ["first"]


def test_the_limit_holds_for_figures_too_and_costs_no_job(
    store: Store, server: Server, tmp_path: Path
) -> None:
    whole = teach(job(store.child("whole"), server), store.child("whole"), tmp_path)
    assert whole.cost is not None
    server.seen.clear()
    limit = whole.cost * 0.8
    run = job(store, server, maxCost=limit)
    stream = teach(run, store, tmp_path)
    found = figures(run, store)
    assert stream.complete and stream.cost is not None and limit <= stream.cost < whole.cost
    assert found is not None and found.again
    assert "maxCost" in found.problems["questions"]
    measured, paid = len(found.tasks), len(about_figures(server))
    assert paid < OF_FIGURES
    # A higher limit has the rest asked, and only that.
    server.seen.clear()
    run = job(store, server, uid="v", maxCost=2 * whole.cost)
    teach(run, store, tmp_path)
    found = figures(run, store)
    assert found is not None and not found.again and not found.problems
    assert found.questions is not None and len(found.tasks) == 2
    assert len(server.paid) == len(about_figures(server)) == OF_FIGURES - measured * EXAMPLES


def test_a_server_that_is_away_by_then_is_asked_by_the_next_job(
    store: Store, server: Server, tmp_path: Path
) -> None:
    run = job(store, server)
    server.faults = [Fault(503, where=words) for words in (TO_SOLVE, TO_RECALL) for _ in range(9)]
    assert teach(run, store, tmp_path).complete
    found = figures(run, store)
    assert found is not None and found.again and not found.tasks
    assert "1 tries in a row failed" in found.problems["chain_sum"]
    server.faults.clear()
    context = context_of(run, store, tmp_path)
    assert teacher.is_to_be_measured(context, server.mind.tokenizer)
    teach(job(store, server, uid="v"), store, tmp_path)
    found = figures(run, store)
    assert found is not None and len(found.tasks) == 2 and not found.problems
    assert not teacher.is_to_be_measured(context, server.mind.tokenizer)


def test_what_was_paid_before_the_pod_was_stopped_counts(
    store: Store, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = job(store, server)
    stop = RunFailure(ExitCode.INTERRUPTED, "asked to stop")
    ask = served.ServedVoice.ask
    asked: list[str] = []

    def stopped(voice: Any, *arguments: Any) -> Any:
        def tick() -> None:
            asked.append("one")
            if len(asked) == 2:
                raise stop

        voice._tick = tick
        return ask(voice, *arguments)

    with monkeypatch.context() as patched, pytest.raises(RunFailure):
        patched.setattr(served.ServedVoice, "ask", stopped)
        teach(run, store, tmp_path)
    view = view_of(run, store)
    assert view is not None
    paid = [seen for seen in server.paid if seen.body["messages"][-1]["content"] in
            about_figures(server)]  # fmt: skip
    assert len(asked) == 2 and len(paid) in (2, 3)
    assert view.totals.beside.tokens > 0
    before = view.totals.beside.tokens
    stream = teach(run, store, tmp_path)
    assert stream.evaluation_tokens > before
    found = figures(run, store)
    assert found is not None and not found.problems


def test_an_account_that_does_not_parse_costs_nothing(
    store: Store, server: Server, tmp_path: Path
) -> None:
    run = job(store, server)
    teach(run, store, tmp_path)
    view = view_of(run, store)
    assert view is not None
    before = view.totals.beside.tokens
    view.stream.put("asked/x.json", b"{")
    view.refresh_repairs()
    assert view.totals.beside.tokens == before


def test_what_was_measured_before_the_pod_was_stopped_is_not_paid_for_again(
    store: Store, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = job(store, server)
    stop = RunFailure(ExitCode.INTERRUPTED, "asked to stop")
    ask = served.ServedVoice.ask
    parts: list[str] = []

    def stopped(voice: Any, *arguments: Any) -> Any:
        parts.append("one")
        if len(parts) == 2:
            raise stop
        return ask(voice, *arguments)

    with monkeypatch.context() as patched, pytest.raises(RunFailure):
        patched.setattr(served.ServedVoice, "ask", stopped)
        teach(run, store, tmp_path)
    found = figures(run, store)
    assert found is not None and found.again and len(found.tasks) == 1
    assert set(found.problems) == {"gsm_symbolic", "questions"}
    assert "ended in the middle" in found.problems["questions"]
    paid = len(about_figures(server))
    assert paid == EXAMPLES
    teach(run, store, tmp_path)
    found = figures(run, store)
    assert found is not None and not found.problems and not found.again
    assert [task.name for task in found.tasks] == ["chain_sum", "gsm_symbolic"]
    assert len(about_figures(server)) == OF_FIGURES


def test_what_is_known_stays_when_no_attempt_survives(
    store: Store, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = job(store, server)
    server.faults = [Fault(503, where=TO_RECALL)] * 9
    teach(run, store, tmp_path)

    def dies(voice: Any, *arguments: Any) -> Any:
        raise RunFailure(ExitCode.PEER_LOST, "x")

    with monkeypatch.context() as patched:
        patched.setattr(served.ServedVoice, "ask", dies)
        for _ in range(3):
            with pytest.raises(RunFailure):
                teach(run, store, tmp_path)
        teach(run, store, tmp_path)
    found = figures(run, store)
    assert found is not None and len(found.tasks) == 2 and not found.again
    assert found.problems == {"questions": "3 attempts to ask it ended in the middle"}


def test_a_store_that_is_away_for_a_while_costs_no_figure(
    store: Store, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = job(store, server)
    looked: list[int] = []

    def tick(reporter: Any) -> None:
        if about_figures(server):
            looked.append(1)
            raise StoreUnavailable("get", store.uri, "no answer")

    monkeypatch.setattr(StreamReporter, "tick", tick)
    teach(run, store, tmp_path)
    found = figures(run, store)
    assert looked and found is not None and not found.problems


@pytest.mark.parametrize("operation", ["claim", "publish"])
def test_a_store_that_does_not_take_figures_fails_no_job(
    store: Store, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    run = job(store, server)

    def away(*arguments: Any) -> Any:
        raise StoreUnavailable("put", store.uri, "no answer")

    with monkeypatch.context() as patched:
        patched.setattr(record, operation, away)
        assert teach(run, store, tmp_path).complete
    assert figures(run, store) is None
