"""Writers: dying, losing answers, and meeting another writer on the same partition."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from kubedistill_trainer.store.errors import StoreUnavailable
from kubedistill_trainer.teacher.errors import StreamCorrupt
from kubedistill_trainer.teacher.partition_log import PartitionLog
from kubedistill_trainer.teacher.shard import ShardReader
from kubedistill_trainer.teacher.stream_writer import StreamWriter, WriterSettings
from teacher_builders import MemoryStore, hash_of, manifest, once, outputs_of, tokens_of

LAYOUT = manifest(samples=12, partitions=2)
LARGE = WriterSettings(first_shard_bytes=1 << 30, shard_bytes=1 << 30, patience_seconds=0)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code under test handles it."""


def writer(
    store: MemoryStore, scratch: Path, partition: int = 0, settings: WriterSettings = LARGE
) -> StreamWriter:
    return StreamWriter(store, LAYOUT, partition, scratch=scratch, settings=settings)


def write(target: StreamWriter, *samples: int) -> None:
    for sample in samples:
        target.write(sample, tokens_of(sample), outputs_of(sample))


def committed_samples(store: MemoryStore, partition: int = 0) -> list[int]:
    """Samples that a reader would find, read back from the committed shards."""
    stream = store.child(LAYOUT.identity.address)
    log = PartitionLog(stream, partition)
    log.refresh()
    found = []
    for shard in log.shards:
        with ShardReader(stream.get(shard.key), name=shard.key) as reader:
            assert len(reader.samples) == shard.count
            for sample in reader.samples:
                assert reader.read(sample, hash_of(sample))
            found += reader.samples
    return found


def test_a_partition_is_written_in_order_and_ended(tmp_path: Path) -> None:
    store = MemoryStore()
    with writer(store, tmp_path, 1) as target:
        for sample in target.samples():
            write(target, sample)
            if sample == 5:
                target.commit()
        target.end()
        assert target.ended
        target.end()
    assert committed_samples(store, 1) == [1, 3, 5, 7, 9, 11]
    assert [json.loads(store.objects[k])["kind"] for k in store.keys("/log/")] == [
        "SHARD",
        "SHARD",
        "END",
    ]
    assert list(tmp_path.iterdir()) == []


