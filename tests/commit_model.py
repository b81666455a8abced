"""The commit protocol for the explorer: what attempts and people do, and what must always hold.

The invariants are computed from the objects by code of their own, not by the code under test.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from explorer import Actor, ActorStore, Note, Objects, World, directly
from kubedistill_trainer.checkpoint import CommitLog, Fenced, pins, retention
from kubedistill_trainer.checkpoint.errors import NotPinnable
from kubedistill_trainer.checkpoint.records import Commit, Reject, ShardRecord
from kubedistill_trainer.store import StoreError

LAST = 99
"""Fence of the attempt that cleans up after all others."""
RUN = "team/job/uid"


def shard(name: str) -> ShardRecord:
    return ShardRecord(path=name, rank=0, shared=False, size_bytes=1, sha256="0" * 64, crc32c=[0])


def attempt(fence: int, saves: int, *, shards: str = "a", keep_step: int | None = None) -> Actor:
    """What the Checkpointer of one attempt does, call by call."""

    def run(store: Any, note: Callable[..., None]) -> None:
        log = CommitLog(store, fence=fence, attempt=f"a{fence}", run=RUN)
        try:
            if not _take_over(log):
                return
            note("owns", fence)
            _tidy(lambda: retention.collect(store, log, fence))
            log.read()
            verified, step = _resume(store, log, note, fence)
            for number in range(saves):
                step += 10
                if (slot := _save(store, log, note, fence, step, f"u{number}", shards)) is None:
                    continue
                if step == keep_step:
                    note("needs", fence, slot)
                commits = retention.to_retire(
                    log.commits(), keep_last=1, verified=verified, keep_step=keep_step
                )
                _tidy(lambda commits=commits: retention.retire(store, log, commits))
        except Fenced:
            note("fenced", fence)
        except StoreError:
            note("ended", fence)

    return run


def _take_over(log: CommitLog) -> bool:
    for _ in range(2):
        try:
            log.take_over()
            return True
        except StoreError:
            continue
    return False


def _tidy(do: Callable[[], object]) -> None:
    try:
        do()
    except StoreError:
        return


def _resume(
    store: Any, log: CommitLog, note: Callable[..., None], fence: int
) -> tuple[int | None, int]:
    for commit in reversed(log.commits()):
        data = commit.record.data
        if all(store.head(f"{data}/{shard.path}") for shard in commit.record.shards):
            note("needs", fence, commit.sequence)
            return commit.sequence, commit.record.step
        log.append(Reject, sequence=commit.sequence, reason="missing")
    return None, 0


def _save(
    store: Any,
    log: CommitLog,
    note: Callable[..., None],
    fence: int,
    step: int,
    unique: str,
    shards: str,
) -> int | None:
    data = retention.data_prefix(fence, step, unique)
    try:
        for name in shards:
            store.put(f"{data}/{name}", b"x")
        if not all(store.head(f"{data}/{name}") for name in shards):
            return None
        entry = log.append(
            Commit, step=step, world_size=1, data=data, shards=[shard(name) for name in shards],
            cursor={}, config_digest="",
        )  # fmt: skip
    except StoreError:
        return None
    assert entry.record is not None
    note("committed", entry.sequence, entry.record.nonce, step)
    return entry.sequence


def pinner(sequence: int, *, unpins: bool = False) -> Actor:
    """A person who pins a commit, and may let it go again."""

    def run(store: Any, note: Callable[..., None]) -> None:
        try:
            pins.pin(store, CommitLog(store), sequence)
        except (StoreError, NotPinnable):
            return
        note("pinned", sequence)
        if unpins:
            note("unpinned", sequence)
            _tidy(lambda: pins.unpin(store, sequence))

    return run


@dataclass
class Log:
    """The log as storage.md has it, read from the objects."""

    problem: str = ""
    fence: int = -1
    records: list[dict[str, Any]] = field(default_factory=list)
    live: dict[int, dict[str, Any]] = field(default_factory=dict)
    retired: dict[int, dict[str, Any]] = field(default_factory=dict)


@lru_cache(maxsize=100_000)
def read(slots: frozenset[tuple[str, bytes]]) -> Log:
    """Replay the slots."""
    log = Log()
    for number, (key, data) in enumerate(sorted(slots)):
        record = json.loads(data)
        log.records.append(record)
        if int(key[4:-5]) != number:
            log.problem = f"slot {number} is open and a later one is not"
        elif record["kind"] == "FENCE":
            if record["fence"] <= log.fence:
                log.problem = f"slot {number}: FENCE {record['fence']} behind FENCE {log.fence}"
            log.fence = record["fence"]
        elif record["fence"] != log.fence:
            what = f"{record['kind']} of fence {record['fence']}"
            log.problem = f"slot {number}: {what}, in force is {log.fence}"
        elif record["kind"] == "COMMIT":
            log.live[number] = record
        elif record["kind"] == "RETIRE":
            log.retired |= {n: log.live.pop(n) for n in record["sequences"] if n in log.live}
        elif record["kind"] == "REJECT":
            log.problem = f"slot {number}: REJECT, and nothing was damaged"
    return log


@lru_cache(maxsize=100_000)
def usable(slots: frozenset[tuple[str, bytes]]) -> list[int]:
    """Slots of usable commits, by the code under test."""
    objects = frozenset((key, data, 0) for key, data in slots)
    found: list[int] = []

    def reader(store: ActorStore, _note: Any) -> None:
        log = CommitLog(store)  # type: ignore[arg-type]  # has what a log needs of a Store
        log.read_to_end()
        found.extend(commit.sequence for commit in log.commits())

    directly(objects, reader, LAST)
    return found


def slots_of(objects: Objects) -> frozenset[tuple[str, bytes]]:
    return frozenset((key, data) for key, data, _ in objects if key.startswith("log/"))


class Invariants:
    """What must hold in every state; what is violated, or nothing."""

    def __init__(self, *, retired_pins_are_live: bool = False) -> None:
        self._retired_pins_are_live = retired_pins_are_live
        self._cleaned: dict[Objects, str] = {}

    def __call__(self, world: World, notes: list[list[Note]], ended: bool) -> str:
        slots = slots_of(world.objects)
        log = read(slots)
        keys = {key for key, _, _ in world.objects}
        problem = (
            log.problem
            or self._of_data(log, keys)
            or next((p for of_one in notes for n in of_one if (p := _of_note(n, log, keys))), "")
            or _of_pins(notes, log, keys)
        )
        if not problem and usable(slots) != sorted(log.live):
            problem = f"usable are {usable(slots)}, should be {sorted(log.live)}"
        if not problem and ended and not world.in_flight:
            if world.objects not in self._cleaned:
                self._cleaned[world.objects] = _of_clean_up(world.objects)
            problem = self._cleaned[world.objects]
        return problem

    def _of_data(self, log: Log, keys: set[str]) -> str:
        live = dict(log.live)
        if self._retired_pins_are_live:
            live |= {n: r for n, r in log.retired.items() if pins.pin_key(n) in keys}
        for sequence, record in live.items():
            if not _is_whole(record, keys):
                return f"the commit in slot {sequence} is live without its data"
        return ""


def _is_whole(record: dict[str, Any], keys: set[str]) -> bool:
    return all(f"{record['data']}/{s['path']}" in keys for s in record["shards"])


def _of_note(note: Note, log: Log, keys: set[str]) -> str:
    """What was said to a caller must be so from then on."""
    match note:
        case ("fenced", fence):
            if not any(r["kind"] == "FENCE" and r["fence"] > fence for r in log.records):
                return f"fence {fence} was told that it is over, and no higher FENCE is there"
        case ("committed", sequence, nonce, step):
            if sequence >= len(log.records) or log.records[sequence]["nonce"] != nonce:
                return f"step {step} was said to be in slot {sequence}, and is not"
            newest = max((record["step"] for record in log.live.values()), default=-1)
            if newest < step:
                return f"step {step} was committed, and the newest usable commit is of {newest}"
        case ("needs", fence, sequence):
            if log.fence == fence and sequence not in log.live:
                return f"slot {sequence} is verified or kept for its step, and was retired"
    return ""


def _of_pins(notes: list[list[Note]], log: Log, keys: set[str]) -> str:
    """Whoever was told that a commit is pinned has its shards, until somebody unpins it."""
    said = [note for of_one in notes for note in of_one]
    for note in said:
        if note[0] == "pinned" and ("unpinned", note[1]) not in said:
            record = log.live.get(note[1]) or log.retired.get(note[1])
            if record is None or not _is_whole(record, keys):
                return f"slot {note[1]} was said to be pinned, and its data is gone"
    return ""


def _of_clean_up(objects: Objects) -> str:
    """One more attempt resumes from the newest commit and leaves no byte that nobody needs."""
    before = read(slots_of(objects))
    after, notes = directly(objects, attempt(LAST, 0), LAST)
    newest = max(before.live, default=None)
    verified = next((note[2] for note in notes if note[0] == "needs"), None)
    if ("owns", LAST) not in notes or verified != newest:
        return f"the next attempt resumes from slot {verified}, the newest commit is in {newest}"
    keys = {key for key, _, _ in after}
    log = read(slots_of(after))
    needed = {record["data"] for record in log.live.values()}
    needed |= {r["data"] for n, r in log.retired.items() if pins.pin_key(n) in keys}
    left = {key for key in keys if key.startswith("data/") and key.rpartition("/")[0] not in needed}
    return f"after the clean-up there is still {sorted(left)}" if left else ""
