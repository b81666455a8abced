"""Teacher streams through a real S3 server: two writers at once, a reader that was there first."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from kubedistill_trainer.store import Store
from kubedistill_trainer.teacher import stream_writer
from kubedistill_trainer.teacher.head import load_head, publish_head
from kubedistill_trainer.teacher.manifest import Manifest, publish_manifest
from kubedistill_trainer.teacher.partition_log import PartitionLog
from kubedistill_trainer.teacher.reading import ReaderSettings
from kubedistill_trainer.teacher.stream_reader import StreamReader
from kubedistill_trainer.teacher.stream_writer import StreamWriter, WriterSettings
from s3_fixture import S3Server, s3  # noqa: F401  (s3 is a fixture)
from teacher_builders import (
    HIDDEN,
    VOCABULARY,
    assert_is_sample,
    hash_of,
    identity,
    manifest,
    outputs_of,
    tokens_of,
)

SAMPLES = 16
SETTINGS = WriterSettings(first_shard_bytes=2500, shard_bytes=2500, patience_seconds=2)
QUICK = ReaderSettings(poll_seconds=0.05, poll_limit_seconds=0.2, stall_seconds=30)


@pytest.fixture
def store(s3: S3Server) -> Store:  # noqa: F811
    return s3.store()


def write_partition(store: Store, layout: Manifest, partition: int, scratch: Path) -> None:
    with StreamWriter(store, layout, partition, scratch=scratch, settings=SETTINGS) as writer:
        for sample in writer.samples():
            writer.write(sample, tokens_of(sample), outputs_of(sample))
        writer.end()


def test_a_student_reads_while_two_teachers_write(store: Store, tmp_path: Path) -> None:
    wanted = manifest(samples=SAMPLES, partitions=2)
    order = [s for seed in (0, 1) for s in random.Random(seed).sample(range(SAMPLES), SAMPLES)]

    def teach(partition: int) -> None:
        write_partition(store, publish_manifest(store, wanted), partition, tmp_path / "w")

    with ThreadPoolExecutor(2) as teachers:
        starting = threading.Timer(0.3, lambda: [teachers.submit(teach, p) for p in (0, 1)])
        starting.start()
        with StreamReader(store, identity(), cache=tmp_path / "c", settings=QUICK) as source:
            source.prefetch((sample, hash_of(sample)) for sample in order)
            for sample in order:
                assert_is_sample(source.get(sample, hash_of(sample)), sample)
            assert source.wait_seconds > 0.2
        starting.join()
    with StreamReader(store, identity(), cache=tmp_path / "d", settings=QUICK) as late:
        assert late.refresh().ended
        assert late.progress().samples == SAMPLES


def test_two_writers_on_one_partition_leave_one_history(store: Store, tmp_path: Path) -> None:
    layout = publish_manifest(store, manifest(samples=SAMPLES, partitions=1))

    with ThreadPoolExecutor(2) as teachers:
        list(teachers.map(lambda name: write_partition(store, layout, 0, tmp_path / name), "ab"))
    stream = store.child(identity().address)
    log = PartitionLog(stream, 0)
    log.refresh()
    assert log.ended
    assert sum(shard.count for shard in log.shards) == SAMPLES
    assert [shard.first_sample for shard in log.shards] == [
        sum(earlier.count for earlier in log.shards[:n]) for n in range(len(log.shards))
    ]
    assert {info.key for info in stream.list("partitions/0/shards/")} == {
        shard.key for shard in log.shards
    }
    with StreamReader(store, identity(), cache=tmp_path / "c", settings=QUICK) as source:
        for sample in range(SAMPLES):
            assert_is_sample(source.get(sample, hash_of(sample)), sample)


def test_a_writer_that_ends_aborts_what_dead_ones_left_of_its_partition(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of a shard or of the LM head are in no listing, and cost as long as they are there."""
    layout = publish_manifest(store, manifest(samples=SAMPLES, partitions=2))
    stream = store.child(identity().address)
    client = store._connection.client
    for key in ("partitions/0/shards/a", "partitions/1/shards/b", "head/c.safetensors"):
        client.create_multipart_upload(Bucket=stream.bucket, Key=f"{stream.prefix}/{key}")
    time.sleep(1.1)  # the server's clock counts seconds
    write_partition(store, layout, 0, tmp_path)
    assert len(stream.uploads()) == 3, "they may be of writers that live"
    monkeypatch.setattr(stream_writer, "_DEAD_SHARD_SECONDS", 0.0)
    write_partition(store, layout, 0, tmp_path)
    assert {u.key for u in stream.uploads()} == {"partitions/1/shards/b", "head/c.safetensors"}
    monkeypatch.setattr(stream_writer, "_DEAD_HEAD_SECONDS", 0.0)
    write_partition(store, layout, 0, tmp_path)
    assert [u.key for u in stream.uploads()] == ["partitions/1/shards/b"]


def test_the_head_travels_with_the_stream(store: Store, tmp_path: Path) -> None:
    weight = torch.randn(VOCABULARY, HIDDEN)
    digest = publish_head(store, identity(), weight, tmp_path)
    layout = publish_manifest(store, manifest().model_copy(update={"head_sha256": digest}))
    assert torch.equal(load_head(store, layout, tmp_path / "c"), weight)
