"""The commit log of a run: one record a slot, each slot written once (storage.md)."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from kubedistill_trainer.checkpoint.errors import Fenced
from kubedistill_trainer.checkpoint.records import (
    Commit,
    Fence,
    Record,
    RecordUnreadable,
    Reject,
    Retire,
    decode,
    encode,
)
from kubedistill_trainer.store import NotFound, PreconditionFailed, Store

_READERS = 8
_SLOT_DIGITS = 20


@dataclass(frozen=True)
class Entry:
    """One slot. `record` is None where its bytes are no record, and `problem` says why."""

    sequence: int
    record: Record | None
    problem: str = ""


@dataclass(frozen=True)
class CommitEntry:
    """A slot that holds a COMMIT."""

    sequence: int
    record: Commit


def slot_key(sequence: int) -> str:
    """Key of a slot below the run's prefix."""
    return f"log/{sequence:0{_SLOT_DIGITS}d}.json"


class CommitLog:
    """The log under a run's prefix, and the right to append to it under one fence.

    Not thread-safe: one thread of one rank writes. A log that was only read may not be appended
    to; `take_over` gives the right.
    """

    def __init__(self, store: Store, *, fence: int = 0, attempt: str = "") -> None:
        self._store = store
        self._fence = fence
        self._attempt = attempt
        self._entries: list[Entry] = []
        self._fence_sequence: int | None = None
        self._tried: set[str] = set()
        """Nonces of all records that were sent. One whose request failed may still have landed."""

    @property
    def entries(self) -> list[Entry]:
        """What is known of the log, in order; exact up to the own last record once fenced."""
        return list(self._entries)

    @property
    def fence_sequence(self) -> int | None:
        """Slot of the own FENCE; None before `take_over`."""
        return self._fence_sequence

    def read(self) -> list[Entry]:
        """List and read what is new; every entry so far, in order.

        A slot is written once, so what was read is never read again. A list may be stale: it
        decides nothing, the conditional PUT of the next record does.
        """
        listed = {info.key for info in self._store.list("log/")}
        last = max((_sequence_of(key) for key in listed), default=-1)
        missing = range(len(self._entries), last + 1)
        with ThreadPoolExecutor(_READERS) as pool:
            self._entries.extend(pool.map(self._read_slot, missing))
        return self.entries

    def take_over(self) -> int:
        """Step 1: write FENCE into the next free slot; its sequence is returned.

        Raises Fenced when the log holds this fence or a higher one: then this attempt is the
        older one, whatever its clock says.
        """
        self.read()
        record = self._stamp(Fence)
        while True:
            if (sequence := self._own_fence()) is not None:
                self._fence_sequence = sequence
                return sequence
            self._refuse_if_older()
            self._entries.append(self._put(len(self._entries), record))

    def append(self, make: Callable[..., Record], **fields: Any) -> Entry:
        """Step 3: write one record at the slot that is expected to be next.

        `make` is Commit, Reject or Retire and `fields` its own fields. Raises Fenced when another
        attempt's record is in the slot, or when there was no `take_over`. After a StoreError the
        record may be in the log or not: the next call finds out.
        """
        if self._fence_sequence is None:
            raise Fenced(f"{self._store.uri_of('log')}: append without a FENCE of one's own")
        record = self._stamp(make, **fields)
        while True:
            found = self._put(len(self._entries), record)
            if not self._is_own(found):
                self._fence_sequence = None  # never again: the winning history goes on without us
                raise Fenced(
                    f"{self._store.uri_of(slot_key(found.sequence))}: expected to be free, holds "
                    f"{_describe(found)}; fence {self._fence} of attempt {self._attempt!r} is over"
                )
            self._entries.append(found)
            if found.record == record:
                return found

    def commits(self) -> list[CommitEntry]:
        """COMMITs that may be loaded: neither rejected nor retired, oldest first.

        One whose fence is not the one in force at its slot is left out: no writer that keeps the
        protocol makes it.
        """
        gone, fence, found = set[int](), -1, []
        for entry in self._entries:
            match entry.record:
                case Fence(fence=higher):
                    fence = max(fence, higher)
                case Commit(fence=written) as commit if written == fence:
                    found.append(CommitEntry(entry.sequence, commit))
                case Reject(sequence=sequence):
                    gone.add(sequence)
                case Retire(sequences=sequences):
                    gone.update(sequences)
        return [commit for commit in found if commit.sequence not in gone]

    def unreadable(self) -> list[Entry]:
        """Slots that hold no record and are not rejected yet."""
        rejected = {e.record.sequence for e in self._entries if isinstance(e.record, Reject)}
        return [e for e in self._entries if e.record is None and e.sequence not in rejected]

    def _is_own(self, entry: Entry) -> bool:
        return entry.record is not None and entry.record.nonce in self._tried

    def _own_fence(self) -> int | None:
        own = (e for e in self._entries if isinstance(e.record, Fence) and self._is_own(e))
        return next((entry.sequence for entry in own), None)

    def _refuse_if_older(self) -> None:
        for entry in self._entries:
            if isinstance(entry.record, Fence) and entry.record.fence >= self._fence:
                raise Fenced(
                    f"{self._store.uri_of(slot_key(entry.sequence))}: holds {_describe(entry)}, "
                    f"so fence {self._fence} of attempt {self._attempt!r} is over"
                )

    def _put(self, sequence: int, record: Record) -> Entry:
        """Write if the slot is free, and say what the slot holds now."""
        key = slot_key(sequence)
        self._tried.add(record.nonce)
        try:
            self._store.put(key, encode(record), only_if_absent=True)
        except PreconditionFailed:
            # A first attempt may have landed with its answer lost: its nonce is then ours.
            return self._read_slot(sequence, must_exist=True)
        return Entry(sequence, record)

    def _read_slot(self, sequence: int, *, must_exist: bool = False) -> Entry:
        try:
            return Entry(sequence, decode(self._store.get(slot_key(sequence))))
        except RecordUnreadable as error:
            return Entry(sequence, None, str(error))
        except NotFound:
            if must_exist:  # taken and not there at once: to go on would leave a slot open
                raise
            return Entry(sequence, None, "the slot is empty and a later one is not")

    def _stamp(self, make: Callable[..., Record], **fields: Any) -> Record:
        return make(
            nonce=uuid.uuid4().hex,
            fence=self._fence,
            attempt=self._attempt,
            trainer_version=_trainer_version(),
            time=datetime.now(UTC).isoformat(timespec="milliseconds"),
            **fields,
        )


def _trainer_version() -> str:
    try:
        return version("kubedistill")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"


def _sequence_of(key: str) -> int:
    """The slot of a key below log/; −1 for what is not a slot."""
    name = key.removeprefix("log/").removesuffix(".json")
    return int(name) if len(name) == _SLOT_DIGITS and name.isascii() and name.isdigit() else -1


def _describe(entry: Entry) -> str:
    if entry.record is None:
        return f"no record ({entry.problem})"
    record = entry.record
    return f"a {record.kind} of fence {record.fence}, attempt {record.attempt!r}"
