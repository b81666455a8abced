"""The teacher's own pods: needed or not, and far enough for the student to start."""

from __future__ import annotations

from kubedistill_api import reasons
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.names import ROLE_TEACHER, teacher_name
from kubedistill_api.status import DistillationJobStatus, TeacherStreamStatus

from kubedistill_operator.plan import hands, writers
from kubedistill_operator.plan.actions import CreateTeacher, DeleteBatchJob
from kubedistill_operator.plan.conditions import Status
from kubedistill_operator.plan.draft import Draft, Pass
from kubedistill_operator.plan.ending import give_up_lost
from kubedistill_operator.plan.exits import Verdict, judge, no_pods, pod_trouble
from kubedistill_operator.plan.reporting import apply_stream
from kubedistill_operator.plan.views import BatchJobView, PodView


def needed(spec: DistillationJobSpec, status: DistillationJobStatus) -> bool:
    """Whether a stream has to be written for this job."""
    streams = spec.teacher is not None and spec.teacher.delivery == "Stream"
    return streams and not (status.resolved is not None and status.resolved.stream_complete)


def learns_text(spec: DistillationJobSpec) -> bool:
    """Whether the teacher is learnt by the text that it writes."""
    return spec.distill is not None and spec.distill.signal != "Logits"


def run_teacher(step: Pass) -> bool:
    """Keep the writers going. True when the student may start; False also after a failure."""
    draft, seen, spec = step.draft, step.seen, step.spec
    if not needed(spec, draft.status):
        already = spec.teacher is not None and spec.teacher.delivery == "Stream"
        text = "the stream was already there" if already else ""
        draft.set(reasons.TEACHER_READY, "True", reasons.NOT_NEEDED, text)
        return True
    name = teacher_name(seen.name)
    batch_job = seen.batch_jobs.get(name)
    leaving = give_up_lost(draft, seen.pods_of(ROLE_TEACHER))
    if _complete(step):
        return True
    damaged = _damaged_attempt(draft)
    if batch_job is None:
        if spec.suspend:
            return False
        if _too_many(step):
            # Another field was edited than the limit that ended it.
            _give_up(
                step, writers.failing_text([], draft.status.teacher_failures, spec.backoff_limit)
            )
            return False
        draft.act(CreateTeacher(damaged))
        writers.carry(draft)
        _generating(step, "the teacher's pods are asked for")
        return False
    if batch_job.tries < damaged:
        if not batch_job.deleting_since:
            draft.act(DeleteBatchJob(name))
        _generating(step, f"attempt {damaged} found the stream damaged: the teacher runs again")
        return False
    pods = writers.pods_of(draft, batch_job)
    if batch_job.complete and any(p.active for p in pods):
        draft.look_again(2.0)  # their last words, with the stream's figures, are on their way to us
        return _running(step, batch_job, pods, leaving)
    if batch_job.complete:
        _take_outcomes(step, pods)
        return True
    if batch_job.failed:
        _failed(step, batch_job, pods)
        return False
    hands.mend_job(draft, batch_job, suspend=spec.suspend)
    return _running(step, batch_job, pods, leaving)


def take_damage(draft: Draft) -> None:
    """The newest attempt found the stream damaged: nobody starts on it before it is repaired."""
    stream, resolved = draft.status.teacher_stream, draft.status.resolved
    if stream is not None:
        none = {"bytes": 0, "tokens": 0, "complete": False, "answers": 0}
        draft.update(teacher_stream=stream.model_copy(update=none))
    if resolved is not None:
        draft.update(resolved=resolved.model_copy(update={"stream_complete": False}))


def _damaged_attempt(draft: Draft) -> int:
    """The last attempt that found the stream damaged, or 0."""
    found = [a.number for a in draft.status.attempts if a.reason == reasons.STREAM_DAMAGED]
    return max(found, default=0)


def _complete(step: Pass) -> bool:
    stream = step.draft.status.teacher_stream
    ready = step.draft.conditions[reasons.TEACHER_READY]
    return bool(stream and stream.complete) and ready.reason == reasons.STREAM_COMPLETE


