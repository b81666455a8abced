"""The objective of a spec as the losses take it."""

from __future__ import annotations

from collections.abc import Iterator

from kubedistill_api.objective import Objective

from kubedistill_trainer.failures import refuse
from kubedistill_trainer.losses.features import FeaturePair, uniform_map
from kubedistill_trainer.losses.types import Divergence

_FIELD = "spec.distill.objective"


def divergence_of(objective: Objective) -> Divergence:
    """The soft term's divergence."""
    mix = objective.mix
    if mix is not None:
        return Divergence(mix.forward_kl, mix.reverse_kl, mix.jsd, objective.beta)
    weights = {"ForwardKL": (1, 0, 0), "ReverseKL": (0, 1, 0), "JSD": (0, 0, 1)}[objective.loss]
    return Divergence(*weights, beta=objective.beta)


def feature_pairs(
    objective: Objective, student_layers: int, teacher_layers: int
) -> list[FeaturePair]:
    """Which layers are compared; an entry without layers shares its weight among all pairs.

    RunFailure names a layer that a model does not have.
    """
    pairs: list[FeaturePair] = []
    for index, feature in enumerate(objective.features):
        if feature.student_layer is None or feature.teacher_layer is None:
            mapped = uniform_map(student_layers, teacher_layers)
        else:
            mapped = [(feature.student_layer, feature.teacher_layer)]
        for name, layer, count in _bounds(mapped, student_layers, teacher_layers):
            if layer > count:
                raise refuse(
                    f"{_FIELD}.features[{index}].{name}Layer", str(layer),
                    f"the {name} has {count} layers: write 1…{count}",
                )  # fmt: skip
        weight = feature.weight / len(mapped)
        pairs += [FeaturePair(s, t, feature.loss, weight) for s, t in mapped]
    return pairs


def _bounds(
    mapped: list[tuple[int, int]], student_layers: int, teacher_layers: int
) -> Iterator[tuple[str, int, int]]:
    for student, teacher in mapped:
        yield "student", student, student_layers
        yield "teacher", teacher, teacher_layers
