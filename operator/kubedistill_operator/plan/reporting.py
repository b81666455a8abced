"""From rank 0's report to the status."""

from __future__ import annotations

import re

from kubedistill_api import reasons
from kubedistill_api.runspec import ProgressReport
from kubedistill_api.status import Attempt, CheckpointStatus, Progress, TeacherStreamStatus

from kubedistill_operator.plan import writers
from kubedistill_operator.plan.conditions import Status
from kubedistill_operator.plan.draft import Draft
from kubedistill_operator.plan.times import duration_text, format_time

_FIGURES = 3
_SKIPPED_KEPT = 64
_STRAGGLER_LENGTH = 256
_PROBLEMS = (
    reasons.CHECKPOINT_REJECTED,
    reasons.SAVE_FAILED,
    reasons.GRACE_TOO_SHORT,
    reasons.RESUME_REFUSED,
)
_BEFORE_THE_STORE = ("Starting", "Generating")
Standing = tuple[Status, str, str]
"""Status, reason and message of a condition."""


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
        straggler=report.straggler[:_STRAGGLER_LENGTH],
        skipped_steps=report.skipped_steps[-_SKIPPED_KEPT:],
    )
    return fresh if fresh == old else fresh.model_copy(update={"last_updated_time": now_text})


def _tell_of_restart(draft: Draft, attempt: Attempt, report: ProgressReport) -> None:
    if report.rank_restarts > attempt.rank_restarts:
        text = f"attempt {attempt.number}: its ranks were started again in their pods"
        reason = f": {report.restart_reason}" if report.restart_reason else ""
        draft.tell("RanksRestarted", text + reason, warning=True)


def apply_report(draft: Draft, attempt: Attempt, report: ProgressReport) -> None:
    """Take over a report of this attempt; a report of another one changes nothing."""
    if report.attempt != attempt.number:
        return
    known = draft.status.progress
    if report.total_steps:
        fresh = to_progress(report, known, format_time(draft.now))
        draft.update(progress=fresh)
        _tell_of_ranks(draft, known or Progress(), fresh)
    _take_save_time(draft, report.save_seconds)
    if (report.resumed_from_step or 0) > draft.status.furthest_commit:
        # This was committed unseen: progress. The failure after it, if one was charged, is the
        # first of a new row.
        draft.update(
            furthest_commit=report.resumed_from_step,
            failures=min(_charged_since(draft, report), draft.status.failures),
        )
    _tell_of_restart(draft, attempt, report)
    # Ranks that were started again in their pods resume from what this attempt itself committed.
    first = report.rank_restarts == 0 and report.resumed_from_step is not None
    draft.change_attempt(
        resumed_from_step=report.resumed_from_step if first else attempt.resumed_from_step,
        last_step=max(attempt.last_step, report.step),
        rank_restarts=max(attempt.rank_restarts, report.rank_restarts),
    )
    if report.checkpoint is not None:
        _take_checkpoint(draft, report.checkpoint)
    standing = checkpoint_standing(report, draft.status.checkpoint)
    before = draft.conditions[reasons.CHECKPOINT_CURRENT].reason
    if before in _PROBLEMS:
        nothing: Standing = ("Unknown", reasons.NO_CHECKPOINT_YET, "nothing is committed yet")
        standing = standing or nothing
        if standing[1] not in _PROBLEMS and not _would_know(report, before):
            standing = None
    if standing is not None:
        changed = draft.set(reasons.CHECKPOINT_CURRENT, *standing)
        if changed and standing[1] in _PROBLEMS:
            draft.tell(standing[1], standing[2], warning=True)
    if report.teacher_stream is not None:
        apply_stream(draft, report.teacher_stream)


def _charged_since(draft: Draft, report: ProgressReport) -> int:
    """Charged ends (one or none) since the commit that a report of the newest attempt resumed from.

    Ranks that were started again in their pods resume from what this attempt itself committed.
    """
    before = draft.status.attempts[-2:-1]
    return int(report.rank_restarts == 0 and bool(before) and before[0].charged)


def _would_know(report: ProgressReport, problem: str) -> bool:
    """Whether the ranks that report would say so if the problem were still there.

    Those that have not met the store yet do not; nor, of a save that does not fit the grace, those
    that have not made a step, or know of no save, since they were started.
    """
    if problem == reasons.GRACE_TOO_SHORT and report.phase == "Training":
        return None not in (report.save_seconds, report.step_seconds)
    return report.phase not in _BEFORE_THE_STORE


def checkpoint_standing(report: ProgressReport, newest: CheckpointStatus | None) -> Standing | None:
    """Of CheckpointCurrent; None where there is nothing to say.

    A commit that is there does not hide that the next one will not come.
    """
    there = f"step {newest.step} is committed" if newest else "nothing is committed yet"
    if report.rejected_checkpoints:
        text = "did not verify and was not used: " + ", ".join(report.rejected_checkpoints[:5])
        return "False", reasons.CHECKPOINT_REJECTED, text
    if report.save_problem:
        return "False", reasons.SAVE_FAILED, f"{report.save_problem}; {there}"
    if report.grace_problem:
        return "False", reasons.GRACE_TOO_SHORT, f"{report.grace_problem}; {there}"
    return ("True", reasons.COMMITTED, there) if newest else None


def _take_checkpoint(draft: Draft, checkpoint: CheckpointStatus) -> None:
    draft.update(checkpoint=checkpoint)
    # Against all commits ever, so that one which is lost and made again is no progress.
    if checkpoint.step > draft.status.furthest_commit:
        draft.update(furthest_commit=checkpoint.step, failures=0)


def _take_save_time(draft: Draft, seconds: float | None) -> None:
    longest = rounded(seconds)
    if longest is not None and longest > (draft.status.save_seconds or 0.0):
        draft.update(save_seconds=longest)


def _who(straggler: str) -> str:
    """The rank that a sentence names: by how much it is behind changes with every step."""
    named = re.search(r"\brank \d+", straggler)
    return named.group() if named else straggler


def _tell_of_ranks(draft: Draft, old: Progress, fresh: Progress) -> None:
    """Events of what people should look at, when it comes and when it is another one."""
    if fresh.straggler and _who(fresh.straggler) != _who(old.straggler):
        draft.tell("Straggler", fresh.straggler, warning=True)
    added = [str(step) for step in fresh.skipped_steps if step not in old.skipped_steps]
    if added:
        text = "left out, because the loss was no number: step " + ", ".join(added)
        draft.tell("StepSkipped", text, warning=True)


def apply_stream(draft: Draft, stream: TeacherStreamStatus) -> None:
    """Take over a stream's figures, unless they are older than what is known."""
    old = draft.status.teacher_stream
    if stream.tokens > (old.tokens if old else 0):
        writers.forgive(draft)
    if old is None or (stream.tokens >= old.tokens and not (old.complete and not stream.complete)):
        # A container's last word is short: it has some rows of the table, or none.
        same = old is not None and old.digest == stream.digest
        probe = old.probe if old and same and len(old.probe) > len(stream.probe) else stream.probe
        draft.update(teacher_stream=stream.model_copy(update={"probe": probe}))
