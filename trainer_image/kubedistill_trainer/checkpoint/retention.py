"""Clean-up: RETIRE first, delete after; orphans by fence and the store's clock (storage.md)."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from datetime import datetime

from kubedistill_trainer.checkpoint import pins
from kubedistill_trainer.checkpoint.history import CommitEntry, Slot, State, slot_key
from kubedistill_trainer.checkpoint.log import CommitLog
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

    Pinned commits are left alone; of one that is pinned at the same moment the shards stay. Killed
    in between, it leaves shards that no COMMIT stands for: `collect` finishes the work.
    """
    free = [commit for commit in commits if not pins.is_pinned(store, commit.sequence)]
    if not free:
        return
    data = [commit.record.data for commit in free]
    log.append(Retire, sequences=[commit.sequence for commit in free], data=data)
    # Again: who pinned before RETIRE was there has been told that the shards stay.
    still_free = [commit.record for commit in free if not pins.is_pinned(store, commit.sequence)]
    store.delete(f"{commit.data}/{shard.path}" for commit in still_free for shard in commit.shards)


def collect(store: Store, log: CommitLog, fence: int) -> list[str]:
    """Orphan collection: delete what earlier attempts left behind; the prefixes that went.

    That is the data of retired commits, unless they are pinned, and data that no COMMIT names, of no
    higher fence and older than this attempt's FENCE by the store's own clock (so none of its own).
    `log.take_over` must have succeeded: from then on no commit of what came before can appear.
    Rejected data stays until its commit is retired. Stale multipart uploads are aborted by the same
    rule.
    """
    began = fence_time(store, log)
    if began is None:
        return []
    history = log.history()
    kept, retired = named_data(history)
    # An unreadable slot may be a COMMIT whose data somebody still wants to look at.
    all_known = all(slot.entry.record is not None for slot in history)
    doomed = [
        prefix
        for prefix, newest in _newest_by_prefix(store).items()
        if prefix not in kept
        and (
            not pins.is_pinned(store, retired[prefix])
            if prefix in retired
            else all_known and _fence_of(prefix) <= fence and newest < began
        )
    ]
    for prefix in doomed:
        _delete_below(store, prefix)
    for upload in store.uploads("data/"):
        if _fence_of(upload.key) <= fence and upload.initiated < began:
            store.abort_upload(upload)
    return doomed


def fence_time(store: Store, log: CommitLog) -> datetime | None:
    """When the log's own FENCE was written, by the store's clock; None where it is over."""
    own = store.head(slot_key(log.fence_sequence)) if log.fence_sequence is not None else None
    return None if own is None else own.last_modified


def abort_earlier_uploads(store: Store, log: CommitLog, elsewhere: Store) -> None:
    """Abort multipart uploads at `elsewhere`, which is this job's too, that attempts before this one
    left. Those of a newer attempt began after its FENCE, and so after this one's."""
    if (began := fence_time(store, log)) is not None:
        elsewhere.abort_uploads("", began)


def named_data(history: Sequence[Slot]) -> tuple[set[str], dict[str, int]]:
    """Data prefixes that a live or rejected COMMIT needs; retired ones → the slot of the commit."""
    kept, retired = set[str](), dict[str, int]()
    for slot in history:
        record = slot.entry.record
        if isinstance(record, Commit) and slot.state in (State.LIVE, State.REJECTED):
            kept.add(record.data)
        elif isinstance(record, Retire) and slot.state is State.APPLIED:
            # By the RETIRE: the COMMIT itself may have become unreadable.
            retired.update(zip(record.data, record.sequences, strict=False))
    return kept, retired


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


def _fence_of(key: str) -> int:
    """The fence of a key or prefix below data/; one that never is lower for what is none of ours."""
    match = _DATA_PREFIX.match(key)
    return int(match.group(1)) if match else sys.maxsize


def _delete_below(store: Store, prefix: str) -> None:
    store.delete([info.key for info in store.list(f"{prefix}/")])
