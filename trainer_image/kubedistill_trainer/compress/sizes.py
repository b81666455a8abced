"""The sizes of a decoder: what can be made smaller, and how many parameters that makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from kubedistill_trainer.compress.architecture import Architecture, Axes, Axis
from kubedistill_trainer.models.shapes import layer_of


@dataclass(frozen=True)
class Sizes:
    """Counts; `hidden`, `ffn` and `head_size` in channels."""

    layers: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    hidden: int
    vocabulary: int

    def of(self, axis: Axis) -> int:
        """Length of an axis of a tensor."""
        match axis:
            case "queries":
                return self.heads * self.head_size
            case "keys":
                return self.kv_heads * self.head_size
            case "head":
                return self.head_size
            case "hidden":
                return self.hidden
            case "ffn":
                return self.ffn
            case "vocabulary":
                return self.vocabulary

    @property
    def group(self) -> int:
        """Query heads of a key-value head."""
        return self.heads // self.kv_heads


Shapes = Mapping[str, tuple[int, ...]]
"""Of a model's tensors, tied ones once, by their names."""


def sizes_of(architecture: Architecture, config: Mapping[str, Any], shapes: Shapes) -> Sizes:
    """Of a model with this config.json and these tensors.

    Only the heads are asked of the config, which leaves out what is an architecture's default.
    """
    lengths = _lengths(architecture, shapes)
    heads = int(config["num_attention_heads"])
    return Sizes(
        layers=1 + max(index for name in shapes if (index := layer_of(name)) is not None),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_size=lengths["queries"] // heads,
        ffn=lengths["ffn"],
        hidden=lengths["hidden"],
        vocabulary=lengths["vocabulary"],
    )


def _lengths(architecture: Architecture, shapes: Shapes) -> dict[Axis, int]:
    """Of each axis, by the tensors that have it."""
    lengths: dict[Axis, int] = {}
    for name, shape in shapes.items():
        lengths |= zip(architecture.axes_of(name), shape, strict=True)
    return lengths


def config_changes(sizes: Sizes, config: Any, layers: tuple[int, ...]) -> dict[str, Any]:
    """The keys of a config that say `sizes`, of a model that keeps these of its layers.

    The size of a head is said outright: where it is not, it is taken for width ÷ heads.
    """
    changes: dict[str, Any] = {
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_size,
        "intermediate_size": sizes.ffn,
        "hidden_size": sizes.hidden,
    }
    types = getattr(config, "layer_types", None)
    if types is not None:
        changes["layer_types"] = [types[index] for index in layers]
    return changes


@dataclass(frozen=True)
class Tensors:
    """Axes of the tensors that a model has: of each layer, and of the rest. Tied ones once."""

    layer: tuple[Axes, ...]
    model: tuple[Axes, ...]

    def parameters(self, sizes: Sizes) -> int:
        """How many parameters a model of these tensors has with other sizes."""
        layer = sum(_size(axes, sizes) for axes in self.layer)
        return sizes.layers * layer + sum(_size(axes, sizes) for axes in self.model)


def tensors_of(architecture: Architecture, shapes: Shapes) -> Tensors:
    """Of a model with these tensors, all of which are described."""
    first = [name for name in architecture.layer if _in_first_layer(name, shapes)]
    return Tensors(
        tuple(architecture.layer[name] for name in first),
        tuple(axes for name, axes in architecture.model.items() if name in shapes),
    )


def _in_first_layer(name: str, shapes: Shapes) -> bool:
    return f"model.layers.0.{name}" in shapes


def _size(axes: Axes, sizes: Sizes) -> int:
    return prod(sizes.of(axis) for axis in axes)
