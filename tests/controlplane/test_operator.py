"""The operator as a process under its own role, on a real API server; a stand-in trains."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from operator_kit import Bench, Operator, job, template, wait_for

pytestmark = [pytest.mark.controlplane, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def operator(account: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """One operator for the tests that do not break it."""
    running = Operator(account, tmp_path_factory.mktemp("operator") / "log")
    yield running
    assert running.stop() == 0


@pytest.fixture
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on the node that stands for S3: it outlives pods."""
    folder = tmp_path_factory.mktemp("book")
    folder.chmod(0o777)
    for parent in (folder.parent, folder.parent.parent):
        parent.chmod(0o755)
    return folder


FAST = {"checkpoint": {"interval": 5}}


def distilling(name: str, pods: dict[str, Any], **spec: Any) -> dict[str, Any]:
    return job(name, pods, **FAST, **spec)


def test_a_job_goes_all_the_way(bench: Bench, operator: Operator, book: Path) -> None:
    bench.apply(distilling("whole", template(book)))
    status = bench.wait_state("whole", "Completed")
    assert status["model"] == {"uri": "s3://runs/m", "digest": "d" * 8, "parameters": 1000}
    assert status["metrics"] == [{"name": "perplexity", "value": 12.5}]
    assert status["progress"]["percentage"] == 100
    assert status["teacherStream"]["complete"]
    assert [a["reason"] for a in status["attempts"]] == ["Completed"]
    reasons = {e["reason"] for e in bench.get("events")["items"]}
    assert {"Validated", "StreamComplete", "AttemptStarted", "Completed"} <= reasons
    refused = bench.apply(distilling("whole", template(book), training={"epochs": 9}), check=False)
    assert "spec.training cannot change once the job has started" in refused
    meta = bench.get("dj", "whole")["metadata"]
    assert "finalizers" not in meta
    assert not any("kopf" in key for key in meta["annotations"])
    time.sleep(3)
    version = meta["resourceVersion"]
    assert bench.get("dj", "whole")["metadata"]["resourceVersion"] == version
    bench.kubectl("delete", "dj", "whole")
    kinds = "jobs,pods,services,configmaps"

    def nothing_left() -> bool:
        left = [i for i in bench.get(kinds)["items"] if i["metadata"]["name"] != "kube-root-ca.crt"]
        return not left

    wait_for(nothing_left, "something is left after the job was deleted")


def test_a_failed_gang_resumes(bench: Bench, operator: Operator, book: Path) -> None:
    pods = template(book, "fail-once")
    bench.apply(distilling("gang", pods, workers={"nodes": 2, "gpusPerNode": 0, "template": pods}))
    status = bench.wait_state("gang", "Completed")
    first, second = status["attempts"]
    assert (first["reason"], first["charged"]) == ("OutOfMemory", True)
    assert "CUDA out of memory" in first["message"]
    assert second["resumedFromStep"] >= 5
    assert (status["fence"], status["restarts"], status["failures"]) == (2, 1, 0)


def test_a_stall_is_ended(bench: Bench, operator: Operator, book: Path) -> None:
    bench.apply(distilling("stuck", template(book, "stall"), stallTimeoutSeconds=10))
    status = bench.wait_state("stuck", "Completed", seconds=120)
    assert status["attempts"][0]["reason"] == "Stalled"


def test_suspension_commits_and_resumes(bench: Bench, operator: Operator, book: Path) -> None:
    bench.apply(distilling("pause", template(book, STEPS="60")))
    wait_for(lambda: (bench.status("pause").get("progress") or {}).get("step", 0) > 2, "no step")
    patch = '{"spec": {"suspend": %s}}'
    bench.kubectl("patch", "dj", "pause", "--type=merge", "-p", patch % "true")
    status = bench.wait_state("pause", "Suspended")
    assert status["attempts"][0]["reason"] == "GracefulCheckpoint"
    assert not status["attempts"][0]["charged"]
    active = [p for p in bench.get("pods")["items"] if p["status"]["phase"] == "Running"]
    assert active == []
    bench.kubectl("patch", "dj", "pause", "--type=merge", "-p", patch % "false")
    status = bench.wait_state("pause", "Completed")
    assert status["attempts"][1]["resumedFromStep"] == status["attempts"][0]["lastStep"]


@pytest.mark.parametrize(
    ("behaviour", "reason", "words"),
    [
        ("bad-data", "UnreadableInput", "upload the file"),
        ("teacher-fails", "TeacherFailed", "no config.json"),
    ],
)
def test_what_fails_says_why(
    bench: Bench, operator: Operator, book: Path, behaviour: str, reason: str, words: str
) -> None:
    bench.apply(distilling("bad", template(book, behaviour)))
    bench.wait_state("bad", reason)
    assert words in bench.condition("bad")["message"]


