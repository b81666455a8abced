"""Whether a save fits into what is left of the grace period."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kubedistill_trainer.checkpoint import fits_grace

seconds = st.floats(0, 1e4)


@pytest.mark.parametrize(
    ("steps", "saves", "grace", "margin", "fits"),
    [
        ([1.0], [10.0], 16.0, 5.0, True),
        ([1.0], [10.0], 15.9, 5.0, False),
        ([], [10.0], 15.0, 5.0, True),
        ([1.0], [], 1000.0, 5.0, False),
        ([0.1, 4.0, 0.1], [1.0, 9.0], 18.0, 5.0, True),
        ([0.1, 4.0, 0.1], [1.0, 9.0], 17.0, 5.0, False),
        ([0.1] * 99 + [500.0], [1.0], 10.0, 5.0, True),
        ([0.1] * 98 + [500.0] * 2, [1.0], 10.0, 5.0, False),
        ([0.1], [1.0], 1.0, 5.0, False),
    ],
)
def test_grace(
    steps: list[float], saves: list[float], grace: float, margin: float, fits: bool
) -> None:
    assert fits_grace(steps, saves, grace, margin) is fits


@given(steps=st.lists(seconds), saves=st.lists(seconds, min_size=1), grace=seconds, more=seconds)
def test_more_grace_never_hurts(
    steps: list[float], saves: list[float], grace: float, more: float
) -> None:
    if fits_grace(steps, saves, grace, 1.0):
        assert fits_grace(steps, saves, grace + more, 1.0)
