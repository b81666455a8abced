"""A student's view of a teacher stream: outputs by sample, in any order, as soon as they exist.

The reader may start before the writer. It knows the samples that training will ask for and fetches
and decodes them ahead; when a sample's shard is not committed yet it waits, counts the time, and
gives up only when the sample's partition shows no commit for a whole deadline. A shard that is
damaged is asked for again (`repairs.py`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TypeVar

from kubedistill_trainer.store.client import Store
from kubedistill_trainer.store.errors import StoreUnavailable
from kubedistill_trainer.teacher.budget import CursorKeeper
from kubedistill_trainer.teacher.codec import decode_outputs
from kubedistill_trainer.teacher.errors import (
    SampleMissing,
    StreamClosed,
    StreamCorrupt,
    StreamDamaged,
    StreamStalled,
)
from kubedistill_trainer.teacher.manifest import Manifest, StreamIdentity, read_manifest
from kubedistill_trainer.teacher.metrics import DATA_WAIT, STREAM_LAG
from kubedistill_trainer.teacher.partition_log import LogRecord, PartitionLog
from kubedistill_trainer.teacher.payload import TeacherOutputs
from kubedistill_trainer.teacher.reading import ReaderSettings, StreamProgress
from kubedistill_trainer.teacher.repairs import Repairs
from kubedistill_trainer.teacher.shard_cache import ShardCache

_log = logging.getLogger(__name__)
_Found = TypeVar("_Found")
_REPAIR_SECONDS = 300.0
"""The longest wait for a repair of a shard."""


class StreamReader:
    """Reads one stream. `get` may be called from one thread; `store` is at the storage URI.

    `cache` is a local folder that no other reader uses. `consumer` (job/rank) is the name under which
    writers are told how far it is (`budget.py`), none by default; `ranks` readers share a pass over
    the data. Waits in the constructor until the stream has a manifest (StreamStalled after the
    deadline, StreamMismatch for another identity).
    """

    def __init__(
        self,
        store: Store,
        identity: StreamIdentity,
        *,
        cache: Path,
        consumer: str = "",
        ranks: int = 1,
        settings: ReaderSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings or ReaderSettings()
        self._identity = identity
        self._ranks = ranks
        self._clock = clock
        self._closed = threading.Event()
        self._store = store.child(identity.address)
        self._wait_seconds = 0.0
        self._vain_since: float | None = None
        self._read_samples: set[int] = set()
        self._scheduled: dict[tuple[int, int], deque[Future[TeacherOutputs]]] = {}
        self._order: Iterator[tuple[int, int]] = iter(())
        self._ahead = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="teacher-stream")
        started = clock()
        self.manifest: Manifest = self._await(
            lambda: read_manifest(store, identity),
            lambda: "no writer has published a manifest",
        )
        self._waited(started)
        count = self.manifest.partitions
        self._logs = [PartitionLog(self._store, partition) for partition in range(count)]
        self._repairs: dict[int, Repairs] = {}
        self._asked: set[tuple[int, int, int]] = set()
        self._log_locks = [threading.Lock() for _ in range(count)]
        self._moved = [clock()] * count
        self._cursor = None
        if consumer:
            self._cursor = CursorKeeper(self._store, consumer, done=lambda: self.progress().ended)
        self._cache = ShardCache(
            self._store,
            identity.digest(),
            cache,
            self._settings.cache_bytes,
            pause=self._closed.wait,
        )

    @property
    def wait_seconds(self) -> float:
        """Seconds that the caller spent inside this reader, in total."""
        return self._wait_seconds

    def prefetch(self, order: Iterable[tuple[int, int]]) -> None:
        """Work ahead along `order`: (sample id, token hash) as training will ask for them.

        Consumed lazily, so it may be endless; samples asked for that are not in it come without
        working ahead. A new order replaces the rest of the old one.
        """
        for futures in self._scheduled.values():
            for future in futures:
                future.cancel()
        self._scheduled.clear()
        self._ahead = 0
        self._order = iter(order)
        self._fill()

    def get(self, sample: int, token_hash: int) -> TeacherOutputs:
        """The teacher's outputs for `sample`; waits until they are committed.

        Raises StreamStalled when its partition stops committing, SampleMissing when the stream
        ended without it, StreamMismatch when it was made from other tokens, StreamDamaged when its
        bytes stay wrong and no teacher is there to write them again, StreamClosed when `close` is
        called meanwhile.
        """
        started = self._clock()
        try:
            outputs = self._take(sample, token_hash)
        finally:
            self._waited(started)
            self._fill()
        if sample not in self._read_samples:
            self._read_samples.add(sample)
            if self._cursor is not None:
                self._cursor.count(self.manifest.partition_of(sample))
        self._report_lag()
        return outputs

    def there(self, samples: Sequence[int], seconds: float = 0.0) -> bool:
        """Whether all these samples are committed, after a wait of at most `seconds`.

        Raises what `get` raises of a sample that does not come. Where calls in a row are in vain, the
        patience with their partitions counts from the first of them.
        """
        started = self._clock()
        since = self._vain_since = started if self._vain_since is None else self._vain_since
        try:
            if not all(self._comes(sample, since, started + seconds) for sample in samples):
                return False
        finally:
            self._waited(started)
        self._vain_since = None
        return True

    def refresh(self) -> StreamProgress:
        """Look at every partition's log once, then `progress`."""
        for partition in range(self.manifest.partitions):
            self._refresh(partition)
        self._report_lag()
        return self.progress()

    def progress(self) -> StreamProgress:
        """What is known to be committed, without asking the store."""
        shards = [shard for log in self._logs for shard in log.shards]
        return StreamProgress(
            size_bytes=sum(shard.size_bytes for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            samples=sum(shard.count for shard in shards),
            ended=all(log.ended for log in self._logs),
        )

    def close(self) -> None:
        """Stop working ahead and wake whoever waits. Harmless when repeated."""
        self._closed.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        if hasattr(self, "_cache"):
            self._cache.close()
            if self._cursor is not None:
                self._cursor.close()

    def __enter__(self) -> StreamReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _take(self, sample: int, token_hash: int) -> TeacherOutputs:
        queue = self._scheduled.get((sample, token_hash))
        if queue:
            future = queue.popleft()
            if not queue:
                del self._scheduled[sample, token_hash]
            self._ahead -= 1
            # one that has not begun may stand behind a sample nobody can have yet
            if not future.cancel():
                return future.result()
        return self._load(sample, token_hash)

    def _fill(self) -> None:
        """Keep `ahead_samples` of the order scheduled."""
        while self._ahead < self._settings.ahead_samples and not self._closed.is_set():
            upcoming = next(self._order, None)
            if upcoming is None:
                return
            future = self._pool.submit(self._load, *upcoming)
            self._scheduled.setdefault(upcoming, deque()).append(future)
            self._ahead += 1

    def _load(self, sample: int, token_hash: int) -> TeacherOutputs:
        partition, position = self._place(sample)
        entry = self._committed(partition, position)
        entry, record = self._record(partition, entry, sample, token_hash)
        try:
            return decode_outputs(record, self._identity.payloads, self._settings.dtype)
        except ValueError as error:
            raise StreamCorrupt(
                self._store.uri_of(entry.key), f"record of sample {sample}: {error}"
            ) from error

    def _committed(self, partition: int, position: int) -> LogRecord:
        """The shard with a sample, once it is committed."""
        if (known := self._logs[partition].shard_of(position)) is not None:
            return known
        with self._cursor.waiting(partition) if self._cursor else nullcontext():
            return self._await(
                lambda: self._find(partition, position),
                lambda: self._last_commit(partition),
                lambda: self._moved[partition],
            )

    def _comes(self, sample: int, since: float, until: float) -> bool:
        """Whether a sample is committed, after a wait until that time; stalls are counted from `since`."""
        partition, position = self._place(sample)

        def look() -> bool | None:
            try:
                found = self._find(partition, position) is not None
            except StoreUnavailable:
                if self._clock() < until:
                    raise
                found = False
            return found if found or self._clock() >= until else None

        if self._logs[partition].shard_of(position) is not None:
            return True
        with self._cursor.waiting(partition) if self._cursor else nullcontext():
            return self._await(
                look,
                lambda: self._last_commit(partition),
                lambda: self._moved[partition],
                since=since,
            )

    def _place(self, sample: int) -> tuple[int, int]:
        """(partition, position in it) of a sample."""
        if not 0 <= sample < self.manifest.samples:
            raise SampleMissing(
                f"sample {sample} is not one of the stream's 0…{self.manifest.samples - 1}"
            )
        return self.manifest.partition_of(sample), sample // self.manifest.partitions

    def _record(
        self, partition: int, shard: LogRecord, sample: int, token_hash: int
    ) -> tuple[LogRecord, bytes]:
        """The sample's record, and the version of the shard that it was found in."""
        entry = self._await(
            lambda: self._newest(partition, shard), lambda: "repairs cannot be listed"
        )
        while True:
            try:
                return entry, self._await(
                    partial(self._cache.record, entry, sample, token_hash),
                    partial("shard {} cannot be fetched".format, entry.key),
                )
            except StreamDamaged as error:
                entry = self._repaired(partition, entry, error)

    def _newest(self, partition: int, shard: LogRecord, *, look: bool = False) -> LogRecord:
        with self._log_locks[partition]:
            repairs = self._repairs.get(partition)
            if repairs is None or look:
                repairs = repairs or Repairs(self._store, partition)
                repairs.refresh()
                self._repairs[partition] = repairs
            return repairs.newest(shard)

    def _repaired(self, partition: int, entry: LogRecord, error: StreamDamaged) -> LogRecord:
        """What replaces a damaged shard. `error` when nobody is there to write it.

        Somebody may be there when the partition is still being written, or when the request is
        older than this reader: then a teacher was started for it.
        """

        def look() -> LogRecord | None:
            newest = self._newest(partition, entry, look=True)
            return newest if newest.version > entry.version else None

        def ask() -> tuple[LogRecord | None, bool]:
            found = look()
            with self._log_locks[partition]:
                return found, found is None and self._repairs[partition].ask(entry, error.found)

        version = partition, entry.slot, entry.version
        found, first = self._await(ask, lambda: "a repair cannot be asked for")
        if found is not None:
            return found
        if first:
            self._asked.add(version)
            _log.warning("damaged shard", extra={"shard": error.uri, "found": error.found})
        if version in self._asked and self._logs[partition].ended:
            raise error
        # Before the operator takes the run for stalled, and this rank's peers, which wait for it in
        # a step, take it for dead: they have to learn what is wrong.
        patience = min(self._settings.stall_seconds / 2, _REPAIR_SECONDS)
        try:
            return self._await(look, lambda: str(error), seconds=patience)
        except StreamStalled:
            raise error from None

    def _find(self, partition: int, position: int) -> LogRecord | None:
        log = self._logs[partition]
        self._refresh(partition)
        found = log.shard_of(position)
        if found is None and log.ended:
            raise SampleMissing(
                f"partition {partition} ended after {log.committed} samples; "
                f"position {position} is not in it"
            )
        return found

    def _refresh(self, partition: int) -> None:
        with self._log_locks[partition]:
            if self._logs[partition].refresh():
                self._moved[partition] = self._clock()

    def _last_commit(self, partition: int) -> str:
        shards = self._logs[partition].shards
        if not shards:
            return f"partition {partition} has no commit yet"
        return (
            f"partition {partition} committed {self._logs[partition].committed} samples, "
            f"the last shard being {shards[-1].key}"
        )

    def _await(
        self,
        look: Callable[[], _Found | None],
        describe: Callable[[], str],
        moved: Callable[[], float] | None = None,
        seconds: float | None = None,
        since: float | None = None,
    ) -> _Found:
        """What `look` finds. A store that does not answer counts as no news.

        Raises StreamStalled `seconds` (or `stall_seconds`) after the later of `since` (or now) and
        `moved()`.
        """
        patience = self._settings.stall_seconds if seconds is None else seconds
        started = self._clock() if since is None else since
        delay, trouble = self._settings.poll_seconds, ""
        cause: StoreUnavailable | None = None
        while True:
            try:
                if (found := look()) is not None:
                    return found
                trouble, cause = "", None
            except StoreUnavailable as error:
                trouble, cause = f" ({error})", error
            latest = max(started, moved()) if moved else started
            if self._clock() - latest >= patience:
                raise StreamStalled(
                    f"{self._store.uri}: nothing new for {patience:g} s: {describe()}{trouble}"
                ) from cause
            if self._closed.wait(delay):
                raise StreamClosed("the reader was closed while it waited for the teacher")
            delay = min(2 * delay, self._settings.poll_limit_seconds)

    def _waited(self, started: float) -> None:
        seconds = max(self._clock() - started, 0.0)
        self._wait_seconds += seconds
        DATA_WAIT.inc(seconds)

    @property
    def lag_tokens(self) -> int:
        """Tokens that are committed and were not read yet; the other ranks are as far as this one."""
        read = len(self._read_samples) * self._identity.sequence_length * self._ranks
        return max(self.progress().tokens - read, 0)

    def _report_lag(self) -> None:
        STREAM_LAG.set(self.lag_tokens)
