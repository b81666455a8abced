"""Names that a person wrote and nobody knows: what is known, and what was probably meant."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches


def one_of(name: str, known: Sequence[str]) -> str:
    """What to write instead of `name`: the known names, the nearest of them first."""
    lowered = {candidate.lower(): candidate for candidate in known}
    near = get_close_matches(name.lower(), lowered, n=1)
    listed = f"write one of {', '.join(known)}"
    return f"write {lowered[near[0]]}, or {listed[6:]}" if near else listed
