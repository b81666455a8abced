"""Control plane, S3 and nodes, together."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType

from devcluster import assets
from devcluster.controlplane import ControlPlane
from devcluster.handle import Handle
from devcluster.process import Background, wait_until
from devcluster.s3 import S3Server

__all__ = ["DevCluster", "Handle"]
TESTS = Path(__file__).resolve().parents[1]


class DevCluster:
    """Starts and ends everything.

    `cpu`, `memory` and `gpus` are what each node says that it has: places to count, so that pods
    with requests fit on a small machine. `detached` lets the cluster outlive this program; else
    all of it ends with the thread that started it, even when that is killed. `warm`: trainers'
    containers are forks of an interpreter that has imported for them (`node/warm.py`), as tests that
    run many of them want; never where a start's time matters.
    """

    def __init__(
        self,
        state: Path,
        *,
        nodes: int = 1,
        cpu: int = 16,
        memory: str = "20Gi",
        gpus: int = 8,
        backoff_seconds: float = 1.0,
        toleration_seconds: int = 300,
        detached: bool = False,
        warm: bool = False,
    ) -> None:
        state.mkdir(parents=True, exist_ok=True)
        self._state = state.resolve()
        self._detached = detached
        self._node_flags = [
            f"--cpu={cpu}",
            f"--memory={memory}",
            f"--gpus={gpus}",
            f"--backoff={backoff_seconds}",
            *(["--warm"] if warm else []),
        ]
        self.control_plane = ControlPlane(
            self._state, detached=detached, toleration_seconds=toleration_seconds
        )
        self.s3 = S3Server(self._state / "s3", detached=detached)
        self.handle = Handle(self._state, self.control_plane.admin, self.s3.access)
        names = ["dev-node", *(f"dev-node-{number}" for number in range(2, nodes + 1))]
        self.nodes = {name: self._node(name) for name in names}

    def start(self) -> Handle:
        """Start S3, control plane and nodes; ready when all of them are."""
        assets.ensure()
        self.s3.process.start()
        # A node waits for the API server; its start is slow enough to run beside.
        for node in self.nodes.values():
            node.start()
        self.control_plane.start()
        wait_until(self._nodes_ready, "nodes", 180)
        wait_until(self.s3.ready, "SeaweedFS", 180)
        self.handle.save()
        return self.handle

    def stop(self) -> None:
        """End everything; the nodes first, so that they kill what they run."""
        for node in self.nodes.values():
            node.stop()
        self.control_plane.stop()
        self.s3.stop()

    def add_node(self, name: str) -> None:
        """One more node, ready when this returns."""
        self.nodes[name] = self._node(name)
        self.nodes[name].start()
        wait_until(self._nodes_ready, f"node {name}", 60)

    def lose_node(self, name: str) -> None:
        """For good: its power fails, and it is taken off the cluster's list, as a cloud does it."""
        self.handle.node(name).lose(kill=True)
        self.nodes.pop(name).kill()
        self.handle.api.delete(f"/api/v1/nodes/{name}", {})

    def pids(self) -> list[int]:
        """Of all background processes, in the order in which they are to be ended."""
        parts = reversed(list(self.control_plane.parts.values()))
        nodes = (node.pid for node in self.nodes.values())
        return [*nodes, *(part.pid for part in parts), self.s3.process.pid]

    def __enter__(self) -> Handle:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _node(self, name: str) -> Background:
        state = self._state / "nodes" / name
        state.mkdir(parents=True, exist_ok=True)
        authority = self.control_plane.authority
        certificate, key = authority.issue(f"kubelet-{name}", f"system:node:{name}")
        for source, target in (
            (certificate, "kubelet.crt"),
            (key, "kubelet.key"),
            (authority.path, "ca.crt"),
        ):
            (state / target).write_bytes(source.read_bytes())
            (state / target).chmod(0o600)
        command = [
            sys.executable,
            "-m",
            "devcluster.node.agent",
            f"--name={name}",
            f"--kubeconfig={self.control_plane.node_config(name)}",
            f"--dns-kubeconfig={self.control_plane.dns_config()}",
            f"--state={state}",
            f"--logs={self._state / 'logs'}",
            *self._node_flags,
        ]
        env = os.environ | {"PYTHONPATH": str(TESTS), "PYTHONUNBUFFERED": "1"}
        log = self._state / "logs" / f"{name}.log"
        return Background(command, log, env=env, detached=self._detached)

    def _nodes_ready(self) -> bool:
        parts = {**self.control_plane.parts, **self.nodes}
        for name, part in parts.items():
            if not part.running:
                raise RuntimeError(f"{name} ended:\n{part.tail()}")
        ready = [
            condition["type"] == "Ready" and condition["status"] == "True"
            for node in self.handle.api.get("/api/v1/nodes")["items"]
            for condition in node["status"].get("conditions") or []
        ]
        return ready.count(True) == len(self.nodes)
