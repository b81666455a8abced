"""The end of a run: what is laid beside the model, logged, and reported."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kubedistill_api.exit_codes import ExitCode
from kubedistill_api.runspec import Outcome
from kubedistill_api.status import ModelStatus
from kubedistill_api.training import EarlyStopping
from kubedistill_trainer import finishing
from kubedistill_trainer.exporter import ProgressBoard
from kubedistill_trainer.failures import RunFailure
from kubedistill_trainer.methods.signal import NoTeacher
from kubedistill_trainer.methods.watch import Look, Watch
from kubedistill_trainer.report.figures import Evaluation
from report_kit import comparison, evaluation, finished

NAN = float("nan")


@dataclass
class End:
    """How a run ended, and what was exported."""

    outcome: Outcome
    exported: dict[str, Any]


@pytest.fixture
def end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., End]:
    """`finish` with nothing but the export and the evaluation put in its place."""

    def finish(found: Evaluation | None = None, **parts: Any) -> End:
        exported: dict[str, Any] = {}

        def publish(folder: Any, documents: Any, parameters: int, store: Any) -> Any:
            exported.update(documents)
            return ModelStatus(uri="s3://m/d", digest="d", parameters=parameters)

        monkeypatch.setattr(finishing, "write_folder", lambda *arguments: 6)
        monkeypatch.setattr(finishing, "publish_folder", publish)
        monkeypatch.setattr(finishing, "compare", lambda *arguments: comparison())
        monkeypatch.setattr(finishing, "evaluate", lambda *arguments: found or evaluation())
        monkeypatch.setattr(finishing, "gather_teacher", lambda *arguments, **options: True)
        monkeypatch.setattr(finishing, "gather_weights", lambda engine: {"w": torch.zeros(2, 3)})
        done = finished(steps=30)
        done.dataset.tokenizer.files = {}
        context = SimpleNamespace(
            run=done.run, rank=0, world_size=1, scratch=tmp_path, models_store=None
        )
        work = replace(done.work, **{"exported_step": 20, **parts})
        engine = SimpleNamespace(module=SimpleNamespace(model=None), device="cpu")
        board, nobody = ProgressBoard(), NoTeacher()
        ended: Any = finishing.finish(
            context, done.dataset, engine, nobody, board, None, None, work
        )  # type: ignore[arg-type]
        return End(ended, exported)

    return finish


def test_the_report_lies_beside_the_model_and_its_table_in_the_log(
    end: Callable[..., End], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    found = end()
    outcome, exported = found.outcome, found.exported
    report = json.loads(exported["report.json"])
    assert "<title>small-chain-medium" in exported["report.html"]
    assert report["student"]["parameters"] == 6
    assert len(report["history"]) == 30
    assert report["earlyStopping"]["bestStep"] == 20
    assert "Best after step 20, which is what was exported" in exported["report.html"]
    assert report["tasks"]["byTask"][2]["teacherAccuracy"] == 14 / 32
    assert {m.name: m.value for m in outcome.metrics} == report["metrics"]
    assert {"ece", "teacherEce", "initialPerplexity"} <= set(report["metrics"])
    names = [message.split()[0] for message in caplog.messages]
    assert names[:2] == ["figure", "perplexity"] and "highest" in names and "weakest" in names


def test_the_weakest_files_go_into_the_status(end: Callable[..., End]) -> None:
    found = end()
    weakest = json.loads(found.exported["report.json"])["weakest"]
    assert {w.metric: (w.source, w.tokens) for w in found.outcome.weakest} == {
        name: (part["source"], part["tokens"]) for name, part in weakest.items() if name != "task"
    }
    assert set(weakest) == {"perplexity", "perplexityRatio", "task"}


def _with(**figures: float) -> Evaluation:
    whole = evaluation()
    return replace(whole, figures={**whole.figures, **figures})


def test_a_student_that_is_not_a_number_is_not_exported(end: Callable[..., End]) -> None:
    with pytest.raises(RunFailure, match=r"held-out perplexity .* is not a number") as failed:
        end(_with(perplexity=NAN))
    assert failed.value.code == ExitCode.UNKNOWN


def test_a_figure_that_is_not_a_number_is_left_out(end: Callable[..., End]) -> None:
    """The API server takes numbers only: with a NaN among them no status could be written."""
    found = end(_with(teacherKL=NAN, perplexityRatio=float("inf")))
    names = {metric.name for metric in found.outcome.metrics}
    assert "perplexity" in names
    assert not names & {"teacherKL", "perplexityRatio"}


def test_looks_that_were_not_finite_are_not_in_the_report(end: Callable[..., End]) -> None:
    looks = (Look(step=10, loss=NAN), Look(step=20, loss=2.0), Look(step=30, loss=NAN))
    report = json.loads(
        end(watch=Watch(EarlyStopping(interval_steps=10), looks)).exported["report.json"]
    )
    assert [look["step"] for look in report["earlyStopping"]["looks"]] == [20]
    blind = end(watch=Watch(EarlyStopping(interval_steps=10), looks[:1]), exported_step=30)
    assert json.loads(blind.exported["report.json"])["earlyStopping"] is None


def test_the_report_says_that_a_student_learns_by_heart(end: Callable[..., End]) -> None:
    looks = (Look(step=10, loss=2.0), Look(step=20, loss=2.25))
    exported = end(watch=Watch(EarlyStopping(interval_steps=10), looks)).exported
    found = json.loads(exported["report.json"])["earlyStopping"]["overfitting"]
    assert (found["sinceStep"], found["heldOutRise"]) == (10, 0.25)
    assert (
        "Overfitting: since step 10 the held-out loss has risen by 0.25" in exported["report.html"]
    )


def test_the_evaluation_shows_that_it_goes_on_and_ends_when_the_pod_is_to_stop() -> None:
    board, interruption = ProgressBoard(), SimpleNamespace(asked=False)
    tick = finishing.tick_of(board, interruption)  # type: ignore[arg-type]
    assert board.report.last_step_time is None
    tick()
    assert board.report.last_step_time is not None
    interruption.asked = True
    with pytest.raises(RunFailure) as stopped:
        tick()
    assert stopped.value.code == ExitCode.GRACEFUL_CHECKPOINT
