"""When is a student said to learn its text by heart?"""

from __future__ import annotations

import math

import pytest
from kubedistill_trainer.methods.history import Point
from kubedistill_trainer.methods.overfitting import overfitting
from kubedistill_trainer.methods.watch import Look

FALLING = [3.0, 2.8, 2.6, 2.4, 2.2, 2.0]
RISING = [2.0, 2.0, 2.1, 2.1, 2.2, 2.2]


def _points(losses: list[float]) -> list[Point]:
    return [Point(step, None, None, loss, 1e-3) for step, loss in enumerate(losses, 1)]


def _looks(*losses: float) -> list[Look]:
    return [Look(step=2 * n, loss=loss) for n, loss in enumerate(losses, 1)]


@pytest.mark.parametrize(
    ("looks", "training", "since"),
    [
        ((2.5, 2.4, 2.45), FALLING, 4),  # apart since the second look
        ((2.4, 2.5, 2.6), FALLING, 2),
        ((2.5, 2.4, 2.3), FALLING, None),  # both fall
        ((2.3, 2.4, 2.5), RISING, None),  # both rise: that is divergence
        ((2.5, 2.4, 2.4), FALLING, None),  # no rise
        ((2.5,), FALLING, None),
        ((), FALLING, None),
        ((2.4, math.nan, 2.5), FALLING, 2),
        ((2.4, 2.5), [], None),  # nothing is known of training
    ],
)
def test_it_takes_a_rise_there_and_a_fall_here(
    looks: tuple[float, ...], training: list[float], since: int | None
) -> None:
    found = overfitting(_looks(*looks), _points(training))
    assert (found.since_step if found else None) == since


@pytest.mark.parametrize(
    ("rise", "fall", "min_delta", "found"),
    [
        (0.02, 0.02, 0.0, True),
        (0.0101, 0.0101, 0.0, True),
        (0.0099, 0.5, 0.0, False),  # 0.5 % of 2.0 is the least
        (0.5, 0.0099, 0.0, False),
        (1e-7, 1e-9, 0.0, False),
        (0.05, 0.5, 0.1, False),
        (0.5, 0.05, 0.1, False),
        (0.15, 0.15, 0.1, True),
        (0.0099, 0.0099, 0.001, False),  # the greater of both
    ],
)
def test_less_than_noise_is_nothing(
    rise: float, fall: float, min_delta: float, found: bool
) -> None:
    points = _points([3.0, 3.0, 3.0 - fall, 3.0 - fall])
    assert (overfitting(_looks(2.0, 2.0 + rise), points, min_delta) is not None) is found


def test_it_says_by_how_much() -> None:
    found = overfitting(_looks(2.4, 2.5), _points([3.0, 2.8, 2.6, 2.2]))
    assert found is not None
    assert found.held_out_rise == pytest.approx(0.1)
    assert found.training_fall == pytest.approx(2.9 - 2.4)
    assert "since step 2 the held-out loss has risen by 0.1" in found.sentence()
