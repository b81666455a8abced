"""The figures of a report as lines of a log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kubedistill_trainer.report.text import Row, asked, compared, measured, number, paired, shown

_HEADING = ("figure", "student", "teacher")
_WEAKEST = {"perplexity": "highest perplexity", "perplexityRatio": "highest perplexityRatio"}


def table(document: Mapping[str, Any]) -> list[str]:
    """One line a row: each becomes an event of its own, so that columns line up in a log."""
    rows = [*paired(document), *compared(document), *asked(document)]
    cells = [_HEADING, *((r.name, number(r.student), number(r.teacher)) for r in rows)]
    cells += [_measured(row) for row in measured(document)]
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    lines = [
        f"{name:<{widths[0]}}  {student:>{widths[1]}}  {teacher:>{widths[2]}}"
        for name, student, teacher in cells
    ]
    for figure, part in document.get("weakest", {}).items():
        lines.append(_weakest(figure, part))
    for name, why in document.get("notMeasured", {}).items():
        lines.append(f"not measured: {name}: {why}")
    return lines


def _measured(row: Row) -> tuple[str, str, str]:
    return row.title, shown(row.name, row.student), shown(row.name, row.teacher)


def _weakest(figure: str, part: Mapping[str, Any]) -> str:
    if figure == "task":
        share = f"{part['accuracy']:.0%} of {part['examples']:,} examples"
        return f"weakest task: {part['task']} ({share})"
    return f"{_WEAKEST[figure]}: {part['source']} ({part['tokens']:,} tokens)"
