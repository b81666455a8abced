"""What there is in a namespace: our objects, their parts, and the state that they are in."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from devcluster.node.api import Api

GROUP = "/apis/kubedistill.dev/v1alpha1"
_PARTS = {
    "jobs": "/apis/batch/v1",
    "pods": "/api/v1",
    "services": "/api/v1",
    "configmaps": "/api/v1",
}
_OWN = {"kube-root-ca.crt"}
"""What Kubernetes itself puts into a namespace."""
_CHANGING = {
    "time", "startTime", "endTime", "completionTime", "lastTransitionTime", "lastStepTime",
    "lastUpdatedTime", "tokensPerSecond", "estimatedRemainingSeconds", "saveSeconds",
}  # fmt: skip
"""Fields whose values differ between two calm runs: that they are there is compared."""
_OF_THE_RUN = ("meanSecondsBetweenFailures", "saveSeconds", "committedStep")
"""Such fields of run specs."""
_POD = re.compile(r"(\bpod [a-z][-a-z0-9]*-\d+)-[a-z0-9]{5}\b")
"""Its name in a message, whose end Kubernetes draws."""
_UID = re.compile(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")

_LEFT_SECONDS = 60.0


@dataclass
class Space:
    """A namespace, and how to ask for what is in it."""

    api: Api
    namespace: str

    def found(self, plural: str) -> list[dict[str, Any]]:
        prefix = _PARTS.get(plural, GROUP)
        found = self.api.get(f"{prefix}/namespaces/{self.namespace}/{plural}")
        return list(found["items"])

    def objects(self) -> list[dict[str, Any]]:
        """All of ours."""
        return self.found("distillationjobs") + self.found("distillationchains")

    def state(self) -> dict[str, Any]:
        """What there is in the end, without what differs between two calm runs."""
        text = json.dumps(self._whole_state()).replace(self.namespace, "namespace")
        state: dict[str, Any] = json.loads(_UID.sub("uid", text))
        return state

    def _whole_state(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for one in self.objects():
            found[f"{one['kind']}/{one['metadata']['name']}"] = {
                "spec": one["spec"], "status": cleaned_of(one),
            }  # fmt: skip
        for one in self.found("jobs"):
            status = one.get("status") or {}
            ends = [c["type"] for c in status.get("conditions") or [] if c["status"] == "True"]
            found[f"Job/{one['metadata']['name']}"] = sorted(set(ends))
        found["services"] = sorted(one["metadata"]["name"] for one in self.found("services"))
        found["configmaps"] = {
            one["metadata"]["name"]: _said_in(one)
            for one in self.found("configmaps")
            if one["metadata"]["name"] not in _OWN
        }
        pods: Counter[str] = Counter()
        for one in self.found("pods"):
            owner = one["metadata"]["ownerReferences"][0]["name"]
            pods[f"{owner} {one['status']['phase']}"] += 1
        found["pods"] = dict(pods)
        return found

    def left(self) -> list[str]:
        """What is left of our objects' parts once the collector has had its time."""
        deadline = time.monotonic() + _LEFT_SECONDS
        while left := children(self.api, self.namespace):
            if time.monotonic() > deadline:
                return left
            time.sleep(0.2)
        return []


def _said_in(config_map: dict[str, Any]) -> dict[str, Any]:
    """A ConfigMap's files; run specs without what is of one run alone."""
    files: dict[str, str] = config_map.get("data") or {}
    return {
        name: _without_times(json.loads(body)) if name.endswith(".json") else body
        for name, body in files.items()
    }


def _without_times(run: dict[str, Any]) -> dict[str, Any]:
    """A run spec without measured times, and without the port, which is made from the job's uid."""
    run = run | {name: "set" for name in _OF_THE_RUN if name in run}
    where = run.get("rendezvous")
    return run | {"rendezvous": where | {"port": "port"}} if where else run


def children(api: Api, namespace: str) -> list[str]:
    """Kind and name of what there is in a namespace, beside our objects and what Kubernetes puts in."""
    return [
        f"{plural}/{one['metadata']['name']}"
        for plural, prefix in _PARTS.items()
        for one in api.get(f"{prefix}/namespaces/{namespace}/{plural}")["items"]
        if one["metadata"]["name"] not in _OWN
    ]


def cleaned_of(whole: dict[str, Any]) -> dict[str, Any]:
    """An object's status, in which only that there are times and rates is said, and whether what is
    observed is the generation that there is."""
    found: dict[str, Any] = _cleaned(whole.get("status") or {}, whole["metadata"]["generation"])
    return found


def _cleaned(value: Any, generation: int) -> Any:
    if isinstance(value, dict):
        return {key: _cleaned_part(key, part, generation) for key, part in value.items()}
    if isinstance(value, list):
        return [_cleaned(part, generation) for part in value]
    return value


def _cleaned_part(key: str, part: Any, generation: int) -> Any:
    if key == "observedGeneration":
        return "newest" if part == generation else f"{part} of {generation}"
    if key == "message" and part:
        return _POD.sub(r"\1", part)
    return "set" if key in _CHANGING else _cleaned(part, generation)
