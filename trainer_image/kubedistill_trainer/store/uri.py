"""`s3://bucket/prefix`, parsed and checked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from kubedistill_trainer.store.errors import InvalidStoreUri

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_LONGEST_KEY_BYTES = 1024  # S3's own limit


@dataclass(frozen=True)
class S3Uri:
    """A bucket and a prefix without leading or trailing slash (empty: the whole bucket)."""

    bucket: str
    prefix: str

    @classmethod
    def parse(cls, text: str) -> S3Uri:
        """Read `s3://bucket[/prefix[/]]`.

        Raises InvalidStoreUri when it is something else, or when a part of the prefix is empty,
        `.` or `..` (stores built on file systems fold those, so two keys could be one object).
        """
        scheme, separator, rest = text.partition("://")
        if scheme != "s3" or not separator:
            raise InvalidStoreUri("parse", text or "''", "not an S3 URI; write s3://bucket/prefix")
        bucket, _, prefix = rest.partition("/")
        if not _BUCKET.fullmatch(bucket):
            raise InvalidStoreUri(
                "parse",
                text,
                f"{bucket!r} is no bucket name; it takes 3 to 63 of a-z, 0-9, '-' and '.'",
            )
        return cls(bucket, check_key(prefix.removesuffix("/"), text) if prefix.strip("/") else "")

    def join(self, key: str) -> S3Uri:
        """This prefix with `key` below it."""
        return S3Uri(self.bucket, f"{self.prefix}/{key}" if self.prefix else key)

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}" if self.prefix else f"s3://{self.bucket}"


def check_key(key: str, whole: str | None = None) -> str:
    """Return `key` when every store keeps it as it is written; InvalidStoreUri otherwise."""
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise InvalidStoreUri(
            "parse", whole or key, "a part of the key is empty, '.' or '..'; write plain names"
        )
    if not key.isprintable() or len(key.encode()) > _LONGEST_KEY_BYTES:
        raise InvalidStoreUri(
            "parse", whole or key, f"a key is printable and at most {_LONGEST_KEY_BYTES} bytes"
        )
    return key


def check_endpoint(endpoint: str) -> str:
    """Return `endpoint` when it is empty (AWS) or an http(s) address; InvalidStoreUri otherwise."""
    if not endpoint:
        return endpoint
    try:
        parts = urlsplit(endpoint)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        usable = False
    if not usable:
        raise InvalidStoreUri(
            "connect", endpoint, "not an endpoint; write http://host:port or https://host[:port]"
        )
    return endpoint
