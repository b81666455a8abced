"""How fast steps are made."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """Steps a second since the latest beginning: a start, or a return to an earlier step."""

    def __init__(self, step: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.begin(step)

    def begin(self, step: int) -> None:
        """Count from this step and from now."""
        self._first, self._since = step, self._clock()

    def left_out(self) -> None:
        """A step that was not made."""
        self._first += 1

    def speed(self, step: int) -> float:
        """Up to this step; 0 where no time has passed."""
        seconds = self._clock() - self._since
        return (step - self._first) / seconds if seconds > 0 else 0.0
