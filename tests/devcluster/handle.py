"""What is needed to use a running cluster; survives the program that started it."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from devcluster import tools
from devcluster.node.api import Api
from devcluster.node.control import Faults
from devcluster.s3 import S3Access

_NODE = "dev-node"
_FILE = "cluster.json"
_OWN = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "S3_BUCKET")


@dataclass(frozen=True)
class Handle:
    """A running cluster."""

    state: Path
    kubeconfig: Path
    s3: S3Access

    def kubectl(self, *args: str, stdin: str | None = None, check: bool = True) -> str:
        """Run kubectl; its standard output. RuntimeError shows what it said.

        Without `check`: standard output and error, whatever the exit code.
        """
        return self._run([str(tools.kubectl()), *args], stdin, check)

    def helm(self, *args: str, check: bool = True) -> str:
        """Run helm; its standard output."""
        return self._run([str(tools.helm()), *args], None, check)

    def apply(self, *objects: dict[str, Any]) -> None:
        """Server-side apply of whole objects."""
        content = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(content))

    def get(self, *args: str) -> Any:
        """`kubectl get … -o json`, parsed."""
        return json.loads(self.kubectl("get", *args, "-o", "json"))

    @functools.cached_property
    def api(self) -> Api:
        """The API server as raw JSON, as administrator: much faster than kubectl."""
        return Api(str(self.kubeconfig))

    def pod(self, namespace: str, name: str) -> dict[str, Any]:
        """ApiError with code 404 when it is not there."""
        return self.api.get(f"/api/v1/namespaces/{namespace}/pods/{name}")

    def wait(self, what: str, ready: Callable[[], Any], timeout_seconds: float = 30.0) -> Any:
        """The first answer of `ready` that is true. TimeoutError naming `what`."""
        deadline = time.monotonic() + timeout_seconds
        while not (answer := ready()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not within {timeout_seconds:.0f} s")
            time.sleep(0.1)
        return answer

    @property
    def has_node(self) -> bool:
        """Whether the node is ours: a cluster of one's own has none that takes faults."""
        return (self.state / "nodes" / _NODE).exists()

    @property
    def faults(self) -> Faults:
        """Faults of the first node."""
        return self.node(_NODE)

    def node(self, name: str) -> Faults:
        """Faults of a node, by its name."""
        return Faults(self.state / "nodes" / name)

    @property
    def logs(self) -> Path:
        """Folder with <namespace>/<pod>/<container>.log, and the components' logs beside them."""
        return self.state / "logs"

    def log(self, namespace: str, pod: str, container: str = "main") -> str:
        """What a container has written; it stays when the pod is gone."""
        path = self.logs / namespace / pod / f"{container}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def save(self) -> None:
        """For `load`."""
        content = {"kubeconfig": str(self.kubeconfig), "s3": asdict(self.s3)}
        (self.state / _FILE).write_text(json.dumps(content))

    @classmethod
    def load(cls, state: Path) -> Handle:
        """Of a cluster that runs. FileNotFoundError when there is none."""
        content = json.loads((state / _FILE).read_text())
        return cls(state, Path(content["kubeconfig"]), S3Access(**content["s3"]))

    @classmethod
    def own(cls, kubeconfig: Path, environment: Mapping[str, str], state: Path) -> Handle:
        """A cluster of the user's, with the S3 server that the environment names.

        The variables are those that `python -m devcluster env` prints. There is no node of ours, so
        no faults can be made. RuntimeError names what is missing.
        """
        missing = [name for name in _OWN if not environment.get(name)]
        if not kubeconfig.is_file():
            raise RuntimeError(f"own cluster: no kubeconfig at {kubeconfig}")
        if missing:
            raise RuntimeError(
                f"own cluster: set {', '.join(missing)}, so that pods and this program use one "
                "S3 server and a bucket in it"
            )
        return cls(state, kubeconfig, S3Access(*(environment[name] for name in _OWN)))

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
