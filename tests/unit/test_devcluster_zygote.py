"""The near side of a zygote's fork: its end is read once, whoever asks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from devcluster.zygote import Forked


class Reaper:
    """In place of a zygote: a process of this one's, and how often its end was read."""

    def __init__(self, command: str) -> None:
        self.process = subprocess.Popen([sys.executable, "-S", "-c", command])
        self.reads = 0

    def reap(self, pid: int) -> int:
        self.reads += 1
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_many_who_wait_get_one_end() -> None:
    reaper = Reaper("import time; time.sleep(60)")
    forked = Forked(reaper, reaper.process.pid)  # type: ignore[arg-type]
    assert forked.poll() is None
    with pytest.raises(TimeoutError):
        forked.wait(0.01)
    together = threading.Barrier(9)

    def ask() -> int:
        together.wait()
        return forked.wait(30)

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask) for _ in range(8)]
        together.wait()
        forked.send_signal(9)
        assert {future.result() for future in asked} == {-9}
    assert (forked.running, forked.poll(), reaper.reads) == (False, -9, 1)
    forked.send_signal(9)
