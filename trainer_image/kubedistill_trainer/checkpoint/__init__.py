"""Checkpoints: a fenced, write-once commit log and the shards that it commits.

`records`, `log`, `shards`, `retention` and `estimate` need no torch; the Checkpointer does and is
therefore imported on first use.
"""

from typing import TYPE_CHECKING, Any

from kubedistill_trainer.checkpoint.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointFailed,
    ConfigChanged,
    Fenced,
)
from kubedistill_trainer.checkpoint.estimate import fits_grace
from kubedistill_trainer.checkpoint.log import CommitLog
from kubedistill_trainer.checkpoint.results import CommitInfo, Rejected, Restored

if TYPE_CHECKING:
    from kubedistill_trainer.checkpoint.checkpointer import Checkpointer

__all__ = [
    "CheckpointCorrupt",
    "CheckpointError",
    "CheckpointFailed",
    "Checkpointer",
    "CommitInfo",
    "CommitLog",
    "ConfigChanged",
    "Fenced",
    "Rejected",
    "Restored",
    "fits_grace",
]


def __getattr__(name: str) -> Any:
    if name != "Checkpointer":
        raise AttributeError(name)
    from kubedistill_trainer.checkpoint.checkpointer import Checkpointer

    return Checkpointer
