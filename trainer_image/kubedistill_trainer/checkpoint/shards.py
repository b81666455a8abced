"""Shards: files that go up once, with hashes, and come down only as they went up (storage.md)."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import google_crc32c

from kubedistill_trainer.checkpoint.errors import CheckpointCorrupt
from kubedistill_trainer.checkpoint.records import ShardRecord
from kubedistill_trainer.checkpoint.staged import Source, Staged
from kubedistill_trainer.store import NotFound, Store, StoreError

PART_BYTES = 16 * 1024 * 1024
"""One CRC32C is kept for each part of this size; a download asks for parts of it."""
_SHARED_PREFIX = "state/mp_rank_"  # DeepSpeed's name for what is of the model
_PARTS_AHEAD = 6  # of 16 MiB: some on their way while another one is hashed
_DOWNLOAD_ATTEMPTS = 2  # a part that is wrong twice is wrong in the store


class Hashed:
    """A stream that is hashed while it is read: SHA-256 of the whole, CRC32C of each part."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._whole = hashlib.sha256()
        self._parts: list[int] = []
        self._part_bytes = PART_BYTES
        self.size_bytes = 0

    def read(self, size: int = -1) -> bytes:
        """As of a file."""
        data = self._source.read(size)
        self._whole.update(data)
        self.size_bytes += len(data)
        view = memoryview(data)
        while view:
            if self._part_bytes == PART_BYTES:
                self._parts.append(0)
                self._part_bytes = 0
            piece = view[: PART_BYTES - self._part_bytes]
            self._parts[-1] = google_crc32c.extend(self._parts[-1], bytes(piece))
            self._part_bytes += len(piece)
            view = view[len(piece) :]
        return data

    def readable(self) -> bool:
        return True

    def record(self, path: str, *, rank: int, shared: bool) -> ShardRecord:
        """The receipt for what was read."""
        return ShardRecord(
            path=path,
            rank=rank,
            shared=shared,
            size_bytes=self.size_bytes,
            sha256=self._whole.hexdigest(),
            crc32c=self._parts,
        )


def upload(store: Store, files: Sequence[Staged], *, rank: int) -> list[ShardRecord]:
    """Step 2: upload a snapshot's files to `store`, hashed on their way; the receipts, in order.

    `store` is at the commit's own prefix, so every key is new. Raises StoreError with the object's
    name, within the store's deadlines, and OSError when a file cannot be read.
    """
    receipts = []
    for file in files:
        source = file.open()
        hashed = Hashed(source)
        try:
            store.upload_stream(file.path, hashed, file.size_bytes)
        finally:
            source.close()
        receipts.append(hashed.record(file.path, rank=rank, shared=is_shared(file.path)))
    return receipts


def is_shared(path: str) -> bool:
    """True for a file that rank 0 writes and every rank loads."""
    return path.startswith(_SHARED_PREFIX)


def check_by_head(store: Store, shards: Iterable[ShardRecord]) -> None:
    """Step 3, first half: every shard is there in its full size. Raises CheckpointCorrupt."""
    with ThreadPoolExecutor(8) as pool:
        for problem in pool.map(lambda shard: _head_problem(store, shard), shards):
            if problem:
                raise CheckpointCorrupt(problem)


def download(
    store: Store, shard: ShardRecord, path: Path, alive: Callable[[], object] = lambda: None
) -> None:
    """Write a shard to `path`, checking each part as it comes and the whole at the end.

    `alive` is called after each part.

    A part with a wrong CRC is fetched once more: it may have been garbled on its way. Raises
    CheckpointCorrupt, and then leaves no file, when the object is missing, shorter or other than
    what was committed; StoreError when the store does not answer, which says nothing of the shard.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            digest = _fetch(store, shard, file.fileno(), alive)
        if digest != shard.sha256:
            raise CheckpointCorrupt(
                f"{store.uri_of(shard.path)}: SHA-256 {digest}, committed {shard.sha256}"
            )
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def _fetch(store: Store, shard: ShardRecord, descriptor: int, alive: Callable[[], object]) -> str:
    """Write the verified parts of a shard, some fetched ahead; SHA-256 of the whole."""
    expected = -(-shard.size_bytes // PART_BYTES)
    if len(shard.crc32c) != expected:
        raise CheckpointCorrupt(
            f"{store.uri_of(shard.path)}: the record has {len(shard.crc32c)} CRCs for {expected} "
            "parts"
        )

    def copy(number: int) -> bytes:
        part = _fetch_part(store, shard, number)
        written = 0
        while written < len(part):
            written += os.pwrite(
                descriptor, memoryview(part)[written:], number * PART_BYTES + written
            )
        return part

    whole = hashlib.sha256()

    def take_in(part: Future[bytes]) -> None:
        whole.update(part.result())
        alive()

    with ThreadPoolExecutor(_PARTS_AHEAD) as pool:
        ahead: deque[Future[bytes]] = deque()
        try:
            for number in range(expected):
                ahead.append(pool.submit(copy, number))
                if len(ahead) == _PARTS_AHEAD:
                    take_in(ahead.popleft())
            while ahead:
                take_in(ahead.popleft())
        finally:
            pool.shutdown(cancel_futures=True)
    return whole.hexdigest()


def _fetch_part(store: Store, shard: ShardRecord, number: int) -> bytes:
    start = number * PART_BYTES
    length = min(PART_BYTES, shard.size_bytes - start)
    problem = ""
    for _ in range(_DOWNLOAD_ATTEMPTS):
        try:
            part = store.get_range(shard.path, start, length)
        except NotFound as error:
            raise CheckpointCorrupt(f"{store.uri_of(shard.path)}: missing") from error
        except StoreError as error:
            # 416: the object ends before this part begins.
            if "InvalidRange" not in error.problem:
                raise
            part = b""
        if len(part) == length and google_crc32c.value(part) == shard.crc32c[number]:
            return part
        problem = f"{len(part)} of {length} bytes" if len(part) != length else "wrong CRC32C"
    raise CheckpointCorrupt(f"{store.uri_of(shard.path)}: {problem} at offset {start}")


def _head_problem(store: Store, shard: ShardRecord) -> str:
    info = store.head(shard.path)
    if info is None:
        return f"{store.uri_of(shard.path)}: missing"
    if info.size_bytes != shard.size_bytes:
        return f"{store.uri_of(shard.path)}: {info.size_bytes} bytes, committed {shard.size_bytes}"
    return ""
