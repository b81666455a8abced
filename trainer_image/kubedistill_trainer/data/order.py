"""Which sequences are held out, and the order of the others: pure functions of a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
_SPLIT_STREAM = 1_000_003
_PASS_STREAM = 1_000_004
"""Keep these draws apart from those of the epochs, which use the epoch's number."""


@dataclass(frozen=True)
class Split:
    """Ids of the sequences, ascending: training [n], held-out [m]."""

    training: Ids
    heldout: Ids


def split(counts: Sequence[int], holdout: float, seed: int) -> Split:
    """Hold out a share of each part; ids count through the parts, which hold `counts` sequences.

    Of n ≥ 2 sequences round(holdout · n) are held out, at least one of each kind; a part of one
    sequence is learnt, unless there is no other.
    """
    if max(counts) < 2:
        counts = [sum(counts)]
    drawn = [_heldout(count, holdout, [seed, _SPLIT_STREAM, i]) for i, count in enumerate(counts)]
    heldout = np.concatenate(drawn)
    return Split(np.flatnonzero(~heldout), np.flatnonzero(heldout))


def _heldout(count: int, holdout: float, entropy: list[int]) -> npt.NDArray[np.bool_]:
    """Which [count] of a part are held out."""
    wanted = min(max(1, round(holdout * count)), count - 1)
    result = np.zeros(count, dtype=np.bool_)
    result[np.random.default_rng(entropy).permutation(count)[:wanted]] = True
    return result


@dataclass(frozen=True)
class Part:
    """Training ids that have one weight: how often an epoch holds each of them."""

    training: Ids
    weight: float = 1.0

    def taken(self, epochs: int) -> int:
        """How many sequences of this part `epochs` epochs hold."""
        # As a fraction of the decimal that a person wrote: 0.29 of 100 are 29.
        return int(Fraction(str(self.weight)) * len(self.training) * epochs)


class Order:
    """An endless row of training ids: epoch after epoch, each shuffled by seed and epoch.

    Each part is an endless row too, of shuffled passes over its ids, from which an epoch takes the
    next `weight · n`: so over all epochs every id of a part comes equally often, give or take one.

    Optimizer step s (from 0) takes the ids [s·B, (s+1)·B); nothing but s is needed to resume, and
    any number of ranks sees the same samples.
    """

    def __init__(self, parts: Sequence[Part], batch_size: int, seed: int) -> None:
        self._parts = [part for part in parts if len(part.training)]
        self._batch_size = batch_size
        self._seed = seed
        # Training and what reads ahead of it may be in two epochs.
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def total_steps(self, epochs: int, max_steps: int | None) -> int:
        """Whole batches in `epochs` passes, at least one, at most `max_steps`."""
        steps = max(1, self._begin(epochs) // self._batch_size)
        return steps if max_steps is None else min(steps, max_steps)

    def batch(self, step: int) -> Ids:
        """Ids [B] of one optimizer step."""
        place, end = step * self._batch_size, (step + 1) * self._batch_size
        epoch = self._epoch_of(place)
        taken: list[Ids] = []
        while place < end:
            begin = self._begin(epoch)
            ids = self._epoch(epoch)[place - begin : end - begin]
            taken.append(ids)
            place += len(ids)
            epoch += 1
        return np.concatenate(taken)

    def _begin(self, epoch: int) -> int:
        """Ids before an epoch."""
        return sum(part.taken(epoch) for part in self._parts)

    def _epoch_of(self, place: int) -> int:
        """The epoch that holds the id at a place of the row."""
        low, high = 0, 1
        while self._begin(high) <= place:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._begin(middle) <= place else (low, middle)
        return low

    def _shuffled(self, epoch: int) -> Ids:
        """The ids of an epoch, in its order."""
        taken = [self._taken(i, epoch) for i in range(len(self._parts))]
        # Sorted, so that with weight 1 throughout it is a shuffle of the training ids and no more.
        ids = np.sort(np.concatenate(taken))
        return ids[np.random.default_rng([self._seed, epoch]).permutation(len(ids))]

    def _taken(self, index: int, epoch: int) -> Ids:
        """What an epoch takes of a part's endless row."""
        part = self._parts[index]
        size = len(part.training)
        place, end = part.taken(epoch), part.taken(epoch + 1)
        taken = [part.training[:0]]
        while place < end:
            number, first = divmod(place, size)
            last = min(size, first + end - place)
            whole = last - first == size  # in which order does not matter then
            taken.append(part.training if whole else self._pass(index, number)[first:last])
            place += last - first
        return np.concatenate(taken)

    def _pass(self, index: int, number: int) -> Ids:
        """A pass over a part, in its order."""
        ids = self._parts[index].training
        entropy = [self._seed, _PASS_STREAM, index, number]
        return ids[np.random.default_rng(entropy).permutation(len(ids))]


def micro_batch_size(per_rank: int, wanted: int) -> int:
    """The largest divisor of `per_rank` sequences that is at most `wanted`."""
    return max(size for size in range(1, min(per_rank, wanted) + 1) if per_rank % size == 0)
