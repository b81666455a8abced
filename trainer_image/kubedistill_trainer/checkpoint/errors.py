"""What can go wrong with commits."""

from __future__ import annotations


class CheckpointError(Exception):
    """Base of every error of this package."""


class Fenced(CheckpointError):
    """A newer attempt owns the run: this one must end without another write."""


class CheckpointCorrupt(CheckpointError):
    """Bytes of a committed shard are not what was committed."""


class WorldSizeChanged(CheckpointError):
    """The newest commit was made by another number of ranks than there are now."""


class SaveFailed(CheckpointError):
    """A rank could not save; no commit was made and the previous one stays valid."""
