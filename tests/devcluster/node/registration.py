"""The Node object and its Lease."""

from __future__ import annotations

import logging
import os
import threading
from datetime import UTC, datetime
from typing import Any

from devcluster.node.api import Api, ApiError
from devcluster.node.container import now

_log = logging.getLogger(__name__)
KUBELET_PORT = 10250
_LEASE_SECONDS = 4
_LEASE_DURATION_SECONDS = 20
_LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
_HEALTH = (
    ("MemoryPressure", "False", "KubeletHasSufficientMemory"),
    ("DiskPressure", "False", "KubeletHasNoDiskPressure"),
    ("PIDPressure", "False", "KubeletHasSufficientPID"),
    ("Ready", "True", "KubeletReady"),
)


class Registration:
    """Registers the node and keeps it alive until `stop`; silent while `lost`."""

    def __init__(
        self, api: Api, name: str, address: str, capacity: dict[str, str],
        stop: threading.Event, lost: threading.Event,
    ) -> None:  # fmt: skip
        self._api = api
        self._name = name
        self._address = address
        self._capacity = capacity
        self._stop = stop
        self._lost = lost
        self._since = now()

    def start(self) -> None:
        """Register as soon as the API server lets us, then renew in a thread."""
        while not self._stop.is_set():
            try:
                self._register()
                break
            except Exception as error:  # whatever it says before it is ready means: not yet
                _log.info("not registered yet: %s", error)
                self._stop.wait(0.25)
        threading.Thread(target=self._renew_for_ever, daemon=True).start()

    def _register(self) -> None:
        labels = {
            "kubernetes.io/hostname": self._name,
            "kubernetes.io/os": "linux",
            "kubernetes.io/arch": "amd64",
        }
        meta = {"name": self._name, "labels": labels}
        try:
            self._api.post("/api/v1/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": meta})
        except ApiError as error:
            if error.code != 409:
                raise
        self._report()

    def renew(self) -> None:
        """One renewal of the Lease and of the status."""
        stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {
            "holderIdentity": self._name,
            "leaseDurationSeconds": _LEASE_DURATION_SECONDS,
            "renewTime": stamp,
        }
        try:
            self._api.patch(f"{_LEASES}/{self._name}", {"spec": spec})
        except ApiError as error:
            if error.code != 404:
                raise
            meta = {"name": self._name, "namespace": "kube-node-lease"}
            lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease"}
            self._api.post(_LEASES, {**lease, "metadata": meta, "spec": spec})
        self._report()

    def _renew_for_ever(self) -> None:
        while not self._stop.is_set():
            if not self._lost.is_set():
                try:
                    self.renew()
                except Exception as error:  # the API server may be down: a kubelet goes on
                    _log.warning("lease: %s", error)
            self._stop.wait(_LEASE_SECONDS)

    def _report(self) -> None:
        body = {"status": self._status()}
        self._api.patch(f"/api/v1/nodes/{self._name}/status", body)

    def _status(self) -> dict[str, Any]:
        beat = {"lastHeartbeatTime": now(), "lastTransitionTime": self._since, "message": ""}
        info = dict.fromkeys(("bootID", "kubeProxyVersion", "machineID", "systemUUID"), "")
        return {
            "capacity": self._capacity,
            "allocatable": self._capacity,
            "conditions": [
                {"type": kind, "status": status, "reason": reason, **beat}
                for kind, status, reason in _HEALTH
            ],
            "addresses": [
                {"type": "InternalIP", "address": self._address},
                {"type": "Hostname", "address": self._name},
            ],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": KUBELET_PORT}},
            "nodeInfo": {
                **info,
                "architecture": "amd64",
                "containerRuntimeVersion": "process://1",
                "kernelVersion": os.uname().release,
                "kubeletVersion": "v1.37.2",
                "operatingSystem": "linux",
                "osImage": "devcluster",
            },
        }
