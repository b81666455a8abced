"""The rank that the others wait for."""

from __future__ import annotations

import pytest
from kubedistill_trainer.methods.straggler import WINDOW, StragglerWatch


def watched(step: float, *own: float, steps: int = WINDOW, ranks_per_node: int = 2) -> str:
    watch = StragglerWatch(ranks_per_node)
    for _ in range(steps):
        watch.record(step, own)
    return watch.sentence


@pytest.mark.parametrize(
    ("step", "own", "told"),
    [
        (1.0, (0.3, 0.3, 0.3, 0.31), ""),
        (1.0, (0.3, 0.3, 0.3, 0.44), ""),  # not half as long again
        (9.0, (0.3, 0.3, 0.3, 0.9), ""),  # no tenth of a step
        (1.0, (0.3,), ""),
        (1.0, (0.3, 0.3, 0.3, 0.9), "rank 3 (pod 1) takes 3.0 times as long"),
        (1.0, (0.2, 0.6), "rank 1 (pod 0) takes 3.0 times as long"),
        (1.0, (0.6, 0.2, 0.2), "rank 0 (pod 0) takes 3.0 times as long"),
    ],
)
def test_the_slowest_is_named_where_it_holds_the_others_up(
    step: float, own: tuple[float, ...], told: str
) -> None:
    sentence = watched(step, *own)
    assert sentence.startswith(told) if told else sentence == ""


def test_one_slow_step_is_none() -> None:
    watch = StragglerWatch(1)
    for number in range(WINDOW):
        watch.record(1.0, (0.2, 2.0 if number == 3 else 0.2))
    assert watch.sentence == ""
    assert watched(1.0, 0.2, 2.0, steps=WINDOW - 1) == ""


def test_it_ends_when_the_rank_keeps_up_again() -> None:
    watch = StragglerWatch(1)
    for _ in range(WINDOW):
        watch.record(1.0, (0.2, 0.9))
    assert watch.sentence.endswith("70% of each step is waited for it")
    for _ in range(WINDOW):
        watch.record(0.3, (0.2, 0.2))
    assert watch.sentence == ""
