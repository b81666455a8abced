"""The page: whole, escaped, asking for nothing, with the sections whose data is there."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from kubedistill_trainer.report.document import document
from kubedistill_trainer.report.markup import Markup, join, tag
from kubedistill_trainer.report.page import page
from kubedistill_trainer.report.plots import Bar, Labels, Series, bars, lines, reliability, ticks
from kubedistill_trainer.report.text import duration, size
from report_kit import SOURCES, comparison, finished

VOID = {"meta"}


class Outline(HTMLParser):
    """Refuses elements that are not closed in order; collects what the tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._open: list[str] = []
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.headings: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "h2":
            self.headings.append(data)

    def having(self, name: str) -> list[dict[str, Any]]:
        return [attributes for found, attributes in self.elements if found == name]


@pytest.fixture(scope="module")
def whole() -> str:
    return page(document(finished()))


def test_all_sections_of_a_distillation(whole: str) -> None:
    outline = Outline(whole)
    assert whole.startswith("<!doctype html>")
    assert outline.headings == [
        "Figures",
        "Tasks",
        "Questions",
        "Speed and size",
        "lm-eval",
        "Weakest data",
        "Training",
        "Early stopping",
        "Calibration",
        "Inputs",
    ]
    assert len(outline.having("article")) == 7 + 4
    plots = [a for a in outline.having("svg") if a.get("role") == "img"]
    assert len(plots) == 6 and all(a["aria-label"] for a in plots)
    assert len(outline.having("caption")) == len(outline.having("table")) == 8


def test_it_asks_for_nothing_from_outside(whole: str) -> None:
    outline = Outline(whole)
    assert not {name for name, _ in outline.elements} & {"script", "link", "img", "iframe", "a"}
    for _, attributes in outline.elements:
        assert not {"src", "href", "srcset", "style"} & set(attributes)
    assert not re.search(r"url\(|@import|https?://", whole)
    [policy] = [a for a in outline.having("meta") if a.get("http-equiv")]
    assert policy["content"].startswith("default-src 'none'")


def test_it_fits_phones_and_both_colour_schemes(whole: str) -> None:
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in Outline(
        whole
    ).having("meta")
    assert "@media (prefers-color-scheme: dark)" in whole
    assert "@media (max-width: 600px)" in whole


def test_whatever_stands_in_the_document_is_text() -> None:
    evil = '<script>alert("x")</script>&'

    def poisoned(value: Any) -> Any:
        match value:
            case dict():
                return {name: poisoned(part) for name, part in value.items()}
            case list():
                return [poisoned(part) for part in value]
            case "distill":
                return value
            case str():
                return value + evil
        return value

    text = page(poisoned(document(finished())))
    assert "<script" not in text and '("x")' not in text
    assert text.count("&lt;script&gt;") > 10
    Outline(text)


def test_the_weakest_files_are_marked_in_words(whole: str) -> None:
    rows = re.findall(r"<tr.*?</tr>", whole)
    marked = {
        uri: re.findall(r'class="badge">(.*?)<', row)
        for row in rows
        for uri in SOURCES
        if uri in row
    }
    assert marked == {
        SOURCES[0]: ["furthest from the teacher"],
        SOURCES[1]: ["highest perplexity"],
        SOURCES[2]: [],
    }
    assert whole.index(SOURCES[1]) < whole.index(f"{SOURCES[2]}</span>")


def test_a_page_without_a_teacher() -> None:
    text = page(document(finished(teacher=False)))
    assert text.count('class="line total"') == 2 and 'class="line hard"' not in text
    assert "Agreement" not in text and 'class="teacher"' not in text and ">Ratio<" not in text
    assert Outline(text).headings == [
        "Figures", "Tasks", "Questions", "Speed and size", "Weakest data", "Training",
        "Early stopping", "Calibration", "Not measured", "Inputs",
    ]  # fmt: skip
    assert "OutOfMemoryError: &lt;out of memory&gt;" in text


@pytest.mark.parametrize(
    ("part", "heading"),
    [
        ("metrics", "Figures"), ("slices", "Weakest data"), ("history", "Training"),
        ("calibration", "Calibration"), ("inputs", "Inputs"), ("tasks", "Tasks"),
        ("questions", "Questions"), ("lmEval", "lm-eval"),
    ],
)  # fmt: skip
def test_a_section_without_its_data_is_not_shown(part: str, heading: str) -> None:
    content = document(finished())
    del content[part]
    assert heading not in Outline(page(content)).headings


def test_one_file_is_not_called_weak() -> None:
    content = document(finished())
    content["slices"], content["weakest"] = content["slices"][:1], {}
    text = page(content)
    headings = Outline(text).headings
    assert "Data" in headings and "Weakest data" not in headings and 'class="badge"' not in text


def test_a_run_of_one_step_has_no_curve() -> None:
    assert "Training" not in Outline(page(document(finished(steps=1)))).headings
    assert "Training" in Outline(page(document(finished(steps=2)))).headings


def test_markup_escapes_all_but_markup() -> None:
    assert tag("p", "a<b", tag("i", "&"), class_='"') == '<p class="&quot;">a&lt;b<i>&amp;</i></p>'
    assert join("<", Markup("<br>"), None) == "&lt;<br>"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (1, 2400, [500, 1000, 1500, 2000]),
        (1.9, 3.1, [2, 2.5, 3]), (0, 2e-5, [0, 5e-6, 1e-5, 1.5e-5, 2e-5]), (3, 3, [3]),
    ],
)  # fmt: skip
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected


