"""The job's gates in its report, as they were when the attempt that made the model began."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kubedistill_api.gates import Gate, GateResult, judged
from kubedistill_api.status import Metric

from kubedistill_trainer.report.markup import Markup, tag

_CAPTION = "Gates and the figures that they were held against"
_COLUMNS = ("Figure", "Value", "Bound", "")


def results(gates: Sequence[Gate], metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    """For report.json: each gate with its figure and whether it holds."""
    return [r.to_wire() for r in judged(gates, {m.name: m.value for m in metrics})]


def section(document: Mapping[str, Any]) -> Markup | None:
    """For the page: None where the job has no gates."""
    found = [GateResult.model_validate(entry) for entry in document.get("gates") or []]
    if not found:
        return None
    failed = [result.sentence() for result in found if not result.passed]
    told = f"The student fails: {'; '.join(failed)}." if failed else "The student keeps all bounds."
    heading = tag("tr", *(tag("th", text, scope="col") for text in _COLUMNS))
    table = tag(
        "table", tag("caption", _CAPTION), tag("thead", heading), tag("tbody", *map(_row, found))
    )
    return tag(
        "section",
        tag("h2", "Gates"),
        tag("p", told, class_="lead"),
        tag("div", table, class_="scroll", role="region", aria_label=_CAPTION, tabindex=0),
    )


def _row(result: GateResult) -> Markup:
    bounds = [f"≥ {result.min:g}"] if result.min is not None else []
    bounds += [f"≤ {result.max:g}"] if result.max is not None else []
    badge = ("badge good", "passed") if result.passed else ("badge", "failed")
    value = "–" if result.value is None else f"{result.value:.4g}"
    return tag(
        "tr",
        tag("th", result.name, scope="row"),
        tag("td", value),
        tag("td", " and ".join(bounds)),
        tag("td", tag("span", badge[1], class_=badge[0])),
        class_=None if result.passed else "weak",
    )
