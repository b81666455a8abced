"""The plan for a DistillationJob: from its spec to a finished student, one pass at a time."""

from __future__ import annotations

from kubedistill_api import reasons
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.names import ROLE_STUDENT, ROLE_TEACHER
from kubedistill_api.status import Attempt

from kubedistill_operator.plan import (
    dependencies,
    ending,
    gang,
    gates,
    hands,
    preflight,
    shape,
    teacher,
)
from kubedistill_operator.plan.actions import DeleteBatchJob, DeleteFinished, Plan
from kubedistill_operator.plan.draft import Draft, Observed, Pass, Timing
from kubedistill_operator.plan.inputs import parse_spec, student_summary, teacher_summary
from kubedistill_operator.plan.times import seconds_since

_LIFTED_BY_EDIT = (
    reasons.BACKOFF_LIMIT_EXCEEDED,
    reasons.DEADLINE_EXCEEDED,
    reasons.RESUME_REFUSED,
)
"""Failures that a larger limit in the spec undoes. Where commits or inputs were put back, the edit says
so: nobody tells the operator of the store."""
_LOOK_FOR_DEPENDENTS_SECONDS = 30.0
_LAST_NEWS_SECONDS = 5.0


def plan_job(seen: Observed, timing: Timing) -> Plan:
    """What follows from what was seen. Pure: the same input gives the same plan."""
    draft = Draft(seen, timing)
    spec = _parsed(draft)
    if spec is not None:
        step = Pass(draft, spec)
        _summaries(step)
        gates.settle(step)
        if _finished(step):
            teacher.after_the_end(step)
            _clean_up(draft)
            _refresh_after_end(draft)
        else:
            _advance(step)
            if draft.conditions[reasons.SUCCEEDED].status != "Unknown":
                _wind_down_all(draft)
            _clean_up(draft)
        _count_gpus(step)
        _say_refusal(draft)
        _expire(step)
    return draft.plan()


def _parsed(draft: Draft) -> DistillationJobSpec | None:
    spec, problems = parse_spec(draft.seen.spec)
    if spec is not None and draft.status.start_time is None:
        problems = list(gates.problems_of(spec))
    if problems:
        message = "; ".join(problem.sentence() for problem in problems)
        draft.set(reasons.VALIDATED, "False", reasons.INVALID_SPEC, message)
        draft.fail(reasons.INVALID_SPEC, message)
        return None
    return spec


def _finished(step: Pass) -> bool:
    """Whether the job has ended, for this generation of its spec."""
    draft = step.draft
    condition = draft.conditions[reasons.SUCCEEDED]
    if condition.status == "True":
        return True
    if condition.status == "Unknown" or condition.reason == reasons.DEPENDENCY_CYCLE:
        return False
    if condition.observed_generation == draft.seen.generation:
        return True
    if draft.status.start_time is None:
        return False
    if condition.reason == reasons.BACKOFF_LIMIT_EXCEEDED:
        most = max([draft.status.failures, *draft.status.teacher_failures])
        return most > step.spec.backoff_limit
    return condition.reason not in _LIFTED_BY_EDIT


def _refresh_after_end(draft: Draft) -> None:
    attempt = draft.attempt
    if attempt is not None and not attempt.end_time:
        _wind_down_all(draft)


def _summaries(step: Pass) -> None:
    step.draft.update(
        student_summary=student_summary(step.spec),
        teacher_summary=teacher_summary(step.spec),
    )


def _count_gpus(step: Pass) -> None:
    """Those of the newest attempt, which may have fewer nodes than the spec asks for."""
    attempt, workers = step.draft.attempt, step.spec.workers
    nodes = shape.nodes_of(step.spec, attempt) if attempt else workers.nodes
    step.draft.update(gpus=nodes * workers.gpus_per_node)


def _say_refusal(draft: Draft) -> None:
    """What the API server refuses is no secret between it and our log."""
    refused = draft.refused
    if refused is None or draft.conditions[reasons.SUCCEEDED].status != "Unknown":
        return
    before = next((c for c in draft.seen.status.conditions if c.type == reasons.SUCCEEDED), None)
    draft.summary(refused.reason, refused.message)
    if before is None or (before.reason, before.message) != (refused.reason, refused.message):
        draft.tell(refused.reason, refused.message, warning=True)


def _expire(step: Pass) -> None:
    """Delete the object of a job that ended long enough ago.

    Not one of a chain, which looks at its stages' jobs for as long as it is there; not one whose
    model another job is about to take; and not one whose spec was refused, to be corrected.
    """
    draft, limit = step.draft, step.spec.ttl_seconds_after_finished
    succeeded = draft.conditions[reasons.SUCCEEDED]
    if limit is None or step.seen.of_chain or not _finished(step):
        return
    if draft.status.start_time is None and succeeded.reason == reasons.INVALID_SPEC:
        return
    if draft.attempt is not None and not draft.attempt.end_time:
        return
    ended = draft.status.completion_time or succeeded.last_transition_time
    left = limit - seconds_since(ended, draft.now)
    if left > 0:
        draft.look_again(left)
    elif succeeded.status == "True" and step.seen.waited_for_by:
        draft.look_again(_LOOK_FOR_DEPENDENTS_SECONDS)
    else:
        draft.act(DeleteFinished())


