"""The commit protocol, model-checked: every interleaving and fault within stated bounds.

Real code (CommitLog, retention, pins) runs over the store of `explorer.py`; what must hold is in
`commit_model.py`. KUBEDISTILL_MODEL_DEEP=1 adds larger shapes (minutes, some GiB), and
KUBEDISTILL_MODEL_WALKS=20000 makes that many random schedules.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import pytest
from commit_model import Invariants, attempt, pinner
from explorer import Actor, Explorer, Objects, directly
from kubedistill_trainer.checkpoint import CommitLog, Fenced, pins, retention
from kubedistill_trainer.checkpoint.records import Retire
from kubedistill_trainer.store import PreconditionFailed, StoreError

WALKS = int(os.environ.get("KUBEDISTILL_MODEL_WALKS", "150"))
NOTHING: Objects = frozenset()
COMMITTED, _ = directly(NOTHING, attempt(1, 1), 90)
"""A run with step 10 in slot 1, whose attempt has ended."""

SHAPES: dict[str, tuple[list[Actor], int, Objects]] = {
    # name: actors, faults in all, what is there before
    "one attempt, 3 saves, 2 faults": ([attempt(1, 3)], 2, NOTHING),
    "one attempt resumes, 2 saves of 2 shards, 2 faults": (
        [attempt(2, 2, shards="ab")], 2, COMMITTED,
    ),
    "two attempts, 1 save each, 1 fault": ([attempt(1, 1), attempt(2, 1)], 1, NOTHING),
    "two attempts resume, 2 saves each": ([attempt(2, 2), attempt(3, 2)], 0, COMMITTED),
    "two attempts resume, 2 saves and none, 1 fault": (
        [attempt(2, 2), attempt(3, 0)], 1, COMMITTED,
    ),
    "an attempt keeps a step, 3 saves, 1 fault": (
        [attempt(2, 3, keep_step=20)], 1, COMMITTED,
    ),
    "three attempts, 1 save each": ([attempt(1, 1), attempt(2, 1), attempt(3, 1)], 0, NOTHING),
    "an attempt retires what a person pins, 1 fault": ([attempt(2, 2), pinner(3)], 1, COMMITTED),
    "two people pin one commit": ([attempt(2, 2), pinner(3), pinner(3)], 0, COMMITTED),
    "a pin, its removal, and a clean-up": (
        [attempt(2, 2), pinner(3, unpins=True), attempt(3, 0)], 0, COMMITTED,
    ),
}  # fmt: skip
if os.environ.get("KUBEDISTILL_MODEL_DEEP"):
    SHAPES |= {
        "two attempts resume, 2 saves and 1, 1 fault": (
            [attempt(2, 2), attempt(3, 1)], 1, COMMITTED,
        ),
        "two attempts, 1 save each, 2 faults": ([attempt(1, 1), attempt(2, 1)], 2, NOTHING),
        "three attempts, the last saves nothing, 1 fault": (
            [attempt(1, 1), attempt(2, 1), attempt(3, 0)], 1, NOTHING,
        ),
        "two attempts and a person, 1 fault": (
            [attempt(2, 2), attempt(3, 0), pinner(3)], 1, COMMITTED,
        ),
    }  # fmt: skip


def explorer(shape: tuple[list[Actor], int, Objects], **changes: Any) -> Explorer:
    actors, faults, objects = shape
    check = changes.pop("check", Invariants())
    return Explorer(actors, check, objects=objects, **({"faults": faults} | changes))


@pytest.mark.parametrize("name", SHAPES)
def test_every_schedule_keeps_the_protocol(name: str) -> None:
    found = explorer(SHAPES[name]).search()
    print(f"{name}: {found}")
    assert not found.violation, found
    assert found.complete
    assert found.ends, "some schedules come to their ends"


@pytest.mark.parametrize("seed", range(2))
def test_long_random_schedules_keep_the_protocol(seed: int) -> None:
    """Four attempts that pause and wake, two people, and up to six faults."""
    actors = [
        *(attempt(fence, 3, shards="ab", keep_step=20) for fence in (2, 3, 4, 5)),
        pinner(3), pinner(5, unpins=True),
    ]  # fmt: skip
    found = Explorer(actors, Invariants(), objects=COMMITTED, faults=6).walk(seed, WALKS)
    print(f"seed {seed}: {found}")
    assert not found.violation, found


# The checker itself: each of these is a mistake that one could make, and must be found.


def no_nonce(patch: pytest.MonkeyPatch) -> None:
    """A 412 is always taken for another attempt's record."""
    put = CommitLog._put

    def taken(self: CommitLog, sequence: int, record: Any) -> Any:
        found = put(self, sequence, record)
        if found.record is record:
            return found
        raise Fenced("the slot is taken")

    patch.setattr(CommitLog, "_put", taken)


