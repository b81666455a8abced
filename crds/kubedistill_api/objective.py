"""The loss of a `distill` job."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kubedistill_api.base import ApiModel, cel, rules


class DivergenceMix(ApiModel):
    """Weights of divergences of the teacher's distribution p and the student's q."""

    model_config = rules(
        [
            cel(
                "self.forwardKL + self.reverseKL + self.jsd > 0.0",
                "give at least one of forwardKL, reverseKL and jsd a weight above 0",
            )
        ]
    )
    forward_kl: float = Field(
        0.0, alias="forwardKL", ge=0, le=1000, description="Weight of KL(p || q)."
    )
    reverse_kl: float = Field(
        0.0, alias="reverseKL", ge=0, le=1000, description="Weight of KL(q || p)."
    )
    jsd: float = Field(0.0, ge=0, le=1000, description="Weight of JSD.")


class FeatureMatching(ApiModel):
    """Hidden states of the student, through a trained projection, pulled to the teacher's."""

    model_config = rules(
        [
            cel(
                "has(self.studentLayer) == has(self.teacherLayer)",
                "give both studentLayer and teacherLayer, or neither for all layers of the student",
            )
        ]
    )
    student_layer: int | None = Field(
        None, ge=1, le=1024, description="Layer of the student, counted from 1."
    )
    teacher_layer: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Layer of the teacher. With neither, every layer of the student is matched to "
        "the teacher's at the same relative depth.",
    )
    loss: Literal["MSE", "Cosine"] = Field(
        "MSE", description="Mean squared error a dimension, or 1 - cosine."
    )
    weight: float = Field(1.0, gt=0, le=1000, description="Weight beside the other terms.")


class Objective(ApiModel):
    """The loss: softWeight * T^2 * D(teacher, student) + (1 - softWeight) * cross-entropy + features."""

    model_config = rules(
        [
            cel(
                # Of a default `{}` the rule is asked before the defaults within it.
                "has(self.mix) == (has(self.loss) && self.loss == 'Mix')",
                "give `mix` with `loss: Mix`, and only with it",
            )
        ]
    )
    loss: Literal["ForwardKL", "ReverseKL", "JSD", "Mix"] = Field(
        "ForwardKL", description="Divergence D of the soft term: one, or a Mix by weights."
    )
    mix: DivergenceMix | None = Field(None, description="Weights, for `loss: Mix`.")
    beta: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="JSD's share of the teacher in the mean that both are compared with.",
    )
    temperature: float = Field(
        1.0,
        gt=0,
        le=100,
        description="T of the soft term, which is multiplied by T^2. Above 1 the teacher's less "
        "likely tokens weigh more: worth a sweep.",
    )
    soft_weight: float = Field(
        0.5, ge=0, le=1, description="Weight of the soft term; cross-entropy has the rest."
    )
    features: list[FeatureMatching] = Field(
        [], max_length=64, description="Hidden states to be matched; needs `delivery: Online`."
    )
