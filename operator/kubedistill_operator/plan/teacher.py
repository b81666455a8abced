"""The teacher's own pods: needed or not, and far enough for the student to start."""

from __future__ import annotations

from kubedistill_api import reasons
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.names import ROLE_TEACHER, teacher_name
from kubedistill_api.status import DistillationJobStatus, TeacherStreamStatus

from kubedistill_operator.plan import hands
from kubedistill_operator.plan.actions import CreateTeacher, DeleteBatchJob
from kubedistill_operator.plan.draft import Draft, Pass
from kubedistill_operator.plan.exits import judge, no_pods, pod_trouble
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
    if _complete(step):
        return True
    damaged = _damaged_attempt(draft)
    if batch_job is None:
        if spec.suspend:
            return False
        draft.act(CreateTeacher(damaged))
        _generating(step, "the teacher's pods are asked for")
        return False
    if batch_job.tries < damaged:
        if not batch_job.deleting_since:
            draft.act(DeleteBatchJob(name))
        _generating(step, f"attempt {damaged} found the stream damaged: the teacher runs again")
        return False
    pods = [p for p in seen.pods_of(ROLE_TEACHER) if batch_job.owns(p)]
    if batch_job.complete and any(p.active for p in pods):
        draft.look_again(2.0)  # their last words, with the stream's figures, are on their way to us
        return _running(step, batch_job, pods)
    if batch_job.complete:
        _take_outcomes(step, pods)
        return True
    if batch_job.failed:
        _failed(step, batch_job, pods)
        return False
    hands.mend_job(draft, batch_job, suspend=spec.suspend)
    return _running(step, batch_job, pods)


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
    message = stream_text(stream)
    if draft.set(reasons.TEACHER_READY, "True", reasons.STREAM_COMPLETE, message):
        draft.tell(reasons.STREAM_COMPLETE, f"the teacher's stream is complete {message}".strip())


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


def _running(step: Pass, batch_job: BatchJobView, pods: list[PodView]) -> bool:
    draft, contact = step.draft, step.seen.teacher
    stream = contact.report.teacher_stream if contact else None
    if stream is not None and stream.tokens > 0:
        apply_stream(draft, stream.model_copy(update={"complete": False}))
    if any(p.active and p.phase == "Running" for p in pods):
        draft.look_again(draft.timing.poll)
    known = draft.status.teacher_stream
    if known is not None and known.tokens > 0 and not learns_text(step.spec):
        if draft.set(
            reasons.TEACHER_READY, "True", reasons.SHARDS_COMMITTED,
            "the student can start on what is there"
            + ("; the writers wait: byteBudget is used up" if stream and stream.held else ""),
        ):  # fmt: skip
            draft.tell(reasons.SHARDS_COMMITTED, "the teacher committed its first shards")
        return True
    hands.restore_inputs(draft, ROLE_TEACHER, pods)
    trouble = pod_trouble(pods)
    if trouble is None and not batch_job.suspended:
        trouble = no_pods(draft, batch_job, pods)
    if trouble:
        draft.set(reasons.TEACHER_READY, "False", *trouble)
        draft.summary(*trouble)
    elif learns_text(step.spec):
        _generating(step, "the teacher answers; the student starts when all answers are there")
    else:
        _generating(step, "the teacher writes its stream")
    return False


def _generating(step: Pass, message: str) -> None:
    step.draft.set(reasons.TEACHER_READY, "False", reasons.GENERATING, message)
    step.draft.summary(reasons.GENERATING, message)
