"""Steps a second."""

from __future__ import annotations

from kubedistill_trainer.methods.pace import Pace


def test_a_return_to_an_earlier_step_begins_anew() -> None:
    """Counted from the first start, 2 steps after a return by 8 would be -6 steps made."""
    now = 100.0
    pace = Pace(0, lambda: now)
    assert pace.speed(0) == 0.0
    now = 110.0
    assert pace.speed(20) == 2.0
    pace.begin(12)
    pace.left_out()
    now = 112.0
    assert pace.speed(15) == 1.0
