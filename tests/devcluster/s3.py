"""SeaweedFS as the S3 server."""

from __future__ import annotations

import json
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from devcluster import tools
from devcluster.process import Background, free_port_pair, wait_until

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


@dataclass(frozen=True)
class S3Access:
    """How to reach the server."""

    endpoint: str
    access_key: str
    secret_key: str
    bucket: str

    def client(self) -> S3Client:
        """A boto3 client of it."""
        import boto3
        from botocore.config import Config

        config = Config(retries={"max_attempts": 2, "mode": "standard"})
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=config,
        )


class S3Server:
    """One server with a data directory of its own."""

    def __init__(self, state: Path, bucket: str = "kubedistill", *, detached: bool = False) -> None:
        self._state = state
        # Each of its parts also listens 10,000 ports higher.
        self._port = free_port_pair()
        self.access = S3Access(
            f"http://127.0.0.1:{self._port}", "kubedistill", "kubedistill-secret", bucket
        )
        state.mkdir(parents=True, exist_ok=True)
        config = state / "s3.json"
        config.write_text(json.dumps({"identities": [self._identity()]}))
        self._ports = {part: free_port_pair() for part in ("master", "volume", "filer", "admin")}
        data = state / "data"
        data.mkdir(exist_ok=True)
        command: list[str | Path] = [
            tools.weed(), "-logtostderr=true", "mini", f"-dir={data}",
            "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false",
            "-admin.ui=false", "-webdav=false", f"-s3.port={self._port}",
            "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={config}",
            f"-bucket={bucket}", "-s3.iam.readOnly=false", "-s3.autoCreateBucket=false",
            *(f"-{part}.port={port}" for part, port in self._ports.items()),
        ]  # fmt: skip
        # It has nothing to flush that the tests need, and takes long to end when asked politely.
        self.process = Background(
            command, state / "weed.log", detached=detached, stop_signal=signal.SIGKILL
        )

    def start(self) -> None:
        """Start it and wait until bucket and port are there."""
        self.process.start()
        wait_until(self.ready, "SeaweedFS", 180)

    def stop(self) -> None:
        """End it, and remove the sockets that it leaves in the temporary folder."""
        self.process.stop()
        for port in (self._port, *self._ports.values()):
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)
            for left in Path("/tmp").glob(f"seaweedfs-*-{port + 10000}.sock"):
                left.unlink(missing_ok=True)

    def restart(self) -> None:
        """Kill it and start it again with its data."""
        self.process.kill()
        self.start()

    def client(self) -> S3Client:
        return self.access.client()

    def ready(self) -> bool:
        """Whether the bucket can be used. RuntimeError when the server has ended."""
        if not self.process.running:
            raise RuntimeError(f"SeaweedFS ended:\n{self.process.tail()}")
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            with socket.create_connection(("127.0.0.1", self._port), timeout=1):
                pass
            self.client().head_bucket(Bucket=self.access.bucket)
        except (OSError, BotoCoreError, ClientError):  # whatever it says before means: not yet
            return False
        return True

    def _identity(self) -> dict[str, object]:
        return {
            "name": "kubedistill",
            "credentials": [
                {"accessKey": self.access.access_key, "secretKey": self.access.secret_key}
            ],
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        }
