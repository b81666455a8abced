"""A whole stream of text out of S3: waited for, checked against its hashes, damage asked again."""

from __future__ import annotations

import time
from collections.abc import Callable

from kubedistill_trainer.store.client import Store
from kubedistill_trainer.store.errors import NotFound
from kubedistill_trainer.teacher.errors import (
    SampleMissing,
    ShardCorrupt,
    StreamDamaged,
    StreamStalled,
)
from kubedistill_trainer.teacher.manifest import read_layout
from kubedistill_trainer.teacher.partition_log import LogRecord
from kubedistill_trainer.teacher.text import TextAnswer
from kubedistill_trainer.teacher.text_manifest import TextIdentity, TextManifest, decode_shard
from kubedistill_trainer.teacher.text_view import StreamView

_POLL_SECONDS = 2.0
_READS = 2  # of a shard: what was damaged on the way heals


def wait_for_text(
    store: Store,
    identity: TextIdentity,
    *,
    stall_seconds: float,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], object] = time.sleep,
) -> StreamView:
    """The stream, once all of it is there. `store` is rooted at the storage URI.

    StreamStalled when nothing was committed for `stall_seconds`.
    """
    view, seen, moved = None, -1, clock()
    while True:
        if view is None and (manifest := read_layout(store, identity, TextManifest)) is not None:
            view = StreamView(store, manifest)
        if view is not None:
            view.refresh()
            if view.ended:
                view.refresh_repairs()
                return view
            if (answers := view.totals.answers) > seen:
                seen, moved = answers, clock()
        if clock() - moved > stall_seconds:
            where = store.child(identity.address).uri
            raise StreamStalled(f"{where}: no answer was committed for {stall_seconds:.0f} s")
        pause(_POLL_SECONDS)


def read_text(view: StreamView) -> dict[int, TextAnswer]:
    """All answers of an ended stream, by request, rising.

    StreamDamaged for a shard that is not what was committed, once a teacher is asked to ask again.
    Of a request that two writers answered the first answer counts.
    """
    answers: dict[int, TextAnswer] = {}
    for repairs, shard in view.shards():
        if shard.slot in repairs.open():
            raise StreamDamaged(view.stream.uri_of(shard.key), "found damaged before")
        try:
            part = _shard(view, shard)
        except (NotFound, ShardCorrupt) as error:
            found = error.found if isinstance(error, ShardCorrupt) else "the shard is missing"
            repairs.ask(shard, found)
            raise StreamDamaged(view.stream.uri_of(shard.key), found) from error
        for request, answer in part.items():
            answers.setdefault(request, answer)
    missing = view.manifest.requests - len(answers)
    if missing:
        raise SampleMissing(f"{view.stream.uri} has ended and lacks {missing} answers")
    return dict(sorted(answers.items()))


def _shard(view: StreamView, record: LogRecord) -> dict[int, TextAnswer]:
    for _ in range(_READS - 1):
        try:
            return decode_shard(view.stream.get(record.key), record, view.manifest)
        except ShardCorrupt:
            continue
    return decode_shard(view.stream.get(record.key), record, view.manifest)
