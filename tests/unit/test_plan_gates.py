"""Gates: which figures a job can have, whether its student keeps them, and what follows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from kubedistill_api import reasons
from kubedistill_api.gates import Gate, judged
from kubedistill_api.metrics import METRICS
from kubedistill_api.status import DistillationJobStatus, Metric, ModelStatus, WeakestSlice
from kubedistill_operator.plan import gates
from kubedistill_operator.plan.actions import CreateStageJob, Plan, SetStageFields
from kubedistill_operator.plan.draft import Observed
from kubedistill_operator.plan.inputs import inputs_digest, parse_spec
from kubedistill_operator.plan.job import plan_job
from kubedistill_operator.plan.stages import StageJob
from test_plan_chain import DONE, stage_job, succeeded
from test_plan_chain import seen as chain_seen
from test_plan_chain import settled as chain_settled
from test_plan_kit import (
    NOW,
    TIMING,
    ended,
    gang_job,
    message,
    observed,
    reason,
    settled,
    spec,
    started,
    state,
)

RATIO = {"metric": "perplexityRatio", "max": 1.15}
ONLINE = {"model": {"uri": "s3://models/big"}, "delivery": "Online"}
NAN = float("nan")


@pytest.mark.parametrize(
    ("gate", "value", "sentence"),
    [
        ({"max": 1.15}, 1.15, ""),
        ({"max": 1.15}, 1.31, "perplexityRatio 1.31 > 1.15"),
        ({"max": 1.15}, 1.1500001, "perplexityRatio 1.1500001 > 1.15"),
        ({"min": 0.5}, 0.5, ""),
        ({"min": 0.5}, 0.49, "perplexityRatio 0.49 < 0.5"),
        ({"min": 1, "max": 2}, 1.5, ""),
        ({"min": 1, "max": 2}, 0.9, "perplexityRatio 0.9 < 1"),
        ({"min": 1, "max": 2}, 2.5, "perplexityRatio 2.5 > 2"),
        ({"max": 0}, 0.0, ""),
        ({"min": -1}, float("inf"), ""),
        ({"max": 9}, float("inf"), "perplexityRatio inf > 9"),
        ({"max": 9}, NAN, "perplexityRatio is not a number"),
        ({"min": 0}, NAN, "perplexityRatio is not a number"),
        ({"max": 9}, None, "perplexityRatio was not measured"),
    ],
)
def test_a_gate_and_a_figure(gate: dict[str, float], value: float | None, sentence: str) -> None:
    bound = Gate.model_validate({"metric": "perplexityRatio"} | gate)
    figures = {} if value is None else {"perplexityRatio": value}
    [result] = judged([bound], figures)
    assert result.passed == (sentence == "")
    assert not sentence or result.sentence() == sentence


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ({}, "spec.gates[0]: found no bound; give `min` or `max`"),
        ({"min": 2, "max": 1}, "spec.gates[0].min: found 2; at most `max`, 1"),
        ({"max": "1.15"}, 'spec.gates[0].max: found "1.15"; write a number'),
        ({"maximum": 1}, "spec.gates[0].maximum: found 1; there is no such field"),
    ],
)
def test_bounds_that_cannot_be_kept_are_refused(bounds: dict[str, Any], words: str) -> None:
    _, problems = parse_spec(spec(gates=[{"metric": "perplexity"} | bounds]))
    assert words in "; ".join(problem.sentence() for problem in problems)


@pytest.mark.parametrize(
    ("thought", "generation", "words"),
    [
        ({"minReasoningTokens": 512, "maxReasoningTokens": 512}, {}, ""),
        (
            {"minReasoningTokens": 50, "maxReasoningTokens": 10},
            {},
            "at most `maxReasoningTokens`, 10",
        ),
        ({"minReasoningTokens": 513}, {}, "at most `distill.generation.maxTokens`, 512"),
        ({"minReasoningTokens": 16}, {"generation": {"maxTokens": 16}}, ""),
        (
            {"minReasoningTokens": 17},
            {"generation": {"maxTokens": 16}},
            "generation.maxTokens`, 16",
        ),
    ],
)
def test_reasoning_that_no_answer_can_have_is_refused(
    thought: dict[str, Any], generation: dict[str, Any], words: str
) -> None:
    distill = {"signal": "ChainOfThought", "chainOfThought": thought, **generation}
    asked = {"uri": "s3://data/x.jsonl", "origin": "Teacher", "promptField": "q"}
    _, problems = parse_spec(spec(distill=distill, data={"sources": [asked]}))
    assert [problem.field for problem in problems] == (
        ["spec.distill.chainOfThought.minReasoningTokens"] if words else []
    )
    assert words in "; ".join(problem.sentence() for problem in problems)


SPARSE = {"model": {"uri": "s3://models/big"}, "payload": "Sparse"}
SAMPLED = {"model": {"uri": "s3://models/big"}, "payload": "Sampled"}
SPLIT = {"model": {"uri": "s3://models/big"}, "workers": {"gpusPerReplica": 2}}
TUNED = {"distill": None, "teacher": None, "fineTune": {}}
CONFIG = {
    "student": {"config": {"model_type": "llama"}},
    "data": {"sources": [{"uri": "s3://data/x.jsonl"}], "tokenizer": {"uri": "s3://data/t"}},
}


@pytest.mark.parametrize(
    ("metric", "parts", "words"),
    [
        ("perplexity", TUNED | CONFIG, ""),
        ("perplexityRatio", {}, ""),
        ("perplexityRatio", {"teacher": ONLINE | {"payload": "Sparse"}}, ""),
        ("teacherAgreement", {"teacher": SPARSE}, ""),
        # What Auto takes is not known before the teacher has measured.
        ("perplexityRatio", {"teacher": SPARSE | {"payload": "Auto"}}, ""),
        (
            "perplexityRatoi", {},
            "spec.gates[0].metric: found perplexityRatoi (no such metric); write perplexityRatio, "
            "or one of perplexity, ",
        ),
        ("speed", {}, "found speed (no such metric); write one of perplexity, "),
        ("perplexityRatio", TUNED | CONFIG, "a figure beside a teacher, and the job has none"),
        ("perplexityRatio", {"teacher": SPARSE}, "more of the teacher than `payload: Sparse` holds"),
        ("teacherKL", {"teacher": SPARSE}, "more of the teacher than `payload: Sparse` holds"),
        ("teacherAgreement", {"teacher": SAMPLED}, "than `payload: Sampled` holds"),
        ("teacherEce", {"teacher": SAMPLED}, "than `payload: Sampled` holds"),
        ("initialPerplexity", CONFIG, "of a student that starts with weights"),
        ("initialPerplexity", {}, ""),
        ("simpleAccuracy", {}, ""),
        ("teacherHallucinationRate", {"teacher": SPARSE}, ""),
        ("hallucinationRate", {"evaluation": {"tasks": []}}, ""),
        ("simpleAccuracy", {"evaluation": {"tasks": []}}, "`evaluation.tasks` names none"),
        ("multiStepAccuracy", {"evaluation": {"tasks": ["chain_sum"]}}, "names none of several steps"),
        ("teacherMultiStepAccuracy", {"evaluation": {"tasks": ["products"]}}, "names none of several"),
        ("simpleAccuracy", {"evaluation": {"tasks": ["gsm_symbolic"]}}, "names none of one step"),
        ("multiStepAccuracy", {"evaluation": {"tasks": ["maze", "chain_sum"]}}, ""),
        ("teacherSimpleAccuracy", {"teacher": SPLIT}, ""),
        ("teacherHallucinationRate", {"teacher": SPLIT}, ""),
        ("hallucinationRate", {"evaluation": {"examples": 0}}, "`evaluation.examples: 0` asks nothing"),
        ("teacherQuestionAccuracy", TUNED | CONFIG, "a figure of a teacher, and the job has none"),
    ],
)  # fmt: skip
def test_what_a_job_cannot_measure_is_refused(
    metric: str, parts: dict[str, Any], words: str
) -> None:
    plan = settled(observed(spec=spec(**parts, gates=[{"metric": metric, "max": 1}])))
    if not words:
        assert reason(plan) == reasons.VALIDATING
        return
    assert state(plan) == ("False", reasons.INVALID_SPEC)
    assert state(plan, reasons.VALIDATED) == ("False", reasons.INVALID_SPEC)
    assert words in message(plan)
    assert plan.actions == ()


@pytest.mark.parametrize("parts", [{}, {"teacher": SPARSE}, {"teacher": SAMPLED}, TUNED | CONFIG])
def test_what_is_offered_instead_can_be_measured(parts: dict[str, Any]) -> None:
    whole, _ = parse_spec(spec(**parts, gates=[{"metric": "teacherKL", "max": 1}]))
    assert whole is not None
    for problem in gates.problems_of(whole):
        for name in problem.expected.removeprefix("write one of ").split(", "):
            assert gates.unmeasured(name, whole) == ""
    assert set(METRICS) >= gates.OF_A_TEACHER | gates.OF_TASKS | gates.OF_QUESTIONS
    taught = {name for name in METRICS if name.startswith("teacher")}
    assert taught <= gates.OF_A_TEACHER | gates.OF_TASKS | gates.OF_QUESTIONS


@pytest.mark.parametrize(
    ("teacher", "words"),
    [({"model": {"uri": "s3://models/big"}}, ""),
     ({"endpoint": {"url": "http://vllm/v1", "model": "m"}}, "of a server there is its text only")],
)  # fmt: skip
def test_text_of_a_server_gives_no_figures_beside_it(teacher: dict[str, Any], words: str) -> None:
    """A teacher of one's own writes down what it finds likely of the held-out answers."""
    data = {
        "sources": [{"uri": "s3://data/x", "origin": "Teacher", "promptField": "q"}],
        "tokenizer": {"uri": "s3://data/t"},
    }
    whole, problems = parse_spec(
        spec(
            distill={"signal": "Responses"}, data=data, teacher=teacher, gates=[RATIO],
            student=CONFIG["student"],
        )
    )  # fmt: skip
    assert whole is not None, problems
    assert words in gates.unmeasured("perplexityRatio", whole)
    assert bool(words) == bool(gates.unmeasured("perplexityRatio", whole))
    assert gates.unmeasured("teacherSimpleAccuracy", whole) == ""


