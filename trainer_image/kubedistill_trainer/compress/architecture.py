"""Descriptions of architectures: which axis of which tensor stands for what.

All that pruning knows of an architecture is in one file of `architectures/`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from kubedistill_trainer.failures import InputsRefused, refuse
from kubedistill_trainer.models.shapes import layer_of

Axis = Literal["hidden", "queries", "keys", "head", "ffn", "vocabulary"]
Axes = tuple[Axis, ...]
_FOLDER = "architectures"


@dataclass(frozen=True)
class Architecture:
    """`layer`: axes of a layer's tensors by their names below `model.layers.N.`; `model`: of the
    others by their whole names. `attention_output`, `ffn_output`: names of modules of a layer."""

    name: str
    layer: Mapping[str, Axes]
    model: Mapping[str, Axes]
    attention_output: str
    ffn_output: str
    scaled_embedding: bool = False
    norm_offset: float = 0.0

    def axes_of(self, name: str) -> Axes:
        """Of a tensor by its whole name. KeyError for one that is not described."""
        index = layer_of(name)
        return self.model[name] if index is None else self.layer[in_layer(name, index)]

    @property
    def norms(self) -> tuple[str, ...]:
        """Modules of a layer that normalise the hidden state, in a fixed order."""
        ends = ".weight"
        return tuple(n.removesuffix(ends) for n, axes in self.layer.items() if is_norm(n, axes))

    def check(self, names: Iterable[str], field: str) -> None:
        """InputsRefused for tensors that the description does not name."""
        for name in names:
            try:
                self.axes_of(name)
            except KeyError:
                raise refuse(
                    field,
                    f"a tensor {name}, which {_path(self.name)} does not describe",
                    "add what its axes stand for to that file, or give another model",
                ) from None


def is_norm(name: str, axes: Axes) -> bool:
    """Whether a tensor is the weight of a norm of the hidden state."""
    return axes == ("hidden",) and name.endswith("norm.weight")


def in_layer(name: str, index: int) -> str:
    """A layer's tensor's name below the layer."""
    return name.split(f".{index}.", 1)[1]


def architecture_of(model_type: Any, field: str) -> Architecture:
    """The description for a config's `model_type`; InputsRefused where there is none."""
    found = _by_model_type().get(model_type)
    if found is None:
        raise _unknown(str(model_type), field)
    return found


def _unknown(model_type: str, field: str) -> InputsRefused:
    known = ", ".join(sorted(_by_model_type()))
    return refuse(
        field,
        f"model_type {model_type}, which has no description",
        f"add {_path(model_type)} (README.md there says how), or give one of {known}",
    )


def _path(name: str) -> str:
    return f"kubedistill_trainer/compress/{_FOLDER}/{name}.toml"


@cache
def _by_model_type() -> Mapping[str, Architecture]:
    folder = files("kubedistill_trainer.compress") / _FOLDER
    tables = {
        entry.name.removesuffix(".toml"): tomllib.loads(entry.read_text())
        for entry in folder.iterdir()
        if entry.name.endswith(".toml")
    }
    return {
        model_type: _read(name, tables)
        for name in tables
        for model_type in tables[name]["model_types"]
    }


def _read(name: str, tables: Mapping[str, Any]) -> Architecture:
    merged: dict[str, dict[str, Any]] = {"layer": {}, "model": {}, "modules": {}, "scale": {}}
    for table in reversed(list(_line(name, tables))):
        for part, values in merged.items():
            values.update(table.get(part, {}))
    return Architecture(
        name,
        {key: tuple(axes) for key, axes in merged["layer"].items()},
        {key: tuple(axes) for key, axes in merged["model"].items()},
        merged["modules"]["attention_output"],
        merged["modules"]["ffn_output"],
        bool(merged["scale"].get("embedding", False)),
        float(merged["scale"].get("norm_offset", 0.0)),
    )


def _line(name: str, tables: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """The table and those that it is like, its own first."""
    wanted: str | None = name
    while wanted is not None:
        yield tables[wanted]
        wanted = tables[wanted].get("like")
