"""The kubelet's HTTPS endpoint, as far as `kubectl logs` needs it."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit


def serve(listener: socket.socket, state: Path) -> None:
    """Serve logs below `state`/logs with the certificate `state`/kubelet.crt."""
    logs = state / "logs"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            fields = parts.path.strip("/").split("/")
            if len(fields) != 4 or fields[0] != "containerLogs":
                self.send_error(404)
                return
            path = logs / fields[1] / fields[2] / f"{fields[3]}.log"
            if not path.exists():
                self.send_error(404, f"container {fields[3]} has no log yet")
                return
            query = parse_qs(parts.query)
            self.send_response(200)
            self.send_header("Content-Type", "text/plain")
            self.end_headers()
            for piece in _pieces(path, query):
                self.wfile.write(piece)

        def log_message(self, format: str, *args: Any) -> None:
            """Requests for logs are no news."""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(state / "kubelet.crt", state / "kubelet.key")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = context.wrap_socket(listener, server_side=True)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()


def _pieces(path: Path, query: dict[str, list[str]]) -> Iterator[bytes]:
    with path.open("rb") as file:
        if "tailLines" in query:
            yield from deque(file, maxlen=int(query["tailLines"][0]))
        while True:
            piece = file.read(65536)
            if piece:
                yield piece
            elif query.get("follow") == ["true"] and path.exists():
                time.sleep(0.2)
            else:
                return
