"""A loss that is no number: the run stops, or goes back and leaves the step out, by policy."""

from __future__ import annotations

import json

import pytest
from kubedistill_api.exit_codes import ExitCode, policy
from kubedistill_trainer.checkpoint.results import Rejected
from kubedistill_trainer.failures import RunFailure
from loop_kit import Commits, Engine, gang, loop  # noqa: F401

pytestmark = pytest.mark.usefixtures("gang")
ORDER = [int(loop(Commits())._dataset.order.batch(step)[0]) for step in range(10)]
SICK = ORDER[5]
LEFT_OUT = [step for step, sample in enumerate(ORDER) if sample == SICK]


def test_by_default_the_run_stops_for_good() -> None:
    commits = Commits()
    with pytest.raises(RunFailure, match=r"the loss of step \d+ is nan; lower") as caught:
        loop(commits, engine=Engine(frozenset({SICK}))).run()
    assert caught.value.code is ExitCode.NON_FINITE_LOSS
    assert not policy(caught.value.code).retry
    steps = [json.loads(cursor)["step"] for cursor in commits.cursors]
    assert max(steps, default=0) <= LEFT_OUT[0], "what is no number is never committed"


def test_with_skip_the_run_goes_back_and_leaves_the_step_out() -> None:
    commits, engine = Commits(), Engine(frozenset({SICK}))
    trained = loop(commits, engine=engine, onNonFiniteLoss="Skip")
    assert trained.run() == 10
    assert trained.skipped == LEFT_OUT
    kept = [step + 1 for step in range(10) if step not in LEFT_OUT]
    assert [point.step for point in trained.history.points] == kept
    last = json.loads(commits.cursors[-1])
    assert (last["step"], last["skipped"]) == (10, LEFT_OUT)
    assert trained._board.report.skipped_steps == [step + 1 for step in LEFT_OUT]
    # After each sick step: again from the commit before it, without it.
    assert engine.taken.count(SICK) == len(LEFT_OUT)


def test_what_is_rejected_on_the_way_back_is_told() -> None:
    commits = Commits()
    trained = loop(commits, engine=Engine(frozenset({SICK})), onNonFiniteLoss="Skip")
    commits.rejected = [Rejected("s3://b/log/2", 4, "missing")]
    trained.run()
    assert trained._board.report.rejected_checkpoints == ["step 4, s3://b/log/2: missing"]


def test_the_next_attempt_leaves_out_what_the_one_before_did() -> None:
    commits, engine = Commits(), Engine(frozenset({SICK}))
    with pytest.raises(RunFailure, match="asked to stop"):
        loop(commits, stop_after=9, engine=engine, onNonFiniteLoss="Skip").run()
    second = Engine(frozenset({SICK}))
    resumed = loop(commits, engine=second, onNonFiniteLoss="Skip")
    resumed.run()
    assert resumed.skipped == LEFT_OUT
    whole = loop(Commits(), engine=Engine(frozenset({SICK})), onNonFiniteLoss="Skip")
    whole.run()
    assert resumed.history.points == whole.history.points


def test_a_run_without_any_number_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = loop(Commits(), engine=Engine(frozenset(range(6))), onNonFiniteLoss="Skip")
    monkeypatch.setattr(trained._dataset, "total_steps", 20)
    with pytest.raises(RunFailure, match="after 10 steps that were left out") as caught:
        trained.run()
    assert caught.value.code is ExitCode.NON_FINITE_LOSS
