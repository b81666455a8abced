"""Run spec → method: the only place that knows them all."""

from __future__ import annotations

import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch.distributed as dist
from kubedistill_api.runspec import Outcome

from kubedistill_trainer import exporter
from kubedistill_trainer.checkpoint import Checkpointer
from kubedistill_trainer.context import (
    Context,
    committed_file,
    imported_file,
    joined_file,
    trained_file,
)
from kubedistill_trainer.data.dataset import Dataset, load_dataset
from kubedistill_trainer.data.order import micro_batch_size
from kubedistill_trainer.failures import refuse
from kubedistill_trainer.finishing import finish
from kubedistill_trainer.imports import tell_late_imports
from kubedistill_trainer.methods.engine import join_gang, wrap
from kubedistill_trainer.methods.interruption import Interruption
from kubedistill_trainer.methods.learn_text import TextTeacher, read_taught
from kubedistill_trainer.methods.masks import hold_zeros
from kubedistill_trainer.methods.signal import NoTeacher
from kubedistill_trainer.methods.student import StudentWithLoss
from kubedistill_trainer.methods.train import Loop
from kubedistill_trainer.methods.untrained import device_of
from kubedistill_trainer.report.evaluate import heldout_perplexity
from kubedistill_trainer.report.work import Work
from kubedistill_trainer.starting import (
    download_teacher,
    features_of,
    signal_of,
    student_model,
    student_record,
)
from kubedistill_trainer.teacher.digest import teacher_digest
from kubedistill_trainer.untrained import run_untrained


def run_student(
    context: Context, board: exporter.ProgressBoard, interruption: Interruption, local_rank: int
) -> Outcome:
    """One rank of the gang, from rendezvous to the exported model."""
    run, spec = context.run, context.run.spec
    rendezvous = run.rendezvous
    if rendezvous is None:
        raise refuse("rendezvous", "nothing", "the operator gives it to student pods")
    groups = join_gang(
        rendezvous.host, rendezvous.port, context.rank, context.world_size, local_rank
    )
    group = groups.control
    joined_file(context.scratch, local_rank).touch()
    if not spec.trains:
        return run_untrained(context, board, interruption, group, local_rank)
    checkpointer = Checkpointer(
        store=context.run_store,
        scratch=context.scratch / f"checkpoint-{context.rank}",
        fence=run.fence,
        attempt=f"{run.uid}-{run.attempt}",
        rank=context.rank,
        world_size=context.world_size,
        config_digest=run.inputs_digest,
        keep_last=spec.checkpoint.keep_last,
        control_group=group,
        upload_group=groups.uploads,
        memory_limit_bytes=run.memory_limit_bytes,
        node_scratch=context.scratch,
        local_rank=local_rank,
        run=f"{run.namespace}/{run.name}/{run.uid}",
        restart=context.restart.number,
        config=run.configuration(),
        known_step=run.committed_step or 0,
        committed=partial(_touch, committed_file(context.scratch, local_rank)),
        waits=partial(_waits, board),
        alive=board.show_life,
    )
    checkpointer.open()
    checkpointer.abort_earlier_uploads(context.models_store)
    taught = read_taught(context)
    dataset = load_dataset(run, context.open_store, taught.learnt.conversations if taught else ())
    checkpointer.pin_inputs(_inputs(context, dataset))
    teacher_folder = download_teacher(context)
    device = device_of(local_rank)
    model, cut = student_model(context, dataset, teacher_folder, group, board.show_life, device)
    objective = spec.distill.objective if spec.distill is not None else None
    features = features_of(objective, model, teacher_folder)
    module = StudentWithLoss(model, objective, dataset.tokenizer.vocab_size, features)
    micro = micro_batch_size(
        spec.training.global_batch_size // context.world_size,
        run.micro_batch_size or spec.training.micro_batch_size,
    )
    if spec.training.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    # DeepSpeed makes groups of its own, and would wait half an hour for a rank that died while it
    # loaded; this group has patience with a slow one, and notices a dead one at once.
    _waits(board, True)
    dist.barrier(groups.uploads)
    _waits(board, False)
    engine = wrap(module, spec.training, context.world_size, micro)
    record = student_record(context)
    if record is not None:
        hold_zeros(model, record.tensors)
    signal = partial(signal_of, context, dataset, teacher_folder, engine.device, features)
    teacher = TextTeacher(taught) if taught else NoTeacher() if spec.compares else signal()
    measured = partial(heldout_perplexity, engine, dataset, context.rank, context.world_size, group)
    loop = Loop(
        context, dataset, engine, teacher, checkpointer, board, interruption, group, measured
    )
    tell_late_imports(imported_file(context.scratch, local_rank))
    try:
        loop.run()
        trained_file(context.scratch, local_rank).touch()
        work = Work(
            loop.initial_perplexity,
            loop.history.points,
            loop.watch,
            loop.exported_step,
            cut,
            taught,
        )
        beside = signal() if spec.compares else teacher
        return finish(context, dataset, engine, beside, board, interruption, group, work)
    finally:
        teacher.close()


def _waits(board: exporter.ProgressBoard, waiting: bool) -> None:
    """While a gang starts, its own work has the time that it takes; the operator counts how long this
    rank waits for peers, of which one may be frozen."""
    if board.report.phase == "Starting":
        board.update(last_step_time=time.time() if waiting else None)


def _inputs(context: Context, dataset: Dataset) -> dict[str, str]:
    """Digests of what this rank reads, under their fields' names, as far as nothing else pins it.

    A stream is pinned by its address, and so are answers: a repair may write others.
    """
    found = {
        "data.sources": dataset.files_digest,
        "data tokens (tokenizer, template, sequenceLength)": dataset.packing_digest,
    }
    spec, model = context.run.spec, context.run.teacher_model
    if spec.teacher is not None and spec.teacher.delivery == "Online" and model is not None:
        found["teacher"] = teacher_digest(model, context.open_store(model.uri))
    return found


def _touch(marker: Path) -> None:
    """A disk that has no room for a marker does not undo what it marks."""
    with suppress(OSError):
        marker.touch()
