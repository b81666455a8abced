"""The end of a run: what is laid beside the model, logged, and reported."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kubedistill_api.exit_codes import ExitCode
from kubedistill_api.status import ModelStatus
from kubedistill_trainer import run
from kubedistill_trainer.exporter import ProgressBoard
from kubedistill_trainer.failures import RunFailure
from kubedistill_trainer.methods.signal import NoTeacher
from report_kit import comparison, evaluation, finished


def test_the_report_lies_beside_the_model_and_its_table_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    exported: dict[str, Any] = {}

    def publish(folder: Any, documents: Any, parameters: int, store: Any) -> Any:
        exported.update(documents)
        return ModelStatus(uri="s3://m/d", digest="d", parameters=parameters)

    monkeypatch.setattr(run, "write_folder", lambda *arguments: 6)
    monkeypatch.setattr(run, "publish_folder", publish)
    monkeypatch.setattr(run, "compare", lambda *arguments: comparison())
    monkeypatch.setattr(run, "evaluate", lambda *arguments: evaluation())
    monkeypatch.setattr(run, "gather_weights", lambda engine: {"w": torch.zeros(2, 3)})
    done = finished(steps=30)
    done.dataset.tokenizer.files = {}
    context = SimpleNamespace(
        run=done.run, rank=0, world_size=1, scratch=tmp_path, models_store=None
    )
    loop = SimpleNamespace(
        initial_perplexity=88.4,
        history=SimpleNamespace(points=done.history),
        watch=done.watch,
        exported_step=20,
    )
    engine = SimpleNamespace(module=SimpleNamespace(model=None), device="cpu")
    caplog.set_level(logging.INFO)
    outcome = run._finish(
        context,
        done.dataset,
        engine,
        NoTeacher(),
        ProgressBoard(),
        None,  # type: ignore[arg-type]
        None,
        loop,  # type: ignore[arg-type]
    )
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


def test_the_evaluation_shows_that_it_goes_on_and_ends_when_the_pod_is_to_stop() -> None:
    board, interruption = ProgressBoard(), SimpleNamespace(asked=False)
    tick = run._tick(board, interruption)  # type: ignore[arg-type]
    assert board.report.last_step_time is None
    tick()
    assert board.report.last_step_time is not None
    interruption.asked = True
    with pytest.raises(RunFailure) as stopped:
        tick()
    assert stopped.value.code == ExitCode.GRACEFUL_CHECKPOINT
