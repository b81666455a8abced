"""A teacher is asked again for the answers of shards that somebody found damaged; see `repairs.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kubedistill_trainer.store.client import Store
from kubedistill_trainer.store.errors import NotFound
from kubedistill_trainer.teacher.errors import ShardCorrupt
from kubedistill_trainer.teacher.mend import mend_shards
from kubedistill_trainer.teacher.partition_log import LogRecord
from kubedistill_trainer.teacher.text import TextAnswer
from kubedistill_trainer.teacher.text_manifest import TextManifest, decode_shard, requests_in
from kubedistill_trainer.teacher.text_writer import text_record

Ask = Callable[[Sequence[int]], dict[int, TextAnswer]]
"""From requests to their answers."""


def mend_text(store: Store, manifest: TextManifest, partition: int, ask: Ask) -> int:
    """Write again every shard of a partition that somebody found damaged; how many there were.

    `store` is rooted at the storage URI. A shard that proves whole is confirmed as it is, and nothing
    is asked: then the damage was on the reader's way.
    """
    stream = store.child(manifest.identity.address)

    def again(old: LogRecord) -> LogRecord:
        sealed = text_record(ask(list(requests_in(old))), manifest, partition)
        stream.put(sealed.record.key, sealed.data)
        return sealed.record

    return mend_shards(stream, partition, lambda old: _whole(stream, old, manifest), again)


def _whole(stream: Store, record: LogRecord, manifest: TextManifest) -> bool:
    try:
        decode_shard(stream.get(record.key), record, manifest)
    except (NotFound, ShardCorrupt):
        return False
    return True
