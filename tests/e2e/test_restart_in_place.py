"""Ranks that are killed come back in their pods: no attempt is lost, and no bit."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from devcluster.s3 import S3Access
from devcluster.zygote import Zygote
from kubedistill_api.exit_codes import ExitCode
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.names import run_uri

from e2e.gang import Trainer, committed, exported, llama

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


def spec_of(trainer: Trainer) -> DistillationJobSpec:
    return trainer.spec(
        fineTune={},
        student={"config": llama(48, 2)},
        # Long enough to be struck on the way.
        training={"maxSteps": 120},
        checkpoint={"interval": 5},
    )


def rank_of(launcher: int) -> psutil.Process:
    """The process of a launcher's only rank, once it is there."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if children := psutil.Process(launcher).children():
            return children[0]
        time.sleep(0.05)
    raise TimeoutError(f"launcher {launcher} has no rank")


def test_a_killed_rank_comes_back_and_no_bit_differs(
    access: S3Access, tmp_path: Path, warm: Zygote
) -> None:
    """First the one that leads and commits, then the other."""
    trainer = Trainer(tmp_path, access, warm)
    spec, name = spec_of(trainer), "in-place"

    def strike(pids: list[int]) -> None:
        for victim, commits in enumerate((1, 4)):
            committed(access, run_uri(spec.storage.uri, "test", name, f"uid-{name}"), commits)
            rank = rank_of(pids[victim])
            rank.send_signal(signal.SIGKILL)
            rank.wait(30)

    struck = trainer.run("student", spec, name=name, strike=strike)
    assert set(struck.codes) == {0}, struck.log
    progress = struck.outcomes[0].progress
    assert progress is not None
    assert progress.rank_restarts == 2
    assert "SIGKILL" in progress.restart_reason or "peer" in progress.restart_reason
    calm = trainer.run("student", spec, name=f"{name}-calm")
    assert exported(access, struck) == exported(access, calm)


def test_a_rank_that_keeps_dying_ends_its_pod(
    access: S3Access, tmp_path: Path, warm: Zygote
) -> None:
    trainer = Trainer(tmp_path, access, warm)

    def strike(pids: list[int]) -> None:
        seen = set[int]()
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and len(seen) < 4:
            rank = rank_of(pids[1])
            if rank.pid not in seen:
                seen.add(rank.pid)
                os.kill(rank.pid, signal.SIGKILL)
            time.sleep(0.05)
        os.kill(pids[0], signal.SIGTERM)  # as when the Job's other pods are ended

    ended = trainer.run("student", spec_of(trainer), name="hopeless", strike=strike)
    assert ended.codes[1] == ExitCode.UNKNOWN, ended.log
    assert "SIGKILL" in ended.outcomes[1].message
