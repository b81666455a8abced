"""The pods of the teacher's Job: which fail too often, and which should run and do not.

A writer is retried by its Job, part by part and without end: the Job keeps in every pod how many of
the same part failed before it. When it is enough is decided here, so that progress counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kubedistill_api.exit_codes import ExitCode
from kubedistill_api.names import ROLE_TEACHER, teacher_name

from kubedistill_operator.plan.draft import Draft
from kubedistill_operator.plan.exits import judge
from kubedistill_operator.plan.views import BatchJobView, PodView


def pods_of(draft: Draft, batch_job: BatchJobView) -> list[PodView]:
    """Those of this Job, and not of one before it that had the same name."""
    return [pod for pod in draft.seen.pods_of(ROLE_TEACHER) if batch_job.owns(pod)]


def _counts(pod: PodView) -> bool:
    """Whether a pod's end is a failure that counts: as its Job's podFailurePolicy counts."""
    free = pod.disrupted or pod.exit_code == ExitCode.INTERRUPTED
    return pod.phase == "Failed" and not free


def _most(counts: Iterable[tuple[int, int]]) -> dict[int, int]:
    """Of (index, count) pairs the highest count of each index."""
    highest: dict[int, int] = {}
    for index, count in counts:
        highest[index] = max(count, highest.get(index, 0))
    return highest


def failures(pods: Sequence[PodView], forgiven: Sequence[int]) -> list[int]:
    """By part of the data: failures since the stream last grew. `forgiven` count no more."""
    failed = _most((pod.index, pod.failures_before + _counts(pod)) for pod in pods)
    return _listed({index: count - _at(forgiven, index) for index, count in failed.items()})


def _at(counts: Sequence[int], index: int) -> int:
    return counts[index] if index < len(counts) else 0


def _listed(counts: dict[int, int]) -> list[int]:
    """By index, without the zeros at the end."""
    length = max((index + 1 for index, count in counts.items() if count), default=0)
    return [counts.get(index, 0) for index in range(length)]


def failing_text(pods: Sequence[PodView], counts: Sequence[int], limit: int) -> str:
    """Of the writer that fails most, with the most retries that there may be; empty for none."""
    most = max(counts, default=0)
    if most < 1:
        return ""
    index = list(counts).index(most)
    times = "1 time" if most == 1 else f"{most} times in a row"
    text = f"writer {index} failed {times} while the stream did not grow (backoffLimit {limit})"
    ends = [pod for pod in pods if pod.index == index and _counts(pod)]
    if not ends:
        return text
    last = judge([max(ends, key=lambda pod: pod.failures_before)])
    return f"{text}; the last time: {last.reason}: {last.message}"


def carry(draft: Draft) -> None:
    """A Job that is made again counts from 0: what its writers failed before is added."""
    draft.update(forgiven_failures=[-count for count in draft.status.teacher_failures])


def forgive(draft: Draft) -> None:
    """The stream has grown: failures before the pods that are there now count no more.

    That of a pod which has no successor yet may have come after the growth: it is the first of a
    new row.
    """
    batch_job = draft.seen.batch_jobs.get(teacher_name(draft.seen.name))
    if batch_job is not None:
        before = _most((pod.index, pod.failures_before) for pod in pods_of(draft, batch_job))
        draft.update(forgiven_failures=_listed(before))


def missing(draft: Draft, batch_job: BatchJobView | None) -> int:
    """How many parts of the data have a writer that should run and does not."""
    if batch_job is None:
        return 1  # it is about to be made
    pods = pods_of(draft, batch_job)
    running = {
        pod.index
        for pod in pods
        if pod.active and pod.phase == "Running" and not (pod.deleting or pod.unreachable)
    }
    done = {pod.index for pod in pods if pod.phase == "Succeeded" or pod.exit_code == 0}
    # The Job knows of parts that are done although their pods were removed.
    return (batch_job.completions or 1) - len(running - done) - max(batch_job.succeeded, len(done))
