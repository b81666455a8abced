"""When a run is saved, what a failed save leads to, and what is told of saves."""

from __future__ import annotations

import math
from typing import Any

import pytest
from kubedistill_api.checkpoint import Checkpoint
from kubedistill_trainer.checkpoint import CheckpointFailed, Fenced
from kubedistill_trainer.checkpoint.interval import (
    LONGEST_SECONDS,
    Mean,
    expected_mtbf,
    first_save,
    mean_of_all,
    save_cost,
    save_interval,
)
from kubedistill_trainer.checkpoint.results import CommitInfo, Flight
from kubedistill_trainer.exporter import ProgressBoard
from kubedistill_trainer.methods.saving import Saver
from kubedistill_trainer.store import StoreUnavailable
from loop_kit import Commits

HOUR, DAY = 3600.0, 86_400.0


@pytest.mark.parametrize(
    ("cost", "save", "mtbf", "seconds"),
    [
        (2.0, 60.0, 10_000.0, 200.0),
        (2.0, 300.0, 10_000.0, 300.0),  # never below the upload's time
        (0.5, 0.5, 1.0, 1.0),
        (0.001, 0.1, 1.0, 1.0),  # nor each step
        (100.0, 100.0, 10 * DAY, LONGEST_SECONDS),
        (100.0, 4000.0, 10 * DAY, 4000.0),
    ],
)
def test_the_interval_is_youngs(cost: float, save: float, mtbf: float, seconds: float) -> None:
    assert save_interval(cost, save, mtbf) == pytest.approx(seconds)


def test_the_interval_is_where_a_save_costs_what_a_failure_does() -> None:
    """Wasted time a second is cost/interval + interval/(2·MTBF): least at the interval."""

    def waste(interval: float) -> float:
        return 3.0 / interval + interval / (2 * HOUR)

    best = save_interval(3.0, 10.0, HOUR)
    assert waste(best) < min(waste(best * 0.9), waste(best * 1.1))


def test_before_its_first_save_an_attempt_knows_how_long_they_took_the_one_before() -> None:
    """SIGTERM then committed nothing, though the grace had room: with a long interval, hours."""
    commits: Any = Commits()
    saver = Saver(
        commits,
        Checkpoint(interval=1000),
        ProgressBoard(),
        grace_seconds=60,
        known_save_seconds=7.5,
    )
    assert saver.saves == [7.5]


def test_the_first_save_is_soon() -> None:
    assert [first_save(mtbf) for mtbf in (DAY, 200.0, 10.0)] == [10.0, 4.0, 1.0]


def test_what_a_gang_has_to_expect_before_it_has_seen_a_failure() -> None:
    assert expected_mtbf(None, 5.0, 1) == 600.0
    assert expected_mtbf(None, HOUR, 1) == HOUR
    assert expected_mtbf(None, 9 * DAY, 1) == DAY
    assert expected_mtbf(None, 9 * DAY, 1500) == pytest.approx(DAY / 10)
    # Of 9 days in a day nothing is said: no more than the hardware of so many nodes lasts.
    assert expected_mtbf(Mean(120.0, 1), 9 * DAY, 1500) == pytest.approx(DAY / 10)


@pytest.mark.parametrize(
    ("mean", "failures", "uptime", "seconds"),
    [
        (120.0, 1, 0.0, 120.0),
        (30.0, 1, HOUR, HOUR + 30),  # one early kill is no kill a half-minute for ever
        (60.0, 10, 600.0, 120.0),
        (30.0, 1, 9 * DAY, DAY),
    ],
)
def test_time_without_a_failure_counts_like_time_with_one(
    mean: float, failures: int, uptime: float, seconds: float
) -> None:
    assert expected_mtbf(Mean(mean, failures), uptime, 1) == pytest.approx(seconds)


def test_failures_of_attempts_and_of_restarts_are_one_row() -> None:
    assert mean_of_all([]) is None
    assert mean_of_all([Mean(100.0, 3), Mean(20.0, 1)]) == Mean(80.0, 4)


class Slow(Commits):
    """A save whose upload ends when a person says so."""

    def start(self, *args: Any, **named: Any) -> None:
        super().start(*args, **named)
        assert self.flight is not None
        self.flight.ended.clear()
        self.flight.limit_seconds = HOUR


def test_a_gang_that_waits_for_its_upload_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would be ended as stalled, again and again at the last step."""
    monkeypatch.setattr("kubedistill_trainer.methods.saving._TELL_SECONDS", 0.001)
    commits = Slow()
    ended: list[float] = []

    class Board(ProgressBoard):
        def update(self, **changes: Any) -> None:
            super().update(**changes)
            if set(changes) == {"last_step_time"} and commits.flight is not None:
                ended.append(changes["last_step_time"])
                commits.flight.ended.set()

    board = Board()
    saving = saver(commits, board=board)
    board.update(last_step_time=1.0)
    assert commits.flight is None
    saving.save(None, 4, {"step": 4}, None)
    assert len(ended) == 1
    assert board.report.last_step_time == ended[0] > 1.0
    assert saving.committed_step == 4


def test_an_upload_that_takes_longer_than_any_may_is_no_sign_of_life() -> None:
    flight = Flight(4, limit_seconds=100.0)
    assert flight.is_in_time
    flight.began -= 101.0
    assert not flight.is_in_time


def test_a_peer_that_takes_far_longer_than_oneself_is_no_sign_of_life() -> None:
    """A frozen one, in the middle of a save: the store's deadlines would allow it minutes."""
    flight = Flight(4, limit_seconds=360.0)
    flight.began -= 20.0
    flight.uploaded()
    assert flight.is_in_time
    flight.began -= 80.0
    assert not flight.is_in_time
    late = Flight(4, limit_seconds=30.0)
    late.began -= 29.0
    late.uploaded()
    assert late.limit_seconds == 30.0, "no longer than the store lets an upload take"


