"""How far a teacher may be ahead of its students: their cursors, and the writer that heeds them.

```
cursors/<consumer>/<rank>.json   what a rank has read, and which partitions it waits for
```
A rank says every few seconds how many samples of each partition it has read at least once, and at
once when it begins to wait for one that is not committed. A writer with a byte budget pauses while
what it has committed and nobody has read exceeds the budget. It never does while a student that is
alive waits for a partition that the writer is to write: so they cannot wait for each other.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kubedistill_trainer.store.client import Store
from kubedistill_trainer.store.errors import NotFound, StoreError, StoreUnavailable

_log = logging.getLogger(__name__)
_INTERVAL_SECONDS = 5.0
_LEAST_SECONDS = 0.5
_DEAD_AFTER_SECONDS = 60.0
_POLL_SECONDS = 1.0


class Cursor(BaseModel):
    """One rank's position in a stream."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    beat: int = Field(ge=0)
    """Rises with each writing: that a rank is alive shows without comparing clocks."""
    read: dict[int, int]
    """Distinct samples read, by partition."""
    waits: frozenset[int] = frozenset()
    """Partitions in which a sample is waited for that is not committed."""


class CursorKeeper:
    """Publishes a rank's cursor from a thread of its own. `stream` is rooted at the stream.

    `consumer` is the same in all attempts of a job, so that what an earlier one read still counts.
    Once `done`, which means that the stream is complete, no writer is left to be told.
    """

    def __init__(
        self,
        stream: Store,
        consumer: str,
        *,
        done: Callable[[], bool] = lambda: False,
        interval_seconds: float = _INTERVAL_SECONDS,
    ) -> None:
        self._stream = stream
        self._done = done
        self._key = f"cursors/{consumer}.json"
        self._interval = interval_seconds
        self._read: Counter[int] = Counter()
        self._waits: Counter[int] = Counter()
        self._lock = threading.Lock()
        self._news, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="stream-cursor", daemon=True)
        self._thread.start()

    def count(self, partition: int) -> None:
        """One more sample of a partition was read for the first time."""
        with self._lock:
            self._read[partition] += 1

    @contextlib.contextmanager
    def waiting(self, partition: int) -> Iterator[None]:
        """While a sample of the partition is waited for."""
        with self._lock:
            self._waits[partition] += 1
        self._news.set()
        try:
            yield
        finally:
            with self._lock:
                self._waits[partition] -= 1

    def close(self) -> None:
        """Stop; the cursor stays."""
        self._closed.set()
        self._news.set()
        self._thread.join(_LEAST_SECONDS)  # it may be within a request, and keeps nothing alive

    def _run(self) -> None:
        before, beat = Counter[int](), 0
        with contextlib.suppress(StoreError):
            if (found := _cursor(self._stream, self._key)) is not None:
                before, beat = Counter(found.read), found.beat
        while not (self._closed.is_set() or self._done()):
            self._news.clear()
            beat += 1
            with self._lock:
                # The least that is certain: what an earlier attempt read, this one reads again.
                read = dict(before | self._read)
                waits = frozenset(p for p, n in self._waits.items() if n)
            cursor = Cursor(beat=beat, read=read, waits=waits)
            # A cursor that is not written counts as an old one; the next is due soon.
            with contextlib.suppress(StoreError):
                self._stream.put(self._key, cursor.model_dump_json().encode())
            self._closed.wait(min(_LEAST_SECONDS, self._interval))
            self._news.wait(self._interval)


class Budget:
    """Holds one partition's writer back. `stream` is rooted at the stream.

    `mine` are the partitions that this process is to write, `partition` among them, and
    `share_bytes` is this partition's part of the budget. `pause(seconds)` is called again and again
    while the writer waits, `tell(held)` when that begins and ends.
    """

    def __init__(
        self,
        stream: Store,
        partition: int,
        *,
        mine: Collection[int],
        share_bytes: float,
        pause: Callable[[float], object] = time.sleep,
        tell: Callable[[bool], object] = lambda held: None,
        clock: Callable[[], float] = time.monotonic,
        dead_after_seconds: float = _DEAD_AFTER_SECONDS,
    ) -> None:
        self._stream = stream
        self._partition = partition
        self._mine = frozenset(mine)
        self._share = share_bytes
        self._pause = pause
        self._tell = tell
        self._clock = clock
        self._dead_after = dead_after_seconds
        self._beats: dict[str, tuple[int, float]] = {}

    def hold(self, size_bytes: int, committed_bytes: int, committed: int) -> None:
        """Wait until `size_bytes` more may be committed beside what is: bytes and samples."""
        held = False
        while not self._may(size_bytes, committed_bytes, committed):
            if not held:
                held = True
                _log.info("the byte budget is used up: waiting for students to read")
                self._tell(held)
            self._pause(_POLL_SECONDS)
        if held:
            self._tell(False)
            _log.info("going on", extra={"partition": self._partition})

    def _may(self, size_bytes: int, committed_bytes: int, committed: int) -> bool:
        # The first shard is free: students start on it, and a small budget would never let it by.
        if committed == 0 or committed_bytes + size_bytes <= self._share:
            return True
        try:
            cursors = self._cursors()
        except StoreUnavailable:
            return False
        if any(self._alive(key, c) and c.waits & self._mine for key, c in cursors.items()):
            return True
        read = min(self._most_read(cursors), committed)
        return committed_bytes * (1 - read / committed) + size_bytes <= self._share

    def _most_read(self, cursors: dict[str, Cursor]) -> int:
        """Samples of this partition that the consumer which is farthest has read."""
        # Ranks of a consumer read other samples each, in one pass over the data.
        by_consumer: Counter[str] = Counter()
        for key, cursor in cursors.items():
            by_consumer[key.rsplit("/", 1)[0]] += cursor.read.get(self._partition, 0)
        return max(by_consumer.values(), default=0)

    def _cursors(self) -> dict[str, Cursor]:
        keys = [info.key for info in self._stream.list("cursors/")]
        found = {key: _cursor(self._stream, key) for key in keys}
        return {key: cursor for key, cursor in found.items() if cursor is not None}

    def _alive(self, key: str, cursor: Cursor) -> bool:
        """Whether the cursor was written within the last minute, by this process's own clock."""
        now = self._clock()
        beat, since = self._beats.get(key, (-1, now))
        if cursor.beat != beat:
            self._beats[key] = cursor.beat, (since := now)
        return now - since < self._dead_after


def _cursor(stream: Store, key: str) -> Cursor | None:
    """A cursor, None for none and for what is not one."""
    try:
        return Cursor.model_validate_json(stream.get(key))
    except (NotFound, ValidationError):
        return None
