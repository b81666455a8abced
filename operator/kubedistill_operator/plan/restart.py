"""When the next attempt may start, and when there is none."""

from __future__ import annotations

import hashlib

from kubedistill_api.status import Attempt

from kubedistill_operator.plan.draft import Timing

_JITTER = 0.2


def backoff_seconds(uid: str, number: int, failures: int, timing: Timing) -> float:
    """Base times two to the power of the failures before, capped, ±20% that a job keeps.

    The jitter comes from the job and the attempt, so that planning again gives the same wait.
    """
    if failures < 1:
        return 0.0
    wait = min(timing.backoff_cap, timing.backoff_base * 2.0 ** min(failures - 1, 30))
    digest = hashlib.sha256(f"{uid}/{number}".encode()).digest()
    share = int.from_bytes(digest[:4]) / 0xFFFFFFFF
    return wait * (1 - _JITTER + 2 * _JITTER * share)


def advanced(attempt: Attempt, newest_commit: int) -> bool:
    """Whether an attempt committed a step beyond the one that it began with."""
    return newest_commit > (attempt.resumed_from_step or 0)
