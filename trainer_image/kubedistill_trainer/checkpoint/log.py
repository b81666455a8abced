"""The fenced, write-once commit log: one record a slot, each slot written once, ever.

Steps, as the protocol names them: FENCE takes the run; a COMMIT goes to the slot that its writer
expects; a slot that is taken is read back, and its nonce tells a writer's own record whose answer
was lost from somebody else's, which means that the writer was fenced.
"""

from __future__ import annotations

from dataclasses import dataclass

from kubedistill_trainer.checkpoint.errors import Fenced
from kubedistill_trainer.checkpoint.records import BadRecord, Record
from kubedistill_trainer.store import PreconditionFailed, Store

_PREFIX = "log/"


@dataclass(frozen=True)
class Slot:
    """One slot as read: a record, or why there is none."""

    number: int
    record: Record | None
    problem: str = ""


@dataclass(frozen=True)
class History:
    """All slots, oldest first, and what later records say of earlier ones."""

    slots: tuple[Slot, ...]

    @property
    def next_slot(self) -> int:
        return self.slots[-1].number + 1 if self.slots else 0

    @property
    def highest_fence(self) -> int:
        return max((s.record.fence for s in self.slots if s.record is not None), default=0)

    def live_commits(self) -> list[tuple[int, Record]]:
        """(slot, COMMIT) that nothing rejected or retired, newest first."""
        gone = {
            number
            for slot in self.slots
            if slot.record is not None and slot.record.kind in ("REJECT", "RETIRE")
            for number in slot.record.slots
        }
        return [
            (slot.number, slot.record)
            for slot in reversed(self.slots)
            if slot.record is not None and slot.record.kind == "COMMIT" and slot.number not in gone
        ]


class CommitLog:
    """The log below `store`, seen by one writer. `store` is rooted at the run's prefix."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._expected = 0

    def read(self) -> History:
        """All slots; a record that does not verify is a slot with a problem."""
        slots = [
            self._slot(int(info.key.removeprefix(_PREFIX).removesuffix(".json")))
            for info in self._store.list(_PREFIX)
        ]
        history = History(tuple(slots))
        self._expected = history.next_slot
        return history

    def take(self, record: Record) -> int:
        """Append a FENCE at the next free slot; its number.

        Raises Fenced when the log holds this fence or a higher one. Losing a slot to an older
        writer is no defeat: the next one is tried.
        """
        while True:
            history = self.read()
            if history.highest_fence >= record.fence:
                raise Fenced(
                    f"fence {record.fence} is too old: the log holds {history.highest_fence}"
                )
            if self._try(self._expected, record):
                return self._advance()

    def append(self, record: Record) -> int:
        """Append at the slot this writer expects; its number. Raises Fenced when it is taken."""
        if not self._try(self._expected, record):
            found = self._slot(self._expected)
            owner = (
                "an unreadable record"
                if found.record is None
                else (f"a {found.record.kind} of fence {found.record.fence}")
            )
            raise Fenced(f"slot {self._expected} holds {owner}: a newer attempt owns the run")
        return self._advance()

    def _advance(self) -> int:
        self._expected += 1
        return self._expected - 1

    def _try(self, number: int, record: Record) -> bool:
        """Conditional PUT; True when the slot holds this very record afterwards."""
        try:
            self._store.put(key_of(number), record.encode(), only_if_absent=True)
        except PreconditionFailed:
            found = self._slot(number).record
            return found is not None and found.nonce == record.nonce
        return True

    def _slot(self, number: int) -> Slot:
        try:
            return Slot(number, Record.decode(self._store.get(key_of(number))))
        except BadRecord as error:
            return Slot(number, None, str(error))


def key_of(number: int) -> str:
    """The key of a slot, sorted as the numbers are."""
    return f"{_PREFIX}{number:020d}.json"
