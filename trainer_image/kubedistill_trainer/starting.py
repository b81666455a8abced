"""Models and teacher as a run starts with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kubedistill_api.objective import Objective

from kubedistill_trainer.compress.smaller import Cut
from kubedistill_trainer.compress.sparsity import SparsityRecord, read_record
from kubedistill_trainer.context import Context
from kubedistill_trainer.data.dataset import Dataset, learns_text
from kubedistill_trainer.failures import refuse
from kubedistill_trainer.losses import FeatureMatcher
from kubedistill_trainer.methods.objective import feature_pairs
from kubedistill_trainer.methods.request import job_request
from kubedistill_trainer.methods.shrink import shrink
from kubedistill_trainer.methods.signal import NoTeacher, Signal, online_teacher, stream_teacher
from kubedistill_trainer.models import load
from kubedistill_trainer.models.folder import download


def download_teacher(context: Context) -> Path | None:
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


def student_folder(context: Context) -> Path:
    return context.scratch / f"student-{context.rank}"


def student_record(context: Context) -> SparsityRecord | None:
    """The record of the zeros that the student began with; None for one that began dense."""
    return read_record(student_folder(context))


def student_model(
    context: Context,
    dataset: Dataset,
    teacher_folder: Path | None,
    group: Any,
    tick: Callable[[], None],
    device: torch.device,
) -> tuple[Any, Cut | None]:
    """The student as it starts, and how it was cut out of its teacher where it was. A collective.

    `device`: where a teacher is looked at, a layer at a time.
    """
    spec = context.run.spec
    dtype = load.dtype_of(spec.training.precision)
    vocab_size, length = dataset.tokenizer.vocab_size, dataset.packed.sequence_length
    if spec.student.config is not None:
        config = load.config_of(spec.student.config, vocab_size, "spec.student.config", length)
        return load.random_model(config, spec.training.seed, dtype), None
    wanted = spec.student.from_teacher
    if wanted is None or teacher_folder is None:
        return loaded_student(context), None
    teacher = load.load_model(teacher_folder, "spec.teacher", dtype)
    field = "spec.student.fromTeacher"
    return shrink(context, dataset, teacher, wanted, field, group, tick, device)


def loaded_student(context: Context) -> Any:
    source = context.run.student_model
    if source is None:
        raise refuse("spec.student", "no start", "give model, fromJob, fromTeacher or config")
    folder = student_folder(context)
    download(context.open_store(source.uri), folder, "spec.student", source.digest)
    dtype = load.dtype_of(context.run.spec.training.precision)
    return load.load_model(folder, "spec.student", dtype)


def features_of(
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


def signal_of(
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
