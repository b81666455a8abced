"""When the next attempt may start, and when there is none."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from kubedistill_api import reasons
from kubedistill_api.status import Attempt

from kubedistill_operator.plan.draft import Timing
from kubedistill_operator.plan.times import parse_time

_JITTER = 0.2
_SHORT_SECONDS = 60.0
_FREE_AT_ONCE = 2
_BY_PLAN = (reasons.OUT_OF_MEMORY, reasons.UNSCHEDULABLE)
"""Free ends after which the next attempt is another one: they cannot repeat for ever."""


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


def waits_counted(attempts: Sequence[Attempt], failures: int) -> int:
    """Failures that the wait after the newest attempt is of.

    A charged one waits the base at least, also after progress: a crash loop must not spin. A free
    one is followed at once, unless some that lived less than a minute came one after the other:
    something (an eviction, another controller) ends them as fast as they come.
    """
    if attempts[-1].charged:
        return max(1, failures)
    free = 0
    for attempt in reversed(attempts):
        lived = running_seconds(attempt)
        if attempt.charged or attempt.reason in _BY_PLAN or lived >= _SHORT_SECONDS:
            break
        free += 1
    return max(0, free - _FREE_AT_ONCE)


def running_seconds(attempt: Attempt) -> float:
    """From the request for an attempt's pods to the end of the last of them; 0 while it runs."""
    start, end = parse_time(attempt.start_time), parse_time(attempt.end_time)
    return max(0.0, (end - start).total_seconds()) if start and end else 0.0


def mean_seconds_between_failures(attempts: Sequence[Attempt]) -> float | None:
    """Time that attempts ran over the failures among them; None while none has failed.

    What waited for room in vain did not run.
    """
    failed = failures_seen(attempts)
    if not failed:
        return None
    return max(1.0, sum(running_seconds(a) for a in _that_ran(attempts)) / failed)


def failures_seen(attempts: Sequence[Attempt]) -> int:
    """Charged ends, disruptions, and restarts of ranks in their pods, of attempts that are over."""
    return sum(
        a.rank_restarts + (a.charged or a.reason == reasons.DISRUPTED) for a in _that_ran(attempts)
    )


def _that_ran(attempts: Sequence[Attempt]) -> list[Attempt]:
    return [a for a in attempts if a.end_time and a.reason != reasons.UNSCHEDULABLE]


def grace_seconds(least: int, save_seconds: float | None) -> int:
    """Grace of the next attempt's pods: two saves and half a minute fit, as far as saves are known."""
    return max(least, int(2 * (save_seconds or 0.0)) + _BEYOND_SAVES)


_BEYOND_SAVES = 30
