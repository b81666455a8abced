"""Clean-up: RETIRE first, delete after; orphans by fence and the store's clock (storage.md)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime

from kubedistill_trainer.checkpoint.log import CommitEntry, CommitLog, slot_key
from kubedistill_trainer.checkpoint.records import Commit, Retire
from kubedistill_trainer.store import Store

_UNVERIFIED_KEPT = 2
_DATA_PREFIX = re.compile(r"data/e(\d+)/s\d+/[^/]+")


def to_retire(
    commits: Sequence[CommitEntry],
    *,
    keep_last: int,
    verified: int | None,
    keep_step: int | None = None,
) -> list[CommitEntry]:
    """Which of the usable commits, oldest first, may go.

    Kept are the newest `keep_last` (at least 1) and the commit in slot `verified`: the newest that
    a load or a full read has proved, and those of `keep_step`. Where none was proved, two are kept
    at least, so that one bad shard is not the end of the run.
    """
    kept = max(keep_last, 1 if verified is not None else _UNVERIFIED_KEPT)
    return [
        commit
        for commit in commits[:-kept]
        if commit.sequence != verified and commit.record.step != keep_step
    ]


def retire(store: Store, log: CommitLog, commits: Sequence[CommitEntry]) -> None:
    """Append RETIRE for `commits`, then delete their shards. Raises Fenced before any deletion.

    Killed in between, it leaves shards that no COMMIT stands for: `collect` finishes the work.
    """
    if not commits:
        return
    data = [commit.record.data for commit in commits]
    log.append(Retire, sequences=[commit.sequence for commit in commits], data=data)
    for prefix in data:
        _delete_below(store, prefix)


def collect(store: Store, log: CommitLog, fence: int) -> list[str]:
    """Delete what earlier attempts left behind; the prefixes that were deleted.

    That is the data of retired commits, and data that no COMMIT names, of a lower fence and older
    than this attempt's FENCE by the store's own clock. `log.take_over` must have succeeded: from
    then on no commit of a lower fence can appear. Rejected data stays until its commit is retired.
    """
    own = store.head(slot_key(log.fence_sequence)) if log.fence_sequence is not None else None
    if own is None:
        return []
    entries = [entry.record for entry in log.entries]
    retired = {prefix for r in entries if isinstance(r, Retire) for prefix in r.data}
    if any(record is None for record in entries):
        # An unreadable slot may be a COMMIT whose data somebody still wants to look at.
        committed = None
    else:
        committed = {r.data for r in entries if isinstance(r, Commit)}
    doomed = [
        prefix
        for prefix, newest in _newest_by_prefix(store).items()
        if prefix in retired
        or (
            committed is not None
            and prefix not in committed
            and _fence_of(prefix) < fence
            and newest < own.last_modified
        )
    ]
    for prefix in doomed:
        _delete_below(store, prefix)
    for lower in range(fence):
        store.abort_uploads(f"data/e{lower}/", own.last_modified)
    return doomed


def data_prefix(fence: int, step: int, unique: str) -> str:
    """Prefix of one checkpoint's shards; `unique` makes each of its keys new."""
    return f"data/e{fence}/s{step}/{unique}"


def _newest_by_prefix(store: Store) -> dict[str, datetime]:
    """When the newest object below each data prefix was written."""
    found: dict[str, datetime] = {}
    for info in store.list("data/"):
        if match := _DATA_PREFIX.match(info.key):
            prefix = match.group()
            found[prefix] = max(found.get(prefix, info.last_modified), info.last_modified)
    return found


def _fence_of(prefix: str) -> int:
    match = _DATA_PREFIX.match(prefix)
    assert match is not None
    return int(match.group(1))


def _delete_below(store: Store, prefix: str) -> None:
    store.delete([info.key for info in store.list(f"{prefix}/")])
