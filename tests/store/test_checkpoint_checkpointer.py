"""The Checkpointer, one rank, with an engine as small as the interface, on a real store.

tests/e2e/test_checkpoint_zero.py does the same with DeepSpeed and several ranks.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from kubedistill_trainer.checkpoint import (
    CheckpointCorrupt,
    Checkpointer,
    CheckpointFailed,
    CommitLog,
    ConfigChanged,
    Fenced,
)
from kubedistill_trainer.checkpoint.log import slot_key
from kubedistill_trainer.checkpoint.records import Commit
from kubedistill_trainer.checkpoint.shards import check_by_head
from kubedistill_trainer.store import Store, StoreUnavailable
from s3_fixture import Faults, S3Server, s3  # noqa: F401  (s3 is a fixture)


class Engine:
    """Saves and loads one tensor where DeepSpeed would its state."""

    def __init__(self, value: float = 0.0) -> None:
        self.weights = torch.full((1000,), value)
        self.checkpoint_engine: Any = None

    def save_checkpoint(self, folder: str, *, tag: str, save_latest: bool) -> None:
        assert not save_latest
        path = Path(folder) / tag / "mp_rank_00_model_states.pt"
        self.checkpoint_engine.save(state_dict=self.weights, path=str(path))
        (Path(folder) / tag / "zero_to_fp32.py").write_text("print()")

    def load_checkpoint(self, folder: str, *, tag: str) -> tuple[str | None, object]:
        path = Path(folder) / tag / "mp_rank_00_model_states.pt"
        self.weights = torch.load(path, weights_only=True)
        return str(path), {}

    @property
    def value(self) -> float:
        return float(self.weights[0])


@pytest.fixture
def store(s3: S3Server) -> Store:  # noqa: F811
    return s3.store()


def checkpointer(store: Store, scratch: Path, fence: int, **changes: Any) -> Checkpointer:
    fields: dict[str, Any] = {
        "rank": 0, "world_size": 1, "config_digest": "c", "keep_last": 3, "control_group": None,
    }  # fmt: skip
    return Checkpointer(
        store=store, scratch=scratch, fence=fence, attempt=f"a{fence}", **(fields | changes)
    )


def opened(store: Store, scratch: Path, fence: int, **changes: Any) -> Checkpointer:
    found = checkpointer(store, scratch, fence, **changes)
    found.open()
    return found


def save(saver: Checkpointer, *steps: int) -> None:
    for step in steps:
        saver.save(Engine(float(step)), step=step, cursor={"step": step, "stream": {"shard": 7}})


def commits(store: Store) -> list[Commit]:
    log = CommitLog(store)
    return [entry.record for entry in log.read() if isinstance(entry.record, Commit)]


def kinds(store: Store) -> list[str]:
    entries = CommitLog(store).read()
    return [entry.record.kind if entry.record else "-" for entry in entries]


def test_the_newest_commit_is_restored(store: Store, tmp_path: Path) -> None:
    first = opened(store, tmp_path, 1)
    assert first.restore(Engine()) is None
    save(first, 10)
    info = first.save(Engine(20.0), step=20, cursor={"step": 20})
    assert info.step == 20
    assert info.size_bytes == commits(store)[1].size_bytes > 4000
    assert info.digest == json.loads(store.get(slot_key(2)))["sha256"]
    assert info.uri == store.uri_of(commits(store)[1].data)
    engine = Engine()
    restored = opened(store, tmp_path, 2).restore(engine)
    assert restored is not None
    assert (restored.step, restored.cursor, restored.uri) == (20, {"step": 20}, info.uri)
    assert restored.rejected == []
    assert engine.value == 20.0
    assert list(tmp_path.rglob("*.pt")) == [], "scratch is left empty"


def test_a_restore_shows_life_with_each_part_that_comes(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the midst of training one that takes minutes is no gang that stands still."""
    monkeypatch.setattr("kubedistill_trainer.checkpoint.shards.PART_BYTES", 1000)
    save(opened(store, tmp_path, 1), 10)
    [commit] = commits(store)
    parts = sum(len(shard.crc32c) for shard in commit.shards)
    signs: list[bool] = []
    assert opened(store, tmp_path, 2, alive=lambda: signs.append(True)).restore(Engine())
    assert len(signs) == parts > len(commit.shards)


