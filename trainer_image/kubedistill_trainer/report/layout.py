"""What sections are built of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kubedistill_trainer.report.markup import Child, Markup, tag
from kubedistill_trainer.report.plots import swatch
from kubedistill_trainer.report.text import Row, shown

Document = Mapping[str, Any]


def section(title: str, *children: Child, class_: str | None = None) -> Markup:
    return tag("section", tag("h2", title), *children, class_=class_)


def beside(plots: Markup, table: Markup) -> Markup:
    return tag("div", tag("div", plots), table, class_="beside")


def figure(
    title: str,
    plot: Markup,
    legend: Mapping[str, str],
    ideal: bool = False,
    sample: Callable[[str], Markup] = swatch,
) -> Markup:
    """A plot with its title and the names of its styles, each beside a `sample`."""
    entries = [tag("li", sample(style), name) for style, name in legend.items()]
    if ideal:
        entries.append(tag("li", swatch("ideal"), "perfectly calibrated"))
    names = tag("ul", *entries, class_="legend") if entries else None
    return tag("figure", tag("figcaption", tag("strong", title), names), plot)


def headings(*texts: str) -> Markup:
    return tag("tr", *(tag("th", text, scope="col") for text in texts))


def data_table(caption: str, heading: Markup, body: Sequence[Markup]) -> Markup:
    """A table that scrolls within itself where the screen is narrow."""
    table = tag("table", tag("caption", caption), tag("thead", heading), tag("tbody", *body))
    return tag("div", table, class_="scroll", role="region", aria_label=caption, tabindex=0)


def definitions(facts: Mapping[str, Child]) -> Markup:
    rows = [
        tag("div", tag("dt", name), tag("dd", value))
        for name, value in facts.items()
        if value is not None
    ]
    return tag("dl", *rows)


def cards(rows: Sequence[Row], with_teacher: bool, class_: str = "cards wide") -> Markup | None:
    """A card a figure, the student beside its teacher."""
    if not rows:
        return None
    return tag("div", *(_card(row, with_teacher) for row in rows), class_=class_)


def _card(row: Row, with_teacher: bool) -> Markup:
    values = [_value("student" if with_teacher else None, "student", shown(row.name, row.student))]
    if with_teacher:
        values.append(_value("teacher", "teacher", shown(row.name, row.teacher)))
    return tag(
        "article",
        tag("h3", row.title),
        tag("div", *values, class_="values"),
        tag("p", row.what),
        class_="card",
    )


def _value(name: str | None, style: str, value: str) -> Markup:
    label = tag("span", name, class_="of") if name else None
    return tag("div", tag("span", value, class_="value"), label, class_=style)
