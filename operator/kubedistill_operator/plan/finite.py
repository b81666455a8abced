"""Numbers that are none: JSON has no NaN and no infinity, and the API server takes none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_NONE = frozenset({"NaN", "Infinity", "-Infinity"})


def finite(document: Any) -> Any:
    """A JSON document without such numbers; an entry of a list that holds one goes as a whole.

    A status that held one would be refused, and with it all else that is to be written.
    """
    if isinstance(document, Mapping):
        return {key: finite(value) for key, value in document.items() if not _is_none(value)}
    if isinstance(document, list):
        return [
            finite(value) for value in document if not _is_none(value) and not _holds_one(value)
        ]
    return document


def _is_none(value: Any) -> bool:
    if isinstance(value, str):
        return value in _NONE
    return isinstance(value, float) and not math.isfinite(value)


def _holds_one(value: Any) -> bool:
    return isinstance(value, Mapping) and any(_is_none(part) for part in value.values())
