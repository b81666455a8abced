"""What a run's prefix holds, and what of it is good: reads only, and writes nothing."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import google_crc32c

from kubedistill_trainer.checkpoint import pins
from kubedistill_trainer.checkpoint.history import Slot, State, run_of, slot_of
from kubedistill_trainer.checkpoint.log import CommitLog
from kubedistill_trainer.checkpoint.records import Commit, ShardRecord
from kubedistill_trainer.checkpoint.retention import named_data
from kubedistill_trainer.store import (
    AccessDenied,
    NotFound,
    ObjectInfo,
    Store,
    StoreError,
    UnsupportedStore,
    Upload,
)

PART_BYTES = 16 * 1024 * 1024
"""A record holds one CRC32C for each part of this size."""
_ATTEMPTS = 2  # a part that is wrong twice is wrong in the store
_HEADS = 8
_DATA = re.compile(r"data/e\d+/s\d+/[^/]+(?=/)")
_OURS = ("cursor/", ".preflight/")
_SLOT_BELOW = re.compile(r"(?:(.*)/)?log/\d{20}\.json")
_REFUSED = (State.TOO_NEW, State.FOREIGN)
_DAMAGED = (State.UNREADABLE, *_REFUSED)


@dataclass(frozen=True)
class Leftover:
    """Data that no usable or rejected commit needs."""

    prefix: str
    objects: int
    size_bytes: int
    why: str


@dataclass(frozen=True)
class Pin:
    sequence: int
    means: str
    """What it keeps, in words."""


@dataclass
class Inspection:
    """A run's prefix at one moment."""

    uri: str
    run: str
    """`<namespace>/<name>/<uid>`; empty where no record says so."""
    deep: bool
    slots: list[Slot]
    problems: dict[int, str] = field(default_factory=dict)
    """Live commits that are not whole, by slot."""
    leftovers: list[Leftover] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    uploads: tuple[Upload, ...] = ()
    uploads_unknown: str = ""
    """Why the store does not list them: keys that may only read are often not allowed to."""
    strangers: list[ObjectInfo] = field(default_factory=list)
    """Objects below the prefix that nothing of ours writes."""

    @property
    def live(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.state is State.LIVE]

    @property
    def refusal(self) -> str:
        """Why no attempt would begin on this log at all; empty where one would."""
        slot = next((slot for slot in self.slots if slot.state in _REFUSED), None)
        if slot is None:
            return ""
        if slot.state is State.TOO_NEW:
            return f"slot {slot.entry.sequence} is of a later version: {slot.entry.problem}"
        return f"slot {slot.entry.sequence} is {slot.reason}, and the log of run {self.run}"

    @property
    def resume(self) -> Slot | None:
        """The commit that an attempt would resume from: the newest that is whole."""
        if self.refusal:
            return None
        whole = (s for s in reversed(self.live) if s.entry.sequence not in self.problems)
        return next(whole, None)

    @property
    def passed_over(self) -> list[tuple[Slot, str]]:
        """Commits and unreadable slots newer than that, newest first, and why they are not taken."""
        if self.refusal:
            return []
        resume = self.resume
        newer = self.slots[resume.entry.sequence + 1 if resume else 0 :]
        return [
            (slot, self._why_not(slot))
            for slot in reversed(newer)
            if isinstance(slot.entry.record, Commit) or slot.entry.record is None
        ]

    @property
    def findings(self) -> list[str]:
        """What is damaged, a sentence each; empty when all is good."""
        found = [
            f"slot {slot.entry.sequence} is {slot.state}: {slot.reason or slot.entry.problem}"
            for slot in self.slots
            if slot.state in _DAMAGED
        ]
        found += [f"slot {slot}: {problem}" for slot, problem in sorted(self.problems.items())]
        return found

    def _why_not(self, slot: Slot) -> str:
        if slot.state is State.LIVE:
            return f"it would be rejected: {self.problems[slot.entry.sequence]}"
        reason = slot.reason or slot.entry.problem
        return f"{slot.state}: {reason}" if reason else str(slot.state)


Tell = Callable[[Slot, ShardRecord | None, int], None]
"""Called in a deep check: a commit, its shard (None: the commit is done) and bytes that were read."""


def inspect(store: Store, *, deep: bool = False, tell: Tell | None = None) -> Inspection:
    """Look at the run at `store`; with `deep` every byte of every live commit is read and hashed.

    Raises StoreError when the store does not answer, and CheckpointCorrupt for a log whose slots
    are no log's.
    """
    log, checked = CommitLog(store), dict[int, str]()
    while True:
        # Again after each look: a run that goes on retires commits while they are looked at.
        slots = log.history() if log.read_to_end() else []
        unchecked = [
            slot
            for slot in slots
            if slot.state is State.LIVE and slot.entry.sequence not in checked
        ]
        if not unchecked:
            break
        for slot in unchecked:
            problem = _problem(store, slot, tell if deep else None, deep=deep)
            checked[slot.entry.sequence] = problem
    found = Inspection(store.uri, run_of(log.entries), deep, slots)
    live = (slot.entry.sequence for slot in found.live)
    found.problems = {sequence: checked[sequence] for sequence in live if checked[sequence]}
    objects = list(store.list())
    found.leftovers = _leftovers(objects, slots, set(pins.pinned(store)))
    found.pins = [Pin(n, _pin_means(slots, n)) for n in pins.pinned(store)]
    try:
        found.uploads = store.uploads()
    except (AccessDenied, UnsupportedStore) as error:
        found.uploads_unknown = str(error)
    found.strangers = [info for info in objects if not _is_ours(info.key)]
    return found


