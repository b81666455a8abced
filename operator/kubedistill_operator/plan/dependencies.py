"""Models of other jobs: wait for them readably, never silently."""

from __future__ import annotations

from collections.abc import Mapping

from kubedistill_api import reasons
from kubedistill_api.references import JobReference, ModelSource
from kubedistill_api.runspec import ResolvedModel

from kubedistill_operator.plan.actions import Inputs
from kubedistill_operator.plan.draft import OtherJob, Pass
from kubedistill_operator.plan.inputs import dependency_names, inputs_digest


def find_cycle(
    name: str, depends_on: tuple[str, ...], others: Mapping[str, OtherJob]
) -> list[str] | None:
    """The circle of jobs that leads from `name` back to it, both ends named; None without one."""
    stack = [(dependency, [name]) for dependency in reversed(depends_on)]
    seen: set[str] = set()
    while stack:
        current, path = stack.pop()
        if current == name:
            return [*path, name]
        if current in seen or current not in others:
            continue
        seen.add(current)
        following = reversed(others[current].depends_on)
        stack.extend((dependency, [*path, current]) for dependency in following)
    return None


def resolve(step: Pass) -> Inputs | None:
    """The models' places, or None with the reason in the conditions."""
    draft, seen, spec = step.draft, step.seen, step.spec
    wanted = dependency_names(spec.to_wire())
    circle = find_cycle(seen.name, wanted, seen.other_jobs)
    if circle:
        text = " → ".join(circle)
        message = f"these jobs wait for each other: {text}; give one of them a model of its own"
        draft.set(reasons.DEPENDENCIES_READY, "False", reasons.DEPENDENCY_CYCLE, message)
        draft.fail(reasons.DEPENDENCY_CYCLE, message)
        return None
    for name in wanted:
        if not _ready(step, name):
            return None
    draft.set(
        reasons.DEPENDENCIES_READY, "True",
        reasons.DEPENDENCIES_MET if wanted else reasons.NOT_NEEDED,
    )  # fmt: skip
    teacher = None
    if spec.teacher is not None:
        teacher = _resolved(step, spec.teacher.model, spec.teacher.from_job)
    student = _resolved(step, spec.student.model, spec.student.from_job)
    return Inputs(inputs_digest(spec, teacher, student), teacher, student)


def _ready(step: Pass, name: str) -> bool:
    draft, other = step.draft, step.seen.other_jobs.get(name)
    namespace = step.seen.namespace
    if other is None:
        reason = reasons.DEPENDENCY_NOT_FOUND
        message = (
            f"there is no DistillationJob {name} in namespace {namespace}: "
            "create it, or correct fromJob.name"
        )
    elif other.succeeded == "True" and other.model_uri:
        return True
    elif other.succeeded == "False":
        reason = reasons.DEPENDENCY_FAILED
        message = (
            f"DistillationJob {name} failed ({other.reason}): {other.message}; "
            "mend it and apply it again, this job continues by itself"
        )
    else:
        reason = reasons.WAITING_FOR_DEPENDENCY
        # Not its progress: that would change with every step and write this status too.
        message = f"DistillationJob {name} has not finished yet"
    changed = draft.set(reasons.DEPENDENCIES_READY, "False", reason, message)
    # The state says why in a word: waiting is calm, the others want a person.
    draft.summary(reason, message)
    if changed:
        draft.tell(reason, message, warning=reason != reasons.WAITING_FOR_DEPENDENCY)
    return False


def _resolved(
    step: Pass, model: ModelSource | None, from_job: JobReference | None
) -> ResolvedModel | None:
    if from_job is not None:
        other = step.seen.other_jobs[from_job.name]
        return ResolvedModel(uri=other.model_uri, digest=other.model_digest, job=other.name)
    return ResolvedModel(uri=model.uri) if model else None
