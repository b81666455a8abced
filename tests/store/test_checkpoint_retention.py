"""Clean-up: RETIRE before any deletion, and never the last good checkpoint."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kubedistill_trainer.checkpoint import CommitLog, Fenced
from kubedistill_trainer.checkpoint.log import CommitEntry
from kubedistill_trainer.checkpoint.records import Commit, Retire, ShardRecord
from kubedistill_trainer.checkpoint.retention import collect, data_prefix, retire, to_retire
from kubedistill_trainer.store import Store
from s3_fixture import Faults, S3Server, s3  # noqa: F401  (s3 is a fixture)

SHARDS = [
    ShardRecord(path=path, rank=0, shared=False, size_bytes=1, sha256="0" * 64, crc32c=[0])
    for path in ("a", "state/b")
]


@pytest.fixture
def store(s3: S3Server) -> Store:  # noqa: F811
    return s3.store()


def opened(store: Store, fence: int) -> CommitLog:
    log = CommitLog(store, fence=fence, attempt=f"attempt-{fence}")
    log.take_over()
    return log


def commit(store: Store, log: CommitLog, fence: int, step: int) -> CommitEntry:
    data = data_prefix(fence, step, "unique")
    for shard in SHARDS:
        store.put(f"{data}/{shard.path}", b"x")
    entry = log.append(
        Commit, step=step, world_size=1, data=data, shards=SHARDS, cursor={}, config_digest=""
    )
    assert isinstance(entry.record, Commit)
    return CommitEntry(entry.sequence, entry.record)


def data_of(store: Store) -> set[str]:
    return {"/".join(info.key.split("/")[:3]) for info in store.list("data/")}


def entries(count: int) -> list[CommitEntry]:
    record = Commit(
        nonce="0" * 32, fence=1, attempt="", trainer_version="", time="", step=1, world_size=1,
        data="d", shards=SHARDS, cursor={}, config_digest="",
    )  # fmt: skip
    return [CommitEntry(sequence, record) for sequence in range(1, count + 1)]


@pytest.mark.parametrize(
    ("count", "keep_last", "verified", "gone"),
    [
        (0, 3, None, []),
        (3, 3, 1, []),
        (5, 3, 5, [1, 2]),
        (5, 3, 1, [2]),
        (5, 1, 2, [1, 3, 4]),
        (5, 1, None, [1, 2, 3]),
        (2, 1, None, []),
        (5, 0, 3, [1, 2, 4]),
    ],
)
def test_what_goes(count: int, keep_last: int, verified: int | None, gone: list[int]) -> None:
    found = to_retire(entries(count), keep_last=keep_last, verified=verified)
    assert [entry.sequence for entry in found] == gone


def test_the_commit_of_a_step_that_is_wanted_stays() -> None:
    found = entries(5)
    best = found[1].record.model_copy(update={"step": 7})
    found[1] = CommitEntry(2, best)
    gone = to_retire(found, keep_last=1, verified=5, keep_step=7)
    assert [entry.sequence for entry in gone] == [1, 3, 4]


@given(
    count=st.integers(0, 12), keep_last=st.integers(0, 6), verified=st.none() | st.integers(1, 12)
)
def test_the_newest_and_the_verified_stay(count: int, keep_last: int, verified: int | None) -> None:
    gone = {e.sequence for e in to_retire(entries(count), keep_last=keep_last, verified=verified)}
    assert verified not in gone
    assert gone.isdisjoint(range(count, max(0, count - max(keep_last, 1)), -1))


def test_retire_is_written_before_anything_is_deleted(store: Store) -> None:
    log = opened(store, 1)
    first = commit(store, log, 1, 10)
    commit(store, log, 1, 20)
    faults = Faults(store)
    retire(store, log, [first])
    methods = [request.split()[0] for request in faults.requests]
    assert methods.index("PUT") < methods.index("POST")
    assert data_of(store) == {"data/e1/s20"}


def test_a_zombie_deletes_nothing(store: Store) -> None:
    zombie = opened(store, 1)
    first = commit(store, zombie, 1, 10)
    opened(store, 2)
    with pytest.raises(Fenced):
        retire(store, zombie, [first])
    assert data_of(store) == {"data/e1/s10"}


def test_a_clean_up_that_was_killed_is_finished_by_the_next_attempt(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """As SIGKILL would: nothing catches it."""

    def killed(keys: object) -> None:
        raise Killed

    log = opened(store, 1)
    first = commit(store, log, 1, 10)
    commit(store, log, 1, 20)
    with monkeypatch.context() as patch:
        patch.setattr(store, "delete", killed)
        with pytest.raises(Killed):
            retire(store, log, [first])
    assert data_of(store) == {"data/e1/s10", "data/e1/s20"}
    assert [entry.record.step for entry in log.commits()] == [20], "retired: not used any more"
    next_log = opened(store, 2)
    assert collect(store, next_log, 2) == ["data/e1/s10/unique"]
    assert data_of(store) == {"data/e1/s20"}


def test_orphans_go_by_fence_and_the_stores_clock(store: Store) -> None:
    log = opened(store, 1)
    commit(store, log, 1, 10)
    store.put("data/e1/s15/orphan/a", b"x")
    client = store._connection.client
    client.create_multipart_upload(Bucket=store.bucket, Key=f"{store.prefix}/data/e1/s16/o/a")
    time.sleep(1.1)  # the server's clock counts seconds
    next_log = opened(store, 2)
    time.sleep(1.1)
    store.put("data/e1/s17/zombie/a", b"x")  # a paused zombie goes on uploading
    store.put("data/e2/s18/own/a", b"x")
    assert collect(store, next_log, 2) == ["data/e1/s15/orphan"]
    assert data_of(store) == {"data/e1/s10", "data/e1/s17", "data/e2/s18"}
    uploads = client.list_multipart_uploads(Bucket=store.bucket, Prefix=store.prefix)
    assert not uploads.get("Uploads")


def test_beside_an_unreadable_slot_no_orphan_goes(store: Store) -> None:
    log = opened(store, 1)
    entry = commit(store, log, 1, 10)
    store.put(f"log/{entry.sequence:020d}.json", b"{")
    time.sleep(1.1)
    assert collect(store, opened(store, 2), 2) == []
    assert data_of(store) == {"data/e1/s10"}


def test_without_a_fence_nothing_is_collected(store: Store) -> None:
    store.put("data/e0/s1/orphan/a", b"x")
    log = CommitLog(store)
    log.read()
    assert collect(store, log, 9) == []
    assert data_of(store) == {"data/e0/s1"}


def test_data_of_a_live_commit_never_goes_whatever_a_retire_names(store: Store) -> None:
    log = opened(store, 1)
    commit(store, log, 1, 10)
    log.append(Retire, sequences=[7], data=["data/e1/s10/unique"])
    assert collect(store, opened(store, 2), 2) == []
    assert data_of(store) == {"data/e1/s10"}


def test_uploads_since_ones_own_fence_are_not_stale(store: Store) -> None:
    client = store._connection.client

    def begin(fence: int, name: str) -> None:
        key = f"{store.prefix}/data/e{fence}/s10/u/{name}"
        client.create_multipart_upload(Bucket=store.bucket, Key=key)

    begin(1, "a")
    begin(2, "a")  # of the same attempt, before its ranks were started again
    time.sleep(1.1)  # the server's clock counts seconds
    log = opened(store, 2)
    begin(2, "b")
    collect(store, log, 2)
    (left,) = store.uploads("data/")
    assert left.key == "data/e2/s10/u/b"
    store.abort_upload(left)
    store.abort_upload(left)  # over already
    assert store.uploads() == ()


@pytest.mark.parametrize("odd", ["a\u00a0b", "a b+c%2F", "//", "ä/"])
def test_an_odd_key_does_not_stop_the_clean_up(store: Store, odd: str) -> None:
    """Such as the marker of a folder that a tool left behind."""
    opened(store, 1)
    for prefix in ("data/e1/s1/u", "data/e1/s2/u"):
        store.put(f"{prefix}/a", b"x")
    client: Any = store._connection.client
    key = f"{store.prefix}/data/e1/s1/u/{odd}"
    client.put_object(Bucket=store.bucket, Key=key, Body=b"x")
    time.sleep(1.1)  # the server's clock counts seconds
    collect(store, opened(store, 2), 2)
    assert [info.key for info in store.list("data/")] == []
