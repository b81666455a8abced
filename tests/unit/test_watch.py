"""Early stopping: when it looks, when it stops, and which step it takes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import pytest
from kubedistill_api.training import EarlyStopping, Training
from kubedistill_trainer.checkpoint.results import Rejected
from kubedistill_trainer.failures import RunFailure
from kubedistill_trainer.methods.schedule import learning_rate
from kubedistill_trainer.methods.watch import Watch
from loop_kit import Commits, gang, loop  # noqa: F401

NAN = float("nan")
RULE = EarlyStopping(interval_steps=2, patience=2, min_delta=0.1)


@pytest.mark.parametrize(
    ("losses", "best", "stopped"),
    [
        ([], None, False),
        ([3.0], 2, False),
        ([3.0, 2.5, 2.0], 6, False),
        ([3.0, 3.5], 2, False),
        ([3.0, 3.5, 3.2], 2, True),
        # Falls by less than minDelta are none, however many.
        ([3.0, 2.95, 2.91], 2, True),
        ([3.0, 2.95, 2.89], 6, False),
        ([3.0, 2.0, 2.5, 1.8], 8, False),
        # What is not a number is no look to go back to.
        ([NAN], None, False),
        ([NAN, 3.0], 4, False),
        ([float("inf"), 3.0], 4, False),
        ([NAN, 3.0, 3.5, 3.6], 4, True),
        ([3.0, NAN, 2.0], 6, False),
        ([3.0, NAN, NAN], 2, True),
        ([NAN, NAN], None, True),
    ],
)
def test_the_rule(losses: list[float], best: int | None, stopped: bool) -> None:
    watch = Watch(RULE)
    for index, loss in enumerate(losses):
        step = 2 * (index + 1)
        assert watch.record(step, loss) == (watch.best_step == step)
    assert (watch.best_step, watch.stopped) == (best, stopped)
    # A commit's JSON is strict.
    again = Watch.from_cursor(RULE, json.loads(json.dumps(watch.to_cursor(), allow_nan=False)))
    assert [look.step for look in again.looks] == [look.step for look in watch.looks]
    assert (again.best_step, again.stopped) == (best, stopped)
    kept = [(look.step, look.loss) for look in watch.looks if math.isfinite(look.loss)]
    assert [(look.step, look.loss) for look in again.looks if math.isfinite(look.loss)] == kept


@pytest.mark.parametrize("cursor", [None, "x", [[1]], [["a", 2]], {"steps": 1}])
def test_a_cursor_without_looks_gives_a_watch_without_looks(cursor: object) -> None:
    assert Watch.from_cursor(RULE, cursor).looks == ()  # type: ignore[arg-type]


def test_it_looks_at_the_interval_and_at_the_end() -> None:
    assert [step for step in range(1, 8) if Watch(RULE).due(step, 7)] == [2, 4, 6, 7]
    assert not Watch(None).due(2, 2)


def test_an_infinite_perplexity_is_no_best() -> None:
    watch = Watch(RULE)
    watch.record(2, 3.0)
    assert not watch.record(4, float("nan"))
    assert watch.best_step == 2


def _falling_then_rising() -> Iterator[float]:
    yield from (9.0, 5.0, 6.0, 7.0, 8.0)


@pytest.mark.usefixtures("gang")
def test_training_ends_and_goes_back_to_the_best_step() -> None:
    commits, heldout = Commits(), _falling_then_rising()
    stopping = {"earlyStopping": {"intervalSteps": 2, "patience": 2}}
    run = loop(commits, heldout=lambda: next(heldout), **stopping)
    assert run.run() == 8
    assert run.watch.best_step == run.exported_step == 4
    assert commits.loaded == [None, 4]
    steps = [json.loads(cursor)["step"] for cursor in commits.cursors]
    assert steps == [2, 4, 8]
    assert commits.kept == [2, 4, 4]
    # A next attempt, killed before it exported: no step more, and the same best.
    again = loop(commits, **stopping)
    assert again.run() == 8
    assert commits.loaded == [None, 4, None, 4]


@pytest.mark.usefixtures("gang")
def test_a_first_look_that_is_not_a_number_is_not_gone_back_to() -> None:
    commits, heldout = Commits(), iter((NAN, 5.0, 6.0, 7.0, 8.0))
    run = loop(
        commits, heldout=lambda: next(heldout), earlyStopping={"intervalSteps": 2, "patience": 2}
    )
    assert run.run() == 8
    assert run.watch.best_step == run.exported_step == 4
    assert commits.loaded == [None, 4]


@pytest.mark.usefixtures("gang")
def test_a_start_that_is_not_a_number_does_not_stop_the_commits() -> None:
    """A commit's JSON knows no NaN."""
    commits = Commits()
    run = loop(commits, heldout=lambda: NAN)
    run._context.run.spec.student.config = None  # type: ignore[misc]
    assert run.run() == 10
    assert math.isnan(run.initial_perplexity or 0)
    assert len(commits.cursors) == 3


