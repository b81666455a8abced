"""Pins on a real store; their races are in tests/unit/test_commit_protocol.py."""

from __future__ import annotations

import time

import pytest
from kubedistill_trainer.checkpoint import CommitLog, pins
from kubedistill_trainer.checkpoint.errors import NotPinnable
from kubedistill_trainer.checkpoint.records import Reject
from kubedistill_trainer.checkpoint.retention import collect, retire
from kubedistill_trainer.store import Store
from run_kit import Run, opened
from s3_fixture import S3Server, s3  # noqa: F401  (s3 is a fixture)


@pytest.fixture
def store(s3: S3Server) -> Store:  # noqa: F811
    return s3.store()


def steps_with_data(store: Store) -> set[str]:
    return {info.key.split("/")[2] for info in store.list("data/")}


def test_a_pinned_commit_is_neither_retired_nor_deleted(store: Store) -> None:
    run = Run(store)
    commits = [run.commit(step) for step in (10, 20, 30)]
    pinned = pins.pin(store, CommitLog(store), 1)
    assert pinned.record.step == 10
    assert pins.pinned(store) == [1]
    retire(store, run.log, commits[:2])
    assert steps_with_data(store) == {"s10", "s30"}
    assert [commit.record.step for commit in run.log.commits()] == [10, 30]
    pins.unpin(store, 1)
    retire(store, run.log, commits[:1])
    assert steps_with_data(store) == {"s30"}
    assert pins.pinned(store) == []


def test_pinning_again_changes_nothing(store: Store) -> None:
    Run(store).commit(10)
    for _ in range(2):
        pins.pin(store, CommitLog(store), 1)
    assert pins.pinned(store) == [1]


def test_what_was_pinned_between_the_looks_keeps_its_data(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(store)
    first = run.commit(10)
    run.commit(20)
    append = run.log.append

    def append_late(make: object, **fields: object) -> object:
        pins.pin(store, CommitLog(store), 1)
        return append(make, **fields)  # type: ignore[arg-type]  # passed on as it came

    monkeypatch.setattr(run.log, "append", append_late)
    retire(store, run.log, [first])
    assert [commit.record.step for commit in run.log.commits()] == [20]
    time.sleep(1.1)  # the server's clock counts seconds
    second = opened(store, 2)
    assert collect(store, second, 2) == []
    assert steps_with_data(store) == {"s10", "s20"}
    pins.unpin(store, 1)
    assert collect(store, second, 2) == ["data/e1/s10/u10"]


@pytest.mark.parametrize(
    ("sequence", "words"),
    [
        (0, "slot 0 holds a FENCE, in force"),
        (1, r"slot 1 was retired \(in slot 4\), so its shards are going or gone"),
        (2, r"slot 2 holds a COMMIT, rejected \(bad\); slots with a usable commit: 3"),
        (4, "slot 4 holds a RETIRE, applied"),
        (9, "slot 9 is not written"),
    ],
)
def test_what_cannot_be_pinned(store: Store, sequence: int, words: str) -> None:
    run = Run(store)
    first, second, _ = (run.commit(step) for step in (10, 20, 30))
    retire(store, run.log, [first])
    run.log.append(Reject, sequence=second.sequence, reason="bad")
    with pytest.raises(NotPinnable, match=words):
        pins.pin(store, CommitLog(store), sequence)
    assert pins.pinned(store) == []
