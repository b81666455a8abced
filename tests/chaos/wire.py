"""HTTP/1.1 as bytes: whole messages are read from a stream and kept as they came.

Nothing is parsed that need not be, so that what was signed on one side is what arrives on the other.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

_LINE_END = b"\r\n"
HEAD_LIMIT = 1 << 20
"""Bytes of a stream's buffer: a watch's events come as single lines."""


class Closed(ConnectionError):
    """The other side ended the connection; between two messages that is no fault."""


@dataclass(frozen=True)
class Message:
    """A request or an answer. `head` ends with the empty line; `body` is as it came, chunks included."""

    head: bytes
    body: bytes = b""

    @property
    def start(self) -> list[str]:
        """The three parts of the first line."""
        line = self.head.partition(_LINE_END)[0].decode("latin-1")
        parts = line.split(" ", 2)
        return parts + [""] * (3 - len(parts))

    @property
    def method(self) -> str:
        return self.start[0]

    @property
    def target(self) -> str:
        """Path and query of a request."""
        return self.start[1]

    @property
    def status(self) -> int:
        """Of an answer."""
        return int(self.start[1])

    def header(self, name: str) -> str:
        """The value of a header, or nothing."""
        wanted = name.lower().encode()
        for line in self.head.split(_LINE_END)[1:]:
            key, colon, value = line.partition(b":")
            if colon and key.strip().lower() == wanted:
                return value.strip().decode("latin-1")
        return ""

    def with_header(self, name: str, value: str) -> Message:
        """With one header put in the place of whatever it was."""
        wanted = name.lower().encode()
        first, *lines = self.head.removesuffix(2 * _LINE_END).split(_LINE_END)
        kept = [line for line in lines if line.partition(b":")[0].strip().lower() != wanted]
        new = f"{name}: {value}".encode("latin-1")
        return replace(self, head=_LINE_END.join([first, *kept, new]) + 2 * _LINE_END)

    @property
    def raw(self) -> bytes:
        return self.head + self.body


def answer(status: int, body: bytes, kind: str) -> Message:
    """An answer of our own making."""
    lines = (
        f"HTTP/1.1 {status} Fault",
        f"Content-Type: {kind}",
        f"Content-Length: {len(body)}",
        "Connection: close",
    )
    return Message("\r\n".join(lines).encode() + 2 * _LINE_END, body)


async def read_head(reader: asyncio.StreamReader) -> Message:
    """The first line and the headers. Raises Closed where there is no message any more."""
    try:
        return Message(await reader.readuntil(2 * _LINE_END))
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise Closed from error


async def read_body(reader: asyncio.StreamReader, head: Message, *, of_answer: bool) -> bytes:
    """The body that belongs to a head. Raises Closed when the connection ends within it."""
    try:
        if "chunked" in head.header("Transfer-Encoding").lower():
            return await _read_chunks(reader)
        length = head.header("Content-Length")
        if length:
            return await reader.readexactly(int(length))
        # An answer without a length goes on to the end of the connection; a request has no body.
        return await reader.read(-1) if of_answer else b""
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise Closed from error


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    whole = bytearray()
    while True:
        line = await reader.readuntil(_LINE_END)
        size = int(line.split(b";")[0], 16)
        whole += line + await reader.readexactly(size + len(_LINE_END))
        if size == 0:
            return bytes(whole)


async def read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Message:
    """A whole request; the client is told to go on where it asks first."""
    head = await read_head(reader)
    if head.header("Expect").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue" + 2 * _LINE_END)
        await writer.drain()
    return replace(head, body=await read_body(reader, head, of_answer=False))


async def read_answer_head(reader: asyncio.StreamReader) -> Message:
    """The head of the final answer: what is said in between (1xx) is passed over."""
    while True:
        head = await read_head(reader)
        if head.status >= 200:
            return head


async def read_answer(reader: asyncio.StreamReader, method: str) -> Message:
    """A whole answer to a request of `method`."""
    head = await read_answer_head(reader)
    if method == "HEAD" or head.status in (204, 304):
        return head
    return replace(head, body=await read_body(reader, head, of_answer=True))


def reset(writer: asyncio.StreamWriter) -> None:
    """End a connection as a crash does: RST, whatever was still to be sent."""
    writer.transport.abort()
