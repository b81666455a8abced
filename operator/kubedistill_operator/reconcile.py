"""One pass over one object: observe, plan, write the status, act, tell.

The status is written first and only over the version that was planned from: what an action does
was decided in a status that everybody sees. A pass that changes nothing writes nothing.
"""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime

from kubedistill_api import names

from kubedistill_operator.cache import Cache, Kind, Raw
from kubedistill_operator.cluster import (
    DISTILLATION_CHAINS,
    DISTILLATION_JOBS,
    ApiError,
    Cluster,
    Conflict,
    NotFound,
    Resource,
)
from kubedistill_operator.effects import Effects, NameTaken
from kubedistill_operator.metrics import Metrics
from kubedistill_operator.observe import observe_chain, observe_job, owner_of, pods
from kubedistill_operator.plan.actions import ChainPlan, Event, Plan
from kubedistill_operator.plan.chain import plan_chain
from kubedistill_operator.plan.draft import Contact, Timing
from kubedistill_operator.plan.job import plan_job
from kubedistill_operator.plan.views import PodView
from kubedistill_operator.progress import Poller
from kubedistill_operator.queue import Key

_log = logging.getLogger(__name__)
JOB, CHAIN = "job", "chain"
_TAKEN_SECONDS = 2.0
_GRACE_BEYOND_SAVES = 30


class Reconciler:
    """Passes over DistillationJobs and DistillationChains."""

    def __init__(
        self,
        cluster: Cluster,
        cache: Cache,
        effects: Effects,
        poller: Poller,
        metrics: Metrics,
        timing: Timing,
    ) -> None:
        self._cluster = cluster
        self._cache = cache
        self._effects = effects
        self._poller = poller
        self._metrics = metrics
        self._timing = timing

    async def reconcile(self, key: Key) -> float | None:
        """One pass over an object; seconds until the next one is due, or None for on its event."""
        started = time.monotonic()
        result = "error"
        try:
            again = await (self._job(key) if key.kind == JOB else self._chain(key))
            result = "ok"
        except Conflict:
            # Somebody wrote first: plan anew from what is there now.
            await self._refresh(key)
            result, again = "conflict", 0.1
        except NameTaken as error:
            _log.warning("waiting for a name", extra={"key": "/".join(key), "error": str(error)})
            result, again = "name_taken", _TAKEN_SECONDS
        finally:
            self._metrics.reconciles.labels(result).inc()
            self._metrics.duration.observe(time.monotonic() - started)
        return again

    async def _refresh(self, key: Key) -> None:
        kind, resource = self._kind(key)
        try:
            raw = await self._cluster.get(resource, key.namespace, key.name)
        except NotFound:
            old = kind.get(key.namespace, key.name)
            if old is not None:
                kind.remove(old)
            return
        if key.kind == JOB:
            self._cache.put_job(raw)
        else:
            kind.put(raw)

    def _kind(self, key: Key) -> tuple[Kind, Resource]:
        if key.kind == JOB:
            return self._cache.jobs, DISTILLATION_JOBS
        return self._cache.chains, DISTILLATION_CHAINS

    async def _job(self, key: Key) -> float | None:
        raw = self._cache.jobs.get(key.namespace, key.name)
        if raw is None:
            self._forget(key)
            return None
        if raw["metadata"].get("deletionTimestamp"):
            return None
        current = pods(self._cache, raw)
        rank0 = await self._ask(raw, current, names.ROLE_STUDENT)
        teacher = await self._ask(raw, current, names.ROLE_TEACHER)
        seen = observe_job(self._cache, raw, rank0, teacher)
        plan = plan_job(seen, self._timing)
        if plan.status != seen.status:
            wire = plan.status.to_wire()
            raw = await self._cluster.apply_status(DISTILLATION_JOBS, raw, wire)
            self._cache.put_job(raw)
        await self._carry_out(raw, plan, self._grace(rank0, current))
        owner = owner_of(raw)
        self._metrics.job(key.namespace, key.name, plan.status, seen.pods, owner.chain, owner.stage)
        return plan.requeue_after

    async def _carry_out(self, raw: Raw, plan: Plan | ChainPlan, grace_seconds: int = 0) -> None:
        await self._tell(raw, plan.events)
        for action in plan.actions:
            _log.info(
                "acting", extra={"key": raw["metadata"]["name"], "action": repr(action)[:300]}
            )
            await self._effects.perform(raw, action, grace_seconds=grace_seconds)

    async def _tell(self, raw: Raw, events: tuple[Event, ...]) -> None:
        for event in events:
            try:
                await self._effects.tell(raw, event, datetime.now(UTC))
            except ApiError as error:
                # An event is a courtesy: training does not wait for it.
                _log.warning(
                    "event not posted", extra={"reason": event.reason, "error": str(error)}
                )

    async def _ask(self, raw: Raw, current: list[PodView], role: str) -> Contact | None:
        """What rank 0 of the newest attempt, or the first running writer, says."""
        namespace, name = raw["metadata"]["namespace"], raw["metadata"]["name"]
        attempts = (raw.get("status") or {}).get("attempts") or [{}]
        attempt = attempts[-1].get("number", 0) if role == names.ROLE_STUDENT else 0
        target = (namespace, name, role)
        running = [
            p
            for p in current
            if p.role == role
            and p.attempt == attempt
            and p.active
            and p.ip
            and p.phase == "Running"
        ]
        if role == names.ROLE_STUDENT:
            running = [p for p in running if p.index == 0]
        if not running:
            return self._poller.last(target)
        first = min(running, key=lambda p: p.index)
        return await self._poller.ask(target, first.ip)

    def _grace(self, rank0: Contact | None, current: list[PodView]) -> int:
        """Grace of the next attempt's pods: two saves fit, as far as saves are known."""
        saves = [rank0.report.save_seconds] if rank0 else []
        for pod in current:
            outcome = pod.outcome() if pod.role == names.ROLE_STUDENT else None
            if outcome is not None and outcome.progress is not None:
                saves.append(outcome.progress.save_seconds)
        longest = max((s for s in saves if s is not None), default=0.0)
        return max(self._timing.grace, int(2 * longest) + _GRACE_BEYOND_SAVES)

    async def _chain(self, key: Key) -> float | None:
        raw = self._cache.chains.get(key.namespace, key.name)
        if raw is None:
            self._forget(key)
            return None
        if raw["metadata"].get("deletionTimestamp"):
            return None
        seen = observe_chain(self._cache, raw)
        plan = plan_chain(seen)
        if plan.status != seen.status:
            wire = plan.status.to_wire()
            raw = await self._cluster.apply_status(DISTILLATION_CHAINS, raw, wire)
            self._cache.chains.put(raw)
        await self._carry_out(raw, plan)
        self._metrics.chain(key.namespace, key.name, dict(plan.stage_states))
        return plan.requeue_after

    def _forget(self, key: Key) -> None:
        self._metrics.forget(key.kind, key.namespace, key.name)
        if key.kind == JOB:
            self._poller.forget(key.namespace, key.name)
            self._cache.pods.forget(key.namespace, key.name)
            self._cache.batch_jobs.forget(key.namespace, key.name)
