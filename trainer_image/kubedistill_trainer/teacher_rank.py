"""One process of a teacher that is split over a pod's GPUs, started by the launcher."""

from __future__ import annotations

import os
import signal
import sys

from kubedistill_api.exit_codes import ExitCode
from kubedistill_api.runspec import Outcome

from kubedistill_trainer import exporter, logs
from kubedistill_trainer.context import Context, read_run_spec, scratch_directory
from kubedistill_trainer.failures import refuse
from kubedistill_trainer.imports import quiet_collector
from kubedistill_trainer.interrupt import interrupt
from kubedistill_trainer.rank import leave, meeting_file


def main() -> None:
    """`python -m kubedistill_trainer.teacher_rank LOCAL_RANK`."""
    local_rank = int(sys.argv[1])
    run = read_run_spec()
    logs.set_up(job=run.name, namespace=run.namespace, attempt=run.attempt, role="teacher")
    signal.signal(signal.SIGTERM, interrupt)
    partition = int(os.environ.get("JOB_COMPLETION_INDEX", "0"))
    context = Context(run, scratch_directory(), rank=local_rank, partition=partition)
    board = exporter.ProgressBoard(run.attempt)
    leave(context, local_rank, lambda: (ExitCode.SUCCESS, _run(context, board)))


def _run(context: Context, board: exporter.ProgressBoard) -> Outcome:
    with quiet_collector():
        import torch

        from kubedistill_trainer.data.dataset import learns_text
        from kubedistill_trainer.methods import generate, own_teacher, sharding

    teacher = context.run.spec.teacher
    size = teacher.workers.gpus_per_replica if teacher else 1
    if not torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        raise refuse(
            sharding.FIELD,
            f"{size} GPUs asked for, no CUDA device visible in the pod",
            "check driver and image, or set DS_ACCELERATOR=cpu to count GPUs without using them",
        )
    if context.rank == 0:
        exporter.serve(board)
    group = sharding.join(meeting_file(context.scratch), context.rank, size)
    text = learns_text(context.run.spec) or context.run.spec.compares
    if context.rank > 0:
        follow = own_teacher.follow_own_teacher if text else generate.follow_teacher
        return follow(context, group)
    run = own_teacher.run_own_teacher if text else generate.run_teacher
    outcome = run(context, board, group)
    sharding.dismiss(group)
    return outcome


if __name__ == "__main__":
    main()
