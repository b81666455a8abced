"""The learning rate as a pure function of the step, so that a resume has nothing to restore."""

from __future__ import annotations

import math

from kubedistill_api.training import Training


def learning_rate(step: int, total_steps: int, training: Training) -> float:
    """Rate of optimizer step `step` (from 0): linear warm-up, then down to the final rate."""
    peak, final = training.learning_rate, training.final_rate_ratio
    warmup = round(total_steps * training.warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    if training.schedule == "Constant":
        return peak
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    left = 1 - done if training.schedule == "Linear" else 0.5 * (1 + math.cos(math.pi * done))
    return peak * (final + (1 - final) * left)
