"""Control plane, S3 and node, together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from devcluster import tools
from devcluster.controlplane import ControlPlane
from devcluster.node.control import Faults
from devcluster.process import Background, wait_until
from devcluster.s3 import S3Access, S3Server

TESTS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Handle:
    """What is needed to use a running cluster; survives the program that started it."""

    state: Path
    kubeconfig: Path
    s3: S3Access

    def kubectl(self, *args: str, stdin: str | None = None, check: bool = True) -> str:
        """Run kubectl; its standard output. CalledProcessError shows what it said."""
        return self._run([str(tools.kubectl()), *args], stdin, check)

    def helm(self, *args: str, check: bool = True) -> str:
        """Run helm; its standard output."""
        return self._run([str(tools.helm()), *args], None, check)

    def get(self, *args: str) -> Any:
        """`kubectl get … -o json`, parsed."""
        return json.loads(self.kubectl("get", *args, "-o", "json"))

    @property
    def faults(self) -> Faults:
        return Faults(self.state / "node")

    @property
    def logs(self) -> Path:
        """Folder with <namespace>/<pod>/<container>.log."""
        return self.state / "node" / "logs"

    def save(self) -> None:
        content = {"kubeconfig": str(self.kubeconfig), "s3": asdict(self.s3)}
        (self.state / "cluster.json").write_text(json.dumps(content))

    @classmethod
    def load(cls, state: Path) -> Handle:
        content = json.loads((state / "cluster.json").read_text())
        return cls(state, Path(content["kubeconfig"]), S3Access(**content["s3"]))

    def _run(self, command: list[str], stdin: str | None, check: bool) -> str:
        result = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            env=os.environ | {"KUBECONFIG": str(self.kubeconfig)},
            check=False,
        )
        if check and result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}:\n{result.stdout}{result.stderr}")
        return result.stdout if check else result.stdout + result.stderr


class DevCluster:
    """Starts and ends everything. `detached` lets it outlive this program."""

    def __init__(self, state: Path, *, gpus: int = 8, detached: bool = False) -> None:
        state.mkdir(parents=True, exist_ok=True)
        self._state = state
        self._gpus = gpus
        self.control_plane = ControlPlane(state, detached=detached)
        self.s3 = S3Server(state / "s3", detached=detached)
        self.handle = Handle(state, self.control_plane.admin, self.s3.access)
        self.node = self._node("dev-node", detached)

    def start(self) -> Handle:
        """Start S3, control plane and node; ready when the node is."""
        self.s3.process.start()
        self.control_plane.start()
        self.node.start()
        wait_until(self._node_ready, "node", 60)
        wait_until(self.s3._bucket_ready, "SeaweedFS", 60)
        self.handle.save()
        return self.handle

    def stop(self) -> None:
        """End everything; the node first, so that it kills what it runs."""
        self.node.stop()
        self.control_plane.stop()
        self.s3.stop()

    def pids(self) -> list[int]:
        """Of all background processes, in the order in which they are to be ended."""
        parts = reversed(list(self.control_plane.parts.values()))
        return [self.node.pid, *(part.pid for part in parts), self.s3.process.pid]

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

    def _node(self, name: str, detached: bool) -> Background:
        state = self._state / "node"
        state.mkdir(exist_ok=True)
        certificate, key = self.control_plane.authority.issue("kubelet", f"system:node:{name}")
        (state / "kubelet.crt").write_bytes(certificate.read_bytes())
        (state / "kubelet.key").write_bytes(key.read_bytes())
        command = [
            sys.executable, "-m", "devcluster.node.agent", f"--name={name}",
            f"--kubeconfig={self.control_plane.node_config(name)}", f"--state={state}",
            f"--gpus={self._gpus}",
        ]  # fmt: skip
        env = os.environ | {"PYTHONPATH": str(TESTS), "PYTHONUNBUFFERED": "1"}
        return Background(command, self._state / "logs" / "node.log", env=env, detached=detached)

    def _node_ready(self) -> bool:
        if not self.node.running:
            raise RuntimeError(f"the node ended:\n{self.node.tail()}")
        for name, part in self.control_plane.parts.items():
            if not part.running:
                raise RuntimeError(f"{name} ended:\n{part.tail()}")
        nodes = self.handle.get("nodes")["items"]
        return any(
            c["type"] == "Ready" and c["status"] == "True"
            for node in nodes
            for c in node["status"].get("conditions", [])
        )
