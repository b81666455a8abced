"""What a plan needs to know of Pods and Jobs, read from the API's JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from kubedistill_api.names import CONTAINER, LABEL_ATTEMPT, LABEL_ROLE
from kubedistill_api.runspec import Outcome

from kubedistill_operator.plan.finite import finite
from kubedistill_operator.plan.times import parse_time

INDEX_ANNOTATION = "batch.kubernetes.io/job-completion-index"
GENERATION_ANNOTATION = "kubedistill.dev/generation"
TRY_ANNOTATION = "kubedistill.dev/try"
FAILURES_ANNOTATION = "batch.kubernetes.io/job-index-failure-count"


@dataclass(frozen=True)
class PodView:
    """One pod as observed; `gone` pods were deleted and are remembered for what they said."""

    name: str
    role: str
    attempt: int = 0
    index: int = 0
    ip: str = ""
    phase: str = "Pending"
    exit_code: int | None = None
    end_reason: str = ""
    end_message: str = ""
    finished_at: datetime | None = None
    disrupted: bool = False
    placed: bool = False
    placed_at: datetime | None = None
    """When the scheduler last changed its mind about it: found a place, or found none."""
    unschedulable: str = ""
    waiting_reason: str = ""
    waiting_message: str = ""
    deleting: bool = False
    deleting_since: datetime | None = None
    grace_seconds: int = 0
    owned: bool = True
    """Whether it has an owner that takes it along: an orphan is left to us."""
    owner_uid: str = ""
    uid: str = ""
    unreachable: bool = False
    """Whether Kubernetes hears nothing of its node, which may hold it for minutes more."""
    failures_before: int = 0
    """Pods of the same index of its Job that failed before it, and count."""
    gone: bool = False

    @property
    def active(self) -> bool:
        """Whether its processes may still run."""
        return not self.gone and self.phase not in ("Succeeded", "Failed")

    @property
    def failed(self) -> bool:
        return self.phase == "Failed" or self.exit_code not in (None, 0)

    def outcome(self) -> Outcome | None:
        """The trainer's last word, if it left one."""
        try:
            return Outcome.model_validate(finite(json.loads(self.end_message)))
        except ValueError:  # no JSON, or not of this shape
            return None


@dataclass(frozen=True)
class BatchJobView:
    """One Job as observed."""

    name: str
    role: str
    attempt: int = 0
    complete: bool = False
    failed: bool = False
    failing: bool = False
    failure_message: str = ""
    suspended: bool = False
    deleting_since: datetime | None = None
    finished_at: datetime | None = None
    created_at: datetime | None = None
    generation: int = 0
    tries: int = 0
    parallelism: int | None = None
    completions: int | None = None
    active: int = 0
    """Pods that it says it has; more than we see means that some are out of sight."""
    succeeded: int = 0
    """Pods (of an indexed Job: indexes) that are done, also where the pods were removed since."""
    uid: str = ""

    def owns(self, pod: PodView) -> bool:
        """Whether a pod is of this Job, and not of one before it that had the same name."""
        return not (self.uid and pod.owner_uid) or self.uid == pod.owner_uid

    @property
    def finished(self) -> bool:
        return self.complete or self.failed


