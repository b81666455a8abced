"""A run that has committed never begins anew by itself, and never goes on from other inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
from kubedistill_trainer.checkpoint import CheckpointFailed
from kubedistill_trainer.checkpoint.errors import InputsChanged, NoUsableCommit
from kubedistill_trainer.checkpoint.log import slot_key
from kubedistill_trainer.checkpoint.records import Reject
from kubedistill_trainer.store import Store
from s3_fixture import S3Server, s3  # noqa: F401  (s3 is a fixture)
from store.test_checkpoint_checkpointer import Engine, commits, flip, kinds, opened, save


@pytest.fixture
def store(s3: S3Server) -> Store:  # noqa: F811
    return s3.store()


def test_no_attempt_begins_anew_where_no_commit_is_good(store: Store, tmp_path: Path) -> None:
    save(opened(store, tmp_path, 1), 10)
    lost = f"{commits(store)[0].data}/rng-00000.json"
    body = store.get(lost)
    store.delete([lost])
    for fence in (2, 3, 4):
        with pytest.raises(NoUsableCommit, match=r"no commit can be loaded.*step 10.*put the obj"):
            opened(store, tmp_path, fence).restore(Engine())
    assert kinds(store) == ["FENCE", "COMMIT", "FENCE", "FENCE", "FENCE"]
    store.put(lost, body)
    restored = opened(store, tmp_path, 5).restore(engine := Engine())
    assert restored is not None
    assert (restored.step, restored.rejected, engine.value) == (10, [], 10.0)


def test_nor_where_the_only_record_is_torn(store: Store, tmp_path: Path) -> None:
    save(opened(store, tmp_path, 1), 10)
    store.put(slot_key(1), flip(store.get(slot_key(1))))
    for fence in (2, 3):
        with pytest.raises(NoUsableCommit, match="unreadable record"):
            opened(store, tmp_path, fence).restore(Engine())


def test_nor_where_all_were_rejected_before(store: Store, tmp_path: Path) -> None:
    saver = opened(store, tmp_path, 1)
    save(saver, 10)
    saver._log.append(Reject, sequence=1, reason="a shard was cut")
    with pytest.raises(NoUsableCommit, match=r"step 10, .*: a shard was cut"):
        opened(store, tmp_path, 2).restore(Engine())


def test_a_message_names_some_of_many(store: Store, tmp_path: Path) -> None:
    saver = opened(store, tmp_path, 1, keep_last=9)
    save(saver, *range(8))
    store.delete(i.key for i in store.list("data/") if "rng" in i.key)
    with pytest.raises(NoUsableCommit, match=r"step 7.*step 3.*; and 3 more\)") as caught:
        opened(store, tmp_path, 2).restore(Engine())
    assert "step 2," not in str(caught.value)


def test_an_emptied_log_is_no_new_run(store: Store, tmp_path: Path) -> None:
    save(opened(store, tmp_path, 1), 10)
    store.delete(i.key for i in store.list(""))
    assert opened(store, tmp_path, 2).restore(Engine()) is None, "nobody knows of a commit"
    for fence in (3, 4):
        with pytest.raises(NoUsableCommit, match=r"step 10, s3:.*the log does not have it"):
            opened(store, tmp_path, fence, known_step=10).restore(Engine())


def test_an_older_copy_of_the_log_is_told(store: Store, tmp_path: Path) -> None:
    save(opened(store, tmp_path, 1), 10, 20)
    store.delete([slot_key(2)])
    restored = opened(store, tmp_path, 2, known_step=20).restore(Engine())
    assert restored is not None
    assert restored.step == 10
    assert [(r.step, "does not have it" in r.reason) for r in restored.rejected] == [(20, True)]
    save(again := opened(store, tmp_path, 3, known_step=20), 20)
    restored = again.restore(Engine())
    assert restored is not None
    assert restored.rejected == [], "it is made again"


def test_nothing_is_committed_into_a_log_that_has_gone(store: Store, tmp_path: Path) -> None:
    """A bucket that was deleted comes back with the next PUT to some servers, empty."""
    saver = opened(store, tmp_path, 1)
    save(saver, 10)
    store.delete(i.key for i in store.list("log/"))
    with pytest.raises(CheckpointFailed, match=r"own record is gone.*put its objects back"):
        save(saver, 20)
    assert kinds(store) == []


def test_ranks_that_start_again_know_what_their_pod_has_read(store: Store, tmp_path: Path) -> None:
    save(opened(store, tmp_path, 1), 10)
    store.delete(i.key for i in store.list(""))
    with pytest.raises(NoUsableCommit, match="step 10"):
        opened(store, tmp_path, 1, restart=1).restore(Engine())


def test_other_inputs_are_refused_by_name(store: Store, tmp_path: Path) -> None:
    saver = opened(store, tmp_path, 1)
    saver.pin_inputs({"data.sources": "aaaa", "teacher": "bbbb"})
    save(saver, 10)
    for fence in (2, 3):
        changed = opened(store, tmp_path, fence)
        changed.pin_inputs({"data.sources": "cccc", "teacher": "bbbb"})
        with pytest.raises(
            InputsChanged,
            match=r'step 10 was trained on other inputs: data.sources: committed under "aaaa", now '
            r'"cccc"; put back',
        ):
            changed.restore(Engine())
    assert "REJECT" not in kinds(store)
    same = opened(store, tmp_path, 4)
    same.pin_inputs({"data.sources": "aaaa", "teacher": "bbbb"})
    assert same.restore(Engine()) is not None


def test_a_commit_that_says_nothing_of_its_inputs_is_taken(store: Store, tmp_path: Path) -> None:
    save(opened(store, tmp_path, 1), 10)
    later = opened(store, tmp_path, 2)
    later.pin_inputs({"data.sources": "cccc"})
    assert later.restore(Engine()) is not None
