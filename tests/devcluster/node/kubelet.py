"""The kubelet's HTTPS endpoint, as far as `kubectl logs` needs it."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

Running = Callable[[str, str, str], bool]
"""(namespace, pod, container) → whether it runs now."""


def serve(listener: socket.socket, state: Path, logs: Path, running: Running) -> None:
    """Serve `logs` with the certificate `state`/kubelet.crt to clients of `state`/ca.crt."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            fields = parts.path.strip("/").split("/")
            if len(fields) != 4 or fields[0] != "containerLogs" or ".." in fields:
                self.send_error(404, "this node serves containerLogs only")
                return
            namespace, pod, container = fields[1:]
            query = {key: values[0] for key, values in parse_qs(parts.query).items()}
            suffix = ".previous.log" if query.get("previous") == "true" else ".log"
            path = logs / namespace / pod / f"{container}{suffix}"
            if not path.exists():
                self._refuse(f'container "{container}" in pod "{pod}" is waiting to start')
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/plain")
            self.end_headers()
            try:
                for piece in pieces(path, query, lambda: running(namespace, pod, container)):
                    self.wfile.write(piece)
            except OSError:
                return  # the reader left

        def _refuse(self, text: str) -> None:
            self.send_response(400)
            self.send_header("Content-Type", "text/plain")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            """Requests for logs are no news."""

    _listen(listener, state, Handler)


def _listen(listener: socket.socket, state: Path, handler: type[BaseHTTPRequestHandler]) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(state / "ca.crt"))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(state / "kubelet.crt", state / "kubelet.key")
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler, bind_and_activate=False)
    server.socket.close()
    server.socket = context.wrap_socket(listener, server_side=True)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()


def pieces(path: Path, query: dict[str, str], running: Callable[[], bool]) -> Iterator[bytes]:
    """The log, or its end, cut at limitBytes; with `follow` until the container has ended."""
    left = int(query.get("limitBytes", 1 << 62))
    for piece in _unlimited(path, query, running):
        yield piece[:left]
        left -= len(piece)
        if left <= 0:
            return


def _unlimited(path: Path, query: dict[str, str], running: Callable[[], bool]) -> Iterator[bytes]:
    with path.open("rb") as file:
        if "tailLines" in query:
            yield from deque(file, maxlen=int(query["tailLines"]))
        while True:
            # Asked before the read: what is written until it ends is still read.
            more = query.get("follow") == "true" and running()
            piece = file.read(65536)
            if piece:
                yield piece
            elif more:
                time.sleep(0.2)
            else:
                return
