"""Counters of S3 traffic, for /metrics."""

from __future__ import annotations

from prometheus_client import Counter

BYTES = Counter(
    "distill_s3_bytes",
    "Payload bytes moved to or from the object store.",
    ["operation"],
)
"""Exposed as `distill_s3_bytes_total`; operation is put, get or upload."""

ERRORS = Counter(
    "distill_s3_errors",
    "Failed attempts of requests to the object store, those that a retry mended included.",
    ["operation", "code"],
)
"""Exposed as `distill_s3_errors_total`; operation is S3's name, code S3's or the exception's."""
