"""What can go wrong with one request, and who decides that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from signal import Signals


class Kind(StrEnum):
    """How a request meets its fault."""

    PASS = "pass"
    ANSWER = "answer"
    """An error of the server's, and the request never got there."""
    RESET_BEFORE = "reset before"
    """The connection is reset, and the request never got there."""
    RESET_AFTER = "lost answer"
    """The request is applied, and its answer is lost."""
    TRUNCATE = "truncated answer"
    """Half of the answer's body, and then the end of the connection."""
    GARBLE = "garbled answer"
    """One bit of the answer's body is another."""
    STALL = "stalled answer"
    """Half of the answer's body, then silence for a while, then the rest."""
    TRUNCATE_REQUEST = "truncated request"
    """Half of the request's body goes on, and then the end of the connection."""
    GARBLE_REQUEST = "garbled request"
    """One bit of the request's body is another."""
    DELAY = "delay"
    """The request is held for a while, and then goes on."""
    SKEW = "clock skew"
    """The server's clock is another: the times in headers and lists are moved."""
    LATE = "late"
    """The connection is reset at once, and the request is applied some time after that."""
    SIGNAL_BEFORE = "signal before"
    """The client gets a signal, and the request never got there unless the client goes on."""
    SIGNAL_AFTER = "signal after"
    """The request is applied, and the client gets a signal before the answer."""


OF_REQUEST_BODY = {Kind.TRUNCATE_REQUEST, Kind.GARBLE_REQUEST}
"""What can be done only to a request that has a body …"""
OF_ANSWER_BODY = {Kind.TRUNCATE, Kind.GARBLE}
"""… and only to an answer that has one."""


@dataclass(frozen=True)
class Fault:
    """One fault. `seconds` is of STALL, DELAY, LATE and SKEW, `status` and `code` of ANSWER."""

    kind: Kind = Kind.PASS
    status: int = 0
    code: str = ""
    seconds: float = 0.0
    signal: Signals = Signals.SIGKILL
    only_success: bool = False
    """Of SIGNAL_AFTER: only where the server did what it was asked."""

    def __str__(self) -> str:
        told = {
            Kind.ANSWER: f"{self.status} {self.code}".strip(),
            Kind.SIGNAL_BEFORE: f"{self.signal.name} before",
            Kind.SIGNAL_AFTER: f"{self.signal.name} after",
        }.get(self.kind, self.kind.value)
        return f"{told} {self.seconds:g} s" if self.seconds else told


PASS = Fault()


@dataclass(frozen=True)
class Call:
    """A request that came to a proxy, before it is decided about."""

    number: int
    """Among the calls of its client, from 0."""
    client: str
    """Who called: the name of the port that it came by."""
    method: str
    target: str
    """Path and query."""
    conditional: bool = False
    """Whether it has an If-None-Match."""
    body_bytes: int = 0

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]


@dataclass(frozen=True)
class Entry:
    """A line of a proxy's log."""

    call: Call
    fault: Fault
    """What it met: nothing where there was no body for the fault to break."""
    status: int = 0
    """What the server answered; 0 where it was not asked or its answer did not come."""

    def __str__(self) -> str:
        call = self.call
        return f"{call.client} {call.number} {call.method} {call.target} {self.fault} {self.status}"


Script = Callable[[Call], Fault]
"""Decides about each call. It is asked in the order in which calls come."""


def calm(call: Call) -> Fault:
    """No fault at all."""
    return PASS


class At:
    """One fault, at one call of one client; afterwards `met` is that call."""

    def __init__(self, client: str, number: int, fault: Fault) -> None:
        self._client = client
        self._number = number
        self._fault = fault
        self.met: Call | None = None

    def __call__(self, call: Call) -> Fault:
        if (call.client, call.number) != (self._client, self._number):
            return PASS
        self.met = call
        return self._fault
