"""From an exception to an exit code."""

from __future__ import annotations

import pytest
from kubedistill_api.exit_codes import ExitCode
from kubedistill_trainer.checkpoint import CheckpointCorrupt, ConfigChanged, Fenced
from kubedistill_trainer.checkpoint.errors import (
    ForeignLog,
    InputsChanged,
    LogTooNew,
    NoUsableCommit,
)
from kubedistill_trainer.outcome import of_exception
from kubedistill_trainer.store import StoreUnavailable, UnsupportedStore


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Fenced("over"), ExitCode.FENCED),
        (ForeignLog("two jobs"), ExitCode.BAD_CONFIGURATION),
        (LogTooNew("version 3"), ExitCode.BAD_CONFIGURATION),
        (ConfigChanged("another model"), ExitCode.BAD_CONFIGURATION),
        (UnsupportedStore("put", "s3://b/x", "no"), ExitCode.BAD_CONFIGURATION),
        (StoreUnavailable("put", "s3://b/x", "no"), ExitCode.STORAGE_UNAVAILABLE),
        (CheckpointCorrupt("cut"), ExitCode.UNKNOWN),
        (NoUsableCommit("none left"), ExitCode.RESUME_REFUSED),
        (InputsChanged("other data"), ExitCode.RESUME_REFUSED),
    ],
)
def test_exit_codes(error: Exception, code: ExitCode) -> None:
    found, outcome = of_exception(error)
    assert found is code
    assert str(error) in outcome.message
