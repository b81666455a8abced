"""From what a person wants to keep to the sizes of the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import gcd

from kubedistill_api.pruning import Smaller

from kubedistill_trainer.compress.sizes import Sizes
from kubedistill_trainer.failures import refuse

_ALIGNED = 128
"""Shares of a width come out at multiples of as much of this as divides the width now: what kernels
and the groups of INT4 weights ask for."""
_UNEVEN = 0.1
"""So far a share may be from a whole number of heads, for 0.33 of nine to be three."""


def sizes_kept(wanted: Smaller, sizes: Sizes, field: str) -> Sizes:
    """The sizes of the result, but for `parameters`. InputsRefused for what no model can have."""
    heads, kv_heads = _heads(wanted, sizes, field)
    return replace(
        sizes,
        layers=_layers(wanted.layers, sizes.layers, f"{field}.layers"),
        heads=heads,
        kv_heads=kv_heads,
        ffn=_width(wanted.ffn, sizes.ffn, f"{field}.ffn"),
        hidden=_width(wanted.embedding, sizes.hidden, f"{field}.embedding"),
    )


def alignment(width: int) -> int:
    """What a share of a width is a multiple of."""
    return gcd(width, _ALIGNED)


def _layers(wanted: float | None, there: int, field: str) -> int:
    if wanted is None:
        return there
    kept = round(wanted * there) if wanted < 1 else int(wanted)
    if kept < 1:
        raise refuse(
            field, f"{wanted:g}, which leaves none of {there} layers", f"at least {1 / there:.3g}"
        )
    return _at_most(kept, there, "layers", field)


def _width(wanted: float | None, there: int, field: str) -> int:
    if wanted is None:
        return there
    if wanted >= 1:
        return _at_most(int(wanted), there, "channels", field)
    step = alignment(there)
    kept = round(wanted * there / step) * step
    if kept < 1:
        raise refuse(
            field,
            f"{wanted:g}, which leaves none of {there} channels",
            f"at least {step / there:.3g}, which is {step}",
        )
    return kept


def _at_most(kept: int, there: int, what: str, field: str) -> int:
    if kept > there:
        raise refuse(field, str(kept), f"the model has {there} {what}: keep at most that many")
    return kept


def _heads(wanted: Smaller, sizes: Sizes, field: str) -> tuple[int, int]:
    """Query heads and key-value heads, equally many of the one to each of the other."""
    if wanted.kv_heads is not None:
        return _heads_of_groups(wanted, sizes, field)
    if wanted.heads is None:
        return sizes.heads, sizes.kv_heads
    heads = _count(wanted.heads, sizes.heads)
    # Whole groups before a part of each: that makes the cache of keys and values smaller too.
    whole = {kv * sizes.group: kv for kv in range(1, sizes.kv_heads + 1)}
    part = {sizes.kv_heads * group: sizes.kv_heads for group in range(1, sizes.group + 1)}
    possible = part | whole
    if heads not in possible:
        raise refuse(
            f"{field}.heads",
            _found(wanted.heads, sizes.heads, "heads"),
            f"each of the {sizes.kv_heads} key-value heads serves {sizes.group}: keep "
            + _one_of(sorted(possible), sizes.heads),
        )
    return heads, possible[heads]


def _heads_of_groups(wanted: Smaller, sizes: Sizes, field: str) -> tuple[int, int]:
    kv_heads = _count(wanted.kv_heads, sizes.kv_heads)
    if not 1 <= kv_heads <= sizes.kv_heads:
        raise refuse(
            f"{field}.kvHeads",
            _found(wanted.kv_heads, sizes.kv_heads, "key-value heads"),
            f"keep {_one_of(range(1, sizes.kv_heads + 1), sizes.kv_heads)}",
        )
    possible = [kv_heads * group for group in range(1, sizes.group + 1)]
    heads = possible[-1] if wanted.heads is None else _count(wanted.heads, sizes.heads)
    if heads not in possible:
        raise refuse(
            f"{field}.heads",
            _found(wanted.heads, sizes.heads, "heads"),
            f"each of the {kv_heads} key-value heads that are kept serves at most {sizes.group}: "
            f"keep {_one_of(possible, sizes.heads)}",
        )
    return heads, kv_heads


def _count(wanted: float | None, there: int) -> int:
    """How many that is; 0 for a share that is no whole number of them."""
    if wanted is None:
        return there
    if wanted >= 1:
        return int(wanted)
    exact = wanted * there
    return round(exact) if abs(exact - round(exact)) <= _UNEVEN else 0


def _found(wanted: float | None, there: int, what: str) -> str:
    wanted = wanted or 0.0
    shown = f"{wanted:g}"
    return f"{shown}, which is {wanted * there:.3g} of {there} {what}" if wanted < 1 else shown


def _one_of(values: Sequence[int], there: int) -> str:
    shown = [f"{value} ({value / there:.3g})" for value in values]
    return " or ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))
