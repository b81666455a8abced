"""One pass over one object: observe, plan, write the status, act, tell.

The status is written first and only over the version that was planned from: what an action does
was decided in a status that everybody sees. A pass that changes nothing writes nothing.
"""

from __future__ import annotations

import logging
import time

from kubedistill_api import names, reasons

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
from kubedistill_operator.effects import Effects, InputsLost, NameTaken
from kubedistill_operator.metrics import Metrics
from kubedistill_operator.observe import observe_chain, observe_job, owner_of, pods
from kubedistill_operator.plan.actions import (
    Action,
    ChainPlan,
    Event,
    Plan,
    Refusal,
    RestoreInputs,
    RestoreService,
)
from kubedistill_operator.plan.chain import plan_chain
from kubedistill_operator.plan.draft import Contact, Timing
from kubedistill_operator.plan.job import plan_job
from kubedistill_operator.plan.views import PodView
from kubedistill_operator.progress import Poller
from kubedistill_operator.queue import Failures, Key
from kubedistill_operator.sight import Sight

_log = logging.getLogger(__name__)
JOB, CHAIN = "job", "chain"
_SOON_SECONDS = 0.1
_REFUSED_SECONDS, _REFUSED_CAP_SECONDS = 1.0, 60.0
_SERVICE_SECONDS = 30.0
"""Ranks that come back in their pods look for each other for a minute."""
_OFTEN = (RestoreInputs, RestoreService)
"""Actions that change nothing as a rule."""


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
        self._sight = Sight(cluster, cache)
        self._refusals: dict[Key, Refusal] = {}
        self._serviced: dict[Key, float] = {}
        self._waits = Failures(_REFUSED_SECONDS, _REFUSED_CAP_SECONDS)

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
            result, again = "conflict", _SOON_SECONDS
        except NotFound:
            if not await self._deleted(key):
                raise
            # While this pass looked at it. Its watch brings that too, and takes it out.
            result, again = "deleted", None
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

    async def _deleted(self, key: Key) -> bool:
        try:
            raw = await self._cluster.get(self._kind(key)[1], key.namespace, key.name)
        except NotFound:
            return True
        return bool(raw["metadata"].get("deletionTimestamp"))

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
        await self._sight.restore(raw)
        current = pods(self._cache, raw)
        rank0 = await self._ask(raw, current, names.ROLE_STUDENT)
        teacher = await self._ask(raw, current, names.ROLE_TEACHER)
        unanswered = self._poller.unanswered((key.namespace, key.name, names.ROLE_STUDENT))
        refusal = self._refusals.get(key)
        since = time.monotonic() - self._serviced.get(key, float("-inf"))
        seen = observe_job(
            self._cache, raw, self._cluster.clock.now(), rank0, teacher, refusal, unanswered,
            service_due=since >= _SERVICE_SECONDS,
        )  # fmt: skip
        plan = plan_job(seen, self._timing)
        if plan.status != seen.status:
            wire = plan.status.to_wire()
            raw = await self._cluster.apply_status(DISTILLATION_JOBS, raw, wire)
            self._cache.put_job(raw)
        refused = await self._carry_out(key, raw, plan)
        owner = owner_of(raw)
        self._metrics.job(key.namespace, key.name, plan.status, seen.pods, owner.chain, owner.stage)
        return _earliest(plan.requeue_after, refused)

    async def _carry_out(self, key: Key, raw: Raw, plan: Plan | ChainPlan) -> float | None:
        """Tell and act. Seconds until a refused action is due again, None where none was refused.

        A refusal that is new is written into the status at once, by the next plan.
        """
        await self._tell(raw, plan.events)
        refusal: Refusal | None = None
        for action in plan.actions:
            level = logging.DEBUG if isinstance(action, _OFTEN) else logging.INFO
            _log.log(level, "acting", extra={"key": key.name, "action": repr(action)[:300]})
            try:
                await self._effects.perform(raw, action)
            except (NameTaken, InputsLost, ApiError) as error:
                refused = refusal_of(action, error)
                if refused is None:
                    raise
                _log.warning("refused", extra={"key": "/".join(key), "error": str(error)})
                refusal = refusal or refused
            else:
                # One that is refused stays due, and is told until it is mended.
                if isinstance(action, RestoreService):
                    self._serviced[key] = time.monotonic()
        before = self._refusals.pop(key, None)
        if refusal is None:
            self._waits.counts.pop(key, None)
            return _SOON_SECONDS if before else None
        self._refusals[key] = refusal
        return self._waits.next_wait(key) if refusal == before else _SOON_SECONDS

    async def _tell(self, raw: Raw, events: tuple[Event, ...]) -> None:
        for event in events:
            try:
                await self._effects.tell(raw, event, self._cluster.clock.now())
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
        return await self._poller.ask(target, first.name, first.ip)

    async def _chain(self, key: Key) -> float | None:
        raw = self._cache.chains.get(key.namespace, key.name)
        if raw is None:
            self._forget(key)
            return None
        if raw["metadata"].get("deletionTimestamp"):
            return None
        seen = observe_chain(self._cache, raw, self._cluster.clock.now(), self._refusals.get(key))
        plan = plan_chain(seen)
        if plan.status != seen.status:
            wire = plan.status.to_wire()
            raw = await self._cluster.apply_status(DISTILLATION_CHAINS, raw, wire)
            self._cache.chains.put(raw)
        refused = await self._carry_out(key, raw, plan)
        self._metrics.chain(key.namespace, key.name, dict(plan.stage_states))
        return _earliest(plan.requeue_after, refused)

    def _forget(self, key: Key) -> None:
        self._refusals.pop(key, None)
        self._serviced.pop(key, None)
        self._waits.counts.pop(key, None)
        self._metrics.forget(key.kind, key.namespace, key.name)
        if key.kind == JOB:
            self._poller.forget(key.namespace, key.name)
            self._sight.forget(key.namespace, key.name)
            self._cache.pods.forget(key.namespace, key.name)
            self._cache.batch_jobs.forget(key.namespace, key.name)


_PASSING = frozenset({404, 408, 409, 429})
"""Answers that say nothing of the request itself: it is made again."""


def refusal_of(action: Action, error: Exception) -> Refusal | None:
    """What to tell people of an action that failed; None where it is the API server's own trouble."""
    if isinstance(error, ApiError):
        if not 400 <= error.status < 500 or error.status in _PASSING:
            return None
        return Refusal(action, reasons.CREATION_REFUSED, f"the API server refuses: {error.message}")
    reason = reasons.NAME_TAKEN if isinstance(error, NameTaken) else reasons.CREATION_REFUSED
    return Refusal(action, reason, str(error))


def _earliest(*times: float | None) -> float | None:
    return min((t for t in times if t is not None), default=None)
