"""Does a save still fit into the grace that a pod was given?"""

from __future__ import annotations

import math
from collections.abc import Sequence

FIRST_SAVE_SECONDS = 10.0
"""Taken for a save before one was measured."""


def p99(values: Sequence[float]) -> float:
    """99th percentile by nearest rank; 0 for nothing."""
    if not values:
        return 0.0
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


def fits_grace(
    step_seconds: Sequence[float],
    save_seconds: Sequence[float],
    grace_seconds: float,
    margin_seconds: float,
) -> bool:
    """Whether p99(step) + p99(save) fits into the grace less a margin. All in seconds."""
    save = p99(save_seconds) if save_seconds else FIRST_SAVE_SECONDS
    return p99(step_seconds) + save <= grace_seconds - margin_seconds
