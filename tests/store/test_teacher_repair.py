"""Faults in a teacher's stream in a real S3 server: seen before use, named, and repaired."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from kubedistill_trainer.store import Store
from kubedistill_trainer.store.errors import StoreError
from kubedistill_trainer.teacher.errors import (
    StreamCorrupt,
    StreamDamaged,
    StreamMismatch,
    StreamStalled,
)
from kubedistill_trainer.teacher.manifest import MANIFEST_KEY, Manifest, publish_manifest
from kubedistill_trainer.teacher.mend import mend
from kubedistill_trainer.teacher.partition_log import LogRecord, PartitionLog
from kubedistill_trainer.teacher.payload import TeacherOutputs
from kubedistill_trainer.teacher.reading import ReaderSettings
from kubedistill_trainer.teacher.repairs import Repairs
from kubedistill_trainer.teacher.stream_reader import StreamReader
from kubedistill_trainer.teacher.stream_writer import StreamWriter, WriterSettings
from s3_fixture import Faults, S3Server, s3  # noqa: F401  (s3 is a fixture)
from teacher_builders import assert_is_sample, hash_of, identity, manifest, outputs_of, tokens_of
from torch import Tensor

SAMPLES = 8
SETTINGS = WriterSettings(first_shard_bytes=2500, shard_bytes=2500, patience_seconds=0)
QUICK = ReaderSettings(poll_seconds=0.05, poll_limit_seconds=0.2, stall_seconds=30)
DAMAGES = ["flip", "truncate", "delete"]


@pytest.fixture
def store(s3: S3Server) -> Store:  # noqa: F811
    return s3.store()


def made(sample: int) -> tuple[Tensor, TeacherOutputs]:
    return tokens_of(sample), outputs_of(sample)


def write(store: Store, scratch: Path, *, end: bool = True) -> Manifest:
    layout = publish_manifest(store, manifest(samples=SAMPLES, partitions=1))
    with StreamWriter(store, layout, 0, scratch=scratch, settings=SETTINGS) as writer:
        for sample in writer.samples():
            writer.write(sample, *made(sample))
        if end:
            writer.end()
    return layout


def first_shard(store: Store) -> LogRecord:
    """The newest version of the first shard."""
    stream = store.child(identity().address)
    log, repairs = PartitionLog(stream, 0), Repairs(stream, 0)
    log.refresh()
    repairs.refresh()
    return repairs.newest(log.shards[0])


def damage(store: Store, how: str) -> str:
    """Damage the newest version of the first shard; its address."""
    stream, key = store.child(identity().address), first_shard(store).key
    data = stream.get(key)
    if how == "delete":
        stream.delete([key])
    else:
        flipped = data[:200] + bytes([data[200] ^ 1]) + data[201:]
        stream.put(key, flipped if how == "flip" else data[:-9])
    return stream.uri_of(key)


def reader(store: Store, cache: Path, settings: ReaderSettings = QUICK) -> StreamReader:
    return StreamReader(store, identity(), cache=cache, settings=settings)


def assert_reads(store: Store, cache: Path) -> None:
    with reader(store, cache) as source:
        for sample in range(SAMPLES):
            assert_is_sample(source.get(sample, hash_of(sample)), sample)


def repair(store: Store, layout: Manifest, scratch: Path) -> int:
    return mend(store, layout, 0, scratch=scratch, produce=made)


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_is_named_repaired_and_may_come_again(
    store: Store, tmp_path: Path, how: str
) -> None:
    layout = write(store, tmp_path / "w")
    assert repair(store, layout, tmp_path / "w") == 0
    for again in range(2):
        where = damage(store, how)
        words = "the shard is missing" if how == "delete" else "bytes with SHA-256"
        with reader(store, tmp_path / f"c{again}") as source:
            with pytest.raises(StreamDamaged, match=words) as error:
                source.get(0, hash_of(0))
            assert error.value.uri == where
            assert_is_sample(source.get(SAMPLES - 1, hash_of(SAMPLES - 1)), SAMPLES - 1)
        assert repair(store, layout, tmp_path / "w") == 1
        assert first_shard(store).version == again + 1
        assert_reads(store, tmp_path / f"c{again}")
    assert repair(store, layout, tmp_path / "w") == 0


def test_missing_and_short_shards_are_found_by_a_listing(store: Store, tmp_path: Path) -> None:
    layout = write(store, tmp_path / "w")
    stream = store.child(identity().address)
    log, repairs = PartitionLog(stream, 0), Repairs(stream, 0)
    log.refresh()
    repairs.ask_for_missing(log)
    assert repairs.open() == []
    stream.delete([log.shards[0].key])
    stream.put(log.shards[1].key, b"short")
    repairs.ask_for_missing(log)
    assert repairs.open() == [0, 1]
    assert repair(store, layout, tmp_path / "w") == 2
    repairs.refresh()
    repairs.ask_for_missing(log)
    assert repairs.open() == []
    assert_reads(store, tmp_path / "c")


def test_of_two_readers_the_second_waits_for_the_repair(store: Store, tmp_path: Path) -> None:
    layout = write(store, tmp_path / "w")
    damage(store, "flip")
    with reader(store, tmp_path / "a") as first, pytest.raises(StreamDamaged):
        first.get(0, hash_of(0))
    with ThreadPoolExecutor(1) as pool, reader(store, tmp_path / "b") as second:
        waiting = pool.submit(second.get, 0, hash_of(0))
        while second._repairs.get(0) is None:  # it has seen the damage, or is about to
            time.sleep(0.01)
        assert repair(store, layout, tmp_path / "w") == 1
        assert_is_sample(waiting.result(), 0)


def test_all_threads_of_a_reader_end_when_one_has_asked(store: Store, tmp_path: Path) -> None:
    write(store, tmp_path / "w")
    damage(store, "delete")
    endless = replace(QUICK, stall_seconds=1e6)
    with reader(store, tmp_path / "a", endless) as source:
        source.prefetch([(0, hash_of(0))])
        for _ in range(3):
            with pytest.raises(StreamDamaged):
                source.get(0, hash_of(0))


def test_a_repair_that_nobody_makes_is_not_waited_for_for_ever(
    store: Store, tmp_path: Path
) -> None:
    write(store, tmp_path / "w", end=False)  # a teacher may be at work on it, and is not
    damage(store, "flip")
    settings = replace(QUICK, stall_seconds=1)
    with reader(store, tmp_path / "a", settings) as source, pytest.raises(StreamDamaged):
        source.get(0, hash_of(0))


def test_two_teachers_repair_at_once(store: Store, tmp_path: Path) -> None:
    layout = write(store, tmp_path / "w")
    damage(store, "delete")
    with reader(store, tmp_path / "a") as source, pytest.raises(StreamDamaged):
        source.get(0, hash_of(0))
    together = threading.Barrier(2)

    def slowly(sample: int) -> tuple[Tensor, TeacherOutputs]:
        if sample == 0:
            together.wait(20)
        return made(sample)

    def teach(name: str) -> int:
        return mend(store, layout, 0, scratch=tmp_path / name, produce=slowly)

    with ThreadPoolExecutor(2) as teachers:
        assert list(teachers.map(teach, "xy")) == [1, 1]
    assert_reads(store, tmp_path / "b")
    stream = store.child(identity().address)
    log = PartitionLog(stream, 0)
    log.refresh()
    wanted = {first_shard(store).key, *(shard.key for shard in log.shards[1:])}
    assert {info.key for info in stream.list("partitions/0/shards/")} == wanted


def test_a_request_without_damage_is_answered_with_the_same_shard(
    store: Store, tmp_path: Path
) -> None:
    layout = write(store, tmp_path / "w")
    shard = first_shard(store)
    assert Repairs(store.child(identity().address), 0).ask(shard, "a flip on the way")
    assert repair(store, layout, tmp_path / "w") == 1
    found = first_shard(store)
    assert (found.version, found.key) == (1, shard.key)
    assert_reads(store, tmp_path / "c")


@pytest.mark.parametrize("applied", [True, False])
def test_a_repair_that_dies_at_any_request_is_done_by_the_next(
    s3: S3Server,  # noqa: F811
    tmp_path: Path,
    applied: bool,
) -> None:
    number, died = 0, True
    while died:
        store = s3.store()
        layout = write(store, tmp_path / f"w{number}")
        damage(store, "truncate")
        Repairs(store.child(identity().address), 0).ask(first_shard(store), "cut")
        dying = Store(store.uri, endpoint=s3.endpoint, limits=replace(s3.limits, attempts=1))
        Faults(dying).die_at(number, applied=applied)
        try:
            repair(dying, layout, tmp_path / "d")
            died = False
        except StoreError:
            repair(store, layout, tmp_path / "d")
        assert_reads(store, tmp_path / f"c{number}")
        number += 1
    assert number > 5


@pytest.mark.parametrize("applied", [True, False])
def test_a_writer_that_dies_at_any_request_is_taken_up(
    s3: S3Server,  # noqa: F811
    tmp_path: Path,
    applied: bool,
) -> None:
    number, died = 0, True
    while died:
        store = s3.store()
        dying = Store(store.uri, endpoint=s3.endpoint, limits=replace(s3.limits, attempts=1))
        Faults(dying).die_at(number, applied=applied)
        try:
            write(dying, tmp_path / "d")
            died = False
        except StoreError:
            write(store, tmp_path / "d")
        assert_reads(store, tmp_path / f"c{number}")
        number += 3
    assert number > 10


def _write_and_die(uri: str, endpoint: str, scratch: Path) -> None:
    store = Store(uri, endpoint=endpoint)
    layout = publish_manifest(store, manifest(samples=SAMPLES, partitions=1))
    writer = StreamWriter(store, layout, 0, scratch=scratch, settings=SETTINGS)
    for sample in writer.samples():
        writer.write(sample, *made(sample))
        if writer.committed() and writer.committed() <= sample:
            os.kill(os.getpid(), signal.SIGKILL)  # with a shard that has begun


def test_a_writer_killed_within_a_shard_is_taken_up(store: Store, tmp_path: Path) -> None:
    arguments = (store.uri, store.endpoint, tmp_path / "w")
    process = multiprocessing.get_context("spawn").Process(target=_write_and_die, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    committed = first_shard(store)
    write(store, tmp_path / "w")
    assert first_shard(store) == committed
    assert_reads(store, tmp_path / "c")


def test_a_manifest_of_something_else_or_of_nothing(store: Store, tmp_path: Path) -> None:
    write(store, tmp_path / "w")
    stream = store.child(identity().address)
    good = stream.get(MANIFEST_KEY)
    stream.put(MANIFEST_KEY, good.replace(b'"seed":7', b'"seed":8'))
    with pytest.raises(StreamMismatch, match="its seed is 8, this job needs 7"):
        reader(store, tmp_path / "c")
    stream.put(MANIFEST_KEY, b"garbage")
    with pytest.raises(StreamCorrupt, match=r"s3://.*manifest\.json: not a manifest"):
        reader(store, tmp_path / "c")


class SlowWay:
    """A gateway before the store; while it is slow, what the store says comes byte by byte."""

    def __init__(self, endpoint: str) -> None:
        at = urlsplit(endpoint)
        self._store = (at.hostname or "", at.port or 80)
        self._server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self.slow = False
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._server.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                store = socket.create_connection(self._store)
                for source, target, answers in ((client, store, False), (store, client, True)):
                    pump = threading.Thread(target=self._pump, args=(source, target, answers))
                    pump.daemon = True
                    pump.start()

    def _pump(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 if self.slow and answers else 65536):
                if self.slow and answers:
                    time.sleep(0.02)
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def slow_way(s3: S3Server) -> Iterator[SlowWay]:  # noqa: F811
    way = SlowWay(s3.endpoint)
    yield way
    way.close()


def test_a_store_that_drips_is_given_up_with_its_shard_named_and_recovers(
    s3: S3Server,  # noqa: F811
    slow_way: SlowWay,
    tmp_path: Path,
) -> None:
    limits = replace(
        s3.limits, attempts=1, deadline_floor_seconds=1.0, slowest_bytes_per_second=1e9
    )
    store = Store(s3.store().uri, endpoint=slow_way.endpoint, limits=limits)
    write(store, tmp_path / "w")
    settings = replace(QUICK, stall_seconds=2)
    with reader(store, tmp_path / "c", settings) as source:
        source.refresh()
        slow_way.slow = True
        with pytest.raises(StreamStalled, match=r"not done after|deadline|did not answer"):
            source.get(0, hash_of(0))
        slow_way.slow = False
        assert_is_sample(source.get(0, hash_of(0)), 0)
