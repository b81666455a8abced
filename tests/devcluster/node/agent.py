"""The node itself: takes an address block, registers, watches its pods and runs them."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from devcluster.node import control, kubelet, limits, supplies
from devcluster.node.api import Api, ApiError, Object
from devcluster.node.container import now
from devcluster.node.dns import Dns
from devcluster.node.image import Image, ImageMissing, image_of
from devcluster.node.pod import PodWorker, Surroundings
from devcluster.node.registration import KUBELET_PORT, Registration
from devcluster.node.status import UNKNOWN
from devcluster.node.warm import Warm

_log = logging.getLogger(__name__)
_BLOCKS = range(64, 250)
_CLEAN_UP_SECONDS = 3.0


@dataclass(frozen=True)
class Settings:
    """What a node is started with."""

    name: str
    kubeconfig: Path
    dns_kubeconfig: Path
    """May list all pods and Services, as a cluster's DNS may and a kubelet may not."""
    state: Path
    logs: Path
    capacity: dict[str, str]
    backoff_seconds: float = 1.0
    warm: bool = False
    """Whether trainers' containers may be forks of an interpreter that has imported for them."""


class Node:
    """One node. All of its addresses lie in a /16 of loopback that no other node uses."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.name = settings.name
        self.state = settings.state
        self.logs = settings.logs
        self.api = Api(str(settings.kubeconfig))
        self.stop = threading.Event()
        self.lost = threading.Event()
        self.start_delay = 0.0
        self.refused_images: set[str] = set()
        self.workers: dict[str, PodWorker] = {}
        self._lock = threading.RLock()
        self._warm = Warm(self.state / "warm.log") if settings.warm else None
        self._next_address = 0
        self._block = 0
        self.server_socket = self._claim_block()
        self._dns = Dns(Api(str(settings.dns_kubeconfig)), self._named)

    # Addresses.

    def _claim_block(self) -> socket.socket:
        """Take the first 127.B.0.0/16 whose node port is free; holding the port is the claim."""
        for block in _BLOCKS:
            listener = socket.socket()
            # A node that ended a moment ago leaves connections behind.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((f"127.{block}.0.1", KUBELET_PORT))
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
        # One round is 62,500 pods.
        self._next_address += 1
        high, low = divmod(self._next_address, 250)
        return f"127.{self._block}.{1 + high % 250}.{low + 1}"

    # Life.

    def run(self) -> None:
        """Until `stop` is set."""
        self._clear_traces()
        Registration(
            self.api, self.name, self.address, self.settings.capacity, self.stop, self.lost
        ).start()
        kubelet.serve(self.server_socket, self.state, self.logs, self._is_running)
        control.serve(self)
        self._dns.start(self.stop)
        self.api.watch(
            "/api/v1/pods", self._on_pod, self.stop, fieldSelector=f"spec.nodeName={self.name}"
        )

    def shut_down(self) -> None:
        """Kill all pods' processes; their objects stay as they are."""
        self.stop.set()
        workers = list(self.workers.values())
        for worker in workers:
            worker.stop_now.set()
            worker.kill_all(signal.SIGKILL)
        deadline = time.monotonic() + _CLEAN_UP_SECONDS
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))

    def _clear_traces(self) -> None:
        """Of an earlier node with the same state that was killed."""
        for folder in (self.state / "pods").glob("*"):
            limits.remove_stale(f"kubedistill-{folder.name}")
            shutil.rmtree(folder, ignore_errors=True)

    def lose(self, *, kill: bool) -> None:
        """Fall silent, as when the network is cut or, with `kill`, as when the power fails."""
        self.lost.set()
        if kill:
            for worker in list(self.workers.values()):
                worker.kill_all(signal.SIGKILL)

    def come_back(self) -> None:
        """Speak again, and learn what has changed meanwhile."""
        with self._lock:
            self.lost.clear()
            query = f"fieldSelector=spec.nodeName%3D{self.name}"
            self._on_pod("SYNC", self.api.get(f"/api/v1/pods?{query}"))

    def worker_of(self, namespace: str, pod: str) -> PodWorker:
        """LookupError when the pod does not run here."""
        for worker in list(self.workers.values()):
            meta = worker.pod["metadata"]
            if (meta["namespace"], meta["name"]) == (namespace, pod):
                return worker
        raise LookupError(f"no pod {namespace}/{pod} on node {self.name}")

    # What the parts ask of it.

    def _named(self) -> list[tuple[Object, Path]]:
        return [(worker.pod, worker.hosts) for worker in list(self.workers.values())]

    def _is_running(self, namespace: str, pod: str, container: str) -> bool:
        try:
            return self.worker_of(namespace, pod).is_running(container)
        except LookupError:
            return False

    def _image(self, name: str) -> Image:
        if any(part in name for part in self.refused_images):
            raise ImageMissing(f'failed to pull and unpack image "{name}": refused')
        return image_of(name)

    # Pods.

    def _on_pod(self, kind: str, item: Object) -> None:
        with self._lock:
            if self.lost.is_set():
                return
            if kind == "SYNC":
                present = {pod["metadata"]["uid"] for pod in item["items"]}
                for pod in item["items"]:
                    self._update(pod)
                for uid in [uid for uid in self.workers if uid not in present]:
                    self._remove(uid)
            elif kind == "DELETED":
                self._remove(item["metadata"]["uid"])
            elif kind in ("ADDED", "MODIFIED"):
                self._update(item)

    def _update(self, pod: Object) -> None:
        worker = self.workers.get(pod["metadata"]["uid"])
        if worker is not None:
            # The worker's own status is newer than what comes back from the watch.
            worker.pod.update({key: value for key, value in pod.items() if key != "status"})
            return
        status = pod.setdefault("status", {})
        if status.get("phase") in ("Succeeded", "Failed"):
            if pod["metadata"].get("deletionTimestamp"):
                threading.Thread(target=self._forget, args=(pod,), daemon=True).start()
        elif status.get("containerStatuses"):
            threading.Thread(target=self._give_up, args=(pod,), daemon=True).start()
        else:
            self._adopt(pod)

    def _adopt(self, pod: Object) -> None:
        uid, meta = pod["metadata"]["uid"], pod["metadata"]
        own = {"podIP": self._pod_address(), "hostIP": self.address, "startTime": now()}
        pod["status"] |= own
        host, port = self.api.host_port
        around = Surroundings(
            read=partial(supplies.read, self.api, meta["namespace"]),
            tokens=partial(supplies.token, self.api),
            images=self._image,
            report=self._report,
            forget=self._forget,
            event=partial(supplies.event, self.api, self.name),
            service={"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": str(port)},
            allocatable=self.settings.capacity,
            start_delay=lambda: self.start_delay,
            backoff_seconds=self.settings.backoff_seconds,
            warm=self._warm,
        )
        logs = self.logs / meta["namespace"] / meta["name"]
        worker = PodWorker(pod, self.state / "pods" / uid, logs, around)
        self.workers[uid] = worker
        self._dns.write()
        worker.start()

    def _give_up(self, pod: Object) -> None:
        """This program was restarted: what it ran before is gone."""
        statuses = [
            {**s, "ready": False, "started": False, "state": {"terminated": dict(UNKNOWN)}}
            if "terminated" not in s["state"]
            else s
            for s in pod["status"]["containerStatuses"]
        ]
        text = "The node was restarted"
        self._report(
            pod,
            {
                "phase": "Failed",
                "reason": "NodeRestarted",
                "message": text,
                "containerStatuses": statuses,
                "conditions": [
                    {"type": kind, "status": "False", "reason": "PodFailed", "message": text}
                    for kind in ("ContainersReady", "Ready")
                ],
            },
        )

    def _remove(self, uid: str) -> None:
        worker = self.workers.pop(uid, None)
        if worker is not None:
            worker.stop_now.set()
            threading.Thread(target=self._clean_up, args=(uid, worker), daemon=True).start()

    def _clean_up(self, uid: str, worker: PodWorker) -> None:
        """After the object is gone, whatever its process does."""
        worker.join(timeout=10)
        shutil.rmtree(self.state / "pods" / uid, ignore_errors=True)

    def _report(self, pod: Object, status: Mapping[str, Any]) -> None:
        """Write a status; waits as long as the API server is away or this node is lost."""
        pod["status"] = {**(pod.get("status") or {}), **status}
        meta = pod["metadata"]
        path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}/status"
        while not self.stop.is_set():
            if self.lost.is_set():
                self.stop.wait(0.2)
                continue
            try:
                self.api.patch(path, {"metadata": {"uid": meta["uid"]}, "status": status})
                return
            except ApiError as error:
                if error.code in (404, 409):
                    return
                _log.warning("status of %s: %s", meta["name"], error)
                if error.code == 422:
                    return
            except Exception as error:  # the API server may be down: a kubelet goes on
                _log.warning("status of %s: %s", meta["name"], error)
            self.stop.wait(0.5)

    def _forget(self, pod: Object) -> None:
        supplies.forget(self.api, pod, self.stop)


def main() -> None:
    parser = argparse.ArgumentParser(description="a node that runs pods as local processes")
    for name in ("kubeconfig", "dns-kubeconfig", "state", "logs"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--cpu", default="16")
    parser.add_argument("--memory", default="20Gi")
    parser.add_argument("--gpus", default="8")
    parser.add_argument("--backoff", type=float, default=1.0)
    parser.add_argument("--warm", action="store_true")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    capacity = {
        "cpu": given.cpu,
        "memory": given.memory,
        "pods": "500",
        "nvidia.com/gpu": given.gpus,
        "ephemeral-storage": "100Gi",
    }
    node = Node(
        Settings(
            given.name, given.kubeconfig, given.dns_kubeconfig, given.state, given.logs,
            capacity, given.backoff, given.warm,
        )
    )  # fmt: skip

    def end(number: int, frame: object) -> None:
        node.shut_down()
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    # Signals are handled in the main thread; the watch, which blocks, is in another.
    thread = threading.Thread(target=node.run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(1.0)


if __name__ == "__main__":
    main()
