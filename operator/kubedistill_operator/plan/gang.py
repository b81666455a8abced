"""The student's gang: one attempt at a time, each under its own fence.

An attempt is open from its entry in status.attempts (written before its Job exists) until its
`endTime`. A `reason` without an `endTime` means that the operator decided to end it and waits for
its pods.
"""

from __future__ import annotations

from kubedistill_api import reasons
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.names import ROLE_STUDENT, ROLE_TEACHER
from kubedistill_api.runspec import Outcome
from kubedistill_api.status import Attempt

from kubedistill_operator.plan import gates, hands, restart, shape, teacher
from kubedistill_operator.plan.actions import CreateGang
from kubedistill_operator.plan.draft import Draft, Pass
from kubedistill_operator.plan.ending import (
    lost_with_node,
    observed,
    over,
    shrunk,
    stop,
    take_last_report,
    wind_down,
)
from kubedistill_operator.plan.exits import Verdict, judge, no_pods, pod_trouble
from kubedistill_operator.plan.reporting import Standing, apply_report
from kubedistill_operator.plan.room import in_vain, shortage
from kubedistill_operator.plan.stall import PHASES_AFTER_TRAINING, answers, stall, stalled
from kubedistill_operator.plan.times import format_time, seconds_since
from kubedistill_operator.plan.views import BatchJobView, PodView

_STATES = {
    "Compressing": reasons.COMPRESSING,
    **dict.fromkeys(PHASES_AFTER_TRAINING, reasons.EVALUATING),
}


def run_gang(step: Pass, *, teacher_ready: bool) -> None:
    """Keep one attempt going, or start the next, or end the job."""
    attempt = step.draft.attempt
    if attempt is None or attempt.end_time:
        _between(step, attempt, teacher_ready=teacher_ready)
    else:
        _during(step, attempt)


def _during(step: Pass, attempt: Attempt) -> None:
    draft, seen = step.draft, step.seen
    batch_job, pods = observed(draft, attempt)
    if seen.rank0 is not None:
        apply_report(draft, attempt, seen.rank0.report)
    if _succeeded(step, batch_job, pods):
        return
    edit = hands.edited(batch_job, shape.nodes_of(step.spec, attempt)) if batch_job else ""
    if attempt.reason:
        wind_down(draft)
        if draft.attempt and draft.attempt.end_time:
            _ended(step)
    elif batch_job is None:
        _without_job(step, attempt, pods)
    elif not batch_job.failing and not batch_job.deleting_since and edit:
        # Before its pods' ends are looked at: a suspended Job never says that it has failed.
        stop(step, Verdict(reasons.INTERRUPTED, edit, retry=True, charged=False))
    elif batch_job.failing or batch_job.deleting_since or any(p.failed for p in pods):
        if over(draft, batch_job, pods):
            deleted = bool(batch_job.deleting_since) and not batch_job.failing
            _finish(step, judge(pods, batch_job.failure_message, job_deleted=deleted))
        else:
            _say_restarting(draft, "the attempt's other pods end")
    elif step.spec.suspend:
        stop(step, Verdict(reasons.INTERRUPTED, "suspended", retry=True, charged=False))
    elif (lost := lost_with_node(draft, pods)) is not None:
        stop(step, Verdict(reasons.DISRUPTED, lost[1], retry=True, charged=False))
    elif (still := stall(step, attempt)) is not None:
        verdict = stalled(pods, still)
        # What waits for the stream answers meanwhile; the stream's reader would say so, but later.
        stop(step, teacher.without_writers(step, verdict) if answers(step) else verdict)
    else:
        _going(step, attempt, batch_job, pods)


def _without_job(step: Pass, attempt: Attempt, pods: list[PodView]) -> None:
    """An open attempt whose Job is not there: not created yet, or deleted by somebody."""
    draft = step.draft
    if not _was_there(step, attempt, pods):
        draft.act(CreateGang(attempt.number, attempt.fence))
        _starting(draft, attempt, "its pods are asked for")
    elif over(draft, None, pods):
        _finish(step, judge(pods, job_deleted=True))
    else:
        # Pods that still run would take the GPUs of the next attempt, and its place in the store.
        _say_restarting(draft, "the attempt's Job was deleted; its pods end")


def _was_there(step: Pass, attempt: Attempt, pods: list[PodView]) -> bool:
    """Whether a missing Job has been there: then it was deleted, and is not to be created."""
    name = step.draft.attempt_name(attempt.number)
    ran = attempt.last_step > 0 or attempt.resumed_from_step is not None
    return ran or bool(pods) or name in step.seen.deleted_batch_jobs


