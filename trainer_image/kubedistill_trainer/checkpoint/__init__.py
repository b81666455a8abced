"""Checkpoints: the write-once, fenced commit log, and DeepSpeed's state behind it."""

from kubedistill_trainer.checkpoint.checkpointer import Checkpointer, CommitInfo, Restored
from kubedistill_trainer.checkpoint.errors import (
    CheckpointCorrupt,
    CheckpointError,
    Fenced,
    SaveFailed,
    WorldSizeChanged,
)
from kubedistill_trainer.checkpoint.estimate import fits_grace

__all__ = [
    "CheckpointCorrupt",
    "CheckpointError",
    "Checkpointer",
    "CommitInfo",
    "Fenced",
    "Restored",
    "SaveFailed",
    "WorldSizeChanged",
    "fits_grace",
]
