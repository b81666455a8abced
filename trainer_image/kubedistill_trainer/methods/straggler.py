"""Which rank do the others wait for?"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import fmean, median

WINDOW = 20
"""Steps that are looked at together: one slow step is none."""
_RATIO = 1.5
_SHARE_OF_STEP = 0.1


class StragglerWatch:
    """The ranks' own times of recent steps: what each took before it waited for any other."""

    def __init__(self, ranks_per_node: int) -> None:
        self._ranks_per_node = ranks_per_node
        self._steps: deque[tuple[float, Sequence[float]]] = deque(maxlen=WINDOW)

    def record(self, step_seconds: float, own_seconds: Sequence[float]) -> None:
        """Add a step: its whole time, and each rank's own, by rank."""
        self._steps.append((step_seconds, own_seconds))

    @property
    def sentence(self) -> str:
        """The slowest rank, if it holds the others up: its own time is half as long again as the
        median's and more, and what it is longer is a tenth of a step. Empty where there is none, and
        until a window is full."""
        if len(self._steps) < WINDOW:
            return ""
        own = [fmean(times) for times in zip(*(times for _, times in self._steps), strict=True)]
        if len(own) < 2:
            return ""
        # Of the others: with two ranks the slow one would be half of its own measure.
        slowest = max(range(len(own)), key=own.__getitem__)
        usual = median(own[:slowest] + own[slowest + 1 :])
        step = fmean(seconds for seconds, _ in self._steps)
        longer = own[slowest] - usual
        if own[slowest] < _RATIO * usual or longer < _SHARE_OF_STEP * step:
            return ""
        pod = slowest // self._ranks_per_node
        return (
            f"rank {slowest} (pod {pod}) takes {own[slowest] / usual:.1f} times as long as the other "
            f"ranks: {100 * longer / step:.0f}% of each step is waited for it"
        )
