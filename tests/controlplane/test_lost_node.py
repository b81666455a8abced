"""What stands alone on a node that loses its power, on a real API server. A stand-in works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from devcluster.cluster import DevCluster
from operator_kit import ONLINE, Bench, Operator, distilling, job, template, wait_for

pytestmark = [pytest.mark.controlplane, pytest.mark.timeout(600)]


def evict(bench: Bench, name: str) -> None:
    """As the node controller does: it asks, and nobody is there who would do it."""
    path = f"/api/v1/namespaces/{bench.namespace}/pods/{name}/eviction"
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}}
    bench.handle.api.post(path, eviction)


def pods_of(bench: Bench, name: str, role: str) -> list[dict[str, Any]]:
    selector = f"kubedistill.dev/job={name},kubedistill.dev/role={role}"
    return list(bench.get("pods", "-l", selector)["items"])


def running(bench: Bench, name: str, role: str) -> dict[str, Any]:
    """Name and uid of the job's running pod of this role; empty where there is none."""
    for pod in pods_of(bench, name, role):
        leaving = "deletionTimestamp" in pod["metadata"]
        if pod["status"].get("phase") == "Running" and not leaving:
            return dict(pod["metadata"])
    return {}


def test_writers_and_preflights_of_a_lost_node_are_made_anew(
    devcluster: DevCluster, bench: Bench, operator: Operator, book: Path
) -> None:
    checked = template(book, PREFLIGHT_SECONDS="900")
    written = template(book, TEACHER_SECONDS="900", TEACHER_QUIET="1")
    bench.apply(job("checked", checked, backoffLimit=0), job("written", written, backoffLimit=0))
    lone = [("checked", "preflight", "Validated"), ("written", "teacher", "TeacherReady")]
    before = {
        name: wait_for(lambda n=name, r=role: running(bench, n, r), f"no {role} runs")
        for name, role, _ in lone
    }
    bench.handle.faults.lose(kill=True)
    try:
        for name, role, condition in lone:
            evict(bench, before[name]["name"])
            wait_for(
                lambda n=name, c=condition: bench.condition(n, c).get("reason") == "Disrupted",
                f"nobody says that the {role} is lost",
            )
        for name, role, _ in lone:
            # While the node is away.
            wait_for(
                lambda n=name, r=role: any(
                    pod["metadata"]["uid"] != before[n]["uid"] for pod in pods_of(bench, n, r)
                ),
                f"no other {role} is made",
            )
    finally:
        bench.handle.faults.come_back()
    for name, role, _ in lone:
        wait_for(lambda n=name, r=role: running(bench, n, r), f"no {role} runs again")
        status = bench.status(name)
        assert (status.get("failures", 0), status.get("teacherFailures", [])) == (0, [])
        assert bench.condition(name)["status"] == "Unknown"


def test_a_gang_that_stands_still_for_its_node_is_not_charged(
    devcluster: DevCluster, bench: Bench, operator: Operator, book: Path
) -> None:
    """Kubernetes leaves its pod where it is for five minutes; the stall is over sooner."""
    limits = {"stallTimeoutSeconds": 45, "backoffLimit": 0}
    bench.apply(distilling("still", template(book, STEPS="9000"), teacher=ONLINE, **limits))
    bench.wait_state("still", "Training")
    bench.handle.faults.lose(kill=True)
    try:
        wait_for(lambda: bench.status("still")["attempts"][0].get("reason"), "it goes on")
        [attempt, *_] = bench.status("still")["attempts"]
        assert (attempt["reason"], attempt.get("charged", False)) == ("Disrupted", False)
        assert "is not ready" in attempt["message"]
    finally:
        bench.handle.faults.come_back()
    wait_for(lambda: len(bench.status("still")["attempts"]) == 2, "no second attempt")
