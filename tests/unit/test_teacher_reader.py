"""Readers: early, ahead, in any order, and never with damaged data."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest
import torch
from kubedistill_trainer.store.errors import StoreUnavailable
from kubedistill_trainer.teacher.errors import (
    SampleMissing,
    StreamClosed,
    StreamDamaged,
    StreamMismatch,
    StreamStalled,
)
from kubedistill_trainer.teacher.metrics import DATA_WAIT, STREAM_LAG
from kubedistill_trainer.teacher.reading import ReaderSettings
from kubedistill_trainer.teacher.stream_reader import StreamReader
from teacher_builders import (
    LENGTH,
    MemoryStore,
    assert_is_sample,
    hash_of,
    identity,
    write_stream,
)

SAMPLES = 12
QUICK = ReaderSettings(stall_seconds=60, poll_seconds=0.01, poll_limit_seconds=0.02)
IMPATIENT = ReaderSettings(stall_seconds=0.3, poll_seconds=0.01, poll_limit_seconds=0.02)


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    full = MemoryStore()
    write_stream(full, tmp_path / "scratch")
    return full


def reader(store: MemoryStore, tmp_path: Path, settings: ReaderSettings = QUICK) -> StreamReader:
    return StreamReader(store, identity(), cache=tmp_path / "cache", settings=settings)


def pairs(samples: list[int]) -> list[tuple[int, int]]:
    return [(sample, hash_of(sample)) for sample in samples]


@pytest.mark.parametrize("foreseen", [True, False])
def test_reads_several_epochs_in_any_order(
    store: MemoryStore, tmp_path: Path, foreseen: bool
) -> None:
    order = [s for seed in range(3) for s in random.Random(seed).sample(range(SAMPLES), SAMPLES)]
    with reader(store, tmp_path) as source:
        if foreseen:
            source.prefetch(pairs(order))
        for sample in order:
            assert_is_sample(source.get(sample, hash_of(sample)), sample)
    downloads = [key for operation, key in store.calls if operation == "download"]
    assert len(downloads) == len(set(downloads)) == len(store.keys(".shard"))


def test_an_order_that_is_not_followed_is_no_trouble(store: MemoryStore, tmp_path: Path) -> None:
    with reader(store, tmp_path) as source:
        source.prefetch(pairs(list(range(SAMPLES))))
        for sample in reversed(range(SAMPLES)):
            assert_is_sample(source.get(sample, hash_of(sample)), sample)
        source.prefetch(pairs([1, 1, 1]))
        for _ in range(3):
            assert_is_sample(source.get(1, hash_of(1)), 1)


def test_hidden_states_come_in_the_dtype_asked_for(store: MemoryStore, tmp_path: Path) -> None:
    with reader(store, tmp_path, ReaderSettings(dtype=torch.bfloat16)) as source:
        hidden = source.get(0, hash_of(0)).hidden
        assert hidden is not None
        assert hidden.states.dtype == torch.bfloat16


def test_starts_before_the_writer_and_counts_the_wait(tmp_path: Path) -> None:
    store = MemoryStore()
    before = DATA_WAIT._value.get()

    def later() -> None:
        time.sleep(0.3)
        write_stream(store, tmp_path / "scratch")

    writing = threading.Thread(target=later)
    writing.start()
    with reader(store, tmp_path, ReaderSettings(poll_seconds=0.01)) as source:
        source.prefetch(pairs(list(range(SAMPLES))))
        for sample in range(SAMPLES):
            assert_is_sample(source.get(sample, hash_of(sample)), sample)
        assert source.wait_seconds >= 0.25
        assert DATA_WAIT._value.get() - before == pytest.approx(source.wait_seconds)
        writing.join()
        progress = source.refresh()
        assert (progress.samples, progress.tokens) == (SAMPLES, SAMPLES * LENGTH)
        assert progress.size_bytes == sum(len(store.objects[k]) for k in store.keys(".shard"))
        assert progress.ended
        assert STREAM_LAG._value.get() == 0


def test_lag_is_what_is_committed_and_not_read(store: MemoryStore, tmp_path: Path) -> None:
    with reader(store, tmp_path) as source:
        source.refresh()
        assert STREAM_LAG._value.get() == SAMPLES * LENGTH
        for _ in range(2):
            source.get(3, hash_of(3))
        assert STREAM_LAG._value.get() == (SAMPLES - 1) * LENGTH


def test_a_stalled_partition_is_named_with_its_last_commit(tmp_path: Path) -> None:
    store = MemoryStore()
    write_stream(store, tmp_path / "scratch", upto=6)
    with reader(store, tmp_path, IMPATIENT) as source:
        assert_is_sample(source.get(5, hash_of(5)), 5)
        with pytest.raises(StreamStalled, match=r"partition 1 committed 3 samples.*\.shard"):
            source.get(7, hash_of(7))
        assert not source.progress().ended


def test_without_any_writer_the_reader_gives_up(tmp_path: Path) -> None:
    with pytest.raises(StreamStalled, match="no writer has published a manifest"):
        reader(MemoryStore(), tmp_path, IMPATIENT)


def test_a_store_that_is_away_for_a_while_is_waited_for(store: MemoryStore, tmp_path: Path) -> None:
    failures = iter(range(6))

    def before(operation: str, key: str) -> None:
        if next(failures, None) is not None:
            raise StoreUnavailable(operation, key, "503")

    with reader(store, tmp_path) as source:
        store.hooks.before = before
        assert_is_sample(source.get(2, hash_of(2)), 2)


def test_a_store_that_stays_away_is_the_cause_that_is_told(
    store: MemoryStore, tmp_path: Path
) -> None:
    def before(operation: str, key: str) -> None:
        raise StoreUnavailable(operation, key, "503")

    with reader(store, tmp_path, IMPATIENT) as source:
        store.hooks.before = before
        with pytest.raises(StreamStalled, match="503"):
            source.get(2, hash_of(2))


def test_samples_outside_the_stream(store: MemoryStore, tmp_path: Path) -> None:
    with reader(store, tmp_path) as source, pytest.raises(SampleMissing, match="sample 12"):
        source.get(12, 0)


def test_another_identity_or_other_tokens_are_refused(store: MemoryStore, tmp_path: Path) -> None:
    key = f"{identity().address}/manifest.json"
    with reader(store, tmp_path) as source:
        with pytest.raises(StreamMismatch, match="token hash of sample 3"):
            source.get(3, 99)
        source.prefetch([(3, 99)])
        assert_is_sample(source.get(3, hash_of(3)), 3)
    store.objects[key] = store.objects[key].replace(b'"seed":7', b'"seed":8')
    with pytest.raises(StreamMismatch, match="seed is 8, this job needs 7"):
        reader(store, tmp_path)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "swap"])
def test_a_damaged_shard_is_detected_and_named(
    store: MemoryStore, tmp_path: Path, damage: str
) -> None:
    keys = store.keys("partitions/0/shards/")
    for key in keys:
        data = store.objects[key]
        if damage == "flip":
            store.objects[key] = data[:400] + bytes([data[400] ^ 4]) + data[401:]
        elif damage == "truncate":
            store.objects[key] = data[:-1]
        elif damage == "swap":
            store.objects[key] = store.objects[store.keys("partitions/1/shards/")[0]]
        else:
            del store.objects[key]
    words = "the shard is missing" if damage == "delete" else "bytes with SHA-256"
    with reader(store, tmp_path) as source:
        with pytest.raises(StreamDamaged, match=rf"partitions/0/shards/.*{words}"):
            source.get(0, hash_of(0))
        assert_is_sample(source.get(1, hash_of(1)), 1)


def test_one_damaged_download_is_repeated(store: MemoryStore, tmp_path: Path) -> None:
    bad = iter([b"short"])
    store.hooks.altered = lambda key, data: next(bad, data) if key.endswith(".shard") else data
    with reader(store, tmp_path) as source:
        assert_is_sample(source.get(0, hash_of(0)), 0)


def test_a_flip_on_the_local_disk_sends_the_reader_back_to_the_store(
    store: MemoryStore, tmp_path: Path
) -> None:
    with reader(store, tmp_path) as source:
        source.get(0, hash_of(0))
        for path in (tmp_path / "cache").glob("*.shard"):
            data = bytearray(path.read_bytes())
            data[len(data) // 3] ^= 1
            path.write_bytes(data)
        for reading, _ in source._cache._open.values():
            reading._kept.clear()
        assert_is_sample(source.get(0, hash_of(0)), 0)


def test_a_restart_reuses_the_local_shards_after_verifying_them(
    store: MemoryStore, tmp_path: Path
) -> None:
    for _ in range(2):
        with reader(store, tmp_path) as source:
            for sample in range(SAMPLES):
                source.get(sample, hash_of(sample))
    assert sum(operation == "download" for operation, _ in store.calls) == len(store.keys(".shard"))


def test_the_cache_stays_within_its_bytes(store: MemoryStore, tmp_path: Path) -> None:
    largest = max(len(store.objects[key]) for key in store.keys(".shard"))
    settings = ReaderSettings(cache_bytes=largest, ahead_samples=2)
    with reader(store, tmp_path, settings) as source:
        for sample in range(SAMPLES):
            assert_is_sample(source.get(sample, hash_of(sample)), sample)
            held = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.shard"))
            assert held <= largest


def test_close_wakes_a_reader_that_waits(tmp_path: Path) -> None:
    store = MemoryStore()
    write_stream(store, tmp_path / "scratch", upto=2)
    source = reader(store, tmp_path, ReaderSettings(poll_seconds=5))
    source.prefetch(pairs([4]))
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            source.get(6, hash_of(6))
        except StreamClosed as error:
            errors.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.1)
    source.close()
    asking.join(timeout=5)
    assert len(errors) == 1
