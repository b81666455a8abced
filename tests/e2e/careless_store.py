"""A store without conditional writes: the real one behind a gateway that drops If-None-Match."""

from __future__ import annotations

import http.client
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from devcluster.s3 import S3Access

_KEPT = ("content-type", "range", "x-amz-content-sha256")


class CarelessStore:
    """A gateway on loopback. It signs anew, since the header it drops was signed."""

    def __init__(self, s3: S3Access) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(s3))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> CarelessStore:
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(s3: S3Access) -> type[BaseHTTPRequestHandler]:
    credentials = Credentials(s3.access_key, s3.secret_key)
    host = urlsplit(s3.endpoint).netloc

    class Gateway(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {k: v for k, v in self.headers.items() if k.lower() in _KEPT}
            request = AWSRequest(self.command, s3.endpoint + self.path, headers, body)
            S3SigV4Auth(credentials, "s3", "us-east-1").add_auth(request)
            connection = http.client.HTTPConnection(host)
            try:
                connection.request(self.command, self.path, body, dict(request.headers.items()))
                answer = connection.getresponse()
                content = answer.read()
            finally:
                connection.close()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _pass_on

        def log_message(self, *_args: object) -> None:
            """Say nothing."""

    return Gateway
