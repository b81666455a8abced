"""The rank processes of one pod: started, watched, and started again in place where that helps.

A rank that dies ends its peers too, since no collective can lose a member. Where the pods are well,
new ranks in the same pods are there in seconds, without images, volumes, scheduling and imports:
each launcher starts its own anew, they meet again, and rank 0 takes the log over (storage.md, step 1)
with the same fence and a higher restart.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn, Protocol

from kubedistill_api.exit_codes import ExitCode, policy
from kubedistill_api.runspec import Outcome
from pydantic import ValidationError

from kubedistill_trainer.context import (
    Restart,
    committed_file,
    imported_file,
    joined_file,
    trained_file,
)
from kubedistill_trainer.imports import import_as_told
from kubedistill_trainer.rank import outcome_file

_log = logging.getLogger(__name__)
_PEERS_END_SECONDS = 15.0
_POLL_SECONDS = 0.02
_JOIN_SECONDS = 60.0
"""Within which restarted ranks meet: pods of which one is gone do not wait for it longer."""
_LEAST_TELLING = (ExitCode.PEER_LOST, ExitCode.UNKNOWN)
_MOST_RESTARTS, _WINDOW_SECONDS = 3, 100.0
"""Restarts within that time, and restarts in a row without a commit: what dies at the same step each
time is for the operator to count."""
_MEMORY_EVENTS = (
    Path("/sys/fs/cgroup/memory.events"),
    Path("/sys/fs/cgroup/memory/memory.oom_control"),
)
"""Of version 2 and version 1, which both have a line with `oom_kill`."""


@dataclass(frozen=True)
class End:
    """How one rank's process ended: an exit code, or the negative number of a signal."""

    local_rank: int
    raw: int

    @property
    def code(self) -> ExitCode:
        if self.raw == -signal.SIGTERM:
            return ExitCode.INTERRUPTED  # it had nothing to commit yet
        try:
            return ExitCode(self.raw)
        except ValueError:
            return ExitCode.UNKNOWN


def may_restart(
    ends: Sequence[End],
    restarts_at: Sequence[float],
    now: float,
    *,
    in_vain: int,
    asked: bool,
    trained: bool,
) -> bool:
    """Whether the ranks of this pod are started again in place.

    They are where each failure was a kill or the loss of a peer; not after SIGTERM, not once
    training is over (ranks that are done do not come back), and not for the fourth time within 100
    seconds or without a commit (`in_vain`: restarts since the last one): then it is the pod or the
    program, and the operator's turn.
    """
    recent = sum(now - at < _WINDOW_SECONDS for at in restarts_at)
    failures = [end for end in ends if end.raw != 0]
    return (
        not asked
        and not trained
        and max(recent, in_vain) < _MOST_RESTARTS
        and all(end.raw < 0 or end.code is ExitCode.PEER_LOST for end in failures)
    )


class _Process(Protocol):
    """Of subprocess.Popen what is needed here."""

    def poll(self) -> int | None: ...

    def send_signal(self, number: int, /) -> None: ...


