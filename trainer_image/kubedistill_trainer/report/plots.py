"""Plots as inline SVG: pure functions of their numbers. Colours come from the page's style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kubedistill_trainer.report.markup import Markup, join, tag
from kubedistill_trainer.report.text import number

WIDTH = 560
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 16, 34, 58
_LARGEST_DOT, _SMALLEST_DOT = 10.0, 3.0
_BAR_LEFT, _BAR_RIGHT, _BAR_TOP = 8, 110, 24
_BAR_HEIGHT, _BAR_GAP, _NAME_GAP, _ROW_GAP = 18, 4, 9, 26
_TICKS = 5
_TICK_SPACING = 34


@dataclass(frozen=True)
class Series:
    """Points (x, y) with the class that colours them; `weights`: shares that size their dots."""

    name: str
    style: str
    points: Sequence[tuple[float, float]]
    weights: Sequence[float] = ()


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high`, laid over pixels from `start` to `end`."""

    label: str
    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


@dataclass(frozen=True)
class Labels:
    """Of a plot: its title, what it shows for who cannot see it, and its axes."""

    title: str
    description: str
    x: str
    y: str


def lines(labels: Labels, series: Sequence[Series], height: int = 320) -> Markup:
    """A line a series, over axes that fit all of them."""
    values = [point for line in series for point in line.points]
    x = Axis(labels.x, *_range([v[0] for v in values], 0.0), _LEFT, WIDTH - _RIGHT)
    y = Axis(labels.y, *_range([v[1] for v in values], 0.05), height - _BOTTOM, _TOP)
    drawn = [
        tag("polyline", points=_path(line.points, x, y), class_=f"line {line.style}")
        for line in series
    ]
    return _frame(labels, height, _axes(x, y), *drawn)


def reliability(labels: Labels, series: Sequence[Series], height: int = 400) -> Markup:
    """Accuracy over confidence: a dot a bin, its area by its share of the tokens."""
    x = Axis(labels.x, 0.0, 1.0, _LEFT, WIDTH - _RIGHT)
    y = Axis(labels.y, 0.0, 1.0, height - _BOTTOM, _TOP)
    diagonal = tag("polyline", points=_path([(0, 0), (1, 1)], x, y), class_="ideal")
    largest = max((share for one in series for share in one.weights), default=1.0)
    drawn = [join(*_dots(one, largest, x, y)) for one in series]
    return _frame(labels, height, _axes(x, y), diagonal, *drawn)


@dataclass(frozen=True)
class Bar:
    """Values under one name, each with the class that colours it and the words that say it."""

    name: str
    values: Sequence[tuple[str, float, str]]


def bars(labels: Labels, rows: Sequence[Bar], greatest: float) -> Markup:
    """Horizontal bars from 0 to `greatest`, their names above them; `labels.x` is the axis."""
    place, drawn = float(_BAR_TOP), []
    x = Axis(labels.x, 0.0, greatest, _BAR_LEFT, WIDTH - _BAR_RIGHT)
    for row in rows:
        drawn.append(_text(row.name, _BAR_LEFT, place, "start"))
        place += _NAME_GAP
        for style, value, told in row.values:
            width = max(1.0, x.place(min(value, greatest)) - _BAR_LEFT)
            drawn.append(
                tag(
                    "rect", tag("title", f"{row.name}, {style}: {told}"),
                    x=_BAR_LEFT, y=place, width=width, height=_BAR_HEIGHT, class_=f"bar {style}",
                )
            )  # fmt: skip
            middle = place + _BAR_HEIGHT / 2
            drawn.append(_text(told, _BAR_LEFT + width + 6, middle, "start", dy="0.35em"))
            place += _BAR_HEIGHT + _BAR_GAP
        place += _ROW_GAP
    return _frame(labels, int(place - _ROW_GAP + _BAR_GAP), *drawn)


def swatch(style: str) -> Markup:
    """A line's sample, for a legend."""
    line = tag("polyline", points="2,7 30,7", class_=f"line {style}")
    return tag("svg", line, viewBox="0 0 32 14", class_="swatch", aria_hidden="true")


def bar_swatch(style: str) -> Markup:
    """A bar's sample, for a legend."""
    bar = tag("rect", x=9, y=0, width=14, height=14, class_=f"bar {style}")
    return tag("svg", bar, viewBox="0 0 32 14", class_="swatch", aria_hidden="true")


def ticks(low: float, high: float, most: int = _TICKS) -> list[float]:
    """Round values within [low, high], at most `most` + 1: multiples of 1, 2 or 5 times 10^n."""
    if high <= low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def _range(values: Sequence[float], padding: float) -> tuple[float, float]:
    """From the least to the greatest value, with some room; never empty."""
    low, high = min(values), max(values)
    room = (high - low) * padding or (abs(high) or 1.0) * 0.05 * (high == low)
    return low - room, high + room


def _path(points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> str:
    return " ".join(f"{x.place(a):g},{y.place(b):g}" for a, b in points)


def _dots(series: Series, largest: float, x: Axis, y: Axis) -> list[Markup]:
    line = tag("polyline", points=_path(series.points, x, y), class_=f"line {series.style}")
    dots = [
        _dot(f"dot {series.style}", _told(series.name, place, share), place, share / largest, x, y)
        for place, share in zip(series.points, series.weights, strict=True)
    ]
    return [line, *dots]


def _told(name: str, place: tuple[float, float], share: float) -> str:
    return f"{name}: sure {place[0]:.0%}, right {place[1]:.0%}, {share:.1%} of the tokens"


def _dot(
    style: str, told: str, place: tuple[float, float], area: float, x: Axis, y: Axis
) -> Markup:
    return tag(
        "circle",
        tag("title", told),
        cx=x.place(place[0]),
        cy=y.place(place[1]),
        r=round(max(_SMALLEST_DOT, _LARGEST_DOT * math.sqrt(area)), 1),
        class_=style,
    )


def _axes(x: Axis, y: Axis) -> Markup:
    parts: list[Markup] = []
    for value in ticks(y.low, y.high, most=min(_TICKS, int((y.start - y.end) / _TICK_SPACING))):
        place = y.place(value)
        parts.append(tag("line", x1=x.start, x2=x.end, y1=place, y2=place, class_="grid"))
        parts.append(_text(number(value), x.start - 8, place, "end", dy="0.35em"))
    for value in ticks(x.low, x.high):
        label = number(int(value) if value == int(value) else value)
        parts.append(_text(label, x.place(value), y.start + 8, "middle", dy="0.9em"))
    parts.append(tag("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, class_="axis"))
    parts.append(_text(x.label, (x.start + x.end) / 2, y.start + 50, "middle"))
    parts.append(_text(y.label, 8, 18, "start"))
    return join(*parts)


def _text(content: str, x: float, y: float, anchor: str, dy: str | None = None) -> Markup:
    return tag("text", content, x=x, y=y, dy=dy, text_anchor=anchor)


def _frame(labels: Labels, height: int, *parts: Markup) -> Markup:
    # A title of the whole would be a tooltip over every part of it: the name is an attribute.
    return tag(
        "svg",
        tag("desc", labels.description),
        *parts,
        viewBox=f"0 0 {WIDTH} {height}",
        role="img",
        aria_label=f"{labels.title}. {labels.description}",
        class_="plot",
    )
