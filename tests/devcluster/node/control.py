"""Faults on request: a Unix socket that takes one JSON object a line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from devcluster.node.agent import Node

_SOCKET = "control.sock"


@contextlib.contextmanager
def _short(folder: Path) -> Iterator[str]:
    """A short name of the socket in `folder`: a Unix socket's path has 107 bytes at most."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{opened}/{_SOCKET}"
    finally:
        os.close(opened)


def serve(node: Node) -> None:
    """Take requests in a thread."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            try:
                answer = {"ok": True, "result": act(node, json.loads(self.rfile.readline()))}
            except Exception as error:  # the answer carries it to the test
                answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
            self.wfile.write(json.dumps(answer).encode() + b"\n")

    (node.state / _SOCKET).unlink(missing_ok=True)
    with _short(node.state) as path:
        server = socketserver.ThreadingUnixStreamServer(path, Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()


def act(node: Node, request: dict[str, Any]) -> Any:
    """Do what is asked. ValueError for an unknown action, LookupError for an unknown pod."""
    match request["action"]:
        case "signal":
            worker = node.worker_of(request["namespace"], request["pod"])
            worker.kill_all(signal.Signals[request["signal"]], request.get("container"))
        case "lose":
            node.lose(kill=bool(request.get("kill")))
        case "return":
            node.come_back()
        case "evict":
            node.worker_of(request["namespace"], request["pod"]).evict()
        case "delay":
            node.start_delay = float(request["seconds"])
        case "refuse":
            node.refused_images.add(request["image"])
        case "allow":
            node.refused_images.clear()
        case "pids":
            worker = node.worker_of(request["namespace"], request["pod"])
            return {s.name: s.run.main_pid for s in worker.states if s.run is not None}
        case action:
            raise ValueError(f"unknown action {action}")
    return None


class Faults:
    """The test's side of the socket: faults of one node."""

    def __init__(self, state: Path) -> None:
        self._state = state

    def signal(self, namespace: str, pod: str, name: str, container: str | None = None) -> None:
        """Send a signal (SIGKILL, SIGSTOP, SIGCONT, …) to all processes of a pod or container."""
        self._ask(action="signal", namespace=namespace, pod=pod, signal=name, container=container)

    def kill(self, namespace: str, pod: str, container: str | None = None) -> None:
        """The container ends with exit code 137."""
        self.signal(namespace, pod, "SIGKILL", container)

    def freeze(self, namespace: str, pod: str, container: str | None = None) -> None:
        """All processes of it stop where they are, until `thaw`."""
        self.signal(namespace, pod, "SIGSTOP", container)

    def thaw(self, namespace: str, pod: str, container: str | None = None) -> None:
        self.signal(namespace, pod, "SIGCONT", container)

    def evict(self, namespace: str, pod: str) -> None:
        """The node is short of memory: the pod gets a second, and is failed as a disruption."""
        self._ask(action="evict", namespace=namespace, pod=pod)

    def lose(self, *, kill: bool = False) -> None:
        """Stop the lease and all reports: the network is cut or, with `kill`, the power fails."""
        self._ask(action="lose", kill=kill)

    def come_back(self) -> None:
        """End `lose`: the node reports again, and learns of deletions that it has missed."""
        self._ask(action="return")

    def delay_starts(self, seconds: float) -> None:
        """Every pod that starts from now on waits so long first; 0 ends it."""
        self._ask(action="delay", seconds=seconds)

    def refuse_image(self, part: str) -> None:
        """Images whose name contains `part` cannot be pulled, until `allow_images`."""
        self._ask(action="refuse", image=part)

    def allow_images(self) -> None:
        self._ask(action="allow")

    def pids(self, namespace: str, pod: str) -> dict[str, int]:
        """Container → its main process, in this machine's numbers."""
        answer: dict[str, int] = self._ask(action="pids", namespace=namespace, pod=pod)
        return answer

    def _ask(self, **request: Any) -> Any:
        with socket.socket(socket.AF_UNIX) as connection, _short(self._state) as path:
            connection.connect(path)
            connection.sendall(json.dumps(request).encode() + b"\n")
            answer = json.loads(connection.makefile().readline())
        if not answer["ok"]:
            raise RuntimeError(answer["error"])
        return answer["result"]
