"""A job's gates in its report: in the document, and on the page."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kubedistill_api.gates import Gate
from kubedistill_trainer.report.document import Finished, document
from kubedistill_trainer.report.page import page
from report_kit import finished
from test_report_page import Outline


def gated(*gates: dict[str, Any]) -> Finished:
    done = finished()
    spec = done.run.spec.model_copy(update={"gates": [Gate.model_validate(gate) for gate in gates]})
    return replace(done, run=done.run.model_copy(update={"spec": spec}))


def test_without_gates_the_page_does_not_speak_of_them() -> None:
    content = document(finished())
    assert content["gates"] == []
    assert "Gates" not in Outline(page(content)).headings


def test_gates_stand_beside_their_figures() -> None:
    figures = {m.name: m.value for m in finished().metrics}
    content = document(
        gated(
            {"metric": "perplexity", "max": 1000},
            {"metric": "perplexityRatio", "min": 0.5, "max": 1.15},
            {"metric": "nobodyMeasuresThis", "min": 1},
        )
    )
    assert content["gates"] == [
        {"metric": "perplexity", "max": 1000, "value": figures["perplexity"], "passed": True},
        {
            "metric": "perplexityRatio", "min": 0.5, "max": 1.15,
            "value": figures["perplexityRatio"], "passed": False,
        },
        {"metric": "nobodyMeasuresThis", "min": 1, "passed": False},
    ]  # fmt: skip
    text = page(content)
    outline = Outline(text)
    assert outline.headings[:2] == ["Figures", "Gates"]
    ratio = f"perplexityRatio {figures['perplexityRatio']:.4g} &gt; 1.15"
    assert f"The student fails: {ratio}; nobodyMeasuresThis was not measured." in text
    assert "≥ 0.5 and ≤ 1.15" in text


def test_a_student_that_keeps_them() -> None:
    text = page(document(gated({"metric": "perplexity", "max": 1000})))
    assert "The student keeps all bounds." in text
    assert ">passed<" in text
