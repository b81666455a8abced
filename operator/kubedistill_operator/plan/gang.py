"""The student's gang: one attempt at a time, each under its own fence.

An attempt is open from its entry in status.attempts (written before its Job exists) until its
`endTime`. A `reason` without an `endTime` means that the operator decided to end it and waits for
its pods.
"""

from __future__ import annotations

from kubedistill_api import reasons
from kubedistill_api.names import ROLE_STUDENT, ROLE_TEACHER
from kubedistill_api.runspec import Outcome
from kubedistill_api.status import Attempt

from kubedistill_operator.plan import gates, restart, teacher
from kubedistill_operator.plan.actions import CreateGang, DeleteBatchJob
from kubedistill_operator.plan.draft import Draft, Pass
from kubedistill_operator.plan.exits import Verdict, judge, judge_stopped, pod_trouble
from kubedistill_operator.plan.reporting import apply_report
from kubedistill_operator.plan.times import format_time, parse_time, seconds_since
from kubedistill_operator.plan.views import BatchJobView, PodView

_PHASES_AFTER_TRAINING = ("Evaluating", "Exporting", "Done")


def run_gang(step: Pass, *, teacher_ready: bool) -> None:
    """Keep one attempt going, or start the next, or end the job."""
    attempt = step.draft.attempt
    if attempt is None or attempt.end_time:
        _between(step, attempt, teacher_ready=teacher_ready)
    else:
        _during(step, attempt)


def _during(step: Pass, attempt: Attempt) -> None:
    draft, seen = step.draft, step.seen
    batch_job, pods = _observed(draft, attempt)
    if seen.rank0 is not None:
        apply_report(draft, attempt, seen.rank0.report)
    if _succeeded(step, batch_job, pods):
        return
    if attempt.reason:
        wind_down(draft)
        if draft.attempt and draft.attempt.end_time:
            _ended(step)
    elif batch_job is None:
        if _was_there(step, attempt, pods):
            _finish(step, judge(pods))
        else:
            draft.act(CreateGang(attempt.number, attempt.fence))
            _starting(draft, attempt, "its pods are asked for")
    elif batch_job.failing or batch_job.deleting_since or any(p.failed for p in pods):
        if _over(draft, batch_job, pods):
            _finish(step, judge(pods, batch_job.failure_message))
        else:
            _say_restarting(draft, "the attempt's other pods end")
    elif step.spec.suspend:
        _stop(step, Verdict(reasons.INTERRUPTED, "suspended", retry=True, charged=False))
    elif (stall := _stall(step, attempt)) is not None:
        _stop(step, Verdict(reasons.STALLED, stall, retry=True, charged=True))
    else:
        _going(step, attempt, pods)


def _observed(draft: Draft, attempt: Attempt) -> tuple[BatchJobView | None, list[PodView]]:
    name = draft.attempt_name(attempt.number)
    return draft.seen.batch_jobs.get(name), draft.seen.pods_of(ROLE_STUDENT, attempt.number)


def _was_there(step: Pass, attempt: Attempt, pods: list[PodView]) -> bool:
    """Whether a missing Job has been there: then it was deleted, and is not to be created."""
    name = step.draft.attempt_name(attempt.number)
    ran = attempt.last_step > 0 or attempt.resumed_from_step is not None
    return ran or bool(pods) or name in step.seen.deleted_batch_jobs


def _over(draft: Draft, batch_job: BatchJobView | None, pods: list[PodView]) -> bool:
    """Whether an ending attempt's pods are gone or done, or were waited for long enough."""
    if batch_job is None or batch_job.finished:
        if not any(p.active for p in pods):
            return True
        if batch_job is None and all(not p.active or p.deleting for p in pods):
            draft.look_again(1.0)
    elif not batch_job.deleting_since and pods and not any(p.active for p in pods):
        return False  # the Job controller is about to say so
    since = [p.finished_at for p in pods if p.finished_at]
    if batch_job is not None:
        since += [t for t in (batch_job.deleting_since, batch_job.finished_at) if t]
    if not since:
        return False
    # A Job's deletionTimestamp is when deletion was asked for; pods get their grace from then.
    limit = draft.timing.grace + draft.timing.margin
    waited = (draft.now - min(since)).total_seconds()
    if waited < limit:
        draft.look_again(limit - waited)
        return False
    return True


def _succeeded(step: Pass, batch_job: BatchJobView | None, pods: list[PodView]) -> bool:
    draft = step.draft
    rank0 = next((p for p in pods if p.index == 0 and p.exit_code == 0), None)
    outcome = rank0.outcome() if rank0 else None
    done = batch_job.complete if batch_job else all(p.exit_code == 0 for p in pods)
    if not done or not pods:
        if batch_job is not None and batch_job.complete:
            # Its pods, and so the model's digest, were never seen: run it again, it ends at once.
            text = "the pods were deleted before their outcome was read"
            _finish(step, Verdict(reasons.ERROR, text, retry=True, charged=True))
            return True
        return False
    if outcome is None or outcome.model is None:
        if batch_job is None or rank0 is not None:
            text = "rank 0 ended without saying where the model is"
            _finish(step, Verdict(reasons.ERROR, text, retry=True, charged=True))
        else:
            draft.look_again(2.0)
        return True
    _complete(step, outcome)
    return True


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


