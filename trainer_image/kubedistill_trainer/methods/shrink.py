"""A model made smaller by all ranks of a gang, each with its part of the calibration data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from kubedistill_api.pruning import Smaller
from torch import Tensor

from kubedistill_trainer.compress.calibration import Batch
from kubedistill_trainer.compress.smaller import Cut, make_smaller
from kubedistill_trainer.context import Context
from kubedistill_trainer.data.dataset import Dataset
from kubedistill_trainer.data.order import Ids

_log = logging.getLogger(__name__)


class Gang:
    """The ranks of a gloo group, for `make_smaller`."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def sum(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            whole = tensor.cpu()
            dist.all_reduce(whole, group=self._group)
            tensor.copy_(whole)

    def from_first(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            first = tensor.cpu()
            dist.broadcast(first, 0, group=self._group)
            tensor.copy_(first)


def shrink(
    context: Context,
    dataset: Dataset,
    model: Any,
    wanted: Smaller,
    field: str,
    group: Any,
    tick: Callable[[], None],
    device: torch.device | None = None,
) -> tuple[Any, Cut]:
    """The part of `model` that matters most; the same on all ranks. A collective.

    `device`: where the calibration is computed, by default the model's.
    """
    training = context.run.spec.training
    batches = calibration_batches(
        dataset,
        calibration_samples(dataset.split.training, wanted.calibration_sequences),
        training.micro_batch_size,
        context.rank,
        context.world_size,
    )
    smaller, cut = make_smaller(
        model,
        wanted,
        batches,
        field=field,
        seed=training.seed,
        ranks=Gang(group),
        tick=tick,
        device=device,
    )
    _log.info("made smaller", extra=cut.to_dict())
    return smaller, cut


def calibration_samples(training: Ids, count: int) -> Ids:
    """So many of the training sequences (all, where there are fewer), spread over all of them: each
    file is there by its size."""
    if len(training) <= count:
        return training
    return training[np.linspace(0, len(training) - 1, count).round().astype(np.int64)]


def calibration_batches(
    dataset: Dataset, samples: Ids, size: int, rank: int, world_size: int
) -> list[Batch]:
    """This rank's part of the sequences, at most `size` at once."""
    mine = samples[rank::world_size]
    parts = [dataset.packed.take(mine[i : i + size]) for i in range(0, len(mine), size)]
    return [
        (
            torch.from_numpy(part.tokens),
            torch.from_numpy(part.positions),
            torch.from_numpy(part.labels),
        )
        for part in parts
    ]
