"""What was found of both models, as parts of report.json (docs/report.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kubedistill_trainer.evaluation.questions import CONFIDENT
from kubedistill_trainer.evaluation.results import (
    GROUPS,
    Abilities,
    Performance,
    QuestionScore,
    TaskScore,
    accuracy_of,
    taught_accuracy_of,
)
from kubedistill_trainer.report.compare import Comparison

_DIGITS = 6


def parts(found: Comparison) -> dict[str, Any]:
    """The keys `tasks`, `questions`, `performance`, `sizeOnDisk`, `lmEval` and `notMeasured`."""
    return {
        "tasks": _tasks(found.student, found.teacher),
        "questions": _questions(found),
        "performance": _performance(found.student, found.teacher),
        "sizeOnDisk": _sizes(*found.disk_bytes),
        "lmEval": found.suites or None,
        "notMeasured": dict(found.problems),
    }


def weakest_task(found: Comparison) -> dict[str, Any] | None:
    """The task with the fewest right answers; None where none is worse than the others."""
    tasks = found.student.tasks
    shares = {task.accuracy for task in tasks}
    if len(shares) < 2:
        return None
    worst = min(tasks, key=lambda task: task.accuracy)
    return {
        "task": worst.name,
        "group": worst.group,
        "examples": worst.examples,
        "accuracy": _rounded(worst.accuracy),
    }


def _tasks(student: Abilities, teacher: Abilities | None) -> dict[str, Any] | None:
    if not student.tasks:
        return None
    taught = {task.name: task for task in teacher.tasks} if teacher else {}
    groups = [
        {
            "group": group,
            "examples": sum(t.examples for t in student.tasks if t.group == group),
            "accuracy": _rounded(accuracy_of(student.tasks, group)),
            "teacherAccuracy": _rounded(taught_accuracy_of(student.tasks, taught.values(), group)),
        }
        for group in GROUPS
    ]
    return {
        "prompting": student.prompting,
        "groups": [group for group in groups if group["examples"]],
        "byTask": [_task(task, taught.get(task.name)) for task in student.tasks],
    }


def _task(task: TaskScore, taught: TaskScore | None) -> dict[str, Any]:
    return {
        "task": task.name,
        "group": task.group,
        "examples": task.examples,
        "accuracy": _rounded(task.accuracy),
        "teacherAccuracy": _rounded(taught.accuracy) if taught else None,
    }


def _questions(found: Comparison) -> dict[str, Any] | None:
    asked, student = found.plan.questions, found.student.questions
    if asked is None or student is None:
        return None
    taught = found.teacher.questions if found.teacher else None
    return {
        "source": asked.source,
        "asked": student.asked,
        "confidentAbove": CONFIDENT,
        "student": _answers(student),
        "teacher": _answers(taught) if taught else None,
        "hallucinated": [slip.model_dump() for slip in student.slips],
    }


def _answers(score: QuestionScore) -> dict[str, float | None]:
    return {
        "accuracy": round(score.accuracy, _DIGITS),
        "hallucinationRate": _rounded(score.hallucination_rate),
        "confidence": score.confidence,
    }


def _performance(student: Abilities, teacher: Abilities | None) -> dict[str, Any] | None:
    mine, theirs = student.performance, teacher.performance if teacher else None
    if mine is None:
        return None
    return {
        "promptTokens": mine.prompt_tokens,
        "answerTokens": mine.answer_tokens,
        "rounds": mine.rounds,
        "student": _measured(mine),
        "teacher": _measured(theirs) if theirs else None,
        "ratios": _ratios(mine, theirs) if theirs else None,
    }


def _measured(found: Performance) -> dict[str, Any]:
    return {
        "device": found.device,
        "batches": [
            {
                "batch": pace.batch,
                "firstTokenSeconds": _rounded(pace.first_token_seconds),
                "tokensPerSecond": _rounded(pace.tokens_per_second),
            }
            for pace in found.paces
        ],
        "weightsBytes": found.weights_bytes,
        "workingBytes": found.working_bytes,
        "memoryBytes": found.memory_bytes,
        "memory": found.memory,
    }


def _ratios(mine: Performance, theirs: Performance) -> dict[str, Any] | None:
    """Student ÷ teacher; None where they ran on different devices, or with other lengths."""
    same = ("device", "prompt_tokens", "answer_tokens")
    if any(getattr(mine, name) != getattr(theirs, name) for name in same):
        return None
    other = {pace.batch: pace for pace in theirs.paces}
    both = [(pace, other[pace.batch]) for pace in mine.paces if pace.batch in other]
    return {
        "batches": [
            {
                "batch": a.batch,
                "firstTokenSeconds": _ratio(a.first_token_seconds, b.first_token_seconds),
                "tokensPerSecond": _ratio(a.tokens_per_second, b.tokens_per_second),
            }
            for a, b in both
        ],
        "memoryBytes": _ratio(mine.memory_bytes, theirs.memory_bytes),
    }


def _sizes(student: int, teacher: int | None) -> Mapping[str, float | None]:
    return {
        "student": student,
        "teacher": teacher,
        "ratio": _ratio(student, teacher) if teacher else None,
    }


def _ratio(mine: float | None, theirs: float | None) -> float | None:
    return _rounded(mine / theirs) if mine is not None and theirs else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, _DIGITS)
