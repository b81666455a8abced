"""Shards that are damaged in the store, and the ones that a teacher writes in their place.

A committed shard is never changed. Who finds version n of a slot damaged asks for version n + 1; a
teacher writes the same samples again under a new key, and commits a record of that version:

```
partitions/<p>/repairs/<slot>/<version>.asked   what was found; asking twice is asking once
partitions/<p>/repairs/<slot>/<version>.json    the record that replaces all versions below it
```
Records are written once, like the log's: of two teachers that repair at once one wins, and one that
dies on the way leaves the request open for the next. The LM head has a request of its own beside it,
and is written again under its own name, which is its content's hash.
"""

from __future__ import annotations

import re

from kubedistill_trainer.store.client import Store
from kubedistill_trainer.store.errors import PreconditionFailed
from kubedistill_trainer.teacher.partition_log import (
    LogRecord,
    PartitionLog,
    read_record,
    write_record,
)

_NAME = re.compile(r"/repairs/(\d+)/(\d+)\.(asked|json)$")


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


def head_key(digest: str) -> str:
    """Where a stream keeps the teacher's LM head."""
    return f"head/{digest}.safetensors"


def head_asked_key(digest: str) -> str:
    """What says that somebody found the head damaged."""
    return f"{head_key(digest)}.asked"


def head_is_sound(stream: Store, digest: str) -> bool:
    """Whether the head is there and nobody found it damaged. `stream` is rooted at the stream."""
    return stream.head(head_key(digest)) is not None and stream.head(head_asked_key(digest)) is None
