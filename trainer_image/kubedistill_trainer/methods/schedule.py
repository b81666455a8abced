"""The learning rate as a pure function of the step, so that a resume has nothing to restore."""

from __future__ import annotations

import math


def learning_rate(step: int, total_steps: int, peak: float, warmup_ratio: float) -> float:
    """Rate of optimizer step `step` (from 0): linear warm-up, then cosine decay to a tenth."""
    warmup = round(total_steps * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total_steps - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
