"""Container entry: `kubedistill-trainer preflight | teacher | student | report`.

As PID 1 of a student pod it waits until its peers have names, starts one process a rank, forwards
SIGTERM once, and turns the ranks' ends into one exit code and one termination message.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from types import FrameType

from kubedistill_api.exit_codes import ExitCode, policy
from kubedistill_api.runspec import Outcome, RunSpec
from pydantic import ValidationError

from kubedistill_trainer import logs, outcome
from kubedistill_trainer.context import Context, read_run_spec, scratch_directory
from kubedistill_trainer.failures import RunFailure
from kubedistill_trainer.imports import quiet_collector
from kubedistill_trainer.interrupt import interrupt
from kubedistill_trainer.rank import meeting_file, outcome_file

_log = logging.getLogger(__name__)
_PEER_TIMEOUT_SECONDS = 300.0
_PEERS_END_SECONDS = 15.0
_POLL_SECONDS = 0.1
_LEAST_TELLING = (ExitCode.PEER_LOST, ExitCode.UNKNOWN)


def main() -> None:
    """Run the role that the container's argument names."""
    role = sys.argv[1] if len(sys.argv) == 2 else ""
    if role not in _roles:
        sys.stderr.write(f"usage: kubedistill-trainer {' | '.join(_roles)}\n")
        raise SystemExit(int(ExitCode.BAD_CONFIGURATION))
    try:
        run = read_run_spec()
        logs.set_up(job=run.name, namespace=run.namespace, attempt=run.attempt, role=role)
        code, result = _roles[role](run)
    except (Exception, KeyboardInterrupt) as error:
        code, result = outcome.of_exception(error)
        if isinstance(error, ValidationError):
            code = ExitCode.BAD_CONFIGURATION
        _log.error("run ended", exc_info=error, extra={"code": int(code)})
    outcome.write_termination_message(result)
    sys.stdout.flush()
    # Daemon threads of libraries must not hold up a container that is done.
    os._exit(int(code))


def _preflight(run: RunSpec) -> tuple[ExitCode, Outcome]:
    from kubedistill_trainer.preflight import run_preflight

    return ExitCode.SUCCESS, run_preflight(Context(run, scratch_directory()))


def _teacher(run: RunSpec) -> tuple[ExitCode, Outcome]:
    teacher = run.spec.teacher
    if teacher is not None and teacher.endpoint is None and teacher.workers.gpus_per_replica > 1:
        return _split_teacher(teacher.workers.gpus_per_replica)
    from kubedistill_trainer import exporter
    from kubedistill_trainer.data.dataset import learns_text

    signal.signal(signal.SIGTERM, interrupt)
    board = exporter.ProgressBoard(run.attempt)
    exporter.serve(board)
    partition = int(os.environ.get("JOB_COMPLETION_INDEX", "0"))
    context = Context(run, scratch_directory(), partition=partition)
    with quiet_collector():
        if learns_text(run.spec) and run.teacher_model is None:
            from kubedistill_trainer.methods.write_text import run_endpoint_teacher as write
        elif learns_text(run.spec):
            from kubedistill_trainer.methods.own_teacher import run_own_teacher as write
        else:
            from kubedistill_trainer.methods.generate import run_teacher as write

    try:
        return ExitCode.SUCCESS, write(context, board)
    except Exception as error:
        code, result = outcome.of_exception(error)
        _log.error("run ended", exc_info=error, extra={"code": int(code)})
        return code, result.model_copy(update={"progress": board.report})


def _report(run: RunSpec) -> tuple[ExitCode, Outcome]:
    from kubedistill_trainer.report.sweep import write_trials

    return ExitCode.SUCCESS, write_trials(Context(run, scratch_directory()))


def _split_teacher(shards: int) -> tuple[ExitCode, Outcome]:
    """A process for each part of the teacher."""
    meeting_file(scratch_directory()).unlink(missing_ok=True)
    gang = _Ranks(shards, "kubedistill_trainer.teacher_rank")
    signal.signal(signal.SIGTERM, gang.forward)
    gang.start()
    return gang.wait()