def test_keys_are_new_every_time(store: Store, tmp_path: Path) -> None:
    saver = opened(store, tmp_path, 4)
    save(saver, 10, 10)
    first, second = commits(store)
    assert first.data != second.data
    assert first.data.startswith("data/e4/s10/")
    assert {shard.path for shard in first.shards} == {
        "rng-00000.json", "state/mp_rank_00_model_states.pt",
    }  # fmt: skip


def test_generators_go_on_where_they_were(store: Store, tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float, float]:
        return (
            random.random(), random.gauss(0, 1), float(np.random.standard_normal()),
            float(torch.randn(())),
        )  # fmt: skip

    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    draw()  # leaves half a pair of normals in Python's and NumPy's generators
    saver = opened(store, tmp_path, 1)
    Faults(store).lose_answers("PUT", 2)  # botocore's back-off draws random numbers
    save(saver, 10)
    after = [draw() for _ in range(3)]
    random.seed(9)
    np.random.seed(9)
    torch.manual_seed(9)
    opened(store, tmp_path, 2).restore(Engine())
    assert [draw() for _ in range(3)] == after


def flip(data: bytes) -> bytes:
    return data[:100] + bytes([data[100] ^ 1]) + data[101:]


SHARD_DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda data: None,
    "truncated": lambda data: data[:-1],
    "flipped": flip,
}


@pytest.mark.parametrize("damage", SHARD_DAMAGE)
@pytest.mark.parametrize("which", [0, 1], ids=["generators", "state"])
def test_a_bad_shard_means_the_older_commit(
    store: Store, tmp_path: Path, damage: str, which: int
) -> None:
    save(opened(store, tmp_path, 1), 10, 20)
    newest = commits(store)[-1]
    key = f"{newest.data}/{newest.shards[which].path}"
    changed = SHARD_DAMAGE[damage](store.get(key))
    store.delete([key]) if changed is None else store.put(key, changed)
    engine = Engine()
    restored = opened(store, tmp_path, 2).restore(engine)
    assert restored is not None
    assert (restored.step, engine.value) == (10, 10.0)
    [rejected] = restored.rejected
    assert rejected.step == 20
    assert key in rejected.reason
    assert str(rejected).startswith("step 20, s3://")
    assert kinds(store) == ["FENCE", "COMMIT", "COMMIT", "FENCE", "REJECT"]
    again = opened(store, tmp_path, 3).restore(engine)
    assert again is not None
    assert (again.step, again.rejected) == (10, []), "it is not tried twice"


@pytest.mark.parametrize("damage", ["torn", "flipped"])
def test_a_bad_record_means_the_older_commit(store: Store, tmp_path: Path, damage: str) -> None:
    save(opened(store, tmp_path, 1), 10, 20)
    data = store.get(slot_key(2))
    store.put(slot_key(2), data[:100] if damage == "torn" else flip(data))
    engine = Engine()
    restored = opened(store, tmp_path, 2).restore(engine)
    assert restored is not None
    assert (restored.step, engine.value) == (10, 10.0)
    assert [(r.step, r.uri) for r in restored.rejected] == [(None, store.uri_of(slot_key(2)))]
    assert kinds(store)[-1] == "REJECT"


def test_a_swapped_shard_means_the_older_commit(store: Store, tmp_path: Path) -> None:
    save(opened(store, tmp_path, 1), 10, 20)
    older, newer = commits(store)
    path = older.shards[1].path
    assert older.shards[1].size_bytes == newer.shards[1].size_bytes
    store.put(f"{newer.data}/{path}", store.get(f"{older.data}/{path}"))
    restored = opened(store, tmp_path, 2).restore(Engine())
    assert restored is not None
    assert restored.step == 10


def test_a_store_that_is_away_rejects_nothing(store: Store, tmp_path: Path) -> None:
    save(opened(store, tmp_path, 1), 10)
    reader = opened(store, tmp_path, 2)
    faults = Faults(store)
    faults.lose_answers("GET", 100)
    with pytest.raises(StoreUnavailable):
        reader.restore(Engine())
    faults.lose_answers("GET", 0)
    assert kinds(store) == ["FENCE", "COMMIT", "FENCE"]


def test_what_does_not_fit_is_refused_and_not_rejected(store: Store, tmp_path: Path) -> None:
    save(opened(store, tmp_path, 1), 10)
    with pytest.raises(ConfigChanged, match=r"'c', this run has 'other'"):
        opened(store, tmp_path, 2, config_digest="other").restore(Engine())
    assert "REJECT" not in kinds(store)


