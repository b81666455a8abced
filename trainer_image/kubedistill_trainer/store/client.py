"""A bucket and a prefix, with the few operations that the trainer needs."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from botocore.exceptions import IncompleteReadError, InvalidRegionError

from kubedistill_trainer.store.connection import MIB, Connection, Limits
from kubedistill_trainer.store.errors import InvalidStoreUri, NotFound, StoreError
from kubedistill_trainer.store.metrics import BYTES
from kubedistill_trainer.store.translate import BROKEN_BODY, Server, translated
from kubedistill_trainer.store.uri import S3Uri, check_endpoint, check_key

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import GetObjectOutputTypeDef

__all__ = ["Limits", "ObjectInfo", "Store", "Upload"]

_PART_BYTES = 16 * MIB
_DOWNLOADS = 8  # parts of a file at once
_DELETE_BATCH = 1000  # the most that DeleteObjects takes


@dataclass(frozen=True)
class ObjectInfo:
    """What a store says of an object; `key` is relative to the Store that was asked."""

    key: str
    size_bytes: int
    etag: str
    last_modified: datetime


@dataclass(frozen=True)
class Upload:
    """A multipart upload that nobody has ended; `key` is relative to the Store that was asked."""

    key: str
    id: str
    initiated: datetime
    """By the store's clock."""


