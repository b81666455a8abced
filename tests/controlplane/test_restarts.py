"""Restarts on a real API server: memory, room, limits, expiry. A stand-in trains."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from devcluster.node.api import ApiError
from operator_kit import (
    ONLINE,
    Bench,
    Operator,
    chain,
    distilling,
    job,
    template,
    wait_for,
)

pytestmark = [pytest.mark.controlplane, pytest.mark.timeout(600)]


def online(name: str, pods: dict[str, Any], nodes: int = 1, **spec: Any) -> dict[str, Any]:
    workers = {"nodes": nodes, "gpusPerNode": 0, "template": pods} | spec.pop("workers", {})
    return distilling(name, pods, teacher=ONLINE, workers=workers, **spec)


def run_spec(bench: Bench, name: str) -> dict[str, Any]:
    """What the operator handed the containers of an attempt."""
    return dict(json.loads(bench.get("configmap", name)["data"]["run.json"]))


def test_out_of_memory_shrinks_the_micro_batch_once(
    bench: Bench, operator: Operator, book: Path
) -> None:
    training = {"globalBatchSize": 48, "microBatchSize": 8, "onOutOfMemory": "Shrink"}
    pods = template(book, "big-batch", FITS="4", STEPS="40")
    bench.apply(online("shrinks", pods, training=training, backoffLimit=0))
    bench.wait_state("shrinks", "Training")
    assert run_spec(bench, "shrinks-a2")["microBatchSize"] == 4
    status = bench.wait_state("shrinks", "Completed")
    first, second = status["attempts"]
    assert (first["reason"], first["charged"]) == ("OutOfMemory", False)
    assert "take 4 in place of 8 sequences at once" in first["message"]
    assert (second["microBatchSize"], status["microBatchLimit"]) == (4, 4)


def test_out_of_memory_twice_is_a_failure(bench: Bench, operator: Operator, book: Path) -> None:
    training = {"globalBatchSize": 48, "microBatchSize": 8, "onOutOfMemory": "Shrink"}
    pods = template(book, "big-batch", FITS="1")
    bench.apply(online("hungry", pods, training=training, backoffLimit=0))
    status = bench.wait_state("hungry", "BackoffLimitExceeded")
    assert [(a["charged"], a["microBatchSize"]) for a in status["attempts"]] == [
        (False, 0),
        (True, 4),
    ]
    assert (
        "with a micro-batch of 4, made smaller before, too" in bench.condition("hungry")["message"]
    )


def test_failures_are_what_the_next_attempt_is_told_of(
    bench: Bench, operator: Operator, book: Path
) -> None:
    pods = template(book, "fail-once", STEPS="60")
    bench.apply(online("mean", pods, nodes=2))
    wait_for(lambda: len(bench.status("mean").get("attempts") or []) == 2, "no second attempt")
    wait_for(lambda: bench.condition("mean").get("reason") == "Training", "it does not train")
    told = run_spec(bench, "mean-a2")["meanSecondsBetweenFailures"]
    first = bench.status("mean")["attempts"][0]
    ends = [datetime.fromisoformat(first[f"{part}Time"]) for part in ("start", "end")]
    assert told == (ends[1] - ends[0]).total_seconds()


def test_a_writer_is_retried_by_its_job_as_often_as_the_limit_says(
    bench: Bench, operator: Operator, book: Path
) -> None:
    bench.apply(job("crashes", template(book, "teacher-crashes"), backoffLimit=1))
    status = bench.wait_state("crashes", "BackoffLimitExceeded")
    assert status["teacherFailures"] == [2]
    words = (
        "writer 0 failed 2 times in a row while the stream did not grow (backoffLimit 1); the last"
    )
    assert bench.condition("crashes")["message"].startswith(words)
    assert bench.condition("crashes")["message"].endswith("exit code 1: boom")
    assert bench.condition("crashes", "TeacherReady")["reason"] == "TeacherFailed"
    patch = '{"spec": {"backoffLimit": 2}}'
    bench.kubectl("patch", "dj", "crashes", "--type=merge", "-p", patch)
    wait_for(lambda: bench.status("crashes")["teacherFailures"] == [3], "it was not tried again")
    bench.wait_state("crashes", "BackoffLimitExceeded")


def alone(pods: dict[str, Any], name: str) -> dict[str, Any]:
    """One pod of this job on a node; the cluster has one node."""
    term = {
        "labelSelector": {"matchLabels": {"kubedistill.dev/job": name}},
        "topologyKey": "kubernetes.io/hostname",
    }
    rule = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
    return {"spec": pods["spec"] | {"affinity": rule}}


def test_without_room_for_all_it_goes_on_with_fewer(
    bench: Bench, operator: Operator, book: Path
) -> None:
    pods = alone(template(book, STEPS="40"), "fewer")
    training = {"globalBatchSize": 12, "microBatchSize": 3}
    bench.apply(online("fewer", pods, nodes=3, training=training, workers={"minNodes": 1}))
    bench.wait_state("fewer", "Unschedulable")
    assert "(workers.minNodes)" in bench.condition("fewer")["message"]
    bench.wait_state("fewer", "Training")
    assert run_spec(bench, "fewer-a2")["rendezvous"]["nodes"] == 1
    assert bench.get("job", "fewer-a2")["spec"]["completions"] == 1
    status = bench.wait_state("fewer", "Completed")
    first, second = status["attempts"]
    assert (first["reason"], first["charged"], first["placedNodes"]) == ("Unschedulable", False, 1)
    assert (second["nodes"], status["failures"]) == (1, 0)


def test_where_no_fewer_divide_the_batch_it_says_so(
    bench: Bench, operator: Operator, book: Path
) -> None:
    pods = alone(template(book), "odd")
    training = {"globalBatchSize": 9}
    bench.apply(online("odd", pods, nodes=3, training=training, workers={"minNodes": 2}))
    bench.wait_state("odd", "Unschedulable")
    assert (
        "globalBatchSize 9 is no multiple of the ranks of 2 pods"
        in (bench.condition("odd")["message"])
    )


def test_what_a_rank_says_of_saves_is_a_condition_and_outlives_the_operator(
    bench: Bench, operator: Operator, book: Path
) -> None:
    pods = template(book, "troubled", STEPS="70")
    bench.apply(online("troubled", pods))

    def current(reason: str) -> bool:
        return bench.condition("troubled", "CheckpointCurrent").get("reason") == reason

    wait_for(lambda: current("SaveFailed"), "no SaveFailed")
    assert "no space" in bench.condition("troubled", "CheckpointCurrent")["message"]
    wait_for(lambda: current("GraceTooShort"), "no GraceTooShort")
    progress = bench.status("troubled")["progress"]
    assert progress["straggler"] == "rank 1 takes 1.5 times the median"
    assert progress["skippedSteps"] == [7]
    wait_for(lambda: current("Committed"), "it does not clear")
    told = {e["reason"] for e in bench.get("events")["items"]}
    assert {"SaveFailed", "GraceTooShort", "Straggler", "StepSkipped"} <= told
    # The pods of the next attempt get the grace that the saves ask for, whoever makes them.
    operator.kill()
    bench.kubectl("delete", "job", "troubled-a1", "--wait=false")
    wait_for(lambda: not bench.get("pods", "-l", "kubedistill.dev/role=student")["items"], "pods")
    operator.restart()
    bench.wait_state("troubled", "Completed")
    grace = bench.get("job", "troubled-a2")["spec"]["template"]["spec"]
    assert grace["terminationGracePeriodSeconds"] == 2 * 90 + 30


def test_a_deadline_ends_the_pods_on_time(bench: Bench, operator: Operator, book: Path) -> None:
    bench.apply(online("late", template(book, STEPS="500"), activeDeadlineSeconds=8))
    status = bench.wait_state("late", "DeadlineExceeded")
    start, end = (datetime.fromisoformat(status[f"{p}Time"]) for p in ("start", "completion"))
    assert 8 <= (end - start).total_seconds() <= 10
    student = ("-l", "kubedistill.dev/role=student")
    wait_for(lambda: not bench.get("pods", *student)["items"], "a pod is left")
    wait_for(lambda: bench.status("late")["attempts"][0].get("endTime"), "it does not end")
    assert len(bench.status("late")["attempts"]) == 1


def test_suspension_stops_the_clock_of_the_deadline(
    bench: Bench, operator: Operator, book: Path
) -> None:
    bench.apply(online("paused", template(book, STEPS="30"), activeDeadlineSeconds=20))
    bench.wait_state("paused", "Training")
    patch = '{"spec": {"suspend": %s}}'
    bench.kubectl("patch", "dj", "paused", "--type=merge", "-p", patch % "true")
    started = datetime.fromisoformat(bench.status("paused")["startTime"])
    bench.wait_state("paused", "Suspended")
    wait_for(lambda: (datetime.now(started.tzinfo) - started).total_seconds() > 21, "time stands")
    assert bench.condition("paused")["reason"] == "Suspended"
    bench.kubectl("patch", "dj", "paused", "--type=merge", "-p", patch % "false")
    bench.wait_state("paused", "Completed")


@pytest.mark.parametrize("limit", [0, 2])
def test_a_backoff_limit_is_that_many_retries(
    bench: Bench, operator: Operator, book: Path, limit: int
) -> None:
    bench.apply(online("doomed", template(book, "fail-always"), backoffLimit=limit))
    status = bench.wait_state("doomed", "BackoffLimitExceeded")
    assert [a["charged"] for a in status["attempts"]] == [True] * (limit + 1)


def gone(bench: Bench, name: str) -> bool:
    try:
        return not bench.status(name) and False
    except ApiError as error:
        return error.code == 404


def test_a_finished_object_goes_when_its_time_is_over(
    bench: Bench, operator: Operator, book: Path
) -> None:
    bench.apply(online("brief", template(book), ttlSecondsAfterFinished=4))
    ended = bench.wait_state("brief", "Completed")["completionTime"]
    wait_for(lambda: gone(bench, "brief"), "it is not deleted")
    since = datetime.now().astimezone() - datetime.fromisoformat(ended)
    assert since.total_seconds() >= 4
    left = ("jobs,pods,services,configmaps", "-l", "app.kubernetes.io/managed-by=kubedistill")
    wait_for(lambda: not bench.get(*left)["items"], "a child is left")


def test_an_edit_keeps_what_was_about_to_expire(
    bench: Bench, operator: Operator, book: Path
) -> None:
    bench.apply(online("kept", template(book), ttlSecondsAfterFinished=3))
    bench.wait_state("kept", "Completed")
    patch = '{"spec": {"ttlSecondsAfterFinished": null}}'
    bench.kubectl("patch", "dj", "kept", "--type=merge", "-p", patch)
    bench.apply(online("other", template(book)))
    bench.wait_state("other", "Completed")
    assert bench.condition("kept")["reason"] == "Completed"


def test_a_failed_one_goes_and_a_model_that_is_waited_for_stays(
    bench: Bench, operator: Operator, book: Path
) -> None:
    bench.apply(online("bad", template(book, "bad-data"), ttlSecondsAfterFinished=0))
    taught = {"fromJob": {"name": "first"}, "delivery": "Online"}
    second = job("second", template(book), teacher=taught, suspend=True)
    bench.apply(second, online("first", template(book), ttlSecondsAfterFinished=0))
    wait_for(lambda: gone(bench, "bad"), "the failed one is not deleted")
    bench.wait_state("first", "Completed")
    bench.kubectl("patch", "dj", "second", "--type=merge", "-p", '{"spec": {"suspend": false}}')
    bench.wait_state("second", "Completed")
    wait_for(lambda: gone(bench, "first"), "the first one is not deleted", 60)


def test_a_chain_keeps_its_jobs(bench: Bench, operator: Operator, book: Path) -> None:
    whole = chain("keeps", template(book), {"name": "m"}, {"name": "s"})
    whole["spec"]["template"]["ttlSecondsAfterFinished"] = 0
    bench.apply(whole)
    bench.wait_state("keeps", "Completed", seconds=150, resource="dchain")
    patch = '{"spec": {"ttlSecondsAfterFinished": 0}}'
    bench.kubectl("patch", "dj", "keeps-m", "--type=merge", "-p", patch)
    bench.apply(online("later", template(book)))
    bench.wait_state("later", "Completed")
    assert bench.condition("keeps-m")["reason"] == "Completed"
    assert bench.condition("keeps", resource="dchain")["reason"] == "Completed"
