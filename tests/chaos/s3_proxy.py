"""The proxy before the S3 server."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

from chaos import wire
from chaos.faults import Call, Fault
from chaos.proxy import Connection, Proxy

_ERROR = (
    '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>a fault of the test'
    "</Message><RequestId>0</RequestId></Error>"
)


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