def any_412_is_success(patch: pytest.MonkeyPatch) -> None:
    def put(self: CommitLog, sequence: int, record: Any) -> Any:
        from kubedistill_trainer.checkpoint.log import Entry, encode, slot_key

        self._tried.add(record.nonce)
        with suppress(PreconditionFailed):
            self._store.put(slot_key(sequence), encode(record), only_if_absent=True)
        return Entry(sequence, record)

    patch.setattr(CommitLog, "_put", put)


def blind_append(patch: pytest.MonkeyPatch) -> None:
    """An attempt does not mind the FENCE that it has read, and writes behind it."""
    refuse = CommitLog._refuse_if_over

    def only_at_first(self: CommitLog, entries: Any) -> None:
        if self._fence_sequence is None:
            refuse(self, entries)

    patch.setattr(CommitLog, "_refuse_if_over", only_at_first)


def no_fence(patch: pytest.MonkeyPatch) -> None:
    """An attempt begins to write without a FENCE of its own."""

    def take_over(self: CommitLog) -> int:
        self._fence_sequence = len(self.read())
        return self._fence_sequence

    patch.setattr(CommitLog, "take_over", take_over)


def own_fence_is_enough(patch: pytest.MonkeyPatch) -> None:
    """A FENCE of unknown fate that is found counts, whatever came behind it."""
    refuse = CommitLog._refuse_if_over

    def unless_own(self: CommitLog, entries: Any) -> None:
        if self._own_fence() is None:
            refuse(self, entries)

    patch.setattr(CommitLog, "_refuse_if_over", unless_own)


def delete_before_retire(patch: pytest.MonkeyPatch) -> None:
    def retire(store: Any, log: CommitLog, commits: Any) -> None:
        for commit in commits:
            retention._delete_below(store, commit.record.data)
        if commits:
            log.append(
                Retire,
                sequences=[c.sequence for c in commits],
                data=[c.record.data for c in commits],
            )

    patch.setattr(retention, "retire", retire)


def delete_whatever_became_of_retire(patch: pytest.MonkeyPatch) -> None:
    append = CommitLog.append

    def retire(store: Any, log: CommitLog, commits: Any) -> None:
        for commit in commits:
            with suppress(StoreError):
                append(log, Retire, sequences=[commit.sequence], data=[commit.record.data])
            retention._delete_below(store, commit.record.data)

    patch.setattr(retention, "retire", retire)


def collect_by_neither_fence_nor_age(patch: pytest.MonkeyPatch) -> None:
    def collect(store: Any, log: CommitLog, _fence: int) -> None:
        kept, _ = retention.named_data(log.history())
        for prefix in retention._newest_by_prefix(store):
            if prefix not in kept:
                retention._delete_below(store, prefix)

    patch.setattr(retention, "collect", collect)


