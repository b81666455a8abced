"""A real S3 server (SeaweedFS) for tests: the session-scoped fixture `s3`.

Import both names where it is used: `from s3_fixture import S3Server, s3  # noqa: F401`.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from botocore.exceptions import ConnectionClosedError
from devcluster import s3 as devcluster_s3
from kubedistill_trainer.store import Limits, Store


@dataclass(frozen=True)
class S3Server:
    """Where the server is and what opens it. The keys are in the environment as well."""

    endpoint: str
    bucket: str
    access_key: str
    secret_key: str
    limits: Limits = field(default_factory=lambda: Limits(read_timeout_seconds=30, attempts=4))

    def uri(self, prefix: str = "") -> str:
        """The s3:// address of `prefix`, or of a prefix that nothing else uses."""
        return f"s3://{self.bucket}/{prefix or uuid.uuid4()}"

    def store(self, prefix: str = "") -> Store:
        """A Store of its own connection at `prefix`, or at a prefix that nothing else uses."""
        return Store(self.uri(prefix), endpoint=self.endpoint, limits=self.limits)

    def environment(self) -> dict[str, str]:
        """What boto3 reads, for a child process."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@functools.cache
def running_server() -> S3Server:
    """The server of this process: started once, gone when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="s3-"))
    server = devcluster_s3.S3Server(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.stop)
    server.start()
    access = server.access
    return S3Server(access.endpoint, access.bucket, access.access_key, access.secret_key)


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A SeaweedFS server, with its keys in this process's environment.

    A fixture that modules import is a fixture of each of them, hence the one server behind it.
    """
    server = running_server()
    with pytest.MonkeyPatch.context() as environment:
        for name, value in server.environment().items():
            environment.setenv(name, value)
        yield server


class Faults:
    """Faults in the requests of one Store (and its children), injected below botocore's retries.

    The server is the real one; what is lost is what a network loses.
    """

    def __init__(self, store: Store) -> None:
        self._client: Any = store._connection.client
        self.requests: list[str] = []
        """`METHOD key` of every request that was about to be sent."""
        self._losses: dict[str, int] = {}
        self._last: int | None = None
        self._last_applied = False
        self._client.meta.events.register("before-send.s3", self._before_send)

    def lose_answers(self, method: str, count: int = 1) -> None:
        """The next `count` requests of a method are applied, and their answers are lost."""
        self._losses[method] = count

    def die_at(self, request: int, *, applied: bool) -> None:
        """Request number `request` (from now, from 0) is the last: `applied` or not, unanswered."""
        self._last = len(self.requests) + request
        self._last_applied = applied

    def ignore_conditions(self) -> None:
        """From now on the store looks like one that does not know If-None-Match."""

        def strip(params: dict[str, Any], **_event: Any) -> None:
            params["headers"].pop("If-None-Match", None)

        self._client.meta.events.register("before-call.s3.PutObject", strip)

    def _before_send(self, request: Any, **_event: Any) -> None:
        number = len(self.requests)
        self.requests.append(f"{request.method} {urlsplit(request.url).path}")
        if self._last is not None and number >= self._last:
            if number == self._last and self._last_applied:
                self._client._endpoint.http_session.send(request)
            raise ConnectionClosedError(endpoint_url=request.url)
        if self._losses.get(request.method, 0) > 0:
            self._losses[request.method] -= 1
            self._client._endpoint.http_session.send(request)
            raise ConnectionClosedError(endpoint_url=request.url)
