"""The commit log on a real store: races, lost answers, zombies, damage."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from kubedistill_trainer.checkpoint import CommitLog, Fenced
from kubedistill_trainer.checkpoint.errors import CheckpointCorrupt, ForeignLog, LogTooNew
from kubedistill_trainer.checkpoint.known import KnownRecords
from kubedistill_trainer.checkpoint.log import Entry, slot_key
from kubedistill_trainer.checkpoint.records import (
    Commit,
    Fence,
    Reject,
    Retire,
    ShardRecord,
    encode,
)
from kubedistill_trainer.store import Store, StoreUnavailable
from s3_fixture import Faults, S3Server, s3  # noqa: F401  (s3 is a fixture)

SHARD = ShardRecord(path="x", rank=0, shared=False, size_bytes=1, sha256="0" * 64, crc32c=[0])


@pytest.fixture
def store(s3: S3Server) -> Store:  # noqa: F811
    return s3.store()


def commit_fields(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "world_size": 1,
        "data": f"data/e1/s{step}/u",
        "shards": [SHARD],
        "cursor": {"step": step},
        "config_digest": "",
    }


def opened(store: Store, fence: int) -> CommitLog:
    log = CommitLog(store, fence=fence, attempt=f"attempt-{fence}")
    log.take_over()
    return log


def kinds(store: Store) -> list[str]:
    entries = CommitLog(store).read()
    return [entry.record.kind if entry.record else "-" for entry in entries]


def steps(log: CommitLog) -> list[int]:
    return [commit.record.step for commit in log.commits()]


def test_a_log_grows_slot_by_slot(store: Store) -> None:
    log = opened(store, 1)
    for step in (10, 20, 30):
        log.append(Commit, **commit_fields(step))
    assert [info.key for info in store.list()] == [slot_key(number) for number in range(4)]
    assert slot_key(3) == "log/00000000000000000003.json"
    other = CommitLog(store)
    other.read()
    assert steps(other) == steps(log) == [10, 20, 30]
    log.append(Reject, sequence=3, reason="bad")
    log.append(Retire, sequences=[1], data=["data/e1/s10/u"])
    other.read()
    assert steps(other) == steps(log) == [20]


def test_what_a_pod_knows_is_not_fetched_again(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "pod" / "log"
    first = CommitLog(store, fence=1, attempt="a", known=KnownRecords(file, fresh=True))
    first.take_over()
    for step in (10, 20):
        first.append(Commit, **commit_fields(step))
    with file.open("ab") as lines:
        lines.write(b'3 {"half": ')
    faults = Faults(store)
    again = CommitLog(store, fence=1, restart=1, attempt="a", known=KnownRecords(file, fresh=False))
    again.take_over()
    assert [request.split()[0] for request in faults.requests] == ["GET", "PUT"], "list and FENCE"
    assert steps(again) == [10, 20]
    other = CommitLog(store)
    assert other.read() == again.entries


def test_of_another_attempts_records_nothing_is_known(store: Store, tmp_path: Path) -> None:
    """Its disk may be an older one's, and the store has the last word."""
    first = CommitLog(store, fence=1, known=KnownRecords(tmp_path / "log", fresh=True))
    first.take_over()
    store.put(slot_key(0), b"harmed")
    second = CommitLog(store, fence=2, known=KnownRecords(tmp_path / "log", fresh=True))
    second.take_over()
    assert second.entries[0].record is None


