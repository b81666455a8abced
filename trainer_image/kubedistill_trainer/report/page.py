"""report.html: a report as one page that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kubedistill_trainer.report import ability_sections, gates, sections, teacher_text
from kubedistill_trainer.report.markup import Markup, join, tag

Section = Callable[[Mapping[str, Any]], Markup | None]
SECTIONS: tuple[Section, ...] = (
    sections.summary,
    sections.figures,
    gates.section,
    teacher_text.section,
    ability_sections.tasks,
    ability_sections.questions,
    ability_sections.performance,
    ability_sections.suites,
    sections.trials,
    sections.slices,
    sections.losses,
    sections.held_out,
    sections.calibration,
    ability_sections.not_measured,
    sections.inputs,
)
"""In the order of the page. A section whose data is not there gives None, and is not shown."""
_STYLE = Path(__file__).with_name("page.css")
_NOTHING_FROM_OUTSIDE = "default-src 'none'; style-src 'unsafe-inline'"


def page(document: Mapping[str, Any]) -> str:
    """The page of a report.json document (docs/report.md)."""
    name = str(document["job"]["name"])
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", http_equiv="Content-Security-Policy", content=_NOTHING_FROM_OUTSIDE),
        tag("title", f"{name}: distillation report"),
        tag("style", Markup(_STYLE.read_text())),
    )
    body = tag("body", tag("main", *(section(document) for section in SECTIONS)))
    return join(Markup("<!doctype html>\n"), tag("html", head, body, lang="en"), "\n")
