"""The sections of the page on what both models were asked."""

from __future__ import annotations

from collections.abc import Sequence

from kubedistill_trainer.report.layout import (
    Document,
    beside,
    cards,
    data_table,
    figure,
    headings,
    section,
)
from kubedistill_trainer.report.markup import Markup, tag
from kubedistill_trainer.report.plots import Bar, Labels, bar_swatch, bars
from kubedistill_trainer.report.text import Row, asked, measured, number, shown

_GROUPS = {"simple": "simple", "multiStep": "multi-step"}
_TASK_FIGURES = ("simpleAccuracy", "multiStepAccuracy")
_PROMPTING = {
    "ChatTemplate": "Asked through the chat template.",
    "Examples": "Each example follows two solved ones, as plain text.",
}


def tasks(document: Document) -> Markup | None:
    """Accuracy on tasks with checkable answers."""
    found = document.get("tasks")
    if not found:
        return None
    rows: Sequence[Document] = found["byTask"]
    weakest = (document.get("weakest") or {}).get("task") or {}
    taught = any(row["teacherAccuracy"] is not None for row in rows)
    body = []
    for row in rows:
        weak = row["task"] == weakest.get("task")
        badge = tag("span", "fewest right", class_="badge") if weak else None
        group = tag("span", _group(row), class_="what")
        name = tag("th", row["task"], group, badge, scope="row", class_="named")
        cells = [number(row["examples"]), shown("accuracy", row["accuracy"])]
        if taught:
            cells.append(shown("accuracy", row["teacherAccuracy"]))
        body.append(
            tag("tr", name, *(tag("td", c) for c in cells), class_="weak" if weak else None)
        )
    told = f"Made-up tasks whose answers can be checked. {_PROMPTING.get(found['prompting'], '')}"
    if weakest:
        told += " More data like the marked task is what the next run needs most."
    columns = ["Task", "Examples", "Student", *(["Teacher"] if taught else [])]
    return section(
        "Tasks",
        tag("p", told, class_="lead"),
        cards([row for row in asked(document) if row.name in _TASK_FIGURES], taught),
        beside(
            _task_plot(rows, taught), data_table("Right answers by task", headings(*columns), body)
        ),
    )


def questions(document: Document) -> Markup | None:
    """Questions with known answers, and what was answered wrongly with confidence."""
    found = document.get("questions")
    if not found:
        return None
    source = "questions that come with kubedistill"
    if found["source"] != "built-in":
        source = f"questions of {found['source']}"
    told = (
        f"{found['asked']:,} {source}. A hallucination is a wrong answer that the model gives a mean "
        f"probability above {found['confidentAbove']:g} a token."
    )
    slips = found["hallucinated"]
    body = [
        tag(
            "tr", tag("th", slip["question"], scope="row", class_="words"),
            tag("td", slip["expected"], class_="words"), tag("td", slip["said"], class_="words"),
            tag("td", shown("confidence", slip["confidence"])),
        )
        for slip in slips
    ]  # fmt: skip
    head = tag(
        "tr",
        *(tag("th", text, scope="col", class_="words") for text in ("Question", "Right", "Said")),
        tag("th", "Sure", scope="col"),
    )
    rows = [row for row in asked(document) if row.name not in _TASK_FIGURES]
    return section(
        "Questions",
        tag("p", told, class_="lead"),
        cards(rows, found["teacher"] is not None),
        data_table("Wrong and confident, the surest first", head, body) if body else None,
    )


def performance(document: Document) -> Markup | None:
    """Time, memory and size, with the student's share of the teacher's."""
    rows = measured(document)
    found = document.get("performance")
    if not rows:
        return None
    taught = any(row.teacher is not None for row in rows)
    columns = ["Measure", "Student", *(["Teacher", "Ratio"] if taught else [])]
    ratios = _ratios(document)
    body = []
    for row, ratio in zip(rows, ratios, strict=True):
        cells = [shown(row.name, row.student)]
        if taught:
            cells += [shown(row.name, row.teacher), number(ratio)]
        name = tag(
            "th", row.title, tag("span", row.what, class_="what"), scope="row", class_="named"
        )
        body.append(tag("tr", name, *(tag("td", cell) for cell in cells)))
    return section(
        "Speed and size",
        tag("p", _measured_how(found), class_="lead") if found else None,
        beside(
            _speed_plot(rows, taught), data_table("Times and sizes", headings(*columns), body)
        ) if found else data_table("Sizes", headings(*columns), body),
    )  # fmt: skip