def test_a_zombie_commits_nothing(store: Store, tmp_path: Path) -> None:
    zombie = opened(store, tmp_path / "z", 1)
    save(zombie, 10)
    winner = opened(store, tmp_path / "w", 2)
    with pytest.raises(Fenced):
        save(zombie, 20)
    save(winner, 20)
    with pytest.raises(Fenced):
        opened(store, tmp_path / "z", 1)
    assert [(commit.fence, commit.step) for commit in commits(store)] == [(1, 10), (2, 20)]


def test_a_truncated_upload_is_never_committed(store: Store, tmp_path: Path) -> None:
    saver = opened(store, tmp_path, 1)
    save(saver, 10)

    def truncate(params: dict[str, Any], **_event: Any) -> None:
        if str(params["url_path"]).endswith(".pt"):
            params["body"] = b"short"
            params["headers"].pop("Content-Length", None)
            # A proxy that cuts it off and knows no better.
            digest = hashlib.md5(b"short", usedforsecurity=False).digest()
            params["headers"]["Content-MD5"] = base64.b64encode(digest).decode()

    store._connection.client.meta.events.register("before-call.s3.PutObject", truncate)
    with pytest.raises(CheckpointCorrupt, match="5 bytes, committed"):
        save(saver, 20)
    assert [commit.step for commit in commits(store)] == [10]


class Full(Engine):
    """Its file lies on a disk that is full."""

    def save_checkpoint(self, folder: str, *, tag: str, save_latest: bool) -> None:
        (Path(folder) / tag / "mp_rank_00_model_states.pt").symlink_to("/dev/full")
        super().save_checkpoint(folder, tag=tag, save_latest=save_latest)


def test_where_memory_is_short_the_snapshot_goes_to_disk(store: Store, tmp_path: Path) -> None:
    saver = opened(store, tmp_path, 1, memory_limit_bytes=1)
    save(saver, 10)
    engine = Engine()
    restored = opened(store, tmp_path, 2).restore(engine)
    assert restored is not None
    assert engine.value == 10.0


def test_a_full_disk_fails_loudly_and_leaves_the_last_commit(store: Store, tmp_path: Path) -> None:
    short = opened(store, tmp_path, 1, memory_limit_bytes=1)
    save(short, 10)
    with pytest.raises(CheckpointFailed, match=r"no room for a snapshot in memory, and \d+ bytes"):
        short.save(Full(), step=20, cursor={})
    assert not (tmp_path / "save").exists(), "a disk that is full has room again"
    save(short, 30)
    assert [commit.step for commit in commits(store)] == [10, 30]
    roomy = opened(store, tmp_path, 2)
    roomy.save(Full(), step=40, cursor={})
    assert [commit.step for commit in commits(store)] == [10, 30, 40], "memory has room"


def test_a_rank_that_comes_back_has_the_room_of_the_snapshot_that_it_left(
    store: Store, tmp_path: Path
) -> None:
    """Killed while it uploaded from the disk, it needs that room for what it restores."""
    left = tmp_path / "save" / "state" / "mp_rank_00_model_states.pt"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"x")
    opened(store, tmp_path, 1, restart=1)
    assert not left.exists()


def test_training_goes_on_while_a_save_is_in_flight(store: Store, tmp_path: Path) -> None:
    """What is committed is the state of the snapshot, whatever training does to it afterwards."""
    saver, engine, told = opened(store, tmp_path, 1), Engine(10.0), Event()
    released = Event()

    def hold(**_event: Any) -> None:
        released.wait(30)

    store._connection.client.meta.events.register("before-send.s3.PutObject", hold)
    saver.start(engine, step=10, cursor={}, then=lambda info: told.set())
    engine.weights.fill_(99.0)
    assert saver.flight is not None
    assert not told.is_set()
    assert kinds(store) == ["FENCE"]
    released.set()
    info = saver.finish()
    assert info is not None
    assert told.is_set()
    assert saver.flight is None
    assert 0 < info.stall_seconds < info.duration_seconds
    opened(store, tmp_path, 2).restore(engine)
    assert engine.value == 10.0


def test_a_failed_upload_leaves_the_last_commit(store: Store, tmp_path: Path) -> None:
    saver = opened(store, tmp_path, 1)
    save(saver, 10)
    faults = Faults(store)
    faults.lose_answers("PUT", store.limits.attempts)
    with pytest.raises(StoreUnavailable, match=r"rank 0"):
        save(saver, 20)
    save(saver, 30)
    assert [commit.step for commit in commits(store)] == [10, 30]


