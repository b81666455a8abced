"""SIGTERM of a teacher's process."""

from __future__ import annotations

from types import FrameType

from kubedistill_api.exit_codes import ExitCode

from kubedistill_trainer.failures import RunFailure


def interrupt(number: int, frame: FrameType | None) -> None:
    """A writer needs no grace: what is committed stays, and the next one resumes behind it."""
    raise RunFailure(ExitCode.INTERRUPTED, "asked to stop; committed shards stay")
