"""A model made smaller: measured, judged, cut."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import torch
from kubedistill_api.pruning import Smaller
from torch import Tensor

from kubedistill_trainer.compress.architecture import Architecture
from kubedistill_trainer.compress.calibration import Batch, loss_of, working_on
from kubedistill_trainer.compress.choosing import Kept, choose
from kubedistill_trainer.compress.importance import (
    Scores,
    Statistics,
    by_activation,
    by_chance,
    by_magnitude,
    collect,
)
from kubedistill_trainer.compress.planning import planned
from kubedistill_trainer.compress.sizes import Sizes
from kubedistill_trainer.compress.slicing import cut
from kubedistill_trainer.losses.types import IGNORED

_log = logging.getLogger(__name__)
Tick = Callable[[], None]


class Ranks(Protocol):
    """The processes that make the same model smaller, each with a part of the calibration data."""

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each by its sum over all of them."""

    def from_first(self, tensors: Sequence[Tensor]) -> None:
        """Replace each by the first one's."""


class Alone:
    """One process."""

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Nothing to add."""

    def from_first(self, tensors: Sequence[Tensor]) -> None:
        """It is the first."""


@dataclass(frozen=True)
class Candidate:
    """Sizes within the budget. `loss`: of the model cut to them, in nats a token of calibration
    data; None where nothing was to be chosen."""

    sizes: Sizes
    parameters: int
    loss: float | None = None


@dataclass(frozen=True)
class Cut:
    """What was done to a model. `candidates`: that were tried for a budget."""

    before: Sizes
    after: Sizes
    parameters_before: int
    parameters_after: int
    kept_layers: tuple[int, ...]
    calibration_tokens: int
    candidates: tuple[Candidate, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For reports."""
        return asdict(self)


def make_smaller(
    model: Any,
    wanted: Smaller,
    batches: Sequence[Batch],
    *,
    field: str,
    seed: int = 0,
    ranks: Ranks | None = None,
    tick: Tick = lambda: None,
    device: torch.device | None = None,
) -> tuple[Any, Cut]:
    """The part of `model` that matters most, as `wanted`; `model` is left as it is.

    `batches`: this rank's calibration data, `field`: what `wanted` stands in, `device`: where the
    calibration is computed, by default the model's. The result is the same on all ranks, and on the
    model's device. InputsRefused for targets that the model cannot have.
    """
    ranks = ranks or Alone()
    device = device or next(model.parameters()).device
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    plan = planned(wanted, model.config.to_dict(), shapes, field)
    architecture, sizes, tensors = plan.architecture, plan.sizes, plan.tensors
    open_to = plan.candidates
    measure = partial(collect, model, architecture, sizes, batches, tick, device)
    statistics, scores = _judge(model, architecture, sizes, wanted, measure, seed, ranks)
    even = wanted.layer_importance == "Even"

    def made(target: Sizes) -> tuple[Any, Kept]:
        kept = choose(scores, sizes, target, even)
        return cut(model, architecture, sizes, target, kept, statistics), kept

    tried: list[Candidate] = []
    if len(open_to) > 1:
        for target in open_to:
            loss = _loss(made(target)[0], batches, ranks, tick, device)
            tried.append(Candidate(target, tensors.parameters(target), loss))
            _log.info("candidate", extra=asdict(tried[-1]))
        open_to = [min(tried, key=_order).sizes]
    target = open_to[0]
    smaller, kept = made(target)
    tokens = int(statistics.tokens.item()) if statistics else 0
    done = Cut(
        sizes, target, tensors.parameters(sizes), tensors.parameters(target), kept.layers, tokens,
        tuple(tried),
    )  # fmt: skip
    return smaller, done


def _order(candidate: Candidate) -> float:
    loss = candidate.loss
    return loss if loss is not None and math.isfinite(loss) else math.inf


def _judge(
    model: Any,
    architecture: Architecture,
    sizes: Sizes,
    wanted: Smaller,
    measure: Callable[[], Statistics],
    seed: int,
    ranks: Ranks,
) -> tuple[Statistics | None, Scores]:
    """Statistics, where anything needs them, and scores."""
    layers = wanted.layers is not None or wanted.parameters is not None
    influence = layers and wanted.layer_importance == "BlockInfluence"
    statistics = None
    if wanted.importance == "Activation" or influence or wanted.embedding is not None:
        statistics = measure()
        ranks.sum(statistics.tensors())
    found = None
    if statistics is not None:
        found = by_activation(model, architecture, statistics)
    if wanted.importance == "Activation":
        assert found is not None
        scores = found
    elif wanted.importance == "Magnitude":
        scores = by_magnitude(model, architecture, sizes)
    else:
        scores = by_chance(sizes, seed)
    if influence and found is not None:
        scores = Scores(scores.heads, scores.ffn, scores.hidden, found.layers)
    ranks.from_first([scores.heads, scores.ffn, scores.hidden, scores.layers])
    return statistics, scores


@torch.no_grad()
def _loss(
    model: Any, batches: Sequence[Batch], ranks: Ranks, tick: Tick, device: torch.device
) -> float:
    """Mean cross-entropy of the next token, in nats, over all ranks' calibration data."""
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)
    with working_on(model, device):
        for tokens, positions, labels in batches:
            loss = float(loss_of(model, tokens, positions, labels))
            total += torch.tensor([loss, int((labels != IGNORED).sum())], dtype=torch.float64)
            tick()
    ranks.sum([total])
    return float(total[0] / total[1].clamp(min=1))