def test_shards_start_small_and_double(tmp_path: Path) -> None:
    store = MemoryStore()
    with writer(store, tmp_path, settings=WriterSettings(first_shard_bytes=1)) as target:
        write(target, 0)
        assert target.committed() == 1
    size = len(store.objects[store.keys(".shard")[0]])
    settings = WriterSettings(first_shard_bytes=size // 3, shard_bytes=size * 2)
    with writer(store, tmp_path, settings=settings) as target:
        write(target, 2)
        assert target.committed() == 2
        write(target, 4)
        assert target.committed() == 2


def test_an_old_shard_is_committed_whatever_its_size(tmp_path: Path) -> None:
    now = [0.0]
    target = StreamWriter(
        MemoryStore(), LAYOUT, 0, scratch=tmp_path, settings=LARGE, clock=lambda: now[0]
    )
    write(target, 0)
    assert target.committed() == 0
    now[0] = 121.0
    write(target, 2)
    assert target.committed() == 2


def test_a_dead_writers_partition_is_taken_up_after_its_last_commit(tmp_path: Path) -> None:
    store = MemoryStore()
    first = writer(store, tmp_path / "a")
    write(first, 0, 2)
    first.commit()
    write(first, 4)  # dies with this one uncommitted
    second = writer(store, tmp_path / "b")
    assert second.committed() == 2
    assert second.next_sample == 4
    for sample in second.samples():
        write(second, sample)
    second.end()
    assert committed_samples(store) == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("operation", ["put shard", "head", "put log"])
def test_killed_at_every_store_call_of_a_commit(
    tmp_path: Path, operation: str, moment: str
) -> None:
    store = MemoryStore()
    target = writer(store, tmp_path)
    write(target, 0, 2)
    target.commit()
    write(target, 4, 6)
    _fail_at(store, operation, moment, Killed)
    with pytest.raises(Killed):
        target.commit()
    _mend(store)
    heir = writer(store, tmp_path / "heir")
    landed = operation == "put log" and moment == "after"
    assert heir.committed() == (4 if landed else 2)
    for sample in heir.samples():
        write(heir, sample)
    heir.end()
    assert committed_samples(store) == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("operation", ["put shard", "head", "put log"])
def test_a_lost_answer_gives_one_commit(tmp_path: Path, operation: str, moment: str) -> None:
    """The second attempt of a PUT that had landed gets 412 and recognises its own nonce."""
    store = MemoryStore()
    target = writer(store, tmp_path)
    write(target, 0, 2)
    _fail_at(store, operation, moment, lambda: StoreUnavailable("put", "k", "answer lost"))
    with pytest.raises(StoreUnavailable):
        target.commit()
    _mend(store)
    write(target, 4)
    target.commit()
    assert target.committed() == 3
    assert committed_samples(store) == [0, 2, 4]


def test_the_loser_of_a_slot_drops_its_shard_and_goes_on(tmp_path: Path) -> None:
    store = MemoryStore()
    winner, loser = writer(store, tmp_path / "w"), writer(store, tmp_path / "l")
    write(winner, 0, 2)
    write(loser, 0, 2, 4, 6)
    winner.commit()
    assert loser.commit() == 2
    assert loser.next_sample == 4
    assert len(store.keys(".shard")) == 1
    for sample in loser.samples():
        write(loser, sample)
    loser.end()
    assert committed_samples(store) == [0, 2, 4, 6, 8, 10]
    assert winner.next_sample == 4
    for sample in winner.samples():
        write(winner, sample)
    winner.end()
    assert committed_samples(store) == [0, 2, 4, 6, 8, 10]


def test_a_loser_that_thought_it_was_done_goes_back(tmp_path: Path) -> None:
    store = MemoryStore()
    winner, loser = writer(store, tmp_path / "w"), writer(store, tmp_path / "l")
    write(winner, 0)
    order = []
    for sample in loser.samples():
        order.append(sample)
        write(loser, sample)
        if sample == 10:
            winner.commit()
    loser.end()
    assert order == [0, 2, 4, 6, 8, 10, 2, 4, 6, 8, 10]
    assert committed_samples(store) == [0, 2, 4, 6, 8, 10]


def _patient(store: MemoryStore, scratch: Path, pause: Callable[[float], object]) -> StreamWriter:
    """Its clock stands still but for its pauses."""
    now = [0.0]

    def wait(seconds: float) -> None:
        now[0] += seconds
        pause(seconds)

    settings = WriterSettings(patience_seconds=5)
    return StreamWriter(
        store, LAYOUT, 0, scratch=scratch, settings=settings, clock=lambda: now[0], pause=wait
    )


def test_the_loser_of_a_slot_stands_by_until_the_partition_is_whole(tmp_path: Path) -> None:
    """What two jobs ask for at once is made once."""
    store = MemoryStore()
    winner, left = writer(store, tmp_path / "w"), iter((2, 4, 6, 8, 10))

    def the_other_goes_on(_: float) -> None:
        write(winner, next(left))
        winner.commit()

    loser = _patient(store, tmp_path / "l", the_other_goes_on)
    made = []
    write(winner, 0)
    for sample in loser.samples():
        made.append(sample)
        write(loser, sample)
        if sample == 0:
            winner.commit()
            loser.commit()
    loser.end()
    assert made == [0]
    assert committed_samples(store) == [0, 2, 4, 6, 8, 10]
    assert len(store.keys(".shard")) == 6


def test_the_loser_goes_on_where_the_other_died(tmp_path: Path) -> None:
    store, pauses = MemoryStore(), []
    winner = writer(store, tmp_path / "w")
    write(winner, 0, 2)

    def the_other_commits_once_more(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            write(winner, 4)
            winner.commit()

    loser = _patient(store, tmp_path / "l", the_other_commits_once_more)
    write(loser, 0)
    winner.commit()
    loser.commit()
    assert loser.next_sample == 6
    # Five seconds of patience from the other's last commit on.
    assert len(pauses) == 3 + 5
    for sample in loser.samples():
        write(loser, sample)
    loser.end()
    assert committed_samples(store) == [0, 2, 4, 6, 8, 10]


def test_wrong_samples_are_refused(tmp_path: Path) -> None:
    target = writer(MemoryStore(), tmp_path)
    with pytest.raises(ValueError, match="wants sample 0 next, got 2"):
        write(target, 2)
    with pytest.raises(ValueError, match="sequence_length is 8"):
        target.write(0, tokens_of(0)[1:], outputs_of(0))
    with pytest.raises(ValueError, match="cannot end: sample 0"):
        target.end()
    with pytest.raises(ValueError, match="partition 2"):
        writer(MemoryStore(), tmp_path, 2)


def test_a_damaged_log_record_is_no_commit(tmp_path: Path) -> None:
    store = MemoryStore()
    target = writer(store, tmp_path)
    write(target, 0)
    target.commit()
    (key,) = store.keys("/log/")
    store.objects[key] = store.objects[key].replace(b'"count":1', b'"count":2')
    with pytest.raises(StreamCorrupt, match="fails its own hash"):
        writer(store, tmp_path)
    store.objects[key] = b"{"
    with pytest.raises(StreamCorrupt, match="not a log record"):
        writer(store, tmp_path)


def test_the_byte_budget_is_asked_before_each_upload(tmp_path: Path) -> None:
    store, asked = MemoryStore(), []

    def hold(*facts: int) -> None:
        asked.append(facts)

    target = StreamWriter(store, LAYOUT, 0, scratch=tmp_path, settings=LARGE, before_upload=hold)
    for sample in (0, 2):
        write(target, sample)
        target.commit()
    sizes = [shard.size_bytes for shard in target._log.shards]
    assert asked == [(sizes[0], 0, 0), (sizes[1], sizes[0], 1)]


def _fail_at(
    store: MemoryStore, operation: str, moment: str, error: Callable[[], BaseException]
) -> None:
    def fail() -> None:
        raise error()

    shot = once(fail)

    def hook(called: str, key: str) -> None:
        name = called if called == "head" else f"{called} {'log' if '/log/' in key else 'shard'}"
        if name == operation:
            shot()

    setattr(store.hooks, moment, hook)


def _mend(store: MemoryStore) -> None:
    store.hooks.before = store.hooks.after = lambda operation, key: None
