"""A byte budget over a real S3 server: it holds a teacher back, and nobody waits for ever."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from kubedistill_trainer.store import Store
from kubedistill_trainer.teacher.budget import Budget, Cursor, CursorKeeper
from kubedistill_trainer.teacher.manifest import Manifest, publish_manifest
from kubedistill_trainer.teacher.partition_log import PartitionLog
from kubedistill_trainer.teacher.reading import ReaderSettings
from kubedistill_trainer.teacher.stream_reader import StreamReader
from kubedistill_trainer.teacher.stream_writer import StreamWriter, WriterSettings
from s3_fixture import S3Server, s3  # noqa: F401  (s3 is a fixture)
from teacher_builders import assert_is_sample, hash_of, identity, manifest, outputs_of, tokens_of

SAMPLES = 24
SHARD_BYTES = 2500
SETTINGS = WriterSettings(first_shard_bytes=SHARD_BYTES, shard_bytes=SHARD_BYTES)
QUICK = ReaderSettings(poll_seconds=0.05, poll_limit_seconds=0.2, stall_seconds=60)


@pytest.fixture
def store(s3: S3Server) -> Store:  # noqa: F811
    return s3.store()


class Teacher:
    """One process that writes all partitions, one after the other, under a budget."""

    def __init__(self, store: Store, scratch: Path, partitions: int, **budget: Any) -> None:
        self._store, self._scratch = store, scratch
        self._layout: Manifest = publish_manifest(
            store, manifest(samples=SAMPLES, partitions=partitions)
        )
        self._budget = {"share_bytes": 2.5 * SHARD_BYTES, "dead_after_seconds": 60.0} | budget
        self.stop, self.held = threading.Event(), threading.Event()
        self._pool = ThreadPoolExecutor(1)

    def start(self) -> Future[None]:
        return self._pool.submit(self._write)

    def _pause(self, seconds: float) -> None:
        if self.stop.wait(0.02):
            raise KeyboardInterrupt

    def _tell(self, held: bool) -> None:
        (self.held.set if held else self.held.clear)()

    def _write(self) -> None:
        everything = range(self._layout.partitions)
        for partition in everything:
            budget = Budget(
                self._store.child(identity().address), partition, mine=everything,
                pause=self._pause, tell=self._tell, **self._budget,
            )  # fmt: skip
            with StreamWriter(
                self._store, self._layout, partition, scratch=self._scratch,
                settings=SETTINGS, before_upload=budget.hold,
            ) as writer:  # fmt: skip
                for sample in writer.samples():
                    writer.write(sample, tokens_of(sample), outputs_of(sample))
                writer.end()

    def committed(self, partition: int = 0) -> int:
        log = PartitionLog(self._store.child(identity().address), partition)
        log.refresh()
        return log.committed


def read(store: Store, cache: Path, order: list[int], consumer: str = "job/0") -> None:
    with StreamReader(store, identity(), cache=cache, consumer=consumer, settings=QUICK) as source:
        source.prefetch((sample, hash_of(sample)) for sample in order)
        for sample in order:
            assert_is_sample(source.get(sample, hash_of(sample)), sample)


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def put_cursor(store: Store, name: str, beat: int, **fields: Any) -> None:
    cursor = Cursor(beat=beat, **{"read": {}, **fields})
    store.child(identity().address).put(f"cursors/{name}.json", cursor.model_dump_json().encode())


def test_a_teacher_without_students_writes_its_budget_and_waits(
    store: Store, tmp_path: Path
) -> None:
    teacher = Teacher(store, tmp_path / "w", 1)
    writing = teacher.start()
    assert teacher.held.wait(60)
    committed = teacher.committed()
    assert 0 < committed < SAMPLES
    time.sleep(0.5)
    assert teacher.committed() == committed
    read(store, tmp_path / "c", list(range(SAMPLES)))  # as it reads, the teacher goes on
    writing.result(60)
    assert teacher.committed() == SAMPLES
    assert not teacher.held.is_set()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("partitions", [1, 3])
def test_students_in_any_order_never_wait_for_ever(
    store: Store, tmp_path: Path, seed: int, partitions: int
) -> None:
    """Two jobs, one of two ranks, against a budget less than a shard."""
    teacher = Teacher(store, tmp_path / "w", partitions, share_bytes=1.0)
    order = random.Random(seed).sample(range(SAMPLES), SAMPLES)
    other = random.Random(seed + 9).sample(range(SAMPLES), SAMPLES)
    with ThreadPoolExecutor(3) as students:
        writing = teacher.start()
        readings = [
            students.submit(read, store, tmp_path / name, part, consumer)
            for name, part, consumer in (
                ("a", order[::2], "one/0"), ("b", order[1::2], "one/1"), ("c", other, "two/0"),
            )
        ]  # fmt: skip
        for reading in readings:
            reading.result(90)
    teacher.stop.set()
    if writing.exception(60) is None:
        assert teacher.committed() == teacher._layout.samples_of(0)


def test_a_dead_student_neither_drives_nor_holds_the_teacher(store: Store, tmp_path: Path) -> None:
    put_cursor(store, "dead/0", 5, waits=[0])
    teacher = Teacher(store, tmp_path / "w", 1, dead_after_seconds=0.0)
    writing = teacher.start()
    assert teacher.held.wait(60)
    put_cursor(store, "live/0", 1, read={0: teacher.committed()})
    eventually(lambda: teacher.committed() > 8)
    put_cursor(store, "live/0", 2, read={0: SAMPLES})
    writing.result(60)


def test_a_student_that_waits_is_served_while_it_is_alive(store: Store, tmp_path: Path) -> None:
    put_cursor(store, "live/0", 1, waits=[0])
    teacher = Teacher(store, tmp_path / "w", 1)
    teacher.start().result(60)
    assert teacher.committed() == SAMPLES


def test_what_an_earlier_attempt_read_still_counts(store: Store) -> None:
    stream = store.child(identity().address)

    def cursor() -> Cursor | None:
        found = list(stream.list("cursors/"))
        return Cursor.model_validate_json(stream.get(found[0].key)) if found else None

    def says(**wanted: Any) -> Callable[[], bool]:
        def check() -> bool:
            found = cursor()
            return found is not None and all(getattr(found, k) == v for k, v in wanted.items())

        return check

    first = CursorKeeper(stream, "job/0", interval_seconds=0.05)
    for _ in range(3):
        first.count(1)
    with first.waiting(2):
        eventually(says(read={1: 3}, waits=frozenset({2})))
    eventually(says(waits=frozenset()))
    first.close()
    beat = cursor()
    second = CursorKeeper(stream, "job/0", interval_seconds=0.05)
    second.count(1)
    second.count(4)
    eventually(says(read={1: 3, 4: 1}))
    second.close()
    after = cursor()
    assert beat is not None
    assert after is not None
    assert after.beat > beat.beat
