"""How long a server wants to be left alone, and the one clock by which all requests keep to it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import anyio

from kubedistill_trainer.teacher.metrics import ENDPOINT_WAIT

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_EPOCH = 1e9
"""A number from here on is a moment (Unix time in seconds), not a duration."""
_EPOCH_MS = 1e11
"""And from here on it is in milliseconds."""


def asked_wait(status: int, headers: Mapping[str, str], now: datetime) -> float | None:
    """Seconds for which the server asks not to be asked, by the headers of an answer; or None.

    `headers` are found by lower-case names. `retry-after-ms` and `Retry-After` (RFC 9110, 10.2.3:
    seconds or a date) count on a refusal; a used-up `x-ratelimit-remaining…` with its
    `x-ratelimit-reset…` counts on any answer, so that the refusal need not come first.
    """
    waits = [_reset(headers, name, now) for name in ("", "-requests", "-tokens")]
    if status >= 400:
        milliseconds = _number(headers.get("retry-after-ms"))
        waits.append(None if milliseconds is None else milliseconds / 1000)
        if milliseconds is None:
            waits.append(_seconds(headers.get("retry-after"), now))
    known = [max(0.0, wait) for wait in waits if wait is not None]
    return max(known, default=None)


def _reset(headers: Mapping[str, str], kind: str, now: datetime) -> float | None:
    remaining = _number(headers.get(f"x-ratelimit-remaining{kind}"))
    if remaining is None or remaining > 0:
        return None
    return _seconds(headers.get(f"x-ratelimit-reset{kind}"), now)


def _seconds(text: str | None, now: datetime) -> float | None:
    """Of `12`, `1.5`, `6m0s`, `20ms`, Unix time, an RFC 3339 or an HTTP date; None for others."""
    if not text or text.isspace():
        return None
    number = _number(text)
    if number is not None:
        if number < _EPOCH:
            return number
        return number / (1000 if number >= _EPOCH_MS else 1) - now.timestamp()
    if _DURATION.sub("", text.strip()) == "":
        return sum(float(amount) * _UNITS[unit] for amount, unit in _DURATION.findall(text))
    moment = _moment(text)
    return None if moment is None else (moment - now).total_seconds()


def _moment(text: str) -> datetime | None:
    for read in (datetime.fromisoformat, parsedate_to_datetime):
        try:
            found = read(text.strip())
        except ValueError:
            continue
        return found if found.tzinfo is not None else found.replace(tzinfo=UTC)
    return None


def _number(text: str | None) -> float | None:
    try:
        found = float(text or "")
    except ValueError:
        return None
    return found if 0 <= found < float("inf") else None


class Pace:
    """When the server may be asked again. One for all requests: who is refused slows everybody."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until = clock()

    def hold(self, seconds: float) -> None:
        """Nobody asks for so long from now."""
        self._until = max(self._until, self._clock() + seconds)

    async def ready(self) -> None:
        """Wait until the server may be asked."""
        began = self._clock()
        while (left := self._until - self._clock()) > 0:  # noqa: ASYNC110 - it may move meanwhile
            await anyio.sleep(left)
        ENDPOINT_WAIT.inc(self._clock() - began)
