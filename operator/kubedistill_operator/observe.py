"""From the cache to what plans look at."""

from __future__ import annotations

from datetime import datetime

from kubedistill_api import names, reasons
from kubedistill_api.base import CHAIN_KIND
from kubedistill_api.chain import DistillationChainStatus
from kubedistill_api.status import DistillationJobStatus

from kubedistill_operator.cache import Cache, Raw, name_of
from kubedistill_operator.plan.actions import Refusal
from kubedistill_operator.plan.chain import ObservedChain
from kubedistill_operator.plan.draft import Contact, Observed, OtherJob, Unanswered
from kubedistill_operator.plan.layout import job_names, models_of_chain
from kubedistill_operator.plan.stages import StageJob
from kubedistill_operator.plan.views import (
    BatchJobView,
    PodView,
    batch_job_view,
    pod_view,
)
from kubedistill_operator.resources.owner import Owner


def owner_of(raw: Raw) -> Owner:
    """The job as its children name it."""
    metadata = raw["metadata"]
    labels = metadata.get("labels") or {}
    return Owner(
        metadata["namespace"],
        metadata["name"],
        metadata["uid"],
        labels.get(names.LABEL_CHAIN, ""),
        labels.get(names.LABEL_STAGE, ""),
    )


def job_status(raw: Raw) -> DistillationJobStatus:
    return DistillationJobStatus.model_validate(raw.get("status") or {})


def pods(cache: Cache, raw: Raw) -> list[PodView]:
    """A job's pods, and those that were deleted not long ago."""
    group = raw["metadata"]["namespace"], raw["metadata"]["name"]
    uid = raw["metadata"]["uid"]
    present = [pod_view(pod) for pod in cache.pods.group(*group) if _is_of(pod, uid)]
    gone = [pod_view(pod, gone=True) for pod in cache.pods.gone(*group) if _is_of(pod, uid)]
    return present + gone


def _is_of(child: Raw, uid: str) -> bool:
    return (child["metadata"].get("labels") or {}).get(names.LABEL_JOB_UID) == uid


def observe_job(
    cache: Cache,
    raw: Raw,
    now: datetime,
    rank0: Contact | None,
    teacher: Contact | None,
    refusal: Refusal | None = None,
    unanswered: Unanswered | None = None,
    *,
    service_due: bool = False,
) -> Observed:
    """Everything the plan of a job may use."""
    metadata = raw["metadata"]
    group = metadata["namespace"], metadata["name"]
    uid = metadata["uid"]
    views = [batch_job_view(job) for job in cache.batch_jobs.group(*group) if _is_of(job, uid)]
    batch_jobs: dict[str, BatchJobView] = {view.name: view for view in views}
    gone = {
        job["metadata"]["name"] for job in cache.batch_jobs.gone(*group) if _is_of(job, uid)
    } - batch_jobs.keys()
    return Observed(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=uid,
        generation=metadata["generation"],
        spec=raw["spec"],
        status=job_status(raw),
        now=now,
        batch_jobs=batch_jobs,
        deleted_batch_jobs=frozenset(gone),
        pods=pods(cache, raw),
        other_jobs=_upstream(cache, metadata["namespace"], metadata["name"]),
        rank0=rank0,
        teacher=teacher,
        unanswered=unanswered,
        of_chain=any(o["kind"] == CHAIN_KIND for o in metadata.get("ownerReferences") or []),
        waited_for_by=_waiting_for(cache, raw),
        refusal=refusal,
        service_due=service_due,
    )


def _waiting_for(cache: Cache, raw: Raw) -> tuple[str, ...]:
    """Who has still to take this job's model: jobs that have begun have it in their status.

    And chains, which make the jobs of their stages one by one.
    """
    namespace, name = name_of(raw)
    found = _chains_waiting(cache, raw)
    for dependent in cache.dependents(namespace, name):
        job = cache.jobs.get(namespace, dependent)
        if job is None:
            continue
        status = job_status(job)
        ended = any(
            c.type == reasons.SUCCEEDED and c.status != "Unknown" for c in status.conditions
        )
        if status.start_time is None and not ended:
            found.append(dependent)
    return tuple(found)


