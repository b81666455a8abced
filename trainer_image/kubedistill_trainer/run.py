"""Run spec → method: the only place that knows them all."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from kubedistill_api.objective import Objective
from kubedistill_api.runspec import Outcome

from kubedistill_trainer import exporter
from kubedistill_trainer.checkpoint import Checkpointer
from kubedistill_trainer.compress.smaller import Cut
from kubedistill_trainer.context import (
    Context,
    committed_file,
    imported_file,
    joined_file,
    trained_file,
)
from kubedistill_trainer.data.dataset import Dataset, learns_text, load_dataset
from kubedistill_trainer.data.order import micro_batch_size
from kubedistill_trainer.evaluation.speak import Tick
from kubedistill_trainer.failures import refuse
from kubedistill_trainer.finishing import finish, tick_of
from kubedistill_trainer.imports import tell_late_imports
from kubedistill_trainer.losses import FeatureMatcher
from kubedistill_trainer.methods.engine import join_gang, wrap
from kubedistill_trainer.methods.interruption import Interruption
from kubedistill_trainer.methods.learn_text import TextTeacher, read_taught
from kubedistill_trainer.methods.objective import feature_pairs
from kubedistill_trainer.methods.request import job_request
from kubedistill_trainer.methods.shrink import shrink
from kubedistill_trainer.methods.signal import NoTeacher, Signal, online_teacher, stream_teacher
from kubedistill_trainer.methods.student import StudentWithLoss
from kubedistill_trainer.methods.train import Loop
from kubedistill_trainer.methods.untrained import Untrained
from kubedistill_trainer.models import load
from kubedistill_trainer.models.folder import download
from kubedistill_trainer.report.evaluate import heldout_perplexity
from kubedistill_trainer.report.work import Work
from kubedistill_trainer.teacher.digest import teacher_digest


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
        return _untrained(context, board, interruption, group, local_rank)
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
    teacher_folder = _download_teacher(context)
    tick = tick_of(board, interruption)
    model, cut = _student_model(context, dataset, teacher_folder, group, tick)
    objective = spec.distill.objective if spec.distill is not None else None
    features = _features(objective, model, teacher_folder)
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
    teacher = (
        TextTeacher(taught)
        if taught
        else _signal(context, dataset, teacher_folder, engine.device, features)
    )
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
        return finish(context, dataset, engine, teacher, board, interruption, group, work)
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


def _download_teacher(context: Context) -> Path | None:
    """The teacher's folder, where this process needs its weights."""
    spec, model = context.run.spec, context.run.teacher_model
    needed = spec.student.from_teacher is not None or (
        spec.teacher is not None and spec.teacher.delivery == "Online"
    )
    if model is None or not needed:
        return None
    folder = context.scratch / f"teacher-{context.rank}"
    download(context.open_store(model.uri), folder, "spec.teacher", model.digest)
    return folder


def _untrained(
    context: Context,
    board: exporter.ProgressBoard,
    interruption: Interruption,
    group: Any,
    local_rank: int,
) -> Outcome:
    """A method that changes a model without training it: nothing is committed on the way, and what
    is interrupted begins anew."""
    spec = context.run.spec
    dataset = load_dataset(context.run, context.open_store)
    tick = tick_of(board, interruption)
    interruption.has_work()
    board.update(phase="Evaluating", last_step_time=time.time())
    model = _loaded_student(context)
    whole = Untrained(_module(model, dataset), context.rank, local_rank)
    initial = heldout_perplexity(whole, dataset, context.rank, context.world_size, group, tick)
    assert spec.prune is not None
    model, cut = shrink(
        context, dataset, model, spec.prune.structured, "spec.prune.structured", group, tick
    )
    del whole
    engine = Untrained(_module(model, dataset), context.rank, local_rank)
    teacher_folder = _download_teacher(context)
    teacher = _signal(context, dataset, teacher_folder, engine.device, None)
    try:
        work = Work(initial_perplexity=initial, cut=cut)
        return finish(context, dataset, engine, teacher, board, interruption, group, work)
    finally:
        teacher.close()


def _module(model: Any, dataset: Dataset) -> StudentWithLoss:
    return StudentWithLoss(model, None, dataset.tokenizer.vocab_size)


def _student_model(
    context: Context,
    dataset: Dataset,
    teacher_folder: Path | None,
    group: Any,
    tick: Tick,
) -> tuple[Any, Cut | None]:
    """The student as it starts, and how it was cut out of its teacher where it was. A collective."""
    spec = context.run.spec
    dtype = load.dtype_of(spec.training.precision)
    vocab_size, length = dataset.tokenizer.vocab_size, dataset.packed.sequence_length
    if spec.student.config is not None:
        config = load.config_of(spec.student.config, vocab_size, "spec.student.config", length)
        return load.random_model(config, spec.training.seed, dtype), None
    wanted = spec.student.from_teacher
    if wanted is None or teacher_folder is None:
        return _loaded_student(context), None
    teacher = load.load_model(teacher_folder, "spec.teacher", dtype)
    return shrink(context, dataset, teacher, wanted, "spec.student.fromTeacher", group, tick)


def _loaded_student(context: Context) -> Any:
    source = context.run.student_model
    if source is None:
        raise refuse("spec.student", "no start", "give model, fromJob, fromTeacher or config")
    folder = context.scratch / f"student-{context.rank}"
    download(context.open_store(source.uri), folder, "spec.student", source.digest)
    dtype = load.dtype_of(context.run.spec.training.precision)
    return load.load_model(folder, "spec.student", dtype)


def _features(
    objective: Objective | None, model: Any, teacher_folder: Path | None
) -> FeatureMatcher | None:
    """The feature terms, if the objective has any; in the type of the student's weights."""
    if objective is None or not objective.features or teacher_folder is None:
        return None
    teacher = json.loads((teacher_folder / "config.json").read_text())
    pairs = feature_pairs(
        objective, model.config.num_hidden_layers, int(teacher["num_hidden_layers"])
    )
    matcher = FeatureMatcher(pairs, model.config.hidden_size, int(teacher["hidden_size"]))
    return matcher.to(next(model.parameters()).dtype)


def _signal(
    context: Context,
    dataset: Dataset,
    teacher_folder: Path | None,
    device: torch.device,
    features: FeatureMatcher | None,
) -> Signal:
    spec = context.run.spec
    if spec.teacher is None or learns_text(spec):
        return NoTeacher()
    if spec.teacher.delivery == "Online" and teacher_folder is not None:
        layers = features.teacher_layers if features else ()
        dtype = load.dtype_of(spec.training.precision)
        return online_teacher(teacher_folder, dtype, device, layers)
    if spec.distill is None:
        return NoTeacher()  # its pod has written what it makes of the held-out text
    asked = job_request(context.run, dataset, context.open_store)
    temperature = spec.distill.objective.temperature
    return stream_teacher(context, dataset, asked.request, asked.config, temperature, device)
