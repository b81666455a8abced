"""Hidden-state matching: the student's layers, projected, against the teacher's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from kubedistill_trainer.losses.types import IGNORED


@dataclass(frozen=True)
class FeaturePair:
    """One student layer against one teacher layer, both counted from 1."""

    student_layer: int
    teacher_layer: int
    loss: Literal["MSE", "Cosine"]
    weight: float


def uniform_map(student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """(student layer, teacher layer) at the same relative depth; the last meets the last.

    As in Sun et al. 2019, "Patient Knowledge Distillation", and Jiao et al. 2020, "TinyBERT".
    """
    depth = teacher_layers / student_layers
    return [(layer, max(1, round(layer * depth))) for layer in range(1, student_layers + 1)]


class FeatureMatcher(nn.Module):
    """The feature terms, with one trained projection a pair; it is no part of the student.

    A projection starts as the (rectangular) identity: with equal widths it begins by comparing the
    states as they are.
    """

    def __init__(
        self, pairs: Sequence[FeaturePair], student_width: int, teacher_width: int
    ) -> None:
        super().__init__()
        self.pairs = tuple(pairs)
        self.projections = nn.ModuleList(
            nn.Linear(student_width, teacher_width, bias=False) for _ in self.pairs
        )
        for weight in self.parameters():
            nn.init.eye_(weight)

    @property
    def student_layers(self) -> list[int]:
        return sorted({pair.student_layer for pair in self.pairs})

    @property
    def teacher_layers(self) -> list[int]:
        return sorted({pair.teacher_layer for pair in self.pairs})

    def forward(
        self,
        student: Mapping[int, Tensor],
        teacher: Mapping[int, Tensor],
        labels_N: Tensor,
        normalizer: Tensor | float,
    ) -> Tensor:
        """Σ weight · loss over the tokens with a label, divided by `normalizer`.

        `student` and `teacher`: layer → states [N, H]. Reductions are fp32 (fp64 for fp64 states).
        """
        rows = (labels_N != IGNORED).nonzero().flatten()
        terms = [
            pair.weight * _distance(pair.loss, projection(student[pair.student_layer][rows]),
                                    teacher[pair.teacher_layer][rows])
            for pair, projection in zip(self.pairs, self.projections, strict=True)
        ]  # fmt: skip
        return torch.stack(terms).sum() / float(normalizer)


def _distance(loss: str, found_MH: Tensor, wanted_MH: Tensor) -> Tensor:
    """Sum over tokens of the mean squared difference a dimension, or of 1 − cosine."""
    wide = torch.float64 if found_MH.dtype == torch.float64 else torch.float32
    found, wanted = found_MH.to(wide), wanted_MH.to(wide)
    if loss == "MSE":
        return (found - wanted).square().mean(-1).sum()
    return (1 - cosine_similarity(found, wanted, dim=-1)).sum()
