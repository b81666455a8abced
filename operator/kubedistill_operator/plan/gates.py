"""Gates: can this job measure what they ask for, and does its student keep them.

They are no part of what a job is trained from, and may change at any time. Whether they hold
follows from the spec and the figures in the status alone, and is looked at anew in every pass: a
bound that is loosened lets a finished job succeed, and one that is tightened lets it fail, without
a step of training. What was started on its model meanwhile goes on.
"""

from __future__ import annotations

from collections.abc import Iterator

from kubedistill_api import reasons
from kubedistill_api.evaluation import SIMPLE_TASKS
from kubedistill_api.gates import Gate, GateResult, failures, judged
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.metrics import METRICS, OF_A_TEACHER, TEACHERS
from kubedistill_api.runspec import Problem

from kubedistill_operator.plan.draft import Draft, Pass
from kubedistill_operator.plan.spelling import one_of

OF_ITS_DISTRIBUTION = OF_A_TEACHER - {"teacherAgreement"}
"""Figures that need all of them: a Sparse stream holds the likeliest tokens, a Sampled one draws."""
OF_SIMPLE_TASKS = frozenset({"simpleAccuracy", "teacherSimpleAccuracy"})
OF_MULTI_STEP_TASKS = frozenset({"multiStepAccuracy", "teacherMultiStepAccuracy"})
OF_TASKS = OF_SIMPLE_TASKS | OF_MULTI_STEP_TASKS
OF_QUESTIONS = frozenset(
    {
        "questionAccuracy", "hallucinationRate", "teacherQuestionAccuracy",
        "teacherHallucinationRate",
    }
)  # fmt: skip
_FIGURES_SHOWN = 6


def unmeasured(metric: str, spec: DistillationJobSpec) -> str:
    """Why a job with this spec cannot have a known metric; empty where it can, or may."""
    if metric == "initialPerplexity" and spec.student.config is not None:
        return "which is measured of a student that starts with weights, not from `config`"
    if metric in OF_TASKS | OF_QUESTIONS:
        return _unasked(metric, spec)
    if metric not in OF_A_TEACHER:
        return ""
    if spec.teacher is None:
        return "a figure beside a teacher, and the job has none"
    if spec.distill is None:
        return ""
    if spec.distill.signal != "Logits":
        if spec.teacher.endpoint is None:
            return ""  # the teacher's own pod writes it down, where the tokenizers are one
        return "which needs a teacher's logits, and of a server there is its text only"
    payload = spec.teacher.payload if spec.teacher.delivery == "Stream" else "Hidden"
    if payload == "Sampled" or (payload == "Sparse" and metric in OF_ITS_DISTRIBUTION):
        return f"which needs more of the teacher than `payload: {payload}` holds (Hidden holds all of it)"
    return ""


def _unasked(metric: str, spec: DistillationJobSpec) -> str:
    """Why nobody is asked for a figure of tasks or questions."""
    if spec.evaluation.examples == 0:
        return "and `evaluation.examples: 0` asks nothing"
    if metric in OF_TASKS and not spec.evaluation.tasks:
        return "and `evaluation.tasks` names none"
    tasks = set(spec.evaluation.tasks)
    if metric in OF_SIMPLE_TASKS and not tasks & SIMPLE_TASKS:
        return "and `evaluation.tasks` names none of one step, such as chain_sum"
    if metric in OF_MULTI_STEP_TASKS and tasks <= SIMPLE_TASKS:
        return "and `evaluation.tasks` names none of several steps, such as gsm_symbolic"
    if metric.startswith("teacher") and spec.teacher is None:
        return "a figure of a teacher, and the job has none"
    return ""


