"""kopf's part: every event becomes a newer object in the cache and a key on the queue.

The handlers are event spies: kopf puts no finalizer and no annotation on any object. A periodic
listing finds what a watch missed, deletions included, and tells when watches have stopped.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import kopf
from kubedistill_api.base import CHAIN_PLURAL, GROUP, JOB_PLURAL, VERSION
from kubedistill_api.names import (
    LABEL_CHAIN,
    LABEL_JOB,
    LABEL_MANAGED_BY,
    LABEL_ROLE,
    MANAGER,
    ROLE_REPORT,
)

from kubedistill_operator.cache import Cache, Kind, Raw, name_of, version_of
from kubedistill_operator.cluster import (
    API_FAILURES,
    BATCH_JOBS,
    DISTILLATION_CHAINS,
    DISTILLATION_JOBS,
    PODS,
    Cluster,
    Resource,
    log_failure,
)
from kubedistill_operator.queue import Key, Waits, WorkQueue
from kubedistill_operator.reconcile import CHAIN, JOB
from kubedistill_operator.settings import Settings

_log = logging.getLogger(__name__)
OURS = f"{LABEL_MANAGED_BY}={MANAGER}"
_WATCH_LAG_SECONDS = 5.0


class Watcher:
    """Takes in objects, whether a watch or a listing brought them."""

    def __init__(self, cache: Cache, queue: WorkQueue) -> None:
        self._cache = cache
        self._queue = queue

    def job(self, raw: Raw, *, deleted: bool = False) -> None:
        """A DistillationJob: look at it, at who waits for it, and at its chain."""
        namespace, name = name_of(raw)
        if deleted:
            self._cache.remove_job(raw)
            fresh = True
        else:
            fresh = self._cache.put_job(raw)
        if fresh:
            self._queue.add(Key(JOB, namespace, name))
        # Also for versions that our own write brought before the watch did.
        for other in self._cache.dependents(namespace, name):
            self._queue.add(Key(JOB, namespace, other))
        chain = self._cache.chain_of(raw)
        if chain:
            self._queue.add(Key(CHAIN, namespace, chain))

    def chain(self, raw: Raw, *, deleted: bool = False) -> None:
        kind = self._cache.chains
        if kind.remove(raw) if deleted else kind.put(raw):
            self._queue.add(Key(CHAIN, *name_of(raw)))

    def child(self, kind: Kind, raw: Raw, *, deleted: bool = False) -> None:
        """A Job or Pod: look at the DistillationJob that it belongs to, of a report at the chain."""
        before = kind.get(*name_of(raw))
        if kind.remove(raw) if deleted else kind.put(raw):
            labels = raw["metadata"].get("labels") or {}
            job, chain = labels.get(LABEL_JOB), labels.get(LABEL_CHAIN)
            # Its label may just have been taken off, or changed.
            last = ((before or raw)["metadata"].get("labels") or {}).get(LABEL_JOB)
            for name in dict.fromkeys(filter(None, (job, last))):
                self._queue.add(Key(JOB, name_of(raw)[0], name))
            if chain and labels.get(LABEL_ROLE) == ROLE_REPORT:
                self._queue.add(Key(CHAIN, name_of(raw)[0], chain))

    def batch_job(self, raw: Raw, *, deleted: bool = False) -> None:
        self.child(self._cache.batch_jobs, raw, deleted=deleted)

    def pod(self, raw: Raw, *, deleted: bool = False) -> None:
        self.child(self._cache.pods, raw, deleted=deleted)


def server_of(environment: Mapping[str, str]) -> str | None:
    """The API server's address from what a kubelet puts in every container.

    kopf takes `https://kubernetes.default.svc`, which needs a cluster DNS that is up, and port 443.
    """
    host = environment.get("KUBERNETES_SERVICE_HOST")
    if not host:
        return None
    port = environment.get("KUBERNETES_SERVICE_PORT") or "443"
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


def registry_for(watcher: Watcher, work: asyncio.AbstractEventLoop) -> kopf.OperatorRegistry:
    """kopf handlers that do nothing but hand over what they got, to the loop in which the work is."""
    registry = kopf.OperatorRegistry()

    async def log_in(**kwargs: Any) -> kopf.ConnectionInfo | None:
        account = kopf.login_with_service_account(**kwargs)
        if account is not None:
            return dataclasses.replace(account, server=server_of(os.environ) or account.server)
        return kopf.login_with_kubeconfig(**kwargs)

    kopf.on.login(registry=registry)(log_in)
    ours = {LABEL_MANAGED_BY: MANAGER}
    for resource, labels, take in (
        ((GROUP, VERSION, JOB_PLURAL), None, watcher.job),
        ((GROUP, VERSION, CHAIN_PLURAL), None, watcher.chain),
        (("batch", "v1", "jobs"), ours, watcher.batch_job),
        (("", "v1", "pods"), ours, watcher.pod),
    ):

        async def hand_over(event: Any, take: Any = take, **_: Any) -> None:
            deleted = event["type"] == "DELETED"
            work.call_soon_threadsafe(partial(take, dict(event["object"]), deleted=deleted))

        kopf.on.event(*resource, id=resource[2], labels=labels, registry=registry)(hand_over)
    return registry


def kopf_settings(settings: Settings) -> kopf.OperatorSettings:
    """kopf for watching only: no events posted, no peering, watches that cannot freeze."""
    result = kopf.OperatorSettings()
    result.posting.enabled = False
    result.peering.standalone = True
    result.scanning.disabled = True
    result.watching.server_timeout = settings.watch_server_seconds
    result.watching.client_timeout = settings.watch_server_seconds + 30
    result.watching.connect_timeout = settings.api_timeout_seconds
    result.watching.inactivity_timeout = settings.watch_inactivity_seconds
    result.watching.label_selectors["batch", "v1", "jobs"] = OURS
    result.watching.label_selectors["", "v1", "pods"] = OURS
    result.networking.request_timeout = settings.api_timeout_seconds
    # By SIGKILL of the whole process: kopf's end is not ours.
    result.process.ultimate_exiting_timeout = None
    return result


class Resync:
    """Lists everything, now and then: what a watch missed is found here."""

    def __init__(
        self, cluster: Cluster, cache: Cache, watcher: Watcher, queue: WorkQueue, settings: Settings
    ) -> None:
        self._cluster = cluster
        self._cache = cache
        self._queue = queue
        self._interval = settings.resync_seconds
        self._namespaces = settings.watch_namespaces or [""]
        self._kinds: list[tuple[Resource, str, Kind, Any]] = [
            (PODS, OURS, cache.pods, watcher.pod),
            (BATCH_JOBS, OURS, cache.batch_jobs, watcher.batch_job),
            (DISTILLATION_JOBS, "", cache.jobs, watcher.job),
            (DISTILLATION_CHAINS, "", cache.chains, watcher.chain),
        ]
        self.finished_at = time.monotonic()
        self.frozen_rounds = 0

    async def first(self) -> None:
        """The listing before anything is decided. An API server that is not well is asked again."""
        waits = Waits()
        while True:
            try:
                return await self.once()
            except API_FAILURES as error:
                wait = waits.next()
                log_failure(_log, "the first listing failed", error, wait=wait)
                await asyncio.sleep(wait)

    async def run(self) -> None:
        """Forever; a round that fails is tried again soon."""
        while True:
            await asyncio.sleep(self._interval)
            try:
                await self.once(check_watches=True)
            except Exception as error:
                log_failure(_log, "resync failed", error)

    async def once(self, *, check_watches: bool = False) -> None:
        """List everything, take it in, and look at every object once."""
        missed = 0
        for resource, selector, kind, take in self._kinds:
            missed += await self._kind(resource, selector, kind, take, check_watches)
        self.frozen_rounds = self.frozen_rounds + 1 if missed else 0
        if missed:
            _log.warning("watches had missed objects", extra={"missed": missed})
        for raw in self._cache.jobs.all():
            self._queue.add(Key(JOB, *name_of(raw)))
        for raw in self._cache.chains.all():
            self._queue.add(Key(CHAIN, *name_of(raw)))
        self.finished_at = time.monotonic()

    async def _kind(
        self, resource: Resource, selector: str, kind: Kind, take: Any, check: bool
    ) -> int:
        before = {raw["metadata"]["uid"]: raw for raw in kind.all()}
        listed: dict[str, Raw] = {}
        for namespace in self._namespaces:
            async for raw in self._cluster.list(resource, namespace, selector):
                listed[raw["metadata"]["uid"]] = raw

        def behind() -> list[Raw]:
            found = []
            for raw in listed.values():
                known = kind.get(*name_of(raw))
                if known is None or version_of(known) < version_of(raw):
                    found.append(raw)
            return found

        def vanished() -> list[Raw]:
            return [
                raw
                for uid, raw in before.items()
                if uid not in listed
                and (known := kind.get(*name_of(raw))) is not None
                and known["metadata"]["uid"] == uid
            ]

        if check and (behind() or vanished()):
            # A watch that lives brings this by itself, a moment later than the listing.
            await asyncio.sleep(_WATCH_LAG_SECONDS)
        late, lost = behind(), vanished()
        for raw in late:
            take(raw)
        for raw in lost:
            take(raw, deleted=True)
        return len(late) + len(lost) if check else 0
