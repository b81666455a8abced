"""The figures that an evaluation can give, as `status.metrics` names them."""

from __future__ import annotations

from typing import Literal

Goal = Literal["Minimize", "Maximize"]

METRICS: dict[str, Goal | None] = {
    "perplexity": "Minimize",
    "accuracy": "Maximize",
    "ece": "Minimize",
    "perplexityRatio": "Minimize",
    "teacherAgreement": "Maximize",
    "teacherKL": "Minimize",
    "simpleAccuracy": "Maximize",
    "multiStepAccuracy": "Maximize",
    "questionAccuracy": "Maximize",
    "hallucinationRate": "Minimize",
    "initialPerplexity": None,
    "teacherPerplexity": None,
    "teacherEce": None,
    "teacherSimpleAccuracy": None,
    "teacherMultiStepAccuracy": None,
    "teacherQuestionAccuracy": None,
    "teacherHallucinationRate": None,
}
"""Every metric, and which way it is better; None for one that says nothing of the training."""
SELECTABLE = tuple(name for name, goal in METRICS.items() if goal is not None)
"""Those by which students can be told apart."""
TEACHERS = {
    "perplexity": "teacherPerplexity",
    "ece": "teacherEce",
    "simpleAccuracy": "teacherSimpleAccuracy",
    "multiStepAccuracy": "teacherMultiStepAccuracy",
    "questionAccuracy": "teacherQuestionAccuracy",
    "hallucinationRate": "teacherHallucinationRate",
}
"""The student's figures that a teacher has too, and what the teacher's are called."""
OF_A_TEACHER = frozenset(
    {"teacherPerplexity", "perplexityRatio", "teacherAgreement", "teacherKL", "teacherEce"}
)
"""Figures that need what a teacher finds likely of given text."""