def test_retries_run_out(bench: Bench, operator: Operator, book: Path) -> None:
    bench.apply(distilling("doomed", template(book, "fail-always"), backoffLimit=1))
    status = bench.wait_state("doomed", "BackoffLimitExceeded")
    assert len(status["attempts"]) == 2
    assert "boom" in bench.condition("doomed")["message"]


def test_a_missing_secret_is_waited_for(bench: Bench, operator: Operator, book: Path) -> None:
    storage = {"uri": "s3://runs/test", "secretRef": {"name": "keys"}}
    bench.apply(distilling("keyless", template(book), storage=storage))
    bench.wait_state("keyless", "SecretNotFound")
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    bench.kubectl(
        "create", "secret", "generic", "keys", *(f"--from-literal={key}=x" for key in keys)
    )
    bench.wait_state("keyless", "Completed")


def test_dependencies_wait_and_follow(bench: Bench, operator: Operator, book: Path) -> None:
    from_first = {"fromJob": {"name": "first"}, "delivery": "Online"}
    bench.apply(distilling("second", template(book), teacher=from_first))
    bench.wait_state("second", "DependencyNotFound")
    bench.apply(distilling("first", template(book)))
    bench.wait_state("second", "WaitingForDependency", "Validating", "Starting")
    bench.wait_state("second", "Completed", seconds=120)


def test_a_circle_is_printed_and_can_be_broken(bench: Bench, operator: Operator) -> None:
    def waits_for(name: str) -> dict[str, Any]:
        return {"fromJob": {"name": name}, "delivery": "Online"}

    bench.apply(job("a", teacher=waits_for("b")), job("b", teacher=waits_for("a")))
    bench.wait_state("a", "DependencyCycle")
    bench.wait_state("b", "DependencyCycle")
    assert "a → b → a" in bench.condition("a")["message"]
    bench.apply(job("b", teacher=waits_for("c")))
    bench.wait_state("b", "DependencyNotFound")
    bench.wait_state("a", "WaitingForDependency")


def chain(name: str, pods: dict[str, Any], *stages: dict[str, Any]) -> dict[str, Any]:
    shared = job("x", pods)["spec"]
    shared.pop("teacher")
    shared["workers"] = {"nodes": 1, "gpusPerNode": 0, "template": pods}
    return {
        "apiVersion": "kubedistill.dev/v1alpha1",
        "kind": "DistillationChain",
        "metadata": {"name": name},
        "spec": {
            "initialTeacher": {"model": {"uri": "s3://models/big"}},
            "template": {**shared, "teacher": {"delivery": "Online"}},
            "stages": list(stages),
        },
    }


def test_a_chain_runs_its_stages_in_order(bench: Bench, operator: Operator, book: Path) -> None:
    stages = ({"name": "m"}, {"name": "s"}, {"name": "tuned", "fineTune": {}})
    bench.apply(chain("steps", template(book), *stages))
    status = bench.wait_state("steps", "Completed", seconds=300, resource="dchain")
    assert [s["state"] for s in status["stages"]] == ["Completed"] * 3
    assert status["progress"] == 100
    assert bench.get("dj", "steps-s")["spec"]["teacher"]["fromJob"] == {"name": "steps-m"}
    tuned = bench.get("dj", "steps-tuned")["spec"]
    assert "teacher" not in tuned
    assert tuned["student"] == {"fromJob": {"name": "steps-s"}}


def test_a_sweep_outlives_its_operator_and_a_deleted_trial(
    bench: Bench, operator: Operator, book: Path
) -> None:
    swept = {"name": "m", "sweep": {"temperature": [4, 2], "parallelism": 2}}
    bench.apply(chain("sweeps", template(book), swept, {"name": "s"}))

    def state() -> Any:
        stages = bench.status("sweeps", "dchain").get("stages")
        return stages and stages[0]["trials"][0]["state"]

    wait_for(lambda: state() == "Training", "the first trial does not train")
    uid = bench.get("dj", "sweeps-m-t4")["metadata"]["uid"]
    operator.kill()
    bench.kubectl("delete", "dj", "sweeps-m-t4")
    operator.restart()
    status = bench.wait_state("sweeps", "Completed", seconds=300, resource="dchain")
    assert bench.get("dj", "sweeps-m-t4")["metadata"]["uid"] != uid
    stage = status["stages"][0]
    table = [(t["temperature"], t["state"], t["perplexity"], t["chosen"]) for t in stage["trials"]]
    assert table == [(4, "Completed", 12.5, False), (2, "Completed", 12.5, True)]
    assert "of equals the lower temperature is taken" in stage["choice"]
    assert bench.get("dj", "sweeps-s")["spec"]["teacher"]["fromJob"] == {"name": "sweeps-m-t2"}
    wait_for(
        lambda: bench.status("sweeps", "dchain")["stages"][0]["report"] == "Written",
        "the chain does not see that the reports are written",
    )


