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


def test_a_stream_that_is_there_is_not_made_again(team: Team, calm: dict[str, Any]) -> None:
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
    assert [p for p in team.get("pods")["items"] if p["status"]["phase"] == "Running"] == []
    team.kubectl("patch", "dj", "paused", "--type=merge", "-p", '{"spec": {"suspend": false}}')
    status = team.ends("paused", "Completed")
    assert status["attempts"][1]["resumedFromStep"] == attempt["lastStep"]


def test_nothing_is_left_of_a_job_deleted_on_its_way(team: Team, operator: Operator) -> None:
    team.apply(team.tuned("dropped", training={"maxSteps": 2000}))
    team.steps("dropped", 2)
    team.kubectl("delete", "dj", "dropped")

    def left() -> list[str]:
        items = team.get("jobs,pods,services,configmaps")["items"]
        return [i["metadata"]["name"] for i in items if i["metadata"]["name"].startswith("dropped")]

    wait_for(lambda: not left(), "something is left after the job was deleted", SLOW_SECONDS)
