"""A proxy before a server: every request has a number, and a script decides what becomes of it.

Headers go on as the client sent them: S3 works the signature out from its Host.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from signal import Signals
from types import TracebackType
from typing import Self

from chaos import wire
from chaos.faults import (
    OF_ANSWER_BODY,
    OF_REQUEST_BODY,
    PASS,
    Call,
    Entry,
    Fault,
    Kind,
    Script,
    calm,
)

Signaller = Callable[[str, Signals], None]
"""Sends a client, by its name, a signal."""
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Proxy(ABC):
    """Serves in a thread of its own, one port a client. Use it as a context manager."""

    def __init__(self) -> None:
        self.signaller: Signaller = lambda client, number: None
        self.scripts: dict[str, Script] = {}
        """Of single clients; `script` is of all others."""
        self.script: Script = calm
        self.log: list[Entry] = []
        self._counts: dict[str, int] = {}
        self._ports: dict[str, int] = {}
        self._serving: set[asyncio.Task[None]] = set()
        self._late: set[asyncio.Task[None]] = set()
        self._released = asyncio.Event()
        self.stopped = threading.Event()
        """Set when a client was given SIGSTOP, and holds a call open."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        async def end() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def endpoint(self, client: str) -> str:
        """The URL by which a client is known; made when it is first asked for."""
        if client not in self._ports:
            made = asyncio.run_coroutine_threadsafe(self._listen(client), self._loop)
            self._ports[client] = made.result(10)
        return f"http://127.0.0.1:{self._ports[client]}"

    def begin(self, script: Script) -> None:
        """Numbers begin anew, the log is empty, `script` decides."""
        self.script, self.log, self._counts = script, [], {}
        self.rearm()

    def rearm(self) -> None:
        """From now on a stopped client is held again."""
        self.stopped.clear()
        self._loop.call_soon_threadsafe(self._released.clear)

    def release(self) -> None:
        """What a stopped client had asked goes on, as it does when the client wakes."""
        self._loop.call_soon_threadsafe(self._released.set)

    def settle(self) -> None:
        """Wait for all requests that are applied late."""

        async def landed() -> None:
            await asyncio.gather(*self._late)

        asyncio.run_coroutine_threadsafe(landed(), self._loop).result(60)

    def count(self, client: str) -> int:
        """Calls of a client so far."""
        return self._counts.get(client, 0)

    async def _listen(self, client: str) -> int:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            # The loop itself keeps no task alive.
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)
            with contextlib.suppress(wire.Closed, ConnectionError, asyncio.CancelledError):
                while await self._one(client, reader, writer):
                    pass
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=wire.HEAD_LIMIT)
        port: int = server.sockets[0].getsockname()[1]
        return port

    async def _one(
        self, client: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """One request and its answer; whether the connection can take another."""
        request = await wire.read_request(reader, writer)
        number = self._counts.get(client, 0)
        self._counts[client] = number + 1
        conditional = bool(request.header("If-None-Match"))
        call = Call(number, client, request.method, request.target, conditional, len(request.body))
        fault = self.scripts.get(client, self.script)(call)
        return await self._serve(call, fault, request, (reader, writer))

    @abstractmethod
    async def _connect(self) -> Connection:
        """A new connection to the server."""

    @abstractmethod
    def _error(self, call: Call, fault: Fault) -> wire.Message:
        """An error in the server's own form."""

    async def _serve(
        self, call: Call, fault: Fault, request: wire.Message, client: Connection
    ) -> bool:
        """Meet one request; whether the connection can take another."""
        _, writer = client
        if fault.kind in OF_REQUEST_BODY and not request.body:
            fault = PASS
        index, log = len(self.log), self.log
        log.append(Entry(call, fault))
        reply = await self._meet(call, fault, request)
        if reply is None:
            wire.reset(writer)
            return False
        if fault.only_success and reply.status >= 400:
            fault = PASS
        if fault.kind in OF_ANSWER_BODY and not reply.body:
            fault = PASS
        log[index] = Entry(call, fault, reply.status)
        goes_on = await _send(reply, fault, writer)
        return goes_on and reply.header("Connection").lower() != "close"

    async def _meet(self, call: Call, fault: Fault, request: wire.Message) -> wire.Message | None:
        """The answer, whole; None where the client gets none."""
        if fault.kind == Kind.ANSWER:
            return self._error(call, fault)
        if fault.kind == Kind.RESET_BEFORE:
            return None
        if fault.kind == Kind.LATE:
            task = self._loop.create_task(self._apply_late(request, fault.seconds))
            self._late.add(task)
            task.add_done_callback(self._late.discard)
            return None
        if fault.kind == Kind.DELAY:
            await asyncio.sleep(fault.seconds)
        if fault.kind == Kind.SIGNAL_BEFORE:
            await self._strike(call, fault)
            if fault.signal == Signals.SIGKILL:
                return None
        if fault.kind == Kind.TRUNCATE_REQUEST:
            await self._send_half(request)
            return None
        if fault.kind == Kind.GARBLE_REQUEST:
            request = replace(request, body=_garbled(request.body))
        reply = await self._forward(request)
        if fault.kind == Kind.SIGNAL_AFTER and not (fault.only_success and reply.status >= 400):
            await self._strike(call, fault)
            if fault.signal == Signals.SIGKILL:
                return None
        if fault.kind == Kind.RESET_AFTER:
            return None
        if fault.kind == Kind.GARBLE and reply.body:
            return replace(reply, body=_garbled(reply.body))
        if fault.kind == Kind.SKEW:
            return self._skewed(reply, fault.seconds)
        return reply

    def _skewed(self, reply: wire.Message, seconds: float) -> wire.Message:
        """An answer of a server whose clock is ahead by so much."""
        moved = datetime.now(UTC) + timedelta(seconds=seconds)
        return reply.with_header("Date", format_datetime(moved, usegmt=True))

    async def _apply_late(self, request: wire.Message, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self._forward(request)

    async def _strike(self, call: Call, fault: Fault) -> None:
        self.signaller(call.client, fault.signal)
        if fault.signal == Signals.SIGSTOP:
            self.stopped.set()
            await self._released.wait()

    async def _forward(self, request: wire.Message) -> wire.Message:
        reader, writer = await self._connect()
        try:
            writer.write(request.raw)
            await writer.drain()
            return await wire.read_answer(reader, request.method)
        finally:
            writer.close()

    async def _send_half(self, request: wire.Message) -> None:
        _, writer = await self._connect()
        writer.write(request.head + request.body[: len(request.body) // 2])
        await writer.drain()
        writer.close()
        await writer.wait_closed()


async def _send(reply: wire.Message, fault: Fault, writer: asyncio.StreamWriter) -> bool:
    """Send an answer, or what the fault leaves of it; whether the connection is still whole."""
    half = len(reply.body) // 2
    if fault.kind == Kind.TRUNCATE:
        writer.write(reply.head + reply.body[:half])
        await writer.drain()
        return False
    if fault.kind == Kind.STALL:
        writer.write(reply.head + reply.body[:half] if reply.body else b"")
        await writer.drain()
        await asyncio.sleep(fault.seconds)
        writer.write(reply.body[half:] if reply.body else reply.head)
    else:
        writer.write(reply.raw)
    await writer.drain()
    return True


def _garbled(body: bytes) -> bytes:
    """With one bit in the middle turned over."""
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
