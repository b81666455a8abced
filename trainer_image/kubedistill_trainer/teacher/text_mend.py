"""A teacher is asked again for the answers of shards that somebody found damaged; see `repairs.py`."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Sequence

from kubedistill_trainer.store.client import Store
from kubedistill_trainer.store.errors import NotFound
from kubedistill_trainer.teacher.errors import ShardCorrupt
from kubedistill_trainer.teacher.partition_log import LogRecord, PartitionLog, SlotTaken
from kubedistill_trainer.teacher.repairs import Repairs
from kubedistill_trainer.teacher.text import TextAnswer
from kubedistill_trainer.teacher.text_manifest import TextManifest, decode_shard, requests_in
from kubedistill_trainer.teacher.text_writer import text_record

_log = logging.getLogger(__name__)
Ask = Callable[[Sequence[int]], dict[int, TextAnswer]]
"""From requests to their answers."""


def mend_text(store: Store, manifest: TextManifest, partition: int, ask: Ask) -> int:
    """Write again every shard of a partition that somebody found damaged; how many there were.

    `store` is rooted at the storage URI. A shard that proves whole is confirmed as it is, and nothing
    is asked: then the damage was on the reader's way.
    """
    stream = store.child(manifest.identity.address)
    repairs = Repairs(stream, partition)
    repairs.refresh()
    slots = repairs.open()
    if not slots:
        return 0
    log = PartitionLog(stream, partition)
    log.refresh()
    for slot in slots:
        old = repairs.newest(log.shards[slot])
        record = old.model_copy(update={"nonce": uuid.uuid4().hex})
        whole = _whole(stream, old, manifest)
        if not whole:
            sealed = text_record(ask(list(requests_in(old))), manifest, partition)
            stream.put(sealed.record.key, sealed.data)
            record = sealed.record
        try:
            repairs.commit(slot, record)
        except SlotTaken:
            if not whole:
                stream.delete([record.key])
        _log.warning(
            "shard found whole" if whole else "answers of a damaged shard asked again",
            extra={"shard": stream.uri_of(old.key), "answers": old.count},
        )
    return len(slots)


def _whole(stream: Store, record: LogRecord, manifest: TextManifest) -> bool:
    try:
        decode_shard(stream.get(record.key), record, manifest)
    except (NotFound, ShardCorrupt):
        return False
    return True
