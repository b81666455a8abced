"""Host copies of a training state, made at the speed of memory, written out later.

A step waits for the copy alone. What is copied are storages, each once, so that tensors which share
memory still do in the file.
"""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import psutil
import torch
from torch.utils import serialization
from torch.utils._pytree import tree_leaves, tree_map

_RESERVE_BYTES = 1 << 30
"""Left to training where memory is counted: its own peaks come while an upload runs."""
_RESERVE_SHARE = 0.05
_CHUNK_BYTES = 16 << 20
_CHUNKS_AHEAD = 2
_CGROUP = Path("/sys/fs/cgroup")


class HostMemory:
    """Buffers that outlive a snapshot, so that only the first one pays for their pages.

    Pinned for a state on a GPU. Not thread-safe: one snapshot at a time, and the next one only
    after the last one's upload.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        """`limit_bytes`: the container's memory limit; its cgroup's holds beside it."""
        self._limit = limit_bytes
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}

    @property
    def size_bytes(self) -> int:
        return sum(buffer.numel() for buffer in self._buffers.values())

    def size_of(self, name: str) -> int:
        """Bytes kept under a name."""
        return sum(b.numel() for (owner, _), b in self._buffers.items() if owner == name)

    def copy(self, name: str, state: Any) -> Any | None:
        """`state` with every tensor on the host, in buffers kept under `name`; None where memory is
        short, and then nothing was copied.

        A copy from a GPU is only begun: `settle` waits for all of them.
        """
        storages = _storages(state)
        if self._missing(name, storages) > self._room():
            return None
        hosts = {
            pointer: self._copied((name, number), storage)
            for number, (pointer, storage) in enumerate(storages.items())
        }

        def leaf(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value if isinstance(value, _IMMUTABLE) else copy.deepcopy(value)
            return _view(
                value, hosts[value.untyped_storage().data_ptr()] if value.numel() else None
            )

        return tree_map(leaf, state)

    def settle(self) -> None:
        """Until every copy that was begun is there."""
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()

    def _missing(self, name: str, storages: dict[int, torch.UntypedStorage]) -> int:
        """Bytes that would have to be allocated."""
        return sum(
            storage.nbytes()
            for number, storage in enumerate(storages.values())
            if not self._fits((name, number), storage)
        )

    def _fits(self, key: tuple[str, int], storage: torch.UntypedStorage) -> bool:
        buffer = self._buffers.get(key)
        return buffer is not None and buffer.numel() == storage.nbytes()

    def _copied(self, key: tuple[str, int], storage: torch.UntypedStorage) -> torch.Tensor:
        on_gpu = storage.device.type == "cuda"
        if not self._fits(key, storage):
            self._buffers.pop(key, None)
            self._buffers[key] = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=on_gpu)
        source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        return self._buffers[key].copy_(source, non_blocking=on_gpu)

    def _room(self) -> int:
        """Bytes that may still be taken."""
        free = psutil.virtual_memory().available - _RESERVE_BYTES
        of_cgroup = _cgroup_number("memory.max", "memory/memory.limit_in_bytes")
        limits = [limit for limit in (of_cgroup, self._limit) if limit is not None]
        if not limits:
            return free
        used = _cgroup_number("memory.current", "memory/memory.usage_in_bytes")
        taken = psutil.Process().memory_info().rss if used is None else used
        limit = min(limits)
        return min(free, limit - taken - min(_RESERVE_BYTES, int(_RESERVE_SHARE * limit)))


_IMMUTABLE = (
    str,
    bytes,
    int,
    float,
    bool,
    complex,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
)


def _storages(state: Any) -> dict[int, torch.UntypedStorage]:
    """Each storage of the state once, by its address."""
    found: dict[int, torch.UntypedStorage] = {}
    for leaf in tree_leaves(state):
        if isinstance(leaf, torch.Tensor) and leaf.numel():
            storage = leaf.untyped_storage()
            found.setdefault(storage.data_ptr(), storage)
    return found


def _view(tensor: torch.Tensor, host: torch.Tensor | None) -> torch.Tensor:
    """The tensor as it is, over a copy of its storage; None for one that has no elements."""
    result = torch.empty(0, dtype=tensor.dtype)
    if host is None:
        result = result.new_empty(tensor.shape)
    else:
        result.set_(host.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    return result.requires_grad_(tensor.requires_grad and result.is_floating_point())


def _cgroup_number(*names: str) -> int | None:
    """A limit or usage of this container, by cgroup v2 or v1; None where there is none."""
    for name in names:
        try:
            text = (_CGROUP / name).read_text().strip()
        except OSError:
            continue
        # v1 writes a huge number where there is no limit.
        if text.isdigit() and int(text) < 1 << 60:
            return int(text)
    return None


class Written:
    """What `write` puts into a file, to be read elsewhere while it is written: bounded memory.

    A reader that stops early calls `close`; the writer then runs to its end into nothing, since the
    archive writer of torch ends the process where its file fails within a destructor.
    """

    def __init__(self, write: Callable[[IO[bytes]], None]) -> None:
        self._chunks: queue.Queue[bytes | None] = queue.Queue(_CHUNKS_AHEAD)
        self._open = bytearray()
        self._left = memoryview(b"")
        self._closed = threading.Event()
        self._error: BaseException | None = None
        self._ended = False
        threading.Thread(target=self._run, args=[write], name="snapshot", daemon=True).start()

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, fewer only at the end. Raises what `write` raised."""
        parts: list[memoryview] = []
        wanted = size
        while (size < 0 or wanted > 0) and (len(self._left) or self._next()):
            taken = self._left if size < 0 else self._left[:wanted]
            self._left = self._left[len(taken) :]
            wanted -= len(taken)
            parts.append(taken)
        return b"".join(parts)

    def close(self) -> None:
        """Let the writer go."""
        self._closed.set()
        while not self._ended:
            self._next()

    def _next(self) -> bool:
        if self._ended:
            return False
        chunk = self._chunks.get()
        if chunk is None:
            self._ended = True
            if self._error is not None and not self._closed.is_set():
                raise self._error
            return False
        self._left = memoryview(chunk)
        return True

    def _run(self, write: Callable[[IO[bytes]], None]) -> None:
        try:
            # Of a file, torch needs write and flush.
            write(cast(IO[bytes], _Sink(self._take)))
            self._put()
        except BaseException as error:
            self._error = error
        self._chunks.put(None)

    def _take(self, data: memoryview) -> None:
        if self._closed.is_set():
            return
        start = 0
        while start < len(data):
            piece = data[start : start + _CHUNK_BYTES - len(self._open)]
            self._open += piece
            start += len(piece)
            if len(self._open) == _CHUNK_BYTES:
                self._put()

    def _put(self) -> None:
        if self._open:
            self._chunks.put(bytes(self._open))
            self._open = bytearray()


class _Sink:
    """The side of a file that torch writes to."""

    def __init__(self, take: Callable[[memoryview], None]) -> None:
        self._take = take

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._take(view)
        return len(view)

    def flush(self) -> None:
        """Nothing is held back here."""


def save_state(state: Any, file: IO[bytes] | Path) -> None:
    """torch.save without its own checksums: the shard has better ones."""
    settings: Any = serialization.config  # a module that torch gives methods when it is imported
    with settings.patch({"save.compute_crc32": False}):
        torch.save(state, file)