def test_a_sweep_that_cannot_be_tried_is_refused(bench: Bench, operator: Operator) -> None:
    twice = {"name": "m", "sweep": {"temperature": [2, 4, 2]}}
    assert "a temperature is listed twice" in bench.apply(chain("twice", {}, twice), check=False)
    unknown = {"name": "m", "sweep": {"temperature": [2], "select": {"metric": "perplexty"}}}
    bench.apply(chain("unknown", {}, unknown))
    bench.wait_state("unknown", "InvalidSpec", resource="dchain")
    message = bench.condition("unknown", "Validated", "dchain")["message"]
    assert "sweep.select.metric: found perplexty (no such metric); write perplexity, or" in message


def test_a_chain_made_again_waits_for_the_jobs_of_the_one_before(
    bench: Bench, operator: Operator, book: Path
) -> None:
    whole = chain("again", template(book), {"name": "m"})
    bench.apply(whole)
    bench.wait_state("again", "Completed", seconds=300, resource="dchain")

    def hold(*finalizers: str) -> None:
        patch = json.dumps({"metadata": {"finalizers": finalizers}})
        bench.kubectl("patch", "dj", "again-m", "--type=merge", "-p", patch)

    hold("kubedistill.dev/test")
    bench.kubectl("delete", "dchain", "again")
    bench.apply(whole)
    bench.wait_state("again", "WaitingForDependency", resource="dchain")
    hold()
    bench.wait_state("again", "Completed", seconds=300, resource="dchain")
    bench.kubectl("delete", "dchain", "again")
    wait_for(lambda: not bench.get("dj")["items"], "a stage's job is left")


def test_a_chain_stops_at_a_failed_stage(bench: Bench, operator: Operator, book: Path) -> None:
    bench.apply(chain("stops", template(book, "bad-data"), {"name": "m"}, {"name": "s"}))
    bench.wait_state("stops", "StageFailed", seconds=150, resource="dchain")
    assert "stage m failed" in bench.condition("stops", resource="dchain")["message"]
    assert len(bench.get("dj")["items"]) == 1


def test_a_chain_waits_at_a_gate_until_it_is_loosened(
    bench: Bench, operator: Operator, book: Path
) -> None:
    """The stand-in has a perplexity of 12.5, and nothing is trained a second time."""

    def stages(bound: float) -> tuple[dict[str, Any], ...]:
        return {"name": "m", "gates": [{"metric": "perplexity", "max": bound}]}, {"name": "s"}

    bench.apply(chain("gated", template(book), *stages(10)))
    status = bench.wait_state("gated", "StageFailed", seconds=150, resource="dchain")
    told = "stage m failed (GateFailed): perplexity 12.5 > 10"
    assert bench.condition("gated", resource="dchain")["message"] == told
    assert (status["stages"][0]["state"], status["stages"][0]["model"]) == (
        "GateFailed",
        "s3://runs/m",
    )
    assert [j["metadata"]["name"] for j in bench.get("dj")["items"]] == ["gated-m"]
    attempts = bench.status("gated-m")["attempts"]
    bench.apply(chain("gated", template(book), *stages(15)))
    bench.wait_state("gated", "Completed", seconds=150, resource="dchain")
    assert bench.condition("gated-m", "GatesPassed")["message"] == "perplexity 12.5 ≤ 15"
    assert bench.status("gated-m")["attempts"] == attempts
    assert bench.get("dj", "gated-s")["spec"]["teacher"]["fromJob"] == {"name": "gated-m"}


def test_a_gate_that_no_job_can_measure_is_refused(bench: Bench, operator: Operator) -> None:
    bench.apply(distilling("odd", {}, gates=[{"metric": "perplexityRatoi", "max": 1.1}]))
    bench.wait_state("odd", "InvalidSpec")
    message = bench.condition("odd", "Validated")["message"]
    assert (
        "spec.gates[0].metric: found perplexityRatoi (no such metric); write perplexityRatio"
        in (message)
    )
    assert bench.get("jobs")["items"] == []


def test_an_operator_that_is_killed_goes_on(
    bench: Bench, account: Path, operator: Operator, book: Path, tmp_path: Path
) -> None:
    operator.process.send_signal(signal.SIGSTOP)
    second = Operator(account, tmp_path / "second")
    try:
        wait_for(lambda: second.leads, "the standby did not take over", 120)
        bench.apply(distilling("survivor", template(book, STEPS="60")))
        bench.wait_state("survivor", "Training")
        second.kill()
        # The stopped one wakes with a lease that is not its own: it must end, not write.
        operator.process.send_signal(signal.SIGCONT)
        assert operator.process.wait(120) == 1
        third = Operator(account, tmp_path / "third")
        try:
            status = bench.wait_state("survivor", "Completed", seconds=240)
            assert len(status["attempts"]) == 1
            assert status["fence"] == 1
        finally:
            assert third.stop() == 0
    finally:
        second.stop()
        operator.restart()
