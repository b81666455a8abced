"""Which pod explains the end of an attempt."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from kubedistill_api import reasons
from kubedistill_operator.plan.draft import Timing
from kubedistill_operator.plan.exits import judge, judge_stopped
from kubedistill_operator.plan.restart import backoff_seconds
from kubedistill_operator.plan.times import duration_text, format_time, parse_time
from kubedistill_operator.plan.views import PodView, pod_view
from test_plan_kit import NOW, ended, running

LATER = NOW + timedelta(seconds=5)


@pytest.mark.parametrize(
    ("pods", "reason", "charged"),
    [
        ([ended("a", 17), ended("b", 14, finished_at=LATER)], reasons.OUT_OF_MEMORY, True),
        ([ended("a", 137), ended("b", 1, finished_at=LATER)], reasons.ERROR, True),
        ([ended("a", 1), ended("b", 14, index=1)], reasons.OUT_OF_MEMORY, True),
        (
            [ended("a", 1), ended("b", 137, index=1, end_reason="OOMKilled")],
            reasons.OUT_OF_MEMORY,
            True,
        ),
        ([ended("a", 137, end_reason="OOMKilled"), ended("b", 17)], reasons.OUT_OF_MEMORY, True),
        ([ended("a", 1, finished_at=LATER), ended("b", 15)], reasons.STORAGE_UNAVAILABLE, True),
        ([ended("a", 17), ended("b", 17)], reasons.PEER_LOST, True),
        # Nobody asked b to go: its kill is why a was asked to. Times are in whole seconds.
        ([ended("a", 11), ended("b", 137, index=1)], reasons.ERROR, True),
        ([ended("a", 11), ended("b", 137, index=1, finished_at=LATER)], reasons.ERROR, True),
        # Both were asked to go, and the grace of b ran out.
        (
            [ended("a", 11), ended("b", 137, index=1, deleting=True)],
            reasons.GRACEFUL_CHECKPOINT,
            False,
        ),
        ([ended("a", 1, finished_at=LATER), ended("b", 137, deleting=True)], reasons.ERROR, True),
        ([ended("a", 137, disrupted=True), ended("b", 1)], reasons.DISRUPTED, False),
        ([running("a", gone=True), ended("b", 0)], reasons.ERROR, True),
        ([PodView("a", "student", phase="Failed", end_reason="NodeLost")], reasons.ERROR, True),
        ([], reasons.ERROR, True),
        ([ended("a", 99)], reasons.ERROR, True),
    ],
)
def test_judge(pods: list[PodView], reason: str, charged: bool) -> None:
    verdict = judge(pods)
    assert (verdict.reason, verdict.charged, verdict.retry) == (reason, charged, True)


PENDING = PodView("a", "student", deleting=True, gone=True)
CREATING = ended("a", 137, end_reason="ContainerStatusUnknown", deleting=True)


@pytest.mark.parametrize(
    ("pods", "job_deleted", "charged"),
    [
        # Somebody deleted the Job, or a pod, and nothing of it had run.
        ([], True, False),
        ([PENDING], True, False),
        ([PENDING], False, False),
        ([PENDING, PodView("b", "student", index=1, gone=True)], False, False),
        # A kubelet writes this of a container that it had not created when it was to go.
        ([CREATING], True, False),
        ([CREATING], False, False),
        ([CREATING, ended("b", 18, index=1)], False, False),
        ([CREATING, ended("b", 1, index=1)], False, True),
        ([replace(CREATING, deleting=False)], False, True),
        # Of pods that ran, as long as their Job is there, somebody is to know.
        ([running("a", gone=True)], True, False),
        ([running("a", gone=True)], False, True),
        ([running("a", gone=True), replace(PENDING, name="b", index=1)], False, True),
        ([PodView("a", "student", phase="Failed", end_reason="OutOfcpu")], False, True),
        ([ended("a", 1)], True, True),
        ([ended("a", 137)], True, True),
    ],
)
def test_what_was_deleted_before_it_ran_is_no_failure(
    pods: list[PodView], job_deleted: bool, charged: bool
) -> None:
    verdict = judge(pods, job_deleted=job_deleted)
    expected = reasons.ERROR if charged else reasons.INTERRUPTED
    assert (verdict.reason, verdict.charged, verdict.retry) == (expected, charged, True)


def test_a_pods_own_words_are_quoted() -> None:
    pod = ended("a", 14, outcome={"message": "CUDA out of memory"})
    assert judge([pod]).message == "pod a ended with exit code 14: CUDA out of memory"


def test_a_graceful_end_under_suspension() -> None:
    pods = [ended("a", 11), ended("b", 11)]
    verdict = judge_stopped(pods, reasons.INTERRUPTED, "suspended", charged=False)
    assert verdict.reason == reasons.GRACEFUL_CHECKPOINT


def test_backoff_grows_to_a_cap_and_is_the_same_each_time() -> None:
    timing = Timing(backoff_base=10, backoff_cap=300)
    waits = [backoff_seconds("u", n, n, timing) for n in range(10)]
    assert waits == [backoff_seconds("u", n, n, timing) for n in range(10)]
    assert waits[0] == 0
    assert 8 <= waits[1] <= 12
    assert 240 <= waits[9] <= 360


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(42, "42s"), (192, "3m12s"), (3600, "1h0m"), (11520, "3h12m"), (187200, "2d4h"),
     (None, ""), (float("nan"), "")],
)  # fmt: skip
def test_durations(seconds: float | None, text: str) -> None:
    assert duration_text(seconds) == text


def test_times_round_trip() -> None:
    assert parse_time(format_time(NOW)) == NOW


def test_a_pod_is_read_as_a_kubelet_writes_it() -> None:
    raw = {
        "metadata": {
            "name": "p",
            "labels": {"kubedistill.dev/role": "student", "kubedistill.dev/attempt": "3"},
            "annotations": {"batch.kubernetes.io/job-completion-index": "2"},
            "deletionTimestamp": "2026-01-02T03:04:05Z",
        },
        "status": {
            "phase": "Failed",
            "podIP": "10.0.0.7",
            "conditions": [
                {"type": "DisruptionTarget", "status": "True"},
                {"type": "PodScheduled", "status": "True"},
            ],
            "containerStatuses": [
                {"name": "sidecar", "state": {"running": {}}},
                {"name": "trainer", "state": {"terminated": {
                    "exitCode": 11, "reason": "Error", "message": "{}",
                    "finishedAt": "2026-01-02T03:04:05Z"}}},
            ],
        },
    }  # fmt: skip
    view = pod_view(raw)
    assert (view.attempt, view.index, view.exit_code) == (3, 2, 11)
    assert view.disrupted
    assert view.deleting
    assert view.finished_at == NOW
    assert view.unschedulable == ""
