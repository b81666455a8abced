"""Numbers and figures as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_MANY = 10_000
_SHARES = {"accuracy", "confidence", "ece", "teacherEce", "teacherAgreement"}
SIGNALS = {
    "Responses": "on the teacher’s answers",
    "ChainOfThought": "on the teacher’s reasoning and answers",
}
"""How a teacher's text is learnt."""


@dataclass(frozen=True)
class Row:
    """One figure of both models. `what`: in a few words."""

    name: str
    title: str
    what: str
    student: float | None
    teacher: float | None = None


def number(value: float | None) -> str:
    """Four significant digits; counts in full, with commas; a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, int) or (abs(value) >= _MANY and abs(value) < 1e9):
        return f"{value:,.0f}"
    mantissa, _, exponent = f"{value:.4g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def shown(name: str, value: float | None) -> str:
    """A figure by its name: shares in percent."""
    return f"{value:.1%}" if name in _SHARES and value is not None else number(value)


def paired(document: Mapping[str, Any]) -> list[Row]:
    """Figures that both models have."""
    metrics = document.get("metrics", {})
    teacher = (document.get("calibration") or {}).get("teacher") or {}
    rows = [
        Row("perplexity", "Perplexity", "of the held-out text; lower is better",
            metrics.get("perplexity"), metrics.get("teacherPerplexity")),
        Row("accuracy", "Accuracy", "share of next tokens guessed right",
            metrics.get("accuracy"), teacher.get("accuracy")),
        Row("ece", "Calibration error", "how far confidence is from accuracy (ECE)",
            metrics.get("ece"), metrics.get("teacherEce")),
    ]  # fmt: skip
    return [row for row in rows if row.student is not None]


def compared(document: Mapping[str, Any]) -> list[Row]:
    """Figures of the student against its teacher, or against its own beginning."""
    texts = {
        "initialPerplexity": ("Perplexity at the start", "before the first step"),
        "perplexityRatio": ("Perplexity ratio", "student ÷ teacher; 1 would be as good"),
        "teacherAgreement": ("Agreement", "share of tokens whose top choice is the teacher’s"),
        "teacherKL": ("Divergence", "KL(teacher ‖ student) a token, in nats"),
    }
    metrics = document.get("metrics", {})
    return [Row(name, *text, metrics[name]) for name, text in texts.items() if name in metrics]
