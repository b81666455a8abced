"""What tests of pods do in a namespace: make them, wait for them, read them."""

from __future__ import annotations

from typing import Any

from devcluster.handle import Handle
from devcluster.node.api import ApiError

_GROUPS = {
    "jobs": "/apis/batch/v1",
    "deployments": "/apis/apps/v1",
    "roles": "/apis/rbac.authorization.k8s.io/v1",
    "rolebindings": "/apis/rbac.authorization.k8s.io/v1",
}


class Kit:
    """A namespace of the cluster and the few things that tests do in it."""

    def __init__(self, cluster: Handle, namespace: str) -> None:
        self.cluster = cluster
        self.namespace = namespace

    def create(self, kind: str, body: dict[str, Any]) -> None:
        """`kind` is the plural in the API's path."""
        group = _GROUPS.get(kind, "/api/v1")
        self.cluster.api.post(f"{group}/namespaces/{self.namespace}/{kind}", body)

    def run(self, program: str, name: str = "p", **given: Any) -> None:
        """A pod with one container `main`; `container` and `pod` go into its specs."""
        main = container(program) | given.get("container", {})
        spec = {
            "containers": [main],
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
        }
        meta = {"name": name, "labels": {"app": name}}
        self.create("pods", {"metadata": meta, "spec": spec | given.get("pod", {})})

    def pod(self, name: str = "p") -> dict[str, Any]:
        return self.cluster.pod(self.namespace, name)

    def phase(self, wanted: str, name: str = "p", timeout_seconds: float = 30.0) -> dict[str, Any]:
        """The pod, once it is in this phase."""

        def reached() -> dict[str, Any] | None:
            pod = self.pod(name)
            return pod if pod["status"].get("phase") == wanted else None

        found: dict[str, Any] = self.cluster.wait(f"{name} {wanted}", reached, timeout_seconds)
        return found

    def logged(self, text: str, name: str = "p") -> str:
        """The log of `main`, once it holds the text."""

        def reached() -> str | None:
            log = self.cluster.log(self.namespace, name)
            return log if text in log else None

        found: str = self.cluster.wait(f"{text!r} in the log of {name}", reached)
        return found

    def waiting(self, reason: str, name: str = "p") -> str:
        """The message of `main`, once it waits for this reason."""

        def reached() -> dict[str, Any] | None:
            entry = state(self.pod(name)).get("waiting") or {}
            return entry if entry.get("reason") == reason else None

        return str(self.cluster.wait(f"{name} {reason}", reached).get("message", ""))

    def condition(self, kind: str, name: str = "p") -> str | None:
        found = {c["type"]: c["status"] for c in self.pod(name)["status"].get("conditions") or []}
        return found.get(kind)

    def delete(self, name: str = "p", **options: Any) -> None:
        self.cluster.api.delete(f"/api/v1/namespaces/{self.namespace}/pods/{name}", options)

    def gone(self, name: str = "p") -> bool:
        try:
            self.pod(name)
        except ApiError as error:
            return error.code == 404
        return False

    def pods_of(self, label: str) -> list[dict[str, Any]]:
        path = f"/api/v1/namespaces/{self.namespace}/pods?labelSelector={label}"
        items: list[dict[str, Any]] = self.cluster.api.get(path)["items"]
        return items


def container(program: str) -> dict[str, Any]:
    """A container `main` that runs a Python program."""
    return {"name": "main", "image": "local/shell", "command": ["python", "-c", program]}


def state(pod: dict[str, Any], number: int = 0) -> dict[str, Any]:
    """The state of one container; empty before the node has seen the pod."""
    statuses = pod["status"].get("containerStatuses") or [{"state": {}}]
    found: dict[str, Any] = statuses[number]["state"]
    return found
