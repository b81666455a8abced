"""The proxy before the S3 server."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from datetime import datetime, timedelta
from email.utils import format_datetime, parsedate_to_datetime
from urllib.parse import urlsplit

from chaos import wire
from chaos.faults import Call, Fault
from chaos.proxy import Connection, Proxy

_ERROR = (
    '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>a fault of the test'
    "</Message><RequestId>0</RequestId></Error>"
)

_TIMES = re.compile(rb"<(LastModified|Initiated)>(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)")


class S3Proxy(Proxy):
    """Use it as a context manager."""

    def __init__(self, upstream: str) -> None:
        """`upstream` is the server's URL."""
        super().__init__()
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname or "127.0.0.1", parts.port or 80)

    async def _connect(self) -> Connection:
        return await asyncio.open_connection(*self._upstream, limit=wire.HEAD_LIMIT)

    def _error(self, call: Call, fault: Fault) -> wire.Message:
        body = b"" if call.method == "HEAD" else _ERROR.format(code=fault.code).encode()
        return wire.answer(fault.status, body, "application/xml")

    def _skewed(self, reply: wire.Message, seconds: float) -> wire.Message:
        """What the server says of its objects' times moves with its clock."""
        moved = super()._skewed(reply, seconds)
        if modified := reply.header("Last-Modified"):
            time = parsedate_to_datetime(modified) + timedelta(seconds=seconds)
            moved = moved.with_header("Last-Modified", format_datetime(time, usegmt=True))
        return replace(moved, body=_TIMES.sub(lambda found: _later(found, seconds), moved.body))


def _later(found: re.Match[bytes], seconds: float) -> bytes:
    """Of the same length, so that the body's length and its chunks stay right."""
    name, text = found.groups()
    time = datetime.fromisoformat(text.decode()) + timedelta(seconds=seconds)
    return b"<%s>%s" % (name, time.isoformat().encode())
