"""What the API server refuses, what went out of sight, and what the operator remembers of pods."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from kubedistill_api import names, reasons
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.runspec import ProgressReport
from kubedistill_api.status import Attempt, DistillationJobStatus, ResolvedModel
from kubedistill_operator.cache import Cache, Raw
from kubedistill_operator.cluster import ApiError, Conflict, NotFound
from kubedistill_operator.effects import InputsLost, NameTaken
from kubedistill_operator.observe import observe_job
from kubedistill_operator.plan.actions import CreateGang, Inputs
from kubedistill_operator.plan.inputs import missing_models
from kubedistill_operator.plan.times import format_time
from kubedistill_operator.progress import contact_of
from kubedistill_operator.reconcile import refusal_of
from kubedistill_operator.resources import run_specs
from kubedistill_operator.resources.owner import Owner
from test_plan_kit import NOW, UID, spec

ACTION = CreateGang(1, 1)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ApiError(403, "Forbidden", "exceeded quota"), reasons.CREATION_REFUSED),
        (ApiError(422, "Invalid", "spec"), reasons.CREATION_REFUSED),
        (ApiError(400, "BadRequest", "admission webhook denied"), reasons.CREATION_REFUSED),
        (NameTaken("Job ml/x belongs to something else"), reasons.NAME_TAKEN),
        (InputsLost("ConfigMap x"), reasons.CREATION_REFUSED),
        (Conflict(409, "Conflict", ""), None),
        (NotFound(404, "NotFound", ""), None),
        (ApiError(429, "TooManyRequests", ""), None),
        (ApiError(500, "InternalError", ""), None),
        (ApiError(503, "Unavailable", ""), None),
    ],
)
def test_what_is_told_and_what_is_only_tried_again(error: Exception, reason: str | None) -> None:
    refusal = refusal_of(ACTION, error)
    assert (refusal.reason if refusal else None) == reason
    if refusal is not None:
        assert refusal.action == ACTION
        assert refusal.message


def pod(version: int, **labels: str) -> Raw:
    return {
        "metadata": {
            "namespace": "ml", "name": "p", "uid": "u", "resourceVersion": str(version),
            "labels": {names.LABEL_JOB: "small", **labels},
        }
    }  # fmt: skip


def test_what_lost_its_labels_comes_back_and_what_was_deleted_does_not() -> None:
    kind = Cache().pods
    assert kind.put(pod(5))
    assert kind.remove(pod(7))
    assert not kind.put(pod(6))
    assert not kind.put(pod(7))
    assert [raw["metadata"]["name"] for raw in kind.gone("ml", "small")] == ["p"]
    assert kind.put(pod(8))
    assert not list(kind.gone("ml", "small"))
    assert kind.get("ml", "p") is not None


def dependent(name: str, **status: Any) -> Raw:
    metadata = {"namespace": "ml", "name": name, "uid": name, "resourceVersion": "1"}
    return {
        "metadata": metadata | {"generation": 1},
        "spec": spec(teacher={"fromJob": {"name": "small"}}),
        "status": status,
    }


def ended(status: str, reason: str) -> dict[str, Any]:
    return {"conditions": [{"type": "Succeeded", "status": status, "reason": reason}]}


@pytest.mark.parametrize(
    ("status", "waits"),
    [
        ({}, True),
        (ended("Unknown", "WaitingForDependency"), True),
        ({"startTime": "2026-01-02T03:04:05Z"}, False),
        (ended("False", "InvalidSpec"), False),
    ],
)
def test_who_waits_for_a_model(status: dict[str, Any], waits: bool) -> None:
    cache = Cache()
    metadata = {"namespace": "ml", "name": "small", "uid": UID, "resourceVersion": "1"}
    first: Raw = {"metadata": metadata | {"generation": 1}, "spec": spec()}
    cache.put_job(first)
    cache.put_job(dependent("next", **status))
    seen = observe_job(cache, first, NOW, None, None)
    assert seen.waited_for_by == (("next",) if waits else ())
    assert not seen.of_chain
    owned = {**first, "metadata": first["metadata"] | {
        "ownerReferences": [{"kind": "DistillationChain", "name": "c", "uid": "c"}]
    }}  # fmt: skip
    assert observe_job(cache, owned, NOW, None, None).of_chain


FROM = {"fromJob": {"name": "small"}}


@pytest.mark.parametrize(
    ("parts", "status", "waits"),
    [
        ({"template": {"teacher": FROM}}, {}, True),
        ({"template": {"student": FROM}}, ended("Unknown", "StageRunning"), True),
        ({"stages": [{"name": "m"}, {"name": "s", "teacher": FROM}]}, {}, True),
        # It goes on once its stage is mended.
        ({"stages": [{"name": "s", "student": FROM}]}, ended("False", "StageFailed"), True),
        ({"template": {"teacher": FROM}}, ended("True", "Completed"), False),
        ({"template": {"teacher": {"fromJob": {"name": "other"}}}}, {}, False),
        ({"template": {}, "stages": "x"}, {}, False),
        ({"template": "x", "stages": ["x", None, {"teacher": "x"}]}, {}, False),
    ],
)
def test_a_chain_waits_for_models_of_jobs_that_it_has_still_to_make(
    parts: dict[str, Any], status: dict[str, Any], waits: bool
) -> None:
    cache = Cache()
    metadata = {"namespace": "ml", "name": "small", "uid": UID, "resourceVersion": "1"}
    first: Raw = {
        "metadata": metadata | {"generation": 1},
        "spec": spec(ttlSecondsAfterFinished=0),
        "status": ended("True", "Completed"),
    }
    cache.put_job(first)
    other = {"namespace": "ml", "name": "c", "uid": "c", "resourceVersion": "2"}
    cache.chains.put({"metadata": other, "spec": parts, "status": status})
    apart = other | {"namespace": "other", "uid": "d"}
    cache.chains.put({"metadata": apart, "spec": {"template": {"teacher": FROM}}})
    going = other | {"name": "going", "uid": "g", "deletionTimestamp": "2026-01-02T03:04:05Z"}
    cache.chains.put({"metadata": going, "spec": {"template": {"teacher": FROM}}})
    seen = observe_job(cache, first, NOW, None, None)
    assert seen.waited_for_by == (("c",) if waits else ())


def test_the_time_of_a_step_is_that_of_our_own_clock() -> None:
    def answer(step: int) -> ProgressReport:
        return ProgressReport(attempt=1, step=step, last_step_time=step * 1.0)

    first = contact_of(answer(1), None, NOW)
    same = contact_of(answer(1), first, NOW + timedelta(seconds=5))
    assert (same.reached_at, same.stepped_at) == (NOW + timedelta(seconds=5), NOW)
    later = contact_of(answer(2), same, NOW + timedelta(seconds=9))
    assert later.stepped_at == NOW + timedelta(seconds=9)


MODEL = ResolvedModel(uri="s3://m", digest="d", job="a")


@pytest.mark.parametrize(
    ("changes", "teacher", "student", "missing"),
    [
        ({}, None, None, True),
        ({}, MODEL, None, False),
        ({"student": {"fromJob": {"name": "b"}}}, MODEL, None, True),
        ({"student": {"fromJob": {"name": "b"}}}, MODEL, MODEL, False),
        ({"teacher": {"endpoint": {"url": "http://x/v1", "model": "m"}}}, None, None, False),
        ({"teacher": None, "distill": None, "fineTune": {}}, None, None, False),
    ],
)
def test_models_that_a_status_lacks(
    changes: dict[str, Any], teacher: Any, student: Any, missing: bool
) -> None:
    whole = DistillationJobSpec.model_validate(spec(**changes))
    assert missing_models(whole, teacher, student) == missing


def test_the_run_spec_of_an_attempt_that_is_smaller() -> None:
    owner = Owner("ml", "small", UID)
    whole = DistillationJobSpec.model_validate(spec(workers={"nodes": 4, "gpusPerNode": 8}))
    base = run_specs.base_run_spec(owner, whole, Inputs("abc", MODEL), "student")
    attempt = Attempt(number=3, fence=5, nodes=2, micro_batch_size=1)
    end = {"start_time": format_time(NOW), "end_time": format_time(NOW + timedelta(seconds=3000))}
    struck = Attempt(number=1, fence=1, reason="Error", charged=True, rank_restarts=2, **end)
    status = DistillationJobStatus(attempts=[struck, attempt], save_seconds=7.5, furthest_commit=40)
    run = run_specs.student_run_spec(base, attempt, 90, status)
    assert run.rendezvous is not None
    assert (run.rendezvous.nodes, run.rendezvous.ranks_per_node) == (2, 8)
    assert (run.attempt, run.fence, run.micro_batch_size) == (3, 5, 1)
    assert (run.mean_seconds_between_failures, run.failures_seen) == (1000, 3)
    assert (run.save_seconds, run.committed_step) == (7.5, 40)
    first = Attempt(number=1, fence=1)
    plain = run_specs.student_run_spec(base, first, 90, DistillationJobStatus(attempts=[first]))
    assert plain.rendezvous is not None
    assert plain.rendezvous.nodes == 4
    assert plain.micro_batch_size is None
