"""The chaos suite's independent reader: a good prefix is good, and each damage is named."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chaos.reader import Live, Report, check
from kubedistill_trainer.checkpoint.history import slot_key
from kubedistill_trainer.checkpoint.records import Commit, Fence, Record, Reject, decode, encode
from kubedistill_trainer.checkpoint.retention import collect, retire
from kubedistill_trainer.store import Store
from run_kit import Run, opened
from s3_fixture import S3Server, s3  # noqa: F401  (s3 is a fixture)


@pytest.fixture
def store(s3: S3Server) -> Store:  # noqa: F811
    """Slots: FENCE, COMMIT 10, COMMIT 20, RETIRE of 10, FENCE 2, COMMIT 30."""
    store = s3.store()
    first = Run(store)
    old = first.commit(10)
    first.commit(20)
    retire(store, first.log, [old])
    Run(store, 2).commit(30)
    return store


def checked(store: Store, collected: bool = False) -> Report:
    return check(store._connection.client, store.bucket, store.prefix, collected)


def test_a_good_prefix_is_good(store: Store) -> None:
    found = checked(store, collected=True)
    assert found.violations == []
    assert [(live.step, live.fence) for live in found.live] == [(20, 1), (30, 2)]
    assert isinstance(found.live[0], Live)
    assert found.live[0].data != found.live[1].data


def altered(store: Store, key: str, alter: Callable[[bytes], bytes]) -> None:
    store.put(key, alter(store.get(key)))


SHARD = "data/e2/s30/u30/state/a.pt"
OTHER = "data/e1/s20/u20/state/a.pt"
STAMP = {"nonce": "9" * 32, "attempt": "0c9f-1", "trainer_version": "", "time": ""}


def put_record(store: Store, slot: int, record: Record) -> None:
    store.put(slot_key(slot), encode(record))


def commit_in(store: Store, slot: int) -> dict[str, Any]:
    """Its fields but the nonce."""
    record = decode(store.get(slot_key(slot)))
    return record.model_dump(exclude={"kind", "nonce"})


def late_commit(store: Store) -> None:
    put_record(store, 6, Commit(nonce="9" * 32, **commit_in(store, 2)))


def second_commit_of_a_step(store: Store) -> None:
    put_record(store, 6, Commit(nonce="9" * 32, **commit_in(store, 5)))


DAMAGES: list[tuple[Callable[[Store], None], str]] = [
    (lambda s: s.delete([SHARD]), f"slot 5 is live and {SHARD} is missing"),
    (lambda s: s.delete([slot_key(1)]), "slot 1 is empty and slot 2 is not"),
    (lambda s: altered(s, SHARD, lambda d: d[:-1]), f"{SHARD} has 699 bytes instead of 700"),
    (lambda s: altered(s, SHARD, lambda d: b"b" + d[1:]), f"{SHARD} has another CRC32C"),
    (lambda s: s.put(SHARD, s.get(OTHER)), f"{SHARD} has another CRC32C"),
    (lambda s: altered(s, slot_key(2), lambda d: d[:-9]), "slot 2 is not JSON"),
    (
        lambda s: altered(s, slot_key(2), lambda d: d.replace(b'"step":20', b'"step":21', 1)),
        "slot 2 holds a record whose own hash is wrong",
    ),
    (lambda s: s.put(slot_key(2), b"{}"), "slot 2 is no record"),
    (
        lambda s: put_record(s, 6, Fence(fence=2, **STAMP)),
        "slot 6 is a FENCE 2 behind FENCE 2: the history is not linear",
    ),
    (late_commit, "slot 6 is a COMMIT of fence 1, attempt '0c9f-1'; in force was 2 of '0c9f-2'"),
    (second_commit_of_a_step, "slot 6 commits step 30, and a later one is live"),
    (
        lambda s: s.put(slot_key(6), s.get(slot_key(4))),
        "slots 4 and 6 hold one nonce",
    ),
    (
        lambda s: put_record(s, 6, Fence(fence=3, run="team/other/1", **STAMP)),
        "the log is of several runs: team/other/1, team/student/0c9f",
    ),
    (lambda s: s.put("notes.txt", b"x"), "notes.txt is no object of a run"),
    (
        lambda s: s.put("data/e1/s11/lost/a", b"x"),
        "data/e1/s11/lost is left with 1 bytes that no commit needs",
    ),
    (
        lambda s: s._connection.client.create_multipart_upload(
            Bucket=s.bucket, Key=f"{s.prefix}/data/e1/s12/u/a"
        ),
        "/data/e1/s12/u/a is left as an unfinished multipart upload",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "sentence"), DAMAGES, ids=[words for _, words in DAMAGES])
def test_each_damage_is_named(store: Store, damage: Callable[[Store], None], sentence: str) -> None:
    damage(store)
    found = checked(store, collected=True).violations
    assert any(sentence in violation for violation in found), found


def test_damage_that_was_passed_over_is_no_violation(store: Store) -> None:
    store.put(slot_key(2), b"{")
    third = opened(store, 3)
    third.append(Reject, sequence=2, reason="torn")
    found = checked(store)
    assert found.violations == []
    assert [live.step for live in found.live] == [30]


def test_a_wrong_hash_of_right_crcs_is_seen(s3: S3Server) -> None:  # noqa: F811
    run = Run(s3.store())
    good = run.commit(10).record
    bad = [shard.model_copy(update={"sha256": "0" * 64}) for shard in good.shards]
    run.commit(20, shards=bad)
    assert any("another SHA-256" in v for v in checked(run.store).violations)


def test_uncollected_bytes_are_allowed_before_the_clean_up(s3: S3Server) -> None:  # noqa: F811
    run = Run(s3.store())
    run.commit(10)
    run.store.put("data/e1/s11/lost/a", b"x")
    assert checked(run.store).violations == []
    time.sleep(1.1)  # the server's clock counts seconds
    collect(run.store, opened(run.store, 2), 2)
    assert checked(run.store, collected=True).violations == []


def test_it_shares_no_code_with_the_project() -> None:
    import chaos.reader

    assert chaos.reader.__file__ is not None
    text = Path(chaos.reader.__file__).read_text()
    assert "import kubedistill" not in text
    assert "from kubedistill" not in text
