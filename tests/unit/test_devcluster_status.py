"""Phases, probes and logs of the node's pods, without a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from devcluster.node.container import Ended
from devcluster.node.kubelet import pieces
from devcluster.node.probes import Probe, Probes
from devcluster.node.status import ContainerState, phase, pod_status


def state(end: int | None = None, *, init: bool = False, waiting: str = "") -> ContainerState:
    """A container that has ended with `end`, or has never run."""
    ended = None if end is None else Ended(end, "Completed" if end == 0 else "Error", "", "t")
    return ContainerState(
        {"name": "main", "image": "i"},
        init,
        ended=ended,
        waiting=(waiting, "") if waiting else None,
    )


@pytest.mark.parametrize(
    ("policy", "ends", "wanted"),
    [
        ("Never", [0], "Succeeded"),
        ("Never", [1], "Failed"),
        ("Never", [0, 1], "Failed"),
        ("Never", [None], "Pending"),
        ("Never", [0, None], "Pending"),
        ("OnFailure", [0], "Succeeded"),
        ("OnFailure", [1], "Running"),
        ("Always", [0], "Running"),
        ("Always", [1], "Running"),
    ],
)
def test_phase(policy: str, ends: list[int | None], wanted: str) -> None:
    assert phase(policy, [], [state(end) for end in ends]) == wanted


@pytest.mark.parametrize(
    ("policy", "end", "wanted"),
    [("Never", 1, "Failed"), ("OnFailure", 1, "Pending"), ("Always", 0, "Pending")],
)
def test_phase_with_init_containers(policy: str, end: int, wanted: str) -> None:
    assert phase(policy, [state(end, init=True)], [state()]) == wanted


@pytest.mark.parametrize(
    ("ends", "wanted"), [([0], "Succeeded"), ([143], "Failed"), ([None], "Failed")]
)
def test_phase_of_a_pod_that_was_ended(ends: list[int | None], wanted: str) -> None:
    assert phase("Always", [], [state(end) for end in ends], final=True) == wanted


def test_a_container_that_never_ran_is_unknown_in_the_end() -> None:
    pod: dict[str, Any] = {"metadata": {}, "spec": {}, "status": {}}
    [entry] = pod_status(pod, [], [state()], final=True)["containerStatuses"]
    assert entry["state"]["terminated"]["reason"] == "ContainerStatusUnknown"
    assert entry["state"]["terminated"]["exitCode"] == 137


def test_back_off_shows_the_last_end() -> None:
    entry = state(3, waiting="CrashLoopBackOff").status("ContainerCreating")
    assert entry["state"] == {"waiting": {"reason": "CrashLoopBackOff"}}
    assert entry["lastState"]["terminated"]["exitCode"] == 3


def test_the_node_names_only_conditions_of_its_own() -> None:
    theirs = {"type": "DisruptionTarget", "status": "True"}
    pod: dict[str, Any] = {"metadata": {}, "spec": {}, "status": {"conditions": [theirs]}}
    kinds = {c["type"] for c in pod_status(pod, [], [state()])["conditions"]}
    assert kinds == {"PodReadyToStartContainers", "Initialized", "ContainersReady", "Ready"}


def answers(spec: dict[str, Any], given: list[int]) -> Probe:
    """An exec probe after these exit codes."""
    codes = iter(given)
    full = {"exec": {"command": ["x"]}, "periodSeconds": 0.001, **spec}
    probe = Probe(full, "127.0.0.1", {}, lambda command, timeout: next(codes))
    for _ in given:
        probe._count(probe.check())
    return probe


@pytest.mark.parametrize(
    ("spec", "given", "passed", "failed"),
    [
        ({}, [0], True, False),
        ({}, [1, 1], False, False),
        ({}, [1, 1, 1], False, True),
        ({}, [0, 1, 1], True, False),
        ({}, [0, 1, 1, 1], False, True),
        ({"failureThreshold": 1}, [0, 1], False, True),
        ({"successThreshold": 2}, [0], False, False),
        ({"successThreshold": 2}, [0, 0], True, False),
        ({}, [1, 1, 1, 0], True, False),
    ],
)
def test_probe_thresholds(
    spec: dict[str, Any], given: list[int], passed: bool, failed: bool
) -> None:
    probe = answers(spec, given)
    assert (probe.passed, probe.failed) == (passed, failed)


def test_other_probes_wait_for_the_startup_probe() -> None:
    asked: list[str] = []

    def execute(command: list[str], timeout: float) -> int:
        asked.extend(command)
        return 1

    container = {f"{kind}Probe": {"exec": {"command": [kind]}} for kind in ("startup", "readiness")}
    probes = Probes(container, "127.0.0.1", execute)
    probes.tick()
    assert not probes.started
    assert not probes.ready
    assert "readiness" not in asked


@pytest.mark.parametrize(
    ("query", "wanted"),
    [({}, b"a\nb\nc\n"), ({"tailLines": "2"}, b"b\nc\n"), ({"limitBytes": "3"}, b"a\nb")],
)
def test_log_queries(tmp_path: Path, query: dict[str, str], wanted: bytes) -> None:
    path = tmp_path / "main.log"
    path.write_text("a\nb\nc\n")
    assert b"".join(pieces(path, query, lambda: False)) == wanted