def _stop(step: Pass, verdict: Verdict) -> None:
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
        draft.change_attempt(reason=reason, message=message[:1000])


def wind_down(draft: Draft) -> None:
    """Delete the Job of an attempt that is to end, and close the attempt once its pods are gone."""
    attempt = draft.attempt
    if attempt is None or attempt.end_time or not attempt.reason:
        return
    batch_job, pods = _observed(draft, attempt)
    if batch_job is not None and not batch_job.deleting_since and not batch_job.finished:
        draft.act(DeleteBatchJob(batch_job.name))
        if attempt.reason in (reasons.INTERRUPTED, reasons.GRACEFUL_CHECKPOINT):
            draft.set(reasons.RUNNING, "False", reasons.IS_SUSPENDED, "the pods commit and end")
        else:
            draft.set(reasons.RUNNING, "False", attempt.reason, "the pods end")
        return
    if not _over(draft, batch_job, pods):
        return
    _take_last_report(draft, attempt, pods)
    verdict = judge_stopped(pods, attempt.reason, attempt.message, charged=attempt.charged)
    draft.change_attempt(
        end_time=format_time(draft.now), reason=verdict.reason, message=verdict.message
    )


def _take_last_report(draft: Draft, attempt: Attempt, pods: list[PodView]) -> None:
    for pod in pods:
        outcome = pod.outcome()
        if outcome is not None and outcome.progress is not None:
            apply_report(draft, attempt, outcome.progress)


def _finish(step: Pass, verdict: Verdict) -> None:
    """Close an attempt that ended by itself."""
    draft, attempt = step.draft, step.draft.attempt
    if attempt is None:
        return
    _take_last_report(draft, attempt, _observed(draft, attempt)[1])
    draft.change_attempt(
        end_time=format_time(draft.now),
        reason=verdict.reason,
        message=verdict.message,
        charged=verdict.charged,
    )
    if not verdict.retry:
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
    committed = draft.status.checkpoint.step if draft.status.checkpoint else 0
    if restart.advanced(attempt, committed):
        draft.update(failures=0)
    elif attempt.charged:
        draft.update(failures=draft.status.failures + 1)
    text = f"attempt {attempt.number} ended ({attempt.reason}): {attempt.message}"
    draft.tell(attempt.reason, text, warning=attempt.charged)
    ready = attempt.reason != reasons.STREAM_DAMAGED or teacher.run_teacher(step)
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
        return
    attempt = draft.add_attempt()
    draft.act(CreateGang(attempt.number, attempt.fence))
    _starting(draft, attempt, "its pods are asked for")
    _tell_start(draft, attempt, last)


def _must_wait(step: Pass, last: Attempt) -> bool:
    draft, seen = step.draft, step.seen
    if not last.charged:
        return False
    # An attempt that made progress still waits the base: a crash loop must not spin.
    failures = max(1, draft.status.failures)
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


def _stall(step: Pass, attempt: Attempt) -> str | None:
    """Why the gang counts as stalled, if it does."""
    draft, contact = step.draft, step.seen.rank0
    limit = step.spec.stall_timeout_seconds
    if contact is None or contact.report.attempt != attempt.number:
        return _silent(step, attempt)
    silence = (draft.now - contact.reached_at).total_seconds()
    if silence > limit:
        return f"rank 0 did not answer for {limit} s"
    report = contact.report
    if report.last_step_time is None or report.phase in _PHASES_AFTER_TRAINING:
        return None
    if draft.now.timestamp() - report.last_step_time > limit:
        return f"no step for {limit} s; the last one was {report.step:,}"
    return None


def _silent(step: Pass, attempt: Attempt) -> str | None:
    """After a restart of the operator only the status knows that rank 0 ever answered."""
    progress, limit = step.draft.status.progress, step.spec.stall_timeout_seconds
    if progress is None or attempt.last_step == 0:
        return None
    reached = parse_time(progress.last_updated_time)
    started = parse_time(attempt.start_time)
    if reached is None or started is None or reached < started:
        return None
    if (step.draft.now - reached).total_seconds() > limit:
        return f"rank 0 did not answer for {limit} s"
    return None


def _going(step: Pass, attempt: Attempt, pods: list[PodView]) -> None:
    draft, contact = step.draft, step.seen.rank0
    draft.set(reasons.SUSPENDED, "False", reasons.NOT_SUSPENDED)
    trouble = pod_trouble(pods)
    if trouble:
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
    state = reasons.EVALUATING if report.phase in _PHASES_AFTER_TRAINING else reasons.TRAINING
    text = f"attempt {attempt.number}"
    if attempt.resumed_from_step or report.resumed_from_step:
        text += f", resumed from step {report.resumed_from_step or attempt.resumed_from_step:,}"
    if draft.set(reasons.RUNNING, "True", state, text) and attempt.last_step == 0:
        draft.tell(state, text)
    draft.summary(state, text)
    if draft.conditions[reasons.CHECKPOINT_CURRENT].reason == reasons.PENDING:
        draft.set(
            reasons.CHECKPOINT_CURRENT, "Unknown", reasons.NO_CHECKPOINT_YET,
            f"the first commit comes after {_interval_text(step.spec.checkpoint.interval)}",
        )  # fmt: skip


def _interval_text(interval: int | str) -> str:
    return "a while" if interval == "Auto" else f"{interval} steps"
