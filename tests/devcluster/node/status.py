"""A pod's status from the states of its containers, as a kubelet writes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from devcluster.node.container import Ended, Run, now
from devcluster.node.probes import Probes

EVICTED = "Evicted"
"""Reason of a pod that its node had no room for."""
UNKNOWN = {
    "exitCode": 137,
    "reason": "ContainerStatusUnknown",
    "message": "The container could not be located when the pod was terminated",
}


@dataclass
class ContainerState:
    """One container of a pod: the run that is, and the run that was."""

    spec: dict[str, Any]
    init: bool = False
    run: Run | None = None
    probes: Probes | None = None
    ended: Ended | None = None
    waiting: tuple[str, str] | None = None
    restarts: int = 0
    backoff: float = 0.0
    not_before: float = 0.0

    @property
    def name(self) -> str:
        return str(self.spec["name"])

    @property
    def sidecar(self) -> bool:
        """An init container that stays: `restartPolicy: Always` of its own."""
        return self.init and self.spec.get("restartPolicy") == "Always"

    def done(self, policy: str) -> bool:
        """Whether it has ended and will not be started again under the pod's policy."""
        if self.run is not None or self.ended is None:
            return False
        good = self.ended.exit_code == 0
        if self.sidecar:
            return False
        if self.init:
            return good or policy == "Never"
        return policy == "Never" or (policy == "OnFailure" and good)

    @property
    def started(self) -> bool:
        return self.run is not None and self.probes is not None and self.probes.started

    @property
    def initialized(self) -> bool:
        """Whether the next init container may start."""
        if self.sidecar:
            return self.started
        return self.run is None and self.ended is not None and self.ended.exit_code == 0

    @property
    def ready(self) -> bool:
        if self.init and not self.sidecar:
            return self.initialized
        return self.run is not None and self.probes is not None and self.probes.ready

    def status(self, default: str, *, final: bool = False) -> dict[str, Any]:
        """containerStatuses[] entry; `default` is the reason of one that never ran."""
        entry: dict[str, Any] = {
            "name": self.name,
            "image": self.spec["image"],
            "imageID": f"local://{self.spec['image']}",
            "ready": self.ready,
            "started": self.started,
            "restartCount": self.restarts,
            "state": self._state(default, final),
        }
        if self.ended is not None and "terminated" not in entry["state"]:
            entry["lastState"] = {"terminated": terminated(self.ended)}
        return entry

    def _state(self, default: str, final: bool) -> dict[str, Any]:
        if self.run is not None:
            return {"running": {"startedAt": self.run.started}}
        if self.ended is not None and (final or self.waiting is None):
            return {"terminated": terminated(self.ended)}
        if final and not self.init:
            return {"terminated": dict(UNKNOWN)}
        if self.waiting is None:
            return {"waiting": {"reason": default}}
        reason, message = self.waiting
        return {"waiting": {"reason": reason} | ({"message": message} if message else {})}


def terminated(ended: Ended) -> dict[str, Any]:
    """The state of a container that has ended."""
    entry: dict[str, Any] = {
        "exitCode": ended.exit_code,
        "reason": ended.reason,
        "startedAt": ended.started,
        "finishedAt": ended.finished,
    }
    return entry | ({"message": ended.message} if ended.message else {})


def phase(
    policy: str, init: list[ContainerState], main: list[ContainerState], *, final: bool = False
) -> str:
    """Pending, Running, Succeeded or Failed. `final`: the pod was ended, nothing restarts."""
    plain = [state for state in init if not state.sidecar]
    if any(s.ended and s.ended.exit_code != 0 and s.done(policy) for s in plain):
        return "Failed"
    over = all(s.run is None and s.ended is not None for s in main)
    if over and (final or all(s.done(policy) for s in main)):
        good = all(s.ended is not None and s.ended.exit_code == 0 for s in main)
        return "Succeeded" if good else "Failed"
    if final:
        return "Failed"
    # A container that waits for its first start holds back the whole pod.
    begun = all(s.run is not None or s.ended is not None for s in main)
    return "Running" if begun and all(s.initialized for s in plain) else "Pending"


def pod_status(
    pod: dict[str, Any],
    init: list[ContainerState],
    main: list[ContainerState],
    *,
    sandbox: bool = True,
    final: bool = False,
    verdict: tuple[str, str] | None = None,
) -> dict[str, Any]:
    """The part of the status that a kubelet owns, conditions of its own only.

    `sandbox`: whether the pod's volumes are there. `verdict`: (reason, message) of the node for
    ending the pod.
    """
    current = pod.get("status") or {}
    now_phase = phase(pod["spec"].get("restartPolicy", "Always"), init, main, final=final)
    if verdict is not None and final:
        now_phase = "Failed"
    initialized = all(s.initialized for s in init if not s.sidecar or not final)
    ready, why = _readiness(now_phase, initialized, [*init, *main])
    default = "PodInitializing" if init else "ContainerCreating"
    own = {"PodReadyToStartContainers": sandbox and not final, "Initialized": initialized}
    result: dict[str, Any] = {
        "phase": now_phase,
        "hostIP": current.get("hostIP"),
        "hostIPs": [{"ip": current.get("hostIP")}],
        "podIP": current.get("podIP"),
        "podIPs": [{"ip": current.get("podIP")}],
        "startTime": current.get("startTime"),
        "conditions": [
            *(_condition(current, kind, holds) for kind, holds in own.items()),
            *(_condition(current, kind, ready, why) for kind in ("ContainersReady", "Ready")),
        ],
        "containerStatuses": [s.status(default, final=final) for s in main],
    }
    if init:
        result["initContainerStatuses"] = [s.status(default, final=final) for s in init]
    if verdict is not None and verdict[0] == EVICTED:
        why = ("TerminationByKubelet", verdict[1])
        result["conditions"].append(_condition(current, "DisruptionTarget", True, why))
    if verdict is not None:
        result |= {"reason": verdict[0], "message": verdict[1]}
    return result


def _readiness(
    now_phase: str, initialized: bool, states: list[ContainerState]
) -> tuple[bool, tuple[str, str]]:
    """Whether the pod is ready, and (reason, message) of it when it is not."""
    if now_phase in ("Succeeded", "Failed"):
        return False, ("PodCompleted" if now_phase == "Succeeded" else "PodFailed", "")
    unready = [s.name for s in states if (s.sidecar or not s.init) and not s.ready]
    if initialized and not unready:
        return True, ("", "")
    text = f"containers with unready status: [{' '.join(unready)}]"
    return False, ("ContainersNotReady", text)


def _condition(
    current: dict[str, Any], kind: str, holds: bool, why: tuple[str, str] = ("", "")
) -> dict[str, Any]:
    """A condition whose transition time changes only with its status."""
    status, since = "True" if holds else "False", now()
    for condition in current.get("conditions") or []:
        if condition["type"] == kind and condition["status"] == status:
            since = condition.get("lastTransitionTime") or since
    entry: dict[str, Any] = {"type": kind, "status": status, "lastTransitionTime": since}
    # A strategic merge keeps what is not named.
    return entry | {"reason": why[0] or None, "message": why[1] or None}