def _take_outcomes(step: Pass, pods: list[PodView]) -> None:
    draft = step.draft
    _take_figures(draft, pods)
    stream = draft.status.teacher_stream or TeacherStreamStatus()
    uri = stream.uri or (draft.status.resolved.stream_uri if draft.status.resolved else "")
    draft.update(teacher_stream=stream.model_copy(update={"complete": True, "uri": uri}))
    draft.update(teacher_failures=[], forgiven_failures=[])
    message = stream_text(stream)
    if draft.set(reasons.TEACHER_READY, "True", reasons.STREAM_COMPLETE, message):
        draft.tell(reasons.STREAM_COMPLETE, f"the teacher's stream is complete {message}".strip())


def after_the_end(step: Pass) -> None:
    """Of a job that has ended: news of its writers' ends may come later than of the student's."""
    draft, teacher = step.draft, step.spec.teacher
    if teacher is None or not needed(step.spec, draft.status) or _complete(step):
        return
    pods = draft.seen.pods_of(ROLE_TEACHER)
    done = {pod.index for pod in pods if pod.exit_code == 0}
    # Some may be of a time before the stream was found damaged.
    if len(done) == teacher.workers.replicas and not _damaged_attempt(draft):
        _take_outcomes(step, pods)


def _take_figures(draft: Draft, pods: list[PodView]) -> None:
    """What pods that have ended said of the stream."""
    for pod in pods:
        outcome = pod.outcome()
        if outcome and outcome.progress and outcome.progress.teacher_stream:
            apply_stream(draft, outcome.progress.teacher_stream)


def stream_text(stream: TeacherStreamStatus) -> str:
    """What a stream holds, and what it cost where that is known."""
    if stream.answers:
        cost = "" if stream.cost is None else f", at a cost of {stream.cost:.4g}"
        return f"{stream.answers:,} answers of {stream.answer_tokens:,} tokens{cost}"
    return f"{stream.tokens:,} tokens in {stream.bytes:,} bytes" if stream.tokens else ""


def _failed(step: Pass, batch_job: BatchJobView, pods: list[PodView]) -> None:
    _take_figures(step.draft, pods)
    verdict = judge([p for p in pods if p.failed], batch_job.failure_message)
    if verdict.reason == reasons.COST_LIMIT_REACHED:
        step.draft.set(reasons.TEACHER_READY, "False", verdict.reason, verdict.message)
        step.draft.fail(verdict.reason, verdict.message)
        return
    message = f"{verdict.reason}: {verdict.message}"
    step.draft.set(reasons.TEACHER_READY, "False", reasons.TEACHER_FAILED, message)
    step.draft.fail(reasons.TEACHER_FAILED, message)


def _running(
    step: Pass, batch_job: BatchJobView, pods: list[PodView], leaving: tuple[str, str] | None
) -> bool:
    draft, text = step.draft, learns_text(step.spec)
    whole = text or step.spec.compares
    held = _take_reports(step)
    if any(p.active and p.phase == "Running" for p in pods):
        draft.look_again(draft.timing.poll)
    hands.restore_inputs(draft, ROLE_TEACHER, pods)
    words = _count_failures(step, batch_job, pods)
    if _too_many(step):
        _give_up(step, words)
        return False
    trouble = leaving or pod_trouble(pods)
    if trouble is None and not batch_job.suspended:
        trouble = no_pods(draft, batch_job, pods)
    known = draft.status.teacher_stream
    if known is not None and known.tokens > 0 and not whole:
        _shards_there(draft, held, trouble, words)
        return not _awaited(step, batch_job, trouble, words)
    if trouble:
        _say(draft, "False", trouble[0], _joined(trouble[1], words), trouble)
        draft.summary(*trouble)
        return False
    doing = "the teacher writes its stream"
    if whole:
        doing = "the teacher answers; the student starts when all answers are there"
    if step.spec.compares:
        doing = "the teacher is measured, for the student to be compared with"
    _generating(step, _joined(doing, words))
    return False


