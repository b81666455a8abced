"""Run spec → method: the only place that knows them all."""

from __future__ import annotations

import json
import logging
import math
import time
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from kubedistill_api.exit_codes import ExitCode
from kubedistill_api.objective import Objective
from kubedistill_api.runspec import Outcome
from kubedistill_api.status import Metric, WeakestSlice

from kubedistill_trainer import exporter
from kubedistill_trainer.checkpoint import Checkpointer
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
from kubedistill_trainer.failures import RunFailure, refuse
from kubedistill_trainer.imports import tell_late_imports
from kubedistill_trainer.losses import FeatureMatcher
from kubedistill_trainer.methods.engine import join_gang, wrap
from kubedistill_trainer.methods.gathering import gather_teacher
from kubedistill_trainer.methods.held_out import NotComparable, held_out_teacher
from kubedistill_trainer.methods.interruption import Interruption
from kubedistill_trainer.methods.learn_text import TextTeacher, read_taught
from kubedistill_trainer.methods.objective import feature_pairs
from kubedistill_trainer.methods.request import job_request
from kubedistill_trainer.methods.signal import NoTeacher, Signal, online_teacher, stream_teacher
from kubedistill_trainer.methods.student import StudentWithLoss
from kubedistill_trainer.methods.train import Loop
from kubedistill_trainer.models import load
from kubedistill_trainer.models.export import gather_weights, publish_folder, write_folder
from kubedistill_trainer.models.folder import download
from kubedistill_trainer.models.sizes import check_layers
from kubedistill_trainer.report.compare import Comparison, compare
from kubedistill_trainer.report.document import Finished, document, files
from kubedistill_trainer.report.evaluate import evaluate, heldout_perplexity
from kubedistill_trainer.report.figures import Evaluation
from kubedistill_trainer.report.table import table
from kubedistill_trainer.teacher.digest import teacher_digest
from kubedistill_trainer.teacher.learn import TaughtText

_log = logging.getLogger(__name__)
_VITAL = "perplexity"
"""The figure without which a student is worth nothing."""
_DISTRIBUTION = "teacher.distribution"
"""The name of what is not measured where a teacher is known by its text only."""


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
    model = _student_model(context, dataset, teacher_folder)
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
        return _finish(context, dataset, engine, teacher, board, interruption, group, loop, taught)
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


def _student_model(context: Context, dataset: Dataset, teacher_folder: Path | None) -> Any:
    spec = context.run.spec
    dtype = load.dtype_of(spec.training.precision)
    vocab_size, length = dataset.tokenizer.vocab_size, dataset.packed.sequence_length
    if spec.student.config is not None:
        config = load.config_of(spec.student.config, vocab_size, "spec.student.config", length)
        return load.random_model(config, spec.training.seed, dtype)
    if spec.student.from_teacher is not None and teacher_folder is not None:
        teacher = load.load_model(teacher_folder, "spec.teacher", dtype)
        check_layers(teacher.config.num_hidden_layers, spec.student.from_teacher.layers)
        return load.fewer_layers(teacher, spec.student.from_teacher.layers)
    source = context.run.student_model
    if source is None:
        raise refuse("spec.student", "no start", "give model, fromJob, fromTeacher or config")
    folder = context.scratch / f"student-{context.rank}"
    download(context.open_store(source.uri), folder, "spec.student", source.digest)
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
    if spec.distill is None or spec.teacher is None or learns_text(spec):
        return NoTeacher()
    if spec.teacher.delivery == "Online" and teacher_folder is not None:
        layers = features.teacher_layers if features else ()
        dtype = load.dtype_of(spec.training.precision)
        return online_teacher(teacher_folder, dtype, device, layers)
    asked = job_request(context.run, dataset, context.open_store)
    temperature = spec.distill.objective.temperature
    return stream_teacher(context, dataset, asked.request, asked.config, temperature, device)


