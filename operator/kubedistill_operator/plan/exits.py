"""Which pod's end explains an attempt's end, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from kubedistill_api import reasons
from kubedistill_api.exit_codes import ExitCode, policy
from kubedistill_api.runspec import Outcome

from kubedistill_operator.plan.draft import Draft
from kubedistill_operator.plan.views import BatchJobView, PodView

_SIGKILL, _SIGTERM = 137, 143
_UNKNOWN = "ContainerStatusUnknown"
_CONSEQUENCES = frozenset(
    {ExitCode.PEER_LOST, ExitCode.FENCED, ExitCode.GRACEFUL_CHECKPOINT, ExitCode.INTERRUPTED}
)
"""Ends that follow from another end: of a peer, of the Job, of a newer attempt."""
_LATEST = datetime.max.replace(tzinfo=UTC)
_MESSAGE_LIMIT = 1000


@dataclass(frozen=True)
class Verdict:
    """Why an attempt ended, whether another may follow, and whether it is charged for."""

    reason: str
    message: str
    retry: bool
    charged: bool


def judge(pods: Sequence[PodView], job_message: str = "", *, job_deleted: bool = False) -> Verdict:
    """The verdict over a gang whose attempt did not succeed. `pods` include those that are gone.

    `job_deleted`: somebody deleted its Job, which had not failed.
    """
    for pod in pods:
        if pod.disrupted and pod.exit_code != 0:
            text = f"pod {pod.name} was evicted or preempted"
            return Verdict(reasons.DISRUPTED, _with(text, pod), retry=True, charged=False)
    unrun = [pod for pod in pods if _deleted_unrun(pod)]
    ended = [pod for pod in pods if pod.exit_code not in (None, 0) and pod not in unrun]
    if ended:
        return _of_pod(min(ended, key=_rank))
    if job_deleted and all(pod.exit_code is None or pod in unrun for pod in pods):
        text = "the attempt's Job was deleted before its pods said why they ended"
        return Verdict(reasons.INTERRUPTED, text, retry=True, charged=False)
    if pods and len(unrun) == len(pods):
        text = f"pod {unrun[0].name} was deleted before its container ran"
        return Verdict(reasons.INTERRUPTED, text, retry=True, charged=False)
    for pod in pods:
        if pod.phase == "Failed":
            text = f"pod {pod.name} failed: {pod.end_reason or 'no reason given'}"
            return Verdict(reasons.ERROR, _with(text, pod), retry=True, charged=True)
    for pod in pods:
        if pod.gone or pod.deleting:
            text = f"pod {pod.name} was deleted or its node was lost"
            return Verdict(reasons.ERROR, text, retry=True, charged=True)
    text = job_message or "the attempt's Job or pods were deleted before they said why they ended"
    return Verdict(reasons.ERROR, text[:_MESSAGE_LIMIT], retry=True, charged=True)


def _deleted_unrun(pod: PodView) -> bool:
    """Whether a pod was deleted before its container ran: what never began has not failed.

    Of a container that it had not created, a kubelet then writes that its status is unknown, and 137.
    """
    if not (pod.gone or pod.deleting):
        return False
    return pod.end_reason == _UNKNOWN or (pod.phase == "Pending" and pod.exit_code is None)


def judge_stopped(pods: Sequence[PodView], reason: str, message: str, *, charged: bool) -> Verdict:
    """The verdict over a gang that the operator itself stopped."""
    if reason == reasons.INTERRUPTED and any(
        pod.exit_code == ExitCode.GRACEFUL_CHECKPOINT for pod in pods
    ):
        reason, message = reasons.GRACEFUL_CHECKPOINT, f"{message}; its state is committed"
    return Verdict(reason, message, retry=True, charged=charged)


def _rank(pod: PodView) -> tuple[bool, datetime, bool, int]:
    memory = pod.end_reason == "OOMKilled"
    # A pod that nobody had asked to go was killed by itself, and others were asked because of it.
    killed = pod.exit_code in (_SIGKILL, _SIGTERM) and not memory and pod.deleting
    consequence = killed or pod.exit_code in _CONSEQUENCES
    # Times are in whole seconds: of two in one second the one that has a cause explains the other.
    vague = not memory and policy(pod.exit_code).reason == reasons.ERROR
    return consequence, pod.finished_at or _LATEST, vague, pod.index


def _of_pod(pod: PodView) -> Verdict:
    code: int | None = pod.exit_code
    if pod.end_reason == "OOMKilled":
        code = ExitCode.OUT_OF_MEMORY
    rule = policy(code)
    text = f"pod {pod.name} ended with exit code {pod.exit_code}"
    if pod.end_reason == "OOMKilled":
        text = f"pod {pod.name} was killed: out of memory"
    elif pod.exit_code in (_SIGKILL, _SIGTERM):
        text = f"pod {pod.name} was killed (exit code {pod.exit_code})"
    return Verdict(rule.reason, _with(text, pod), retry=rule.retry, charged=rule.charged)


def _with(text: str, pod: PodView) -> str:
    last = last_words(pod)
    return (f"{text}: {last}" if last else text)[:_MESSAGE_LIMIT]


def last_words(pod: PodView) -> str:
    """What the pod said at its end, as sentences."""
    outcome = pod.outcome()
    if outcome is None:
        return pod.end_message.strip()[:500]
    return outcome_text(outcome)


def outcome_text(outcome: Outcome) -> str:
    """Problems as sentences, or else the message."""
    return "; ".join(p.sentence() for p in outcome.problems) or outcome.message


def pod_trouble(pods: Sequence[PodView]) -> tuple[str, str] | None:
    """(reason, message) of a pod that cannot start, if there is one."""
    for pod in pods:
        if pod.active and pod.unschedulable:
            return reasons.UNSCHEDULABLE, f"pod {pod.name}: {pod.unschedulable}"
    for pod in pods:
        if pod.active and pod.waiting_reason in _NOT_STARTING:
            text = f"pod {pod.name}: {pod.waiting_reason}: {pod.waiting_message}"
            return reasons.POD_NOT_STARTING, text
    return None


def no_pods(
    draft: Draft, batch_job: BatchJobView, pods: Sequence[PodView], wanted: int = 1
) -> tuple[str, str] | None:
    """(reason, message) of a Job that makes fewer pods than wanted: only its events say why.

    They are not read by us. What of its pods we do not see, it says itself that it has.
    """
    made = max(batch_job.active, sum(not p.gone for p in pods))
    if made >= wanted or batch_job.created_at is None:
        return None
    waited = (draft.now - batch_job.created_at).total_seconds()
    if waited < _NO_PODS_SECONDS:
        draft.look_again(_NO_PODS_SECONDS - waited)
        return None
    text = (
        f"Job {batch_job.name} has made {made or 'none'} of {wanted} pods for "
        f"{_NO_PODS_SECONDS:.0f} s: `kubectl describe job {batch_job.name}` says why (a quota, an "
        "admission webhook, Pod Security)"
    )
    return reasons.POD_NOT_STARTING, text


_NO_PODS_SECONDS = 30.0
_NOT_STARTING = frozenset(
    {
        "ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull",
        "CreateContainerConfigError", "CreateContainerError", "RunContainerError",
    }
)  # fmt: skip


def secret_missing(pods: Sequence[PodView]) -> str:
    """The kubelet's words of a Secret (or a key of it) that a pod waits for; empty where none does."""
    for pod in pods:
        waits = pod.active and pod.waiting_reason == "CreateContainerConfigError"
        if waits and "secret" in pod.waiting_message.lower():
            return pod.waiting_message
    return ""
