"""Distillation losses without a [tokens × vocabulary] tensor."""

from kubedistill_trainer.losses.core import distillation_loss
from kubedistill_trainer.losses.features import FeatureMatcher, FeaturePair, uniform_map
from kubedistill_trainer.losses.types import (
    FORWARD_KL,
    IGNORED,
    Divergence,
    LossParts,
    Teacher,
    TeacherHidden,
    TeacherSampled,
    TeacherSparse,
)

__all__ = [
    "FORWARD_KL",
    "IGNORED",
    "Divergence",
    "FeatureMatcher",
    "FeaturePair",
    "LossParts",
    "Teacher",
    "TeacherHidden",
    "TeacherSampled",
    "TeacherSparse",
    "distillation_loss",
    "uniform_map",
]
