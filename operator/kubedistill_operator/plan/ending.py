"""The end of an attempt: decided here, or come about by itself; over when its pods are."""

from __future__ import annotations

from kubedistill_api import reasons
from kubedistill_api.names import ROLE_STUDENT
from kubedistill_api.status import Attempt

from kubedistill_operator.plan import shape
from kubedistill_operator.plan.actions import AbandonPod, DeleteBatchJob
from kubedistill_operator.plan.draft import Draft, Pass
from kubedistill_operator.plan.exits import Verdict, judge_stopped
from kubedistill_operator.plan.reporting import apply_report
from kubedistill_operator.plan.times import format_time
from kubedistill_operator.plan.views import BatchJobView, PodView

_MESSAGE_LIMIT = 1000


def observed(draft: Draft, attempt: Attempt) -> tuple[BatchJobView | None, list[PodView]]:
    """An attempt's Job and pods."""
    name = draft.attempt_name(attempt.number)
    return draft.seen.batch_jobs.get(name), draft.seen.pods_of(ROLE_STUDENT, attempt.number)


def over(draft: Draft, batch_job: BatchJobView | None, pods: list[PodView]) -> bool:
    """Whether an ending attempt's pods are gone or done, or were waited for long enough."""
    if batch_job is None or batch_job.finished:
        if not any(p.active for p in pods):
            return True
    elif not batch_job.deleting_since and pods and not any(p.active for p in pods):
        return False  # the Job controller is about to say so
    since = [t for p in pods for t in (p.finished_at, p.deleting_since) if t]
    if batch_job is not None:
        since += [t for t in (batch_job.deleting_since, batch_job.finished_at) if t]
    # Each has its own grace from when it was asked: one that is lost may have been asked long before.
    asked = [p.deleting_since for p in pods if p.active and p.deleting_since]
    if not since:
        draft.look_again(draft.timing.poll)
        return False
    # A Job's deletionTimestamp is when deletion was asked for; pods get their grace from then.
    grace = max([draft.timing.grace, *(p.grace_seconds for p in pods)])
    limit = grace + draft.timing.margin
    waited = (draft.now - max(asked, default=min(since))).total_seconds()
    if waited < limit:
        draft.look_again(limit - waited)
        return False
    return True


def lost_with_node(
    draft: Draft, pods: list[PodView], margin: float = 0.0
) -> tuple[PodView, str] | None:
    """A pod that is lost with its node, which cannot say so, and that in words.

    Kubernetes gives up the node's pods, and they stay: their Job would go on when they have ended.
    They get their grace, and `margin` seconds more.
    """
    for pod in pods:
        if not (pod.active and pod.disrupted and pod.deleting_since):
            continue
        left = pod.grace_seconds + margin - (draft.now - pod.deleting_since).total_seconds()
        if left < 0:
            return pod, f"pod {pod.name} was evicted and does not end: its node is lost"
        draft.look_again(left + 1.0)
    return None


def give_up_lost(draft: Draft, pods: list[PodView]) -> tuple[str, str] | None:
    """(reason, message) of a pod that is being evicted; one that is lost with its node is given up.

    Of pods that stand alone: their Job makes another one then. Two of a kind do no harm to each
    other, should a lost one wake.
    """
    lost = lost_with_node(draft, pods, draft.timing.margin)
    if lost is not None:
        pod, text = lost
        draft.act(AbandonPod(pod.name, pod.uid))
        return reasons.DISRUPTED, f"{text}, and another one takes its place"
    for pod in pods:
        if pod.active and pod.disrupted and pod.deleting_since:
            text = f"pod {pod.name} was evicted and has not ended yet; another one follows it"
            return reasons.DISRUPTED, text
    return None


def stop(step: Pass, verdict: Verdict) -> None:
    """Decide to end the attempt; its pods get SIGTERM and their grace."""
    draft = step.draft
    attempt = draft.change_attempt(
        reason=verdict.reason, message=verdict.message, charged=verdict.charged
    )
    draft.tell(
        verdict.reason, f"attempt {attempt.number} is ended: {verdict.message}",
        warning=verdict.charged,
    )  # fmt: skip
    wind_down(draft)


def stop_attempt(draft: Draft, reason: str, message: str) -> None:
    """End the open attempt, if there is one, because the whole job ends."""
    attempt = draft.attempt
    if attempt is not None and not attempt.end_time and not attempt.reason:
        draft.change_attempt(reason=reason, message=message[:_MESSAGE_LIMIT])


def wind_down(draft: Draft) -> None:
    """Delete the Job of an attempt that is to end, and close the attempt once its pods are gone."""
    attempt = draft.attempt
    if attempt is None or attempt.end_time or not attempt.reason:
        return
    batch_job, pods = observed(draft, attempt)
    if batch_job is not None and not batch_job.deleting_since and not batch_job.finished:
        draft.act(DeleteBatchJob(batch_job.name))
        if attempt.reason in (reasons.INTERRUPTED, reasons.GRACEFUL_CHECKPOINT):
            why = reasons.IS_SUSPENDED if draft.seen.spec.get("suspend") else attempt.reason
            draft.set(reasons.RUNNING, "False", why, "the pods commit and end")
        else:
            draft.set(reasons.RUNNING, "False", attempt.reason, "the pods end")
        return
    if not over(draft, batch_job, pods):
        return
    take_last_report(draft, attempt, pods)
    verdict = judge_stopped(pods, attempt.reason, attempt.message, charged=attempt.charged)
    draft.change_attempt(
        end_time=format_time(draft.now), reason=verdict.reason, message=verdict.message
    )


def take_last_report(draft: Draft, attempt: Attempt, pods: list[PodView]) -> None:
    """What an attempt's pods said of its progress as they ended."""
    for pod in pods:
        outcome = pod.outcome()
        if outcome is not None and outcome.progress is not None:
            apply_report(draft, draft.attempt or attempt, outcome.progress)


def shrunk(step: Pass, attempt: Attempt, verdict: Verdict) -> Verdict:
    """Of an attempt that ran out of memory: the first time, and where it can, a smaller micro-batch.

    Then the end is free, since the next attempt is another one. A second time it is a failure.
    """
    draft, spec = step.draft, step.spec
    if verdict.reason != reasons.OUT_OF_MEMORY or spec.training.on_out_of_memory != "Shrink":
        return verdict
    limit = draft.status.micro_batch_limit
    if limit:
        text = f"; with a micro-batch of {limit}, made smaller before, too"
        return _adding(verdict, text, charged=True)
    smaller = shape.smaller_micro_batch(spec, attempt, limit)
    if smaller is None:
        text = "; its ranks take 1 sequence at once already, so the micro-batch cannot shrink"
        return _adding(verdict, text, charged=True)
    nodes = shape.nodes_of(spec, attempt)
    present = attempt.micro_batch_size or shape.micro_batch(spec, nodes)
    draft.update(micro_batch_limit=smaller)
    text = (
        f"; the next attempt's ranks take {smaller} in place of {present} sequences at once "
        "(training.onOutOfMemory: Shrink)"
    )
    return _adding(verdict, text, charged=False)


def _adding(verdict: Verdict, text: str, *, charged: bool) -> Verdict:
    message = verdict.message[: _MESSAGE_LIMIT - len(text)] + text
    return Verdict(verdict.reason, message, retry=True, charged=charged)
