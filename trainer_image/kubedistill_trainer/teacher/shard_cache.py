"""Shards on local disk: fetched once, verified whole before use, the least recent dropped first."""

from __future__ import annotations

import hashlib
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from kubedistill_trainer.store.client import Store
from kubedistill_trainer.store.errors import NotFound
from kubedistill_trainer.teacher.errors import ShardCorrupt, StreamDamaged
from kubedistill_trainer.teacher.partition_log import LogRecord
from kubedistill_trainer.teacher.shard import ShardReader

_ATTEMPTS = 3
_CHUNK = 1 << 20


class ShardCache:
    """Records of committed shards, through a folder of at most `capacity_bytes`.

    The shard in use always stays, so one shard may exceed the capacity. `store` is rooted at the
    stream, `stream` is its digest. Thread-safe; one shard is fetched at a time.
    """

    def __init__(
        self,
        store: Store,
        stream: str,
        folder: Path,
        capacity_bytes: int,
        *,
        pause: Callable[[float], object] = time.sleep,
    ) -> None:
        self._store = store
        self._stream = stream
        self._folder = folder
        self._capacity = capacity_bytes
        self._pause = pause
        self._lock = threading.RLock()
        self._open: OrderedDict[str, tuple[ShardReader, int]] = OrderedDict()
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob("*.partial"):
            left_over.unlink(missing_ok=True)

    @property
    def size_bytes(self) -> int:
        """Bytes of the shards held."""
        with self._lock:
            return sum(size for _, size in self._open.values())

    def record(self, entry: LogRecord, sample: int, token_hash: int) -> bytes:
        """The record of `sample` in the shard of `entry`.

        A fault sends the shard back to the store a few times before StreamDamaged is raised;
        StreamMismatch for other tokens is final. StoreUnavailable passes through.
        """
        found = ""
        for attempt in range(_ATTEMPTS):
            if attempt:
                self._pause(0.1 * 4**attempt)
            try:
                with self._lock:
                    return self._reader(entry).read(sample, token_hash)
            except NotFound:
                found = "the shard is missing"
            except ShardCorrupt as error:
                found = str(error)
            except KeyError:
                found = f"shard {entry.key} has no sample {sample}, its log record says it does"
            self._drop(entry)
        raise StreamDamaged(self._store.uri_of(entry.key), found)

    def close(self) -> None:
        """Close the files; they stay for the next process, which verifies them again."""
        with self._lock:
            for reader, _ in self._open.values():
                reader.close()
            self._open.clear()

    def _reader(self, entry: LogRecord) -> ShardReader:
        if (held := self._open.get(entry.sha256)) is not None:
            self._open.move_to_end(entry.sha256)
            return held[0]
        path = self._path(entry)
        if not (path.exists() and _sha256(path) == entry.sha256):
            self._fetch(entry, path)
        reader = ShardReader(path, name=self._store.uri_of(entry.key), stream=self._stream)
        self._open[entry.sha256] = (reader, entry.size_bytes)
        while len(self._open) > 1 and self.size_bytes > self._capacity:
            digest, (oldest, _) = self._open.popitem(last=False)
            oldest.close()
            (self._folder / f"{digest}.shard").unlink(missing_ok=True)
        return reader

    def _fetch(self, entry: LogRecord, path: Path) -> None:
        """Download to a name that is never read, verify, then rename."""
        partial = self._folder / f"{uuid.uuid4().hex}.partial"
        try:
            self._store.download_file(entry.key, partial)
            size, digest = partial.stat().st_size, _sha256(partial)
            if size != entry.size_bytes or digest != entry.sha256:
                raise ShardCorrupt(
                    self._store.uri_of(entry.key),
                    None,
                    f"{size} bytes with SHA-256 {digest}; "
                    f"{entry.size_bytes} with {entry.sha256} were committed",
                )
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _drop(self, entry: LogRecord) -> None:
        with self._lock:
            if (held := self._open.pop(entry.sha256, None)) is not None:
                held[0].close()
            self._path(entry).unlink(missing_ok=True)

    def _path(self, entry: LogRecord) -> Path:
        return self._folder / f"{entry.sha256}.shard"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
