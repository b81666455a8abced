"""The write-once log of one partition: which shards count, in what order, and whether it ended.

Slot n is written once, by a conditional PUT. A writer that finds its slot taken reads it: its own
nonce means that its first PUT had landed; anything else means that another writer was faster.
Each record carries a hash of itself, so a damaged one is never taken for a commit.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kubedistill_trainer.store.client import Store
from kubedistill_trainer.store.errors import NotFound, PreconditionFailed
from kubedistill_trainer.teacher.errors import StreamCorrupt

_READS = 3


class TextShard(BaseModel):
    """What a shard of text holds; of an END, all shards of its partition, without `requests`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests: tuple[tuple[int, int], ...] = ()
    """[first, last] of each run of requests that it answers."""
    refused: int = Field(0, ge=0)
    prompt_tokens: int = Field(0, ge=0)
    answer_tokens: int = Field(0, ge=0)


class LogRecord(BaseModel):
    """One slot. SHARD commits `count` samples, END says that no more will come."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["SHARD", "END"]
    partition: int = Field(ge=0)
    slot: int = Field(ge=0)
    nonce: str
    count: int = Field(ge=0)
    """Samples of this shard; for END, samples of the whole partition."""
    key: str = ""
    size_bytes: int = 0
    sha256: str = ""
    first_sample: int = -1
    last_sample: int = -1
    tokens: int = 0
    version: int = Field(0, ge=0)
    """0 in the log; above it, a shard that replaces the one of this slot (`repairs.py`)."""
    text: TextShard | None = None
    """Of a teacher that writes text (`text_writer.py`)."""
    self_hash: str = ""

    def sealed(self) -> LogRecord:
        """The record with its own hash filled in."""
        return self.model_copy(update={"self_hash": self._hash()})

    @property
    def intact(self) -> bool:
        """Whether the record is what its writer sealed."""
        return self.self_hash == self._hash()

    def _hash(self) -> str:
        # Records of other streams are hashed as they were before there was text.
        unused = {"self_hash"} if self.text else {"self_hash", "text"}
        content = self.model_dump(mode="json", exclude=unused)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class SlotTaken(Exception):
    """Another writer's record is in the slot."""

    def __init__(self, record: LogRecord) -> None:
        super().__init__(record)
        self.record = record


def read_record(store: Store, key: str, place: tuple[int, int, int]) -> LogRecord | None:
    """The record at `key`, None where there is none; re-read a few times while it is damaged.

    `place` is the partition, slot and version that it must speak of. StreamCorrupt otherwise.
    """
    found = ""
    for _ in range(_READS):
        try:
            record = LogRecord.model_validate_json(store.get(key))
        except NotFound:
            return None
        except ValidationError as error:
            found = f"not a log record: {error.error_count()} faults"
            continue
        if record.intact and (record.partition, record.slot, record.version) == place:
            return record
        found = f"{record.kind} record of slot {record.slot} fails its own hash"
    raise StreamCorrupt(store.uri_of(key), found)


def write_record(store: Store, key: str, record: LogRecord) -> LogRecord:
    """Write `record` at `key`, sealed, unless there is one; its own earlier write counts.

    SlotTaken for another's. StoreUnavailable leaves it open whether it landed.
    """
    sealed = record.sealed()
    try:
        store.put(key, sealed.model_dump_json().encode(), only_if_absent=True)
    except PreconditionFailed:
        found = read_record(store, key, (record.partition, record.slot, record.version))
        if found is None:
            raise
        if found.nonce != record.nonce:
            raise SlotTaken(found) from None
        return found
    return sealed


class PartitionLog:
    """A growing view of one partition's log. `store` is rooted at the stream. Not thread-safe."""

    def __init__(self, store: Store, partition: int) -> None:
        self._store = store
        self._partition = partition
        self._shards: list[LogRecord] = []
        self._ends: list[int] = []  # committed samples after each shard
        self._end: LogRecord | None = None

    @property
    def committed(self) -> int:
        """Samples that are committed; the position of the next one."""
        return self._ends[-1] if self._ends else 0

    @property
    def ended(self) -> bool:
        """Whether the END record was seen."""
        return self._end is not None

    @property
    def shards(self) -> tuple[LogRecord, ...]:
        """Committed shards, oldest first."""
        return tuple(self._shards)

    def shard_of(self, position: int) -> LogRecord | None:
        """The shard with the `position`-th sample of the partition, if it is known already."""
        if position >= self.committed:
            return None
        return self._shards[bisect.bisect_right(self._ends, position)]

    def refresh(self) -> bool:
        """Read the slots that are new; whether there were any. StreamCorrupt for a bad record."""
        grown = False
        while self._end is None and (record := self._read(len(self._shards))) is not None:
            self._append(record)
            grown = True
        return grown

    def append(self, record: LogRecord) -> None:
        """Commit `record` in the next slot (`slot` and hash are filled in).

        Raises SlotTaken when another writer has it; StoreUnavailable leaves it open whether the
        record landed, and calling again with the same nonce is safe.
        """
        slot = len(self._shards)
        placed = record.model_copy(update={"slot": slot, "partition": self._partition})
        self._append(write_record(self._store, self._key(slot), placed))

    def _append(self, record: LogRecord) -> None:
        if record.kind == "END":
            if record.count != self.committed:
                raise StreamCorrupt(
                    self._store.uri_of(self._key(record.slot)),
                    f"END after {record.count} samples, the log holds {self.committed}",
                )
            self._end = record
            return
        self._ends.append(self.committed + record.count)
        self._shards.append(record)

    def _read(self, slot: int) -> LogRecord | None:
        return read_record(self._store, self._key(slot), (self._partition, slot, 0))

    def _key(self, slot: int) -> str:
        return f"partitions/{self._partition}/log/{slot:020d}.json"
