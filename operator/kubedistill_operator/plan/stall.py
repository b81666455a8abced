"""Whether a gang stands still: idle GPUs are what costs most."""

from __future__ import annotations

from kubedistill_api.names import ROLE_STUDENT, START_SECONDS
from kubedistill_api.status import Attempt

from kubedistill_operator.plan.draft import Contact, Pass
from kubedistill_operator.plan.times import parse_time

PHASES_AFTER_TRAINING = ("Evaluating", "Exporting", "Done")


def stall(step: Pass, attempt: Attempt) -> str | None:
    """Why the gang counts as stalled, if it does."""
    draft, contact = step.draft, step.seen.rank0
    limit = step.spec.stall_timeout_seconds
    if contact is None or contact.report.attempt != attempt.number:
        return _silent(step, attempt)
    silence = (draft.now - contact.reached_at).total_seconds()
    if silence > limit:
        return f"rank 0 did not answer for {limit} s"
    report = contact.report
    if report.last_step_time is None or report.phase in PHASES_AFTER_TRAINING:
        return None
    if draft.now.timestamp() - _stepped_at(step, attempt, contact, report.last_step_time) > limit:
        return f"no step for {limit} s; the last one was {report.step:,}"
    return None


def _stepped_at(step: Pass, attempt: Attempt, contact: Contact, reported: float) -> float:
    """When the latest step was, by the clock of plans: clocks of nodes may be an hour apart.

    After a restart of the operator the status knows since when nothing changed. It does not know of
    signs of life between steps.
    """
    if contact.stepped_at is None:
        return reported
    if contact.moved:
        return contact.stepped_at.timestamp()
    seen, progress = contact.stepped_at, step.draft.status.progress
    unchanged = parse_time(progress.last_updated_time) if progress else None
    started = parse_time(attempt.start_time)
    if unchanged and started and started <= unchanged < seen:
        return unchanged.timestamp()
    return seen.timestamp()


def _never_answered(step: Pass, attempt: Attempt) -> str | None:
    asked = step.seen.unanswered
    patience = max(step.spec.stall_timeout_seconds, START_SECONDS)
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
    """After a restart of the operator only the status knows that rank 0 ever answered."""
    progress, limit = step.draft.status.progress, step.spec.stall_timeout_seconds
    if progress is None or attempt.last_step == 0:
        return _never_answered(step, attempt)
    reached = parse_time(progress.last_updated_time)
    started = parse_time(attempt.start_time)
    if reached is None or started is None or reached < started:
        return _never_answered(step, attempt)
    if (step.draft.now - reached).total_seconds() > limit:
        return f"rank 0 did not answer for {limit} s"
    return None
