"""botocore's exceptions and answers → this package's errors; and which answers to retry."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from boto3.exceptions import Boto3Error, RetriesExceededError
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
)
from s3transfer.exceptions import RetriesExceededError as TransferRetriesExceededError
from urllib3.exceptions import HTTPError as Urllib3Error

from kubedistill_trainer.store import errors
from kubedistill_trainer.store.metrics import ERRORS

BROKEN_BODY = (HTTPClientError, IncompleteReadError, Urllib3Error, OSError)
"""What reading an answer's body raises when the connection dies under it."""

_DENIED = {
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "403",
    "401",
}
_THROTTLED = {"SlowDown", "TooManyRequests", "RequestLimitExceeded", "RequestTimeout", "Throttling"}
_CONFLICT = "ConditionalRequestConflict"
# Answers that S3 says to repeat and botocore's retry modes do not: a conditional write that met
# another one, throttling as some compatible stores put it, a body garbled on its way.
_ALSO_RETRIED = {_CONFLICT, "TooManyRequests", "BadDigest", "XAmzContentSHA256Mismatch"}
# Its own generator: the global one belongs to training, whose draws must not depend on retries.
jitter = random.Random()  # noqa: S311
_ANSWERS = {"404", "NoSuchKey", "412", "PreconditionFailed", "304"}  # outcomes, not failures


def retry_more(
    *, response: Any, attempts: int, limit: int, **_event: Any
) -> float | None:  # the shape of botocore's event
    """A `needs-retry` hook: seconds to wait, or None to leave the decision to botocore."""
    if response is None or attempts >= limit:
        return None
    http, parsed = response
    code = parsed.get("Error", {}).get("Code", "")
    if code in _ALSO_RETRIED or http.status_code == 429:
        return float(jitter.uniform(0.05, 0.2) * 2**attempts)
    return None


def count_failures(
    *, event_name: str, parsed_response: Any, exception: Exception | None, **_event: Any
) -> None:
    """A `response-received` hook: counts every failed attempt."""
    operation = event_name.rpartition(".")[2]
    if exception is not None:
        ERRORS.labels(operation, type(exception).__name__).inc()
        return
    code = (parsed_response or {}).get("Error", {}).get("Code")
    if code and code not in _ANSWERS:
        ERRORS.labels(operation, code).inc()


@dataclass(frozen=True)
class Server:
    """Who is asked, and with which keys: for messages, so never the keys themselves."""

    endpoint: str = ""
    """Empty for AWS."""
    secret: str = ""
    """Name of the Secret with the keys; empty where none is known."""

    @property
    def name(self) -> str:
        return self.endpoint or "AWS"

    @property
    def keys(self) -> str:
        """Where a person finds the keys."""
        if self.secret:
            return f"the keys in Secret {self.secret!r} (storage.secretRef)"
        return "the keys in storage.secretRef"


@contextmanager
def translated(operation: str, uri: str, server: Server) -> Iterator[None]:
    """Raise this package's error for whatever boto3 raises inside the block."""
    try:
        yield
    except ClientError as error:
        raise _of_answer(error, operation, uri, server) from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise errors.CredentialsMissing(
            operation,
            uri,
            "no S3 credentials; set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY (storage.secretRef)",
        ) from error
    except (
        BotoCoreError,
        Boto3Error,
        RetriesExceededError,
        TransferRetriesExceededError,
        Urllib3Error,
        ConnectionError,
        TimeoutError,
    ) as error:
        raise errors.StoreUnavailable(
            operation,
            uri,
            f"no usable answer from {server.name} ({_first_cause(error)}); "
            "check storage.endpoint, the network and the store's health",
        ) from error


def _first_cause(error: BaseException) -> str:
    """The innermost cause in one line; boto3 and s3transfer wrap it up to three times."""
    if isinstance(error, TransferRetriesExceededError | RetriesExceededError):
        inner = getattr(error, "last_exception", None)
        if isinstance(inner, BaseException):
            return _first_cause(inner)
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _of_answer(error: ClientError, operation: str, uri: str, server: Server) -> errors.StoreError:
    """The error for an answer that S3 did give."""
    endpoint = server.name
    code = error.response.get("Error", {}).get("Code", "")
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    said = error.response.get("Error", {}).get("Message", "") or "no message"
    if code == "NoSuchBucket":
        bucket = uri.removeprefix("s3://").partition("/")[0]
        return errors.NoSuchBucket(
            operation,
            uri,
            f"bucket {bucket!r} does not exist at {endpoint}; create it or correct storage.uri",
        )
    if status == 412 or code in ("PreconditionFailed", "412"):
        return errors.PreconditionFailed(operation, uri, "the key is taken already")
    if code == "NoSuchUpload":
        return errors.NotFound(
            operation, uri, f"{endpoint} does not know this multipart upload: it has been ended"
        )
    if code in ("NoSuchKey", "404") or status == 404:
        return errors.NotFound(operation, uri, f"no such object at {endpoint}")
    if code == "RequestTimeTooSkewed":
        return errors.AccessDenied(
            operation,
            uri,
            f"the clock of this machine is too far from that of {endpoint} ({code}: {said}); set the "
            "node's clock by NTP",
        )
    if code in _DENIED or status in (401, 403):
        return errors.AccessDenied(
            operation,
            uri,
            f"{endpoint} refuses these credentials ({code}: {said}); check {server.keys} and that "
            f"they may {operation} here",
        )
    if code == "NotImplemented" or status == 501:
        return errors.UnsupportedStore(
            operation, uri, f"{endpoint} does not implement this request ({said})"
        )
    if status >= 500 or status == 429 or code in _THROTTLED or code == _CONFLICT:
        return errors.StoreUnavailable(
            operation,
            uri,
            f"{endpoint} kept answering {status} {code} ({said}); try again when it is healthy",
        )
    return errors.StoreError(operation, uri, f"{endpoint} answered {status} {code} ({said})")