def suites(document: Document) -> Markup | None:
    """What lm-eval found of the student."""
    found = document.get("lmEval")
    if not found:
        return None
    body = [
        tag("tr", tag("th", task, scope="row"), tag("td", name), tag("td", number(value)))
        for task, values in found.items()
        for name, value in values.items()
    ]
    return section(
        "lm-eval", data_table("Of the student", headings("Task", "Metric", "Value"), body)
    )


def not_measured(document: Document) -> Markup | None:
    """What is missing in the sections above, and why."""
    found = document.get("notMeasured")
    if not found:
        return None
    entries = [tag("li", tag("strong", name), f": {why}") for name, why in found.items()]
    return section("Not measured", tag("ul", *entries, class_="plain"))


def _group(row: Document) -> str:
    return _GROUPS.get(row["group"], str(row["group"]))


def _task_plot(rows: Sequence[Document], taught: bool) -> Markup:
    drawn = []
    for row in rows:
        values = [("student", row["accuracy"], shown("accuracy", row["accuracy"]))]
        if row["teacherAccuracy"] is not None:
            share = row["teacherAccuracy"]
            values.append(("teacher", share, shown("accuracy", share)))
        drawn.append(Bar(f"{row['task']} ({_group(row)})", values))
    labels = Labels("Right answers", "Share of right answers by task.", "share", "")
    legend = {"student": "student", "teacher": "teacher"} if taught else {"student": "student"}
    return figure("Share of right answers", bars(labels, drawn, 1.0), legend, sample=bar_swatch)


def _speed_plot(rows: Sequence[Row], taught: bool) -> Markup:
    speeds = [row for row in rows if row.name == "tokensPerSecond"]
    greatest = max(max(row.student or 0.0, row.teacher or 0.0) for row in speeds)
    drawn = []
    for row in speeds:
        both = (("student", row.student), ("teacher", row.teacher))
        values = [(style, v, number(v)) for style, v in both if v is not None]
        drawn.append(Bar(row.title, values))
    labels = Labels("Tokens a second", "Tokens a second by batch.", "tokens a second", "")
    legend = {"student": "student", "teacher": "teacher"} if taught else {"student": "student"}
    return figure(
        "Tokens a second", bars(labels, drawn, greatest or 1.0), legend, sample=bar_swatch
    )


def _ratios(document: Document) -> list[float | None]:
    """Of each row of `measured`."""
    found, ratios = document.get("performance"), []
    if found:
        known = found["ratios"] or {"batches": [], "memoryBytes": None}
        by_batch = {pace["batch"]: pace for pace in known["batches"]}
        for pace in found["student"]["batches"]:
            ratio = by_batch.get(pace["batch"], {})
            ratios += [ratio.get("firstTokenSeconds"), ratio.get("tokensPerSecond")]
        ratios.append(known["memoryBytes"])
    return [*ratios, document["sizeOnDisk"]["ratio"]]


def _measured_how(found: Document) -> str:
    devices = dict.fromkeys(
        found[model]["device"] for model in ("student", "teacher") if found[model]
    )
    text = (
        f"Measured on {' and '.join(devices)}, so another run differs: medians of {found['rounds']} "
        f"rounds, {found['promptTokens']} tokens of prompt and {found['answerTokens']} of answer."
    )
    if len(devices) > 1:
        text += " Times on different devices are not compared."
    if found["teacher"] and found["teacher"]["memory"] == "unknown":
        text += " The server’s include network and queue."
    return text
