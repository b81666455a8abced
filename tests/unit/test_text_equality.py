"""Which answers say the same."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kubedistill_trainer.teacher.equality import final, key, number, same

SAME = [
    ("42", "42"), ("42.0", "42"), ("+42", "42"), (" 42. ", "42"), ("042", "42"), ("4.2e1", "42"),
    ("1,234,567", "1234567"), ("$1,234.50", "1234.5"), ("1234.50 €", "1,234.5"), ("-$5", "-5"),
    ("\u22125", "-5"), ("15%", "15"), ("3/4", "0.75"), ("\\frac{3}{4}", "3/4"), ("6 / 8", "3/4"),
    ("$\\frac{1}{2}$", "0.5"), ("\\boxed{42}", "42"), ("So \\boxed{\\text{Paris}}.", "paris"),
    ("\\boxed{1} or rather \\boxed{\\frac{1}{2}}", "1/2"), ("**42**", "42"), ("`42`", "42"),
    ("Answer: 42", "42"), ("It follows.\n**Final answer:** 42", "42"), ("The answer is: 42", "42"),
    ("She has 42 apples.", "42"), ("It is 42.", "42"), ("12 of 42", "42"), ("It costs $1,042.50!", "1042.5"),
    ("Paris", "paris"), (" The  Answer ", "the answer"), ("Paris.", "Paris"), ('"Paris"', "Paris"),
    ("Paris!", "paris"), ("\\text{Paris}", "Paris"), ("Größe", "größe"),
    ("42", "42 "), ("42km", "42"), ("yes,", "yes"),
]  # fmt: skip
DIFFERENT = [
    ("43", "42"), ("-42", "42"), ("4.2", "42"), ("42 of 50", "42"), ("forty-two", "42"), ("", "42"),
    ("1,23", "123"), ("x42", "42"), ("0.333", "1/3"), ("1/0", "0"),
    ("Paris or London", "Paris"), ("not Paris", "Paris"), ("42", "Paris"), ("Paris 42", "Paris"),
    ("version 4.2.1", "1"), ("He said \\boxed{7}, not 42", "42"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "expected"), SAME)
def test_the_same(answer: str, expected: str) -> None:
    assert same(answer, expected), (key(answer), key(expected))


@pytest.mark.parametrize(("answer", "expected"), DIFFERENT)
def test_not_the_same(answer: str, expected: str) -> None:
    assert not same(answer, expected), (key(answer), key(expected))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e3", 1000), ("1E-2", Fraction(1, 100)), (".5", Fraction(1, 2)), ("12 345", 12345),
        ("1e9999", None), ("", None), (".", None), ("-", None), ("1 2", None), ("1.2.3", None),
        ("9" * 500, None), ("$", None), ("%", None),
    ],
)  # fmt: skip
def test_what_is_a_number(text: str, value: Fraction | None) -> None:
    assert number(text) == value


def test_a_box_that_is_not_closed_reaches_to_the_end() -> None:
    assert final("\\boxed{\\frac{1}{2}") == "\\frac{1}{2}"


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e15, max_value=1e15))
def test_a_number_is_itself_however_it_is_written(value: float) -> None:
    whole = f"{value:.3f}"
    grouped = f"{value:,.3f}"
    assert key(whole) == key(grouped) == key(f"It is {grouped}.".removeprefix("It is ")[:-1])
    assert math.isclose(float(key(whole)), round(value, 3), abs_tol=1e-6)  # type: ignore[arg-type]


@given(st.text(max_size=80))
def test_any_text_is_the_same_as_itself(text: str) -> None:
    assert same(text, text)
