"""Which sequences are held out, and the order of the others: pure functions of a seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
_SPLIT_STREAM = 1_000_003
"""Keeps the draw of the split apart from the draws of the epochs, which use the epoch's number."""


@dataclass(frozen=True)
class Split:
    """Ids of the sequences, ascending: training [n], held-out [m]."""

    training: Ids
    heldout: Ids


def split(count: int, holdout: float, seed: int) -> Split:
    """Hold out round(holdout · count) of `count` ≥ 2 sequences, at least one of each kind."""
    heldout_count = min(max(1, round(holdout * count)), count - 1)
    shuffled = np.random.default_rng([seed, _SPLIT_STREAM]).permutation(count)
    return Split(np.sort(shuffled[heldout_count:]), np.sort(shuffled[:heldout_count]))


@dataclass(frozen=True)
class Order:
    """An endless row of training ids: epoch after epoch, each shuffled by seed and epoch.

    Optimizer step s (from 0) takes the ids [s·B, (s+1)·B); nothing but s is needed to resume, and
    any number of ranks sees the same samples.
    """

    training: Ids
    batch_size: int
    seed: int

    def total_steps(self, epochs: int, max_steps: int | None) -> int:
        """Whole batches in `epochs` passes, at least one, at most `max_steps`."""
        steps = max(1, len(self.training) * epochs // self.batch_size)
        return steps if max_steps is None else min(steps, max_steps)

    def batch(self, step: int) -> Ids:
        """Ids [B] of one optimizer step."""
        size = len(self.training)
        wanted = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        result = np.empty_like(wanted)
        for epoch in np.unique(wanted // size):
            mask = wanted // size == epoch
            shuffled = np.random.default_rng([self.seed, int(epoch)]).permutation(size)
            result[mask] = self.training[shuffled[wanted[mask] % size]]
        return result


def micro_batch_size(per_rank: int, wanted: int) -> int:
    """The largest divisor of `per_rank` sequences that is at most `wanted`."""
    return max(size for size in range(1, min(per_rank, wanted) + 1) if per_rank % size == 0)
