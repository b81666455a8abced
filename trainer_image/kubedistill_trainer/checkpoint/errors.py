"""What can go wrong with a checkpoint."""

from __future__ import annotations


class CheckpointError(Exception):
    """Base of this package's errors. The text names the object and what to do."""


class Fenced(CheckpointError):
    """Another attempt owns the run: this one must exit, and must not write again."""


class CheckpointCorrupt(CheckpointError):
    """What is stored is not what was committed: missing, another size, another hash."""


class CheckpointFailed(CheckpointError):
    """A rank could not write or read its part; nothing was committed. Names the rank."""


class ConfigChanged(CheckpointError):
    """The checkpoint was written under another configuration than the run has now."""


class InputsChanged(CheckpointError):
    """The checkpoint was trained on other data, or by another teacher, than the run has read now."""


class NoUsableCommit(CheckpointCorrupt):
    """Something was committed, and nothing of it can be loaded: no run begins anew by itself."""


class LogTooNew(CheckpointError):
    """A later version of this program wrote to the log: only that one may read and go on with it."""


class ForeignLog(CheckpointError):
    """The log is another job's: two jobs would share one prefix."""


class NotPinnable(CheckpointError):
    """There is no usable commit to pin, or it was retired in the same moment."""
