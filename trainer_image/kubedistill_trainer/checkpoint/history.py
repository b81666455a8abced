"""What the log's records mean together: which commits are usable, and why others are not.

Pure: entries in, states out. A record counts only where its fence is in force, which is the highest
FENCE before it; no writer that keeps the protocol makes another one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from kubedistill_trainer.checkpoint.records import Commit, Fence, Record, Reject, Retire

SLOT_DIGITS = 20


class State(StrEnum):
    """Of one slot."""

    IN_FORCE = "in force"
    """The FENCE of the attempt that owns the run."""
    OVER = "over"
    """A FENCE that a higher one followed."""
    LIVE = "live"
    """A COMMIT that may be loaded."""
    RETIRED = "retired"
    """A COMMIT that may not be loaded any more, and whose shards go."""
    REJECTED = "rejected"
    """A COMMIT that failed its verification, or a slot without a record that was passed over."""
    APPLIED = "applied"
    """A REJECT or RETIRE that counts."""
    FENCED_OUT = "fenced out"
    """A record whose fence was not in force at its slot: it counts for nothing."""
    FOREIGN = "foreign"
    """A record of another run: it counts for nothing."""
    UNREADABLE = "unreadable"
    TOO_NEW = "too new"
    """A whole record of a version that this program does not know."""


@dataclass(frozen=True)
class Entry:
    """One slot. `record` is None where its bytes are no record, and `problem` says why.

    `too_new` is true where they are one, of a version that this program does not know.
    """

    sequence: int
    record: Record | None
    problem: str = ""
    too_new: bool = False


@dataclass(frozen=True)
class CommitEntry:
    """A slot that holds a COMMIT."""

    sequence: int
    record: Commit


@dataclass(frozen=True)
class Slot:
    """An entry and what became of it."""

    entry: Entry
    state: State
    reason: str = ""


def slot_key(sequence: int) -> str:
    """Key of a slot below the run's prefix."""
    return f"log/{sequence:0{SLOT_DIGITS}d}.json"


def slot_of(key: str) -> int:
    """The slot of a key below log/; −1 for what is not a slot."""
    name = key.removeprefix("log/").removesuffix(".json")
    whole = len(name) == SLOT_DIGITS and name.isascii() and name.isdigit()
    return int(name) if whole and slot_key(int(name)) == key else -1


def run_of(entries: Iterable[Entry]) -> str:
    """The job that the log is of, by the first record that says so; empty when none does."""
    return next((e.record.run for e in entries if e.record is not None and e.record.run), "")


def replay(entries: Sequence[Entry], run: str = "") -> list[Slot]:
    """The state of every slot; `entries` follow one another without a gap.

    `run` is the job asked for; empty: the log's own.
    """
    run = run or run_of(entries)
    slots: list[Slot] = []
    owner: int | None = None  # index of the FENCE in force
    for index, entry in enumerate(entries):
        record = entry.record
        if record is None:
            slots.append(Slot(entry, State.TOO_NEW if entry.too_new else State.UNREADABLE))
        elif record.run and record.run != run:
            slots.append(Slot(entry, State.FOREIGN, f"of run {record.run}"))
        elif isinstance(record, Fence):
            if owner is not None and record.fence <= _fence(slots[owner]):
                slots.append(_fenced_out(entry, slots[owner]))
                continue
            if owner is not None:
                slots[owner] = Slot(slots[owner].entry, State.OVER)
            owner = index
            slots.append(Slot(entry, State.IN_FORCE))
        elif owner is None or not _is_of(record, slots[owner]):
            slots.append(_fenced_out(entry, slots[owner] if owner is not None else None))
        elif isinstance(record, Commit):
            slots.append(Slot(entry, State.LIVE))
        else:
            slots.append(Slot(entry, State.APPLIED))
            _apply(slots, record, entry.sequence)
    return slots


def _apply(slots: list[Slot], record: Reject | Retire, at: int) -> None:
    """Mark what a REJECT or RETIRE names. One that was retired stays so: its shards are going."""
    first = slots[0].entry.sequence
    if isinstance(record, Retire):
        named, state, reason = record.sequences, State.RETIRED, f"in slot {at}"
    else:
        named, state, reason = [record.sequence], State.REJECTED, record.reason
    for sequence in named:
        # Only what came before: a record says nothing of slots that its writer did not know.
        if first <= sequence < at and _may_become(slots[sequence - first], state):
            slots[sequence - first] = Slot(slots[sequence - first].entry, state, reason)


def _may_become(slot: Slot, state: State) -> bool:
    if not isinstance(slot.entry.record, Commit):
        return state is State.REJECTED and slot.state is State.UNREADABLE
    return slot.state in (State.LIVE, State.REJECTED)


def _fence(slot: Slot) -> int:
    assert slot.entry.record is not None
    return slot.entry.record.fence


def _is_of(record: Record, owner: Slot) -> bool:
    fence = owner.entry.record
    assert fence is not None
    return (record.fence, record.attempt) == (fence.fence, fence.attempt)


def _fenced_out(entry: Entry, owner: Slot | None) -> Slot:
    reason = f"fence {_fence(owner)} was in force" if owner else "no FENCE was in force"
    return Slot(entry, State.FENCED_OUT, reason)
