"""What students and teachers say about a teacher stream, for /metrics."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

DATA_WAIT = Counter(
    "distill_data_wait_seconds",
    "Time that training waited for data, the teacher's outputs included.",
)
"""Exposed as `distill_data_wait_seconds_total`."""

STREAM_LAG = Gauge(
    "distill_stream_lag_tokens",
    "Tokens that the teacher has committed and this student has not read yet in its first pass.",
)

STREAM_HELD = Gauge(
    "distill_stream_held", "1 while this teacher waits because its byte budget is used up."
)

ENDPOINT_REQUESTS = Counter(
    "distill_endpoint_requests",
    "Requests to the teacher's server by how they ended: answered, refused (one prompt), retried, "
    "failed.",
    ["result"],
)

ENDPOINT_TOKENS = Counter(
    "distill_endpoint_tokens", "Tokens that the teacher's server counted.", ["kind"]
)
"""`kind`: prompt or answer."""

ENDPOINT_WAIT = Counter(
    "distill_endpoint_wait_seconds",
    "Time that requests waited because the teacher's server asked for it.",
)
