"""Background processes that end with whoever started them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


_PORTS = range(20000, 32000)
"""Below those that the kernel gives to connections: such a one may be taken before it is used."""


_given: deque[int] = deque(maxlen=1000)
"""Lately: whoever got one may not have taken it yet."""


def free_port() -> int:
    """A TCP port that was free a moment ago, and that no outgoing connection takes."""
    return _free(0)


def free_port_pair(distance: int = 10000) -> int:
    """A port P so that P + distance is free as well."""
    return _free(distance)


def _free(distance: int) -> int:
    chance = random.SystemRandom()
    for _ in range(2000):
        port = chance.choice(_PORTS)
        if port in _given:
            continue
        try:
            with socket.socket() as first, socket.socket() as second:
                first.bind(("127.0.0.1", port))
                if distance:
                    second.bind(("127.0.0.1", port + distance))
        except OSError:
            continue
        _given.append(port)
        return port
    raise RuntimeError("no free ports")


def die_with_parent() -> None:
    """In a child, before exec: get SIGKILL when the parent's thread that started it ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Background:
    """One process with a log file. `detached` lets it outlive this program."""

    def __init__(
        self,
        command: Sequence[str | Path],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        detached: bool = False,
        stop_signal: signal.Signals = signal.SIGTERM,
    ) -> None:
        self.command = [str(part) for part in command]
        self.log = log
        self._env = env
        self._detached = detached
        self._stop_signal = stop_signal
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, or start it again."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=None if self._env is None else dict(self._env),
                start_new_session=True,
                # One call of libc: safe also beside threads.
                preexec_fn=None if self._detached else die_with_parent,  # noqa: PLW1509
            )

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError(f"{self.command[0]} was not started")
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self, timeout_seconds: float = 8.0) -> None:
        """Ask it to end, then make it. Harmless when it has ended."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, self._stop_signal)
        try:
            self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def freeze(self) -> None:
        """Stop it where it is, until `thaw`."""
        os.killpg(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.killpg(self.pid, signal.SIGCONT)

    def tail(self, lines: int = 15) -> str:
        """The last lines of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def wait_until(
    ready: Callable[[], bool], what: str, timeout_seconds: float = 60.0, every_seconds: float = 0.1
) -> None:
    """TimeoutError naming `what` when `ready` stays false."""
    deadline = time.monotonic() + timeout_seconds
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_seconds:.0f} s")
        time.sleep(every_seconds)
