"""report.json: its structure, and that it says the same every time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kubedistill_api.data import DataSource
from kubedistill_api.metrics import METRICS
from kubedistill_trainer.data.packing import Fit
from kubedistill_trainer.report.document import document, files
from kubedistill_trainer.report.table import table
from report_kit import SOURCES, STEPS, finished


def test_the_parts_of_a_document() -> None:
    found = document(finished())
    assert found["schemaVersion"] == 1
    assert found["job"]["chain"] == "small-chain"
    assert found["teacher"]["payload"] == "Hidden"
    assert found["data"]["files"][0] == {
        "source": SOURCES[0], "origin": "Human", "weight": 1.0,
        "sequences": 140, "tokens": 140 * (256 - 4),
    }  # fmt: skip
    assert found["data"]["conversations"] is None
    assert found["data"]["heldOut"] == {"sequences": 10, "tokens": 10 * (256 - 4)}
    assert found["training"]["tokens"] == STEPS * 64 * 256
    assert found["metrics"]["initialPerplexity"] == 88.412345
    assert {"ece", "teacherEce", "perplexityRatio"} <= set(found["metrics"])
    assert [s["source"] for s in found["slices"]] == list(SOURCES)
    assert found["weakest"]["perplexity"] == {"source": SOURCES[1], "tokens": 8000}
    assert found["weakest"]["perplexityRatio"]["source"] == SOURCES[0]
    assert set(found["history"][0]) == {"step", "soft", "hard", "total", "learningRate"}
    assert (found["history"][0]["step"], found["history"][-1]["step"]) == (1, STEPS)


def test_the_bins_give_the_calibration_error() -> None:
    found = document(finished())["calibration"]
    for model in ("student", "teacher"):
        bins = [part for part in found[model]["bins"] if part["tokens"]]
        total = sum(part["tokens"] for part in bins)
        gaps = sum(part["tokens"] * abs(part["accuracy"] - part["confidence"]) for part in bins)
        assert found[model]["ece"] == pytest.approx(gaps / total, abs=1e-5)
        assert all(part["from"] < part["confidence"] <= part["to"] for part in bins)
        assert len(found[model]["bins"]) == 15
    assert found["student"]["ece"] == document(finished())["metrics"]["ece"]


def test_without_a_teacher_its_parts_are_empty() -> None:
    found = document(finished(teacher=False))
    assert (found["job"]["method"], found["teacher"], found["objective"]) == (
        "fineTune",
        None,
        None,
    )
    assert found["calibration"]["teacher"] is None
    assert set(found["weakest"]) == {"perplexity", "task"}


def test_files_are_the_same_every_time_and_json_is_strict() -> None:
    """The model's folder is addressed by the digest of its files."""
    first, second = (files(f, document(f)) for f in (finished(), finished()))
    assert first == second
    assert set(first) == {"MODEL_CARD.md", "report.json", "report.html"}

    def refused(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    assert json.loads(first["report.json"], parse_constant=refused) == document(finished())


def test_the_table_lines_up() -> None:
    lines = table(document(finished()))
    assert lines[0].split() == ["figure", "student", "teacher"]
    figures, weakest = lines[:-3], lines[-3:]
    assert len({len(line) for line in figures}) == 1
    assert [line.split("  ")[0] for line in figures[1:]] == [
        "perplexity", "accuracy", "ece",
        "initialPerplexity", "perplexityRatio", "teacherAgreement", "teacherKL",
        "simpleAccuracy", "multiStepAccuracy", "questionAccuracy", "hallucinationRate",
        "First token, batch 1", "Tokens a second, batch 1",
        "First token, batch 8", "Tokens a second, batch 8", "Memory", "Size on disk",
    ]  # fmt: skip
    assert figures[-5].split()[-2:] == ["162.8", "81.4"]
    # exp of the mean cross-entropies 2.95 and 2.5.
    assert figures[1].split()[1:] == ["19.11", "12.18"]
    assert weakest[0] == f"highest perplexity: {SOURCES[1]} (8,000 tokens)"
    assert weakest[2] == "weakest task: gsm_symbolic (9% of 32 examples)"


def test_the_table_without_a_teacher() -> None:
    lines = table(document(finished(teacher=False)))
    assert [line.split("  ")[0] for line in lines[:-3]] == [
        "figure", "perplexity", "accuracy", "ece", "initialPerplexity",
        "simpleAccuracy", "multiStepAccuracy", "questionAccuracy", "hallucinationRate",
        "Size on disk",
    ]  # fmt: skip
    assert lines[1].split()[-1] == "–"
    assert lines[-1] == "not measured: student.performance: OutOfMemoryError: <out of memory>"


def test_what_is_in_a_document_is_documented() -> None:
    docs = Path(__file__).parents[2] / "docs"
    text = (docs / "report.md").read_text()
    found = document(finished())
    nested = (
        found["tasks"], found["tasks"]["byTask"][0], found["questions"],
        found["questions"]["student"], found["questions"]["hallucinated"][0],
        found["performance"], found["performance"]["student"],
        found["performance"]["student"]["batches"][0], found["sizeOnDisk"],
    )  # fmt: skip
    for part in (
        found, found["job"], found["data"], found["inputs"], found["history"][0], *nested,
    ):  # fmt: skip
        for name in part:
            assert f"`{name}`" in text, name
    figures = (docs / "concepts.md").read_text()
    assert set(found["metrics"]) == set(METRICS), "the API lists what an evaluation can give"
    for name in METRICS:
        assert f"`{name}`" in figures, name


def test_what_is_said_of_files_and_conversations() -> None:
    done = finished()
    done.dataset.fit = Fit(whole=9, cut=2, dropped=1, padding=77)
    source = {"uri": SOURCES[2], "origin": "Teacher", "promptField": "q", "weight": 2.5}
    done.run.spec.data.sources[2] = DataSource.model_validate(source)
    content = document(done)
    assert content["data"]["conversations"] == {"whole": 9, "cut": 2, "dropped": 1, "padding": 77}
    found = files(done, content)
    assert f"- `{SOURCES[2]}`, answered by the teacher, weight 2.5\n" in found["MODEL_CARD.md"]
    assert "9 whole, 2 cut at the end, 1 dropped" in found["report.html"]
    assert "0 tokens to learn from, answers of the teacher, weight 2.5" in found["report.html"]
