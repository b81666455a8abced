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
