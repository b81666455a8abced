"""Gates of a stage that are relative to the chain's first teacher: what its figure is.

The first teacher is that of the first stage that distils, whose job measured it. A later stage's job
gets the figure in the gate's `reference`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kubedistill_api.gates import Gate
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.metrics import TEACHERS
from kubedistill_api.runspec import Problem

from kubedistill_operator.plan.stages import StageJob

_FIRST = "FirstTeacher"


@dataclass(frozen=True)
class FirstTeacher:
    """The stage that it teaches, that stage's (or its first trial's) spec, and, once it is there, the
    job of the student that goes on."""

    stage: str
    spec: DistillationJobSpec
    job: StageJob | None = None


def problems_of(spec: DistillationJobSpec, first: FirstTeacher | None) -> Iterator[Problem]:
    """Why the first teacher's figures say nothing of this stage's student.

    `first`: None for the stage that it teaches itself.
    """
    for index, gate in enumerate(spec.gates):
        if gate.relative_to != _FIRST:
            continue
        field = f"spec.gates[{index}].relativeTo"
        if first is None:
            if spec.distill is None:
                yield Problem(
                    field=field,
                    found="FirstTeacher, and no stage so far that distils",
                    expected="write `relativeTo: Teacher`, or leave it out",
                )
        elif (spec.data, spec.training.seed) != (first.spec.data, first.spec.training.seed):
            yield Problem(
                field=field,
                found=f"FirstTeacher, which stage {first.stage} measured on other held-out text",
                expected="give both stages the same `data` and `training.seed`",
            )
        elif _ended(first) and gate.metric in TEACHERS and _figure(gate, first) is None:
            yield Problem(
                field=field,
                found=f"FirstTeacher, of which stage {first.stage} has no {TEACHERS[gate.metric]}",
                expected="write a metric that it has",
            )


def referred(spec: DistillationJobSpec, first: FirstTeacher | None) -> DistillationJobSpec:
    """The spec with what is known of the first teacher in its gates."""
    if not any(gate.relative_to == _FIRST for gate in spec.gates):
        return spec
    return spec.model_copy(update={"gates": [_referred(gate, first) for gate in spec.gates]})


def _referred(gate: Gate, first: FirstTeacher | None) -> Gate:
    if gate.relative_to != _FIRST:
        return gate
    if first is None:
        return gate.model_copy(update={"relative_to": "Teacher"})
    return gate.model_copy(update={"reference": _figure(gate, first)})


def _ended(first: FirstTeacher) -> bool:
    return first.job is not None and first.job.succeeded.status == "True"


def _figure(gate: Gate, first: FirstTeacher) -> float | None:
    metrics = first.job.status.metrics if first.job is not None else []
    return next((m.value for m in metrics if m.name == TEACHERS.get(gate.metric)), None)