def _conditions(raw: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    found = raw.get("status", {}).get("conditions") or []
    return {c["type"]: c for c in found if c.get("status") == "True"}


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0


def pod_view(raw: Mapping[str, Any], *, gone: bool = False) -> PodView:
    """Read a Pod; only the trainer's container is looked at."""
    metadata, status = raw["metadata"], raw.get("status", {})
    labels = metadata.get("labels", {})
    state: Mapping[str, Any] = {}
    for container in status.get("containerStatuses") or []:
        if container.get("name") == CONTAINER:
            state = container.get("state", {})
    ended = state.get("terminated") or {}
    waiting = state.get("waiting") or {}
    scheduled: Mapping[str, Any] = next(
        (c for c in status.get("conditions") or [] if c["type"] == "PodScheduled"), {}
    )
    unschedulable = scheduled.get("status") == "False" and (
        scheduled.get("reason") == "Unschedulable"
    )
    return PodView(
        name=metadata["name"],
        role=labels.get(LABEL_ROLE, ""),
        attempt=_number(labels.get(LABEL_ATTEMPT)),
        index=_number(metadata.get("annotations", {}).get(INDEX_ANNOTATION)),
        ip=status.get("podIP", ""),
        phase=status.get("phase", "Pending"),
        exit_code=ended.get("exitCode"),
        end_reason=ended.get("reason") or status.get("reason") or "",
        end_message=ended.get("message") or status.get("message") or "",
        finished_at=parse_time(ended.get("finishedAt")),
        disrupted="DisruptionTarget" in _conditions(raw),
        unschedulable=scheduled.get("message", "") if unschedulable else "",
        waiting_reason=waiting.get("reason", ""),
        waiting_message=waiting.get("message", ""),
        placed=scheduled.get("status") == "True",
        placed_at=parse_time(scheduled.get("lastTransitionTime")),
        deleting=bool(metadata.get("deletionTimestamp")),
        deleting_since=_asked_to_go(metadata),
        grace_seconds=int(raw.get("spec", {}).get("terminationGracePeriodSeconds") or 0),
        owned=bool(metadata.get("ownerReferences")),
        owner_uid=next((o.get("uid", "") for o in metadata.get("ownerReferences") or []), ""),
        uid=metadata.get("uid", ""),
        unreachable=_unreachable(raw),
        failures_before=_number(metadata.get("annotations", {}).get(FAILURES_ANNOTATION)),
        gone=gone,
    )


def _unreachable(raw: Mapping[str, Any]) -> bool:
    """Whether somebody else than the pod's kubelet says that it is not ready.

    Of a node that is silent the control plane sets `Ready` alone. A kubelet derives it from
    `ContainersReady` and from the pod's own gates.
    """
    status = raw.get("status", {})
    if raw.get("spec", {}).get("readinessGates") or status.get("phase") != "Running":
        return False
    found = {c["type"]: c.get("status") for c in status.get("conditions") or []}
    return found.get("ContainersReady") == "True" and found.get("Ready") in ("False", "Unknown")


def _asked_to_go(metadata: Mapping[str, Any]) -> datetime | None:
    """When a pod's deletion was asked for: its deletionTimestamp is when its grace is over."""
    over = parse_time(metadata.get("deletionTimestamp"))
    grace = metadata.get("deletionGracePeriodSeconds") or 0
    return over - timedelta(seconds=grace) if over else None


def batch_job_view(raw: Mapping[str, Any]) -> BatchJobView:
    """Read a Job."""
    metadata, spec = raw["metadata"], raw.get("spec", {})
    labels, annotations = metadata.get("labels", {}), metadata.get("annotations", {})
    conditions = _conditions(raw)
    failure = conditions.get("Failed") or conditions.get("FailureTarget") or {}
    end = conditions.get("Failed") or conditions.get("Complete") or {}
    return BatchJobView(
        name=metadata["name"],
        role=labels.get(LABEL_ROLE, ""),
        attempt=_number(labels.get(LABEL_ATTEMPT)),
        complete="Complete" in conditions,
        failed="Failed" in conditions,
        failing="FailureTarget" in conditions or "Failed" in conditions,
        failure_message=failure.get("message", ""),
        suspended=bool(spec.get("suspend")),
        deleting_since=parse_time(metadata.get("deletionTimestamp")),
        finished_at=parse_time(end.get("lastTransitionTime")),
        created_at=parse_time(metadata.get("creationTimestamp")),
        generation=_number(annotations.get(GENERATION_ANNOTATION)),
        tries=_number(annotations.get(TRY_ANNOTATION)),
        parallelism=spec.get("parallelism"),
        completions=spec.get("completions"),
        active=raw.get("status", {}).get("active") or 0,
        succeeded=raw.get("status", {}).get("succeeded") or 0,
        uid=metadata.get("uid", ""),
    )