def test_gates_are_no_part_of_what_is_trained() -> None:
    plain, gated = (parse_spec(spec(gates=g))[0] for g in ([], [RATIO]))
    assert plain is not None and gated is not None
    assert inputs_digest(plain, None, None) == inputs_digest(gated, None, None)


# What follows from them.

MODEL = {"uri": "s3://m/d", "digest": "d", "parameters": 1234}
WEAK = [
    {"metric": "perplexityRatio", "source": "s3://data/hard.jsonl", "tokens": 900},
    {"metric": "perplexity", "source": "s3://data/long.jsonl", "tokens": 500},
]
FIGURES = {"perplexity": 20.0, "perplexityRatio": 1.31}


def done(*bounds: dict[str, Any], figures: dict[str, float] = FIGURES) -> Observed:
    """A job whose last pod has just said what came of it."""
    metrics = [{"name": name, "value": value} for name, value in figures.items()]
    outcome = {"model": MODEL, "metrics": metrics, "weakest": WEAK}
    pod = ended("small-a1-0-x", 0, outcome=outcome)
    whole = spec(teacher=ONLINE, gates=list(bounds))
    return started(spec=whole, batch_jobs=gang_job(complete=True), pods=(pod,))


def edited(seen: Observed, plan: Plan, *bounds: dict[str, Any]) -> Observed:
    """The same job later, with other gates."""
    changed = dict(seen.spec) | {"gates": list(bounds)}
    return replace(
        seen, spec=changed, generation=seen.generation + 1, status=plan.status, batch_jobs={},
        pods=(),
    )  # fmt: skip


