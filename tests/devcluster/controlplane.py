"""etcd, kube-apiserver, kube-controller-manager and kube-scheduler on loopback."""

from __future__ import annotations

import functools
import http.client
import ssl
import time
from pathlib import Path

from devcluster import assets
from devcluster.pki import Authority, service_account_key
from devcluster.process import Background, free_port, wait_until

# Seconds on an idle machine; a process that ends is noticed at once, so this bounds contention.
_READY_SECONDS = 300.0


class ControlPlane:
    """One control plane with a data directory of its own; two can run side by side."""

    def __init__(
        self, state: Path, *, detached: bool = False, toleration_seconds: int = 300
    ) -> None:
        """`toleration_seconds`: how long pods stay bound to a node that is lost."""
        self._state = state
        self._toleration_seconds = toleration_seconds
        self._detached = detached
        self.authority = Authority(state / "pki")
        self._port = free_port()
        self.server = f"https://127.0.0.1:{self._port}"
        self.admin = self._config("admin", "dev-admin", "system:masters")
        self.parts: dict[str, Background] = {}

    def start(self) -> None:
        """Start all four and wait until the API server is ready."""
        programs = assets.ensure()
        etcd_client, etcd_peer = free_port(), free_port()
        self._run(
            programs["etcd"],
            f"--data-dir={self._state / 'etcd'}",
            f"--listen-client-urls=http://127.0.0.1:{etcd_client}",
            f"--advertise-client-urls=http://127.0.0.1:{etcd_client}",
            f"--listen-peer-urls=http://127.0.0.1:{etcd_peer}",
            "--unsafe-no-fsync",
            "--logger=zap",
            "--log-level=warn",
        )
        self._run(programs["kube-apiserver"], *self._apiserver_flags(etcd_client))
        wait_until(self.ready, "kube-apiserver", _READY_SECONDS)
        self._run(programs["kube-controller-manager"], *self._controller_flags())
        scheduler = self._config("scheduler", "system:kube-scheduler")
        self._run(programs["kube-scheduler"], *_common_flags(scheduler))

    def stop(self) -> None:
        """End all four, the API server before its store."""
        for name in reversed(assets.NAMES):
            if name in self.parts:
                self.parts[name].stop()

    def restart(self, name: str, down_seconds: float = 0.0) -> None:
        """Kill one of the four, and start it again after a while; waits for the API server."""
        self.parts[name].kill()
        time.sleep(down_seconds)
        self.parts[name].start()
        if name in ("etcd", "kube-apiserver"):
            wait_until(self.ready, "kube-apiserver", _READY_SECONDS)

    def ready(self) -> bool:
        """Whether /readyz answers ok. RuntimeError when the API server has ended."""
        server = self.parts["kube-apiserver"]
        if not server.running:
            raise RuntimeError(f"kube-apiserver ended:\n{server.tail()}")
        connection = http.client.HTTPSConnection(
            "127.0.0.1", self._port, timeout=5, context=self._as_admin
        )
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    @functools.cached_property
    def _as_admin(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.authority.path))
        pki = self._state / "pki"
        context.load_cert_chain(pki / "admin.crt", pki / "admin.key")
        return context

    def dns_config(self) -> Path:
        """For the node's names: it lists all pods, as a cluster's DNS may and a kubelet not."""
        return self._config("dns", "dev-dns", "system:masters")

    def node_config(self, node: str) -> Path:
        """A kubelet's kubeconfig: NodeRestriction and the Node authorizer apply to it."""
        return self._config(f"node-{node}", f"system:node:{node}", "system:nodes")

    def _config(self, file: str, name: str, organization: str = "") -> Path:
        return self.authority.kubeconfig(file, self.server, name, organization)

    def _apiserver_flags(self, etcd_port: int) -> list[str]:
        pki = self._state / "pki"
        key = service_account_key(pki / "sa.key")
        serving, serving_key = self.authority.issue(
            "apiserver",
            "kube-apiserver",
            addresses=("127.0.0.1", "10.96.0.1", "localhost", "kubernetes.default.svc"),
        )
        kubelet, kubelet_key = self.authority.issue(
            "kubelet-client", "kube-apiserver-kubelet-client", "system:masters"
        )
        return [
            f"--etcd-servers=http://127.0.0.1:{etcd_port}",
            f"--secure-port={self._port}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            "--endpoint-reconciler-type=none",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            f"--client-ca-file={self.authority.path}",
            f"--tls-cert-file={serving}",
            f"--tls-private-key-file={serving_key}",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--kubelet-client-certificate={kubelet}",
            f"--kubelet-client-key={kubelet_key}",
            "--kubelet-preferred-address-types=InternalIP",
            f"--default-not-ready-toleration-seconds={self._toleration_seconds}",
            f"--default-unreachable-toleration-seconds={self._toleration_seconds}",
        ]

    def _controller_flags(self) -> list[str]:
        controller = self._config("controller-manager", "system:kube-controller-manager")
        return [
            *_common_flags(controller),
            "--use-service-account-credentials",
            f"--service-account-private-key-file={self._state / 'pki' / 'sa.key'}",
            f"--root-ca-file={self.authority.path}",
            # EndpointSlices refuse the loopback addresses that the node gives to pods.
            "--controllers=*,-endpoints-controller,-endpointslice-controller,"
            "-endpointslice-mirroring-controller",
            "--node-monitor-grace-period=20s",
        ]

    def _run(self, program: Path, *flags: str) -> None:
        log = self._state / "logs" / f"{program.name}.log"
        part = Background([program, *flags], log, detached=self._detached)
        part.start()
        self.parts[program.name] = part


def _common_flags(kubeconfig: Path) -> list[str]:
    """Of controller manager and scheduler."""
    return [
        f"--kubeconfig={kubeconfig}",
        "--leader-elect=false",
        f"--secure-port={free_port()}",
        "--bind-address=127.0.0.1",
    ]
