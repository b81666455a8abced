"""Whether a gang stands still: idle GPUs are what costs most."""

from __future__ import annotations

from datetime import datetime

from kubedistill_api import reasons
from kubedistill_api.names import ROLE_STUDENT, START_SECONDS
from kubedistill_api.status import Attempt

from kubedistill_operator.plan.draft import Contact, Pass
from kubedistill_operator.plan.exits import Verdict
from kubedistill_operator.plan.times import parse_time
from kubedistill_operator.plan.views import PodView

PHASES_AFTER_TRAINING = ("Evaluating", "Exporting", "Done")
_OWN_LOOK_SECONDS = 30.0
"""What another operator saw counts once this one has looked for as long, or for the limit."""


def stall(step: Pass, attempt: Attempt) -> str | None:
    """Why the gang counts as stalled, if it does."""
    draft, contact = step.draft, step.seen.rank0
    limit = step.spec.stall_timeout_seconds
    if contact is None or contact.report.attempt != attempt.number:
        return _silent(step, attempt)
    if not answers(step):
        return f"rank 0 did not answer for {limit} s"
    report = contact.report
    if report.last_step_time is None or report.phase in PHASES_AFTER_TRAINING:
        return None
    if report.phase == "Starting":
        return _waits_for_peers(step, contact)
    if draft.now.timestamp() - _stepped_at(step, attempt, contact, report.last_step_time) > limit:
        return f"no step for {limit} s; the last one was {report.step:,}"
    return None


def _waits_for_peers(step: Pass, contact: Contact) -> str | None:
    """Of a gang that starts: rank 0 has loaded what it needs, and its peers have not for too long."""
    patience = _start_patience(step)
    since = contact.stepped_at
    if since is None or (step.draft.now - since).total_seconds() <= patience:
        return None
    return f"rank 0 has been ready for {patience} s, and waits for another rank to load"


def _start_patience(step: Pass) -> int:
    return max(step.spec.stall_timeout_seconds, START_SECONDS)


def answers(step: Pass) -> bool:
    """Whether rank 0 has answered within the limit."""
    contact, limit = step.seen.rank0, step.spec.stall_timeout_seconds
    return contact is not None and (step.draft.now - contact.reached_at).total_seconds() <= limit


def stalled(pods: list[PodView], why: str) -> Verdict:
    """The verdict over a gang that stands still.

    Where Kubernetes hears nothing of a pod's node it is the node that fails. Only minutes later the
    pod is given up: a stall timeout may be shorter.
    """
    for pod in pods:
        if pod.active and pod.unreachable:
            text = f"the node of pod {pod.name} is not ready, and {why}"
            return Verdict(reasons.DISRUPTED, text, retry=True, charged=False)
    return Verdict(reasons.STALLED, why, retry=True, charged=True)


def _stepped_at(step: Pass, attempt: Attempt, contact: Contact, reported: float) -> float:
    """When the latest step was, by the clock of plans: clocks of nodes may be an hour apart.

    After a restart of the operator the status knows since when nothing changed. It does not know of
    signs of life between steps: these are waited for first.
    """
    if contact.stepped_at is None:
        return reported
    if contact.moved:
        return contact.stepped_at.timestamp()
    seen, progress = contact.stepped_at, step.draft.status.progress
    if not _looked_for_itself(step, seen):
        return seen.timestamp()
    unchanged = parse_time(progress.last_updated_time) if progress else None
    started = parse_time(attempt.start_time)
    if unchanged and started and started <= unchanged < seen:
        return unchanged.timestamp()
    return seen.timestamp()


def _looked_for_itself(step: Pass, since: datetime) -> bool:
    patience = min(step.spec.stall_timeout_seconds, _OWN_LOOK_SECONDS)
    return (step.draft.now - since).total_seconds() >= patience


def _never_answered(step: Pass, attempt: Attempt) -> str | None:
    asked = step.seen.unanswered
    patience = _start_patience(step)
    running = [
        pod.name
        for pod in step.seen.pods_of(ROLE_STUDENT, attempt.number)
        if pod.active and pod.phase == "Running"
    ]
    if asked is None or asked.pod not in running:
        return None
    if (step.draft.now - asked.since).total_seconds() > patience:
        return f"its pod runs, and rank 0 has not answered in {patience} s"
    return None


def _silent(step: Pass, attempt: Attempt) -> str | None:
    """After a restart of the operator only the status knows that rank 0 ever answered.

    While the operator was away nobody asked, and one question may be lost.
    """
    progress, limit = step.draft.status.progress, step.spec.stall_timeout_seconds
    if progress is None or attempt.last_step == 0:
        return _never_answered(step, attempt)
    reached = parse_time(progress.last_updated_time)
    started = parse_time(attempt.start_time)
    if reached is None or started is None or reached < started:
        return _never_answered(step, attempt)
    asked = step.seen.unanswered
    if asked is None or not _looked_for_itself(step, asked.since):
        return None
    if (step.draft.now - reached).total_seconds() > limit:
        return f"rank 0 did not answer for {limit} s"
    return None