def gate(plan: Plan) -> tuple[str, str]:
    return state(plan, reasons.GATES_PASSED)


def test_without_gates_there_is_nothing_to_pass() -> None:
    assert gate(settled(observed())) == ("True", reasons.NOT_NEEDED)
    plan = settled(done())
    assert (state(plan), gate(plan)) == (("True", "Completed"), ("True", reasons.NOT_NEEDED))
    assert [event.reason for event in plan.events] == [reasons.COMPLETED]


def test_until_there_are_figures_they_are_not_evaluated() -> None:
    plan = settled(observed(spec=spec(gates=[RATIO])))
    assert gate(plan) == ("Unknown", reasons.NOT_EVALUATED)
    assert message(plan, reasons.GATES_PASSED) == "perplexityRatio"


def test_a_student_that_keeps_them_is_done() -> None:
    plan = settled(done({"metric": "perplexity", "max": 25}, RATIO | {"max": 1.4}))
    assert (state(plan), gate(plan)) == (("True", "Completed"), ("True", reasons.GATES_MET))
    assert message(plan, reasons.GATES_PASSED) == "perplexity 20 ≤ 25; perplexityRatio 1.31 ≤ 1.4"


def test_a_student_that_breaks_one_has_failed_and_is_kept() -> None:
    plan = settled(done({"metric": "perplexity", "max": 25}, RATIO))
    told = "perplexityRatio 1.31 > 1.15; weakest: s3://data/hard.jsonl"
    for kind in (reasons.SUCCEEDED, reasons.GATES_PASSED):
        assert state(plan, kind) == ("False", reasons.GATE_FAILED)
        assert message(plan, kind) == told
    assert plan.status.model is not None
    assert plan.status.model.uri == "s3://m/d"
    assert plan.status.completion_time
    assert state(plan, reasons.RUNNING) == ("False", reasons.COMPLETED)
    [event] = plan.events
    assert (event.reason, event.message, event.warning) == (reasons.GATE_FAILED, told, True)
    assert plan.actions == ()


