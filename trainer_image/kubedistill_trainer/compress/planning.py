"""What a model may be cut to, by its config and its tensors' shapes: without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kubedistill_api.pruning import Smaller

from kubedistill_trainer.compress.architecture import Architecture, architecture_of
from kubedistill_trainer.compress.budget import candidates
from kubedistill_trainer.compress.sizes import Shapes, Sizes, Tensors, sizes_of, tensors_of


@dataclass(frozen=True)
class Plan:
    """What is known before a model is loaded. `candidates`: sizes that it may be cut to."""

    architecture: Architecture
    sizes: Sizes
    tensors: Tensors
    candidates: list[Sizes]

    @property
    def parameters(self) -> int:
        """Of the largest candidate."""
        return max(map(self.tensors.parameters, self.candidates))


def planned(wanted: Smaller, config: Mapping[str, Any], shapes: Shapes, field: str) -> Plan:
    """The sizes that a model with this config.json and these tensors (tied ones once) may be cut to.

    InputsRefused, naming `field` or a key below it, for what it cannot be, and for an architecture
    that has no description.
    """
    architecture = architecture_of(config.get("model_type"), field)
    architecture.check(shapes, field)
    sizes = sizes_of(architecture, config, shapes)
    tensors = tensors_of(architecture, shapes)
    return Plan(architecture, sizes, tensors, candidates(wanted, sizes, tensors, field))
