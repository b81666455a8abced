"""SIGTERM: only a flag is set; the ranks agree at a step boundary, within the pod's grace."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from types import FrameType

from kubedistill_api.exit_codes import ExitCode


class Interruption:
    """Whether this rank was asked to stop, and how much of its grace is left.

    A thread ends the process before the grace does: it never waits for a collective.
    """

    def __init__(self, grace_seconds: float, margin_seconds: float = 3.0) -> None:
        self._grace = grace_seconds
        self._margin = margin_seconds
        self._asked_at: float | None = None

    def has_work(self) -> None:
        """From now on there may be something to commit. Called in the main thread.

        Until then SIGTERM ends the process as ever, at once: a rank that waits for its peers within
        a library would not get to a handler of ours.
        """
        signal.signal(signal.SIGTERM, self._on_signal)

    @property
    def asked(self) -> bool:
        return self._asked_at is not None

    def remaining_seconds(self) -> float:
        """Grace left; all of it when nobody asked this rank yet."""
        if self._asked_at is None:
            return self._grace
        return self._grace - (time.monotonic() - self._asked_at)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            wait = max(0.0, self._grace - self._margin)
            timer = threading.Timer(wait, _end)
            timer.daemon = True
            timer.start()


def _end() -> None:
    event = {"level": "error", "event": "grace is over: ending without a commit"}
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()
    os._exit(int(ExitCode.INTERRUPTED))
