"""The commit log of a run: one record a slot, each slot written once (storage.md)."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from kubedistill_trainer.checkpoint.errors import (
    CheckpointCorrupt,
    CheckpointFailed,
    Fenced,
    ForeignLog,
    LogTooNew,
)
from kubedistill_trainer.checkpoint.history import (
    CommitEntry,
    Entry,
    Slot,
    State,
    replay,
    slot_key,
    slot_of,
)
from kubedistill_trainer.checkpoint.known import KnownRecords
from kubedistill_trainer.checkpoint.records import (
    Commit,
    Fence,
    Record,
    RecordTooNew,
    RecordUnreadable,
    decode,
    encode,
)
from kubedistill_trainer.store import NotFound, PreconditionFailed, Store

__all__ = ["CommitEntry", "CommitLog", "Entry", "slot_key"]

_READERS = 8
_READ_ATTEMPTS = 2  # a record that is wrong twice was not garbled on its way
_MOST_MISSING = 1000
"""Slots that may be absent below the highest one before the log counts as something else."""


class CommitLog:
    """The log under a run's prefix, and the right to append to it under one fence.

    `run` is the job's identity, `<namespace>/<name>/<uid>`; it goes into every record. `known` are
    records that need not be fetched. Not thread-safe: one thread of one rank writes. A log that was
    only read may not be appended to; `take_over` gives the right, and loses it for good to the first
    record of somebody else.
    """

    def __init__(
        self,
        store: Store,
        *,
        fence: int = 0,
        restart: int = 0,
        attempt: str = "",
        run: str = "",
        known: KnownRecords | None = None,
    ) -> None:
        self._store = store
        self._known = known
        self._fence = fence
        self._restart = restart
        self._attempt = attempt
        self._run = run
        self._entries: list[Entry] = []
        self._fence_sequence: int | None = None
        self._tried: set[str] = set()
        """Nonces of all records that were sent. One whose request failed may still land."""
        self._over = ""
        """Why this attempt may not write any more."""

    @property
    def entries(self) -> list[Entry]:
        """What is known of the log, in order; exact up to the own last record once fenced."""
        return list(self._entries)

    @property
    def fence_sequence(self) -> int | None:
        """Slot of the own FENCE; None before `take_over`, and after Fenced."""
        return self._fence_sequence

    def read(self) -> list[Entry]:
        """List and read what is new; every entry so far, in order.

        A slot is written once, so what was read is never read again. A list may be stale: it
        decides nothing, the conditional PUT of the next record does. Raises CheckpointCorrupt
        where a slot lies so far beyond the others that no writer of this log can have made it.
        """
        listed = {slot_of(info.key) for info in self._store.list("log/")}
        listed |= self._known.slots if self._known is not None else set()
        first, last = len(self._entries), max(listed, default=-1)
        if last + 1 - first - sum(slot >= first for slot in listed) > _MOST_MISSING:
            raise CheckpointCorrupt(
                f"{self._store.uri_of(slot_key(last))}: more than {_MOST_MISSING} slots below it "
                "are empty, so it is not this log's; move it away, or restore the slots"
            )
        with ThreadPoolExecutor(_READERS) as pool:
            for entry in pool.map(self._read_slot, range(first, last + 1)):
                self._take_in(entry)
        return self.entries

    def read_to_end(self) -> list[Entry]:
        """`read`, and then slot by slot until one is free: exact even where a list is stale."""
        self.read()
        while (entry := self._read_if_taken(len(self._entries))) is not None:
            self._take_in(entry)
        return self.entries

    def take_over(self) -> int:
        """Step 1: write FENCE into the next free slot; its sequence is returned.

        Called again after a StoreError it finds the FENCE whose fate was unknown. Raises Fenced
        when the log holds this fence or a higher one: then this attempt is the older one, whatever
        its clock says. Raises LogTooNew and ForeignLog before it writes anything.
        """
        self.read()
        record = self._stamp(Fence)
        while True:
            self._refuse_what_is_not_ours()
            self._refuse_if_over(self._entries)
            if (sequence := self._own_fence()) is not None:
                self._fence_sequence = sequence
                return sequence
            self._take_in(self._put(len(self._entries), record))

    def refuse_if_overtaken(self) -> None:
        """`read`; raises Fenced when another attempt has taken over since `take_over`.

        A stale list may hide that: the next `append` finds out.
        """
        self.read()
        if self._over or self._fence_sequence is not None:
            self._refuse_if_over(self._entries[self._fence_sequence :])

    def refuse_if_gone(self) -> None:
        """CheckpointFailed where the own FENCE is not in the store any more: a commit behind it could
        not be resumed from. A bucket that was deleted comes back, empty, with the first PUT to some
        servers (SeaweedFS by default)."""
        own = self._fence_sequence
        if own is not None and self._store.head(slot_key(own)) is None:
            raise CheckpointFailed(
                f"{self._store.uri_of(slot_key(own))}: this attempt's own record is gone, so the "
                "bucket was emptied or made anew; put its objects back"
            )

    def append(self, make: Callable[..., Record], **fields: Any) -> Entry:
        """Step 3: write one record at the slot that is expected to be next.

        `make` is Commit, Reject or Retire and `fields` its own fields. Raises Fenced when another
        attempt has taken over, or when there was no `take_over`. After a StoreError the record may
        be in the log or not, or land later: the next call finds out.
        """
        if self._fence_sequence is None:
            raise Fenced(
                self._over or f"{self._store.uri_of('log')}: append without a FENCE of one's own"
            )
        # What `read` brought in: to write behind a higher FENCE would fence out its attempt.
        self._refuse_if_over(self._entries[self._fence_sequence :])
        record = self._stamp(make, **fields)
        while True:
            found = self._put(len(self._entries), record)
            if not self._is_own(found) and not self._counts_for_nothing(found):
                raise self._fenced(found, "expected to be free, ")
            self._take_in(found)
            if found.record == record:
                return found

    def history(self) -> list[Slot]:
        """Every known slot and what became of it."""
        return replay(self._entries, self._run)

    def commits(self) -> list[CommitEntry]:
        """COMMITs that may be loaded: neither rejected nor retired, oldest first.

        One whose fence is not the one in force at its slot is left out: no writer that keeps the
        protocol makes it.
        """
        return [
            CommitEntry(slot.entry.sequence, slot.entry.record)
            for slot in self.history()
            if slot.state is State.LIVE and isinstance(slot.entry.record, Commit)
        ]

    def unreadable(self) -> list[Entry]:
        """Slots that hold no record and are not rejected yet; never what a newer program wrote."""
        return [slot.entry for slot in self.history() if slot.state is State.UNREADABLE]

    def _is_own(self, entry: Entry) -> bool:
        return entry.record is not None and entry.record.nonce in self._tried

    def _own_fence(self) -> int | None:
        own = (e for e in self._entries if isinstance(e.record, Fence) and self._is_own(e))
        return next((entry.sequence for entry in own), None)

    def _counts_for_nothing(self, entry: Entry) -> bool:
        """A record of a lower fence behind one's own: readers pass over it, and so does a writer."""
        record = entry.record
        return (
            record is not None
            and record.epoch < (self._fence, self._restart)
            and not self._is_foreign(entry)
        )

    def _is_foreign(self, entry: Entry) -> bool:
        record = entry.record
        return bool(record and record.run and self._run and record.run != self._run)

    def _refuse_if_over(self, entries: Iterable[Entry]) -> None:
        if self._over:
            raise Fenced(self._over)
        for entry in entries:
            own = self._fence, self._restart
            is_fence = isinstance(entry.record, Fence) and entry.record.epoch >= own
            if entry.too_new or (is_fence and not self._is_own(entry)):
                raise self._fenced(entry)

    def _fenced(self, entry: Entry, expected: str = "") -> Fenced:
        """Give up the right to write, for good: the winning history goes on without us."""
        self._fence_sequence = None
        self._over = (
            f"{self._store.uri_of(slot_key(entry.sequence))}: {expected}holds {_describe(entry)}, "
            f"so fence {self._fence} of attempt {self._attempt!r} is over"
        )
        return Fenced(self._over)

    def _refuse_what_is_not_ours(self) -> None:
        for entry in self._entries:
            uri = self._store.uri_of(slot_key(entry.sequence))
            if entry.too_new:
                raise LogTooNew(
                    f"{uri}: {entry.problem}; run this job with that version of the trainer's "
                    "image, or a newer one"
                )
            if self._is_foreign(entry):
                assert entry.record is not None
                raise ForeignLog(
                    f"{uri}: written by run {entry.record.run}, and this is run {self._run}; two "
                    "jobs must not share a prefix: give one of them another storage.uri"
                )

    def _put(self, sequence: int, record: Record) -> Entry:
        """Write if the slot is free, and say what the slot holds now."""
        self._tried.add(record.nonce)
        try:
            self._store.put(slot_key(sequence), encode(record), only_if_absent=True)
        except PreconditionFailed:
            # A first attempt may have landed with its answer lost: its nonce is then ours.
            found = self._read_if_taken(sequence)
            if found is None:  # taken and not there at once: to go on would leave a slot open
                raise NotFound(
                    "get", self._store.uri_of(slot_key(sequence)), "taken, and not there"
                ) from None
            return found
        return Entry(sequence, record)

    def _take_in(self, entry: Entry) -> None:
        """The next slot's entry."""
        self._entries.append(entry)
        if self._known is not None and entry.record is not None:
            self._known.add(entry.sequence, entry.record)

    def _read_slot(self, sequence: int) -> Entry:
        """What is in a slot that should be taken."""
        if self._known is not None and (record := self._known.get(sequence)) is not None:
            return Entry(sequence, record)
        empty = Entry(sequence, None, "the slot is empty and a later one is not")
        return self._read_if_taken(sequence) or empty

    def _read_if_taken(self, sequence: int) -> Entry | None:
        for _ in range(_READ_ATTEMPTS):
            try:
                return Entry(sequence, decode(self._store.get(slot_key(sequence))))
            except RecordUnreadable as error:
                found = Entry(sequence, None, str(error), isinstance(error, RecordTooNew))
            except NotFound:
                return None
        return found

    def _stamp(self, make: Callable[..., Record], **fields: Any) -> Record:
        return make(
            nonce=uuid.uuid4().hex,
            fence=self._fence,
            restart=self._restart,
            attempt=self._attempt,
            trainer_version=_trainer_version(),
            time=datetime.now(UTC).isoformat(timespec="milliseconds"),
            run=self._run,
            **fields,
        )


def _trainer_version() -> str:
    try:
        return version("kubedistill")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"


def _describe(entry: Entry) -> str:
    if entry.record is None:
        return f"no record ({entry.problem})"
    record = entry.record
    whose = f" of run {record.run}" if record.run else ""
    return f"a {record.kind} of fence {record.fence}, attempt {record.attempt!r}{whose}"
