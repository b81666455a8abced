"""Where no commit can be loaded, or a known one is missing: what that is called. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kubedistill_trainer.checkpoint.history import Slot, State, slot_key
from kubedistill_trainer.checkpoint.records import Commit
from kubedistill_trainer.checkpoint.results import Rejected

_NAMED = 5
"""Commits that a message names."""


def left_the_log(history: Sequence[Slot], known_step: int, log_uri: str) -> Rejected | None:
    """The newest step that a run is known to have committed, where its log knows no such step any
    more: then it is an older copy of itself, or a new one."""
    steps = [s.entry.record.step for s in history if isinstance(s.entry.record, Commit)]
    # A slot that cannot be read may be that commit.
    torn = any(slot.entry.record is None for slot in history)
    if torn or max(steps, default=0) >= known_step:
        return None
    reason = "was committed, and the log does not have it any more"
    return Rejected(log_uri, known_step, reason)


def rejected_before(history: Sequence[Slot], uri_of: Callable[[str], str]) -> list[Rejected]:
    """What earlier attempts have rejected, the newest first."""
    return [
        Rejected(uri_of(slot_key(slot.entry.sequence)), _step_of(slot), slot.reason)
        for slot in reversed(history)
        if slot.state is State.REJECTED
    ]


def no_usable_commit(uri: str, found: Sequence[Rejected]) -> str:
    """The message for a run that has committed, and has nothing to go on from."""
    more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return (
        f"{uri}: no commit can be loaded ({'; '.join(map(str, found[:_NAMED]))}{more}); put the "
        "objects back (from a version or a copy of the bucket), or start a new job"
    )


def _step_of(slot: Slot) -> int | None:
    record = slot.entry.record
    return record.step if isinstance(record, Commit) else None
