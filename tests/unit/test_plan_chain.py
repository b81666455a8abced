"""Chains: composition of stages and the plan over them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from kubedistill_api import reasons
from kubedistill_api.chain import DistillationChainSpec, DistillationChainStatus
from kubedistill_api.status import (
    Condition,
    DistillationJobStatus,
    Metric,
    ModelStatus,
    Progress,
)
from kubedistill_operator.plan.actions import (
    ChainPlan,
    CreateStageJob,
    Refusal,
    SetStageFields,
    SuspendStageJob,
)
from kubedistill_operator.plan.chain import ObservedChain, StageJob, plan_chain
from kubedistill_operator.plan.compose import compose, merge_patch
from kubedistill_operator.plan.inputs import parse_spec
from test_plan_kit import NOW, spec

INITIAL = {"model": {"uri": "s3://models/70b"}}


@pytest.mark.parametrize(
    ("target", "patch", "expected"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_merge_patch_as_rfc_7386_has_it(target: Any, patch: Any, expected: Any) -> None:
    assert merge_patch(target, patch) == expected


def chain_spec(*stages: dict[str, Any], **changes: Any) -> dict[str, Any]:
    template = {k: v for k, v in spec().items() if k != "teacher"}
    return {"initialTeacher": INITIAL, "template": template, "stages": list(stages)} | changes


def composed(index: int, *stages: dict[str, Any], **changes: Any) -> dict[str, Any]:
    chain = DistillationChainSpec.model_validate(chain_spec(*stages, **changes))
    return compose("c", chain, index)


def test_the_teacher_is_passed_down() -> None:
    stages = ({"name": "m"}, {"name": "s"})
    assert composed(0, *stages)["teacher"] == INITIAL
    assert composed(1, *stages)["teacher"] == {"fromJob": {"name": "c-m"}}


def test_a_stages_job_does_not_expire_before_its_chain() -> None:
    ttl = {"ttlSecondsAfterFinished": 0}
    template = {k: v for k, v in spec().items() if k != "teacher"} | ttl
    assert "ttlSecondsAfterFinished" not in composed(0, {"name": "m"}, template=template)
    assert "ttlSecondsAfterFinished" not in composed(0, {"name": "m", **ttl})


def test_delivery_of_the_template_stays_with_the_teacher_passed_down() -> None:
    whole = chain_spec({"name": "m"}, {"name": "s"})
    whole["template"]["teacher"] = {"delivery": "Online"}
    chain = DistillationChainSpec.model_validate(whole)
    teacher = compose("c", chain, 1)["teacher"]
    assert teacher == {"delivery": "Online", "fromJob": {"name": "c-m"}}


def test_a_stages_method_replaces_the_templates() -> None:
    tuned = composed(1, {"name": "m"}, {"name": "t", "fineTune": {}})
    assert "distill" not in tuned
    assert "teacher" not in tuned
    assert tuned["student"] == {"fromJob": {"name": "c-m"}}
    assert parse_spec(tuned)[1] == []


def test_a_stage_that_does_not_train_changes_the_student_before_it_and_is_compared_with_it() -> (
    None
):
    pruned = composed(1, {"name": "m"}, {"name": "p", "prune": {"structured": {"ffn": 0.5}}})
    assert "distill" not in pruned
    assert pruned["student"] == {"fromJob": {"name": "c-m"}}
    assert pruned["teacher"] == {"fromJob": {"name": "c-m"}, "delivery": "Online"}
    assert parse_spec(pruned)[1] == []
    own = {"fromJob": {"name": "elder"}}
    stage = {"name": "p", "evaluate": {}, "teacher": own}
    assert composed(1, {"name": "m"}, stage)["teacher"] == own


@pytest.mark.parametrize(
    "template,own,workers",
    [
        ({}, {}, {"nodes": 1, "gpusPerNode": 1}),
        ({"nodes": 4, "gpusPerNode": 8, "minNodes": 2}, {}, {"nodes": 1, "gpusPerNode": 1}),
        ({"nodes": 4, "gpusPerNode": 0}, {}, {"nodes": 1, "gpusPerNode": 0}),
        ({"nodes": 4}, {"gpuResourceName": "amd.com/gpu"},
         {"nodes": 1, "gpusPerNode": 1, "gpuResourceName": "amd.com/gpu"}),
        ({"nodes": 4}, {"nodes": 2}, {"nodes": 2, "gpusPerNode": 1}),
    ],
)  # fmt: skip
def test_a_stage_that_quantises_runs_in_one_process(
    template: dict[str, Any], own: dict[str, Any], workers: dict[str, Any]
) -> None:
    whole = {k: v for k, v in spec().items() if k not in ("teacher", "workers")}
    stage = {"name": "q", "quantize": {}} | ({"workers": own} if own else {})
    found = composed(1, {"name": "m"}, stage, template=whole | {"workers": template})
    assert found["workers"] == workers
    problems = [problem.field for problem in parse_spec(found)[1]]
    assert problems == (["spec.workers"] if workers["nodes"] > 1 else [])


@pytest.mark.parametrize("signal", ["Logits", "Responses"])
def test_only_logits_bring_the_teacher_s_tokenizer(signal: str) -> None:
    asked = {"origin": "Teacher", "promptField": "q"} if signal == "Responses" else {}
    whole = {
        "distill": {"signal": signal},
        "teacher": {"model": {"uri": "s3://models/big"}},
        "student": {"config": {"model_type": "llama"}},
        "data": {"sources": [{"uri": "s3://data/x.jsonl", **asked}]},
        "storage": {"uri": "s3://runs/test"},
    }
    fields = [problem.field for problem in parse_spec(whole)[1]]
    assert fields == (["spec.data.tokenizer"] if asked else [])


def test_a_stages_source_replaces_the_templates() -> None:
    student = {"config": {"model_type": "llama"}}
    assert composed(0, {"name": "m", "student": student})["student"] == student


def stage_job(reason: str, status: Any = "Unknown", **changes: Any) -> StageJob:
    condition = Condition(type="Succeeded", status=status, reason=reason, message="why")
    whole = composed(0, {"name": "m"})
    fields: dict[str, Any] = {"conditions": [condition]} | changes
    return StageJob(whole, DistillationJobStatus(**fields))


def seen(jobs: dict[str, StageJob] | None = None, **changes: Any) -> ObservedChain:
    whole = chain_spec({"name": "m"}, {"name": "s"}, **changes)
    status = DistillationChainStatus()
    return ObservedChain("ml", "c", 1, whole, status, NOW, jobs or {})


def settled(observed: ObservedChain) -> ChainPlan:
    plan = plan_chain(observed)
    again = plan_chain(replace(observed, status=plan.status))
    assert again.status == plan.status
    return plan


def succeeded(plan: ChainPlan) -> Condition:
    return next(c for c in plan.status.conditions if c.type == reasons.SUCCEEDED)


DONE = stage_job(
    "Completed", "True", model=ModelStatus(uri="s3://m", parameters=5),
    metrics=[Metric(name="perplexity", value=9.5)],
)  # fmt: skip


def test_the_first_stage_starts_alone() -> None:
    plan = settled(seen())
    assert [type(a) for a in plan.actions] == [CreateStageJob]
    assert plan.status.current_stage == "m 1/2"
    assert [s.state for s in plan.status.stages] == ["Pending", "Pending"]


def test_a_stages_job_that_is_refused_is_told() -> None:
    [action] = plan_chain(seen()).actions
    refusal = Refusal(action, reasons.CREATION_REFUSED, "exceeded quota: jobs")
    refused = replace(seen(), refusal=refusal)
    plan = settled(refused)
    assert (succeeded(plan).reason, succeeded(plan).message) == (
        reasons.CREATION_REFUSED,
        "exceeded quota: jobs",
    )
    assert reasons.CREATION_REFUSED in {event.reason for event in plan.events}
    again = plan_chain(replace(refused, status=plan.status))
    assert reasons.CREATION_REFUSED not in {event.reason for event in again.events}


def test_the_second_stage_waits_for_the_first() -> None:
    progress = Progress(percentage=50, estimated_remaining="3m")
    plan = settled(seen({"c-m": stage_job("Training", progress=progress)}))
    assert plan.actions == ()
    assert plan.status.progress == 25
    assert plan.status.estimated_remaining == "3m"
    following = settled(seen({"c-m": DONE}))
    action = following.actions[0]
    assert isinstance(action, CreateStageJob)
    assert action.stage == "s"
    assert following.status.stages[0].perplexity == 9.5


def test_a_failed_stage_stops_the_chain() -> None:
    plan = settled(seen({"c-m": stage_job("Stalled", "False")}))
    assert succeeded(plan).reason == reasons.STAGE_FAILED
    assert succeeded(plan).message == "stage m failed (Stalled): why"
    assert plan.actions == ()


def test_all_stages_are_checked_before_one_starts() -> None:
    observed = seen()
    broken = dict(observed.spec)
    broken["stages"] = [{"name": "m"}, {"name": "s", "training": {"epochs": 0}}]
    plan = settled(replace(observed, spec=broken))
    assert succeeded(plan).reason == reasons.INVALID_SPEC
    assert succeeded(plan).message.startswith("stage s: spec.training.epochs: found 0")
    assert plan.actions == ()


def test_suspension_reaches_the_running_stage() -> None:
    plan = settled(seen({"c-m": stage_job("Training")}, suspend=True))
    assert plan.actions == (SuspendStageJob("c-m", True),)
    assert succeeded(plan).reason == reasons.IS_SUSPENDED
    assert settled(seen(suspend=True)).actions == ()


def test_an_edit_of_a_started_stage_is_said_and_not_done() -> None:
    observed = seen({"c-m": stage_job("Training")})
    edited = dict(observed.spec)
    edited["stages"] = [{"name": "m", "training": {"epochs": 9}}, {"name": "s"}]
    plan = settled(replace(observed, spec=edited))
    assert plan.actions == ()
    validated = next(c for c in plan.status.conditions if c.type == reasons.VALIDATED)
    assert "stage m: started with another spec" in validated.message


LIMITS = {"backoffLimit": 9, "activeDeadlineSeconds": 900, "stallTimeoutSeconds": 60}
SPENT = stage_job(reasons.BACKOFF_LIMIT_EXCEEDED, "False")


def limited(jobs: dict[str, StageJob], limits: dict[str, Any], **changes: Any) -> ObservedChain:
    """A chain whose first stage has these limits now."""
    observed = seen(jobs, **changes)
    stages = [{"name": "m", **limits}, {"name": "s"}]
    return replace(observed, spec=dict(observed.spec) | {"stages": stages})


@pytest.mark.parametrize("job", [stage_job("Training"), SPENT], ids=["running", "failed"])
@pytest.mark.parametrize("field", LIMITS)
def test_a_stage_s_limits_are_handed_to_its_job(job: StageJob, field: str) -> None:
    """To run it again would lose all that it has learnt."""
    limits = {field: LIMITS[field]}
    plan = settled(limited({"c-m": job}, limits))
    assert plan.actions == (SetStageFields("c-m", limits),)
    assert validated(plan) == ""
    has = replace(job, spec=dict(job.spec) | limits)
    assert settled(limited({"c-m": has}, limits)).actions == ()


def test_a_limit_that_is_taken_out_is_taken_out_of_the_job() -> None:
    job = stage_job("Training")
    job = replace(job, spec=dict(job.spec) | LIMITS)
    [action] = settled(limited({"c-m": job}, {})).actions
    assert isinstance(action, SetStageFields)
    assert action.fields == {
        "backoffLimit": 6, "activeDeadlineSeconds": None, "stallTimeoutSeconds": 900,
    }  # fmt: skip


def test_a_chain_goes_on_with_a_stage_that_goes_on() -> None:
    failed = settled(limited({"c-m": SPENT}, {}))
    assert succeeded(failed).reason == reasons.STAGE_FAILED
    again = limited({"c-m": stage_job(reasons.RESTARTING)}, {})
    assert succeeded(settled(replace(again, status=failed.status))).status == "Unknown"


def test_limits_start_nothing_that_is_not_wanted() -> None:
    """Neither in a chain that is suspended, nor a trial that failed before another was chosen."""
    limits = {"backoffLimit": 9}
    assert settled(limited({"c-m": SPENT}, limits, suspend=True)).actions == ()
    going = stage_job("Suspended")
    going = replace(going, spec=dict(going.spec) | {"suspend": True})
    assert settled(limited({"c-m": going}, limits, suspend=True)).actions == (
        SetStageFields("c-m", limits),
    )
    done = settled(limited({"c-m": DONE}, limits))
    assert [type(action) for action in done.actions] == [CreateStageJob]
    assert validated(done) == ""


def validated(plan: ChainPlan) -> str:
    return next(c.message for c in plan.status.conditions if c.type == reasons.VALIDATED)


def test_a_strangers_job_is_not_taken_over() -> None:
    plan = settled(seen({"c-m": replace(stage_job("Training"), ours=False)}))
    assert succeeded(plan).reason == reasons.INVALID_SPEC
    assert "not of this chain" in succeeded(plan).message


def test_jobs_of_the_deleted_chain_before_it_are_waited_for() -> None:
    left = replace(DONE, ours=False, leaving=True)
    plan = settled(seen({"c-m": left, "c-s": left}))
    assert plan.actions == ()
    assert succeeded(plan).status == "Unknown"
    assert "c-m, c-s" in succeeded(plan).message
    assert settled(replace(seen(), status=plan.status)).actions[0].stage == "m"


def test_the_end() -> None:
    plan = settled(seen({"c-m": DONE, "c-s": DONE}))
    assert succeeded(plan).status == "True"
    assert plan.status.progress == 100
    assert plan.status.current_stage == "s 2/2"
