"""Shards that are damaged in the store, and the ones that a teacher writes in their place.

A committed shard is never changed. Who finds version n of a slot damaged asks for version n + 1; a
teacher writes the same samples again under a new key, and commits a record of that version:

```
partitions/<p>/repairs/<slot>/<version>.asked   what was found; asking twice is asking once
partitions/<p>/repairs/<slot>/<version>.json    the record that replaces all versions below it
```
Records are written once, like the log's: of two teachers that repair at once one wins, and one that
dies on the way leaves the request open for the next.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from kubedistill_trainer.store.client import Store
from kubedistill_trainer.store.errors import NotFound, PreconditionFailed
from kubedistill_trainer.teacher.codec import encode_outputs, token_hash
from kubedistill_trainer.teacher.manifest import Manifest
from kubedistill_trainer.teacher.partition_log import (
    LogRecord,
    PartitionLog,
    SlotTaken,
    read_record,
    write_record,
)
from kubedistill_trainer.teacher.payload import TeacherOutputs
from kubedistill_trainer.teacher.shard import ShardWriter
from kubedistill_trainer.teacher.stream_writer import shard_record, upload_shard

_log = logging.getLogger(__name__)
_NAME = re.compile(r"/repairs/(\d+)/(\d+)\.(asked|json)$")

Produce = Callable[[int], tuple[Tensor | Sequence[int], TeacherOutputs]]
"""From a sample id to its tokens [L] and the teacher's outputs."""


class Repairs:
    """A growing view of one partition's repairs. `store` is at the stream. Not thread-safe."""

    def __init__(self, store: Store, partition: int) -> None:
        self._store = store
        self._partition = partition
        self._newest: dict[int, LogRecord] = {}
        self._asked: dict[int, int] = {}

    def refresh(self) -> None:
        """Read what is new. StreamCorrupt for a bad record."""
        written: dict[int, int] = {}
        for info in self._store.list(f"partitions/{self._partition}/repairs/"):
            if (name := _NAME.search(info.key)) is None:
                continue
            seen = self._asked if name[3] == "asked" else written
            seen[int(name[1])] = max(seen.get(int(name[1]), 0), int(name[2]))
        for slot, version in written.items():
            if version > self._version(slot):
                place = self._partition, slot, version
                record = read_record(self._store, self._key(slot, version, "json"), place)
                if record is not None:
                    self._newest[slot] = record

    def newest(self, shard: LogRecord) -> LogRecord:
        """The newest version of a shard of the log."""
        return self._newest.get(shard.slot, shard)

    def open(self) -> list[int]:
        """Slots whose newest version was found damaged."""
        return sorted(s for s, version in self._asked.items() if version > self._version(s))

    def ask(self, shard: LogRecord, found: str) -> bool:
        """Ask for what replaces this version of a shard; whether nobody had asked before."""
        key = self._key(shard.slot, shard.version + 1, "asked")
        self._asked[shard.slot] = max(self._asked.get(shard.slot, 0), shard.version + 1)
        try:
            self._store.put(key, found.encode(), only_if_absent=True)
        except PreconditionFailed:
            return False
        return True

    def ask_for_missing(self, log: PartitionLog) -> None:
        """Ask for every shard of the log that is not in the store with its size, by one listing."""
        folder = f"partitions/{self._partition}/shards/"
        sizes = {info.key: info.size_bytes for info in self._store.list(folder)}
        for shard in map(self.newest, log.shards):
            size = sizes.get(shard.key)
            if size != shard.size_bytes:
                self.ask(shard, "missing" if size is None else f"{size} bytes")

    def commit(self, slot: int, record: LogRecord) -> None:
        """Make `record` the next version of the slot. SlotTaken when another was faster."""
        version = self._version(slot) + 1
        placed = record.model_copy(update={"slot": slot, "version": version})
        self._newest[slot] = write_record(self._store, self._key(slot, version, "json"), placed)

    def _version(self, slot: int) -> int:
        return self._newest[slot].version if slot in self._newest else 0

    def _key(self, slot: int, version: int, kind: str) -> str:
        return f"partitions/{self._partition}/repairs/{slot:020d}/{version:06d}.{kind}"


def mend(
    store: Store, manifest: Manifest, partition: int, *, scratch: Path, produce: Produce
) -> int:
    """Write again every shard of a partition that somebody found damaged; how many there were.

    `store` is rooted at the storage URI. A shard that proves whole is confirmed as it is: then the
    damage was on the reader's way.
    """
    stream = store.child(manifest.identity.address)
    repairs = Repairs(stream, partition)
    repairs.refresh()
    slots = repairs.open()
    if not slots:
        return 0
    log = PartitionLog(stream, partition)
    log.refresh()
    scratch.mkdir(parents=True, exist_ok=True)
    for slot in slots:
        old = repairs.newest(log.shards[slot])
        record, path = old.model_copy(update={"nonce": uuid.uuid4().hex}), None
        if not _whole(stream, old, scratch):
            path = scratch / f"{uuid.uuid4().hex}.shard"
            record = _written_again(stream, manifest, old, path, produce)
        try:
            repairs.commit(slot, record)
        except SlotTaken:
            if path is not None:
                stream.delete([record.key])
        _log.warning(
            "shard repaired" if path else "shard found whole",
            extra={"shard": stream.uri_of(old.key), "by": stream.uri_of(record.key)},
        )
    return len(slots)


def _whole(stream: Store, record: LogRecord, scratch: Path) -> bool:
    """Whether a shard in the store is what was committed."""
    path = scratch / f"{uuid.uuid4().hex}.shard"
    try:
        with contextlib.suppress(NotFound):
            stream.download_file(record.key, path)
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == record.sha256
    finally:
        path.unlink(missing_ok=True)
    return False


def _written_again(
    stream: Store, manifest: Manifest, old: LogRecord, path: Path, produce: Produce
) -> LogRecord:
    """Upload the samples of `old` as a new shard; the record that commits it."""
    identity = manifest.identity
    try:
        shard = ShardWriter(identity.digest(), path)
        for sample in range(old.first_sample, old.last_sample + 1, manifest.partitions):
            tokens, outputs = produce(sample)
            encoded = encode_outputs(outputs, identity.payloads, identity.teacher_vocab_size)
            shard.add(sample, token_hash(tokens), encoded)
        record = shard_record(shard.finish(), manifest, old.partition, path)
        upload_shard(stream, record, path)
    finally:
        path.unlink(missing_ok=True)
    return record
