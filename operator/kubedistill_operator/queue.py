"""A work queue of keys: each key once, never by two workers at a time, again after a while.

The contract is client-go's: a key that is added while it is being worked on is worked on once
more afterwards; a failed key comes back after a growing wait; a key may ask to come back later.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from kubedistill_operator.cluster import log_failure

_log = logging.getLogger(__name__)


class Key(NamedTuple):
    """One object to look at."""

    kind: str
    namespace: str
    name: str


@dataclass
class Failures:
    """Waits after failures of a key: doubled each time, capped, with jitter."""

    base_seconds: float = 0.5
    cap_seconds: float = 60.0
    counts: dict[Key, int] = field(default_factory=dict)

    def next_wait(self, key: Key) -> float:
        count = self.counts.get(key, 0)
        self.counts[key] = count + 1
        wait = min(self.cap_seconds, self.base_seconds * 2.0 ** min(count, 20))
        return wait * random.uniform(0.8, 1.2)  # noqa: S311 - spreads load, guards nothing


@dataclass
class Waits:
    """Waits after failures of something that there is once: doubled each time, capped."""

    seconds: float = 0.5
    cap_seconds: float = 30.0

    def next(self) -> float:
        wait, self.seconds = self.seconds, min(self.cap_seconds, 2 * self.seconds)
        return wait


class WorkQueue:
    """Deduplicated keys, ready now or later."""

    def __init__(self) -> None:
        self._ready: deque[Key] = deque()
        self._since: dict[Key, float] = {}
        self._working: set[Key] = set()
        self._again: set[Key] = set()
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._wake = asyncio.Event()
        self.failures = Failures()

    def add(self, key: Key) -> None:
        """Work on a key as soon as a worker is free."""
        if key in self._working:
            self._again.add(key)
        elif key not in self._since:
            self._since[key] = time.monotonic()
            self._ready.append(key)
            self._wake.set()

    def add_later(self, key: Key, seconds: float) -> None:
        """Work on a key after a while; an earlier request for it stays."""
        loop = asyncio.get_running_loop()
        timer = self._timers.get(key)
        if timer is not None:
            if timer.when() <= loop.time() + seconds:
                return
            timer.cancel()
        self._timers[key] = loop.call_later(seconds, self._due, key)

    def _due(self, key: Key) -> None:
        self._timers.pop(key, None)
        self.add(key)

    async def get(self) -> Key:
        """The next key; `done` must follow."""
        while not self._ready:
            self._wake.clear()
            await self._wake.wait()
        key = self._ready.popleft()
        del self._since[key]
        self._working.add(key)
        timer = self._timers.pop(key, None)
        if timer is not None:
            # This pass will say anew when the next one is due.
            timer.cancel()
        return key

    def done(self, key: Key) -> None:
        self._working.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    def __len__(self) -> int:
        return len(self._ready)

    def oldest_wait_seconds(self) -> float:
        """How long the longest waiting key has been ready; 0 when none is."""
        return time.monotonic() - min(self._since.values()) if self._since else 0.0


Reconcile = Callable[[Key], Awaitable[float | None]]


async def work(queue: WorkQueue, reconcile: Reconcile) -> None:
    """One worker: forever take a key, reconcile it, and bring it back when it asks or fails."""
    while True:
        key = await queue.get()
        try:
            again = await reconcile(key)
        except Exception as error:
            wait = queue.failures.next_wait(key)
            log_failure(_log, "reconcile failed", error, key="/".join(key), wait=round(wait, 1))
            queue.add_later(key, wait)
        else:
            queue.failures.counts.pop(key, None)
            if again is not None:
                queue.add_later(key, again)
        finally:
            queue.done(key)
