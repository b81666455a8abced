"""What rank 0 says of checkpoints and ranks, as conditions, progress and events."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from kubedistill_api import reasons
from kubedistill_api.runspec import ProgressReport
from kubedistill_api.status import CheckpointStatus
from kubedistill_operator.plan.actions import Plan
from kubedistill_operator.plan.finite import finite
from kubedistill_operator.plan.job import plan_job
from kubedistill_operator.plan.reporting import checkpoint_standing
from test_plan_gang import report
from test_plan_kit import TIMING, after, ended, message, running, settled, started, state

COMMIT = CheckpointStatus(uri="s3://c", step=30)
CURRENT = reasons.CHECKPOINT_CURRENT


@pytest.mark.parametrize(
    ("given", "newest", "reason", "words"),
    [
        ({}, None, None, ""),
        ({}, COMMIT, reasons.COMMITTED, "step 30 is committed"),
        ({"save_problem": "no space"}, COMMIT, reasons.SAVE_FAILED, "no space; step 30 is"),
        ({"save_problem": "no space"}, None, reasons.SAVE_FAILED, "no space; nothing is"),
        ({"grace_problem": "too short"}, COMMIT, reasons.GRACE_TOO_SHORT, "too short; step 30"),
        ({"save_problem": "a", "grace_problem": "b"}, COMMIT, reasons.SAVE_FAILED, "a; step"),
        ({"rejected_checkpoints": ["s3://x"], "save_problem": "a", "grace_problem": "b"}, COMMIT,
         reasons.CHECKPOINT_REJECTED, "s3://x"),
    ],
)  # fmt: skip
def test_what_is_said_of_checkpoints(
    given: dict[str, Any], newest: CheckpointStatus | None, reason: str | None, words: str
) -> None:
    standing = checkpoint_standing(ProgressReport(**given), newest)
    if reason is None:
        assert standing is None
        return
    assert standing is not None
    assert standing[:2] == ("True" if reason == reasons.COMMITTED else "False", reason)
    assert words in standing[2]


def told(plan: Plan) -> list[str]:
    return [event.reason for event in plan.events]


def test_a_problem_comes_once_stays_without_writes_and_clears() -> None:
    seen = started(pods=(running("p"),), rank0=report(checkpoint=COMMIT))
    failing = after(seen, rank0=report(checkpoint=COMMIT, save_problem="no space"))
    plan = settled(failing)
    assert state(plan, CURRENT) == ("False", reasons.SAVE_FAILED)
    assert reasons.SAVE_FAILED in told(plan)
    same = plan_job(after(failing, seconds=60), TIMING)
    assert same.status == plan.status
    newer = report(checkpoint=CheckpointStatus(uri="s3://c", step=40), grace_problem="too short")
    plan = settled(after(failing, rank0=newer))
    assert state(plan, CURRENT) == ("False", reasons.GRACE_TOO_SHORT)
    assert "step 40 is committed" in message(plan, CURRENT)
    plan = settled(after(failing, rank0=report(checkpoint=COMMIT)))
    assert state(plan, CURRENT) == ("True", reasons.COMMITTED)


@pytest.mark.parametrize(
    ("knows", "well"),
    [
        ({}, False),
        ({"save_seconds": 8.0}, False),
        ({"step_seconds": 2.0}, False),
        ({"save_seconds": 8.0, "step_seconds": 2.0}, True),
        ({"phase": "Evaluating"}, True),
    ],
)
def test_a_grace_that_is_too_short_stays_until_the_next_ranks_have_measured(
    knows: dict[str, Any], well: bool
) -> None:
    first = started(pods=(running("p"),), rank0=report(checkpoint=COMMIT, grace_problem="short"))
    plan = settled(after(first, rank0=report(resumed_from_step=30, **knows)))
    told = ("True", reasons.COMMITTED) if well else ("False", reasons.GRACE_TOO_SHORT)
    assert state(plan, CURRENT) == told


def test_a_rejected_checkpoint_is_not_written_again_at_every_poll() -> None:
    contact = report(rejected_checkpoints=["s3://c/40"], checkpoint=COMMIT)
    seen = started(pods=(running("p"),), rank0=contact)
    first = plan_job(seen, TIMING)
    assert plan_job(after(seen, seconds=60), TIMING).status == first.status


def test_a_problem_before_the_first_commit_clears_too() -> None:
    seen = started(pods=(running("p"),), rank0=report(save_problem="no space"))
    plan = settled(after(seen, rank0=report()))
    assert state(plan, CURRENT) == ("Unknown", reasons.NO_CHECKPOINT_YET)


def test_a_problem_stays_until_the_next_ranks_have_met_the_store() -> None:
    seen = started(pods=(running("p"),), rank0=report(checkpoint=COMMIT))
    failing = after(seen, rank0=report(checkpoint=COMMIT, save_problem="no bucket"))
    plan = settled(after(failing, rank0=report(phase="Starting")))
    assert state(plan, CURRENT) == ("False", reasons.SAVE_FAILED)
    assert "no bucket; step 30 is committed" in message(plan, CURRENT)
    plan = settled(after(failing, rank0=report(resumed_from_step=30)))
    assert state(plan, CURRENT) == ("True", reasons.COMMITTED)


def test_stragglers_and_skipped_steps_are_told_when_they_come_and_change() -> None:
    seen = started(pods=(running("p"),), rank0=report(straggler="rank 3: 1.4 times the median"))
    plan = settled(seen)
    assert plan.status.progress is not None
    assert plan.status.progress.straggler == "rank 3: 1.4 times the median"
    assert "Straggler" in told(plan)
    same = settled(after(seen, rank0=report(straggler="rank 3: 1.6 times the median")))
    assert "Straggler" not in told(same)
    other = settled(after(seen, rank0=report(straggler="rank 1: 1.6 times the median")))
    assert "Straggler" in told(other)
    gone = after(seen, rank0=report(skipped_steps=[7, 9]))
    plan = settled(gone)
    assert plan.status.progress is not None
    assert (plan.status.progress.straggler, plan.status.progress.skipped_steps) == ("", [7, 9])
    assert [e.message for e in plan.events if e.reason == "StepSkipped"] == [
        "left out, because the loss was no number: step 7, 9"
    ]
    more = settled(after(gone, rank0=report(skipped_steps=[7, 9, 12])))
    assert [e.message for e in more.events if e.reason == "StepSkipped"] == [
        "left out, because the loss was no number: step 12"
    ]
    assert "Straggler" not in told(more)


def test_ranks_started_again_are_told_and_are_no_attempt() -> None:
    first = started(pods=(running("p"),), rank0=report(resumed_from_step=None))
    again = report(rank_restarts=1, restart_reason="a peer was lost", resumed_from_step=30)
    plan = settled(after(first, rank0=again))
    [attempt] = plan.status.attempts
    assert (attempt.rank_restarts, attempt.resumed_from_step) == (1, None)
    assert [e.message for e in plan.events if e.reason == "RanksRestarted"] == [
        "attempt 1: its ranks were started again in their pods: a peer was lost"
    ]
    assert "RanksRestarted" not in told(settled(after(first, rank0=again, status=plan.status)))


@pytest.mark.parametrize("number", ["NaN", "Infinity", float("nan"), float("-inf")])
def test_a_number_that_is_none_does_not_stop_the_status(number: Any) -> None:
    """The API server refuses a status that holds one, and with it the attempt's end."""
    document = {
        "loss": number,
        "step": 3,
        "metrics": [{"name": "ece", "value": number}, {"name": "perplexity", "value": 2.5}],
        "skipped": [1, 2],
    }
    assert finite(document) == {
        "step": 3,
        "metrics": [{"name": "perplexity", "value": 2.5}],
        "skipped": [1, 2],
    }
    outcome = {"progress": {"attempt": 1, "totalSteps": 9, "loss": number}, "metrics": []}
    told = ended("p", 0, outcome=outcome).outcome()
    assert told is not None
    assert told.progress is not None
    assert told.progress.loss is None


def test_long_lists_and_texts_fit_the_schema() -> None:
    contact = report(straggler="x" * 1000, skipped_steps=list(range(100)))
    plan = settled(started(pods=(running("p"),), rank0=contact))
    assert plan.status.progress is not None
    assert len(plan.status.progress.straggler) == 256
    assert plan.status.progress.skipped_steps == list(range(36, 100))


def test_the_longest_save_is_remembered_by_the_status() -> None:
    seen = started(pods=(running("p"),), rank0=report(save_seconds=123.456))
    assert settled(seen).status.save_seconds == 123
    shorter = after(seen, rank0=report(save_seconds=20.0))
    assert settled(shorter).status.save_seconds == 123
    unknown = replace(shorter, rank0=None)
    assert settled(unknown).status.save_seconds == 123