def problems_of(spec: DistillationJobSpec, *, in_chain: bool = False) -> Iterator[Problem]:
    """Gates on figures that nobody knows, or that this job will not have.

    `in_chain`: of a stage, whose chain fills in the first teacher's figures (plan/references.py).
    """
    for index, gate in enumerate(spec.gates):
        field = f"spec.gates[{index}].metric"
        if gate.metric not in METRICS:
            yield Problem(
                field=field,
                found=f"{gate.metric} (no such metric)",
                expected=one_of(tuple(METRICS), gate.metric),
            )
        elif why := unmeasured(gate.metric, spec):
            known = [name for name in METRICS if not unmeasured(name, spec)]
            yield Problem(field=field, found=f"{gate.metric}, {why}", expected=one_of(known))
        elif gate.relative_to is not None:
            yield from _relative_problems(gate, spec, f"spec.gates[{index}]", in_chain)


def _relative_problems(
    gate: Gate, spec: DistillationJobSpec, field: str, in_chain: bool
) -> Iterator[Problem]:
    """Gates on figures that nothing is there to divide by."""
    taught = TEACHERS.get(gate.metric)
    if taught is None:
        yield Problem(
            field=f"{field}.metric",
            found=f"{gate.metric}, which a teacher does not have",
            expected=f"{one_of(tuple(TEACHERS))}, or leave `relativeTo` out",
        )
    elif gate.relative_to == "Teacher" and (why := unmeasured(taught, spec)):
        yield Problem(
            field=f"{field}.relativeTo", found=f"{taught}, {why}", expected="leave it out"
        )
    elif gate.relative_to == "FirstTeacher" and gate.reference is None and not in_chain:
        yield Problem(
            field=f"{field}.relativeTo",
            found="FirstTeacher, whose figure is not known",
            expected="write it in a stage of a chain, which fills it in, or give `reference`",
        )


def settle(step: Pass) -> None:
    """GatesPassed; and where there is a model, with it how the job ended."""
    draft, spec = step.draft, step.spec
    results = judged(spec.gates, {m.name: m.value for m in draft.status.metrics})
    if draft.status.model is None:
        if spec.gates:
            asked = ", ".join(dict.fromkeys(gate.metric for gate in spec.gates))
            draft.set(reasons.GATES_PASSED, "Unknown", reasons.NOT_EVALUATED, asked)
        else:
            draft.set(reasons.GATES_PASSED, "True", reasons.NOT_NEEDED)
        return
    if failed := failures(results):
        message = _failure(draft, failed)
        draft.set(reasons.GATES_PASSED, "False", reasons.GATE_FAILED, message)
        if spec.on_gate_failure == "Continue":
            _complete(draft, f"gates that do not hold: {message}")
            return
        draft.fail(reasons.GATE_FAILED, message)
        draft.set(reasons.RUNNING, "False", reasons.COMPLETED)
        return
    kept = "; ".join(result.sentence() for result in results)
    draft.set(
        reasons.GATES_PASSED, "True", reasons.GATES_MET if results else reasons.NOT_NEEDED, kept
    )
    _complete(draft)


def _complete(draft: Draft, but: str = "") -> None:
    model = draft.status.model
    assert model is not None
    figures = ", ".join(f"{m.name} {m.value:.4g}" for m in draft.status.metrics[:_FIGURES_SHOWN])
    stream = draft.status.teacher_stream
    learnt = stream.learnt if stream else ""
    parts = [f"{model.parameters:,} parameters", learnt, figures, but]
    message = "; ".join(filter(None, parts))
    if draft.set(reasons.SUCCEEDED, "True", reasons.COMPLETED, message):
        draft.tell(reasons.COMPLETED, f"the student is at {model.uri}: {message}")


def _failure(draft: Draft, failed: list[GateResult]) -> str:
    """Figures and bounds, and the text on which these figures are worst."""
    metrics = {result.metric for result in failed}
    weakest = [slice_.source for slice_ in draft.status.weakest if slice_.metric in metrics]
    message = "; ".join(
        result.sentence() if result.metric in METRICS else _unknown(result) for result in failed
    )
    return f"{message}; weakest: {', '.join(dict.fromkeys(weakest))}" if weakest else message


def _unknown(result: GateResult) -> str:
    """Of a gate that was given after the job had started, too late to be refused."""
    return f"{result.metric}: no such metric, {one_of(tuple(METRICS), result.metric)}"
