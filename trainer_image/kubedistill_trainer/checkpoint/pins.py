"""Pins: a person keeps the shards of a commit, from outside and while the run goes on.

A pin is an object beside the log, because only the attempt in force may write into the log. What
makes it safe is the order: who pins writes the pin and then reads the log; who retires writes RETIRE
and then asks for the pin. So either the pin is seen, or the RETIRE is, and nobody is told that a
commit is pinned whose shards go. Both ask for one key, which no stale list decides.

A pin keeps shards. A commit that was retired stays retired, whatever pins there are: somebody may
have looked for a pin before it came, and be about to delete.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime

from kubedistill_trainer.checkpoint.errors import NotPinnable
from kubedistill_trainer.checkpoint.history import SLOT_DIGITS, CommitEntry, Slot, State
from kubedistill_trainer.checkpoint.log import CommitLog
from kubedistill_trainer.checkpoint.records import Commit
from kubedistill_trainer.store import Store

_PREFIX = "pins/"


def pin_key(sequence: int) -> str:
    """Key of the pin of the commit in slot `sequence`, below the run's prefix."""
    return f"{_PREFIX}{sequence:0{SLOT_DIGITS}d}.json"


def is_pinned(store: Store, sequence: int) -> bool:
    """By HEAD, so exact at some moment of the call."""
    return store.head(pin_key(sequence)) is not None


def pinned(store: Store) -> list[int]:
    """Slots with a pin, in order; for people, since a list may be stale."""
    names = (info.key.removeprefix(_PREFIX).removesuffix(".json") for info in store.list(_PREFIX))
    return sorted(int(name) for name in names if len(name) == SLOT_DIGITS and name.isdecimal())


def pin(store: Store, log: CommitLog, sequence: int) -> CommitEntry:
    """Keep the shards of the commit in slot `sequence` until `unpin`; `store` is at the run's prefix.

    Raises NotPinnable when there is no usable commit in the slot, or when it was retired before
    the pin was there. In the second case the pin stays, since somebody else may rely on it.
    """
    _usable(store, log, sequence)
    if not is_pinned(store, sequence):
        said = {"sequence": sequence, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        store.put(pin_key(sequence), json.dumps(said).encode())
    return _usable(store, log, sequence)


def unpin(store: Store, sequence: int) -> None:
    """Remove the pin. Whatever else keeps the commit or does not then decides over its shards."""
    store.delete([pin_key(sequence)])


def _usable(store: Store, log: CommitLog, sequence: int) -> CommitEntry:
    log.read_to_end()
    history = log.history()
    slot = history[sequence] if 0 <= sequence < len(history) else None
    if slot is not None and slot.state is State.LIVE and isinstance(slot.entry.record, Commit):
        return CommitEntry(sequence, slot.entry.record)
    usable = ", ".join(str(commit.sequence) for commit in log.commits()) or "none"
    raise NotPinnable(
        f"{store.uri}: slot {sequence} {_found(slot)}; slots with a usable commit: {usable}"
    )


def _found(slot: Slot | None) -> str:
    if slot is None:
        return "is not written"
    if slot.state is State.RETIRED:
        return (
            f"was retired ({slot.reason}), so its shards are going or gone, unless it was pinned "
            "before"
        )
    record = slot.entry.record
    reason = slot.reason or slot.entry.problem
    what = f"holds a {record.kind}" if record is not None else "holds no record"
    return f"{what}, {slot.state}" + (f" ({reason})" if reason else "")
