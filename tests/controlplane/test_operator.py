"""The operator as a process under its own role, on a real API server; a stand-in trains."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
from operator_kit import Bench, Operator, distilling, job, template, wait_for

pytestmark = [pytest.mark.controlplane, pytest.mark.timeout(600)]


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
