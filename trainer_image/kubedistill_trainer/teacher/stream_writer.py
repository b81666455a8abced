"""A teacher's outputs into one partition of a stream, so that a writer can die at any moment.

A shard counts once its record is in the partition's log. A writer that starts takes up the
partition after its last committed shard. Two writers on one partition (two jobs that ask for the
same stream at once) are safe: each uploads under keys of its own, one wins the slot, and the other
drops its shard and stands by while the partition grows. It goes on where the winner stops.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from kubedistill_trainer.store.client import Store
from kubedistill_trainer.store.errors import StoreError, StoreUnavailable
from kubedistill_trainer.teacher.codec import encode_outputs, token_hash
from kubedistill_trainer.teacher.manifest import Manifest
from kubedistill_trainer.teacher.partition_log import LogRecord, PartitionLog, SlotTaken
from kubedistill_trainer.teacher.payload import TeacherOutputs
from kubedistill_trainer.teacher.shard import ShardSummary, ShardWriter

_POLL_SECONDS = 1.0
_DEAD_SHARD_SECONDS = 3600.0
_DEAD_HEAD_SECONDS = 6 * 3600.0
"""No upload of a living writer takes so long: the store's deadlines give it a fraction of that."""


@dataclass(frozen=True, slots=True)
class WriterSettings:
    """When a shard is cut."""

    shard_bytes: int = 64 << 20
    """Size of a shard in the long run."""
    first_shard_bytes: int = 4 << 20
    """Size of a partition's first shard; each next one is twice as large, so students can start."""
    shard_seconds: float = 120.0
    """A shard that took this long is committed at whatever size it has."""
    patience_seconds: float = 180.0
    """A writer that lost a slot goes on when the other has committed nothing for so long."""


@dataclass(frozen=True, slots=True)
class _Sealed:
    """A finished shard that is not committed yet; kept so that a commit can be tried again."""

    path: Path
    record: LogRecord
    uploaded: bool = False


def shard_record(
    summary: ShardSummary, manifest: Manifest, partition: int, path: Path
) -> LogRecord:
    """The record that commits the finished shard at `path`; its slot is filled in later."""
    return LogRecord(
        kind="SHARD",
        partition=partition,
        slot=0,
        nonce=uuid.uuid4().hex,
        count=summary.count,
        key=f"partitions/{partition}/shards/{path.name}",
        size_bytes=summary.size_bytes,
        sha256=summary.sha256,
        first_sample=summary.first_sample,
        last_sample=summary.last_sample,
        tokens=summary.count * manifest.identity.sequence_length,
    )


def upload_shard(stream: Store, record: LogRecord, path: Path) -> None:
    """Upload the shard that `record` is about to commit. StoreUnavailable if it is not there."""
    stream.upload_file(record.key, path)
    info = stream.head(record.key)
    if info is None or info.size_bytes != record.size_bytes:
        found = "nothing" if info is None else f"{info.size_bytes} bytes"
        raise StoreUnavailable(
            "upload",
            stream.uri_of(record.key),
            f"{found} there after an upload of {record.size_bytes} bytes",
        )


