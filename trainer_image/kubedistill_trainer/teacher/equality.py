"""Whether two answers say the same: numbers compared as numbers, the rest as normalised text."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import TypeAlias

from kubedistill_trainer.teacher.thought import after_marker

Key: TypeAlias = "Fraction | str"
_BOXED = "\\boxed{"
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_NUMBER = r"[-+]?(?:\d{1,3}(?:[,\u202f\u00a0 ]\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d{1,3})?"
_WHOLE = re.compile(rf"({_NUMBER})(?:\s*/\s*(\d+))?")
_WITHIN = re.compile(
    r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3})?"
    r"(?:\s*/\s*\d+)?"
)
_MONEY = "$€£¥₹"
_MINUS = str.maketrans({"\u2212": "-", "\u2013": "-", "\uff0d": "-"})
_LONGEST_NUMBER = 400


def same(answer: str, expected: str) -> bool:
    """Whether a teacher's answer is the record's.

    Where the record's is a number, the last number of the teacher's answer counts too ("She has 5
    apples."): a teacher that says more than it was asked is not wrong.
    """
    found, wanted = key(answer), key(expected)
    if found == wanted:
        return True
    if not isinstance(wanted, Fraction) or isinstance(found, Fraction):
        return False
    numbers = _WITHIN.findall(_plain(final(answer)))
    return bool(numbers) and number(numbers[-1]) == wanted


def key(answer: str) -> Key:
    """What two answers share that say the same: a number, or a text without its trimmings."""
    text = _plain(final(answer))
    value = number(text)
    return _normalised(text) if value is None else value


def final(answer: str) -> str:
    """The answer proper: what stands in the last \\boxed{}, or follows the last `Answer:`."""
    boxed = _last_boxed(answer)
    return after_marker(answer) if boxed is None else boxed


def number(text: str) -> Fraction | None:
    """The number that a text is, None for any other text. Signs of money and per cent, separators of
    thousands and a full stop at the end do not count."""
    bare = text.strip().rstrip(".").strip().strip("%").strip()
    bare = re.sub(rf"^([-+]?)\s*[{_MONEY}]\s*", r"\1", bare).rstrip(_MONEY).strip()
    match = _WHOLE.fullmatch(bare)
    if match is None or not re.search(r"\d", match[1]) or len(bare) > _LONGEST_NUMBER:
        return None
    value = Fraction(re.sub(r"[,\u202f\u00a0 ]", "", match[1]))
    if match[2] is None:
        return value
    return value / int(match[2]) if int(match[2]) else None


def _plain(text: str) -> str:
    """Without the marks of Markdown and LaTeX that say how it looks."""
    text = text.translate(_MINUS)
    text = _FRACTION.sub(r"\1/\2", _TEXT.sub(r"\1", text))
    text = text.replace("\\$", "$").replace("\\%", "%").replace("\\,", "").replace("\\!", "")
    for mark in ("**", "__", "`", "\\(", "\\)", "\\[", "\\]"):
        text = text.replace(mark, "")
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text.strip("$")
    return text.strip()


def _normalised(text: str) -> str:
    """Case, blanks, quotes and the punctuation at the end do not count."""
    words = " ".join(text.casefold().split())
    return words.strip("\"'“”‘’ ").rstrip(".!?,;: ").strip("\"'“”‘’ ")


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
