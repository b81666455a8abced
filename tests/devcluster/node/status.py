"""A pod's status from the states of its containers, as a kubelet writes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from devcluster.node.container import Ended, Run, now
from devcluster.node.probes import Probe


@dataclass
class ContainerState:
    """One container of a pod: the run that is, and the run that was."""

    spec: dict[str, Any]
    init: bool = False
    run: Run | None = None
    ended: Ended | None = None
    waiting: tuple[str, str] | None = None
    restarts: int = 0
    backoff: float = 0.0
    not_before: float = 0.0
    probes: dict[str, Probe] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.spec["name"])

    def done(self, policy: str) -> bool:
        """Whether it has ended and will not be started again."""
        if self.run is not None or self.ended is None:
            return False
        return policy == "Never" or (policy == "OnFailure" and self.ended.exit_code == 0)

    @property
    def ready(self) -> bool:
        if self.run is None:
            return self.init and self.ended is not None and self.ended.exit_code == 0
        gates = [p for kind, p in self.probes.items() if kind in ("readiness", "startup")]
        return all(probe.passed for probe in gates)

    def status(self) -> dict[str, Any]:
        """containerStatuses[] entry."""
        entry: dict[str, Any] = {
            "name": self.name,
            "image": self.spec["image"],
            "imageID": f"local://{self.spec['image']}",
            "ready": self.ready,
            "started": self.run is not None,
            "restartCount": self.restarts,
            "state": self._state(),
        }
        if self.ended is not None and (self.run is not None or self.waiting):
            entry["lastState"] = {"terminated": _terminated(self.ended)}
        return entry

    def _state(self) -> dict[str, Any]:
        if self.run is not None:
            return {"running": {"startedAt": self.run.started}}
        if self.waiting is not None:
            return {"waiting": {"reason": self.waiting[0], "message": self.waiting[1]}}
        if self.ended is not None:
            return {"terminated": _terminated(self.ended)}
        return {"waiting": {"reason": "ContainerCreating" if not self.init else "PodInitializing"}}


def _terminated(ended: Ended) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "exitCode": ended.exit_code,
        "reason": ended.reason,
        "startedAt": ended.started,
        "finishedAt": ended.finished,
    }
    if ended.message:
        entry["message"] = ended.message
    return entry


def phase(
    policy: str, init: list[ContainerState], main: list[ContainerState], *, final: bool
) -> str:
    """Pending, Running, Succeeded or Failed."""
    if any(s.ended and s.ended.exit_code != 0 and s.done(policy) for s in init):
        return "Failed"
    over = all(s.run is None and s.ended is not None for s in main)
    if over and (final or all(s.done(policy) for s in main)):
        good = all(s.ended is not None and s.ended.exit_code == 0 for s in main)
        return "Succeeded" if good else "Failed"
    if final:
        return "Failed"
    return "Running" if any(s.run is not None or s.ended is not None for s in main) else "Pending"


def pod_status(
    pod: dict[str, Any], init: list[ContainerState], main: list[ContainerState], *, final: bool
) -> dict[str, Any]:
    """The part of the status that a kubelet owns; other conditions of the pod are kept."""
    current = pod.get("status") or {}
    initialized = all(s.ended is not None and s.ended.exit_code == 0 for s in init)
    ready = bool(main) and all(s.ready for s in main) and initialized
    own = {
        "PodReadyToStartContainers": True,
        "Initialized": initialized,
        "ContainersReady": ready,
        "Ready": ready,
    }
    kept = [c for c in current.get("conditions") or [] if c["type"] not in own]
    result = {
        "phase": phase(pod["spec"].get("restartPolicy", "Always"), init, main, final=final),
        "hostIP": current.get("hostIP"),
        "podIP": current.get("podIP"),
        "podIPs": [{"ip": current.get("podIP")}],
        "startTime": current.get("startTime"),
        "conditions": kept + [_condition(current, kind, holds) for kind, holds in own.items()],
        "containerStatuses": [s.status() for s in main],
    }
    if init:
        result["initContainerStatuses"] = [s.status() for s in init]
    return result


def _condition(current: dict[str, Any], kind: str, holds: bool) -> dict[str, Any]:
    status = "True" if holds else "False"
    for condition in current.get("conditions") or []:
        if condition["type"] == kind and condition["status"] == status:
            return dict(condition)
    return {"type": kind, "status": status, "lastTransitionTime": now()}
