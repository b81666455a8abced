"""SIGTERM, whatever the main thread is within: the grace is counted, and kept."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from kubedistill_api.exit_codes import ExitCode

WORKS = """
from kubedistill_trainer.methods.interruption import Interruption
asked = Interruption(grace_seconds={grace}, margin_seconds=0.5)
asked.has_work()
print("works", flush=True)
"""
STUCK = """
import ctypes
library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
library.pthread_mutex_lock(mutex)
# As a collective whose peer is frozen: it never comes back to the interpreter.
library.pthread_mutex_lock(mutex)
"""
STEPS = """
import time
while not asked.asked:
    time.sleep(0.01)
assert 0 < asked.remaining_seconds() <= {grace}
print("agreed", flush=True)
"""


def started(script: str, grace: float) -> subprocess.Popen[str]:
    script = (WORKS + script).format(grace=grace)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "works\n"
    return process


@pytest.mark.parametrize("signals", [1, 2])
@pytest.mark.parametrize("grace", [0.2, 1.0])
def test_a_rank_that_hangs_in_a_library_ends_within_its_grace(grace: float, signals: int) -> None:
    with started(STUCK, grace) as process:
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == ExitCode.INTERRUPTED
    assert "grace is over" in out


def test_a_rank_that_steps_sees_that_it_was_asked() -> None:
    with started(STEPS, 600.0) as process:
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "agreed\n")


def test_other_signals_ask_for_nothing() -> None:
    script = (
        'import signal\nsignal.signal(signal.SIGUSR1, lambda *_: print("other", flush=True))\n'
        'print("set", flush=True)\n'
    )
    with started(script + STEPS, 600.0) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "set\n"
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "other\n"
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "agreed\n")
