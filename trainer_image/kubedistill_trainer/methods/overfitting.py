"""Is the student still learning what holds elsewhere, or the training text by heart?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from kubedistill_trainer.methods.history import Point
from kubedistill_trainer.methods.watch import Look

NOISE = 0.005
"""Of the best held-out loss: a smaller rise or fall is none."""


@dataclass(frozen=True)
class Overfitting:
    """Since the look after `since_step` the held-out loss is up by `held_out_rise`, and the training
    loss is down by `training_fall`; both in nats a token and more than noise."""

    since_step: int
    held_out_rise: float
    training_fall: float

    def sentence(self) -> str:
        return (
            f"since step {self.since_step:,} the held-out loss has risen by "
            f"{self.held_out_rise:.3g} while the training loss fell by {self.training_fall:.3g}: "
            "more data, fewer epochs or a smaller learning rate would help"
        )


def overfitting(
    looks: Sequence[Look], points: Sequence[Point], min_delta: float = 0.0
) -> Overfitting | None:
    """What the latest look says, beside the best one before it; None where it is not overfitting.

    Rise and fall must each be at least `NOISE` of the best held-out loss, and `min_delta` (nats a
    token, of early stopping) where that is more.

    Of training the mean total loss of the steps between a look and the one before it is taken: a
    single batch says little.
    """
    known = [look for look in looks if math.isfinite(look.loss)]
    if len(known) < 2:
        return None
    best = min(known[:-1], key=lambda look: look.loss)
    rise = known[-1].loss - best.loss
    then, now = (_training_loss(looks, points, look.step) for look in (best, known[-1]))
    least = max(NOISE * abs(best.loss), min_delta)
    if then is None or now is None or min(rise, then - now) < least or rise <= 0:
        return None
    return Overfitting(best.step, rise, then - now)


def _training_loss(looks: Sequence[Look], points: Sequence[Point], step: int) -> float | None:
    """Mean over the steps after the look before `step`'s, up to it; None where none was kept."""
    since = max((look.step for look in looks if look.step < step), default=0)
    losses = [p.total for p in points if since < p.step <= step and p.total is not None]
    return fmean(losses) if losses else None
