"""A stage that sweeps over temperatures: its trials, their order, the choice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from kubedistill_api import reasons
from kubedistill_api.chain import DistillationChainSpec
from kubedistill_api.status import Metric, ModelStatus, Progress, Resolved, TeacherStreamStatus
from kubedistill_operator.plan.actions import (
    ChainPlan,
    CreateReport,
    CreateStageJob,
    SuspendStageJob,
)
from kubedistill_operator.plan.chain import ObservedChain, plan_chain
from kubedistill_operator.plan.compose import compose
from kubedistill_operator.plan.stages import StageJob
from kubedistill_operator.plan.views import BatchJobView
from test_plan_chain import chain_spec, composed, settled, stage_job, succeeded
from test_plan_chain import seen as plain

T2, T4, T8 = "c-m-t2", "c-m-t4", "c-m-t8"
READY = TeacherStreamStatus(complete=True)


def swept(**changes: Any) -> dict[str, Any]:
    return {"name": "m", "sweep": {"temperature": [2, 4, 8]} | changes}


def seen(jobs: dict[str, StageJob] | None = None, *stages: Any, **changes: Any) -> ObservedChain:
    whole = chain_spec(*(stages or (swept(), {"name": "s"})), **changes)
    return replace(plain(jobs), spec=whole)


def spec_of(temperature: float, stage: dict[str, Any] | None = None) -> dict[str, Any]:
    whole = chain_spec(stage or swept(), {"name": "s"})
    chain = DistillationChainSpec.model_validate(whole)
    return compose("c", chain, 0, temperature=temperature)


def done(temperature: float, perplexity: float, **metrics: float) -> StageJob:
    figures = {"perplexity": perplexity} | metrics
    job = stage_job(
        "Completed", "True", teacher_stream=READY,
        model=ModelStatus(uri=f"s3://m/{temperature:g}", parameters=5),
        metrics=[Metric(name=name, value=value) for name, value in figures.items()],
    )  # fmt: skip
    return replace(job, spec=spec_of(temperature))


def training(temperature: float, **changes: Any) -> StageJob:
    return replace(stage_job("Training", **changes), spec=spec_of(temperature))


def failed(temperature: float) -> StageJob:
    return replace(stage_job("Stalled", "False"), spec=spec_of(temperature))


def created(plan: ChainPlan) -> list[str]:
    return [action.name for action in plan.actions if isinstance(action, CreateStageJob)]


def reported(plan: ChainPlan) -> list[str]:
    return [action.job for action in plan.actions if isinstance(action, CreateReport)]


def validated(plan: ChainPlan) -> str:
    return next(c for c in plan.status.conditions if c.type == reasons.VALIDATED).message


def later(plan: ChainPlan, observed: ObservedChain) -> ObservedChain:
    return replace(observed, status=plan.status)


# What a trial is.


def test_trials_differ_in_their_temperature_alone_and_ask_for_one_stream() -> None:
    first, second = spec_of(2), spec_of(4)
    assert first["distill"]["objective"].pop("temperature") == 2
    assert second["distill"]["objective"].pop("temperature") == 4
    assert first == second
    assert first["teacher"]["temperatures"] == [2, 4, 8]


def test_a_teacher_within_the_students_pods_serves_no_stream() -> None:
    assert (
        "temperatures" not in spec_of(2, swept() | {"teacher": {"delivery": "Online"}})["teacher"]
    )


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            swept() | {"fineTune": {}},
            "stage m: sweep.temperature: found a stage that fine-tunes; only what is distilled",
        ),
        (
            swept() | {"teacher": {"payload": "Sampled"}},
            "3 temperatures with `teacher.payload: Sampled`; its draws are made at one temperature",
        ),
        (
            swept()
            | {
                "distill": {"objective": {"softWeight": 0, "features": [{}]}},
                "teacher": {"delivery": "Online"},
            },
            "found `distill.objective.softWeight: 0`; the temperature is that of the soft term",
        ),
        (
            swept(select={"metric": "perplexty"}),
            "sweep.select.metric: found perplexty (no such metric); write perplexity, or one of "
            "perplexity, accuracy, ",
        ),
        (
            swept(select={"metric": "throughput"}),
            "sweep.select.metric: found throughput (no such metric); write one of perplexity, ",
        ),
        (
            swept(select={"metric": "TEACHERKL"}),
            "found TEACHERKL (no such metric); write teacherKL, or one of perplexity, ",
        ),
        (
            swept(select={"metric": "initialPerplexity"}),
            "found initialPerplexity (the same in every trial); write one of",
        ),
        (swept(temperature=[2, 2.0000001]), "name each temperature once"),
        (swept(temperature=[0]), "greater than 0"),
        (swept() | {"name": "m" * 40, "training": {"epochs": 0}}, "spec.training.epochs: found 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_swept_is_refused(stage: dict[str, Any], message: str) -> None:
    student = {
        "student": {"config": {"model_type": "llama"}},
        "data": {"tokenizer": {"uri": "s3://abc/t"}},
    }
    plan = settled(seen(None, stage | student))
    assert succeeded(plan).reason == reasons.INVALID_SPEC
    assert message in succeeded(plan).message
    assert plan.actions == ()


def test_one_temperature_may_be_drawn_at() -> None:
    stage = swept(temperature=[2]) | {"teacher": {"payload": "Sampled"}}
    assert created(settled(seen(None, stage))) == [T2]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((swept(), {"name": "m-t4"}), "its job c-m-t4 would have the name of one of stage m"),
        (
            ({"name": "m" * 40, "sweep": {"temperature": [0.123456, 2]}},),
            "would have a name of 52 characters; at most 50",
        ),
    ],
)
def test_names_of_trials_are_checked(stages: Any, message: str) -> None:
    plan = settled(seen(None, *stages))
    assert succeeded(plan).reason == reasons.INVALID_SPEC
    assert message in succeeded(plan).message


def test_a_strangers_trial_is_not_taken_over() -> None:
    plan = settled(seen({T4: replace(training(4), ours=False)}))
    assert f"there is a DistillationJob {T4} that is not of this chain" in succeeded(plan).message


# In which order they run.

STREAMS = training(2, teacher_stream=READY)
FOUND = training(2, resolved=Resolved(stream_complete=True))


@pytest.mark.parametrize(
    ("parallelism", "jobs", "expected"),
    [
        (1, {}, [T2]),
        (1, {T2: training(2)}, []),
        (1, {T2: STREAMS}, []),
        (1, {T2: done(2, 9)}, [T4]),
        (1, {T2: failed(2)}, [T4]),
        # A trial that somebody deleted is run again.
        (1, {T2: done(2, 9), T8: done(8, 9)}, [T4]),
        # Several at once only when the stream is there.
        (2, {}, [T2]),
        (2, {T2: training(2)}, []),
        (2, {T2: failed(2)}, [T4]),
        (2, {T2: STREAMS}, [T4]),
        (2, {T2: FOUND}, [T4]),
        (3, {T2: STREAMS}, [T4, T8]),
        (2, {T2: done(2, 9)}, [T4, T8]),
        (2, {T2: done(2, 9), T4: training(4)}, [T8]),
        (2, {T2: done(2, 9), T4: training(4), T8: training(8)}, []),
    ],
)
def test_which_trial_starts(parallelism: int, jobs: dict[str, StageJob], expected: Any) -> None:
    plan = settled(seen(jobs, swept(parallelism=parallelism), {"name": "s"}))
    assert created(plan) == expected
    assert validated(plan) == ""
    assert succeeded(plan).reason == reasons.STAGE_RUNNING


def test_a_teacher_in_every_trial_lets_them_start_at_once() -> None:
    stage = swept(parallelism=2) | {"teacher": {"delivery": "Online"}}
    assert created(settled(seen(None, stage))) == [T2, T4]


def test_a_running_sweep_tells_how_far_it_is() -> None:
    half = Progress(percentage=50, estimated_remaining="3m")
    plan = settled(seen({T2: done(2, 9.5), T4: training(4, progress=half)}))
    assert succeeded(plan).message == "stage m 1/2: 1 of 3 trials have ended; T = 4 Training"
    assert plan.status.progress == 25
    assert plan.status.estimated_remaining == "3m"
    [stage, following] = plan.status.stages
    assert (stage.state, stage.job_name, stage.model) == ("Training", "", "")
    assert [(t.temperature, t.state, t.perplexity, t.chosen) for t in stage.trials] == [
        (2, "Completed", 9.5, False), (4, "Training", None, False), (8, "Pending", None, False),
    ]  # fmt: skip
    assert following.trials == []


def test_suspension_reaches_all_trials_that_run() -> None:
    jobs = {T2: done(2, 9), T4: training(4), T8: training(8)}
    plan = settled(seen(jobs, swept(parallelism=2), suspend=True))
    assert plan.actions == (SuspendStageJob(T4, True), SuspendStageJob(T8, True))
    assert succeeded(plan).message == "stage m is being suspended"
    assert settled(seen({T2: done(2, 9)}, suspend=True)).actions == ()


# Which one is taken.


@pytest.mark.parametrize(
    ("jobs", "select", "winner", "choice"),
    [
        (
            (done(2, 9), done(4, 7), done(8, 8)), {}, T4,
            "T = 4 was chosen: its perplexity 7 is the lowest of 3 trials",
        ),
        (
            (done(2, 9), failed(4), done(8, 8)), {}, T8,
            "T = 8 was chosen: its perplexity 8 is the lowest of 2 trials; "
            "without it: T = 4 (Stalled)",
        ),
        (
            (failed(2), done(4, 7), failed(8)), {}, T4,
            "T = 4 was chosen: its perplexity 7 is the only one; "
            "without it: T = 2 (Stalled), T = 8 (Stalled)",
        ),
        (
            (done(2, 9, accuracy=0.4), done(4, 7, accuracy=0.1), done(8, 8, accuracy=0.3)),
            {"metric": "accuracy"}, T2,
            "T = 2 was chosen: its accuracy 0.4 is the highest of 3 trials",
        ),
        (
            (done(2, 9), done(4, 7), done(8, 8)), {"goal": "Maximize"}, T2,
            "T = 2 was chosen: its perplexity 9 is the highest of 3 trials",
        ),
        (
            (done(2, 9), done(4, 7), done(8, 7)), {}, T4,
            "T = 4 was chosen: its perplexity 7 is the lowest of 3 trials, "
            "and of equals the lower temperature is taken",
        ),
    ],
)  # fmt: skip
def test_the_best_trial_is_the_stages(jobs: Any, select: Any, winner: str, choice: str) -> None:
    observed = seen(dict(zip((T2, T4, T8), jobs, strict=True)), swept(select=select), {"name": "s"})
    plan = settled(observed)
    stage = plan.status.stages[0]
    assert (stage.job_name, stage.choice) == (winner, choice)
    assert stage.model == observed.jobs[winner].status.model.uri  # type: ignore[union-attr]
    assert [t.job_name for t in stage.trials if t.chosen] == [winner]
    assert f"stage m: {choice}" in succeeded(plan).message
    assert [e.message for e in plan.events if e.reason == "TrialChosen"] == [f"stage m: {choice}"]
    [following] = [a for a in plan.actions if isinstance(a, CreateStageJob)]
    assert following.spec["teacher"]["fromJob"] == {"name": winner}
    again = plan_chain(later(plan, observed))
    assert "TrialChosen" not in [event.reason for event in again.events]


def test_a_tuned_stage_goes_on_from_the_best_trial() -> None:
    jobs = {T2: done(2, 9), T4: done(4, 7), T8: done(8, 8)}
    plan = settled(seen(jobs, swept(), {"name": "t", "fineTune": {}}))
    [following] = [a for a in plan.actions if isinstance(a, CreateStageJob)]
    assert following.spec["student"]["fromJob"] == {"name": T4}


def test_a_failed_trial_is_told_of_once() -> None:
    observed = seen({T2: failed(2)})
    plan = settled(observed)
    assert [e.message for e in plan.events if e.reason == "TrialFailed"] == [
        "stage m: trial T = 2 failed (Stalled): why"
    ]
    assert "TrialFailed" not in [e.reason for e in plan_chain(later(plan, observed)).events]


def test_a_sweep_fails_when_all_of_its_trials_do() -> None:
    plan = settled(seen({T2: failed(2), T4: failed(4), T8: failed(8)}))
    assert succeeded(plan).reason == reasons.STAGE_FAILED
    assert succeeded(plan).message.startswith(
        "stage m failed: all trials of its sweep failed: T = 2 (Stalled): why; T = 4"
    )
    assert plan.status.stages[0].state == reasons.STAGE_FAILED
    assert created(plan) == []


def test_a_metric_that_no_trial_has_fails_the_stage_until_another_is_written() -> None:
    jobs = {T2: done(2, 9), T4: done(4, 7), T8: done(8, float("nan"))}
    observed = seen(jobs, swept(select={"metric": "teacherKL"}), {"name": "s"})
    plan = settled(observed)
    assert succeeded(plan).reason == reasons.STAGE_FAILED
    assert "no trial has the metric teacherKL" in succeeded(plan).message
    assert "they have: perplexity" in succeeded(plan).message
    mended = plan_chain(replace(seen(jobs), status=plan.status))
    assert mended.status.stages[0].job_name == T4
    assert mended.status.stages[0].trials[2].metric is None, "no number is no figure"


# What people do to a sweep.


ALL = {T2: done(2, 9), T4: done(4, 7), T8: done(8, 8)}
WRITTEN = replace(ALL[T4], report=BatchJobView("c-m-t4-report", "report", complete=True))


def test_a_choice_stands_as_long_as_its_job_does() -> None:
    plan = settled(seen(ALL))
    without_losers = replace(seen({T4: ALL[T4]}), status=plan.status)
    kept = settled(without_losers)
    assert kept.status.stages[0] == plan.status.stages[0]
    assert created(kept) == ["c-s"]
    without_winner = replace(seen({T2: ALL[T2], T8: ALL[T8]}), status=plan.status)
    assert created(settled(without_winner)) == [T4]


def test_the_next_stage_is_not_compared_while_its_teacher_is_not_known() -> None:
    taught = composed(1, swept(), {"name": "s"})
    taught["teacher"]["fromJob"] = {"name": T4}
    following = replace(stage_job("Training"), spec=taught)
    plan = settled(seen({T2: ALL[T2], T8: ALL[T8], "c-s": following}))
    assert created(plan) == [T4]
    assert validated(plan) == ""
    assert validated(settled(seen(ALL | {"c-s": following}))) == ""


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": [2, 4, 8, 16]},
        {"temperature": [2, 8]},
        {"select": {"goal": "Maximize"}},
        {"select": {"metric": "ece"}},
    ],
)
def test_an_edit_after_the_choice_is_said_and_not_done(change: dict[str, Any]) -> None:
    plan = settled(seen(ALL))
    edited = replace(seen(ALL, swept(**change), {"name": "s"}), status=plan.status)
    found = settled(edited)
    assert found.status.stages[0].job_name == T4
    assert created(found) == ["c-s"]
    assert validated(found) == (
        "stage m: its sweep was changed after the choice, which stands; "
        "delete job c-m-t4 to choose anew"
    )


def test_a_job_of_no_stage_is_named() -> None:
    old = replace(training(2), spec=composed(0, {"name": "m"}))
    plan = settled(seen({"c-m": old}))
    assert validated(plan) == "of no stage any more, and left as they are: c-m"
    assert created(plan) == [T2]


# The table in the reports.


def test_the_table_of_a_finished_sweep_goes_into_the_reports() -> None:
    plan = settled(seen(ALL))
    assert reported(plan) == [T4]
    [action] = [a for a in plan.actions if isinstance(a, CreateReport)]
    assert action.sweep.trials == plan.status.stages[0].trials
    assert action.sweep.choice == plan.status.stages[0].choice
    assert plan.status.stages[0].report == "Writing"
    assert reported(settled(seen(ALL, suspend=True))) == []
    assert reported(settled(seen({T2: ALL[T2]}))) == []


def test_reports_are_written_once() -> None:
    plan = settled(seen(ALL | {T4: WRITTEN}))
    assert reported(plan) == []
    assert plan.status.stages[0].report == "Written"


def test_a_report_that_cannot_be_written_does_not_stop_the_chain() -> None:
    broken = BatchJobView("c-m-t4-report", "report", failed=True, failure_message="no store")
    observed = seen(ALL | {T4: replace(ALL[T4], report=broken)})
    plan = settled(observed)
    assert plan.status.stages[0].report == "Failed"
    assert "no store" in next(e.message for e in plan.events if e.reason == "ReportFailed")
    assert created(plan) == ["c-s"]
    assert "ReportFailed" not in [e.reason for e in plan_chain(later(plan, observed)).events]