@pytest.mark.parametrize(
    ("calm", "busy", "cost"),
    [(None, None, 0.5), (1.0, None, 0.5), (1.0, 1.0, 0.5), (1.0, 2.0, 5.5), (2.0, 1.0, 0.5)],
)
def test_a_save_costs_its_stall_and_the_steps_that_it_slows(
    calm: float | None, busy: float | None, cost: float
) -> None:
    assert save_cost(0.5, 10.5, calm, busy) == pytest.approx(cost)


def saver(
    commits: Commits, interval: Any = 4, grace: float = 30.0, board: ProgressBoard | None = None
) -> Saver:
    kept: Any = commits
    checkpoint = Checkpoint.model_validate({"interval": interval})
    return Saver(kept, checkpoint, board or ProgressBoard(), grace_seconds=grace)


def start(saving: Saver, *steps: int) -> None:
    for step in steps:
        saving.start(None, step, {"step": step}, None)


def down() -> StoreUnavailable:
    return StoreUnavailable("put", "s3://b/k", "no answer")


def test_a_number_of_steps_is_a_number_of_steps() -> None:
    saving = saver(Commits(), 4)
    assert [step for step in range(1, 13) if saving.due(step)] == [4, 8, 12]


def test_auto_waits_for_the_first_save_and_then_goes_by_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    saving = saver(Commits(), "Auto")
    assert saving.interval_seconds() == 10.0
    assert not saving.due(1)
    clock[0] += 10.0
    assert saving.due(2)
    start(saving, 2)
    assert not saving.due(3), "one has begun just now"
    saving._saves = [CommitInfo("", 2, "", 0, 10.0, 0.5, "")]
    assert saving.interval_seconds() == pytest.approx(math.sqrt(2 * 0.5 * 600))
    saving.stepped(1.0)
    clock[0] += 24
    assert not saving.due(4)
    clock[0] += 1
    assert saving.due(4)
    clock[0] += HOUR
    saving._started_at = clock[0]
    assert saving.interval_seconds() == pytest.approx(math.sqrt(2 * 0.5 * (HOUR + 35)))


def test_two_failed_saves_in_a_row_are_borne_and_told() -> None:
    commits, board = Commits(), ProgressBoard()
    commits.failures = [down(), CheckpointFailed("disk full")]
    saving = saver(commits, board=board)
    start(saving, 4, 8)
    saving.settle()
    assert "disk full" in board.report.save_problem
    assert saving.committed_step == -1
    start(saving, 12)
    saving.settle()
    assert saving.committed_step == 12
    assert board.report.save_problem == ""
    commits.failures = [down(), down()]
    start(saving, 16, 20, 24)
    saving.settle()
    assert saving.committed_step == 24


def test_the_third_in_a_row_ends_the_run() -> None:
    commits = Commits()
    commits.failures = [down(), down(), down()]
    saving = saver(commits)
    start(saving, 4, 8, 12)
    with pytest.raises(StoreUnavailable):
        saving.settle()


def test_the_last_save_must_succeed_and_a_fenced_one_ends_at_once() -> None:
    commits = Commits()
    saving = saver(commits)
    commits.failures = [down()]
    with pytest.raises(StoreUnavailable):
        saving.save(None, 4, {"step": 4}, None)
    commits.failures = [Fenced("over")]
    start(saving, 8)
    assert saving.failed
    with pytest.raises(Fenced):
        saving.settle()
    assert not saving.failed


@pytest.mark.parametrize(("grace", "told"), [(100.0, False), (14.0, True)])
def test_a_save_that_does_not_fit_the_grace_is_told(grace: float, told: bool) -> None:
    board = ProgressBoard()
    saving = saver(Commits(), grace=grace, board=board)
    saving.stepped(2.0)
    saving._committed(CommitInfo("s3://b/k", 4, "d", 10, 8.0, 0.5, "t"))
    problem = board.report.grace_problem
    assert bool(problem) is told
    if told:
        assert problem == (
            "a pod that is asked to stop needs 15 s to finish a step and save, and has 14 s"
        )
    assert board.report.checkpoint is not None
    assert (board.report.save_seconds, board.report.stall_seconds) == (8.0, 0.5)


@pytest.mark.parametrize(
    ("grace", "at_once", "after_a_step"), [(10, True, True), (14, False, True), (60, False, False)]
)
def test_a_grace_that_was_too_short_before_is_told_before_the_first_commit(
    grace: float, at_once: bool, after_a_step: bool
) -> None:
    """Or the condition would be well again at each attempt's start, for a whole interval."""
    board, commits = ProgressBoard(), Commits()
    kept: Any = commits
    saving = Saver(
        kept, Checkpoint(interval=1000), board, grace_seconds=grace, known_save_seconds=8.0
    )
    assert bool(board.report.grace_problem) is at_once
    saving.stepped(2.0)
    assert bool(board.report.grace_problem) is after_a_step
    assert board.report.save_seconds == 8.0


def test_where_no_save_is_known_nothing_is_said_of_the_grace() -> None:
    board = ProgressBoard()
    saver(Commits(), grace=1.0, board=board).stepped(2.0)
    assert board.report.grace_problem == ""


def test_the_spec_takes_auto_or_a_number() -> None:
    assert Checkpoint().interval == "Auto"
    assert Checkpoint.model_validate({"interval": 7}).interval == 7
    for wrong in ("auto", 0, True, 1.5, "7"):
        with pytest.raises(ValueError, match="write Auto, or a number of steps"):
            Checkpoint.model_validate({"interval": wrong})
