"""Whether two answers say the same: numbers compared as numbers, the rest as normalised text."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import TypeAlias

from kubedistill_trainer.teacher.numbers import last_number, number
from kubedistill_trainer.teacher.thought import after_marker

Key: TypeAlias = "Fraction | str"
_BOXED = "\\boxed{"
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox|operatorname)\{([^{}]*)\}")
_FRACTION = re.compile(r"(\d?)\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_RAISED = re.compile("[⁰¹²³⁴-⁹]+")
_THOUSANDS = re.compile(r"(?<=\d)[\u2009\u202f\u00a0](?=\d{3}(?!\d))")
_UNIT_POWER = re.compile(
    r"((?<=\d)\s*(?:[mcdk]m|in|ft|yd|mi|inch(?:es)?|feet|met(?:er|re)s?|units?)"
    r"|(?<=\d)\s+[ms]|/s)\s*\^(?:\{-?\d\}|-?\d)"
)
_SPACE = re.compile(r"\\(?:approx|[rR]ightarrow|implies|therefore|q?quad|[;: ])(?![A-Za-z])")
_SIZE = re.compile(r"\\(?:left|right|[bB]ig)(?=[()\[\]|{}.\\])")
_EMPHASIS = re.compile(r"(?<![\w*])\*([^*\s][^*\n]{0,80})\*(?![\w*])")
_BULLET = re.compile(r"^[ \t]*[*•][ \t]+", re.MULTILINE)
_HTML = re.compile(r"</?[a-z]{1,6}>", re.IGNORECASE)
_MARKS = {
    "\\$": "$", "\\%": "%", "\\,": "", "\\!": "", "\\times": "×", "\\cdot": "·",
    "^\\circ": "°", "^{\\circ}": "°", "\\degree": "°",
    "**": "", "__": "", "`": "", "\\(": "", "\\)": "", "\\[": "", "\\]": "",
}  # fmt: skip
_MINUS = str.maketrans({"\u2212": "-", "\u2013": "-", "\uff0d": "-", "\u2044": "/"})
_ASSIGNED = re.compile(r"(\\?[A-Za-z]\w{0,20})\s*=\s*([^=]+)")
_MEASURE = re.compile(r"[^\W\d]+(?:[\s/·-]+[^\W\d]+){0,2}[.!]?")
_LED = re.compile(
    r"(?:so |thus |therefore |hence )?(?:it|that|this|there|(?:the |my )?(?:final )?answer|result)"
    r"(?: is|'s|’s| are) (?:about |exactly |approximately )?",
    re.IGNORECASE,
)
_OPERATOR = re.compile(r"\s*([-,;=+*/^()\[\]{}<>])\s*")
_QUOTES = "\"'“”‘’ "


def same(answer: str, expected: str) -> bool:
    """Whether a teacher's answer is the record's.

    Where the record's is a number, the last number of the teacher's answer counts too ("She has 5
    apples."): a teacher that says more than it was asked is not wrong.
    """
    found, wanted = key(answer), key(expected)
    if found == wanted:
        return True
    said, named = _plain(final(answer)), _assigned(_plain(final(expected)))
    if named is not None:
        name, wanted = named
        other = _assigned(said)
        if other is not None and other[0] != name:
            return False
    if not isinstance(wanted, Fraction):
        return False
    return (found if isinstance(found, Fraction) else last_number(said)) == wanted


def key(answer: str) -> Key:
    """What two answers share that say the same: a number, or a text without its trimmings."""
    text = _plain(final(answer))
    value = number(text)
    return _normalised(text) if value is None else value


def group(answer: str, expected: str | None = None) -> Key:
    """What the samples of one prompt share that agree, by the comparison of `same`.

    All that are the record's answer share its key. Of others a number is the same with a unit
    (`5 kg`), in a few words ("It is 5.") and as a variable's value (`x = 5`).
    """
    if expected and same(answer, expected):
        return key(expected)
    found, text = key(answer), _plain(final(answer))
    if isinstance(found, Fraction):
        return found
    named = _assigned(text)
    if named is not None:
        return named[1]
    value = _measured(_LED.sub("", text, count=1) if _LED.match(text) else text)
    return found if value is None else value


def final(answer: str) -> str:
    """The answer proper: what stands in the last \\boxed{}, or follows the last `Answer:`."""
    boxed = _last_boxed(answer)
    return after_marker(answer) if boxed is None else boxed


def _assigned(text: str) -> tuple[str, Fraction] | None:
    """Name and value of `x = 3`; None for any other text."""
    match = _ASSIGNED.fullmatch(text)
    value = None if match is None else number(match[2])
    return None if match is None or value is None else (match[1], value)


def _measured(text: str) -> Fraction | None:
    """The number of a text that is one, or one before at most three words."""
    value = number(text)
    if value is not None:
        return value
    words = re.search(r"(?<=[\d%°])\s*[^\W\d]", text)
    if words is None or not _MEASURE.fullmatch(text[words.start() :].strip()):
        return None
    return None if number(text[: words.start()]) is None else last_number(text)


def _plain(text: str) -> str:
    """Without the marks of Markdown, HTML and LaTeX that say how it looks, and in one spelling of
    Unicode's (NFKC). A text of nothing but marks stays as it is."""
    given = text.strip()
    text = _THOUSANDS.sub("", _VULGAR.sub(r" \g<0>", text))
    text = _RAISED.sub(lambda m: "^" + unicodedata.normalize("NFKC", m[0]), text)
    text = unicodedata.normalize("NFKC", text).translate(_MINUS)
    text = _TEXT.sub(r"\1", text).replace("{,}", ",")
    text = _FRACTION.sub(_fraction, _SIZE.sub("", text))
    for mark, instead in _MARKS.items():
        text = text.replace(mark, instead)
    text = _UNIT_POWER.sub(r"\1", _SPACE.sub(" ", text))
    text = _HTML.sub("", _EMPHASIS.sub(r"\1", _BULLET.sub("", text))).strip()
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text.strip("$")
    return text.strip() or given


def _fraction(match: re.Match[str]) -> str:
    """`3/4`, with the sign before it, and a blank after the digit that makes it a mixed number."""
    above, below = (match[2] or match[3] or "").strip(), (match[4] or match[5] or "").strip()
    signs = [part for part in (above, below) if part.startswith("-")]
    if below.startswith("-") and number(above) is not None and number(below) is not None:
        above, below = above.removeprefix("-"), below.removeprefix("-")
        above = f"-{above}" if len(signs) == 1 else above
    above, below = (p if re.fullmatch(r"-?[\w.,]*", p) else f"({p})" for p in (above, below))
    return f"{match[1]}{' ' if match[1] else ''}{above}/{below}"


def _normalised(text: str) -> str:
    """Case, blanks, quotes and the punctuation at the end do not count, unless nothing else is
    there; nor do blanks beside signs, and brackets around one thing."""
    words = " ".join(text.casefold().split())
    bare = words.strip(_QUOTES).rstrip(".!?,;: ").strip(_QUOTES)
    bare = _OPERATOR.sub(r"\1", bare)
    bare = re.sub(r"\{(\w)\}", r"\1", bare)
    bare = re.sub(r"^\(([^(),]*)\)$", r"\1", bare)
    bare = re.sub(r"^(\w)\)$", r"\1", bare)
    return bare or words


def _last_boxed(text: str) -> str | None:
    """What the last \\boxed{} holds, braces within it included."""
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    depth, begin = 1, start + len(_BOXED)
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place]
    return text[begin:]
