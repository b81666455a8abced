"""The end of every method: the student is evaluated, asked, reported and exported."""

from __future__ import annotations

import logging
import math
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kubedistill_api.exit_codes import ExitCode
from kubedistill_api.runspec import Outcome, ResolvedModel
from kubedistill_api.status import Metric, WeakestSlice

from kubedistill_trainer import exporter
from kubedistill_trainer.compress.sparsity import zeros_of
from kubedistill_trainer.context import Context
from kubedistill_trainer.data.dataset import Dataset
from kubedistill_trainer.evaluation.speak import Tick
from kubedistill_trainer.failures import RunFailure
from kubedistill_trainer.methods.gathering import gather_teacher
from kubedistill_trainer.methods.held_out import NotComparable, held_out_teacher
from kubedistill_trainer.methods.interruption import Interruption
from kubedistill_trainer.methods.learn_text import TextTeacher
from kubedistill_trainer.methods.signal import Signal
from kubedistill_trainer.models.export import (
    gather_weights,
    publish_folder,
    publish_report,
    write_folder,
)
from kubedistill_trainer.report.compare import Comparison, compare
from kubedistill_trainer.report.document import Finished, document, files
from kubedistill_trainer.report.evaluate import evaluate
from kubedistill_trainer.report.figures import Evaluation
from kubedistill_trainer.report.table import table
from kubedistill_trainer.report.work import Work
from kubedistill_trainer.starting import student_record

_log = logging.getLogger(__name__)
_VITAL = "perplexity"
"""The figure without which a student is worth nothing."""
_DISTRIBUTION = "teacher.distribution"
"""The name of what is not measured where a teacher's distribution is not to be had."""


@dataclass(frozen=True)
class Product:
    """A finished model in a folder on this disk. `source`: where it lies in the store already, of one
    that was only looked at."""

    folder: Path
    parameters: int
    source: ResolvedModel | None = None


def finish(
    context: Context,
    dataset: Dataset,
    engine: Any,
    teacher: Signal,
    board: exporter.ProgressBoard,
    interruption: Interruption,
    group: Any,
    work: Work,
    product: Product | None = None,
) -> Outcome:
    """Evaluate on the held-out text on all ranks; ask, report and export on rank 0.

    `engine`: of DeepSpeed, or what stands for it where nothing was trained. `product`: the model on
    rank 0's disk, where it is not to be made of the engine's weights.
    """
    board.update(phase="Evaluating")
    if not gather_teacher(
        teacher,
        dataset.split.heldout,
        group,
        asked=lambda: interruption.asked,
        alive=lambda: board.update(last_step_time=time.time()),
    ):
        raise stopped_in_evaluation()
    found, incomparable = _held_beside(context, dataset, engine, teacher, group)
    product = product or _product(context, dataset, engine)
    if product is None or context.rank > 0:
        return Outcome(reason="Completed", message="rank 0 exports")
    folder, parameters = product.folder, product.parameters
    tick = tick_of(board, interruption)
    compared = compare(context, dataset, folder, teacher, engine.device, tick)
    compared.problems.update(incomparable)
    metrics = _publish(found, work.initial_perplexity, compared)
    board.update(phase="Exporting")
    finished = Finished(
        context.run,
        dataset,
        parameters,
        metrics,
        found,
        work,
        compared,
        zeros_of(folder),
    )
    content = document(finished)
    for line in table(content):
        _log.info(line)
    documents = files(finished, content)
    if product.source is not None:
        status = publish_report(documents, product.source, parameters, context.models_store)
        message = "model evaluated"
    else:
        status = publish_folder(folder, documents, parameters, context.models_store)
        message = "model exported"
    board.update(phase="Done")
    _log.info(message, extra={"uri": status.uri})
    return Outcome(
        reason="Completed",
        message=message,
        progress=board.report.model_copy(update={"teacher_stream": teacher.status()}),
        model=status,
        metrics=metrics,
        weakest=[
            WeakestSlice(metric=name, source=part.name, tokens=part.tokens)
            for name, part in found.weakest().items()
        ],
    )


def _product(context: Context, dataset: Dataset, engine: Any) -> Product | None:
    """Written of the engine's weights by rank 0; None on the others. A collective under ZeRO-3."""
    weights = gather_weights(engine)
    if weights is None:
        return None
    folder = context.scratch / "export"
    parameters = write_folder(engine.module.model, weights, dataset.tokenizer.files, folder)
    record = student_record(context) if context.run.spec.trains else None
    if record is not None:
        record.write(folder)
    return Product(folder, parameters)


def _held_beside(
    context: Context, dataset: Dataset, engine: Any, teacher: Signal, group: Any
) -> tuple[Evaluation, dict[str, str]]:
    """Held-out figures, and why there are none beside the teacher, if so. A collective."""
    ranks = context.rank, context.world_size, group
    spec = context.run.spec
    streamed = spec.compares and spec.teacher is not None and spec.teacher.delivery == "Stream"
    if not isinstance(teacher, TextTeacher) and not streamed:
        return evaluate(engine, teacher, dataset, *ranks), {}
    try:
        beside = held_out_teacher(context, dataset, engine.device)
    except NotComparable as reason:
        return evaluate(engine, teacher, dataset, *ranks), {_DISTRIBUTION: str(reason)}
    with closing(beside):
        found = evaluate(engine, beside, dataset, *ranks)
    return found, {_DISTRIBUTION: beside.problem} if beside.problem else {}


def tick_of(board: exporter.ProgressBoard, interruption: Interruption) -> Tick:
    """Shows that the evaluation goes on, and ends it when the pod is to stop: the next attempt
    finds the last step committed."""

    def tick() -> None:
        board.update(last_step_time=time.time())
        if interruption.asked:
            raise stopped_in_evaluation()

    return tick


def stopped_in_evaluation() -> RunFailure:
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
