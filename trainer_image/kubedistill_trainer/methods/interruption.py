"""SIGTERM: only a flag is set; the ranks agree at a step boundary, within the pod's grace."""

from __future__ import annotations

import json
import os
import signal
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
        self._has_work = False

    def has_work(self) -> None:
        """From now on there may be something to commit; before, SIGTERM ends the process at once."""
        self._has_work = True

    def install(self) -> None:
        """Take over SIGTERM in the main thread."""
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
        if not self._has_work:
            _end("asked to stop before training began")
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            wait = max(0.0, self._grace - self._margin)
            timer = threading.Timer(wait, _end, ["grace is over: ending without a commit"])
            timer.daemon = True
            timer.start()


def _end(event: str) -> None:
    # Not by logging: its lock may be held by what was interrupted.
    os.write(1, json.dumps({"level": "error", "event": event}).encode() + b"\n")
    os._exit(int(ExitCode.INTERRUPTED))
