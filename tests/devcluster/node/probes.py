"""Readiness, liveness and startup probes, with a kubelet's periods and thresholds."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any


class Probe:
    """One probe of one run of a container; `tick` is called often and does what is due.

    A check runs in a thread of its own, so that a server that hangs holds up nothing else.
    """

    def __init__(self, spec: Mapping[str, Any], address: str, ports: Mapping[str, int]) -> None:
        self._spec = spec
        self._address = address
        self._ports = ports
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
            self._due = time.monotonic() + float(self._spec.get("periodSeconds") or 10)
            self._checking = threading.Thread(
                target=lambda: self._answers.append(self._check()), daemon=True
            )
            self._checking.start()

    def _count(self, good: bool) -> None:
        length = self._row[1] + 1 if self._row[0] == good else 1
        self._row = (good, length)
        if good and length >= int(self._spec.get("successThreshold") or 1):
            self.passed, self.failed = True, False
        elif not good and length >= int(self._spec.get("failureThreshold") or 3):
            self.passed, self.failed = False, True

    def _check(self) -> bool:
        timeout = float(self._spec.get("timeoutSeconds") or 1)
        try:
            if "httpGet" in self._spec:
                return self._http(self._spec["httpGet"], timeout)
            if "tcpSocket" in self._spec:
                port = self._port(self._spec["tcpSocket"]["port"])
                with socket.create_connection((self._address, port), timeout=timeout):
                    return True
        except (OSError, http.client.HTTPException):
            return False
        raise ValueError(f"this node has no probe of kind {sorted(self._spec)}")

    def _http(self, get: Mapping[str, Any], timeout: float) -> bool:
        host = get.get("host") or self._address
        connection = http.client.HTTPConnection(host, self._port(get["port"]), timeout=timeout)
        try:
            connection.request("GET", get.get("path") or "/")
            return 200 <= connection.getresponse().status < 400
        finally:
            connection.close()

    def _port(self, port: int | str) -> int:
        return self._ports[port] if isinstance(port, str) else int(port)
