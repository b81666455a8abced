"""What follows where a stage's student breaks a gate: stop, go on, or try again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from kubedistill_api import reasons
from kubedistill_api.status import Metric, ModelStatus
from kubedistill_operator.plan.actions import CreateStageJob
from kubedistill_operator.plan.chain import ChainPlan
from kubedistill_operator.plan.layout import job_names
from kubedistill_operator.plan.stages import StageJob
from test_plan_chain import DONE, chain_spec, seen, settled, stage_job, succeeded
from test_plan_gates import done
from test_plan_kit import message, state
from test_plan_kit import settled as job_settled

GATE = {"metric": "perplexityRatio", "max": 1.15}
RETRIES = [{"training": {"epochs": 6}}, {"student": {"fromTeacher": {"layers": 6}}}]
BROKEN = stage_job(
    "GateFailed", "False", model=ModelStatus(uri="s3://m", parameters=5),
    metrics=[Metric(name="perplexityRatio", value=1.31)],
)  # fmt: skip


def planned(
    jobs: dict[str, StageJob], chain: dict[str, Any] | None = None, **stage: Any
) -> ChainPlan:
    """The plan of a chain of two stages, the first with a gate; `stage`: what else it says."""
    first = {"name": "m", "gates": [GATE], **stage}
    observed = seen(jobs)
    spec = {**chain_spec(first, {"name": "s"}), **(chain or {})}
    return settled(replace(observed, spec=spec))


def created(plan: ChainPlan) -> dict[str, dict[str, Any]]:
    return {a.name: dict(a.spec) for a in plan.actions if isinstance(a, CreateStageJob)}


RETRYING = {"onGateFailure": "Retry", "retries": RETRIES}


def test_a_stage_is_tried_again_with_what_it_gives_until_its_gates_hold() -> None:
    first = created(planned({}, **RETRYING))
    assert list(first) == ["c-m"] and first["c-m"]["training"]["epochs"] == 3
    plan = planned({"c-m": BROKEN}, **RETRYING)
    second = created(plan)
    assert list(second) == ["c-m-r1"] and second["c-m-r1"]["training"]["epochs"] == 6
    assert [e.reason for e in plan.events if "Retried" in e.reason] == ["StageRetried"]
    told = succeeded(plan).message
    assert "try 2 of 3" in told and "c-m: why" in told
    third = created(planned({"c-m": BROKEN, "c-m-r1": BROKEN}, **RETRYING))
    assert list(third) == ["c-m-r2"]
    assert third["c-m-r2"]["student"]["fromTeacher"]["layers"] == 6
    assert third["c-m-r2"]["training"]["epochs"] == 3
    plan = planned({"c-m": BROKEN, "c-m-r1": DONE}, **RETRYING)
    [(name, spec)] = created(plan).items()
    assert name == "c-s" and spec["teacher"]["fromJob"] == {"name": "c-m-r1"}
    stage = plan.status.stages[0]
    assert stage.job_name == "c-m-r1" and "try 2 of 3 was taken" in stage.choice


def test_a_chain_stops_where_no_try_keeps_the_gates() -> None:
    plan = planned({"c-m": BROKEN, "c-m-r1": BROKEN, "c-m-r2": BROKEN}, **RETRYING)
    assert not created(plan)
    assert (succeeded(plan).status, succeeded(plan).reason) == ("False", reasons.STAGE_FAILED)
    assert all(name in succeeded(plan).message for name in ("c-m:", "c-m-r1:", "GateFailed"))


def test_what_fails_for_another_reason_is_not_tried_again() -> None:
    plan = planned({"c-m": stage_job("BackoffLimitExceeded", "False")}, **RETRYING)
    assert not created(plan)
    assert succeeded(plan).reason == reasons.STAGE_FAILED


def test_a_gate_that_is_loosened_takes_the_earlier_try() -> None:
    running = stage_job("Training")
    plan = planned({"c-m": DONE, "c-m-r1": running}, **RETRYING)
    [(name, spec)] = created(plan).items()
    assert name == "c-s" and spec["teacher"]["fromJob"] == {"name": "c-m"}


@pytest.mark.parametrize(
    ("chain", "stage", "handed"),
    [
        ({}, {}, "Fail"),
        ({"onGateFailure": "Continue"}, {}, "Continue"),
        ({"onGateFailure": "Continue"}, {"onGateFailure": "Stop"}, "Fail"),
        ({"onGateFailure": "Retry"}, {}, "Fail"),
        ({}, {"onGateFailure": "Continue"}, "Continue"),
    ],
)
def test_the_stages_policy_is_its_jobs(
    chain: dict[str, Any], stage: dict[str, Any], handed: str
) -> None:
    spec = created(planned({}, chain, **stage))["c-m"]
    assert spec.get("onGateFailure", "Fail") == handed


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"retries": RETRIES}, "found `onGateFailure: Stop`; write Retry"),
        ({"onGateFailure": "Retry"}, "found nothing; give what is tried next"),
        ({"onGateFailure": "Retry", "retries": [{"training": {"epochs": 0}}]},
         "retries[0]: spec.training.epochs: found 0"),
        ({"onGateFailure": "Retry", "retries": RETRIES, "sweep": {"temperature": [1, 2]}},
         "found both a sweep and retries"),
    ],
)  # fmt: skip
def test_what_cannot_be_tried_is_refused(stage: dict[str, Any], words: str) -> None:
    plan = planned({}, **stage)
    assert succeeded(plan).reason == reasons.INVALID_SPEC
    assert f"stage m: {words}" in succeeded(plan).message or words in succeeded(plan).message


def test_retries_are_jobs_of_the_chain() -> None:
    spec = chain_spec({"name": "m", **RETRYING}, {"name": "s"})
    assert job_names("c", spec) == {"c-m", "c-m-r1", "c-m-r2", "c-s"}


def test_a_job_that_goes_on_all_the_same_says_which_gate_does_not_hold() -> None:
    one = done(GATE)
    plan = job_settled(replace(one, spec=dict(one.spec) | {"onGateFailure": "Continue"}))
    assert state(plan) == ("True", reasons.COMPLETED)
    assert state(plan, reasons.GATES_PASSED) == ("False", reasons.GATE_FAILED)
    assert "gates that do not hold: perplexityRatio 1.31 > 1.15" in message(plan)
    strict = job_settled(replace(one, spec=dict(one.spec), status=plan.status))
    assert state(strict) == ("False", reasons.GATE_FAILED)
