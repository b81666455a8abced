"""A finished sweep in the reports of its trials, in a real store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kubedistill_api.runspec import RunSpec
from kubedistill_api.status import Metric
from kubedistill_api.sweep import SweepTable, TrialStatus
from kubedistill_trainer.context import Context
from kubedistill_trainer.failures import InputsRefused
from kubedistill_trainer.models.folder import download, upload
from kubedistill_trainer.report.document import document, files
from kubedistill_trainer.report.sweep import write_trials
from report_kit import finished
from s3_fixture import S3Server, s3  # noqa: F401  (s3 is a fixture)
from safetensors.torch import save_file


def trial(temperature: float, perplexity: float, model: str, **fields: Any) -> TrialStatus:
    return TrialStatus(
        temperature=temperature, job_name=f"c-m-t{temperature:g}", state="Completed",
        perplexity=perplexity, metric=Metric(name="perplexity", value=perplexity), model=model,
        **fields,
    )  # fmt: skip


def context(server: S3Server, scratch: Path, trials: list[TrialStatus]) -> Context:
    run = finished().run
    table = SweepTable(stage="m", choice="T = 4 was chosen: why", trials=trials)
    storage = run.spec.storage.model_copy(update={"uri": server.uri(), "endpoint": server.endpoint})
    changes = {"spec": run.spec.model_copy(update={"storage": storage}), "sweep": table}
    return Context(RunSpec.model_validate(run.model_copy(update=changes)), scratch)


def test_every_trials_report_has_the_table_and_the_models_stay(
    s3: S3Server,  # noqa: F811
    tmp_path: Path,
) -> None:
    report = files(finished(), document(finished()))
    digests, trials = [], []
    for temperature, perplexity in ((2.0, 9.5), (4.0, 7.25)):
        folder = tmp_path / f"{temperature:g}"
        folder.mkdir()
        for name, text in report.items():
            (folder / name).write_text(text)
        save_file({"w": torch.full((2, 2), temperature)}, folder / "model.safetensors")
        digest, store = upload(folder, s3.store(f"model-{temperature:g}"))
        digests.append((digest, store))
        trials.append(trial(temperature, perplexity, store.uri, chosen=temperature == 4))
    failed = TrialStatus(temperature=8, job_name="c-m-t8", state="Stalled")
    run = context(s3, tmp_path, [*trials, failed])
    assert write_trials(run).message == "2 reports written"
    first = digests[0][1].get("report.json")
    assert write_trials(run).message == "2 reports written"
    assert digests[0][1].get("report.json") == first
    for digest, store in digests:
        content = json.loads(store.get("report.json"))
        assert [row["chosen"] for row in content["sweep"]["trials"]] == [False, True, False]
        assert content["sweep"]["choice"] == "T = 4 was chosen: why"
        assert {k: v for k, v in content.items() if k != "sweep"} == {
            k: v for k, v in document(finished()).items() if k != "sweep"
        }
        text = store.get("report.html").decode()
        assert "T = 4 was chosen: why" in text and "c-m-t8" in text
        assert download(store, tmp_path / f"got-{digest}", "spec.teacher", digest) == digest


def test_a_report_that_is_not_there_is_named(s3: S3Server, tmp_path: Path) -> None:  # noqa: F811
    run = context(s3, tmp_path, [trial(2, 9.5, s3.uri("nothing"))])
    with pytest.raises(InputsRefused, match=r"nothing at s3://.*/nothing/report\.json"):
        write_trials(run)
