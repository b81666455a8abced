"""Sizes that keep within a number of parameters.

There are many ways to come to one number: fewer layers, fewer heads, a narrower FFN. The candidates
are those that use the budget up, and of those with as many layers the most even one; which of them is
best, only trying them says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from kubedistill_api.pruning import Smaller

from kubedistill_trainer.compress.sizes import Sizes, Tensors
from kubedistill_trainer.compress.targets import alignment, sizes_kept
from kubedistill_trainer.failures import refuse

MOST_CANDIDATES = 8
_LEAST_SHARE = 0.25
"""Of any one thing: what is left of it with less teaches nothing."""
_USED_UP = 0.97


def candidates(wanted: Smaller, sizes: Sizes, tensors: Tensors, field: str) -> list[Sizes]:
    """Sizes to choose from, those with the most layers first: one where nothing is left open.

    InputsRefused for targets that no model can have, or that are not within the budget.
    """
    most = sizes_kept(wanted, sizes, field)
    if wanted.parameters is None:
        return [most]
    there = tensors.parameters(sizes)
    budget = int(wanted.parameters * there if wanted.parameters < 1 else wanted.parameters)
    found = [s for s in _shapes(wanted, most, tensors, budget) if tensors.parameters(s) <= budget]
    if not found:
        least = min(map(tensors.parameters, _shapes(wanted, most, tensors, 0)))
        raise refuse(
            f"{field}.parameters",
            f"{wanted.parameters:g}, which is {budget:,} of {there:,} parameters",
            f"with a quarter of what has no target of its own {least:,} are left "
            f"({least / there:.3g}): raise it, or give `embedding` a target",
        )
    fullest = max(map(tensors.parameters, found))
    found = [s for s in found if tensors.parameters(s) >= _USED_UP * fullest]
    by_layers: dict[int, Sizes] = {}
    for one in sorted(found, key=lambda s: _unevenness(s, sizes)):
        by_layers.setdefault(one.layers, one)
    ordered = [by_layers[layers] for layers in sorted(by_layers, reverse=True)]
    return _spread(ordered, MOST_CANDIDATES)


def _shapes(wanted: Smaller, most: Sizes, tensors: Tensors, budget: int) -> Iterator[Sizes]:
    """With the widest FFN that fits, or the narrowest that there is."""
    for layers in _layers(wanted, most):
        for kv_heads in _groups(wanted, most):
            one = replace(most, layers=layers, kv_heads=kv_heads, heads=kv_heads * most.group)
            yield one if wanted.ffn is not None else _widest(one, tensors, budget)


def _layers(wanted: Smaller, most: Sizes) -> range:
    least = most.layers if wanted.layers is not None else _share(most.layers)
    return range(least, most.layers + 1)


def _groups(wanted: Smaller, most: Sizes) -> range:
    given = wanted.heads is not None or wanted.kv_heads is not None
    return range(most.kv_heads if given else _share(most.kv_heads), most.kv_heads + 1)


def _share(count: int) -> int:
    return max(1, round(_LEAST_SHARE * count))


def _widest(one: Sizes, tensors: Tensors, budget: int) -> Sizes:
    step = alignment(one.ffn)
    without = tensors.parameters(replace(one, ffn=0))
    channel = tensors.parameters(replace(one, ffn=1)) - without
    fits = (budget - without) // channel // step * step
    least = max(step, round(_LEAST_SHARE * one.ffn / step) * step)
    return replace(one, ffn=min(one.ffn, max(least, fits)))


def _unevenness(one: Sizes, sizes: Sizes) -> float:
    shares = (one.layers / sizes.layers, one.heads / sizes.heads, one.ffn / sizes.ffn)
    return max(shares) - min(shares)


def _spread(ordered: list[Sizes], most: int) -> list[Sizes]:
    if len(ordered) <= most:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (most - 1))] for i in range(most)]
