"""One rank: `python -m kubedistill_trainer.rank LOCAL_RANK`, started by the launcher."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from kubedistill_api.exit_codes import ExitCode
from kubedistill_api.runspec import Outcome

from kubedistill_trainer import exporter, logs, outcome
from kubedistill_trainer.context import (
    Context,
    read_run_spec,
    restart_of_environment,
    scratch_directory,
)
from kubedistill_trainer.failures import refuse
from kubedistill_trainer.imports import quiet_collector
from kubedistill_trainer.methods.interruption import Interruption

_log = logging.getLogger(__name__)
_OUTCOME_BYTES = 16 << 10


def outcome_file(scratch: Path, local_rank: int) -> Path:
    """Where a rank leaves its outcome for the launcher."""
    return scratch / f"outcome-{local_rank}.json"


def meeting_file(scratch: Path) -> Path:
    """Where the processes of a split teacher meet."""
    return scratch / "meeting"


def main() -> None:
    """Run this rank; exit with its code at once, since gloo threads may hang on a dead peer."""
    run(int(sys.argv[1]))


def import_all() -> None:
    """What takes the time of a start. The engine would import it late, with the collector at work.

    The model's architecture is not known yet: see `imports.tell_late_imports`.
    """
    import deepspeed  # noqa: F401

    import kubedistill_trainer.run  # noqa: F401
    from kubedistill_trainer.store.connection import load_descriptions

    load_descriptions()


def run(local_rank: int) -> NoReturn:
    """The rank of this number within its pod, in this process."""
    spec = read_run_spec()
    if spec.rendezvous is None:
        raise SystemExit(int(ExitCode.BAD_CONFIGURATION))
    ranks_per_node = spec.rendezvous.ranks_per_node
    rank = int(os.environ.get("JOB_COMPLETION_INDEX", "0")) * ranks_per_node + local_rank
    logs.set_up(job=spec.name, namespace=spec.namespace, attempt=spec.attempt, rank=rank)
    world_size = spec.rendezvous.nodes * ranks_per_node
    context = Context(spec, scratch_directory(), rank, world_size, restart=restart_of_environment())
    interruption = Interruption(float(spec.termination_grace_seconds))
    board = exporter.ProgressBoard(spec.attempt)
    board.update(rank_restarts=context.restart.number, restart_reason=context.restart.reason)

    def work() -> tuple[ExitCode, Outcome]:
        exporter.serve(board, local_rank)
        with quiet_collector():
            import_all()
            from kubedistill_trainer.run import run_student

        _check_device(context)
        return ExitCode.SUCCESS, run_student(context, board, interruption, local_rank)

    leave(context, local_rank, work, board)


def leave(
    context: Context,
    local_rank: int,
    work: Callable[[], tuple[ExitCode, Outcome]],
    board: exporter.ProgressBoard | None = None,
) -> NoReturn:
    """Do the work, leave its outcome for the launcher, and exit with its code.

    The outcome has its room on the disk from the beginning: where the disk is full, it says so.
    """
    room = context.scratch / f"outcome-{local_rank}.room"
    with suppress(OSError):
        room.write_bytes(bytes(_OUTCOME_BYTES))
    try:
        code, result = work()
    except BaseException as error:
        code, result = outcome.of_exception(error, accepted=True)
        if board is not None:
            report = board.report.model_copy(update={"teacher_stream": None})
            result = result.model_copy(update={"progress": report})
        _log.error("run ended", exc_info=error, extra={"code": int(code)})
    try:
        room.unlink(missing_ok=True)
        outcome_file(context.scratch, local_rank).write_text(result.model_dump_json(by_alias=True))
    except OSError as error:  # the code still says what happened
        _log.error("the outcome cannot be written", exc_info=error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code))


def _check_device(context: Context) -> None:
    """GPUs asked for and none to be seen is a fault of the node or image, not a slow run."""
    import torch

    asked = context.run.spec.workers.gpus_per_node
    if asked and not torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        raise refuse(
            "spec.workers.gpusPerNode",
            f"{asked} GPUs asked for, no CUDA device visible in the pod",
            "check driver and image, set gpusPerNode: 0, or set DS_ACCELERATOR=cpu to count GPUs "
            "without using them",
        )


if __name__ == "__main__":
    main()