def runs_below(store: Store) -> list[str]:
    """URIs of the prefixes at or below the store that hold a commit log, sorted."""
    found = {m.group(1) for info in store.list() if (m := _SLOT_BELOW.fullmatch(info.key))}
    return sorted(store.uri_of(prefix) if prefix else store.uri for prefix in found)


def _problem(store: Store, slot: Slot, tell: Tell | None, *, deep: bool) -> str:
    """What is wrong with a commit's shards, the first thing found; empty when nothing is."""
    commit = slot.entry.record
    assert isinstance(commit, Commit)
    at = store.child(commit.data)
    with ThreadPoolExecutor(_HEADS) as pool:
        problems = list(pool.map(lambda shard: _head_problem(at, shard), commit.shards))
    if problem := next((p for p in problems if p), ""):
        return problem
    for shard in commit.shards if deep else ():
        if problem := _content_problem(at, shard, slot, tell):
            return problem
    if tell:
        tell(slot, None, 0)
    return ""


def _head_problem(store: Store, shard: ShardRecord) -> str:
    info = store.head(shard.path)
    if info is None:
        return f"{store.uri_of(shard.path)} is missing"
    if info.size_bytes != shard.size_bytes:
        has = f"has {info.size_bytes} bytes, committed were {shard.size_bytes}"
        return f"{store.uri_of(shard.path)} {has}"
    return ""


def _content_problem(store: Store, shard: ShardRecord, slot: Slot, tell: Tell | None) -> str:
    """Stream a shard and check the CRC32C of each part and the SHA-256 of the whole."""
    uri, whole = store.uri_of(shard.path), hashlib.sha256()
    for number, start in enumerate(range(0, shard.size_bytes, PART_BYTES)):
        length = min(PART_BYTES, shard.size_bytes - start)
        expected = shard.crc32c[number] if number < len(shard.crc32c) else None
        part = _part(store, shard.path, start, length, expected)
        if part is None:
            return f"{uri} is not what was committed: wrong CRC32C at offset {start}"
        whole.update(part)
        if tell:
            tell(slot, shard, len(part))
    if whole.hexdigest() != shard.sha256:
        return f"{uri} has SHA-256 {whole.hexdigest()}, committed was {shard.sha256}"
    return ""


def _part(store: Store, path: str, start: int, length: int, crc32c: int | None) -> bytes | None:
    for _ in range(_ATTEMPTS):
        try:
            part = store.get_range(path, start, length)
        except NotFound:  # since it was asked for by HEAD
            return None
        except StoreError as error:
            if "InvalidRange" not in error.problem:
                raise
            return None
        if len(part) == length and google_crc32c.value(part) == crc32c:
            return part
    return None


def _leftovers(
    objects: Sequence[ObjectInfo], slots: Sequence[Slot], pinned: set[int]
) -> list[Leftover]:
    kept, retired = named_data(slots)
    sizes: dict[str, list[int]] = {}
    for info in objects:
        if (match := _DATA.match(info.key)) and match.group() not in kept:
            sizes.setdefault(match.group(), []).append(info.size_bytes)
    return [
        Leftover(prefix, len(found), sum(found), _why_left(prefix, retired, pinned))
        for prefix, found in sorted(sizes.items())
    ]


def _why_left(prefix: str, retired: dict[str, int], pinned: set[int]) -> str:
    if prefix not in retired:
        return "no commit names it: an upload that goes on, or one that failed"
    if retired[prefix] in pinned:
        return f"slot {retired[prefix]}, retired and pinned: it stays"
    return f"slot {retired[prefix]}, retired: the next clean-up deletes it"


def _pin_means(slots: Sequence[Slot], sequence: int) -> str:
    slot = slots[sequence] if sequence < len(slots) else None
    if slot is None or not isinstance(slot.entry.record, Commit):
        return "there is no commit in this slot"
    if slot.state is State.RETIRED:
        return f"retired {slot.reason}: keeps what shards there are, and no run resumes from them"
    return f"keeps step {slot.entry.record.step}"


def _is_ours(key: str) -> bool:
    slot_or_data = slot_of(key) >= 0 or _DATA.match(key) is not None
    pin = key.removeprefix("pins/").removesuffix(".json")
    is_pin = pin.isdecimal() and key == pins.pin_key(int(pin))
    return slot_or_data or is_pin or key.startswith(_OURS)
