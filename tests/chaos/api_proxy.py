"""The proxy before the API server: plain HTTP with a bearer token on one side, TLS on the other.

A watch is taken apart into its events, and a script of its own decides about each.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from signal import Signals
from urllib.parse import urlsplit

from chaos import wire
from chaos.faults import Call, Entry, Fault, Kind
from chaos.proxy import Connection, Proxy

WATCH_BUFFER = 1 << 24


class Event(StrEnum):
    """What becomes of one event of a watch."""

    PASS = "pass"
    DROP = "dropped"
    DOUBLE = "doubled"
    LATE = "late"
    """Held for a while, and all that follow it with it."""
    SWAP = "reordered"
    """After the next one."""
    CUT = "cut"
    """The watch ends in the middle of it."""
    STALL = "stalled"
    """Half of it, then silence for longer than a client waits, then the rest."""
    GONE = "410 Gone"
    """In its place comes the error that tells the client to list anew; then the watch ends."""


@dataclass(frozen=True)
class Seen:
    """An event that comes by."""

    client: str
    number: int
    """Among all events of the client, from 0."""
    path: str
    kind: str
    """ADDED, MODIFIED, DELETED, BOOKMARK or ERROR."""
    name: str = ""
    """Of the object that it tells of."""


WatchScript = Callable[[Seen], Event]
_GONE = {
    "type": "ERROR",
    "object": {
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 410,
        "reason": "Expired", "message": "too old resource version: a fault of the test",
    },
}  # fmt: skip
_REASONS = {
    409: "Conflict", 410: "Expired", 429: "TooManyRequests", 500: "InternalError",
    503: "ServiceUnavailable", 504: "Timeout",
}  # fmt: skip
_LATE_SECONDS, _STALL_SECONDS = 1.5, 25.0
_AT_FIRST_EVENT = {
    Kind.TRUNCATE: Event.CUT, Kind.RESET_AFTER: Event.CUT, Kind.STALL: Event.STALL,
}  # fmt: skip
"""What a fault of an answer is to a watch, whose answer does not end."""
_OF_WATCHES = {Kind.PASS, Kind.DELAY, Kind.SKEW, *_AT_FIRST_EVENT}


def is_write(call: Call) -> bool:
    """A call that changes an object; the Lease is not one."""
    return call.method in ("POST", "PUT", "PATCH", "DELETE") and "/leases" not in call.path


class ApiProxy(Proxy):
    """Use it as a context manager."""

    def __init__(self, server: str, authority: Path) -> None:
        """`server` is the API server's URL, `authority` the file of its CA."""
        super().__init__()
        parts = urlsplit(server)
        self._upstream = (parts.hostname or "127.0.0.1", parts.port or 443)
        self._tls = ssl.create_default_context(cafile=str(authority))
        self.watches: dict[str, WatchScript] = {}
        """By client; events of others pass."""
        self.events: list[tuple[Seen, Event]] = []
        """What met a fault."""
        self._event_counts: dict[str, int] = {}
        self._held: dict[str, asyncio.Event] = {}

    def wake(self, client: str) -> None:
        """What a stopped client had asked goes on, as it does when the client wakes."""
        self._loop.call_soon_threadsafe(lambda: self._held.pop(client).set())

    async def _strike(self, call: Call, fault: Fault) -> None:
        """Clients here are of several worlds: each one's stop is its own."""
        self.signaller(call.client, fault.signal)
        if fault.signal == Signals.SIGSTOP:
            self._held[call.client] = asyncio.Event()
            await self._held[call.client].wait()

    async def _connect(self) -> Connection:
        return await asyncio.open_connection(*self._upstream, ssl=self._tls, limit=WATCH_BUFFER)

    def _error(self, call: Call, fault: Fault) -> wire.Message:
        status = {
            "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": fault.status,
            "reason": _REASONS.get(fault.status, ""), "message": "a fault of the test",
        }  # fmt: skip
        reply = wire.answer(fault.status, json.dumps(status).encode(), "application/json")
        return reply.with_header("Retry-After", "1") if fault.status == 429 else reply

    async def _serve(
        self, call: Call, fault: Fault, request: wire.Message, client: Connection
    ) -> bool:
        # What is compressed cannot be taken apart.
        request = request.with_header("Accept-Encoding", "identity")
        if "watch=" not in call.target or fault.kind not in _OF_WATCHES:
            return await super()._serve(call, fault, request, client)
        self.log.append(Entry(call, fault))
        reader, writer = client
        watch = asyncio.create_task(self._watch(call, fault, request, writer))
        # A client that is killed says nothing on its watches: its end must end them at the server.
        gone = asyncio.create_task(reader.read(1))
        try:
            await asyncio.wait((watch, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            watch.cancel()
            gone.cancel()
            await asyncio.gather(watch, gone, return_exceptions=True)
        return False

    async def _watch(
        self, call: Call, fault: Fault, request: wire.Message, writer: asyncio.StreamWriter
    ) -> None:
        if fault.kind == Kind.DELAY:
            await asyncio.sleep(fault.seconds)
        reader, upstream = await self._connect()
        try:
            upstream.write(request.raw)
            head = await wire.read_answer_head(reader)
            if fault.kind == Kind.SKEW:
                head = self._skewed(head, fault.seconds)
            writer.write(head.head)
            if head.status != 200:
                writer.write(await wire.read_body(reader, head, of_answer=True))
                await writer.drain()
                return
            await writer.drain()
            first = _AT_FIRST_EVENT.get(fault.kind, Event.PASS)
            with contextlib.suppress(wire.Closed, ConnectionError):
                await self._pass_on(call, first, reader, writer)
        finally:
            upstream.close()

    async def _pass_on(
        self, call: Call, first: Event, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Every event as its script wants it, until the watch ends here or there.

        `first` is the first one's, where it is not PASS.
        """
        held = b""
        async for line in _lines(reader):
            fate, first = self._fate(call, line, first), Event.PASS
            half = len(line) // 2
            if fate == Event.CUT:
                writer.write(_chunk(line[:half]))
                break
            if fate == Event.GONE:
                writer.write(_chunk(json.dumps(_GONE).encode() + b"\n") + _chunk(b""))
                break
            if fate == Event.SWAP and not held:
                held = line
                continue
            if fate == Event.STALL:
                writer.write(_chunk(line[:half]))
                await writer.drain()
                await asyncio.sleep(_STALL_SECONDS)
                line = line[half:]  # noqa: PLW2901 - what is still to be sent of it
            if fate == Event.LATE:
                await asyncio.sleep(_LATE_SECONDS)
            if fate != Event.DROP:
                writer.write(_chunk(line) * (2 if fate == Event.DOUBLE else 1))
            if held:
                writer.write(_chunk(held))
                held = b""
            await writer.drain()
        else:
            writer.write(_chunk(b""))
        await writer.drain()

    def _fate(self, call: Call, line: bytes, first: Event) -> Event:
        number = self._event_counts.get(call.client, 0)
        self._event_counts[call.client] = number + 1
        told = json.loads(line)
        name = str((told.get("object", {}).get("metadata") or {}).get("name", ""))
        seen = Seen(call.client, number, call.path, str(told.get("type")), name)
        script = self.watches.get(call.client)
        fate = first if first != Event.PASS else script(seen) if script else Event.PASS
        if fate not in (Event.PASS, first):
            self.events.append((seen, fate))
        return fate


def _chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The lines in a chunked body, each with its end."""
    buffer = b""
    try:
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            buffer += (await reader.readexactly(size + 2))[:-2]
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                yield line + b"\n"
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise wire.Closed from error
