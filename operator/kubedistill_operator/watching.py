"""kopf's own end and new beginning.

An answer that kopf does not bear (its list of what the API server serves was cut off, say) ends it, and
as it ends it cancels every task of its loop. So it has a thread and a loop of its own, and begins anew
there, while the work and the Lease go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from typing import Any

import kopf

from kubedistill_operator.cluster import log_failure
from kubedistill_operator.queue import Waits
from kubedistill_operator.settings import Settings
from kubedistill_operator.watch import Watcher, kopf_settings, registry_for

_log = logging.getLogger(__name__)
_END_SECONDS = 4.0
_LONG_SECONDS = 60.0
"""Watches that lived so long were well."""


async def keep_watching(watcher: Watcher, settings: Settings) -> None:
    """Until it is cancelled: watch, and begin anew after a failure of the API server."""
    waits = Waits()
    while True:
        started = time.monotonic()
        try:
            await _watch(watcher, settings)
        except Exception as error:
            if time.monotonic() - started > _LONG_SECONDS:
                waits = Waits()
            wait = waits.next()
            log_failure(_log, "the watches ended", error, wait=wait)
            await asyncio.sleep(wait)


async def _watch(watcher: Watcher, settings: Settings) -> None:
    """kopf, once. Raises what it ended with."""
    work = asyncio.get_running_loop()
    registry = registry_for(watcher, work)
    ended: asyncio.Future[None] = work.create_future()
    theirs, stop = asyncio.new_event_loop(), asyncio.Event()
    theirs.set_exception_handler(_told)

    def finish(error: BaseException | None) -> None:
        if ended.done():
            return
        if error is None:
            ended.set_result(None)
        else:
            ended.set_exception(error)

    def run() -> None:
        error: BaseException | None = None
        try:
            with asyncio.Runner(loop_factory=lambda: theirs) as runner:
                runner.run(_kopf(registry, settings, stop))
        except (Exception, asyncio.CancelledError) as raised:
            error = raised
        # The other loop may be over: nobody waits for this one then.
        with contextlib.suppress(RuntimeError):
            work.call_soon_threadsafe(finish, error)

    # A daemon: a process that is to end does not wait for it.
    threading.Thread(target=run, name="watches", daemon=True).start()
    try:
        # By `wait`, since a future that is awaited is cancelled with who awaits it.
        await asyncio.wait([ended])
        ended.result()
    finally:
        if not ended.done():
            theirs.call_soon_threadsafe(stop.set)
            await asyncio.wait([ended], timeout=_END_SECONDS)


def _told(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What the loop has to say of failures that nobody awaits.

    Not of kopf's request that is under way when it is to end: its callback asks for the task that it
    is in, and is in none.
    """
    if "request_cancel_callback" not in str(context.get("message")):
        loop.default_exception_handler(context)


async def _kopf(registry: kopf.OperatorRegistry, settings: Settings, stop: asyncio.Event) -> None:
    await kopf.operator(
        registry=registry,
        settings=kopf_settings(settings),
        standalone=True,
        clusterwide=not settings.watch_namespaces,
        namespaces=settings.watch_namespaces,
        stop_flag=stop,
    )
