"""The last word of a container: from an exception to an exit code and an Outcome."""

from __future__ import annotations

import os
from pathlib import Path

from kubedistill_api.exit_codes import ExitCode, policy
from kubedistill_api.runspec import TERMINATION_MESSAGE_PATH, Outcome

from kubedistill_trainer.checkpoint import ConfigChanged, Fenced
from kubedistill_trainer.checkpoint.errors import (
    ForeignLog,
    InputsChanged,
    LogTooNew,
    NoUsableCommit,
)
from kubedistill_trainer.failures import RunFailure
from kubedistill_trainer.store import (
    AccessDenied,
    CredentialsMissing,
    InvalidStoreUri,
    NoSuchBucket,
    StoreError,
    UnsupportedStore,
)
from kubedistill_trainer.teacher.errors import (
    SampleMissing,
    StreamCorrupt,
    StreamDamaged,
    StreamMismatch,
    StreamStalled,
)

_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
)
"""How gloo says in a RuntimeError that a peer has gone, by what its socket met first."""
_REFUSALS = (
    AccessDenied,
    ConfigChanged,
    CredentialsMissing,
    ForeignLog,
    InvalidStoreUri,
    LogTooNew,
    NoSuchBucket,
    UnsupportedStore,
)
"""What another attempt would meet again until a person has changed something."""


_MAY_COME_BACK = (AccessDenied, CredentialsMissing, NoSuchBucket)


def of_exception(error: BaseException, *, accepted: bool = False) -> tuple[ExitCode, Outcome]:
    """What to report for an exception that ended a run.

    `accepted`: a preflight has found the store to work. Keys and buckets that are refused since then
    may come back, and the run with them.
    """
    cause = error.__cause__ if isinstance(error, RunFailure) else error
    if accepted and isinstance(cause, _MAY_COME_BACK):
        code, message, problems = ExitCode.STORAGE_UNAVAILABLE, str(cause), []
    elif isinstance(error, RunFailure):
        code, message, problems = error.code, error.message, error.problems
    else:
        code, message, problems = _code_of(error), f"{type(error).__name__}: {error}", []
        if isinstance(error, StoreError):
            message = str(error)
    return code, Outcome(reason=policy(code).reason, message=message, problems=problems)


def _code_of(error: BaseException) -> ExitCode:
    if isinstance(error, _REFUSALS):
        return ExitCode.BAD_CONFIGURATION
    if isinstance(error, StoreError):
        return ExitCode.STORAGE_UNAVAILABLE
    if isinstance(error, Fenced):
        return ExitCode.FENCED
    if isinstance(error, (NoUsableCommit, InputsChanged)):
        return ExitCode.RESUME_REFUSED
    if isinstance(error, (StreamMismatch, SampleMissing, StreamCorrupt)):
        return ExitCode.UNREADABLE_INPUT
    if isinstance(error, StreamDamaged):
        return ExitCode.STREAM_DAMAGED
    if isinstance(error, StreamStalled):
        return ExitCode.STALLED
    # By name where the type is torch's: the preflight ends without having imported it.
    name = type(error).__name__
    if isinstance(error, MemoryError) or name == "OutOfMemoryError":
        return ExitCode.OUT_OF_MEMORY
    if name.startswith("Dist") or any(words in str(error) for words in _LOST_PEER):
        return ExitCode.PEER_LOST
    return ExitCode.UNKNOWN


def write_termination_message(outcome: Outcome) -> None:
    """Hand the outcome to the kubelet (KUBEDISTILL_TERMINATION_MESSAGE names another file)."""
    path = os.environ.get("KUBEDISTILL_TERMINATION_MESSAGE", TERMINATION_MESSAGE_PATH)
    Path(path).write_text(outcome.to_termination_message())
