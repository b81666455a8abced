"""Finds children that are out of sight: they lost the labels by which we look, or news of them is lost.
And Jobs that lost their owner, with which they are to go.

The watches select by label: what loses it looks deleted. Before an attempt is given up because its
Job is gone, the API server is asked by name; before a Job's end is judged, for the ends of its pods.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from kubedistill_api import names

from kubedistill_operator.cache import Cache, Kind, Raw, name_of
from kubedistill_operator.cluster import (
    BATCH_JOBS,
    PODS,
    ApiError,
    Cluster,
    NotFound,
    Resource,
    log_failure,
)
from kubedistill_operator.observe import owner_of
from kubedistill_operator.resources.owner import Owner, owners_with

_log = logging.getLogger(__name__)
_AGAIN_SECONDS = 10.0
_JOB_NAME_LABEL = "batch.kubernetes.io/job-name"


class Sight:
    """Looks, by name and by their Job, for children that should be there."""

    def __init__(
        self, cluster: Cluster, cache: Cache, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._cluster = cluster
        self._cache = cache
        self._clock = clock
        self._checked: dict[tuple[str, str], set[str]] = {}
        self._looked_at: dict[tuple[str, str], float] = {}

    async def restore(self, raw: Raw) -> None:
        """Bring back what of a DistillationJob's children is there and out of sight."""
        for resource, kind in ((BATCH_JOBS, self._cache.batch_jobs), (PODS, self._cache.pods)):
            await self._vanished(raw, resource, kind)
        attempts = (raw.get("status") or {}).get("attempts") or []
        if attempts and not attempts[-1].get("endTime"):
            await self._gang(raw, attempts[-1]["number"])
        for job in self._cache.batch_jobs.group(*name_of(raw)):
            if _ownerless(raw, job):
                await self._own(owner_of(raw), job)
            if _to_be_judged(raw, job) and self._lacks_ends(job):
                await self._ends(job)

    def _lacks_ends(self, job: Raw) -> bool:
        """Whether a Job's pods have ended and we do not know how: one watch may be behind another."""
        metadata = job["metadata"]
        group = metadata["namespace"], (metadata.get("labels") or {}).get(names.LABEL_JOB, "")
        pods = [pod for pod in self._cache.pods.group(*group) if _owned(pod, metadata["uid"])]
        gone = [pod for pod in self._cache.pods.gone(*group) if _owned(pod, metadata["uid"])]
        return not (pods or gone) or any(
            pod.get("status", {}).get("phase") not in ("Succeeded", "Failed") for pod in pods
        )

    async def _ends(self, job: Raw) -> None:
        metadata = job["metadata"]
        if not self._due(metadata["namespace"], f"{metadata['name']}/ends"):
            return
        selector = f"{_JOB_NAME_LABEL}={metadata['name']}"
        async for pod in self._cluster.list(PODS, metadata["namespace"], selector):
            if _owned(pod, metadata["uid"]):
                labels = _own_labels(metadata["labels"])
                await self._mark(PODS, self._cache.pods, pod, labels)
        self._looked(metadata["namespace"], f"{metadata['name']}/ends")

    async def _own(self, owner: Owner, job: Raw) -> None:
        """Put the owner back that takes a Job along: without it the Job would keep its GPUs for ever."""
        namespace, name = name_of(job)
        if not self._due(namespace, f"{name}/owner"):
            return
        self._looked(namespace, f"{name}/owner")
        found = await self._get(BATCH_JOBS, namespace, name)
        if found is None or found["metadata"]["uid"] != job["metadata"]["uid"]:
            return
        references = owners_with(found["metadata"], owner.reference())
        if references is None:
            return
        version = found["metadata"]["resourceVersion"]
        patch = {"metadata": {"ownerReferences": references, "resourceVersion": version}}
        try:
            job = await self._cluster.merge_patch(BATCH_JOBS, namespace, name, patch)
        except ApiError as error:
            # The job itself goes on; it is tried again.
            log_failure(_log, "owner not put back", error, object=f"jobs/{name}")
            return
        _log.warning("owner put back", extra={"object": f"jobs/{name}"})
        self._cache.batch_jobs.put(job)

    async def _vanished(self, raw: Raw, resource: Resource, kind: Kind) -> None:
        """What went without having been asked to go may only have lost a label."""
        key = name_of(raw)
        checked = self._checked.setdefault(key, set())
        for gone in kind.gone(*key):
            metadata = gone["metadata"]
            uid = metadata["uid"]
            ours = (metadata.get("labels") or {}).get(names.LABEL_JOB_UID) == raw["metadata"]["uid"]
            if uid in checked or not ours or metadata.get("deletionTimestamp"):
                continue
            found = await self._get(resource, *name_of(gone))
            checked.add(uid)
            if found is not None and found["metadata"]["uid"] == uid:
                await self._mark(resource, kind, found, _own_labels(metadata["labels"]))

    async def _gang(self, raw: Raw, number: int) -> None:
        """The open attempt's Job, where we do not see it; its pods, where it has more than we see."""
        owner = owner_of(raw)
        name = names.attempt_name(owner.name, number)
        labels = owner.labels(names.ROLE_STUDENT, number)
        job = self._cache.batch_jobs.get(owner.namespace, name)
        if job is None or not _has(job, labels):
            if not self._due(owner.namespace, name):
                return
            job = await self._get(BATCH_JOBS, owner.namespace, name)
            self._looked(owner.namespace, name)
            owners = (job or {}).get("metadata", {}).get("ownerReferences") or []
            if job is None or not any(o["uid"] == owner.uid for o in owners):
                return
            job = await self._mark(BATCH_JOBS, self._cache.batch_jobs, job, labels)
        active = int(job.get("status", {}).get("active") or 0)
        seen = [
            pod
            for pod in self._cache.pods.group(owner.namespace, owner.name)
            if _has(pod, labels)
            and pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")
        ]
        if len(seen) < active and self._due(owner.namespace, f"{name}/pods"):
            selector = f"{_JOB_NAME_LABEL}={name}"
            async for pod in self._cluster.list(PODS, owner.namespace, selector):
                if not _has(pod, labels):
                    await self._mark(PODS, self._cache.pods, pod, labels)
            self._looked(owner.namespace, f"{name}/pods")

    def _due(self, namespace: str, name: str) -> bool:
        last = self._looked_at.get((namespace, name), float("-inf"))
        return self._clock() - last >= _AGAIN_SECONDS

    def _looked(self, namespace: str, name: str) -> None:
        """Only now: a look that failed must be taken again before anything is decided without it."""
        self._looked_at[namespace, name] = self._clock()

    async def _get(self, resource: Resource, namespace: str, name: str) -> Raw | None:
        try:
            return await self._cluster.get(resource, namespace, name)
        except NotFound:
            return None

    async def _mark(
        self, resource: Resource, kind: Kind, found: Raw, labels: dict[str, str]
    ) -> Raw:
        """Give an object its labels, and take it in as it is then."""
        if not _has(found, labels) and not found["metadata"].get("deletionTimestamp"):
            namespace, name = name_of(found)
            _log.warning("labels put back", extra={"object": f"{resource.plural}/{name}"})
            patch = {"metadata": {"labels": labels}}
            found = await self._cluster.merge_patch(resource, namespace, name, patch)
        kind.put(found)
        return found

    def forget(self, namespace: str, name: str) -> None:
        """Drop what is remembered of a DistillationJob's children."""
        self._checked.pop((namespace, name), None)
        prefix = names.attempt_name(name, 0)[:-1]
        for key in [k for k in self._looked_at if k[0] == namespace and k[1].startswith(prefix)]:
            del self._looked_at[key]


