"""A real S3 server (SeaweedFS) for tests: the session-scoped fixture `s3`.

Use it in a test module by importing the fixture: `from s3_fixture import S3Server, s3`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from kubedistill_trainer.store import Limits, Store

_READY_SECONDS = 60


@dataclass(frozen=True)
class S3Server:
    """Where the server is and what opens it. The keys are in the environment as well."""

    endpoint: str
    bucket: str = "kubedistill"
    access_key: str = "test-access"
    secret_key: str = "test-secret"
    pid: int = 0
    limits: Limits = field(default_factory=lambda: Limits(read_timeout_seconds=20, attempts=3))

    def uri(self, prefix: str = "") -> str:
        """s3:// address of `prefix`, or of a prefix that nothing else uses."""
        return f"s3://{self.bucket}/{prefix or uuid.uuid4()}"

    def store(self, prefix: str = "") -> Store:
        """A Store at `prefix`, or at a prefix that nothing else uses."""
        return Store(self.uri(prefix), endpoint=self.endpoint, limits=self.limits)

    def environment(self) -> dict[str, str]:
        """What boto3 reads, for a child process."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_EC2_METADATA_DISABLED": "true",
        }


def free_ports(count: int) -> list[int]:
    """Ports that are free now, and whose gRPC twin (+10000) is too."""
    found: list[int] = []
    with ExitStack() as held:
        while len(found) < count:
            probe = held.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
            twin = held.enter_context(socket.socket())
            try:
                # SeaweedFS adds 10000 for gRPC; ephemeral ports may leave no room above.
                low = port - 20000 if port > 55000 else port
                if low != port:
                    held.enter_context(socket.socket()).bind(("127.0.0.1", low))
                twin.bind(("127.0.0.1", low + 10000))
            except OSError:
                continue
            found.append(low)
    return found


def start_weed(directory: Path, server: S3Server) -> subprocess.Popen[bytes]:
    """Start `weed mini` for `server` with its data in `directory`, in a session of its own."""
    identity = {
        "name": "test",
        "credentials": [{"accessKey": server.access_key, "secretKey": server.secret_key}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    config = directory / "s3.json"
    config.write_text(json.dumps({"identities": [identity]}))
    master, volume, filer, admin = free_ports(4)
    command = [
        str(Path(sys.executable).parent / "weed"),
        *("-logtostderr=true", "mini", f"-dir={directory}", "-ip=127.0.0.1"),
        *("-ip.bind=127.0.0.1", "-master.telemetry=false", "-admin.ui=false", "-webdav=false"),
        *(f"-s3.port={server.endpoint.rpartition(':')[2]}", "-s3.port.iceberg=0"),
        *("-s3.port.lance=0", f"-s3.config={config}", f"-bucket={server.bucket}"),
        *(f"-master.port={master}", f"-volume.port={volume}"),
        *(f"-filer.port={filer}", f"-admin.port={admin}"),
    ]
    with (directory / "weed.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def wait_ready(process: subprocess.Popen[bytes], server: S3Server, log: Path) -> None:
    """Return once an object can be written; RuntimeError with the log's end otherwise."""
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=server.endpoint,
        region_name="us-east-1",
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10),
    )
    deadline = time.monotonic() + _READY_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            client.put_object(Bucket=server.bucket, Key=".ready", Body=b"ready")
            return
        except (BotoCoreError, ClientError):
            time.sleep(0.2)
    raise RuntimeError(f"weed did not start: {log.read_text(errors='replace')[-2000:]}")


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A SeaweedFS server for the session, with its keys in this process's environment."""
    directory = tmp_path_factory.mktemp("weed")
    server = S3Server(endpoint=f"http://127.0.0.1:{free_ports(1)[0]}")
    process = start_weed(directory, server)
    with pytest.MonkeyPatch.context() as environment:
        for name, value in server.environment().items():
            environment.setenv(name, value)
        try:
            wait_ready(process, server, directory / "weed.log")
            yield server
        finally:
            # It takes ten seconds to end in peace, and its data is thrown away anyway.
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