def _count_failures(step: Pass, batch_job: BatchJobView, pods: list[PodView]) -> str:
    """Keep the counts, and say who fails. A Job that is stopped ends its pods: that does not count."""
    draft = step.draft
    if not (batch_job.complete or batch_job.deleting_since or batch_job.suspended):
        counts = writers.failures(pods, draft.status.forgiven_failures)
        draft.update(teacher_failures=counts)
    limit = step.spec.backoff_limit
    return writers.failing_text(pods, draft.status.teacher_failures, limit)


def _too_many(step: Pass) -> bool:
    return max(step.draft.status.teacher_failures, default=0) > step.spec.backoff_limit


def _give_up(step: Pass, words: str) -> None:
    step.draft.set(reasons.TEACHER_READY, "False", reasons.TEACHER_FAILED, words)
    step.draft.fail(reasons.BACKOFF_LIMIT_EXCEEDED, words)


def _say(
    draft: Draft, status: Status, reason: str, message: str, trouble: tuple[str, str] | None
) -> None:
    """Set TeacherReady; a writer that is lost gets an event, once."""
    new = draft.conditions[reasons.TEACHER_READY].message != message
    draft.set(reasons.TEACHER_READY, status, reason, message)
    if new and trouble and trouble[0] == reasons.DISRUPTED:
        draft.tell(*trouble)


def _take_reports(step: Pass) -> str:
    """Take over the stream's figures, the student's too: it sees all writers' parts.

    What to add of writers that wait on purpose.
    """
    draft, contact, rank0 = step.draft, step.seen.teacher, step.seen.rank0
    stream = contact.report.teacher_stream if contact else None
    if stream is not None and stream.tokens > 0:
        apply_stream(draft, stream.model_copy(update={"complete": False}))
    attempt = draft.attempt
    current = attempt is not None and not attempt.end_time and not attempt.reason
    if rank0 and attempt and current and rank0.report.attempt == attempt.number:
        seen = rank0.report.teacher_stream
        if seen is not None:
            apply_stream(draft, seen)
    return "the writers wait: byteBudget is used up" if stream and stream.held else ""


def _shards_there(draft: Draft, held: str, trouble: tuple[str, str] | None, words: str) -> None:
    parts = ("the student can start on what is there", held, trouble[1] if trouble else "", words)
    ready = draft.conditions[reasons.TEACHER_READY]
    if (ready.status, ready.reason) != ("True", reasons.SHARDS_COMMITTED):
        draft.tell(reasons.SHARDS_COMMITTED, "the teacher committed its first shards")
    _say(draft, "True", reasons.SHARDS_COMMITTED, _joined(*parts), trouble)


def _awaited(
    step: Pass, batch_job: BatchJobView, trouble: tuple[str, str] | None, words: str
) -> bool:
    """Whether the next attempt waits for writers: the last one ended for want of them.

    Without them it would stand still again, and hold its GPUs.
    """
    draft, last = step.draft, step.draft.attempt
    wanted = last is not None and last.end_time and last.reason == reasons.STALLED
    if last is None or not wanted or last.charged or not writers.missing(draft, batch_job):
        return False
    draft.summary(*(trouble or (reasons.GENERATING, _joined("the teacher's writers start", words))))
    return True


def without_writers(step: Pass, verdict: Verdict) -> Verdict:
    """Of an attempt that stood still for want of a writer that does not run: it did not fail."""
    draft, stream = step.draft, step.draft.status.teacher_stream
    if verdict.reason != reasons.STALLED or not needed(step.spec, draft.status):
        return verdict
    missing = writers.missing(draft, draft.seen.batch_jobs.get(teacher_name(draft.seen.name)))
    if missing < 1 or (stream is not None and stream.complete):
        return verdict
    text = f"; {missing} of the teacher's writers did not run: TeacherReady says why"
    return Verdict(verdict.reason, verdict.message[:900] + text, retry=True, charged=False)


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _generating(step: Pass, message: str) -> None:
    step.draft.set(reasons.TEACHER_READY, "False", reasons.GENERATING, message)
    step.draft.summary(reasons.GENERATING, message)
