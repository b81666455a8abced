"""/healthz, /readyz and /metrics over HTTP."""

from __future__ import annotations

import time

from aiohttp import web
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from kubedistill_operator.election import Leadership
from kubedistill_operator.metrics import Metrics
from kubedistill_operator.queue import WorkQueue
from kubedistill_operator.settings import Settings
from kubedistill_operator.watch import Resync

_LONGEST_WAIT_SECONDS = 120.0
_FROZEN_ROUNDS = 2


class Health:
    """What the probes answer."""

    def __init__(
        self, settings: Settings, leadership: Leadership, queue: WorkQueue, metrics: Metrics
    ) -> None:
        self._settings = settings
        self._leadership = leadership
        self._queue = queue
        self._metrics = metrics
        self._runner: web.AppRunner | None = None
        self.resync: Resync | None = None
        self.connected = False

    def problem(self) -> str:
        """Why this process should be restarted; empty for no reason."""
        waiting = self._queue.oldest_wait_seconds()
        if waiting > _LONGEST_WAIT_SECONDS:
            return f"a key has waited for {waiting:.0f} s: the queue does not move"
        if self.resync is None:
            return ""
        if self.resync.frozen_rounds >= _FROZEN_ROUNDS:
            return "watches bring nothing: listings found what they had missed"
        age = time.monotonic() - self.resync.finished_at
        if age > 3 * self._settings.resync_seconds + 60:
            return f"the last full listing was {age:.0f} s ago"
        return ""

    async def start(self) -> int:
        """Serve; the port that is listened on."""
        app = web.Application()
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._serve_metrics)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._settings.bind_address, self._settings.health_port)
        await site.start()
        address: tuple[str, int] = self._runner.addresses[0]
        return address[1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _healthz(self, request: web.Request) -> web.Response:
        problem = self.problem()
        return web.Response(text=problem or "ok", status=500 if problem else 200)

    async def _readyz(self, request: web.Request) -> web.Response:
        # A standby is ready too: it can take over.
        return web.Response(text="ok", status=200 if self.connected else 503)

    async def _serve_metrics(self, request: web.Request) -> web.Response:
        self._metrics.queue_depth.set(len(self._queue))
        self._metrics.is_leader.set(1 if self._leadership.held() else 0)
        body = generate_latest(self._metrics.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})