@pytest.mark.usefixtures("gang")
def test_a_damaged_best_commit_is_told_from_what_is_exported() -> None:
    commits, heldout = Commits(), _falling_then_rising()
    commits.damaged = 4
    stopping = {"earlyStopping": {"intervalSteps": 2, "patience": 2}}
    run = loop(commits, heldout=lambda: next(heldout), **stopping)
    run.run()
    assert (run.watch.best_step, run.exported_step) == (4, 8)


@pytest.mark.usefixtures("gang")
def test_what_is_rejected_at_the_end_is_told_beside_what_was_before() -> None:
    commits, heldout = Commits(), _falling_then_rising()
    run = loop(
        commits, heldout=lambda: next(heldout), earlyStopping={"intervalSteps": 2, "patience": 2}
    )
    run._board.update(rejected_checkpoints=["of the start"])
    commits.rejected = [Rejected("s3://b/log/4", 4, "missing")]
    run.run()
    assert run._board.report.rejected_checkpoints == [
        "step 4, s3://b/log/4: missing",
        "of the start",
    ]


@pytest.mark.usefixtures("gang")
@pytest.mark.parametrize("after", [3, 4, 5, 8])
def test_a_resumed_run_decides_as_one_that_never_stopped(after: int) -> None:
    """Also one that was stopped where a look was due, and did not make it."""
    commits, heldout = Commits(), _falling_then_rising()
    stopping = {"earlyStopping": {"intervalSteps": 2, "patience": 2}}
    with pytest.raises(RunFailure, match=f"committed step {after}"):
        loop(commits, stop_after=after, heldout=lambda: next(heldout), **stopping).run()
    resumed = loop(commits, heldout=lambda: next(heldout), **stopping)
    assert resumed.run() == 8
    assert resumed.watch.best_step == 4
    assert [look.loss for look in resumed.watch.looks] == [
        math.log(perplexity) for perplexity in (9, 5, 6, 7)
    ]


@pytest.mark.usefixtures("gang")
def test_where_the_last_step_is_the_best_it_stays() -> None:
    commits, heldout = Commits(), iter([9.0, 8.0, 7.0, 6.0, 5.0])
    run = loop(
        commits, heldout=lambda: next(heldout), earlyStopping={"intervalSteps": 2, "patience": 1}
    )
    assert run.run() == 10
    assert commits.loaded == [None]


@pytest.mark.parametrize(
    ("schedule", "final", "expected"),
    [
        ("Cosine", 0.1, [0.5, 1.0, 1.0, 0.868, 0.55, 0.232]),
        ("Cosine", 0.0, [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]),
        ("Linear", 0.0, [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("Linear", 0.2, [0.5, 1.0, 1.0, 0.8, 0.6, 0.4]),
        ("Constant", 0.1, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_schedules(schedule: str, final: float, expected: list[float]) -> None:
    training = Training.model_validate(
        {"learningRate": 1.0, "warmupRatio": 1 / 3, "schedule": schedule, "finalRateRatio": final}
    )
    rates = [learning_rate(step, 6, training) for step in range(6)]
    assert rates == pytest.approx(expected, abs=1e-3)