def _student(run: RunSpec) -> tuple[ExitCode, Outcome]:
    rendezvous = run.rendezvous
    if rendezvous is None:
        raise RunFailure(ExitCode.BAD_CONFIGURATION, "run.json has no rendezvous")
    gang = _Ranks(rendezvous.ranks_per_node)
    signal.signal(signal.SIGTERM, gang.forward)
    if not wait_for_name(rendezvous.host, _PEER_TIMEOUT_SECONDS, lambda: gang.asked_to_stop):
        if gang.asked_to_stop:
            raise RunFailure(ExitCode.INTERRUPTED, "asked to stop before the ranks were started")
        raise RunFailure(
            ExitCode.PEER_LOST,
            f"{rendezvous.host} has no address after {_PEER_TIMEOUT_SECONDS:.0f} s",
        )
    gang.start()
    return gang.wait()


def wait_for_name(host: str, timeout_seconds: float, stop: Callable[[], bool]) -> bool:
    """Whether `host` got an address in time. DNS of a headless Service follows its pods."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline and not stop():
        try:
            socket.getaddrinfo(host, None)
        except socket.gaierror:
            time.sleep(0.25)
        else:
            return True
    return False


class _Ranks:
    """The rank processes of this pod."""

    def __init__(self, count: int, module: str = "kubedistill_trainer.rank") -> None:
        self._count = count
        self._module = module
        self._processes: list[subprocess.Popen[bytes]] = []
        self.asked_to_stop = False

    def start(self) -> None:
        """One process a rank."""
        for local_rank in range(self._count):
            outcome_file(scratch_directory(), local_rank).unlink(missing_ok=True)
            command = [sys.executable, "-m", self._module, str(local_rank)]
            self._processes.append(subprocess.Popen(command))
        if self.asked_to_stop:
            self._signal(signal.SIGTERM)

    def forward(self, number: int, frame: FrameType | None) -> None:
        """SIGTERM, once: the ranks agree among themselves what to do with it."""
        if not self.asked_to_stop:
            self.asked_to_stop = True
            self._signal(signal.SIGTERM)

    def wait(self) -> tuple[ExitCode, Outcome]:
        """Until all ranks have ended: after the first failure the others get a little time."""
        ended: list[tuple[int, int]] = []
        deadline = float("inf")
        while len(ended) < self._count:
            for rank, process in enumerate(self._processes):
                code = process.poll()
                if code is not None and rank not in [r for r, _ in ended]:
                    ended.append((rank, code))
                    if code != 0:
                        deadline = min(deadline, time.monotonic() + _PEERS_END_SECONDS)
            if time.monotonic() > deadline:
                self._signal(signal.SIGKILL)
            time.sleep(_POLL_SECONDS)
        return _summary(ended)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)


def _summary(ended: list[tuple[int, int]]) -> tuple[ExitCode, Outcome]:
    """The end that explains the others: the first to fail that knows why, or else the first."""
    failures = [(rank, code) for rank, code in ended if code != 0]
    if not failures:
        return ExitCode.SUCCESS, _outcome_of(0, ExitCode.SUCCESS)
    telling = [f for f in failures if _known(f[1]) not in _LEAST_TELLING]
    rank, raw = (telling or failures)[0]
    code = _known(raw)
    result = _outcome_of(rank, code)
    if raw < 0:
        text = f"local rank {rank} was ended by {signal.Signals(-raw).name}"
        result = Outcome(reason=policy(code).reason, message=text)
    return code, result


def _known(raw: int) -> ExitCode:
    try:
        return ExitCode(raw)
    except ValueError:
        return ExitCode.UNKNOWN


def _outcome_of(local_rank: int, code: ExitCode) -> Outcome:
    try:
        return Outcome.model_validate_json(
            outcome_file(scratch_directory(), local_rank).read_text()
        )
    except (OSError, ValidationError):
        message = f"local rank {local_rank} ended with code {int(code)} and left no outcome"
        return Outcome(reason=policy(code).reason, message=message)


_roles = {
    "preflight": _preflight,
    "teacher": _teacher,
    "student": _student,
    "report": _report,
}

if __name__ == "__main__":
    main()
