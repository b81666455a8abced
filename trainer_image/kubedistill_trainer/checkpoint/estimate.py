"""Whether a checkpoint still fits into what is left of a pod's grace period."""

from __future__ import annotations

import math
from collections.abc import Sequence

_QUANTILE = 0.99


def fits_grace(
    step_seconds: Sequence[float],
    save_seconds: Sequence[float],
    grace_seconds: float,
    margin_seconds: float,
) -> bool:
    """True when grace − margin covers p99(step) + p99(save).

    Without any save so far its length is unknown, and the answer is False: a save that is cut
    short is worth nothing, and the exit it delays may be. No step so far counts as none to wait
    for. A p99 is the nearest rank, so up to 100 values it is the largest.
    """
    if not save_seconds:
        return False
    needed = p99(save_seconds) + (p99(step_seconds) if step_seconds else 0.0)
    return grace_seconds - margin_seconds >= needed


def p99(values: Sequence[float]) -> float:
    """The 99th percentile of at least one value, by the nearest rank."""
    ordered = sorted(values)
    return ordered[math.ceil(_QUANTILE * len(ordered)) - 1]
