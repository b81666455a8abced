"""How often to save: as often as what it costs is worth what a failure would cost."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

_FIRST_SECONDS = 10.0
_FIRST_SHARE = 0.02
LONGEST_SECONDS = 1800.0
"""Whatever the formula says: nobody wants to lose more than that."""
_SHORTEST_SECONDS = 1.0
_DAY = 86_400.0
_YOUNG_SECONDS = 600.0
_NODE_DAYS = 150.0
"""Mean time between failures of one node's hardware (Kokolis et al., "Revisiting Reliability in
Large-Scale Machine Learning Research Clusters", 2024: 6.5 failures in 1,000 node-days)."""


def first_save(mtbf_seconds: float) -> float:
    """Seconds until the first save, of which nothing is known yet: worth knowing soon, and sooner
    where failures are frequent."""
    return max(_SHORTEST_SECONDS, min(_FIRST_SECONDS, _FIRST_SHARE * mtbf_seconds))


def save_interval(cost_seconds: float, save_seconds: float, mtbf_seconds: float) -> float:
    """Seconds from the start of one save to the start of the next: √(2 · cost · MTBF).

    Young, "A first order approximation to the optimum checkpoint interval", 1974. `cost_seconds` is
    what one save takes of the training, `save_seconds` how long it is in flight: the interval is
    never below that, since one upload is in flight at a time.
    """
    best = math.sqrt(2.0 * cost_seconds * mtbf_seconds)
    return max(_SHORTEST_SECONDS, save_seconds, min(LONGEST_SECONDS, best))


class Mean(NamedTuple):
    """A mean of so many."""

    value: float
    of: int


def mean_of_all(means: Iterable[Mean]) -> Mean | None:
    """The mean of everything that the means are of; None where that is nothing."""
    found = list(means)
    of = sum(mean.of for mean in found)
    return Mean(sum(mean.value * mean.of for mean in found) / of, of) if of else None


def expected_mtbf(seen: Mean | None, uptime_seconds: float, nodes: int) -> float:
    """Seconds between failures: `seen` before, and none since this start.

    Where none was seen, as long as it went well so far, and at least ten minutes: a job that has
    just begun fails sooner than one that has run for hours. At most a day or what the hardware of so
    many nodes lasts.
    """
    most = min(_DAY, _NODE_DAYS * _DAY / nodes)
    if seen is None:
        return min(most, max(_YOUNG_SECONDS, uptime_seconds))
    return min(most, seen.value + uptime_seconds / seen.of)


def save_cost(
    stall_seconds: float, save_seconds: float, calm_step: float | None, busy_step: float | None
) -> float:
    """Seconds that a save takes of the training: its stall, and what its upload slows steps down.

    `calm_step`, `busy_step`: mean step times without and with an upload beside them; None where
    there was no such step.
    """
    slower = 0.0
    if calm_step is not None and busy_step:
        slower = max(0.0, 1.0 - calm_step / busy_step)
    return stall_seconds + slower * max(0.0, save_seconds - stall_seconds)
