"""From rank 0's report to the status."""

from __future__ import annotations

from kubedistill_api import reasons
from kubedistill_api.runspec import ProgressReport
from kubedistill_api.status import Attempt, CheckpointStatus, Progress, TeacherStreamStatus

from kubedistill_operator.plan.draft import Draft
from kubedistill_operator.plan.times import duration_text, format_time

_FIGURES = 3


def rounded(value: float | None) -> float | None:
    """To three significant digits, so that the status does not change for noise."""
    return None if value is None else float(f"{value:.{_FIGURES}g}")


def to_progress(report: ProgressReport, old: Progress | None, now_text: str) -> Progress:
    """What people read of a report. The time changes only with something else."""
    done = report.step / report.total_steps if report.total_steps else 0.0
    finished = report.phase == "Done"
    fresh = Progress(
        step=report.step,
        total_steps=report.total_steps,
        # 100 is kept for the end: evaluation and export follow the last step.
        percentage=100 if finished else min(99, int(100 * done)),
        tokens_per_second=rounded(report.tokens_per_second),
        loss=report.loss,
        loss_text="" if report.loss is None else f"{report.loss:.3f}",
        estimated_remaining=duration_text(report.estimated_remaining_seconds),
        last_updated_time=old.last_updated_time if old else "",
    )
    return fresh if fresh == old else fresh.model_copy(update={"last_updated_time": now_text})


def apply_report(draft: Draft, attempt: Attempt, report: ProgressReport) -> None:
    """Take over a report of this attempt; a report of another one changes nothing."""
    if report.attempt != attempt.number:
        return
    known = draft.status.progress
    if report.total_steps:
        draft.update(progress=to_progress(report, known, format_time(draft.now)))
    draft.change_attempt(
        resumed_from_step=(
            attempt.resumed_from_step
            if report.resumed_from_step is None
            else report.resumed_from_step
        ),
        last_step=max(attempt.last_step, report.step),
    )
    if report.checkpoint is not None:
        apply_checkpoint(draft, report.checkpoint)
    if report.rejected_checkpoints:
        draft.set(
            reasons.CHECKPOINT_CURRENT, "False", reasons.CHECKPOINT_REJECTED,
            "did not verify and was not used: " + ", ".join(report.rejected_checkpoints[:5]),
        )  # fmt: skip
    if report.teacher_stream is not None:
        apply_stream(draft, report.teacher_stream)


def apply_checkpoint(draft: Draft, checkpoint: CheckpointStatus) -> None:
    draft.update(checkpoint=checkpoint)
    draft.set(
        reasons.CHECKPOINT_CURRENT, "True", reasons.COMMITTED,
        f"step {checkpoint.step} is committed",
    )  # fmt: skip


def apply_stream(draft: Draft, stream: TeacherStreamStatus) -> None:
    """Take over a stream's figures, unless they are older than what is known."""
    old = draft.status.teacher_stream
    if old is None or (stream.tokens >= old.tokens and not (old.complete and not stream.complete)):
        # A container's last word is short: it has some rows of the table, or none.
        same = old is not None and old.digest == stream.digest
        probe = old.probe if old and same and len(old.probe) > len(stream.probe) else stream.probe
        draft.update(teacher_stream=stream.model_copy(update={"probe": probe}))
