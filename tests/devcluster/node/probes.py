"""Readiness, liveness and startup probes, with a kubelet's periods and thresholds."""

from __future__ import annotations

import http.client
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

_log = logging.getLogger(__name__)
Execute = Callable[[list[str], float], int]
"""(command, timeout in seconds) → exit code of the command run inside the container."""


class Probe:
    """One probe of one run of a container; `tick` is called often and does what is due.

    A check runs in a thread of its own, so that a server that hangs holds up nothing else.
    """

    def __init__(
        self, spec: Mapping[str, Any], address: str, ports: Mapping[str, int], execute: Execute
    ) -> None:
        self.spec = spec
        self._address = address
        self._ports = ports
        self._execute = execute
        self._due = time.monotonic() + float(spec.get("initialDelaySeconds") or 0)
        self._checking: threading.Thread | None = None
        self._answers: list[bool] = []
        self._row = (False, 0)
        self.passed = False
        self.failed = False

    def tick(self) -> None:
        """Take an answer, start a check that is due."""
        if self._answers:
            self._count(self._answers.pop(0))
        idle = self._checking is None or not self._checking.is_alive()
        if idle and time.monotonic() >= self._due:
            self._due = time.monotonic() + float(self.spec.get("periodSeconds") or 10)
            self._checking = threading.Thread(
                target=lambda: self._answers.append(self.check()), daemon=True
            )
            self._checking.start()

    def _count(self, good: bool) -> None:
        length = self._row[1] + 1 if self._row[0] == good else 1
        self._row = (good, length)
        if good and length >= int(self.spec.get("successThreshold") or 1):
            self.passed, self.failed = True, False
        elif not good and length >= int(self.spec.get("failureThreshold") or 3):
            self.passed, self.failed = False, True

    def check(self) -> bool:
        """Ask once. False also for what this node cannot ask."""
        timeout = float(self.spec.get("timeoutSeconds") or 1)
        try:
            if "httpGet" in self.spec:
                return self._http(self.spec["httpGet"], timeout)
            if "tcpSocket" in self.spec:
                tcp = self.spec["tcpSocket"]
                place = (tcp.get("host") or self._address, self._port(tcp["port"]))
                with socket.create_connection(place, timeout=timeout):
                    return True
            if "exec" in self.spec:
                return self._execute(list(self.spec["exec"]["command"]), timeout) == 0
        except (OSError, http.client.HTTPException):
            return False
        except KeyError as error:
            _log.warning("probe: the container has no port named %s", error)
            return False
        _log.warning("probe: this node has none of kind %s", sorted(self.spec))
        return False

    def _http(self, get: Mapping[str, Any], timeout: float) -> bool:
        host, port = get.get("host") or self._address, self._port(get["port"])
        connection = http.client.HTTPConnection(host, port, timeout=timeout)
        if get.get("scheme") == "HTTPS":
            # A kubelet does not verify either.
            context = ssl._create_unverified_context()  # noqa: S323
            connection = http.client.HTTPSConnection(host, port, timeout=timeout, context=context)
        headers = {"User-Agent": "kube-probe/1.37"}
        headers |= {h["name"]: h["value"] for h in get.get("httpHeaders") or []}
        try:
            connection.request("GET", get.get("path") or "/", headers=headers)
            return 200 <= connection.getresponse().status < 400
        finally:
            connection.close()

    def _port(self, port: int | str) -> int:
        return self._ports[port] if isinstance(port, str) else int(port)


class Probes:
    """The probes of one run. Until the startup probe has passed, the others wait."""

    def __init__(
        self, container: Mapping[str, Any], address: str, execute: Execute | None = None
    ) -> None:
        ports = {
            p["name"]: int(p["containerPort"])
            for p in container.get("ports") or []
            if p.get("name")
        }

        def probe(kind: str) -> Probe | None:
            spec = container.get(f"{kind}Probe")
            return Probe(spec, address, ports, execute or _cannot) if spec else None

        self._startup, self._readiness, self._liveness = map(
            probe, ("startup", "readiness", "liveness")
        )

    def tick(self) -> None:
        if self._startup is not None and not self._startup.passed:
            self._startup.tick()
            return
        for probe in (self._readiness, self._liveness):
            if probe is not None:
                probe.tick()

    @property
    def started(self) -> bool:
        return self._startup is None or self._startup.passed

    @property
    def ready(self) -> bool:
        return self.started and (self._readiness is None or self._readiness.passed)

    @property
    def failed(self) -> tuple[str, float | None] | None:
        """(startup or liveness, grace of its own) when the container is to be restarted."""
        for kind, probe in (("Startup", self._startup), ("Liveness", self._liveness)):
            if probe is not None and probe.failed:
                grace = probe.spec.get("terminationGracePeriodSeconds")
                return kind, None if grace is None else float(grace)
        return None


def _cannot(command: list[str], timeout_seconds: float) -> int:
    return 126
