"""SIGTERM: only a flag is set; the ranks agree at a step boundary, within the pod's grace."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time

from kubedistill_api.exit_codes import ExitCode


class Interruption:
    """Whether this rank was asked to stop, and how much of its grace is left.

    A thread of its own is woken by the signal, and ends the process before the grace does: it never
    waits for a collective. Python's own handlers run in the main thread and no sooner than whatever
    that is within (a backward pass, a collective with a peer that is frozen) has returned.
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
        heard, said = socket.socketpair()
        said.setblocking(False)
        threading.Thread(target=self._listen, args=(heard,), name="grace", daemon=True).start()
        # The interpreter writes the signal's number there from within the signal, whatever the main
        # thread does, and only of signals that have a handler.
        signal.set_wakeup_fd(said.detach(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda number, frame: None)

    @property
    def asked(self) -> bool:
        return self._asked_at is not None

    def remaining_seconds(self) -> float:
        """Grace left; all of it when nobody asked this rank yet."""
        if self._asked_at is None:
            return self._grace
        return self._grace - (time.monotonic() - self._asked_at)

    def _listen(self, heard: socket.socket) -> None:
        while signal.SIGTERM not in heard.recv(16):
            pass
        self._asked_at = time.monotonic()
        time.sleep(max(0.0, self._grace - self._margin))
        _end()


def _end() -> None:
    event = {"level": "error", "event": "grace is over: ending without a commit"}
    # Not by sys.stdout, whose lock the main thread may hold.
    os.write(sys.stdout.fileno(), json.dumps(event).encode() + b"\n")
    os._exit(int(ExitCode.INTERRUPTED))