def _succeeded(step: Pass, batch_job: BatchJobView | None, pods: list[PodView]) -> bool:
    draft = step.draft
    done = batch_job.complete if batch_job else bool(pods) and all(p.exit_code == 0 for p in pods)
    if not done:
        return False
    first = sorted((p for p in pods if p.index == 0), key=lambda p: (p.exit_code != 0, p.gone))
    rank0 = first[0] if first else None
    outcome = rank0.outcome() if rank0 and rank0.exit_code == 0 else None
    if outcome is not None and outcome.model is not None:
        _complete(step, outcome)
    elif rank0 is not None and rank0.exit_code is None and not rank0.gone:
        draft.look_again(2.0)  # its end is on its way to us
    elif rank0 is not None and rank0.exit_code == 0:
        text = "rank 0 ended without saying where the model is"
        _finish(step, Verdict(reasons.ERROR, text, retry=True, charged=True))
    else:
        # Its pods, and so the model's digest, were never seen: run it again, it ends at once.
        text = "the pods were deleted before their outcome was read"
        _finish(step, Verdict(reasons.ERROR, text, retry=True, charged=True))
    return True


def take_success(step: Pass) -> bool:
    """Whether the student is there although a deadline is over: then the job is done."""
    attempt = step.draft.attempt
    if attempt is None or attempt.end_time or attempt.reason:
        return False
    for pod in observed(step.draft, attempt)[1]:
        outcome = pod.outcome() if (pod.index, pod.exit_code) == (0, 0) else None
        if outcome is not None and outcome.model is not None:
            _complete(step, outcome)
            return True
    return False


def _complete(step: Pass, outcome: Outcome) -> None:
    draft, attempt = step.draft, step.draft.attempt
    model = outcome.model
    if attempt is None or model is None:
        return
    if outcome.progress is not None:
        apply_report(draft, attempt, outcome.progress)
    now = format_time(draft.now)
    draft.change_attempt(end_time=now, reason=reasons.COMPLETED, message="")
    draft.update(model=model, metrics=outcome.metrics, weakest=outcome.weakest, completion_time=now)
    if draft.status.progress is not None:
        finished = draft.status.progress.model_copy(
            update={"percentage": 100, "estimated_remaining": ""}
        )
        draft.update(progress=finished)
    draft.set(reasons.RUNNING, "False", reasons.COMPLETED)
    draft.set(reasons.SUSPENDED, "False", reasons.NOT_SUSPENDED)
    gates.settle(step)


def _finish(step: Pass, verdict: Verdict) -> None:
    """Close an attempt that ended by itself."""
    draft, attempt = step.draft, step.draft.attempt
    if attempt is None:
        return
    pods = observed(draft, attempt)[1]
    take_last_report(draft, attempt, pods)
    verdict = in_vain(step, pods, shrunk(step, attempt, verdict))
    verdict = teacher.without_writers(step, verdict)
    draft.change_attempt(
        end_time=format_time(draft.now),
        reason=verdict.reason,
        message=verdict.message,
        charged=verdict.charged,
    )
    if not verdict.retry:
        if verdict.reason == reasons.RESUME_REFUSED:
            draft.set(reasons.CHECKPOINT_CURRENT, "False", verdict.reason, verdict.message)
        draft.fail(verdict.reason, verdict.message)
        return
    if verdict.reason == reasons.STREAM_DAMAGED:
        teacher.take_damage(draft)
    _ended(step)


def _ended(step: Pass) -> None:
    """Count a closed attempt and go on to what follows it."""
    draft, attempt = step.draft, step.draft.attempt
    if attempt is None:
        return
    if attempt.charged:
        # A commit beyond all before it sets the count to 0 when it is seen (plan/reporting.py).
        draft.update(failures=draft.status.failures + 1)
    text = f"attempt {attempt.number} ended ({attempt.reason}): {attempt.message}"
    draft.tell(attempt.reason, text, warning=attempt.charged)
    waits = attempt.reason in (reasons.STREAM_DAMAGED, reasons.STALLED)
    ready = not waits or teacher.run_teacher(step)
    _between(step, attempt, teacher_ready=ready)


def _between(step: Pass, last: Attempt | None, *, teacher_ready: bool) -> None:
    draft, failures = step.draft, step.draft.status.failures
    if failures > step.spec.backoff_limit and last is not None:
        draft.fail(
            reasons.BACKOFF_LIMIT_EXCEEDED,
            f"{failures} attempts in a row failed without progress (backoffLimit "
            f"{step.spec.backoff_limit}); the last one: {last.reason}: {last.message}",
        )
        return
    if step.spec.suspend:
        if any(pod.active for pod in step.seen.pods_of(ROLE_TEACHER)):
            draft.summary(reasons.IS_SUSPENDED, "the teacher's pods end")
        else:
            _suspended(draft)
        return
    draft.set(reasons.SUSPENDED, "False", reasons.NOT_SUSPENDED)
    if last is not None and _must_wait(step, last):
        return
    if not teacher_ready:
        if last is not None:
            text = f"attempt {last.number + 1} waits for the teacher"
            draft.set(reasons.RUNNING, "False", reasons.RESTARTING, text)
        return
    attempt = _next_attempt(step)
    draft.act(CreateGang(attempt.number, attempt.fence))
    _starting(draft, attempt, "its pods are asked for")
    _tell_start(draft, attempt, last)


