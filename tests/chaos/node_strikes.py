"""What can happen to a pod on its node, and what people must be told of it afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from devcluster.handle import Handle
from devcluster.node.api import ApiError
from kubedistill_api import names, reasons

STUDENT, TEACHER, PREFLIGHT = names.ROLE_STUDENT, names.ROLE_TEACHER, names.ROLE_PREFLIGHT
End = tuple[str, bool]
"""The reason of an attempt's end, and whether it is charged."""
_KILLED: frozenset[End] = frozenset({(reasons.ERROR, True)})
_ASKED: frozenset[End] = frozenset({(reasons.GRACEFUL_CHECKPOINT, False)})
DISRUPTED: frozenset[End] = frozenset({(reasons.DISRUPTED, False)})
_STALLED: frozenset[End] = frozenset({(reasons.STALLED, True)})


@dataclass(frozen=True)
class Strike:
    """A kind of fault, for one role. `ends` are the true ends of a gang's attempt that meets it
    (docs/restarts.md); `charged` says whether a preflight that meets it counts."""

    fault: str
    role: str
    ends: frozenset[End] = frozenset()
    charged: bool = False

    def __str__(self) -> str:
        return f"{self.role} {self.fault}"


STRIKES = (
    Strike("killed", STUDENT, _KILLED),
    Strike("frozen", STUDENT, _STALLED),
    Strike("evicted", STUDENT, DISRUPTED),
    Strike("pressed out", STUDENT, DISRUPTED),
    # In the end it cannot be told from a pod whose grace ran out: its peers committed, or it counts.
    Strike("deleted by force", STUDENT, _KILLED | _ASKED),
    Strike("deleted", STUDENT, _ASKED),
    Strike("deleted with 1 s", STUDENT, _ASKED),
    Strike("SIGTERM twice", STUDENT, _ASKED),
    Strike("killed", TEACHER),
    Strike("frozen for a while", TEACHER),
    Strike("evicted", TEACHER),
    Strike("pressed out", TEACHER),
    Strike("deleted by force", TEACHER),
    Strike("SIGTERM twice", TEACHER),
    Strike("killed", PREFLIGHT, charged=True),
    Strike("frozen for a while", PREFLIGHT),
    Strike("evicted", PREFLIGHT),
    Strike("pressed out", PREFLIGHT),
    Strike("deleted by force", PREFLIGHT, charged=True),
    Strike("SIGTERM twice", PREFLIGHT),
)


class Striker:
    """Does it to a pod of a cluster. False where the pod was gone first."""

    def __init__(self, handle: Handle, namespace: str) -> None:
        self._handle = handle
        self._namespace = namespace
        self._thaw: list[tuple[float, Callable[[], None]]] = []

    def strike(self, fault: str, pod: dict[str, Any], seconds: float = 2.0) -> bool:
        """`seconds` is how long one that is frozen for a while stays so."""
        name = pod["metadata"]["name"]
        path = f"/api/v1/namespaces/{self._namespace}/pods/{name}"
        node = self._handle.node(pod["spec"]["nodeName"])
        api, at = self._handle.api, (self._namespace, name)
        try:
            match fault:
                case "killed":
                    node.kill(*at)
                case "frozen":
                    node.freeze(*at)
                case "frozen for a while":
                    node.freeze(*at)
                    self._thaw.append((time.monotonic() + seconds, lambda: node.thaw(*at)))
                case "evicted":
                    meta = {"name": name, "namespace": self._namespace}
                    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": meta}
                    api.post(f"{path}/eviction", body)
                case "pressed out":
                    node.evict(*at)
                case "SIGTERM twice":
                    node.signal(*at, "SIGTERM")
                    node.signal(*at, "SIGTERM")
                case "deleted":
                    api.delete(path, {})
                case "deleted with 1 s":
                    api.delete(path, {"gracePeriodSeconds": 1})
                case "deleted by force":
                    api.delete(path, {"gracePeriodSeconds": 0})
                case unknown:
                    raise ValueError(f"no fault {unknown!r}")
        except ApiError as error:
            if error.code != 404:
                raise
            return False
        except RuntimeError as error:
            if "LookupError" not in str(error):
                raise
            return False
        return True

    def tick(self) -> None:
        """Thaw what was frozen long enough."""
        for due, thaw in [entry for entry in self._thaw if entry[0] <= time.monotonic()]:
            self._thaw.remove((due, thaw))
            thaw()


def true_ends(attempts: list[dict[str, Any]], strikes: list[Strike]) -> list[str]:
    """What is wrong with the ends that are told of a gang's attempts, each of which but the last
    was struck once."""
    found = []
    if len(attempts) != len(strikes) + 1:
        told = [(a.get("reason"), a.get("message")) for a in attempts]
        found.append(f"{len(attempts)} attempts after {len(strikes)} strikes: {told}")
    for attempt, strike in zip(attempts, strikes, strict=False):
        end = attempt.get("reason", ""), bool(attempt.get("charged"))
        if end not in strike.ends:
            allowed = sorted(strike.ends)
            message = attempt.get("message")
            found.append(f"{strike}: attempt {attempt['number']} is told to have ended by {end} "
                         f"({message}), expected {allowed}")  # fmt: skip
    return found