@dataclass
class _Forked:
    """A child that was forked, with the same contract."""

    pid: int
    _ended: int | None = field(default=None, init=False)

    def poll(self) -> int | None:
        if self._ended is None:
            # A signal's handler may ask while we take an end in. It is told once: the call that
            # was interrupted has it.
            with contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self._ended = os.waitstatus_to_exitcode(status)
        return self._ended

    def send_signal(self, number: int) -> None:
        if self._ended is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class Ranks:
    """The rank processes of this pod."""

    def __init__(
        self,
        count: int,
        scratch: Path,
        module: str = "kubedistill_trainer.rank",
        *,
        in_place: bool = False,
    ) -> None:
        """`in_place`: whether ranks may be started again."""
        self._count = count
        self._scratch = scratch
        self._module = module
        self.fork: Callable[[int], NoReturn] | None = None
        """Runs a rank in a forked child, whose modules this process has imported; None for processes
        of their own."""
        self._in_place = in_place
        self._processes: list[_Process] = []
        self._began = self._started_at = time.monotonic()
        self._restarts_at: list[float] = []
        self._in_vain = 0
        self._reason = ""
        self._imported = False
        self.asked_to_stop = False

    def start(self) -> None:
        """One process a rank."""
        self._processes = []
        self._started_at = time.monotonic()
        for local_rank in range(self._count):
            for marker in (outcome_file, joined_file, committed_file, trained_file):
                marker(self._scratch, local_rank).unlink(missing_ok=True)
            self._processes.append(self._process(local_rank))
        if self.asked_to_stop:
            self._signal(signal.SIGTERM)

    def forward(self, number: int, frame: FrameType | None) -> None:
        """SIGTERM, once: the ranks agree among themselves what to do with it."""
        if not self.asked_to_stop:
            self.asked_to_stop = True
            self._signal(signal.SIGTERM)

    def wait(self) -> tuple[ExitCode, Outcome]:
        """Until all ranks have ended for good: after the first failure the others get a little
        time."""
        kills_before = _memory_kills()
        while True:
            ends = self._until_ended()
            if _memory_kills() > kills_before:
                return _out_of_memory()
            failed = any(end.raw != 0 for end in ends)
            if not (failed and self._in_place and self._may_restart(ends)):
                return _summary(ends, self._scratch)
            self._reason = _reason(ends)
            self._restarts_at.append(time.monotonic())
            self._in_vain += 1
            _log.warning(
                "the ranks are started again in place",
                extra={"restart": len(self._restarts_at), "reason": self._reason},
            )
            self.start()

    def _may_restart(self, ends: Sequence[End]) -> bool:
        if self._said_by_any(committed_file):
            self._in_vain = 0
        return may_restart(
            ends,
            self._restarts_at,
            time.monotonic(),
            in_vain=self._in_vain,
            asked=self.asked_to_stop,
            trained=self._said_by_any(trained_file),
        )

    def _said_by_any(self, marker: Callable[[Path, int], Path]) -> bool:
        return any(marker(self._scratch, rank).exists() for rank in range(self._count))

    def _until_ended(self) -> list[End]:
        ended: dict[int, End] = {}
        deadline = float("inf")
        while len(ended) < self._count:
            for rank, process in enumerate(self._processes):
                code = process.poll()
                if code is not None and rank not in ended:
                    ended[rank] = End(rank, code)
                    if code != 0:
                        deadline = min(deadline, time.monotonic() + _PEERS_END_SECONDS)
            if time.monotonic() > deadline or self._apart():
                self._signal(signal.SIGKILL)
            # While the ranks train, and not when the next ones are to be forked.
            if self.fork is not None and not self._imported:
                self._imported = import_as_told(imported_file(self._scratch, 0))
            time.sleep(_POLL_SECONDS)
        return list(ended.values())

    def _apart(self) -> bool:
        """Whether restarted ranks have waited for their peers long enough."""
        if not self._restarts_at or time.monotonic() - self._started_at < _JOIN_SECONDS:
            return False
        joined = all(joined_file(self._scratch, rank).exists() for rank in range(self._count))
        if not joined:
            self._in_place = False  # a peer's pod is gone: this pod has nothing to wait for
        return not joined

    def _process(self, local_rank: int) -> _Process:
        environment = self._restart().to_environment()
        if self.fork is None:
            command = [sys.executable, "-m", self._module, str(local_rank)]
            return subprocess.Popen(command, env=os.environ | environment)
        sys.stdout.flush()
        # The child has our handler for a moment: a SIGTERM that is meant for it waits until it has not.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            pid = os.fork()
            if pid == 0:
                _become(self.fork, local_rank, environment)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return _Forked(pid)

    def _restart(self) -> Restart:
        number = len(self._restarts_at)
        mean = (self._restarts_at[-1] - self._began) / number if number else None
        return Restart(number=number, reason=self._reason, mean_seconds=mean)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)


def _become(
    run: Callable[[int], NoReturn], local_rank: int, environment: dict[str, str]
) -> NoReturn:
    """The forked child."""
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        os.environ.update(environment)
        run(local_rank)
    finally:
        os._exit(int(ExitCode.UNKNOWN))


def _reason(ends: Sequence[End]) -> str:
    """The failure that explains the others, in words."""
    killed = next((end for end in ends if end.raw < 0), None)
    if killed is None:
        return "a peer was lost"
    return f"local rank {killed.local_rank} was ended by {signal.Signals(-killed.raw).name}"


def _memory_kills() -> int:
    """How many processes of this container the kernel has killed for its memory limit."""
    text = ""
    for file in _MEMORY_EVENTS:
        with contextlib.suppress(OSError):
            text += file.read_text()
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill "))


def _out_of_memory() -> tuple[ExitCode, Outcome]:
    code = ExitCode.OUT_OF_MEMORY
    message = "the kernel ended a process of this container: it had reached its memory limit"
    return code, Outcome(reason=policy(code).reason, message=message)


def _summary(ends: Sequence[End], scratch: Path) -> tuple[ExitCode, Outcome]:
    """The end that explains the others: the first to fail that knows why, or else the first."""
    failures = [end for end in ends if end.raw != 0]
    if not failures:
        return ExitCode.SUCCESS, _outcome_of(0, ExitCode.SUCCESS, scratch)
    telling = [end for end in failures if end.code not in _LEAST_TELLING]
    end = (telling or failures)[0]
    result = _outcome_of(end.local_rank, end.code, scratch)
    if end.raw < 0:
        text = f"local rank {end.local_rank} was ended by {signal.Signals(-end.raw).name}"
        if end.code is ExitCode.INTERRUPTED:
            text = "asked to stop before training began"
        result = Outcome(reason=policy(end.code).reason, message=text)
    return end.code, result


def _outcome_of(local_rank: int, code: ExitCode, scratch: Path) -> Outcome:
    try:
        return Outcome.model_validate_json(outcome_file(scratch, local_rank).read_text())
    except (OSError, ValidationError):
        message = f"local rank {local_rank} ended with code {int(code)} and left no outcome"
        return Outcome(reason=policy(code).reason, message=message)
