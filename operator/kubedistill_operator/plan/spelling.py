"""Names that a person wrote and that will not do: what is known, and what was probably meant."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches


def one_of(known: Sequence[str], wrong: str = "") -> str:
    """What to write: the known names, first the nearest to one that is `wrong`."""
    lowered = {name.lower(): name for name in known}
    near = get_close_matches(wrong.lower(), lowered, n=1)
    first = f"{lowered[near[0]]}, or " if near else ""
    return f"write {first}one of {', '.join(known)}"
