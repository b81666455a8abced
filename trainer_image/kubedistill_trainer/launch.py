"""Container entry: `kubedistill-trainer preflight | teacher | student | report`.

As PID 1 of a student pod it waits until its peers have names, starts one process a rank, starts them
again where one was killed, forwards SIGTERM once, and turns the ranks' ends into one exit code and
one termination message.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from kubedistill_api.exit_codes import ExitCode
from kubedistill_api.runspec import Outcome, RunSpec
from pydantic import ValidationError

from kubedistill_trainer import logs, outcome
from kubedistill_trainer.context import Context, read_run_spec, scratch_directory
from kubedistill_trainer.failures import RunFailure
from kubedistill_trainer.imports import quiet_collector
from kubedistill_trainer.interrupt import interrupt
from kubedistill_trainer.rank import meeting_file
from kubedistill_trainer.ranks import Ranks

_log = logging.getLogger(__name__)
_PEER_TIMEOUT_SECONDS = 300.0


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
        elif learns_text(run.spec) or run.spec.compares:
            from kubedistill_trainer.methods.own_teacher import run_own_teacher as write
        else:
            from kubedistill_trainer.methods.generate import run_teacher as write

    try:
        return ExitCode.SUCCESS, write(context, board)
    except Exception as error:
        code, result = outcome.of_exception(error, accepted=True)
        _log.error("run ended", exc_info=error, extra={"code": int(code)})
        return code, result.model_copy(update={"progress": board.report})


def _report(run: RunSpec) -> tuple[ExitCode, Outcome]:
    from kubedistill_trainer.report.sweep import write_trials

    return ExitCode.SUCCESS, write_trials(Context(run, scratch_directory()))


def _split_teacher(shards: int) -> tuple[ExitCode, Outcome]:
    """A process for each part of the teacher."""
    scratch = scratch_directory()
    meeting_file(scratch).unlink(missing_ok=True)
    gang = Ranks(shards, scratch, "kubedistill_trainer.teacher_rank")
    signal.signal(signal.SIGTERM, gang.forward)
    gang.start()
    return gang.wait()


def _student(run: RunSpec) -> tuple[ExitCode, Outcome]:
    rendezvous = run.rendezvous
    if rendezvous is None:
        raise RunFailure(ExitCode.BAD_CONFIGURATION, "run.json has no rendezvous")
    gang = Ranks(rendezvous.ranks_per_node, scratch_directory(), in_place=True)
    # Before the imports: PID 1 does not get a signal that it has no handler for.
    signal.signal(signal.SIGTERM, gang.forward)
    if _may_fork(run):
        gang.fork = _imported_rank()
    if not wait_for_name(rendezvous.host, _PEER_TIMEOUT_SECONDS, lambda: gang.asked_to_stop):
        if gang.asked_to_stop:
            raise RunFailure(ExitCode.INTERRUPTED, "asked to stop before the ranks were started")
        raise RunFailure(
            ExitCode.PEER_LOST,
            f"{rendezvous.host} has no address after {_PEER_TIMEOUT_SECONDS:.0f} s",
        )
    gang.start()
    return gang.wait()


def _may_fork(run: RunSpec) -> bool:
    """Whether ranks are forked off this process, which has imported for all of them.

    Not where they use GPUs: what a library might do to CUDA before the fork was never tried on one.
    """
    on_cpu = run.spec.workers.gpus_per_node == 0 or os.environ.get("DS_ACCELERATOR") == "cpu"
    return os.environ.get("KUBEDISTILL_FORK_RANKS", "1" if on_cpu else "0") == "1"


def _imported_rank() -> Callable[[int], NoReturn]:
    with quiet_collector():
        from kubedistill_trainer import rank

        rank.import_all()
    return rank.run


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


_roles = {
    "preflight": _preflight,
    "teacher": _teacher,
    "student": _student,
    "report": _report,
}

if __name__ == "__main__":
    main()
