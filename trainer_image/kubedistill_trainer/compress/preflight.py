"""What a job makes of a model that is there, looked at before anybody loads it: without torch."""

from __future__ import annotations

from typing import Any

from kubedistill_api.pruning import Smaller

from kubedistill_trainer.compress.planning import Plan, planned
from kubedistill_trainer.compress.precision import (
    SPARSITY_RECORD,
    check_blocks,
    check_not_quantized,
    check_quantizable,
)
from kubedistill_trainer.context import Context
from kubedistill_trainer.failures import refuse
from kubedistill_trainer.models.folder import read_config
from kubedistill_trainer.models.weights import tensors_in
from kubedistill_trainer.store import Store


def check_change(context: Context, teacher_config: dict[str, Any] | None) -> None:
    """What cannot be made of the student: one that is quantised can be asked, and neither trained nor
    changed any more."""
    run = context.run
    if run.spec.student.from_teacher is not None and teacher_config is not None:
        check_not_quantized(teacher_config, "spec.teacher")
    if run.student_model is None or run.spec.evaluate is not None:
        return
    store = context.open_store(run.student_model.uri)
    config = read_config(store, "spec.student")
    check_not_quantized(config, "spec.student")
    sparse = run.spec.prune.unstructured if run.spec.prune is not None else None
    if sparse is not None and sparse.pattern == "2:4":
        check_blocks(config, "spec.prune.unstructured.pattern")
    if run.spec.quantize is not None:
        check_quantizable(run.spec.quantize, config, store.head(SPARSITY_RECORD) is not None)


def cut_of(context: Context, teacher_config: dict[str, Any] | None) -> tuple[str, Plan] | None:
    """The field that says what is kept of a model, and what that may come to; None for no such."""
    run, spec = context.run, context.run.spec
    if (
        spec.prune is not None
        and spec.prune.structured is not None
        and run.student_model is not None
    ):
        store = context.open_store(run.student_model.uri)
        field = "spec.prune.structured"
        return field, _planned(
            store, read_config(store, "spec.student"), spec.prune.structured, field
        )
    if spec.student.from_teacher is None:
        return None
    field = "spec.student.fromTeacher"
    if teacher_config is None or run.teacher_model is None:
        raise refuse(field, "no teacher", "give spec.teacher")
    store = context.open_store(run.teacher_model.uri)
    return field, _planned(store, teacher_config, spec.student.from_teacher, field)


def _planned(store: Store, config: dict[str, Any], wanted: Smaller, field: str) -> Plan:
    tied = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    shapes = {t.name: t.shape for t in tensors_in(store, field) if t.name not in tied}
    return planned(wanted, config, shapes, field)
