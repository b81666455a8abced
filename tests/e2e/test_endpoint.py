"""A teacher behind a server, on the real control plane: key, writers, student, figures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from endpoint_kit import Fault, Server, serving

from e2e.endpoint import small_mind
from e2e.kit import SLOW_SECONDS, Team

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2 * SLOW_SECONDS)]
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "14-endpoint-logits.yaml"
NAME = "endpoint-logits"
KEY = "sk-0123456789-secret"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(small_mind()) as running:
        running.key = KEY
        yield running


def test_a_key_that_is_missing_is_waited_for_and_reaches_those_who_ask(
    team: Team, server: Server
) -> None:
    server.faults = [None, None, Fault(503, {"Retry-After": "0.2"}), Fault("half"), Fault("reset")]
    team.apply(*team.example(EXAMPLE, server.url))
    team.wait_state(NAME, "SecretNotFound", seconds=SLOW_SECONDS)
    assert "Secret vllm with API_KEY" in team.condition(NAME)["message"]
    assert not server.seen
    team.kubectl("create", "secret", "generic", "vllm", f"--from-literal=API_KEY={KEY}")
    status = team.ends(NAME, "Completed")
    stream = status["teacherStream"]
    assert (stream["payload"], stream["complete"]) == ("Sparse", True)
    assert {seen.key for seen in server.seen} == {KEY}
    figures = {metric["name"] for metric in status["metrics"]}
    assert "teacherAgreement" in figures and "perplexityRatio" not in figures
    [manifest] = [b for k, b in team.objects(stream["uri"]).items() if k == "manifest.json"]
    origin = json.loads(manifest)["origin"]
    assert origin == {
        "url": server.url, "model": "tiny", "way": "prompt_logprobs", "temperature": 1.0,
    }  # fmt: skip
    # Its model is asked what the student is, and timed.
    assert {"teacherSimpleAccuracy", "teacherHallucinationRate"} <= figures
    report = json.loads(team.objects(status["model"]["uri"])["report.json"])
    assert not report["notMeasured"]
    assert report["performance"]["teacher"]["device"] == "the server of tiny"
    assert [pace["batch"] for pace in report["performance"]["teacher"]["batches"]] == [1, 8]
    assert report["teacher"]["model"] == "tiny" and report["teacher"]["uri"] == server.url


def test_nobody_else_has_the_key(team: Team) -> None:
    team.ends(NAME, "Completed")
    roles = {}
    for job in team.get("jobs", "-l", f"kubedistill.dev/job={NAME}")["items"]:
        [container] = job["spec"]["template"]["spec"]["containers"]
        roles[container["args"][0]] = {entry["name"] for entry in container["env"]}
        assert "nvidia.com/gpu" not in json.dumps(job)
    assert roles.keys() >= {"teacher", "student"}
    assert {role for role, names in roles.items() if "API_KEY" in names} <= {"preflight", "teacher"}
    assert "API_KEY" in roles["teacher"] and "API_KEY" not in roles["student"]
    logs = (team.handle.logs / team.namespace).glob("*/*.log")
    assert not [path for path in logs if KEY in path.read_text()]
    assert KEY not in json.dumps(team.get("dj", NAME)) + json.dumps(team.get("events"))
