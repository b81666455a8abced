"""Jobs with real gangs on the real control plane, and what happens to them on the way."""

from __future__ import annotations

import json
from typing import Any

import pytest
from operator_kit import Operator, wait_for

from e2e.kit import SLOW_SECONDS, Team

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2 * SLOW_SECONDS)]


@pytest.fixture(scope="module")
def calm(team: Team) -> dict[str, Any]:
    """The status of a job that nothing happened to; two more start beside it."""
    # Long enough to be struck on the way, however fast the machine.
    steps = {"training": {"maxSteps": 200}}
    team.apply(team.tuned("calm", **steps), team.tuned("struck", **steps))
    team.apply(team.distilled("taught", "calm", training={"deepSpeed": {"zeroStage": 3}}))
    team.steps("struck", 2)
    team.kill(team.pod("struck", 1))
    return team.ends("calm", "Completed")


def test_a_job_succeeds(team: Team, calm: dict[str, Any]) -> None:
    assert team.condition("calm")["status"] == "True"
    assert calm["progress"]["percentage"] == 100
    [perplexity] = [m["value"] for m in calm["metrics"] if m["name"] == "perplexity"]
    assert perplexity > 1
    model = team.objects(calm["model"]["uri"])
    assert {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "MODEL_CARD.md", "report.json", "report.html",
    } <= set(model)  # fmt: skip
    assert json.loads(model["config.json"])["num_hidden_layers"] == 2


def test_a_killed_member_costs_an_attempt_and_no_bit(team: Team, calm: dict[str, Any]) -> None:
    status = team.ends("struck", "Completed")
    first, second = status["attempts"]
    assert first["reason"] != "Completed"
    assert second["resumedFromStep"] >= 2
    assert status["fence"] == 2
    assert team.weights("struck") == team.weights("calm")


def test_a_student_under_zero_3_learns_from_the_stream(team: Team, calm: dict[str, Any]) -> None:
    status = team.ends("taught", "Completed")
    assert status["teacherStream"]["complete"]
    assert team.condition("taught", "TeacherReady")["reason"] == "StreamComplete"
    found = {metric["name"]: metric["value"] for metric in status["metrics"]}
    assert found["perplexity"] > 1
    assert 0 <= found["teacherAgreement"] <= 1
    ratio = found["perplexity"] / found["teacherPerplexity"]
    assert found["perplexityRatio"] == pytest.approx(ratio, rel=1e-3)


@pytest.fixture(scope="module")
def frozen(team: Team, calm: dict[str, Any]) -> str:
    """The writer of `frosty`, which answers nobody any more."""
    quick = {"startupProbe": {"periodSeconds": 1}, "livenessProbe": {"periodSeconds": 1}}
    pods = {"spec": {"terminationGracePeriodSeconds": 2,
                     "containers": [{"name": "trainer", **quick}]}}  # fmt: skip
    job = team.distilled(
        "frosty", "calm", stallTimeoutSeconds=60, workers={"nodes": 1},
        data={"sequenceLength": 48}, training={"maxSteps": 2},
    )  # fmt: skip
    job["spec"]["teacher"]["workers"]["template"] = pods
    team.apply(job)
    of_writers = ("-l", "kubedistill.dev/job=frosty,kubedistill.dev/role=teacher")

    def running() -> list[str]:
        found = team.get("pods", *of_writers, "--field-selector=status.phase=Running")
        return [pod["metadata"]["name"] for pod in found["items"]]

    wait_for(lambda: bool(running()), "no writer runs", SLOW_SECONDS)
    [pod] = running()
    team.handle.faults.freeze(team.namespace, pod)
    return pod


def test_a_stream_that_is_there_is_not_made_again(
    team: Team, calm: dict[str, Any], frozen: str
) -> None:
    first = team.ends("taught", "Completed")
    short = {"maxSteps": 2, "deepSpeed": {"zeroStage": 1}}
    team.apply(team.distilled("taught-again", "calm", training=short, workers={"nodes": 1}))
    status = team.ends("taught-again", "Completed")
    assert status["resolved"]["streamUri"] == first["teacherStream"]["uri"] != ""
    ready = team.condition("taught-again", "TeacherReady")
    assert (ready["reason"], ready["message"]) == ("NotNeeded", "the stream was already there")


def test_suspended_with_its_operator_killed_and_resumed(team: Team, operator: Operator) -> None:
    team.apply(team.tuned("paused", training={"maxSteps": 600, "deepSpeed": {"zeroStage": 2}}))
    team.steps("paused", 2)
    operator.kill()
    operator.start()
    team.kubectl("patch", "dj", "paused", "--type=merge", "-p", '{"spec": {"suspend": true}}')
    status = team.wait_state("paused", "Suspended", seconds=SLOW_SECONDS)
    (attempt,) = status["attempts"]
    assert (attempt["reason"], attempt["charged"]) == ("GracefulCheckpoint", False)
    pods = team.get("pods", "-l", "kubedistill.dev/job=paused")["items"]
    assert [p for p in pods if p["status"]["phase"] == "Running"] == []
    team.kubectl("patch", "dj", "paused", "--type=merge", "-p", '{"spec": {"suspend": false}}')
    status = team.ends("paused", "Completed")
    assert status["attempts"][1]["resumedFromStep"] == attempt["lastStep"]


def test_a_frozen_writer_is_followed_by_another(team: Team, frozen: str) -> None:
    """Its GPUs would idle until the job's deadline."""
    status = team.ends("frosty", "Completed")
    assert status["teacherStream"]["complete"]
    assert [attempt["reason"] for attempt in status["attempts"]] == ["Completed"]
    events = team.get("events", "--field-selector", f"involvedObject.name={frozen}")["items"]
    said = [event["message"] for event in events if event["reason"] == "Killing"]
    assert [text for text in said if "probe" in text], events


def test_nothing_is_left_of_a_job_deleted_on_its_way(team: Team, operator: Operator) -> None:
    team.apply(team.tuned("dropped", training={"maxSteps": 2000}))
    team.steps("dropped", 2)
    team.kubectl("delete", "dj", "dropped")

    def left() -> list[str]:
        items = team.get("jobs,pods,services,configmaps")["items"]
        return [i["metadata"]["name"] for i in items if i["metadata"]["name"].startswith("dropped")]

    wait_for(lambda: not left(), "something is left after the job was deleted", SLOW_SECONDS)
