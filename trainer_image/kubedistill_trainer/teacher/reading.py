"""What a reader of a teacher stream is told, and what it tells."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ReaderSettings:
    """How far ahead a reader works and how long it waits."""

    ahead_samples: int = 8
    """Samples decoded before training asks for them; each costs its decoded size in memory."""
    cache_bytes: int = 4 << 30
    """Local disk for shards."""
    stall_seconds: float = 1800.0
    """A partition without a new commit for so long is stalled."""
    poll_seconds: float = 0.2
    """First wait between two looks at a partition's log; it doubles up to `poll_limit_seconds`."""
    poll_limit_seconds: float = 5.0
    dtype: torch.dtype = torch.float32
    """Of the hidden states that `get` returns."""


@dataclass(frozen=True, slots=True)
class StreamProgress:
    """What the reader knows to be committed; `ended` when every partition has its END."""

    size_bytes: int
    tokens: int
    samples: int
    ended: bool