def test_a_disk_that_takes_nothing_costs_requests_alone(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    known = KnownRecords(tmp_path / "file" / "log", fresh=True)
    log = CommitLog(store, fence=1, attempt="a", known=known)
    log.take_over()
    log.append(Commit, **commit_fields(10))
    assert steps(log) == [10]


def test_reading_needs_no_fence_and_appending_does(store: Store) -> None:
    log = CommitLog(store, fence=1, attempt="a")
    assert log.read() == []
    with pytest.raises(Fenced, match="without a FENCE"):
        log.append(Commit, **commit_fields(1))
    assert kinds(store) == []


def test_of_many_writers_of_one_slot_one_wins(s3: S3Server, store: Store) -> None:  # noqa: F811
    """Zombies of one fence: all think that they own the log, and race for its next slot."""
    racers = 6
    logs = [CommitLog(s3.store(store.prefix), fence=1, attempt=f"z{n}") for n in range(racers)]
    logs[0].take_over()
    for log in logs[1:]:
        log.read()
        log._fence_sequence = 0  # twins: each takes the FENCE for its own
        log._tried |= logs[0]._tried
    start = Barrier(racers)

    def race(log: CommitLog) -> bool:
        start.wait()
        try:
            log.append(Commit, **commit_fields(1))
        except Fenced:
            return False
        return True

    with ThreadPoolExecutor(racers) as pool:
        won = list(pool.map(race, logs))
    assert sum(won) == 1
    found = CommitLog(store).read()
    assert [entry.record.kind for entry in found if entry.record] == ["FENCE", "COMMIT"]
    assert found[1].record is not None
    assert found[1].record.attempt == f"z{won.index(True)}"


def test_of_many_takers_the_highest_fence_has_the_last_word(
    s3: S3Server,  # noqa: F811
    store: Store,
) -> None:
    takers = 6
    start = Barrier(takers)

    def take(fence: int) -> CommitLog | None:
        log = CommitLog(s3.store(store.prefix), fence=fence, attempt=f"a{fence}")
        start.wait()
        try:
            log.take_over()
        except Fenced:
            return None
        return log

    with ThreadPoolExecutor(takers) as pool:
        logs = list(pool.map(take, range(1, takers + 1)))
    fences = [entry.record.fence for entry in CommitLog(store).read() if entry.record]
    assert fences == sorted(set(fences)), "the history is linear"
    assert fences[-1] == takers
    for log in logs[:-1]:
        if log is not None:
            with pytest.raises(Fenced):
                log.append(Commit, **commit_fields(1))
    assert logs[-1] is not None
    logs[-1].append(Commit, **commit_fields(2))
    log = CommitLog(store)
    log.read()
    assert steps(log) == [2]


@pytest.mark.parametrize("late", [1, 2], ids=["lower fence", "equal fence"])
def test_an_old_fence_is_refused(store: Store, late: int) -> None:
    opened(store, 2)
    with pytest.raises(Fenced, match="fence 2, attempt 'attempt-2'"):
        opened(store, late)
    assert kinds(store) == ["FENCE"]


def test_a_zombie_that_wakes_is_refused_for_good(store: Store) -> None:
    zombie = opened(store, 1)
    zombie.append(Commit, **commit_fields(10))
    winner = opened(store, 2)
    for _ in range(2):
        with pytest.raises(Fenced):
            zombie.append(Commit, **commit_fields(20))
    winner.append(Commit, **commit_fields(20))
    with pytest.raises(Fenced):
        zombie.append(Retire, sequences=[1], data=["data/e1/s10/u"])
    assert kinds(store) == ["FENCE", "COMMIT", "FENCE", "COMMIT"]
    assert steps(winner) == [10, 20]


def test_a_commit_under_a_fence_that_is_over_is_not_used(store: Store) -> None:
    log = opened(store, 1)
    log.append(Commit, **commit_fields(10))
    opened(store, 2)
    stale = Commit(
        nonce="1" * 32, fence=1, attempt="a", trainer_version="", time="", **commit_fields(20)
    )
    store.put(slot_key(3), encode(stale), only_if_absent=True)
    reader = CommitLog(store)
    reader.read()
    assert steps(reader) == [10]


def test_a_zombie_that_reads_writes_nothing_behind_the_winner(store: Store) -> None:
    """What it read tells it that it was overtaken: to append there would fence out the winner."""
    zombie = opened(store, 1)
    zombie.append(Commit, **commit_fields(10))
    winner = opened(store, 2)
    zombie.read()
    for make, fields in (
        (Reject, {"sequence": 1, "reason": "x"}),
        (Retire, {"sequences": [1], "data": ["data/e1/s10/u"]}),
        (Commit, commit_fields(20)),
    ):
        with pytest.raises(Fenced, match="fence 2, attempt 'attempt-2'"):
            zombie.append(make, **fields)
    winner.append(Commit, **commit_fields(30))
    assert kinds(store) == ["FENCE", "COMMIT", "FENCE", "COMMIT"]


def test_who_was_fenced_takes_nothing_over_again(store: Store) -> None:
    zombie = opened(store, 1)
    opened(store, 2)
    with pytest.raises(Fenced):
        zombie.append(Commit, **commit_fields(10))
    with pytest.raises(Fenced):
        zombie.take_over()
    assert kinds(store) == ["FENCE", "FENCE"]


def test_a_fence_of_unknown_fate_that_was_overtaken_is_over(store: Store) -> None:
    log = CommitLog(store, fence=1, attempt="a")
    Faults(store).lose_answers("PUT", store.limits.attempts)
    with pytest.raises(StoreUnavailable):
        log.take_over()
    opened(store, 2)
    with pytest.raises(Fenced):
        log.take_over()
    assert kinds(store) == ["FENCE", "FENCE"]


@pytest.mark.parametrize("kind", ["COMMIT", "REJECT", "RETIRE"])
def test_records_of_a_fence_that_is_over_count_for_nothing(store: Store, kind: str) -> None:
    """Whoever wrote them: readers pass over them, and the attempt in force goes on behind them."""
    opened(store, 1).append(Commit, **commit_fields(10))
    winner = opened(store, 2)
    common = {"nonce": "1" * 32, "fence": 1, "attempt": "attempt-1", "trainer_version": ""}
    stale = {
        "COMMIT": lambda: Commit(**common, time="", **commit_fields(20)),
        "REJECT": lambda: Reject(**common, time="", sequence=1, reason="x"),
        "RETIRE": lambda: Retire(**common, time="", sequences=[1], data=["data/e1/s10/u"]),
    }[kind]()
    store.put(slot_key(3), encode(stale), only_if_absent=True)
    winner.append(Commit, **commit_fields(30))
    reader = CommitLog(store)
    reader.read()
    assert steps(reader) == steps(winner) == [10, 30]
    assert kinds(store) == ["FENCE", "COMMIT", "FENCE", kind, "COMMIT"]


def test_a_lost_answer_is_no_fence(store: Store) -> None:
    """boto repeats the PUT, meets a 412, and finds its own nonce."""
    faults = Faults(store)
    log = CommitLog(store, fence=1, attempt="a")
    faults.lose_answers("PUT")
    log.take_over()
    faults.lose_answers("PUT")
    log.append(Commit, **commit_fields(10))
    assert sum(request.startswith("PUT") for request in faults.requests) == 4
    assert kinds(store) == ["FENCE", "COMMIT"]


def test_a_commit_of_unknown_fate_is_found_by_the_next(store: Store) -> None:
    log = opened(store, 1)
    Faults(store).lose_answers("PUT", store.limits.attempts)
    with pytest.raises(StoreUnavailable):
        log.append(Commit, **commit_fields(10))
    log.append(Commit, **commit_fields(20))
    assert kinds(store) == ["FENCE", "COMMIT", "COMMIT"]
    assert steps(log) == [10, 20]


def test_a_fence_of_unknown_fate_is_found_by_the_next_try(store: Store) -> None:
    log = CommitLog(store, fence=1, attempt="a")
    Faults(store).lose_answers("PUT", store.limits.attempts)
    with pytest.raises(StoreUnavailable):
        log.take_over()
    assert log.take_over() == 0
    assert kinds(store) == ["FENCE"]


@pytest.mark.parametrize("damage", ["torn", "flipped", "gone", "not ours"])
def test_damage_is_seen_and_does_not_stop_the_log(store: Store, damage: str) -> None:
    log = opened(store, 1)
    for step in (10, 20, 30):
        log.append(Commit, **commit_fields(step))
    whole = store.get(slot_key(2))
    if damage == "gone":
        store.delete([slot_key(2)])
    else:
        flipped = whole.replace(b'"step":20', b'"step":21', 1)
        assert flipped != whole
        store.put(
            slot_key(2),
            {"torn": whole[:-40], "flipped": flipped, "not ours": b"\x80\x04."}[damage],
        )
    next_log = opened(store, 2)
    assert steps(next_log) == [10, 30]
    assert [entry.sequence for entry in next_log.unreadable()] == [2]
    next_log.append(Reject, sequence=2, reason="x")
    assert next_log.unreadable() == []


def test_a_damaged_last_slot_is_never_written_again(store: Store) -> None:
    log = opened(store, 1)
    log.append(Commit, **commit_fields(10))
    store.put(slot_key(1), b"{")
    opened(store, 2)
    assert kinds(store) == ["FENCE", "-", "FENCE"]


def test_other_keys_are_no_slots(store: Store) -> None:
    for key in ("log/readme", "log/1.json", "log/sub/00000000000000000007.json"):
        store.put(key, b"x")
    opened(store, 1)
    assert isinstance(CommitLog(store).read()[0].record, Fence)


def newer(version: int = 3, trainer_version: str = "9.1") -> bytes:
    """A whole record as a later program might write it."""
    fields = {"version": version, "trainer_version": trainer_version, "kind": "SNAPSHOT", "x": [1]}
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return json.dumps(fields | {"sha256": hashlib.sha256(text.encode()).hexdigest()}).encode()


def test_a_log_of_a_newer_program_is_left_alone(store: Store) -> None:
    opened(store, 1).append(Commit, **commit_fields(10))
    store.put(slot_key(2), newer())
    before = [(info.key, info.etag) for info in store.list()]
    log = CommitLog(store, fence=2, attempt="a")
    with pytest.raises(LogTooNew, match=r"0002\.json.*version 3.*kubedistill 9\.1.*image"):
        log.take_over()
    assert log.unreadable() == [], "nothing that anybody would reject"
    with pytest.raises(Fenced):
        log.append(Reject, sequence=2, reason="x")
    assert [(info.key, info.etag) for info in store.list()] == before


def test_a_newer_program_that_takes_over_fences_out(store: Store) -> None:
    log = opened(store, 1)
    store.put(slot_key(1), newer())
    with pytest.raises(Fenced, match="written by kubedistill 9"):
        log.append(Commit, **commit_fields(10))
    reading = opened_behind(store, 0)
    with pytest.raises(Fenced):
        reading.append(Commit, **commit_fields(10))


def opened_behind(store: Store, fence_sequence: int) -> CommitLog:
    """A log that took over, and has since read what others wrote."""
    log = CommitLog(store, fence=1, attempt="attempt-1")
    log.read()
    log._fence_sequence = fence_sequence
    log._tried |= {e.record.nonce for e in log.entries if e.record is not None}
    return log


def test_the_log_of_another_run_is_refused(store: Store) -> None:
    CommitLog(store, fence=1, attempt="a", run="team/one/1").take_over()
    other = CommitLog(store, fence=2, attempt="a", run="team/two/2")
    with pytest.raises(ForeignLog, match=r"run team/one/1, and this is run team/two/2"):
        other.take_over()
    assert kinds(store) == ["FENCE"]


def test_a_foreign_fence_at_the_same_moment_is_refused(store: Store) -> None:
    mine = CommitLog(store, fence=1, attempt="a", run="team/one/1")
    read = mine.read

    def read_and_lose() -> list[Entry]:
        found = read()
        CommitLog(store, fence=2, attempt="a", run="team/two/2").take_over()
        return found

    mine.read = read_and_lose  # type: ignore[method-assign]  # a race, made certain
    with pytest.raises(ForeignLog, match="team/two/2"):
        mine.take_over()
    assert kinds(store) == ["FENCE"]


def test_a_log_from_before_runs_had_names_is_taken_over(store: Store) -> None:
    opened(store, 1).append(Commit, **commit_fields(10))
    log = CommitLog(store, fence=2, attempt="a", run="team/one/1")
    log.take_over()
    log.append(Commit, **commit_fields(20))
    assert steps(log) == [10, 20]


def test_a_slot_far_beyond_the_others_is_no_log(store: Store) -> None:
    opened(store, 1)
    store.put(slot_key(10**19), b"{}")
    with pytest.raises(CheckpointCorrupt, match=r"10000000000000000000\.json.*move it away"):
        CommitLog(store, fence=2, attempt="a").take_over()


def test_the_end_is_found_where_the_list_is_stale(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = opened(store, 1)
    for step in (10, 20):
        log.append(Commit, **commit_fields(step))
    monkeypatch.setattr(Store, "list", lambda *_arguments: iter(()))
    reader = CommitLog(store)
    assert reader.read() == []
    assert len(reader.read_to_end()) == 3
    assert steps(reader) == [10, 20]


def test_the_log_needs_no_torch() -> None:
    code = (
        "import sys, kubedistill_trainer.checkpoint.log, kubedistill_trainer.checkpoint.shards, "
        "kubedistill_trainer.checkpoint.retention; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
