"""Whether all of a stream is there, so that no teacher is needed."""

from __future__ import annotations

from kubedistill_trainer.store.client import Store
from kubedistill_trainer.teacher.manifest import StreamIdentity, read_manifest
from kubedistill_trainer.teacher.partition_log import PartitionLog
from kubedistill_trainer.teacher.repairs import Repairs, head_is_sound


def is_whole(store: Store, identity: StreamIdentity, *, ask: bool = False) -> bool:
    """`store` is rooted at the storage URI; `ask`: whether what is missing is asked for, so that a
    teacher writes it before anybody needs it. StreamMismatch for a foreign stream."""
    stream, manifest = store.child(identity.address), read_manifest(store, identity)
    if manifest is None:
        return False
    whole = manifest.head_sha256 is None or head_is_sound(stream, manifest.head_sha256)
    for partition in range(manifest.partitions):
        log, repairs = PartitionLog(stream, partition), Repairs(stream, partition)
        log.refresh()
        repairs.refresh()
        if ask:
            repairs.ask_for_missing(log)
        whole = whole and log.ended and not repairs.open()
    return whole
