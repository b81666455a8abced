"""Faults on request: a Unix socket that takes one JSON object a line."""

from __future__ import annotations

import json
import signal
import socket
import socketserver
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from devcluster.node.agent import Node


def socket_path(state: Path) -> Path:
    return state / "control.sock"


def serve(node: Node) -> None:
    """Take requests in a thread."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            request = json.loads(self.rfile.readline())
            try:
                answer = {"ok": True, "result": _do(node, request)}
            except Exception as error:  # the answer carries it to the test
                answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
            self.wfile.write(json.dumps(answer).encode() + b"\n")

    path = socket_path(node.state)
    path.unlink(missing_ok=True)
    server = socketserver.ThreadingUnixStreamServer(str(path), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()


def _do(node: Node, request: dict[str, Any]) -> Any:
    action = request["action"]
    if action == "signal":
        for worker in list(node.workers.values()):
            meta = worker.pod["metadata"]
            if (meta["namespace"], meta["name"]) == (request["namespace"], request["pod"]):
                worker.kill_all(signal.Signals[request["signal"]])
                return meta["uid"]
        raise LookupError(f"no pod {request['namespace']}/{request['pod']} on this node")
    if action == "lose":
        node.lost.set()
    elif action == "return":
        node.lost.clear()
    elif action == "delay":
        node.start_delay = float(request["seconds"])
    else:
        raise ValueError(f"unknown action {action}")
    return None


class Faults:
    """The test's side of the socket."""

    def __init__(self, state: Path) -> None:
        self._path = socket_path(state)

    def signal(self, namespace: str, pod: str, name: str) -> None:
        """Send a signal (SIGKILL, SIGSTOP, SIGCONT, …) to all processes of a pod."""
        self._ask(action="signal", namespace=namespace, pod=pod, signal=name)

    def lose(self) -> None:
        """Stop the lease and all reports, as when the node's network is cut."""
        self._ask(action="lose")

    def come_back(self) -> None:
        self._ask(action="return")

    def delay_starts(self, seconds: float) -> None:
        """Every pod that starts from now on waits so long first."""
        self._ask(action="delay", seconds=seconds)

    def _ask(self, **request: Any) -> Any:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self._path))
            connection.sendall(json.dumps(request).encode() + b"\n")
            answer = json.loads(connection.makefile().readline())
        if not answer["ok"]:
            raise RuntimeError(answer["error"])
        return answer["result"]
