"""What precision a model has, and what it can be given: without torch."""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import Any

from kubedistill_api.quantization import Quantize

from kubedistill_trainer.failures import refuse

_GROUP = 128
_LEAST_GROUP = 8


def check_not_quantized(config: Mapping[str, Any], field: str) -> None:
    """InputsRefused for a model that is quantised already. `config`: keys of its config.json."""
    found = config.get("quantization_config")
    if found:
        how = found.get("quant_method", "some way") if isinstance(found, Mapping) else "some way"
        raise refuse(
            field,
            f"a model that is quantised already ({how})",
            "give the model that it was made from",
        )


def group_size(wanted: Quantize, config: Mapping[str, Any], field: str) -> int:
    """Weights a scale: what is asked for, or 128 or the largest power of two below it that divides
    the width of every matrix. InputsRefused where it does not divide them, or there is none.

    `config`: keys of the model's config.json.
    """
    heads = config["num_attention_heads"]
    queries = heads * (config.get("head_dim") or config["hidden_size"] // heads)
    widths = {
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "heads × head_dim": queries,
    }
    fits = gcd(_GROUP, *widths.values())
    size = wanted.group_size or fits
    for name, width in widths.items():
        if width % size:
            raise refuse(
                f"{field}.groupSize",
                f"{size}, which does not divide {name} {width}",
                f"write {fits}, or leave it out" if fits >= _LEAST_GROUP else "write W8A16",
            )
    if size < _LEAST_GROUP:
        shown = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise refuse(
            field,
            f"scheme W4A16 for widths that no group of {_LEAST_GROUP} divides: {shown}",
            "write `scheme: W8A16`, or prune to widths that are multiples of 32",
        )
    return size
