"""A teacher writes shards again that somebody found damaged; see `repairs.py`."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from kubedistill_trainer.store.client import Store
from kubedistill_trainer.store.errors import NotFound
from kubedistill_trainer.teacher.codec import encode_outputs, token_hash
from kubedistill_trainer.teacher.manifest import Manifest
from kubedistill_trainer.teacher.partition_log import LogRecord, PartitionLog, SlotTaken
from kubedistill_trainer.teacher.payload import TeacherOutputs
from kubedistill_trainer.teacher.repairs import Repairs
from kubedistill_trainer.teacher.shard import ShardWriter
from kubedistill_trainer.teacher.stream_writer import shard_record, upload_shard

_log = logging.getLogger(__name__)

Produce = Callable[[int], tuple[Tensor | Sequence[int], TeacherOutputs]]
"""From a sample id to its tokens [L] and the teacher's outputs."""


def mend(
    store: Store, manifest: Manifest, partition: int, *, scratch: Path, produce: Produce
) -> int:
    """Write again every shard of a partition that somebody found damaged; how many there were.

    `store` is rooted at the storage URI. A shard that proves whole is confirmed as it is: then the
    damage was on the reader's way.
    """
    stream = store.child(manifest.identity.address)

    def again(old: LogRecord) -> LogRecord:
        return _written_again(stream, manifest, old, scratch, produce)

    return mend_shards(stream, partition, lambda old: _whole(stream, old, scratch), again)


def mend_shards(
    stream: Store,
    partition: int,
    whole: Callable[[LogRecord], bool],
    again: Callable[[LogRecord], LogRecord],
) -> int:
    """Answer every open request for a shard of a partition; how many there were.

    `stream` is rooted at the stream. `whole`: is a shard what was committed; `again` uploads what
    stands in for it, and gives the record that commits it.
    """
    repairs = Repairs(stream, partition)
    repairs.refresh()
    slots = repairs.open()
    if not slots:
        return 0
    log = PartitionLog(stream, partition)
    log.refresh()
    for slot in slots:
        old = repairs.newest(log.shards[slot])
        kept = whole(old)
        record = old.model_copy(update={"nonce": uuid.uuid4().hex}) if kept else again(old)
        try:
            repairs.commit(slot, record)
        except SlotTaken:
            if not kept:
                stream.delete([record.key])
        _log.warning(
            "shard found whole" if kept else "shard written again",
            extra={"shard": stream.uri_of(old.key), "by": stream.uri_of(record.key)},
        )
    return len(slots)


def _whole(stream: Store, record: LogRecord, scratch: Path) -> bool:
    """Whether a shard in the store is what was committed."""
    path = _path(scratch)
    try:
        with contextlib.suppress(NotFound):
            stream.download_file(record.key, path)
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == record.sha256
    finally:
        path.unlink(missing_ok=True)
    return False


def _written_again(
    stream: Store, manifest: Manifest, old: LogRecord, scratch: Path, produce: Produce
) -> LogRecord:
    """Upload the samples of `old` as a new shard; the record that commits it."""
    identity, path = manifest.identity, _path(scratch)
    try:
        shard = ShardWriter(identity.digest(), path)
        for sample in range(old.first_sample, old.last_sample + 1, manifest.partitions):
            tokens, outputs = produce(sample)
            encoded = encode_outputs(outputs, identity.payloads, identity.teacher_vocab_size)
            shard.add(sample, token_hash(tokens), encoded)
        record = shard_record(shard.finish(), manifest, old.partition, path)
        upload_shard(stream, record, path)
    finally:
        path.unlink(missing_ok=True)
    return record


def _path(scratch: Path) -> Path:
    scratch.mkdir(parents=True, exist_ok=True)
    return scratch / f"{uuid.uuid4().hex}.shard"