def _finish(
    context: Context,
    dataset: Dataset,
    engine: Any,
    teacher: Signal,
    board: exporter.ProgressBoard,
    interruption: Interruption,
    group: Any,
    loop: Loop,
    taught: TaughtText | None = None,
) -> Outcome:
    """Evaluate on the held-out text on all ranks; ask, report and export on rank 0."""
    board.update(phase="Evaluating")
    if not gather_teacher(
        teacher,
        dataset.split.heldout,
        group,
        asked=lambda: interruption.asked,
        alive=lambda: board.update(last_step_time=time.time()),
    ):
        raise _stopped_in_evaluation()
    found, incomparable = _held_beside(context, dataset, engine, teacher, group)
    weights = gather_weights(engine)
    if weights is None:
        return Outcome(reason="Completed", message="rank 0 exports")
    folder = context.scratch / "export"
    parameters = write_folder(engine.module.model, weights, dataset.tokenizer.files, folder)
    del weights
    tick = _tick(board, interruption)
    compared = compare(context, dataset, folder, teacher, engine.device, tick)
    compared.problems.update(incomparable)
    metrics = _publish(found, loop.initial_perplexity, compared)
    board.update(phase="Exporting")
    finished = Finished(
        context.run,
        dataset,
        parameters,
        metrics,
        found,
        loop.history.points,
        loop.watch,
        loop.exported_step,
        compared,
        taught,
    )
    content = document(finished)
    for line in table(content):
        _log.info(line)
    status = publish_folder(folder, files(finished, content), parameters, context.models_store)
    board.update(phase="Done")
    _log.info("model exported", extra={"uri": status.uri})
    return Outcome(
        reason="Completed",
        message="model exported",
        progress=board.report.model_copy(update={"teacher_stream": teacher.status()}),
        model=status,
        metrics=metrics,
        weakest=[
            WeakestSlice(metric=name, source=part.name, tokens=part.tokens)
            for name, part in found.weakest().items()
        ],
    )


def _held_beside(
    context: Context, dataset: Dataset, engine: Any, teacher: Signal, group: Any
) -> tuple[Evaluation, dict[str, str]]:
    """Held-out figures, and why there are none beside the teacher, if so. A collective."""
    ranks = context.rank, context.world_size, group
    if not isinstance(teacher, TextTeacher):
        return evaluate(engine, teacher, dataset, *ranks), {}
    try:
        beside = held_out_teacher(context, dataset, engine.device)
    except NotComparable as reason:
        return evaluate(engine, teacher, dataset, *ranks), {_DISTRIBUTION: str(reason)}
    with closing(beside):
        found = evaluate(engine, beside, dataset, *ranks)
    return found, {_DISTRIBUTION: beside.problem} if beside.problem else {}


def _tick(board: exporter.ProgressBoard, interruption: Interruption) -> Tick:
    """Shows that the evaluation goes on, and ends it when the pod is to stop: the next attempt
    finds the last step committed."""

    def tick() -> None:
        board.update(last_step_time=time.time())
        if interruption.asked:
            raise _stopped_in_evaluation()

    return tick


def _stopped_in_evaluation() -> RunFailure:
    text = "asked to stop while the student was evaluated"
    return RunFailure(ExitCode.GRACEFUL_CHECKPOINT, text)


def _publish(found: Evaluation, initial: float | None, compared: Comparison) -> list[Metric]:
    """The figures for the status, which are this process's metrics from now on.

    RunFailure for a student whose perplexity is no number.
    """
    metrics = found.metrics + compared.metrics
    if initial is not None:
        metrics.append(Metric(name="initialPerplexity", value=initial))
    broken = [metric.name for metric in metrics if not math.isfinite(metric.value)]
    if _VITAL in broken:
        raise RunFailure(
            ExitCode.UNKNOWN,
            "the held-out perplexity after the last step is not a number: training has diverged; "
            "lower spec.training.learningRate",
        )
    if broken:
        # The API server would refuse a status with them in it.
        _log.warning("figures that are no numbers are left out: %s", ", ".join(broken))
        metrics = [metric for metric in metrics if metric.name not in broken]
    for metric in metrics:
        exporter.EVALUATION.labels(metric.name).set(metric.value)
        if metric.name == "teacherAgreement":
            exporter.AGREEMENT.set(metric.value)
    return metrics