def test_old_commits_go_and_the_verified_one_stays(store: Store, tmp_path: Path) -> None:
    save(opened(store, tmp_path, 1, keep_last=2), 10, 20)
    second = opened(store, tmp_path, 2, keep_last=2)
    restored = second.restore(Engine())
    assert restored is not None
    assert restored.step == 20
    save(second, 30, 40, 50)
    held = {info.key.split("/")[2] for info in store.list("data/")}
    assert held == {"s20", "s40", "s50"}
    engine = Engine()
    for commit in commits(store)[-2:]:  # the two newest are lost: the verified one still loads
        store.delete([f"{commit.data}/{shard.path}" for shard in commit.shards])
    restored = opened(store, tmp_path, 3).restore(engine)
    assert restored is not None
    assert (restored.step, engine.value) == (20, 20.0)


def test_a_clean_up_that_fails_does_not_fail_the_save(store: Store, tmp_path: Path) -> None:
    saver = opened(store, tmp_path, 1, keep_last=1)
    save(saver, 10, 20)
    Faults(store).lose_answers("POST", 100)  # DeleteObjects
    save(saver, 30)
    assert [commit.step for commit in commits(store)] == [10, 20, 30]


@pytest.mark.parametrize("applied", [False, True], ids=["before", "after"])
def test_death_at_any_call_leaves_the_old_or_the_new(
    s3: S3Server,  # noqa: F811
    tmp_path: Path,
    applied: bool,
) -> None:
    """Call by call through a save with its clean-up, until one is not reached any more."""
    restored_steps = []
    for call in range(100):
        store = s3.store()
        saver = opened(store, tmp_path, 1, keep_last=2)
        save(saver, 10, 20)
        faults = Faults(store)
        faults.die_at(call, applied=applied)
        before = len(faults.requests)
        failed = False
        try:
            save(saver, 30)
        except StoreUnavailable:
            failed = True
        reached = len(faults.requests) - before > call
        engine = Engine()
        restored = opened(s3.store(store.prefix), tmp_path, 2).restore(engine)
        assert restored is not None
        assert engine.value == restored.step
        assert restored.rejected == []
        assert restored.step == 30 or (failed and restored.step == 20)
        log = CommitLog(s3.store(store.prefix))
        log.read()
        for usable in log.commits():  # no COMMIT without its data
            check_by_head(s3.store(store.prefix).child(usable.record.data), usable.record.shards)
        restored_steps.append(restored.step)
        if not reached:
            break
    assert restored_steps == sorted(restored_steps)
    assert {20, 30} == set(restored_steps)
    assert len(restored_steps) > 8, "uploads, HEADs, COMMIT, RETIRE, list and delete"


def test_an_attempt_aborts_the_exports_of_those_before_it_and_never_of_a_later_one(
    store: Store, tmp_path: Path
) -> None:
    """Parts of a model whose export was killed are in no listing, and cost as long as they are there."""
    models, client = store.child("model"), store._connection.client

    def export(name: str) -> None:
        client.create_multipart_upload(Bucket=models.bucket, Key=f"{models.prefix}/d/{name}")

    export("killed")
    time.sleep(1.1)  # the server's clock counts seconds
    zombie = opened(store, tmp_path / "z", 1)
    export("of-the-first")
    zombie.abort_earlier_uploads(models)
    assert [upload.key for upload in models.uploads()] == ["d/of-the-first"]
    time.sleep(1.1)
    winner = opened(store, tmp_path / "w", 2)
    export("of-the-second")
    zombie.abort_earlier_uploads(models)
    assert len(models.uploads()) == 2
    winner.abort_earlier_uploads(models)
    assert [upload.key for upload in models.uploads()] == ["d/of-the-second"]
    Faults(store).lose_answers("GET", 1000)
    winner.abort_earlier_uploads(models)


def test_each_commit_is_told_once_it_is_in_the_log(store: Store, tmp_path: Path) -> None:
    told: list[int] = []
    saver = opened(store, tmp_path, 1, committed=lambda: told.append(len(commits(store))))
    save(saver, 10, 20)
    assert told == [1, 2]
    store.put(slot_key(3), b"of another writer")
    with pytest.raises(Fenced):
        save(saver, 30)
    assert told == [1, 2]