def test_all_that_fail_are_named() -> None:
    plan = settled(done(RATIO, {"metric": "perplexity", "max": 10}, {"metric": "ece", "max": 1}))
    assert message(plan) == (
        "perplexityRatio 1.31 > 1.15; perplexity 20 > 10; ece was not measured; "
        "weakest: s3://data/hard.jsonl, s3://data/long.jsonl"
    )


def test_a_loosened_gate_lets_the_job_succeed_without_training() -> None:
    seen = done(RATIO)
    failed = settled(seen)
    loose = settled(edited(seen, failed, RATIO | {"max": 1.5}))
    assert (state(loose), gate(loose)) == (("True", "Completed"), ("True", reasons.GATES_MET))
    assert loose.actions == ()
    assert [event.reason for event in loose.events] == [reasons.COMPLETED]
    assert loose.status.completion_time == failed.status.completion_time
    none = settled(edited(seen, failed))
    assert (state(none), gate(none)) == (("True", "Completed"), ("True", reasons.NOT_NEEDED))


def test_a_tightened_gate_lets_it_fail() -> None:
    seen = done(RATIO | {"max": 1.5})
    tight = settled(edited(seen, settled(seen), RATIO))
    assert state(tight) == ("False", reasons.GATE_FAILED)
    assert tight.actions == ()
    assert [event.reason for event in tight.events] == [reasons.GATE_FAILED]


def test_another_edit_changes_nothing() -> None:
    seen = done(RATIO)
    failed = settled(seen)
    again = settled(edited(seen, failed, RATIO))
    assert state(again) == ("False", reasons.GATE_FAILED)
    assert again.events == ()
    assert again.actions == ()


def test_a_wrong_name_given_late_ends_no_training() -> None:
    seen = started(spec=spec(teacher=ONLINE))
    wrong = {"metric": "perplexty", "max": 9}
    changed = replace(seen, spec=dict(seen.spec) | {"gates": [wrong]}, generation=2)
    plan = settled(changed)
    assert state(plan)[0] == "Unknown"
    assert gate(plan) == ("Unknown", reasons.NOT_EVALUATED)
    finished = done()
    late = settled(edited(finished, settled(finished), wrong))
    assert state(late) == ("False", reasons.GATE_FAILED)
    assert message(late).startswith(
        "perplexty: no such metric, write perplexity, or one of perplexity, accuracy, "
    )


def test_a_job_that_failed_before_has_no_figures_to_pass() -> None:
    seen = started(spec=spec(teacher=ONLINE, gates=[RATIO]))
    pod = ended("small-a1-0-x", 10, outcome={"message": "no"})
    plan = plan_job(replace(seen, batch_jobs=gang_job(failed=True), pods=(pod,)), TIMING)
    assert state(plan) == ("False", reasons.INVALID_SPEC)
    assert gate(plan) == ("Unknown", reasons.NOT_EVALUATED)