def _paths(svg: str) -> list[list[tuple[float, float]]]:
    return [
        [(float(x), float(y)) for x, y in (p.split(",") for p in path.split())]
        for path in re.findall(r'points="(.*?)"', svg)
    ]


LABELS = Labels("t", "d", "x", "y")


def test_lines_stay_within_the_plot_and_rise_with_their_values() -> None:
    svg = lines(LABELS, [Series("a", "total", [(1, 2.0), (5, 4.0), (9, 3.0)])], height=300)
    [[first, top, last]] = _paths(svg)
    assert first[0] == 78 and last[0] == 560 - 16
    assert top[1] < last[1] < first[1]
    assert all(0 < y < 300 for _, y in (first, top, last))


def test_a_flat_line_is_drawn() -> None:
    for level in (0.0, 3.0):
        [path] = _paths(lines(LABELS, [Series("a", "total", [(1, level), (2, level)])]))
        assert len({y for _, y in path}) == 1


def test_dots_lie_on_the_diagonal_when_confidence_is_accuracy() -> None:
    svg = reliability(LABELS, [Series("s", "student", [(0.2, 0.2), (0.9, 0.9)], [0.25, 0.75])])
    (start, end), dots = _paths(svg)
    slope = (end[1] - start[1]) / (end[0] - start[0])
    for x, y in dots:
        assert y == pytest.approx(start[1] + slope * (x - start[0]), abs=0.2)
    small, large = (float(r) for r in re.findall(r' r="(.*?)"', svg))
    assert large / small == pytest.approx(3**0.5, rel=0.02)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1])
def test_text_has_the_contrast_of_wcag_aa(whole: str, scheme: int) -> None:
    block = re.findall(r":root \{(.*?)\}", whole, re.DOTALL)[scheme]
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block))
    for ground in ("page", "card", "weak-fill"):
        for ink in ("text", "muted", "student", "teacher", "soft", "hard", "weak"):
            assert _contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)


def test_the_trials_of_a_sweep_are_shown_and_the_chosen_one_is_marked() -> None:
    trials = [
        {"temperature": 2.0, "jobName": "c-m-t2", "state": "Completed", "perplexity": 9.51234,
         "metric": {"name": "teacherAgreement", "value": 0.5}, "chosen": False},
        {"temperature": 4.0, "jobName": "c-m-t4", "state": "Completed", "perplexity": 10.0,
         "metric": {"name": "teacherAgreement", "value": 0.75}, "chosen": True},
        {"temperature": 8.0, "jobName": "c-m-t8", "state": "Stalled", "chosen": False},
    ]  # fmt: skip
    sweep = {"stage": "m", "choice": "T = 4 was chosen", "trials": trials}
    text = page(document(finished()) | {"sweep": sweep})
    assert "Sweep" in Outline(text).headings
    assert "Stage m: T = 4 was chosen." in text
    rows = [re.sub(r"<[^>]+>", "|", r) for r in re.findall(r"<tr.*?</tr>", text) if "c-m-t" in r]
    cells = [[cell.strip() for cell in row.split("|") if cell.strip()] for row in rows]
    assert cells == [
        ["T = 2", "50.0%", "9.512", "Completed", "c-m-t2"],
        ["T = 4", "chosen", "75.0%", "10", "Completed", "c-m-t4"],
        ["T = 8", "–", "–", "Stalled", "c-m-t8"],
    ]


def test_bars_are_drawn_to_scale_and_say_their_values() -> None:
    rows = [
        Bar("first", [("student", 0.25, "25 %"), ("teacher", 0.5, "50 %")]),
        Bar("second", [("student", 0.0, "0 %")]),
    ]
    text = bars(Labels("t", "d", "x", "y"), rows, 1.0)
    widths = [float(w) for w in re.findall(r'<rect[^>]* width="([0-9.]+)"', text)]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)
    # One that stands for nothing can be seen, too.
    assert widths[2] == 1
    assert text.count("50 %") == 2 and "first, teacher: 50 %" in text


def test_times_on_different_devices_are_not_divided() -> None:
    compared = comparison()
    assert compared.teacher is not None and compared.teacher.performance is not None
    other = compared.teacher.performance.model_copy(update={"device": "CPU"})
    teacher = compared.teacher.model_copy(update={"performance": other})
    content = document(replace(finished(), compared=replace(compared, teacher=teacher)))
    assert content["performance"]["ratios"] is None
    text = page(content)
    assert "NVIDIA H100 80GB HBM3 and CPU" in text and "are not compared" in text


def test_the_students_share_of_its_teacher() -> None:
    content = document(finished())
    ratios = content["performance"]["ratios"]
    assert ratios["batches"][1] == {
        "batch": 8, "firstTokenSeconds": 0.5, "tokensPerSecond": 2.0,
    }  # fmt: skip
    assert ratios["memoryBytes"] == 0.5
    assert content["sizeOnDisk"]["ratio"] == pytest.approx(0.50003, abs=1e-5)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (3 << 20, "3 MiB"), (2.5 * 2**30, "2.5 GiB")],
)
def test_sizes_have_units(value: float, expected: str) -> None:
    assert size(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(0.0004567, "0.457 ms"), (0.25, "250 ms"), (1.5, "1.5 s")]
)
def test_times_have_units(value: float, expected: str) -> None:
    assert duration(value) == expected
