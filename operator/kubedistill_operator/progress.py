"""Asks a pod's exporter for /progress, at most once a poll interval."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

import aiohttp
from kubedistill_api.names import EXPORTER_PORT
from kubedistill_api.runspec import ProgressReport

from kubedistill_operator.plan.draft import Contact, Unanswered
from kubedistill_operator.plan.finite import finite

_MAX_BYTES = 1_000_000

Target = tuple[str, str, str]
"""Namespace and name of the job, and the role that is asked."""


def contact_of(report: ProgressReport, last: Contact | None, now: datetime) -> Contact:
    """An answer that came now, after another one of the same pod."""
    if last is None or _step(last.report) != _step(report):
        return Contact(report, now, now, moved=last is not None)
    return Contact(report, now, last.stepped_at, last.moved)


def _step(report: ProgressReport) -> tuple[int, int, float | None]:
    return report.attempt, report.step, report.last_step_time


@dataclass
class _Known:
    pod: str
    address: str
    since: datetime
    """When the pod was first asked."""
    asked_at: float = float("-inf")
    contact: Contact | None = None


class Poller:
    """The latest answers, by job and role."""

    def __init__(
        self, interval_seconds: float, timeout_seconds: float, now: Callable[[], datetime]
    ) -> None:
        """`now` is the time by which plans go."""
        self._interval = interval_seconds
        self._now = now
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        self._known: dict[Target, _Known] = {}
        self._session: aiohttp.ClientSession | None = None

    async def ask(self, target: Target, pod: str, address: str) -> Contact | None:
        """The newest answer of that pod; asks only when the last question is old enough."""
        known = self._known.get(target)
        if known is None or (known.pod, known.address) != (pod, address):
            known = self._known[target] = _Known(pod, address, self._now())
        # A tenth less: a pass that was asked for in one interval must not find it not yet over.
        if time.monotonic() - known.asked_at >= self._interval * 0.9:
            known.asked_at = time.monotonic()
            report = await self._fetch(address)
            if report is not None:
                known.contact = contact_of(report, known.contact, self._now())
        return known.contact

    def last(self, target: Target) -> Contact | None:
        """The last answer, without asking."""
        known = self._known.get(target)
        return known.contact if known else None

    def unanswered(self, target: Target) -> Unanswered | None:
        """The pod that was asked last, as long as it has never answered."""
        known = self._known.get(target)
        return Unanswered(known.pod, known.since) if known and known.contact is None else None

    def forget(self, namespace: str, name: str) -> None:
        for target in [t for t in self._known if t[:2] == (namespace, name)]:
            del self._known[target]

    async def _fetch(self, address: str) -> ProgressReport | None:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=self._timeout)
        host = f"[{address}]" if ":" in address else address
        try:
            async with self._session.get(f"http://{host}:{EXPORTER_PORT}/progress") as response:
                if response.status != 200:
                    return None
                document = json.loads(await response.content.read(_MAX_BYTES))
                return ProgressReport.model_validate(finite(document))
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            return None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