# Within a chain.


def failed_stage(told: str = "perplexityRatio 1.31 > 1.15", **changes: Any) -> StageJob:
    job = stage_job(
        reasons.GATE_FAILED, "False", model=ModelStatus(uri="s3://m", parameters=5),
        metrics=[Metric(name="perplexity", value=20), Metric(name="perplexityRatio", value=1.31)],
        weakest=[WeakestSlice(metric="perplexityRatio", source="s3://data/hard.jsonl")],
    )  # fmt: skip
    [condition] = job.status.conditions
    status = job.status.model_copy(
        update={"conditions": [condition.model_copy(update={"message": told})]}
    )
    return StageJob({**job.spec, "gates": [RATIO]}, status, **changes)


def gated(*bounds: dict[str, Any], jobs: dict[str, StageJob]) -> Any:
    seen = chain_seen(jobs)
    stages = [{"name": "m", "gates": list(bounds)}, {"name": "s"}]
    return replace(seen, spec={**seen.spec, "stages": stages})


def test_a_chain_stops_at_a_failed_gate_with_the_figures() -> None:
    plan = chain_settled(gated(RATIO, jobs={"c-m": failed_stage()}))
    condition = succeeded(plan)
    assert (condition.status, condition.reason) == ("False", reasons.STAGE_FAILED)
    assert condition.message == "stage m failed (GateFailed): perplexityRatio 1.31 > 1.15"
    assert plan.actions == ()
    first = plan.status.stages[0]
    assert (first.state, first.model, first.perplexity) == (reasons.GATE_FAILED, "s3://m", 20)


def test_a_chain_hands_loosened_gates_to_the_stage_s_job_and_goes_on() -> None:
    loose = RATIO | {"max": 1.5}
    plan = chain_settled(gated(loose, jobs={"c-m": failed_stage()}))
    assert plan.actions == (SetStageFields("c-m", {"gates": [loose]}),)
    passed = StageJob({**DONE.spec, "gates": [loose]}, DONE.status)
    later = chain_settled(gated(loose, jobs={"c-m": passed}))
    assert [action.name for action in later.actions if isinstance(action, CreateStageJob)] == [
        "c-s"
    ]
    validated = next(c for c in later.status.conditions if c.type == reasons.VALIDATED)
    assert validated.message == ""


def test_a_chain_takes_no_other_s_job_in_hand() -> None:
    jobs = {"c-m": failed_stage(ours=False, leaving=True)}
    assert chain_settled(gated(jobs=jobs)).actions == ()


def test_a_gate_that_a_stage_cannot_measure_stops_the_chain_before_it_starts() -> None:
    tuned = {"name": "tuned", "fineTune": {}}
    seen = chain_seen()
    template = {**seen.spec["template"], "gates": [RATIO]}
    whole = {**seen.spec, "template": template, "stages": [{"name": "m"}, tuned]}
    plan = chain_settled(replace(seen, spec=whole))
    assert succeeded(plan).reason == reasons.INVALID_SPEC
    assert (
        "stage tuned: spec.gates[0].metric: found perplexityRatio, a figure beside a teacher"
        in (succeeded(plan).message)
    )
    assert plan.actions == ()
    tuned["gates"] = []  # type: ignore[assignment]
    assert len(chain_settled(replace(seen, spec=whole)).actions) == 1


def test_the_status_of_an_older_operator_is_read() -> None:
    status = DistillationJobStatus.model_validate({"metrics": [{"name": "ece", "value": 1}]})
    plan = settled(observed(status=status, now=NOW))
    assert gate(plan) == ("True", reasons.NOT_NEEDED)


