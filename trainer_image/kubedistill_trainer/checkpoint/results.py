"""What the Checkpointer tells: commits that were made, loaded, passed over, or are on their way."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from pydantic import JsonValue

_PEER_FACTOR = 4
"""Peers' uploads may take so many times what this rank's took …"""
_PEER_SECONDS = 10.0
"""… and so much longer."""


@dataclass(frozen=True)
class CommitInfo:
    """A commit that was made."""

    uri: str
    """Prefix of its shards."""
    step: int
    digest: str
    size_bytes: int
    duration_seconds: float
    """From the snapshot's begin to the commit."""
    stall_seconds: float
    """Of these, how long training waited."""
    time: str
    """ISO 8601, UTC, by the clock of rank 0."""


@dataclass(frozen=True)
class Rejected:
    """A commit that was passed over, or a slot without a readable record (step is None)."""

    uri: str
    step: int | None
    reason: str
    sequence: int | None = None
    """Its slot; None for one that has left the log."""

    def __str__(self) -> str:
        at = "unreadable record" if self.step is None else f"step {self.step}"
        return f"{at}, {self.uri}: {self.reason}"


@dataclass(frozen=True)
class Restored:
    """The commit that was loaded, and newer ones that could not be."""

    step: int
    cursor: dict[str, JsonValue]
    uri: str
    rejected: list[Rejected] = field(default_factory=list)


@dataclass
class Flight:
    """A save whose upload runs."""

    step: int
    began: float = field(default_factory=time.monotonic)
    limit_seconds: float = 0.0
    """The longest that the store's deadlines let this rank's upload take, or it lets its peers take."""
    ended: threading.Event = field(default_factory=threading.Event)
    info: CommitInfo | None = None
    error: Exception | None = None

    def uploaded(self) -> None:
        """This rank's part is in the store. Its peers' parts are about as large: one that takes far
        longer may be frozen, and is not waited for as long as the store's deadlines would let it."""
        spent = time.monotonic() - self.began
        self.limit_seconds = min(self.limit_seconds, _PEER_FACTOR * spent + _PEER_SECONDS)

    @property
    def is_in_time(self) -> bool:
        """Whether it has not yet taken longer than that."""
        return time.monotonic() - self.began < self.limit_seconds
