"""What can go wrong with the store, in words for the person who has to mend it."""

from __future__ import annotations


class StoreError(Exception):
    """A request to the store failed; the base of every error of this package.

    `operation` is what was tried (`put`, `get`, …) and `uri` the object or prefix it was tried on.
    The text names the object, what was found and what to do.
    """

    def __init__(self, operation: str, uri: str, problem: str) -> None:
        super().__init__(operation, uri, problem)
        self.operation = operation
        self.uri = uri
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.operation} {self.uri}: {self.problem}"


class InvalidStoreUri(StoreError, ValueError):
    """The text is not an `s3://bucket/prefix`, or the endpoint is not an http(s) address."""


class NoSuchBucket(StoreError):
    """The store answers and the bucket is not there."""


class AccessDenied(StoreError):
    """The store knows who asks, or does not, and refuses."""


class CredentialsMissing(StoreError):
    """No access key was found where boto3 looks for one."""


class NotFound(StoreError):
    """The object is not there."""


class PreconditionFailed(StoreError):
    """A write that must create its key found it taken.

    The taker may be the writer itself: a first attempt can land although its answer is lost.
    """


class StoreUnavailable(StoreError):
    """No usable answer after bounded retries: connection, time-out, throttling or a 5xx."""


class UnsupportedStore(StoreError):
    """The store does not honour `If-None-Match`, so two writers could both win one slot."""
