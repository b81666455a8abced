"""The boto3 client and transfer manager that all stores of one endpoint share."""

from __future__ import annotations

import base64
import hashlib
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import boto3
import botocore.loaders
import botocore.session
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore.config import Config
from botocore.retries import standard

from kubedistill_trainer.store.translate import Server, count_failures, jitter, retry_more

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from s3transfer.futures import TransferFuture

MIB = 1024 * 1024


@dataclass(frozen=True)
class Limits:
    """How long a request may take before it counts as failed."""

    connect_timeout_seconds: float = 5
    read_timeout_seconds: float = 60
    """The longest silence in an answer."""
    attempts: int = 5
    """Of one request, the first included."""
    deadline_floor_seconds: float = 120
    """Every transfer gets this long …"""
    slowest_bytes_per_second: float = MIB
    """… plus its size at this speed: silence is not the only way for a store to stall."""
    upload_bytes_per_second: int | None = None
    """What uploads of files and streams may take of the network; None for all of it."""
    multipart_threshold_bytes: int = 32 * MIB
    """Files and streams of this size and more go up in parts …"""
    multipart_part_bytes: int = 16 * MIB
    """… of this size: S3 takes none below 5 MiB but the last, and 10,000 at most."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ, **fields: Any) -> Limits:
        """Limits with what KUBEDISTILL_STORE_<FIELD> says, such as
        KUBEDISTILL_STORE_READ_TIMEOUT_SECONDS; `fields` as in the constructor.

        Raises ValueError for what is no positive number.
        """
        for name, convert in (
            ("connect_timeout_seconds", float),
            ("read_timeout_seconds", float),
            ("attempts", int),
            ("deadline_floor_seconds", float),
            ("multipart_threshold_bytes", int),
            ("multipart_part_bytes", int),
        ):
            variable = f"KUBEDISTILL_STORE_{name.upper()}"
            text = environment.get(variable)
            if text is None:
                continue
            try:
                fields[name] = convert(text)
            except ValueError:
                fields[name] = -1
            if not fields[name] > 0:
                raise ValueError(f"{variable}: found {text!r}; write a positive number")
        return cls(**fields)

    def deadline_seconds(self, size_bytes: int) -> float:
        """Seconds after which moving `size_bytes` is given up."""
        slowest = self.slowest_bytes_per_second
        if self.upload_bytes_per_second is not None:
            slowest = min(slowest, self.upload_bytes_per_second / 2)
        return self.deadline_floor_seconds + size_bytes / slowest


class Connection:
    """One endpoint and one set of credentials. Thread-safe."""

    def __init__(self, server: Server, region: str, limits: Limits) -> None:
        self.server = server
        self.region = region
        self.limits = limits
        self.client: S3Client = _session().client(
            "s3",
            endpoint_url=server.endpoint or None,
            region_name=region,
            config=_config(server.endpoint, limits),
        )
        events: Any = self.client.meta.events  # its stubs say that hooks return nothing
        # First, because botocore's own handler answers "no" to what it does not know.
        events.register_first("needs-retry.s3", partial(retry_more, limit=limits.attempts))
        events.register("response-received.s3", count_failures)
        for write in ("PutObject", "UploadPart"):
            events.register(f"before-call.s3.{write}", _add_md5)
        self.transfers: Any = create_transfer_manager(self.client, _transfer_config(limits))

    @contextmanager
    def transfer_within(self, size_bytes: int) -> Iterator[list[TransferFuture]]:
        """Cancel the transfers put into the yielded list once the deadline for the size is over.

        Raises TimeoutError in place of whatever a cancelled transfer raised.
        """
        futures: list[TransferFuture] = []
        seconds = self.limits.deadline_seconds(size_bytes)
        expired = threading.Event()

        def give_up() -> None:
            expired.set()
            for future in futures:
                future.cancel()

        timer = threading.Timer(seconds, give_up)
        timer.daemon = True
        timer.start()
        try:
            yield futures
        except Exception as error:
            if expired.is_set():
                raise TimeoutError(f"not done after {seconds:.0f} s") from error
            raise
        finally:
            timer.cancel()


# A second to parse the description of S3, once a process instead of once a store.
_descriptions: Any = botocore.loaders.create_loader()


def load_descriptions() -> None:
    """Parse what the first client of a process would parse; nothing is sent, no credentials asked for.

    For a process whose forks each make a client.
    """
    for kind in ("service-2", "endpoint-rule-set-1"):
        _descriptions.load_service_model("s3", kind)
    for name in ("endpoints", "partitions", "_retry", "sdk-default-configuration"):
        _descriptions.load_data(name)


class _Backoff(standard.ExponentialBackoff):
    """botocore's waits, with draws of our own: it takes them from Python's global generator, which
    belongs to training, and uploads run beside it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, random=jitter.random)


# botocore's retry handler looks the class up by this name, and takes no other.
vars(standard)["ExponentialBackoff"] = _Backoff


def _session() -> boto3.session.Session:
    """A session of its own, so that credentials are looked up anew."""
    inner = botocore.session.Session()
    inner.register_component("data_loader", _descriptions)
    return boto3.session.Session(botocore_session=inner)


def _config(endpoint: str, limits: Limits) -> Config:
    return Config(
        connect_timeout=limits.connect_timeout_seconds,
        read_timeout=limits.read_timeout_seconds,
        retries={"mode": "standard", "total_max_attempts": limits.attempts},
        max_pool_connections=32,
        s3={"addressing_style": "path" if endpoint else "auto"},
        # Compatible stores often reject the trailing checksums that boto adds by default. Without
        # them every body has its Content-MD5, and what is read back is checked against hashes of
        # our own.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )


def _add_md5(*, params: dict[str, Any], **_event: Any) -> None:
    """A `before-call` hook: the MD5 of the body, so that the store refuses one that was garbled.

    boto signs a SHA-256 of it as well, but SeaweedFS does not compare that with what arrives.
    """
    body, whole = params["body"], hashlib.md5(usedforsecurity=False)
    if isinstance(body, bytes | bytearray):
        whole.update(body)
    else:
        start = body.tell()
        while piece := body.read(MIB):
            whole.update(piece)
        body.seek(start)
    params["headers"]["Content-MD5"] = base64.b64encode(whole.digest()).decode()


def _transfer_config(limits: Limits) -> TransferConfig:
    return TransferConfig(
        max_bandwidth=limits.upload_bytes_per_second,
        multipart_threshold=limits.multipart_threshold_bytes,
        multipart_chunksize=limits.multipart_part_bytes,
        max_concurrency=max(4, min(10, os.cpu_count() or 4)),
        # "auto" may take the CRT client, which ignores endpoint_url.
        preferred_transfer_client="classic",
    )