def _advance(step: Pass) -> None:
    draft = step.draft
    lifted = draft.conditions[reasons.SUCCEEDED].reason in _LIFTED_BY_EDIT
    if draft.status.start_time is None:
        if step.spec.suspend:
            _suspended_before_start(draft)
            return
        inputs = dependencies.resolve(step)
        if inputs is None or not preflight.check(step, inputs):
            _not_suspended(draft)
            return
    if not lifted:
        _follow_suspend(step)
    if _past_deadline(step, lifted=lifted):
        if not gang.take_success(step):
            limit = step.spec.active_deadline_seconds
            draft.fail(
                reasons.DEADLINE_EXCEEDED,
                f"not finished {limit} s after its start (activeDeadlineSeconds)",
            )
        return
    if lifted:
        draft.update(completion_time=None)
        draft.summary(reasons.RESTARTING, "a limit in the spec was raised")
    ready = teacher.run_teacher(step)
    if draft.conditions[reasons.SUCCEEDED].status == "False":
        return
    gang.run_gang(step, teacher_ready=ready)


def _suspended_before_start(draft: Draft) -> None:
    draft.set(reasons.SUSPENDED, "True", reasons.IS_SUSPENDED, "spec.suspend is true")
    draft.summary(reasons.IS_SUSPENDED, "spec.suspend is true")


def _not_suspended(draft: Draft) -> None:
    draft.set(reasons.SUSPENDED, "False", reasons.NOT_SUSPENDED)


def _follow_suspend(step: Pass) -> None:
    """Suspended becomes True when all pods have ended; the deadline's clock stands from now on."""
    draft = step.draft
    if not step.spec.suspend:
        _not_suspended(draft)
    elif draft.conditions[reasons.SUSPENDED].status == "False":
        text = "spec.suspend is true; the pods end"
        draft.set(reasons.SUSPENDED, "Unknown", reasons.IS_SUSPENDED, text)


def _past_deadline(step: Pass, *, lifted: bool) -> bool:
    """Whether its time is over. As a Job's, its clock stands while suspended, and starts anew then.

    `lifted`: it had failed. To be suspended is no more time, and it stays so.
    """
    draft, limit = step.draft, step.spec.active_deadline_seconds
    if limit is None or (step.spec.suspend and not lifted):
        return False
    suspended = draft.conditions[reasons.SUSPENDED]
    passed = seconds_since(draft.status.start_time, draft.now)
    if suspended.status == "False":
        passed = min(passed, seconds_since(suspended.last_transition_time, draft.now))
    if passed < limit:
        draft.look_again(limit - passed)
        return False
    return True


def _wind_down_all(draft: Draft) -> None:
    """The job has ended: nothing of it goes on running."""
    condition = draft.conditions[reasons.SUCCEEDED]
    if draft.conditions[reasons.SUSPENDED].reason == reasons.IS_SUSPENDED:
        _not_suspended(draft)
    ending.stop_attempt(draft, condition.reason, condition.message)
    ending.wind_down(draft)


def _writers_may_be_done(draft: Draft) -> bool:
    """Whether news that a finished student's teacher is done too may be on their way: an API server
    that comes back tells of both at once, in any order."""
    if draft.conditions[reasons.SUCCEEDED].status != "True":
        return False
    left = _LAST_NEWS_SECONDS - seconds_since(draft.status.completion_time, draft.now)
    if left > 0:
        draft.look_again(left)
    return left > 0


def _clean_up(draft: Draft) -> None:
    """No Job is left that is not needed: of old attempts, and of a job that has ended any that runs."""
    hands.delete_orphans(draft)
    if draft.attempt is not None:
        _drop_old_attempts(draft, draft.attempt)
    if draft.conditions[reasons.SUCCEEDED].status == "Unknown":
        return
    for batch_job in draft.seen.batch_jobs.values():
        left = batch_job.role in (ROLE_STUDENT, ROLE_TEACHER) and not batch_job.finished
        waits = batch_job.role == ROLE_TEACHER and _writers_may_be_done(draft)
        if left and not waits and not batch_job.deleting_since:
            draft.act(DeleteBatchJob(batch_job.name))


def _drop_old_attempts(draft: Draft, attempt: Attempt) -> None:
    """Keep the last two attempts' Jobs: the running one, and the last ended one for its logs.

    One that did not end with its attempt (its controller was down, say) would go on beside the next.
    """
    for batch_job in draft.seen.batch_jobs.values():
        kept = attempt.number - 1 if batch_job.finished else attempt.number + bool(attempt.end_time)
        old = batch_job.role == ROLE_STUDENT and batch_job.attempt < kept
        if old and not batch_job.deleting_since:
            draft.act(DeleteBatchJob(batch_job.name))
