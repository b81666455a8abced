"""Which layers, heads and channels stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kubedistill_trainer.compress.importance import Scores
from kubedistill_trainer.compress.sizes import Sizes


@dataclass(frozen=True)
class Kept:
    """Indices in the model as it is, each ascending.

    `queries` and `kv_heads` [layers kept][...], `ffn` the same, in the order of `layers`; `hidden`.
    """

    layers: tuple[int, ...]
    queries: tuple[tuple[int, ...], ...]
    kv_heads: tuple[tuple[int, ...], ...]
    ffn: tuple[tuple[int, ...], ...]
    hidden: tuple[int, ...]


def choose(scores: Scores, sizes: Sizes, target: Sizes, even_layers: bool = False) -> Kept:
    """The most important of everything, `target` many; of equals the first.

    `even_layers`: layers are kept evenly spread, whatever their scores.
    """
    layers = (
        evenly_spread(sizes.layers, target.layers)
        if even_layers
        else _best(scores.layers, target.layers)
    )
    heads = [_heads(scores.heads[layer], sizes, target) for layer in layers]
    return Kept(
        layers=layers,
        queries=tuple(queries for queries, _ in heads),
        kv_heads=tuple(kv_heads for _, kv_heads in heads),
        ffn=tuple(_best(scores.ffn[layer], target.ffn) for layer in layers),
        hidden=_best(scores.hidden, target.hidden),
    )


def evenly_spread(total: int, wanted: int) -> tuple[int, ...]:
    """Indices of the `wanted` kept of `total`, the first and the last included."""
    if wanted == 1:
        return (0,)
    return tuple(round(i * (total - 1) / (wanted - 1)) for i in range(wanted))


def _heads(scores: Tensor, sizes: Sizes, target: Sizes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Query heads and key-value heads of one layer.

    A group is worth what those of its heads are that would stay, as sums of squares: what they add
    to the hidden state is not alike, so its squares add up.
    """
    groups = scores.square().view(sizes.kv_heads, sizes.group)
    best = torch.stack([_mask(group, target.group) for group in groups])
    kv_heads = _best((groups * best).sum(1), target.kv_heads)
    queries = [
        kv * sizes.group + head for kv in kv_heads for head in best[kv].nonzero().flatten().tolist()
    ]
    return tuple(queries), kv_heads


def _mask(scores: Tensor, count: int) -> Tensor:
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[list(_best(scores, count))] = True
    return mask


def _best(scores: Tensor, count: int) -> tuple[int, ...]:
    order = torch.sort(scores, descending=True, stable=True).indices
    return tuple(sorted(order[:count].tolist()))