def _next_attempt(step: Pass) -> Attempt:
    draft, spec, limit = step.draft, step.spec, step.draft.status.micro_batch_limit
    attempts = draft.status.attempts
    nodes = shape.next_nodes(spec, attempts, draft.now, draft.timing.elastic_wait)
    micro = spec.training.micro_batch_size
    if nodes or limit:
        micro = shape.micro_batch(spec, nodes or spec.workers.nodes, limit)
    return draft.add_attempt(nodes, 0 if micro == spec.training.micro_batch_size else micro)


def _must_wait(step: Pass, last: Attempt) -> bool:
    draft, seen = step.draft, step.seen
    failures = restart.waits_counted(draft.status.attempts, draft.status.failures)
    wait = restart.backoff_seconds(seen.uid, last.number, failures, draft.timing)
    left = wait - seconds_since(last.end_time, draft.now)
    if left <= 0:
        return False
    ends = last.reason + (f": {last.message}" if last.message else "")
    _say_restarting(
        draft, f"attempt {last.number + 1} follows after a wait; the last ended: {ends}"
    )
    draft.look_again(left)
    return True


def _say_restarting(draft: Draft, message: str) -> None:
    draft.set(reasons.RUNNING, "False", reasons.RESTARTING, message)
    draft.summary(reasons.RESTARTING, message)


def _suspended(draft: Draft) -> None:
    message = "spec.suspend is true"
    if draft.set(reasons.SUSPENDED, "True", reasons.IS_SUSPENDED, message):
        draft.tell(reasons.IS_SUSPENDED, "all pods are gone; the state is kept")
    draft.set(reasons.RUNNING, "False", reasons.IS_SUSPENDED)
    draft.summary(reasons.IS_SUSPENDED, message)


def _starting(draft: Draft, attempt: Attempt, message: str) -> None:
    text = f"attempt {attempt.number}: {message}"
    draft.set(reasons.RUNNING, "False", reasons.STARTING, text)
    draft.summary(reasons.RESTARTING if attempt.number > 1 else reasons.STARTING, text)


def _tell_start(draft: Draft, attempt: Attempt, last: Attempt | None) -> None:
    text = f"attempt {attempt.number} of the gang starts"
    if last is not None:
        step = draft.status.checkpoint.step if draft.status.checkpoint else 0
        place = f"from step {step:,}" if step else "from the beginning"
        text += f" {place} after {last.reason}: {last.message}"
    draft.tell("AttemptStarted", text)


def _going(step: Pass, attempt: Attempt, batch_job: BatchJobView, pods: list[PodView]) -> None:
    draft, contact = step.draft, step.seen.rank0
    draft.set(reasons.SUSPENDED, "False", reasons.NOT_SUSPENDED)
    hands.restore_inputs(draft, ROLE_STUDENT, pods, attempt.number)
    hands.restore_service(draft, pods)
    nodes = shape.nodes_of(step.spec, attempt)
    trouble = pod_trouble(pods) or no_pods(draft, batch_job, pods, nodes)
    if trouble:
        short = shortage(step, attempt, pods, trouble)
        if isinstance(short, Verdict):
            stop(step, short)
            return
        trouble = (trouble[0], trouble[1] + short)
        if draft.set(reasons.RUNNING, "False", *trouble):
            draft.tell(*trouble, warning=True)
        draft.summary(*trouble)
        return
    if any(p.active and p.phase == "Running" for p in pods):
        draft.look_again(draft.timing.poll)
    report = contact.report if contact else None
    if (
        report is None
        or report.attempt != attempt.number
        or report.phase in ("Starting", "Generating")
    ):
        if draft.conditions[reasons.RUNNING].status != "True":
            _starting(draft, attempt, "its pods start")
        return
    state = _STATES.get(report.phase, reasons.TRAINING)
    text = f"attempt {attempt.number}"
    if nodes < step.spec.workers.nodes:
        text += f" with {nodes} of {step.spec.workers.nodes} pods (workers.minNodes)"
    if attempt.resumed_from_step or report.resumed_from_step:
        text += f", resumed from step {report.resumed_from_step or attempt.resumed_from_step:,}"
    if draft.set(reasons.RUNNING, "True", state, text) and attempt.last_step == 0:
        draft.tell(state, text)
    draft.summary(state, text)
    if draft.conditions[reasons.CHECKPOINT_CURRENT].reason == reasons.PENDING:
        draft.set(reasons.CHECKPOINT_CURRENT, *_first_commit(step.spec))


def _first_commit(spec: DistillationJobSpec) -> Standing:
    """Of CheckpointCurrent, before there is a commit."""
    if not spec.trains:
        text = f"{spec.method} commits nothing on the way: what is interrupted begins anew"
        return "True", reasons.NOT_NEEDED, text
    text = f"the first commit comes after {_interval_text(spec.checkpoint.interval)}"
    return "Unknown", reasons.NO_CHECKPOINT_YET, text


def _interval_text(interval: int | str) -> str:
    return "a while" if interval == "Auto" else f"{interval} steps"