def _chains_waiting(cache: Cache, raw: Raw) -> list[str]:
    """Chains whose specs name this job, until they are complete: one that failed may go on.

    They are looked through only where it matters: the job is there for a limited time, and done.
    """
    namespace, name = name_of(raw)
    lasting = raw["spec"].get("ttlSecondsAfterFinished") is None
    if lasting or _succeeded(raw).get("status") != "True":
        return []
    return [
        chain["metadata"]["name"]
        for chain in cache.chains.all()
        if chain["metadata"]["namespace"] == namespace
        and not chain["metadata"].get("deletionTimestamp")
        and _succeeded(chain).get("status") != "True"
        and name in models_of_chain(chain.get("spec") or {})
    ]


def _upstream(cache: Cache, namespace: str, name: str) -> dict[str, OtherJob]:
    """The jobs that this one waits for, and those that they wait for in turn."""
    found: dict[str, OtherJob] = {}
    waiting = list(cache.depends_on(namespace, name))
    while waiting:
        current = waiting.pop()
        raw = cache.jobs.get(namespace, current)
        if current in found or raw is None:
            continue
        found[current] = _other(raw, cache.depends_on(namespace, current))
        waiting += found[current].depends_on
    return found


def _other(raw: Raw, depends_on: tuple[str, ...]) -> OtherJob:
    model = (raw.get("status") or {}).get("model") or {}
    succeeded = _succeeded(raw)
    return OtherJob(
        name=raw["metadata"]["name"],
        depends_on=depends_on,
        succeeded=succeeded.get("status", "Unknown"),
        reason=succeeded.get("reason", ""),
        message=succeeded.get("message", ""),
        model_uri=model.get("uri", ""),
        model_digest=model.get("digest", ""),
    )


def _succeeded(raw: Raw) -> Raw:
    """The condition of an object that sums it up; empty where it has none yet."""
    conditions = (raw.get("status") or {}).get("conditions") or []
    return next((c for c in conditions if c["type"] == reasons.SUCCEEDED), {})


def observe_chain(
    cache: Cache, raw: Raw, now: datetime, refusal: Refusal | None = None
) -> ObservedChain:
    """Everything the plan of a chain may use."""
    metadata = raw["metadata"]
    namespace, name = metadata["namespace"], metadata["name"]
    wanted = job_names(name, raw["spec"])
    known = [cache.jobs.get(namespace, job_name) for job_name in wanted]
    found = [*cache.jobs.group(namespace, name), *(job for job in known if job is not None)]
    jobs = {job["metadata"]["name"]: _stage_job(cache, job, metadata) for job in found}
    return ObservedChain(
        namespace=namespace,
        name=name,
        generation=metadata["generation"],
        spec=raw["spec"],
        status=DistillationChainStatus.model_validate(raw.get("status") or {}),
        now=now,
        jobs={n: job for n, job in jobs.items() if job.ours or n in wanted or job.leaving},
        refusal=refusal,
    )


def _stage_job(cache: Cache, job: Raw, chain: Raw) -> StageJob:
    """A job as the chain with this metadata sees it."""
    namespace, name = job["metadata"]["namespace"], job["metadata"]["name"]
    owners = job["metadata"].get("ownerReferences") or []
    ours = any(owner["uid"] == chain["uid"] for owner in owners)
    leaving = not ours and any(
        (owner["kind"], owner["name"]) == (CHAIN_KIND, chain["name"]) for owner in owners
    )
    reports = [
        batch_job_view(child)
        for child in cache.batch_jobs.group(namespace, name)
        if child["metadata"]["name"] == names.report_name(name)
        and _is_of(child, job["metadata"]["uid"])
    ]
    return StageJob(job["spec"], job_status(job), ours, leaving, next(iter(reports), None))
