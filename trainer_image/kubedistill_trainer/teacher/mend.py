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
    repairs = Repairs(stream, partition)
    repairs.refresh()
    slots = repairs.open()
    if not slots:
        return 0
    log = PartitionLog(stream, partition)
    log.refresh()
    scratch.mkdir(parents=True, exist_ok=True)
    for slot in slots:
        old = repairs.newest(log.shards[slot])
        record, path = old.model_copy(update={"nonce": uuid.uuid4().hex}), None
        if not _whole(stream, old, scratch):
            path = scratch / f"{uuid.uuid4().hex}.shard"
            record = _written_again(stream, manifest, old, path, produce)
        try:
            repairs.commit(slot, record)
        except SlotTaken:
            if path is not None:
                stream.delete([record.key])
        _log.warning(
            "shard repaired" if path else "shard found whole",
            extra={"shard": stream.uri_of(old.key), "by": stream.uri_of(record.key)},
        )
    return len(slots)


def _whole(stream: Store, record: LogRecord, scratch: Path) -> bool:
    """Whether a shard in the store is what was committed."""
    path = scratch / f"{uuid.uuid4().hex}.shard"
    try:
        with contextlib.suppress(NotFound):
            stream.download_file(record.key, path)
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == record.sha256
    finally:
        path.unlink(missing_ok=True)
    return False


def _written_again(
    stream: Store, manifest: Manifest, old: LogRecord, path: Path, produce: Produce
) -> LogRecord:
    """Upload the samples of `old` as a new shard; the record that commits it."""
    identity = manifest.identity
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
