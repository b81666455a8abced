"""The rank that the others wait for, named while it is slow and no longer: a real gang, where each
rank in turn gets a part of its time only."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from devcluster.s3 import S3Access
from devcluster.zygote import Zygote
from kubedistill_api.exit_codes import ExitCode
from kubedistill_api.runspec import ProgressReport
from kubedistill_trainer.methods.straggler import WINDOW

from e2e.gang import Trainer, llama
from e2e.test_restart_in_place import rank_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
STOPPED_SECONDS, GOING_SECONDS = 0.08, 0.02


@contextlib.contextmanager
def slowed(rank: psutil.Process) -> Iterator[None]:
    """It is stopped and let go in turns."""
    over = threading.Event()

    def take_turns() -> None:
        while not over.wait(GOING_SECONDS):
            rank.suspend()
            over.wait(STOPPED_SECONDS)
            rank.resume()

    thread = threading.Thread(target=take_turns, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def report_of(port: int) -> ProgressReport:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/progress", timeout=10) as answer:
        return ProgressReport.model_validate_json(answer.read())


def seen(port: int, wanted: Callable[[ProgressReport], bool], what: str) -> ProgressReport:
    """The first report that is as wanted."""
    deadline, found = time.monotonic() + 90, None
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):  # before the rank serves it
            found = report_of(port)
            if wanted(found):
                return found
        time.sleep(0.02)
    raise TimeoutError(f"{what}: {found}")


def reached(step: int, report: ProgressReport) -> bool:
    return report.step >= step


def named(rank: int, report: ProgressReport) -> bool:
    """Whether the rank is named, and for more than what two busy cores bring about."""
    found = re.match(rf"rank {rank} \(pod {rank}\) takes ([\d.]+) times as long", report.straggler)
    return found is not None and float(found.group(1)) >= 2.5


def test_the_slow_rank_is_named_as_long_as_it_is_slow(
    access: S3Access, tmp_path: Path, warm: Zygote
) -> None:
    trainer = Trainer(tmp_path, access, warm)
    spec = trainer.spec(
        fineTune={},
        student={"config": llama(48, 2)},
        training={
            "maxSteps": 100_000, "epochs": 1000, "globalBatchSize": 16, "microBatchSize": 8,
        },
        checkpoint={"interval": 50},
    )  # fmt: skip

    def strike(pids: list[int]) -> None:
        port = trainer.exporters[0]
        full = seen(port, lambda r: r.step > 2 * WINDOW, "no full window")
        calm = [
            seen(port, partial(reached, step), f"no step {step}").straggler
            for step in range(full.step, full.step + 3 * WINDOW, 5)
        ]
        # A neighbour on the machine may hold one of them up for a moment.
        assert calm.count("") > len(calm) / 2, calm
        for victim in (1, 0):
            with slowed(rank_of(pids[victim])):
                seen(port, partial(named, victim), f"rank {victim} is not named")
            seen(port, lambda r: not r.straggler, "a straggler that is none any more")
        for pid in pids:
            os.kill(pid, signal.SIGTERM)

    ended = trainer.run("student", spec, name="slow", strike=strike)
    assert set(ended.codes) == {ExitCode.GRACEFUL_CHECKPOINT}, ended.log