class StreamWriter:
    """Writes one partition, in order. Not thread-safe.

    `store` is rooted at the storage URI; `manifest` is what `publish_manifest` returned; `scratch`
    is a local folder with room for one shard. `before_upload(size_bytes, committed_bytes, committed)`
    (of a new shard; of this partition, in bytes and samples) may block: it is where a byte budget
    holds the teacher back. `pause(seconds)` is called again and again while another
    writer is ahead.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        partition: int,
        *,
        scratch: Path,
        settings: WriterSettings | None = None,
        before_upload: Callable[[int, int, int], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], object] = time.sleep,
    ) -> None:
        if not 0 <= partition < manifest.partitions:
            raise ValueError(f"partition {partition} is not one of 0…{manifest.partitions - 1}")
        self._manifest = manifest
        self._stream = manifest.identity.digest()
        self._partition = partition
        self._store = store.child(manifest.identity.address)
        self._scratch = scratch
        self._settings = settings or WriterSettings()
        self._before_upload = before_upload
        self._clock = clock
        self._pause = pause
        self._log = PartitionLog(self._store, partition)
        self._shard: ShardWriter | None = None
        self._shard_path = scratch
        self._started = 0.0
        self._sealed: _Sealed | None = None
        self._log.refresh()
        self._position = self._log.committed

    @property
    def next_sample(self) -> int | None:
        """Id of the sample to write next; None when all are written.

        Ask again after every `write`: it moves when another writer won a slot.
        """
        if self._position >= self._manifest.samples_of(self._partition):
            return None
        return self._manifest.sample_at(self._partition, self._position)

    @property
    def ended(self) -> bool:
        """Whether the partition's END record is there."""
        return self._log.ended

    def samples(self) -> Iterator[int]:
        """Ids to write until the partition is complete and committed, whoever wrote the rest."""
        while True:
            sample = self.next_sample
            if sample is None:
                self.commit()
                sample = self.next_sample  # a lost slot moves the position back
            if sample is None:
                return
            yield sample

    def committed(self) -> int:
        """Samples of this partition that are committed: the position at which a writer resumes."""
        return self._log.committed

    def committed_bytes(self) -> int:
        """Size of this partition's committed shards."""
        return sum(shard.size_bytes for shard in self._log.shards)

    def write(self, sample: int, tokens: Tensor | Sequence[int], outputs: TeacherOutputs) -> None:
        """Add one sample, and commit when the shard is large or old enough.

        `tokens` are the sample's ids [L]; `outputs` has L positions. Raises ValueError when the
        sample is not `next_sample` or has another length, StoreError when a commit fails (the
        shard is kept; `commit` tries again).
        """
        length = self._manifest.identity.sequence_length
        if sample != self.next_sample:
            raise ValueError(
                f"partition {self._partition} wants sample {self.next_sample} next, got {sample}"
            )
        if len(tokens) != length or outputs.positions != length:
            raise ValueError(
                f"sample {sample} has {len(tokens)} tokens and {outputs.positions} positions; "
                f"the stream's sequence_length is {length}"
            )
        if self._sealed is not None:
            self.commit()
            if sample != self.next_sample:
                return  # the shard before it was lost; the caller asks again
        identity = self._manifest.identity
        record = encode_outputs(outputs, identity.payloads, identity.teacher_vocab_size)
        shard = self._open_shard()
        shard.add(sample, token_hash(tokens), record)
        self._position += 1
        age = self._clock() - self._started
        if shard.size_bytes >= self._target_bytes() or age >= self._settings.shard_seconds:
            self.commit()

    def commit(self) -> int:
        """Commit what was written so far; how many samples of the partition are committed now.

        Safe to call again after a StoreError: the same shard is committed once.
        """
        if self._sealed is None and self._shard is not None:
            self._sealed = self._seal(self._shard)
            self._shard = None
        if self._sealed is not None:
            self._publish(self._sealed)
        return self._log.committed

    def end(self) -> None:
        """Commit the rest and write END. ValueError when samples are missing."""
        self.commit()
        if self.next_sample is not None:
            raise ValueError(
                f"partition {self._partition} cannot end: sample {self.next_sample} is not written"
            )
        self._abort_dead_uploads()
        if self._log.ended:
            return
        end = LogRecord(
            kind="END",
            partition=self._partition,
            slot=0,
            nonce=uuid.uuid4().hex,
            count=self._log.committed,
        )
        # when the slot is lost it can only be to another writer's END: the partition is complete
        with contextlib.suppress(SlotTaken):
            self._log.append(end)
        self._log.refresh()

    def _abort_dead_uploads(self) -> None:
        """Of writers that died: parts that nothing lists, and that cost as long as they are there.

        Two writers on a partition are no rarity, so only age tells that one is dead.
        """
        with contextlib.suppress(StoreError):  # it costs space and nothing else
            shards = f"partitions/{self._partition}/"
            self._store.abort_older_uploads(shards, _DEAD_SHARD_SECONDS)
            self._store.abort_older_uploads("head/", _DEAD_HEAD_SECONDS)

    def close(self) -> None:
        """Drop what is not committed. Harmless when repeated."""
        if self._shard is not None:
            self._shard.discard()
            self._shard_path.unlink(missing_ok=True)
            self._shard = None
        if self._sealed is not None:
            self._sealed.path.unlink(missing_ok=True)
            self._sealed = None
        self._position = self._log.committed

    def __enter__(self) -> StreamWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _target_bytes(self) -> int:
        ramp = self._settings.first_shard_bytes << min(len(self._log.shards), 30)
        return min(ramp, self._settings.shard_bytes)

    def _open_shard(self) -> ShardWriter:
        if self._shard is None:
            self._scratch.mkdir(parents=True, exist_ok=True)
            self._shard_path = self._scratch / f"{uuid.uuid4().hex}.shard"
            self._shard = ShardWriter(self._stream, self._shard_path)
            self._started = self._clock()
        return self._shard

    def _seal(self, shard: ShardWriter) -> _Sealed:
        record = shard_record(shard.finish(), self._manifest, self._partition, self._shard_path)
        return _Sealed(self._shard_path, record)

    def _publish(self, sealed: _Sealed) -> None:
        record = sealed.record
        if not sealed.uploaded:
            if self._before_upload is not None:
                self._before_upload(record.size_bytes, self.committed_bytes(), self.committed())
            upload_shard(self._store, record, sealed.path)
            self._sealed = _Sealed(sealed.path, record, uploaded=True)
        try:
            self._log.append(record)
        except SlotTaken:
            self._lose(record)
        sealed.path.unlink(missing_ok=True)
        self._sealed = None

    def _lose(self, record: LogRecord) -> None:
        """Drop the shard that came second; stand by while the other writer commits."""
        with contextlib.suppress(StoreError):  # an orphan costs space and nothing else
            self._store.delete([record.key])
        self._log.refresh()
        committed, moved = self._log.committed, self._clock()
        while (
            committed < self._manifest.samples_of(self._partition)
            and self._clock() - moved < self._settings.patience_seconds
        ):
            self._pause(_POLL_SECONDS)
            self._log.refresh()
            if self._log.committed > committed:
                committed, moved = self._log.committed, self._clock()
        self._position = committed
