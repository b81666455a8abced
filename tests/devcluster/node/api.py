"""The few requests that a node makes, as raw JSON."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlencode, urlsplit

import urllib3
import yaml

Object = dict[str, Any]
_MERGE = "application/strategic-merge-patch+json"


class ApiError(RuntimeError):
    """The API server refused; `code` is its HTTP status."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class Api:
    """A kubeconfig's API server. Thread-safe."""

    def __init__(self, kubeconfig: str) -> None:
        with open(kubeconfig) as file:  # noqa: PTH123
            config = yaml.safe_load(file)
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        self.server: str = cluster["server"]
        context = ssl.create_default_context(cafile=cluster["certificate-authority"])
        context.load_cert_chain(user["client-certificate"], user["client-key"])
        self._pool = urllib3.PoolManager(maxsize=32, ssl_context=context, retries=False)

    @property
    def host_port(self) -> tuple[str, int]:
        parts = urlsplit(self.server)
        return str(parts.hostname), int(parts.port or 443)

    def get(self, path: str) -> Object:
        return self._call("GET", path)

    def post(self, path: str, body: Object) -> Object:
        return self._call("POST", path, body)

    def put(self, path: str, body: Object) -> Object:
        return self._call("PUT", path, body)

    def patch(self, path: str, body: Object) -> Object:
        """Strategic merge: of a list of conditions, the named ones change and others stay."""
        return self._call("PATCH", path, body, _MERGE)

    def delete(self, path: str, body: Object) -> Object:
        return self._call("DELETE", path, body)

    def watch(
        self,
        path: str,
        on_change: Callable[[str, Object], None],
        stop: threading.Event,
        **query: str,
    ) -> None:
        """List, then follow, for ever; `on_change` gets ("SYNC", list) after each new list."""
        while not stop.is_set():
            try:
                listed = self.get(f"{path}?{urlencode(query)}")
                on_change("SYNC", listed)
                version = listed["metadata"]["resourceVersion"]
                for event in self._events(path, {**query, "resourceVersion": version}):
                    if stop.is_set():
                        return
                    if event["type"] == "ERROR":
                        break
                    on_change(event["type"], event["object"])
            except (ApiError, urllib3.exceptions.HTTPError, OSError, ValueError):
                stop.wait(0.5)

    def _events(self, path: str, query: dict[str, str]) -> Iterator[Object]:
        url = (
            f"{self.server}{path}?{urlencode({**query, 'watch': 'true', 'timeoutSeconds': '300'})}"
        )
        timeout = urllib3.Timeout(connect=5, read=310)
        answer = self._pool.request("GET", url, preload_content=False, timeout=timeout)
        try:
            buffer = b""
            for piece in answer.stream(65536):
                buffer += piece
                *lines, buffer = buffer.split(b"\n")
                for line in lines:
                    yield json.loads(line)
        finally:
            answer.close()

    def _call(
        self, method: str, path: str, body: Object | None = None, kind: str = "application/json"
    ) -> Object:
        answer = self._pool.request(
            method,
            self.server + path,
            body=None if body is None else json.dumps(body),
            headers={"Content-Type": kind, "Accept": "application/json"},
            timeout=urllib3.Timeout(connect=5, read=30),
        )
        content: Object = json.loads(answer.data) if answer.data else {}
        if answer.status >= 400:
            raise ApiError(answer.status, str(content.get("message", answer.data[:200])))
        return content
