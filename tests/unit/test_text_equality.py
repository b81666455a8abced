"""Which answers say the same."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kubedistill_trainer.teacher.equality import final, group, key, same
from kubedistill_trainer.teacher.numbers import number

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
    ("3\\frac{1}{2}", "3.5"), ("3 1/2", "3.5"), ("It is 3 1/2", "3.5"), ("3½", "3.5"), ("½", "0.5"),
    ("-3\\frac12", "-3.5"), ("\\frac34", "3/4"), ("\\frac 3 4", "0.75"), ("\\frac{3}{-4}", "-3/4"),
    ("\\frac{-3}{-4}", "0.75"), ("It is .5", "0.5"), ("result is -.5", "-0.5"), ("costs -$5", "-5"),
    ("lost $-5 in total", "-5"), ("x = -3", "-3"), ("-3", "x = -3"), ("x=3.0", "x = 3"),
    ("x=y", "x = y"), ("(A)", "A"), ("A)", "(a)"), ("A", "(A)"), ("café", "cafe\u0301"),
    ("１２", "12"), ("(1, 2)", "(1,2)"), ("x^{2}", "x^2"), ("\\sqrt{2}", "\\sqrt2"), ("(-3)", "-3"),
    ("-(3)", "-3"), ("- 3", "-3"), ("1\u2009000", "1000"), ("It is 1\u202f000 km.", "1000"),
    ("10^3", "1000"), ("10^{-2}", "0.01"), ("5²", "25"), ("2 \\times 10^3", "2000"), ("-2^2", "-4"),
    ("$5 million", "5000000"), ("It costs 5 million.", "5,000,000"), ("90^\\circ", "90"), ("1{,}000", "1000"),
    ("25 cm^2", "25"), ("25\\text{ cm}^2", "25"), ("9.8 m/s^2", "9.8"), ("60 km/h", "60"), ("3m", "3"),
    ("5 - 3 = 2", "2"), ("x = 2 + 3 = 5 apples", "5"), ("<b>5</b>", "5"), ("It is *5*.", "5"),
    ("The total is $5$.", "5"), ("Of 12, 5 are red", "5"), ("So it is (42)", "42"), ("?", "?"),
    ("5 grams of CO2", "5"), ("\\frac{1{,}000}{2}", "500"), ("\\(6 \\times 7 = 42\\)", "42"),
    ("-42 \\text{ square units}", "-42"), ("42-year-old", "42"), ("3.0 × 10^8 m/s", "3e8"),
]  # fmt: skip
DIFFERENT = [
    ("43", "42"), ("-42", "42"), ("4.2", "42"), ("42 of 50", "42"), ("forty-two", "42"), ("", "42"),
    ("1,23", "123"), ("x42", "42"), ("0.333", "1/3"), ("1/0", "0"),
    ("Paris or London", "Paris"), ("not Paris", "Paris"), ("42", "Paris"), ("Paris 42", "Paris"),
    ("3\\frac{1}{2}", "15.5"), ("It is 3 1/2", "0.5"), ("costs -$5", "5"), ("loss of -$5", "5"),
    ("2\\pi", "2"), ("2π", "2"), ("2pi", "2"), ("\\sqrt{2}", "2"), ("\\frac{\\sqrt{3}}{2}", "2"),
    ("x^2", "2"), ("x²", "2"), ("x/2", "2"), ("10^3", "3"), ("10^3", "10"), ("5²", "52"),
    ("3x", "3"), ("3 x", "3"),
    ("3x+2", "2"), ("x - 3", "3"), ("It cannot be 42", "42"), ("3 x 4", "4"),
    ("<br>", "<hr>"), ("<br>", ""), ("**", "`"),
    ("5-3", "-3"), ("5-3", "3"), ("5 -3", "-3"), ("5 + 3", "3"), ("f(3)", "3"), ("|-3|", "-3"), ("x_2", "2"),
    ("x > 5", "5"), ("\\log 2", "2"), ("1e3x", "1000"), ("1e3x", "1"), ("x = 3", "y = 3"), ("x = -3", "3"),
    ("5 million", "5"), ("$5 million", "5"), ("5k", "5"), ("It costs 5 thousand", "5"), ("12:30", "30"),
    ("It is 12:30", "30"), ("3:2", "2"), ("2024-01-05", "5"), ("5/3/2024", "2024"), ("(1, 2)", "2"),
    ("1, 2", "2"),
    ("set {1,2}", "2"), ("5 or 6", "6"), ("The answer is 5, not 7", "7"), ("It is .5", "5"),
    ("1.000.000", "0"),
    ("3 5/2", "2.5"), ("0^{-1}", "0"), ("10^999", "10"), ("A)", "B)"), ("", "?"), ("?", "!"), ("+", "-"),
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


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["5", "5 apples", "5 kg", "It is 5.", "The answer is 5 km/h", "x = 5", "**5**", "5.0"], None),
        (["5 million", "5000000", "$5 million in total"], None),
        (["5", "She has 5 apples.", "5 kg"], "5"),
        (["5 kg", "5 kg."], "5 kg"),
        (["(A)", "A", "a."], None),
    ],
)  # fmt: skip
def test_samples_that_agree(answers: list[str], expected: str | None) -> None:
    assert len({group(answer, expected) for answer in answers}) == 1


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["5 apples", "6 apples", "-5", "5 million", "5x", "5 + x", "5:30"], None),
        (["Henry V in 1415", "Agincourt in 1415", "1415"], None),
        (["5", "6", "It is 7"], "5"),
        (["x = 3", "y = 3"], "x = 3"),
    ],
)
def test_samples_that_do_not(answers: list[str], expected: str | None) -> None:
    assert len({group(answer, expected) for answer in answers}) == len(answers)


@pytest.mark.parametrize(
    "filling", ["1", "1,000", "1 2/", " ", "\\frac{1}", "*a", "1 × ", "10^", "."]
)
def test_a_long_answer_is_read_in_one_go(filling: str) -> None:
    assert not same("a" + filling * (100_000 // len(filling)) + "x", "42")


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