@pytest.mark.parametrize(
    ("gate", "figures", "sentence"),
    [
        ({"max": 1.2, "relativeTo": "Teacher"}, {"perplexity": 12.0, "teacherPerplexity": 10.0}, ""),
        ({"max": 1.1, "relativeTo": "Teacher"}, {"perplexity": 12.0, "teacherPerplexity": 10.0},
         "perplexity ÷ the teacher's 1.2 > 1.1"),
        ({"max": 1.1, "relativeTo": "Teacher"}, {"perplexity": 12.0},
         "perplexity ÷ the teacher's was not measured"),
        ({"max": 1.1, "relativeTo": "Teacher"}, {"perplexity": 12.0, "teacherPerplexity": 0.0},
         "perplexity ÷ the teacher's was not measured"),
        ({"max": 2, "relativeTo": "FirstTeacher", "reference": 5.0}, {"perplexity": 12.0},
         "perplexity ÷ the first teacher's 2.4 > 2"),
        ({"max": 3, "relativeTo": "FirstTeacher", "reference": 5.0}, {"perplexity": 12.0}, ""),
    ],
)  # fmt: skip
def test_a_gate_relative_to_a_teacher(
    gate: dict[str, Any], figures: dict[str, float], sentence: str
) -> None:
    [result] = judged([Gate.model_validate({"metric": "perplexity"} | gate)], figures)
    assert result.passed == (sentence == "")
    assert not sentence or result.sentence() == sentence


@pytest.mark.parametrize(
    ("gate", "parts", "words"),
    [
        ({"metric": "perplexity", "relativeTo": "Teacher"}, {}, ""),
        ({"metric": "teacherKL", "relativeTo": "Teacher"}, {}, "which a teacher does not have"),
        ({"metric": "perplexity", "relativeTo": "Teacher"}, TUNED | CONFIG, "and the job has none"),
        ({"metric": "perplexity", "relativeTo": "FirstTeacher"}, {}, "in a stage of a chain"),
        ({"metric": "perplexity", "relativeTo": "FirstTeacher", "reference": 9}, {}, ""),
    ],
)
def test_a_gate_relative_to_what_is_not_there_is_refused(
    gate: dict[str, Any], parts: dict[str, Any], words: str
) -> None:
    parsed, _ = parse_spec(spec(gates=[gate | {"max": 1.5}], **parts))
    assert parsed is not None
    told = "; ".join(problem.sentence() for problem in gates.problems_of(parsed))
    assert (words in told) if words else not told


TUNED_STAGE = {"name": "t", "fineTune": {}, "student": {"model": {"uri": "s3://models/y"}}}
OVERALL = {"metric": "perplexity", "max": 1.5, "relativeTo": "FirstTeacher"}


def test_a_stages_job_gets_the_first_teachers_figure() -> None:
    stages = ({"name": "m", "gates": [OVERALL]}, {"name": "s", "gates": [OVERALL]})
    chain = chain_seen()
    whole = {**chain.spec, "stages": list(stages)}
    first = chain_settled(replace(chain, spec=whole))
    made = [action for action in first.actions if isinstance(action, CreateStageJob)]
    assert made[0].spec["gates"] == [OVERALL | {"relativeTo": "Teacher", "max": 1.5}]
    done = stage_job(
        "Completed", "True", model=ModelStatus(uri="s3://m", parameters=5),
        metrics=[Metric(name="perplexity", value=9.5), Metric(name="teacherPerplexity", value=8.0)],
    )  # fmt: skip
    second = chain_settled(
        replace(chain, spec=whole, jobs={"c-m": replace(done, spec=made[0].spec)})
    )
    made = [action for action in second.actions if isinstance(action, CreateStageJob)]
    assert made[0].spec["gates"] == [OVERALL | {"reference": 8.0}]


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (
            (TUNED_STAGE | {"gates": [OVERALL]},),
            "no stage so far that distils",
        ),
        (
            ({"name": "m"}, {"name": "s", "gates": [OVERALL], "training": {"seed": 1}}),
            "which stage m measured on other held-out text",
        ),
        (({"name": "m"}, {"name": "s", "gates": [OVERALL]}), ""),
    ],
)  # fmt: skip
def test_a_first_teacher_that_says_nothing_of_a_stage_is_refused(
    stages: tuple[dict[str, Any], ...], words: str
) -> None:
    plan = chain_settled(replace(chain_seen(), spec={**chain_seen().spec, "stages": list(stages)}))
    [valid] = [c for c in plan.status.conditions if c.type == reasons.VALIDATED]
    assert (words in valid.message) if words else valid.status == "True"
