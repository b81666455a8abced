"""What changed between the configuration of a commit and the run's, in words."""

from __future__ import annotations

import json
from collections.abc import Mapping

from pydantic import JsonValue

_LONGEST_VALUE = 60


def differences(old: Mapping[str, JsonValue], new: Mapping[str, JsonValue]) -> list[str]:
    """One sentence for each key whose value is another one, sorted by key.

    `old` is the commit's `config`, `new` the run's: flat, name → value. Numbers are compared as
    numbers (1 is 1.0) and never with truth values (1 is not true).
    """
    return [
        f"{key}: committed {_said(old, key, 'under')}, now {_said(new, key, '')}"
        for key in sorted(old.keys() | new.keys())
        if not (key in old and key in new and _same(old[key], new[key]))
    ]


def _same(one: JsonValue, other: JsonValue) -> bool:
    match one, other:
        case bool(), bool():
            return one == other
        case (bool(), _) | (_, bool()):
            return False
        case dict(), dict():
            return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
        case list(), list():
            return len(one) == len(other) and all(map(_same, one, other))
        case _:
            return one == other


def _said(config: Mapping[str, JsonValue], key: str, preposition: str) -> str:
    if key not in config:
        return "without it" if preposition else "not set"
    text = json.dumps(config[key], ensure_ascii=False)
    if len(text) > _LONGEST_VALUE:
        text = text[: _LONGEST_VALUE - 1] + "…"
    return f"{preposition} {text}".strip()