def _ownerless(raw: Raw, job: Raw) -> bool:
    """Whether a Job that was made for a DistillationJob, and is not on its way out, is not its own."""
    owner, metadata = owner_of(raw), job["metadata"]
    ours = (metadata.get("labels") or {}).get(names.LABEL_JOB_UID) == owner.uid
    return (
        ours
        and owner.made(metadata)
        and not metadata.get("deletionTimestamp")
        and owners_with(metadata, owner.reference()) is not None
    )


def _to_be_judged(raw: Raw, job: Raw) -> bool:
    """Whether a Job has ended, and what it means for the DistillationJob is not in its status yet."""
    ended = {c["type"] for c in (job.get("status") or {}).get("conditions") or []
             if c["status"] == "True"} & {"Complete", "Failed"}  # fmt: skip
    labels, status = job["metadata"].get("labels") or {}, raw.get("status") or {}
    if not ended or labels.get(names.LABEL_JOB_UID) != raw["metadata"]["uid"]:
        return False
    attempts = status.get("attempts") or [{}]
    match labels.get(names.LABEL_ROLE):
        case names.ROLE_PREFLIGHT:
            return not status.get("startTime")
        case names.ROLE_TEACHER:
            return not (status.get("teacherStream") or {}).get("complete")
        case names.ROLE_STUDENT:
            newest = labels.get(names.LABEL_ATTEMPT) == str(attempts[-1].get("number"))
            return newest and not attempts[-1].get("endTime")
    return False


def _owned(pod: Raw, uid: str) -> bool:
    return any(owner["uid"] == uid for owner in pod["metadata"].get("ownerReferences") or [])


def _has(raw: Raw, labels: dict[str, str]) -> bool:
    own = raw["metadata"].get("labels") or {}
    return all(own.get(key) == value for key, value in labels.items())


def _own_labels(labels: dict[str, str]) -> dict[str, str]:
    """Those that we gave it, of all that it had."""
    ours = (names.LABEL_MANAGED_BY, names.LABEL_JOB, names.LABEL_JOB_UID, names.LABEL_ROLE,
            names.LABEL_ATTEMPT, names.LABEL_CHAIN, names.LABEL_STAGE)  # fmt: skip
    return {key: labels[key] for key in ours if key in labels}
