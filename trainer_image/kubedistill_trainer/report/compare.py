"""Student and teacher, asked the same: rank 0's part of a job's end."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from kubedistill_api.status import Metric

from kubedistill_trainer.context import Context
from kubedistill_trainer.data.dataset import Dataset
from kubedistill_trainer.evaluation import record
from kubedistill_trainer.evaluation.measure import Plan, measure, plan_of
from kubedistill_trainer.evaluation.prompts import asking
from kubedistill_trainer.evaluation.results import Abilities
from kubedistill_trainer.evaluation.speak import Tick
from kubedistill_trainer.evaluation.suites import run_suites
from kubedistill_trainer.evaluation.teacher import request_of_teacher, tokenizer_of_teacher
from kubedistill_trainer.methods.signal import OnlineTeacher, Signal
from kubedistill_trainer.models.export import weights_on_disk
from kubedistill_trainer.models.load import dtype_of, load_model

_log = logging.getLogger(__name__)
_NO_RECORD = (
    "no figures of it are in the store: its stream was there before they were asked for, or its "
    "pod has not measured it"
)


@dataclass(frozen=True)
class Comparison:
    """What was asked, and what was found of both models.

    `disk_bytes`: of the weights on disk, student's and teacher's (None where there is none).
    `suites`: metrics of lm-eval's tasks, of the student. `problems`: why a part is not there.
    """

    plan: Plan
    student: Abilities
    teacher: Abilities | None
    disk_bytes: tuple[int, int | None]
    suites: dict[str, dict[str, float]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def metrics(self) -> list[Metric]:
        """For the status: groups of tasks and questions, the teacher's by names of their own."""
        found = self.student.figures()
        if self.teacher is not None:
            taught = self.teacher.figures(beside=self.student)
            found |= {f"teacher{name[0].upper()}{name[1:]}": v for name, v in taught.items()}
        return [Metric(name=name, value=value) for name, value in found.items()]


def compare(
    context: Context, dataset: Dataset, folder: Path, teacher: Signal, device: Any, tick: Tick
) -> Comparison:
    """Ask the student that lies in `folder`, and find or ask its teacher.

    The other ranks have ended, so there is no collective in here. `tick` raises RunFailure where
    the pod was asked to stop.
    """
    spec = context.run.spec
    plan = plan_of(spec.evaluation, context.open_store)
    _log.info("asking the student", extra={"tasks": [task.name for task in plan.tasks]})
    student = _student(dataset, folder, dtype_of(spec.training.precision), plan, device, tick)
    problems = {f"student.{name}": why for name, why in student.problems.items()}
    suites = _suites(context, folder, device, problems)
    taught = _teacher(context, dataset, plan, teacher, tick, problems)
    disk = (weights_on_disk(folder), _teacher_disk_bytes(context))
    return Comparison(plan, student, taught, disk, suites, problems)


def _student(
    dataset: Dataset, folder: Path, dtype: torch.dtype, plan: Plan, device: Any, tick: Tick
) -> Abilities:
    """What the student says; where it does not fit beside its training state, nothing."""
    way = asking(dataset.tokenizer, "spec.data.tokenizer")
    model = load_model(folder, "the exported student", dtype)
    try:
        model = model.to(device).eval()
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        _log.warning("the student is not measured: %s", error)
        why = "memory ran out beside the training state"
        return Abilities.none(way.prompting, why, plan.problems)
    return measure(model, way, plan, tick)


def _suites(
    context: Context, folder: Path, device: Any, problems: dict[str, str]
) -> dict[str, dict[str, float]]:
    names = context.run.spec.evaluation.lm_eval
    if not names:
        return {}
    try:
        return run_suites(names, folder, str(device))
    except Exception as error:  # a data set that cannot be reached must not cost the model
        _log.exception("lm-eval is not measured")
        problems["lmEval"] = f"{type(error).__name__}: {error}"[:300]
        return {}


def _teacher(
    context: Context,
    dataset: Dataset,
    plan: Plan,
    teacher: Signal,
    tick: Tick,
    problems: dict[str, str],
) -> Abilities | None:
    """Of the teacher in this process, or what its own pod has left in the store."""
    if context.run.spec.teacher is None:
        return None
    if isinstance(teacher, OnlineTeacher):
        found: Abilities | None = measure(
            teacher.model, asking(dataset.tokenizer, "spec.teacher"), plan, tick
        )
    else:
        tokenizer = tokenizer_of_teacher(context, dataset.tokenizer)
        request = request_of_teacher(context, plan, tokenizer)
        found = record.awaited(context.storage, request, tick)
    if found is None:
        problems["teacher"] = _NO_RECORD
        return None
    problems |= {f"teacher.{name}": why for name, why in found.problems.items()}
    return found


def _teacher_disk_bytes(context: Context) -> int | None:
    source = context.run.teacher_model
    if source is None or context.run.spec.teacher is None:
        return None
    files = context.open_store(source.uri).list("")
    return sum(f.size_bytes for f in files if "/" not in f.key and f.key.endswith(".safetensors"))