def collect_forgets_the_retired(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(retention, "collect", lambda *_arguments: [])


def retire_forgets_the_verified(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        retention, "to_retire", lambda commits, *, keep_last, verified, keep_step: commits[:-1]
    )


def retire_looks_for_pins_only_before(patch: pytest.MonkeyPatch) -> None:
    def retire(store: Any, log: CommitLog, commits: Any) -> None:
        free = [c for c in commits if not pins.is_pinned(store, c.sequence)]
        if free:
            log.append(
                Retire, sequences=[c.sequence for c in free], data=[c.record.data for c in free]
            )
        for commit in free:
            retention._delete_below(store, commit.record.data)

    patch.setattr(retention, "retire", retire)


def pins_by_a_list(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pins, "is_pinned", lambda store, sequence: sequence in pins.pinned(store))


def pin_without_a_second_look(patch: pytest.MonkeyPatch) -> None:
    def pin(store: Any, log: CommitLog, sequence: int) -> None:
        pins._usable(store, log, sequence)
        store.put(pins.pin_key(sequence), b"")

    patch.setattr(pins, "pin", pin)


def pin_takes_itself_back(patch: pytest.MonkeyPatch) -> None:
    """And takes with it the pin that somebody else relies on."""
    pin = pins.pin

    def and_back(store: Any, log: CommitLog, sequence: int) -> None:
        try:
            pin(store, log, sequence)
        except pins.NotPinnable:
            pins.unpin(store, sequence)
            raise

    patch.setattr(pins, "pin", and_back)


Mutation = Callable[[pytest.MonkeyPatch], None]
TWO = "two attempts, 1 save each, 1 fault"
RESUME = "two attempts resume, 2 saves each"
RETIRE = "one attempt resumes, 2 saves of 2 shards, 2 faults"
PIN = "an attempt retires what a person pins, 1 fault"
MUTATIONS: list[tuple[Mutation, str, str]] = [
    (no_nonce, TWO, "told that it is over"),
    (any_412_is_success, TWO, "of fence 1, in force is 2"),
    (blind_append, RESUME, "of fence 2, in force is 3"),
    (no_fence, TWO, "in force is -1"),
    (own_fence_is_enough, TWO, "of fence 1, in force is 2"),
    (delete_before_retire, RETIRE, "live without its data"),
    (delete_whatever_became_of_retire, RETIRE, "live without its data"),
    (collect_by_neither_fence_nor_age, TWO, "live without its data"),
    (collect_forgets_the_retired, RETIRE, "there is still"),
    (retire_forgets_the_verified, RETIRE, "was retired"),
    (retire_looks_for_pins_only_before, PIN, "its data is gone"),
    (pins_by_a_list, PIN, "its data is gone"),
    (pin_without_a_second_look, PIN, "its data is gone"),
    (pin_takes_itself_back, "two people pin one commit", "its data is gone"),
]


@pytest.mark.parametrize(
    ("mutation", "name", "words"), MUTATIONS, ids=lambda m: getattr(m, "__name__", "")
)
def test_a_planted_mistake_is_found(
    mutation: Mutation, name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutation(monkeypatch)
    found = explorer(SHAPES[name]).search()
    print(f"{mutation.__name__}: {found}")
    assert words in found.violation, found


def test_a_store_that_ignores_conditions_is_found() -> None:
    found = explorer(SHAPES[RESUME], ignores_conditions=True).search()
    print(found)
    assert found.violation


def test_a_retired_commit_with_a_pin_must_not_count_as_live() -> None:
    """The pin may have come after somebody had looked for it, and is about to delete."""
    found = explorer(SHAPES[PIN], check=Invariants(retired_pins_are_live=True)).search()
    print(found)
    assert "live without its data" in found.violation


@pytest.mark.parametrize("rule", ["fence", "age"])
def test_fence_or_age_alone_would_do(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rules, each enough: a mistake in one of them loses nothing."""
    if rule == "age":
        monkeypatch.setattr(retention, "_fence_of", lambda _key: -1)
    else:
        newest = retention._newest_by_prefix
        long_ago = datetime(2000, 1, 1, tzinfo=UTC)
        monkeypatch.setattr(
            retention, "_newest_by_prefix", lambda store: dict.fromkeys(newest(store), long_ago)
        )
    found = explorer(SHAPES[TWO]).search()
    assert not found.violation, found
    assert found.complete
