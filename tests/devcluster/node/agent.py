"""The node itself: registers, renews its lease, watches its pods and gives them names."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import socket
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from devcluster.node import control, kubelet, names
from devcluster.node.api import Api, ApiError
from devcluster.node.container import now
from devcluster.node.environment import ConfigError
from devcluster.node.pod import PodWorker
from devcluster.node.volumes import decoded

_log = logging.getLogger(__name__)
_LEASE_SECONDS = 5.0
_KUBELET_PORT = 10250


class Node:
    """One node. All of its addresses lie in a /16 of loopback that no other node uses."""

    def __init__(self, name: str, kubeconfig: Path, state: Path, capacity: dict[str, str]) -> None:
        self.name = name
        self.api = Api(str(kubeconfig))
        self.state = state
        self.capacity = capacity
        self.stop = threading.Event()
        self.lost = threading.Event()
        self.start_delay = 0.0
        self.workers: dict[str, PodWorker] = {}
        self._lock = threading.RLock()
        self._pods: dict[str, dict[str, Any]] = {}
        self._services: dict[str, dict[str, Any]] = {}
        self._next_address = 1
        self._block = 0
        self.server_socket = self._claim_block()

    # Addresses.

    def _claim_block(self) -> socket.socket:
        """Take the first 127.B.0.0/16 whose node port is free; holding the port is the claim."""
        for block in range(64, 250):
            listener = socket.socket()
            try:
                listener.bind((f"127.{block}.0.1", _KUBELET_PORT))
                listener.listen(16)
            except OSError:
                listener.close()
                continue
            self._block = block
            return listener
        raise RuntimeError("no free loopback block for this node")

    @property
    def address(self) -> str:
        return f"127.{self._block}.0.1"

    def _pod_address(self) -> str:
        self._next_address += 1
        high, low = divmod(self._next_address, 250)
        return f"127.{self._block}.{1 + high % 250}.{low + 1}"

    # Life.

    def run(self) -> None:
        """Until `stop` is set."""
        self._register()
        kubelet.serve(self.server_socket, self.state)
        control.serve(self)
        threads = [
            threading.Thread(target=self._renew_lease, daemon=True),
            threading.Thread(target=self._watch_services, daemon=True),
        ]
        for thread in threads:
            thread.start()
        self.api.watch(
            "/api/v1/pods", self._on_pod, self.stop, fieldSelector=f"spec.nodeName={self.name}"
        )

    def shut_down(self) -> None:
        """Kill all pods' processes; their objects stay as they are."""
        self.stop.set()
        with self._lock:
            workers = list(self.workers.values())
        for worker in workers:
            worker.stop_now.set()
            worker.kill_all(signal.SIGKILL)

    def _register(self) -> None:
        body = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {
                "name": self.name,
                "labels": {
                    "kubernetes.io/hostname": self.name,
                    "kubernetes.io/os": "linux",
                    "kubernetes.io/arch": "amd64",
                },
            },
        }
        try:
            self.api.post("/api/v1/nodes", body)
        except ApiError as error:
            if error.code != 409:
                raise
        self._report_node()

    def _report_node(self) -> None:
        conditions = [
            {
                "type": kind,
                "status": status,
                "reason": reason,
                "lastHeartbeatTime": now(),
                "lastTransitionTime": now(),
            }
            for kind, status, reason in (
                ("MemoryPressure", "False", "KubeletHasSufficientMemory"),
                ("DiskPressure", "False", "KubeletHasNoDiskPressure"),
                ("PIDPressure", "False", "KubeletHasSufficientPID"),
                ("Ready", "True", "KubeletReady"),
            )
        ]
        status = {
            "capacity": self.capacity,
            "allocatable": self.capacity,
            "conditions": conditions,
            "addresses": [
                {"type": "InternalIP", "address": self.address},
                {"type": "Hostname", "address": self.name},
            ],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": _KUBELET_PORT}},
            "nodeInfo": {
                "architecture": "amd64", "bootID": "", "containerRuntimeVersion": "process://1",
                "kernelVersion": os.uname().release, "kubeProxyVersion": "", "kubeletVersion": "v1.37.2",
                "machineID": "", "operatingSystem": "linux", "osImage": "devcluster", "systemUUID": "",
            },
        }  # fmt: skip
        self.api.patch(f"/api/v1/nodes/{self.name}/status", {"status": status})

    def _renew_lease(self) -> None:
        path = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
        while not self.stop.is_set():
            if not self.lost.is_set():
                stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
                spec = {"holderIdentity": self.name, "leaseDurationSeconds": 20, "renewTime": stamp}
                body = {
                    "apiVersion": "coordination.k8s.io/v1",
                    "kind": "Lease",
                    "metadata": {"name": self.name, "namespace": "kube-node-lease"},
                    "spec": spec,
                }
                try:
                    try:
                        self.api.patch(f"{path}/{self.name}", {"spec": spec})
                    except ApiError as error:
                        if error.code != 404:
                            raise
                        self.api.post(path, body)
                    self._report_node()
                except Exception as error:  # the API server may be down: a kubelet goes on
                    _log.warning("lease: %s", error)
            self.stop.wait(_LEASE_SECONDS)

    # Names.

    def _watch_services(self) -> None:
        def changed(kind: str, item: dict[str, Any]) -> None:
            with self._lock:
                if kind == "SYNC":
                    self._services = {i["metadata"]["uid"]: i for i in item["items"]}
                elif kind == "DELETED":
                    self._services.pop(item["metadata"]["uid"], None)
                else:
                    self._services[item["metadata"]["uid"]] = item
            self._refresh_names()

        self.api.watch("/api/v1/services", changed, self.stop)

    def _refresh_names(self) -> None:
        """Rewrite every pod's hosts file in place: it is mounted into running containers."""
        with self._lock:
            pods, services = list(self._pods.values()), list(self._services.values())
            for uid, worker in self.workers.items():
                own = self._pods.get(uid)
                if own is None or not own.get("status", {}).get("podIP"):
                    continue
                entries = names.hosts(services, pods, own["metadata"]["namespace"])
                text = names.hosts_file(own, entries)
                if worker.hosts.exists() and worker.hosts.read_text() != text:
                    worker.hosts.write_text(text)

    # Pods.

    def _on_pod(self, kind: str, item: dict[str, Any]) -> None:
        if self.lost.is_set():
            return
        if kind == "SYNC":
            present = {pod["metadata"]["uid"] for pod in item["items"]}
            for pod in item["items"]:
                self._update(pod)
            with self._lock:
                gone = [uid for uid in self.workers if uid not in present]
            for uid in gone:
                self._remove(uid)
        elif kind == "DELETED":
            self._remove(item["metadata"]["uid"])
        elif kind in ("ADDED", "MODIFIED"):
            self._update(item)

    def _update(self, pod: dict[str, Any]) -> None:
        uid = pod["metadata"]["uid"]
        with self._lock:
            worker = self.workers.get(uid)
            if worker is not None:
                # The worker's own status is newer than what comes back from the watch.
                status = {**(pod.get("status") or {}), **worker.pod["status"]}
                status["conditions"] = _merged(pod, worker.pod)
                worker.pod.update({**pod, "status": status})
            elif pod.get("status", {}).get("phase") in ("Succeeded", "Failed"):
                if pod["metadata"].get("deletionTimestamp"):
                    self._forget(pod)
                return
            else:
                self._adopt(pod)

    def _adopt(self, pod: dict[str, Any]) -> None:
        uid, meta = pod["metadata"]["uid"], pod["metadata"]
        status = pod.setdefault("status", {})
        if status.get("containerStatuses"):
            # This program was restarted: what it ran is gone.
            status["phase"] = "Failed"
            self._report(pod, {**status, "reason": "NodeRestarted"})
            return
        status |= {"podIP": self._pod_address(), "hostIP": self.address, "startTime": now()}
        self._pods[uid] = pod
        host, port = self.api.host_port
        worker = PodWorker(
            pod,
            self.state / "pods" / uid,
            self.state / "logs" / meta["namespace"] / meta["name"],
            read=lambda kind, name, ns=meta["namespace"]: self._read(kind, ns, name),
            tokens=self._token,
            report=self._report,
            forget=self._forget,
            base_env={"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": str(port)},
            start_delay=lambda: self.start_delay,
        )
        self.workers[uid] = worker
        worker.start()

    def _remove(self, uid: str) -> None:
        with self._lock:
            worker = self.workers.pop(uid, None)
            self._pods.pop(uid, None)
        if worker is not None:
            worker.stop_now.set()
            worker.kill_all(signal.SIGKILL)
            shutil.rmtree(self.state / "pods" / uid, ignore_errors=True)
        self._refresh_names()

    def _report(self, pod: dict[str, Any], status: dict[str, Any]) -> None:
        pod["status"] = {**(pod.get("status") or {}), **status}
        self._refresh_names()
        meta = pod["metadata"]
        path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}/status"
        while not self.stop.is_set():
            while self.lost.is_set() and not self.stop.is_set():
                time.sleep(0.2)
            try:
                self.api.patch(path, {"metadata": {"uid": meta["uid"]}, "status": status})
                return
            except ApiError as error:
                if error.code in (404, 409, 422):
                    return
                _log.warning("status of %s: %s", meta["name"], error)
            except Exception as error:  # the API server may be down: a kubelet goes on
                _log.warning("status of %s: %s", meta["name"], error)
            self.stop.wait(0.5)

    def _forget(self, pod: dict[str, Any]) -> None:
        meta = pod["metadata"]
        try:
            self.api.delete(
                f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}",
                {
                    "apiVersion": "v1",
                    "kind": "DeleteOptions",
                    "gracePeriodSeconds": 0,
                    "preconditions": {"uid": meta["uid"]},
                },
            )
        except ApiError as error:
            if error.code not in (404, 409):
                _log.warning("delete %s: %s", meta["name"], error)

    def _read(self, kind: str, namespace: str, name: str) -> dict[str, str]:
        plural = {"ConfigMap": "configmaps", "Secret": "secrets"}[kind]
        try:
            item = self.api.get(f"/api/v1/namespaces/{namespace}/{plural}/{name}")
        except ApiError as error:
            # The Node authorizer answers 403 until its graph knows the pod, and for what is not
            # there.
            if error.code in (403, 404):
                raise ConfigError(f'{kind.lower()} "{name}" not found') from error
            raise ConfigError(error.message) from error
        return decoded(item) if kind == "Secret" else dict(item.get("data") or {})

    def _token(self, pod: dict[str, Any], source: dict[str, Any]) -> str:
        meta = pod["metadata"]
        account = pod["spec"].get("serviceAccountName") or "default"
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {
                "audiences": [source["audience"]] if source.get("audience") else [],
                "expirationSeconds": source.get("expirationSeconds", 3600),
                "boundObjectRef": {
                    "apiVersion": "v1", "kind": "Pod", "name": meta["name"], "uid": meta["uid"],
                },
            },
        }  # fmt: skip
        path = f"/api/v1/namespaces/{meta['namespace']}/serviceaccounts/{account}/token"
        try:
            return str(self.api.post(path, body)["status"]["token"])
        except ApiError as error:
            raise ConfigError(error.message) from error


def _merged(pod: dict[str, Any], own: dict[str, Any]) -> list[dict[str, Any]]:
    """Conditions of both: the API server's (such as DisruptionTarget) and the node's own."""
    found = {c["type"]: c for c in own["status"].get("conditions") or []}
    for condition in pod.get("status", {}).get("conditions") or []:
        found.setdefault(condition["type"], condition)
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description="a node that runs pods as local processes")
    parser.add_argument("--name", required=True)
    parser.add_argument("--kubeconfig", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--cpu", default="16")
    parser.add_argument("--memory", default="20Gi")
    parser.add_argument("--gpus", default="8")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    capacity = {
        "cpu": given.cpu, "memory": given.memory, "pods": "250", "nvidia.com/gpu": given.gpus,
        "ephemeral-storage": "100Gi",
    }  # fmt: skip
    node = Node(given.name, given.kubeconfig, given.state, capacity)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: (node.shut_down(), os._exit(0)))
    # Signals are handled in the main thread; the watch, which blocks, is in another.
    thread = threading.Thread(target=node.run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(1.0)


if __name__ == "__main__":
    main()
