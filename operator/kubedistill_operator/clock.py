"""The time by the API server's clock.

Deadlines, waits and times to live are counted from stamps that the API server, its controllers or an
operator on another machine wrote. By this machine's own clock, an hour off, a job would fail by its
deadline at once, or two attempts would run side by side.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

_log = logging.getLogger(__name__)
_HEARD, _ENOUGH = 9, 3
"""Answers of which the middle one counts, so that a few that lie or are late change nothing."""
_TOLERANCE_SECONDS = 2.0
"""Dates are whole seconds: a clock that is right to this is left alone."""


class ServerClock:
    """Goes as evenly as this machine's steady clock, and is set by the dates of answers.

    Until some have come it is this machine's time of day.
    """

    def __init__(self, steady: Callable[[], float] = time.monotonic) -> None:
        self._steady = steady
        self._ahead = time.time() - steady()
        self._heard: deque[float] = deque(maxlen=_HEARD)

    def now(self) -> datetime:
        return datetime.fromtimestamp(self._steady() + self._ahead, UTC)

    def heard(self, date: str | None) -> None:
        """Take in the Date header of an answer that came just now; None where it has none."""
        try:
            moment = parsedate_to_datetime(date or "").timestamp()
        except ValueError:
            return
        self._heard.append(moment + 0.5 - self._steady())
        if len(self._heard) < _ENOUGH:
            return
        ahead = statistics.median_low(self._heard)
        if abs(ahead - self._ahead) > _TOLERANCE_SECONDS:
            _log.warning(
                "the API server's clock is another one than ours, and is gone by",
                extra={"seconds": round(ahead - self._ahead, 1)},
            )
            self._ahead = ahead
