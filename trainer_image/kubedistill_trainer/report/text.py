"""Numbers and figures as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_MANY = 10_000
_SHARES = {
    "accuracy", "confidence", "ece", "teacherEce", "teacherAgreement", "simpleAccuracy",
    "multiStepAccuracy", "questionAccuracy", "hallucinationRate", "teacherAccuracy",
}  # fmt: skip
_BYTES = {"memoryBytes", "sizeOnDisk"}
_SIZES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
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
    """A figure by its name: shares in percent, times and sizes with their units."""
    if value is None:
        return number(value)
    if name in _SHARES:
        return f"{value:.1%}"
    if name in _BYTES:
        return size(value)
    return duration(value) if name == "firstTokenSeconds" else number(value)


def size(count: float) -> str:
    """Bytes, in the greatest unit of which there is one."""
    for unit, name in _SIZES:
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Seconds, or milliseconds below one."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


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


def asked(document: Mapping[str, Any]) -> list[Row]:
    """Figures of what both models were asked."""
    metrics = document.get("metrics", {})
    texts = {
        "simpleAccuracy": ("Simple tasks", "share of answers that are right"),
        "multiStepAccuracy": ("Multi-step tasks", "share of answers that are right"),
        "questionAccuracy": ("Questions", "share of answers that are right"),
        "hallucinationRate": ("Hallucination", "wrong and confident, of all questions"),
    }
    return [
        Row(name, *text, metrics[name], metrics.get(f"teacher{name[0].upper()}{name[1:]}"))
        for name, text in texts.items()
        if name in metrics
    ]


def measured(document: Mapping[str, Any]) -> list[Row]:
    """Time, memory and size of both models."""
    found = document.get("performance")
    rows: list[Row] = []
    if found:
        taught = found["teacher"] or {}
        theirs = {pace["batch"]: pace for pace in taught.get("batches", ())}
        for pace in found["student"]["batches"]:
            other, batch = theirs.get(pace["batch"], {}), f"batch {pace['batch']}"
            rows += [
                Row("firstTokenSeconds", f"First token, {batch}", "until every answer has begun",
                    pace["firstTokenSeconds"], other.get("firstTokenSeconds")),
                Row("tokensPerSecond", f"Tokens a second, {batch}", "of all answers, after the first",
                    pace["tokensPerSecond"], other.get("tokensPerSecond")),
            ]  # fmt: skip
        rows.append(
            Row("memoryBytes", "Memory", f"weights and {_working(found)}",
                found["student"]["memoryBytes"], taught.get("memoryBytes"))
        )  # fmt: skip
    if sizes := document.get("sizeOnDisk"):
        rows.append(
            Row("sizeOnDisk", "Size on disk", "of the weights", sizes["student"], sizes["teacher"])
        )
    return rows


def _working(found: Mapping[str, Any]) -> str:
    largest = max(pace["batch"] for pace in found["student"]["batches"])
    how = found["student"]["memory"]
    return f"what batch {largest} takes beside them ({how})"
