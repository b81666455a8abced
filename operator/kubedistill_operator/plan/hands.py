"""What somebody else did to our children: edits, and what was deleted under pods that need it."""

from __future__ import annotations

from kubedistill_api.names import ROLE_STUDENT

from kubedistill_operator.plan.actions import (
    DeletePod,
    Inputs,
    RestoreInputs,
    RestoreService,
    ScaleBatchJob,
    SuspendBatchJob,
)
from kubedistill_operator.plan.draft import Draft
from kubedistill_operator.plan.views import BatchJobView, PodView


def edited(batch_job: BatchJobView, nodes: int) -> str:
    """What was changed of a gang's Job so that its pods are not all there, or too many; or nothing.

    More `parallelism` than `completions` makes no pod. More of both makes ranks beyond the world.
    """
    if batch_job.suspended:
        return "somebody suspended its Job (spec.suspend of the DistillationJob is false)"
    completions, parallelism = batch_job.completions, batch_job.parallelism
    field, value = "", nodes
    if completions is not None and completions != nodes:
        field, value = "completions", completions
    elif parallelism is not None and parallelism < nodes:
        field, value = "parallelism", parallelism
    return f"somebody set {field} of its Job to {value}; the gang has {nodes} pods" if field else ""


def mend_job(draft: Draft, batch_job: BatchJobView, *, suspend: bool) -> None:
    """A Job whose pods are independent goes on as it was: not suspended, not scaled to nothing."""
    if batch_job.deleting_since or batch_job.finished:
        return
    if batch_job.suspended != suspend:
        draft.act(SuspendBatchJob(batch_job.name, suspend))
    if batch_job.parallelism == 0:
        draft.act(ScaleBatchJob(batch_job.name, max(1, batch_job.completions or 1)))


def restore_inputs(
    draft: Draft, role: str, pods: list[PodView], attempt: int = 0, inputs: Inputs | None = None
) -> None:
    """Look after the ConfigMap and Service of pods that have a place and do not start."""
    check = draft.timing.start_check
    waiting = [p for p in pods if p.active and p.placed and p.placed_at and p.phase == "Pending"]
    if not waiting or any(p.deleting for p in waiting):
        return
    waited = max((draft.now - p.placed_at).total_seconds() for p in waiting if p.placed_at)
    if waited >= check:
        draft.act(RestoreInputs(role, attempt if role == ROLE_STUDENT else 0, inputs))
    draft.look_again(check if waited >= check else check - waited)


def restore_service(draft: Draft, pods: list[PodView]) -> None:
    """Look after the Service of pods that run: ranks that come back in them need its names."""
    runs = any(p.active and p.phase == "Running" and not p.deleting for p in pods)
    if draft.seen.service_due and runs:
        draft.act(RestoreService())


def delete_orphans(draft: Draft) -> None:
    """Pods without an owner, as a Job leaves them that was deleted with `--cascade=orphan`."""
    for pod in draft.seen.pods:
        if not pod.gone and not pod.owned and not pod.deleting:
            draft.act(DeletePod(pod.name, pod.uid))
