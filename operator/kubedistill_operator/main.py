"""Entry of the operator: settings, probes, leadership, then the work."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys

from kubedistill_operator import logs
from kubedistill_operator.cache import Cache
from kubedistill_operator.cluster import Cluster, log_failure
from kubedistill_operator.effects import Effects
from kubedistill_operator.election import Leadership
from kubedistill_operator.health import Health
from kubedistill_operator.metrics import Metrics
from kubedistill_operator.plan.draft import Timing
from kubedistill_operator.progress import Poller
from kubedistill_operator.queue import WorkQueue, work
from kubedistill_operator.reconcile import Reconciler
from kubedistill_operator.resources.pods import TrainerImage
from kubedistill_operator.settings import Settings
from kubedistill_operator.watch import Resync, Watcher
from kubedistill_operator.watching import keep_watching

_log = logging.getLogger(__name__)
_END_SECONDS = 5


def main() -> None:
    """Run until a signal comes (exit code 0) or the Lease is lost (exit code 1)."""
    settings = Settings()
    logs.set_up(settings.log_level)
    sys.exit(asyncio.run(run(settings)))


async def run(settings: Settings) -> int:
    """The operator's life; returns its exit code."""
    queue, metrics = WorkQueue(), Metrics()
    leadership = Leadership(settings)
    health = Health(settings, leadership, queue, metrics)
    port = await health.start()
    _log.info("probes are served", extra={"address": settings.bind_address, "port": port})
    cluster = await Cluster.connect(settings.api_timeout_seconds, settings.api_connections)
    cluster.may_write = leadership.held
    health.connected = True
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    election = asyncio.create_task(leadership.run(cluster), name="election")
    working: asyncio.Task[None] | None = None
    try:
        await _first(stop.wait(), leadership.won.wait(), election)
        if leadership.won.is_set() and not stop.is_set():
            working = asyncio.create_task(
                _lead(settings, cluster, queue, metrics, health, stop), name="leader"
            )
            await _first(stop.wait(), leadership.lost.wait(), election, working)
    finally:
        lost = leadership.lost.is_set() or (election.done() and not stop.is_set())
        stop.set()
        if working is not None and not lost:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(working, 10)
        tasks = [task for task in (working, election) if task is not None]
        for ending in tasks:
            ending.cancel()
        await asyncio.wait(tasks, timeout=_END_SECONDS)
        await leadership.release(cluster)
        await health.stop()
        await cluster.close()
    for task in (working, election):
        if task is None or not task.done() or task.cancelled():
            continue
        if (error := task.exception()) is not None:
            log_failure(_log, f"{task.get_name()} ended", error)
            return 1
    return 1 if lost else 0


async def _first(*waits: object) -> None:
    """Until the first of these is done; coroutines among them are ended then."""
    own = [asyncio.ensure_future(w) for w in waits if asyncio.iscoroutine(w)]
    others = [w for w in waits if isinstance(w, asyncio.Task)]
    await asyncio.wait([*own, *others], return_when=asyncio.FIRST_COMPLETED)
    for task in own:
        task.cancel()


async def _lead(
    settings: Settings,
    cluster: Cluster,
    queue: WorkQueue,
    metrics: Metrics,
    health: Health,
    stop: asyncio.Event,
) -> None:
    """Work until told to stop. Everything is listed before anything is decided."""
    cache = Cache()
    poller = Poller(
        settings.progress_poll_seconds, settings.progress_timeout_seconds, cluster.clock.now
    )
    trainer = TrainerImage(
        settings.trainer_image, settings.trainer_image_pull_policy, settings.trainer_env
    )
    watcher = Watcher(cache, queue)
    grace = settings.termination_grace_seconds
    effects = Effects(cluster, cache, trainer, watcher.job, grace)
    reconciler = Reconciler(cluster, cache, effects, poller, metrics, timing_of(settings))
    resync = Resync(cluster, cache, watcher, queue, settings)
    await resync.first()
    health.resync = resync
    tasks = [
        asyncio.create_task(work(queue, reconciler.reconcile), name=f"worker-{number}")
        for number in range(settings.workers)
    ]
    tasks.append(asyncio.create_task(resync.run(), name="resync"))
    watching = asyncio.create_task(keep_watching(watcher, settings), name="watches")
    tasks.append(watching)
    try:
        await _first(stop.wait(), watching)
        if watching.done():
            await watching
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await poller.close()


def timing_of(settings: Settings) -> Timing:
    """The times that plans use."""
    return Timing(
        poll=settings.progress_poll_seconds,
        backoff_base=settings.backoff_base_seconds,
        backoff_cap=settings.backoff_cap_seconds,
        grace=settings.termination_grace_seconds,
        margin=settings.termination_margin_seconds,
        elastic_wait=settings.elastic_wait_seconds,
    )


if __name__ == "__main__":
    main()
