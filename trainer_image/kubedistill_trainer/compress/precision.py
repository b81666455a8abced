"""What precision a model has, and what it can be given: without torch."""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import Any

from kubedistill_api.quantization import Quantize

from kubedistill_trainer.failures import refuse

_GROUP = 128
_LEAST_GROUP = 8
_BLOCK = 4
SPARSITY_RECORD = "sparsity.json"
"""Lies beside a model with zeros that are to stay (compress/sparsity.py)."""


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


def check_quantizable(wanted: Quantize, config: Mapping[str, Any], sparse: bool) -> None:
    """InputsRefused for a model with this config.json that cannot be quantised so. `sparse`: it has
    zeros that are to stay."""
    if wanted.scheme == "W4A16":
        group_size(wanted, config, "spec.quantize")
    if sparse and wanted.algorithm == "GPTQ":
        raise refuse(
            "spec.quantize.algorithm",
            "GPTQ for a student with zeros among its weights, in which it would put its errors",
            "write RTN or AWQ, under which they stay zero",
        )


def check_blocks(config: Mapping[str, Any], field: str) -> None:
    """InputsRefused for a model with widths that are not of whole blocks of four."""
    for name, width in widths_of(config).items():
        if width % _BLOCK:
            raise refuse(
                field,
                f"2:4 for {name} {width}, which {_BLOCK} does not divide",
                "write `pattern: Any` with `sparsity: 0.5`, or prune to a width that it divides",
            )


def widths_of(config: Mapping[str, Any]) -> dict[str, int]:
    """Columns of the matrices of a decoder's layers."""
    heads = config["num_attention_heads"]
    queries = heads * (config.get("head_dim") or config["hidden_size"] // heads)
    return {
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "heads × head_dim": queries,
    }


def group_size(wanted: Quantize, config: Mapping[str, Any], field: str) -> int:
    """Weights a scale: what is asked for, or 128 or the largest power of two below it that divides
    the width of every matrix. InputsRefused where it does not divide them, or there is none.

    `config`: keys of the model's config.json.
    """
    widths = widths_of(config)
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
