"""A file of a snapshot, wherever it waits for its upload."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol


class Source(Protocol):
    """What a shard is read from."""

    def read(self, size: int = -1, /) -> bytes: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Staged:
    """One file of a snapshot, in memory or, where memory was short, on disk."""

    path: str
    """Relative, as it is stored."""
    size_bytes: int
    """Nearly: a file in memory has its framing yet to come."""
    open: Callable[[], Source] = field(repr=False)
    on_disk: bool = False
