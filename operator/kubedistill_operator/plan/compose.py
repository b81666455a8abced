"""From a chain to its stages' specs: template and stage merged, the teacher passed down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kubedistill_api.chain import DistillationChainSpec, GatePolicy
from kubedistill_api.job import METHODS, UNTRAINED
from kubedistill_api.names import stage_job_name
from kubedistill_api.sweep import Sweep

_EXCLUSIVE = {
    "teacher": ("model", "fromJob", "endpoint"),
    "student": ("model", "fromJob", "fromTeacher", "config"),
}


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7386: objects merge, null removes, everything else replaces."""
    if not isinstance(patch, Mapping):
        return patch
    result = dict(target) if isinstance(target, Mapping) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merge_patch(result.get(name), value)
    return result


def compose(
    chain: str,
    spec: DistillationChainSpec,
    index: int,
    *,
    students: Mapping[str, str] | None = None,
    temperature: float | None = None,
    retry: int = 0,
) -> dict[str, Any]:
    """The spec of a stage's job, not yet validated; `suspend` is the chain's.

    `students`: stage → the job that makes its student, where that is not <chain>-<stage>.
    `temperature`: the spec of that trial of the stage's sweep. `retry`: of that retry, from 1.
    """
    stage = spec.stages[index].job_part()
    if retry:
        stage = merge_patch(stage, spec.stages[index].retries[retry - 1])
    base = _put_aside(dict(spec.template), stage)
    merged: dict[str, Any] = merge_patch(base, stage)
    merged.pop("suspend", None)
    merged["onGateFailure"] = "Continue" if policy_of(spec, index) == "Continue" else "Fail"
    # A stage's job is there for as long as its chain is: it would be made, and run, again.
    merged.pop("ttlSecondsAfterFinished", None)
    previous = None
    if index:
        before = spec.stages[index - 1].name
        previous = (students or {}).get(before, stage_job_name(chain, before))
    _pass_down(merged, spec, index, previous)
    if merged.get("quantize") is not None:
        _in_one_process(merged, stage)
    sweep = spec.stages[index].sweep
    if temperature is not None and sweep is not None:
        _make_trial(merged, sweep, temperature)
    return merged


def _in_one_process(merged: dict[str, Any], stage: Mapping[str, Any]) -> None:
    """The gang of a stage that quantises is one rank, whatever the template's are, unless the stage
    says otherwise itself (and is refused)."""
    own = stage.get("workers")
    own = own if isinstance(own, Mapping) else {}
    workers = dict(merged["workers"]) if isinstance(merged.get("workers"), Mapping) else {}
    workers.pop("minNodes", None)
    if "nodes" not in own:
        workers["nodes"] = 1
    if "gpusPerNode" not in own and workers.get("gpusPerNode") != 0:
        workers["gpusPerNode"] = 1
    merged["workers"] = workers


def policy_of(spec: DistillationChainSpec, index: int) -> GatePolicy:
    """What follows where a stage's student breaks a gate."""
    return spec.stages[index].on_gate_failure or spec.on_gate_failure


def _make_trial(merged: dict[str, Any], sweep: Sweep, temperature: float) -> None:
    """One temperature to learn at, and all of them in what is asked of the stream.

    What a stream holds may depend on its temperatures: so all trials ask for the same one.
    """
    merged["distill"] = merge_patch(merged["distill"], {"objective": {"temperature": temperature}})
    if merged["teacher"].get("delivery") != "Online":
        merged["teacher"]["temperatures"] = sorted(sweep.temperature)


def _put_aside(template: dict[str, Any], stage: Mapping[str, Any]) -> dict[str, Any]:
    """What of a template a stage's own choice replaces instead of merging with."""
    for method in METHODS:
        if stage.get(method) is not None:
            for other in (*METHODS, *(() if method == "distill" else ("teacher",))):
                if other not in stage:
                    template.pop(other, None)
    for part, sources in _EXCLUSIVE.items():
        own, shared = stage.get(part), template.get(part)
        if not isinstance(own, Mapping) or not isinstance(shared, Mapping):
            continue
        if any(own.get(source) is not None for source in sources):
            template[part] = {k: v for k, v in shared.items() if k not in sources}
    return template


def _pass_down(
    merged: dict[str, Any], spec: DistillationChainSpec, index: int, previous: str | None
) -> None:
    """The default teacher of a distilling stage, and the default student of any other.

    A stage that does not distil goes on from the stage before it: what the template says of students
    is meant for the stages that distil. One that does not train either is compared with what it was
    made of, which is small enough beside a student without an optimizer.
    """
    if merged.get("distill") is not None:
        teacher = merged.get("teacher")
        teacher = dict(teacher) if isinstance(teacher, Mapping) else {}
        if not any(teacher.get(source) is not None for source in _EXCLUSIVE["teacher"]):
            if previous is not None:
                teacher["fromJob"] = {"name": previous}
            elif spec.initial_teacher is not None:
                teacher["model"] = spec.initial_teacher.model.to_wire()
        if teacher:
            merged["teacher"] = teacher
    elif spec.stages[index].job_part().get("student") is None and previous is not None:
        merged["student"] = {"fromJob": {"name": previous}}
        untrained = any(merged.get(method) is not None for method in UNTRAINED)
        if untrained and merged.get("teacher") is None:
            merged["teacher"] = {"fromJob": {"name": previous}, "delivery": "Online"}
