"""Leadership by a Lease: one process works, the others wait.

`held()` is checked before every write: it goes by the time of the last renewal that succeeded, so a
leader that was paused for longer than its lease writes nothing when it wakes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable
from datetime import UTC, datetime
from typing import Any

from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.leaderelection import electionconfig, leaderelection
from kubernetes.aio.leaderelection.leaderelectionrecord import LeaderElectionRecord
from kubernetes.aio.leaderelection.resourcelock.baselock import BaseLock

from kubedistill_operator.cluster import API_FAILURES, Cluster, NotFound
from kubedistill_operator.settings import Settings

_log = logging.getLogger(__name__)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class _Lock(BaseLock):  # type: ignore[misc]
    """A Lease whose calls end in time, and for which a lost connection is a failed try.

    The client's own LeaseLock cannot create a Lease in version 37 and has no time limits.
    """

    def __init__(self, leadership: Leadership, cluster: Cluster) -> None:
        settings = leadership.settings
        super().__init__(settings.lease_name, settings.namespace, settings.identity)
        self._leadership = leadership
        self._cluster = cluster
        # Two tries fit before the leader has to give up, also where the API server is slow.
        self._timeout = max(settings.lease_retry_seconds, settings.lease_renew_seconds / 2)
        self._lease: dict[str, Any] = {}

    async def get(self, name: str, namespace: str) -> tuple[bool, Any]:
        call = self._cluster.get_lease(namespace, name)
        try:
            self._lease = await asyncio.wait_for(call, self._timeout)
        except NotFound as error:
            refusal = ApiException(status=404, reason=str(error))
            refusal.body = json.dumps({"code": 404})
            return False, refusal
        except API_FAILURES as error:
            return False, ApiException(status=0, reason=str(error) or type(error).__name__)
        spec = self._lease.get("spec") or {}
        duration = spec.get("leaseDurationSeconds")
        return True, LeaderElectionRecord(
            spec.get("holderIdentity") or None,
            str(duration) if duration else None,
            spec.get("acquireTime"),
            spec.get("renewTime"),
        )

    async def create(self, name: str, namespace: str, election_record: Any) -> bool:
        self._lease = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": name, "namespace": namespace},
        }
        self._take_over(election_record)
        return await self._renewing(self._cluster.create_lease(self._lease))

    async def update(self, name: str, namespace: str, updated_record: Any) -> bool:
        self._take_over(updated_record)
        return await self._renewing(self._cluster.replace_lease(self._lease))

    def _take_over(self, record: Any) -> None:
        old = self._lease.get("spec") or {}
        ours = old.get("holderIdentity") == record.holder_identity
        now = _now()
        self._lease["spec"] = old | {
            "holderIdentity": record.holder_identity,
            "leaseDurationSeconds": int(record.lease_duration),
            "acquireTime": old.get("acquireTime", now) if ours else now,
            "renewTime": now,
            "leaseTransitions": int(old.get("leaseTransitions") or 0) + (0 if ours else 1),
        }

    async def _renewing(self, call: Awaitable[dict[str, Any]]) -> bool:
        asked_at = time.monotonic()
        try:
            self._lease = await asyncio.wait_for(call, self._timeout)
        except API_FAILURES as error:
            _log.warning("the Lease was not renewed", extra={"error": str(error)})
            return False
        self._leadership.renewed(asked_at)
        return True


class Leadership:
    """Whether this process leads, and the task that sees to it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.won = asyncio.Event()
        self.lost = asyncio.Event()
        self._renewed_at = float("-inf")

    def held(self) -> bool:
        """Whether this process may write now."""
        if not self.settings.leader_election:
            return True
        fresh = time.monotonic() - self._renewed_at < self.settings.lease_seconds
        return self.won.is_set() and not self.lost.is_set() and fresh

    def renewed(self, asked_at: float) -> None:
        self._renewed_at = asked_at

    async def run(self, cluster: Cluster) -> None:
        """Wait for the Lease, then keep it; returns when it is lost."""
        settings = self.settings
        if not settings.leader_election:
            self.won.set()
            await asyncio.Event().wait()
        election = leaderelection.LeaderElection(
            electionconfig.Config(
                _Lock(self, cluster),
                lease_duration=settings.lease_seconds,
                renew_deadline=settings.lease_renew_seconds,
                retry_period=settings.lease_retry_seconds,
                onstarted_leading=self._started,
                onstopped_leading=self._stopped,
            )
        )
        await election.run()

    async def _started(self) -> None:
        _log.info("leading", extra={"identity": self.settings.identity})
        self.won.set()

    async def _stopped(self) -> None:
        _log.error("the Lease is lost", extra={"identity": self.settings.identity})
        self.lost.set()

    async def release(self, cluster: Cluster) -> None:
        """Give the Lease back, so that a standby need not wait for its end."""
        if not self.settings.leader_election or not self.held():
            return
        self.lost.set()
        try:
            lease = await cluster.get_lease(self.settings.namespace, self.settings.lease_name)
            if lease["spec"].get("holderIdentity") == self.settings.identity:
                lease["spec"]["holderIdentity"] = ""
                await cluster.replace_lease(lease)
        except API_FAILURES as error:
            _log.warning("the Lease was not given back", extra={"error": str(error)})