class _Counted:
    """A stream that counts what is read of it."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self.size_bytes = 0

    def read(self, size: int = -1) -> bytes:
        """As of a file."""
        data: bytes = self._source.read(size)
        self.size_bytes += len(data)
        return data

    def readable(self) -> bool:
        return True


class Store:
    """One bucket and prefix. Thread-safe; children share the connection.

    Keys are relative to the prefix and hold no empty, `.` or `..` part. Credentials come from
    boto3's chain (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, …). Every method may raise the
    errors of `kubedistill_trainer.store.errors`; each request ends within `limits`.
    """

    def __init__(
        self,
        uri: str,
        *,
        endpoint: str = "",
        region: str = "us-east-1",
        limits: Limits | None = None,
        secret: str = "",
    ) -> None:
        """`uri` is s3://bucket/prefix; `endpoint` is empty for AWS. Nothing is sent yet.

        `secret` names the Secret that the keys come from, for messages; empty where none is known.
        """
        self._at = S3Uri.parse(uri)
        server = Server(check_endpoint(endpoint), secret)
        try:
            self._connection = Connection(server, region, limits or Limits())
        except InvalidRegionError as error:
            told = "not a region; write one such as us-east-1"
            raise InvalidStoreUri("connect", repr(region), told) from error
        except ValueError as error:  # botocore asks more of a host's name than we do
            raise InvalidStoreUri("connect", endpoint, str(error)) from error

    @property
    def uri(self) -> str:
        """s3://bucket/prefix, without a trailing slash."""
        return str(self._at)

    @property
    def bucket(self) -> str:
        return self._at.bucket

    @property
    def prefix(self) -> str:
        """Without a leading or trailing slash; empty for the whole bucket."""
        return self._at.prefix

    @property
    def endpoint(self) -> str:
        """Empty for AWS."""
        return self._connection.server.endpoint

    @property
    def limits(self) -> Limits:
        return self._connection.limits

    def __repr__(self) -> str:
        return f"Store({self.uri!r}, endpoint={self.endpoint!r})"

    def child(self, suffix: str) -> Store:
        """The store at `suffix` below this one."""
        child = Store.__new__(Store)
        child._at = self._at.join(check_key(suffix.strip("/")))
        child._connection = self._connection
        return child

    def uri_of(self, key: str) -> str:
        """The s3:// address of a key."""
        return str(self._at.join(key))

    def get(self, key: str) -> bytes:
        """The whole object. Raises NotFound."""
        return self._fetch(key, None)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`, fewer where the object ends. Raises NotFound."""
        if length <= 0:
            return b""
        return self._fetch(key, f"bytes={start}-{start + length - 1}")

    def put(self, key: str, data: bytes, *, only_if_absent: bool = False) -> None:
        """Write a whole object in one request (at most 5 GiB).

        With `only_if_absent` raises PreconditionFailed when the key exists; the object there may
        be the caller's own, written by an attempt whose answer was lost.
        """
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if only_if_absent else {}
        with translated("put", self.uri_of(key), self._connection.server):
            self._connection.client.put_object(
                Bucket=self.bucket, Key=self._full(key), Body=data, **condition
            )
        BYTES.labels("put").inc(len(data))

    def head(self, key: str) -> ObjectInfo | None:
        """Size and time of an object, or None. A missing bucket also gives None (S3 says 404)."""
        try:
            with translated("head", self.uri_of(key), self._connection.server):
                answer = self._connection.client.head_object(
                    Bucket=self.bucket, Key=self._full(key)
                )
        except NotFound:
            return None
        return ObjectInfo(
            key, answer["ContentLength"], answer["ETag"].strip('"'), answer["LastModified"]
        )

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key starts with `prefix`, sorted by key."""
        whole = f"{self.prefix}/" if self.prefix else ""
        found: list[ObjectInfo] = []
        with translated("list", self.uri_of(prefix), self._connection.server):
            pages = self._connection.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=whole + prefix
            )
            for page in pages:
                found.extend(
                    ObjectInfo(
                        item["Key"].removeprefix(whole),
                        item["Size"],
                        item["ETag"].strip('"'),
                        item["LastModified"],
                    )
                    for item in page.get("Contents", [])
                )
        # Stores on file systems list folder by folder, which is not the order of the keys.
        return iter(sorted(found, key=lambda info: info.key))

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; one that is not there is no error.

        Keys may be as odd as a list gives them: whatever is there can be deleted.
        """
        remaining = iter(keys)
        while batch := _list_of(islice(remaining, _DELETE_BATCH)):
            with translated("delete", self.uri_of(batch[0]), self._connection.server):
                answer = self._connection.client.delete_objects(
                    Bucket=self.bucket,
                    Delete={
                        "Objects": [{"Key": self._at.join(key).prefix} for key in batch],
                        "Quiet": True,
                    },
                )
            for failure in answer.get("Errors", []):
                raise StoreError(
                    "delete",
                    f"s3://{self.bucket}/{failure.get('Key', '?')}",
                    f"refused ({failure.get('Code')}: {failure.get('Message')}); "
                    f"check that {self._connection.server.keys} may delete here",
                )

    def uploads(self, prefix: str = "") -> tuple[Upload, ...]:
        """Unfinished multipart uploads of keys that start with `prefix`; their parts cost money."""
        whole = f"{self.prefix}/" if self.prefix else ""
        with translated("list uploads", self.uri_of(prefix), self._connection.server):
            pages = self._connection.client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self.bucket, Prefix=whole + prefix
            )
            return tuple(
                Upload(found["Key"].removeprefix(whole), found["UploadId"], found["Initiated"])
                for page in pages
                for found in page.get("Uploads", [])
            )

    def abort_upload(self, upload: Upload) -> None:
        """End a multipart upload and free its parts; one that is over already is no error."""
        with (
            suppress(NotFound),
            translated("abort", self.uri_of(upload.key), self._connection.server),
        ):
            self._connection.client.abort_multipart_upload(
                Bucket=self.bucket, Key=self._full(upload.key), UploadId=upload.id
            )

    def abort_older_uploads(self, prefix: str, age_seconds: float) -> int:
        """Abort multipart uploads under `prefix` that began so long ago, by the *store's* clock.

        Returns their number.
        """
        whole = f"{self.prefix}/" if self.prefix else ""
        with translated("list uploads", self.uri_of(prefix), self._connection.server):
            answer = self._connection.client.list_multipart_uploads(
                Bucket=self.bucket, Prefix=whole + prefix, MaxUploads=1
            )
        now = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        if now is None or not answer.get("Uploads"):
            return 0
        return self.abort_uploads(
            prefix, parsedate_to_datetime(now) - timedelta(seconds=age_seconds)
        )

    def abort_uploads(self, prefix: str, started_before: datetime) -> int:
        """Abort multipart uploads under `prefix` that began before a time of the *store's* clock.

        Returns their number.
        """
        stale = [found for found in self.uploads(prefix) if found.initiated < started_before]
        for upload in stale:
            self.abort_upload(upload)
        return len(stale)

    def upload_file(self, key: str, path: Path) -> None:
        """Write a file, in parts when it is big. Raises OSError when the file cannot be read."""
        self.upload_stream(key, str(path), path.stat().st_size)

    def upload_stream(self, key: str, source: Any, size_bytes: int) -> None:
        """Write what `source.read(size)` gives, or the file of that name, in parts when it is much:
        bounded memory.

        `size_bytes` is about what it gives, for the deadline. Raises what `source.read` raises, and
        NotFound where somebody else has ended the upload.
        """
        began = time.monotonic()
        counted = source if isinstance(source, str) else _Counted(source)
        try:
            with (
                translated("upload", self.uri_of(key), self._connection.server),
                self._connection.transfer_within(size_bytes) as futures,
            ):
                upload = self._connection.transfers.upload
                futures.append(upload(counted, self.bucket, self._full(key)))
                futures[0].result()
        except NotFound:
            # The answer to its completion was lost, and the store had forgotten it when asked again;
            # or it was aborted.
            whole = counted.size_bytes if isinstance(counted, _Counted) else size_bytes
            if not self._landed(key, whole, time.monotonic() - began):
                raise
        BYTES.labels("upload").inc(size_bytes)

    def _landed(self, key: str, size_bytes: int, seconds: float) -> bool:
        """Whether an object of that size was written in the last `seconds`, by the store's clock."""
        with suppress(NotFound), translated("head", self.uri_of(key), self._connection.server):
            found = self._connection.client.head_object(Bucket=self.bucket, Key=self._full(key))
            now = parsedate_to_datetime(found["ResponseMetadata"]["HTTPHeaders"]["date"])
            # It tells whole seconds.
            since = now - timedelta(seconds=seconds + 1)
            return found["ContentLength"] == size_bytes and found["LastModified"] >= since
        return False

    def download_file(self, key: str, path: Path) -> None:
        """Write an object to `path`, which appears only when it is whole. Raises NotFound."""
        info = self.head(key)
        if info is None:
            raise NotFound("download", self.uri_of(key), "no such object")
        # Not by the transfer manager: a store that drips holds it for as long as it likes.
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        try:
            with partial.open("wb") as file, ThreadPoolExecutor(_DOWNLOADS) as pool:
                parts = [
                    pool.submit(self._copy_part, key, start, file.fileno())
                    for start in range(0, info.size_bytes, _PART_BYTES)
                ]
                try:
                    for part in parts:
                        part.result()
                finally:
                    pool.shutdown(wait=False, cancel_futures=True)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _copy_part(self, key: str, start: int, descriptor: int) -> None:
        data = self.get_range(key, start, _PART_BYTES)
        while data:
            written = os.pwrite(descriptor, data, start)
            data, start = data[written:], start + written

    def _full(self, key: str) -> str:
        return self._at.join(check_key(key)).prefix

    def _fetch(self, key: str, byte_range: str | None) -> bytes:
        """GET, body included. botocore retries the request only, so a broken body is ours."""
        span: dict[str, Any] = {"Range": byte_range} if byte_range else {}
        with translated("get", self.uri_of(key), self._connection.server):
            for attempt in range(1, self.limits.attempts + 1):
                answer = self._connection.client.get_object(
                    Bucket=self.bucket, Key=self._full(key), **span
                )
                try:
                    data = self._read(answer)
                    break
                except BROKEN_BODY as error:
                    if attempt == self.limits.attempts or isinstance(error, TimeoutError):
                        raise
        BYTES.labels("get").inc(len(data))
        return data

    def _read(self, answer: GetObjectOutputTypeDef) -> bytes:
        size_bytes = answer["ContentLength"]
        deadline = time.monotonic() + self.limits.deadline_seconds(size_bytes)
        # The body's public read waits for all it was asked for, byte by byte if need be. read1
        # returns what is there, so that a store that drips meets the deadline.
        body: Any = answer["Body"]
        raw, pieces, there = body._raw_stream, list[bytes](), 0
        while there < size_bytes:
            piece = raw.read1(MIB)
            if not piece:
                raise IncompleteReadError(actual_bytes=there, expected_bytes=size_bytes)
            pieces.append(piece)
            there += len(piece)
            if time.monotonic() > deadline:
                raw.close()
                raise TimeoutError(f"{there} of {size_bytes} bytes by the deadline")
        raw.release_conn()
        return b"".join(pieces)


def _list_of(keys: Iterable[str]) -> list[str]:
    """`list`, whose name the method of Store takes."""
    return list(keys)
