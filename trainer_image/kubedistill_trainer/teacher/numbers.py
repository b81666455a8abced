"""Numbers in what a model says: the number that a text is, and the last one in a sentence. Pure."""

from __future__ import annotations

import re
from collections import deque
from fractions import Fraction

_MONEY = "$€£¥₹"
_BLANKS = " \u2009\u202f\u00a0"
_MAGNITUDES = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9,
    "trillion": 10**12, "dozen": 12,
}  # fmt: skip
_LONGEST_NUMBER = 400
_GREATEST_EXPONENT = 300
_DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\w))?"
_VALUE = rf"""
(?P<sign>[-+]\ ?(?=[{_MONEY}])|[-+])?(?:[{_MONEY}]\ ?)?(?P<inner>[-+])?
(?:
    (?P<whole>\d+)\ +(?P<part>[1-9]\d{{0,2}})\ ?/\ ?(?P<parts>[1-9]\d*)
  | (?:(?P<factor>{_DECIMAL})\ ?[×·*x]\ ?)?(?P<base>{_DECIMAL})
    \^(?:\{{(?P<braced>[-+]?\d{{1,3}})\}}|(?P<exponent>[-+]?\d{{1,3}})(?!\d))
  | (?P<number>{_DECIMAL})(?:\s*/\s*(?P<over>-?\d+))?
)
(?:\s+(?P<magnitude>{"|".join(_MAGNITUDES)})s?\b)?
"""
_WHOLE = re.compile(_VALUE, re.VERBOSE | re.IGNORECASE)
_WITHIN = re.compile(rf"(?<![\w.]){_VALUE}", re.VERBOSE | re.IGNORECASE)
_GROUPED = re.compile(rf"([-+]?\d{{1,3}})((?:[{_BLANKS}]\d{{3}})+)(?!\d)")
_BEFORE = re.compile(
    r"""(?: [\^_*/+|{√×·÷] | \\[A-Za-z]+ | (?<![-=])[<>]   # an operator, a command, a bound
    | [\w)]- | [\d)]\s*-\s* | \b[A-Za-z]\s+-\s+             # what it is taken from; 10-20
    | \d[:.,](?!\s) | \d[ ]+ | \d\s*x | \w\(                        # 12:30; 1,23; 1 2; f(3)
    | \b(?:not|(?:cannot|can't)\ be)\s | \d\s+(?:or|and)\s+                          # not 6; 5 or 6
    )\s*$""",
    re.VERBOSE | re.IGNORECASE,
)
"""What makes a number behind it a part of something else, or one that is not meant."""
_AFTER = re.compile(
    r"""\.\d | [:,]\d | \s*[\^*+=<>_|}√π×·÷\\]
    | \s*-\s*(?:[A-Za-z](?![A-Za-z])|[(\\])                 # 5 - x
    | \s*/(?!\s*[A-Za-z]{2}) | \((?![A-Za-z]{2})            # 5/x, but 5/month; 2(x)
    | [A-Za-z]\w*\d | [abcxyz]{2,3}(?![A-Za-z]) | pi(?![a-z])
    | (?![mgslhLVWJNCF])[A-Za-z](?![A-Za-z])                # 3x, but 3m
    | \s(?:[xyz]|pi|k|mn|bn|mio|mrd|lakhs?|crores?)(?![A-Za-z])""",
    re.VERBOSE,
)
_IN_A_LIST = re.compile(r"\d\s*,\s*$")
_AT_THE_END = re.compile(r"[\s)\]}.$]*$")
_LOOK_BEHIND = 40


def number(text: str) -> Fraction | None:
    """The number that a text is, None for any other text.

    Mixed numbers (`3 1/2`), powers (`2 × 10^3`) and words of magnitude (`5 million`) are numbers;
    signs of money and per cent, degrees, separators of thousands, brackets around it and a full
    stop at the end do not count.
    """
    bare = text.strip()
    if len(bare) > _LONGEST_NUMBER:
        return None
    bare = bare.rstrip(".").strip().strip("%°").strip()
    bare = re.sub(r"^([-+]?)\(([^()]*)\)$", r"\1\2", bare)
    bare = re.sub(r"^([-+])\s+", r"\1", bare).rstrip(_MONEY).strip()
    match = _WHOLE.fullmatch(bare) or _WHOLE.fullmatch(_GROUPED.sub(_joined, bare, count=1))
    return None if match is None else _value(match)


def last_number(text: str) -> Fraction | None:
    """The last number in a text, if it stands for itself.

    A number of an expression (`2\\pi`, `x/2`, `5 - 3`), of a time, a date or a list does not, nor
    one that is denied ("not 6"): then there is none, whatever comes before it.
    """
    tail = deque(_WITHIN.finditer(text), maxlen=1)
    if not tail or len((found := tail[0])[0]) > _LONGEST_NUMBER:
        return None
    start, end = found.span()
    before, after = text[max(0, start - _LOOK_BEHIND) : start], text[end:]
    if _BEFORE.search(before) or _AFTER.match(after):
        return None
    if _IN_A_LIST.search(before) and _AT_THE_END.match(after):
        return None
    return _value(found)


def _value(match: re.Match[str]) -> Fraction | None:
    """None where it is none: 1/0, 3 5/2, 10^999."""
    found: Fraction | None
    if match["whole"]:
        part = Fraction(int(match["part"]), int(match["parts"]))
        found = int(match["whole"]) + part if part < 1 else None
    elif match["base"]:
        found = _power(match)
    else:
        over = int(match["over"] or 1)
        found = _decimal(match["number"]) / over if over else None
    if found is None:
        return None
    negative = (match["sign"] or "").startswith("-") != (match["inner"] == "-")
    found *= _MAGNITUDES[match["magnitude"].lower()] if match["magnitude"] else 1
    return -found if negative else found


def _power(match: re.Match[str]) -> Fraction | None:
    base, exponent = _decimal(match["base"]), int(match["braced"] or match["exponent"])
    if abs(exponent) > _GREATEST_EXPONENT or (not base and exponent < 0):
        return None
    return _decimal(match["factor"] or "1") * Fraction(base**exponent)


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def _joined(match: re.Match[str]) -> str:
    return "".join(match[0].split())
