"""The history of a run's losses: bounded, and the same whether or not the run was interrupted."""

from __future__ import annotations

import json
import math

import pytest
from kubedistill_api.exit_codes import ExitCode
from kubedistill_trainer.failures import RunFailure
from kubedistill_trainer.methods.history import LIMIT, History, Point
from loop_kit import Commits, gang, loop  # noqa: F401


def recorded(first: int, last: int, history: History) -> History:
    for step in range(first, last + 1):
        history.record(step, math.nan, 3 + 1 / step, 1 / step, 1e-3 * step)
    return history


def test_every_step_is_there_until_it_is_full() -> None:
    points = recorded(1, 8, History(8)).points
    assert [p.step for p in points] == list(range(1, 9))
    assert points[2] == Point(3, None, 3.33333, 0.333333, 0.003)


def test_then_every_second_point_is_dropped() -> None:
    history = recorded(1, 9, History(8))
    assert [p.step for p in history.points] == [1, 2, 4, 6, 8, 9]
    assert [p.step for p in recorded(10, 11, history).points] == [1, 2, 4, 6, 8, 10, 11]
    assert [p.step for p in recorded(12, 15, history).points] == [1, 4, 8, 12, 15]


@pytest.mark.parametrize("steps", [1, 499, 500, 501, 1000, 1001, 12_345])
def test_first_and_last_step_are_always_there_and_the_rest_is_bounded(steps: int) -> None:
    points = recorded(1, steps, History()).points
    assert (points[0].step, points[-1].step) == (1, steps)
    assert min(steps, LIMIT // 2) <= len(points) <= LIMIT


@pytest.mark.parametrize("stop", [1, 7, 8, 9, 13, 40, 99])
def test_a_resumed_run_has_the_history_of_one_that_never_stopped(stop: int) -> None:
    cursor = json.loads(json.dumps(recorded(1, stop, History(8)).to_cursor(), allow_nan=False))
    resumed = recorded(stop + 1, 100, History.from_cursor(cursor, 8))
    assert resumed.to_cursor() == recorded(1, 100, History(8)).to_cursor()


@pytest.mark.parametrize("cursor", [None, {}, {"every": 1}, {"every": 2, "points": [[1, 2]]}, "x"])
def test_a_commit_without_a_history_gives_an_empty_one(cursor: object) -> None:
    assert History.from_cursor(cursor).points == ()  # type: ignore[arg-type]


def test_a_full_history_is_small() -> None:
    history = History()
    for step in range(1, LIMIT + 1):
        history.record(100_000_000 + step, 1 / 3e3, 2 / 3, 4 / 3, 2 / 3 * 1e-5)
    assert len(json.dumps(history.to_cursor())) < 32_000


@pytest.mark.usefixtures("gang")
def test_a_commit_carries_the_history_into_the_next_attempt() -> None:
    calm = loop(Commits())
    calm.run()
    assert [p.step for p in calm.history.points] == list(range(1, 11))
    assert {p.soft for p in calm.history.points} == {None}
    assert len({p.total for p in calm.history.points}) > 2
    commits = Commits()
    with pytest.raises(RunFailure, match="committed step 6"):
        loop(commits, stop_after=6).run()
    resumed = loop(commits)
    resumed.run()
    assert resumed.history.points == calm.history.points


@pytest.mark.usefixtures("gang")
def test_an_attempt_without_a_step_left_still_tells_the_loss() -> None:
    """The one before it committed the last step, and was interrupted afterwards."""
    commits = Commits()
    calm = loop(commits)
    calm.run()
    resumed = loop(commits)
    assert resumed.run() == 10
    assert resumed._board.report.loss == calm._board.report.loss is not None


@pytest.mark.usefixtures("gang")
def test_who_stops_before_the_first_commit_does_not_claim_one() -> None:
    with pytest.raises(RunFailure, match="too little to commit; nothing is committed") as caught:
        loop(Commits(), stop_after=2).run()
    assert caught.value.code is ExitCode.INTERRUPTED
