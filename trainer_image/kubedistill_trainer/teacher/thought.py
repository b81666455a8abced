"""Reasoning kept apart from the answer that follows it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kubedistill_trainer.teacher.text import TextAnswer

OPEN, CLOSE = "<think>", "</think>"
_MARKER = re.compile(
    r"^[\s*_#>-]*(?:the\s+)?(?:final\s+)?answer(?:\s+is)?[\s*_]*:[*_]*",
    re.IGNORECASE | re.MULTILINE,
)
"""Where a line begins with `Answer:`, `**Final answer:**` and the like."""


@dataclass(frozen=True)
class Thought:
    """`reasoning` is empty where there is none; `answer` too, where the teacher never came to it."""

    reasoning: str
    answer: str


def thought_of(said: TextAnswer) -> Thought:
    """What the teacher thought, and what it answered.

    In this order: what a server kept apart; what stands in <think> tags (a template may have opened
    them in the prompt, so that only the closing one is there); what comes before the last line that
    begins with `Answer:`. An opened and never closed tag is reasoning without an answer.
    """
    text = said.text.strip()
    if said.reasoning.strip():
        return Thought(said.reasoning.strip(), text.removeprefix(f"{OPEN}{CLOSE}").strip())
    if CLOSE in text:
        reasoning, _, answer = text.partition(CLOSE)
        return Thought(reasoning.strip().removeprefix(OPEN).strip(), answer.strip())
    if text.startswith(OPEN):
        return Thought(text.removeprefix(OPEN).strip(), "")
    markers = list(_MARKER.finditer(text))
    if markers and text[: markers[-1].start()].strip():
        last = markers[-1]
        return Thought(text[: last.start()].strip(), text[last.end() :].strip())
    return Thought("", text)


def written(thought: Thought, *, reasoning: bool) -> str:
    """What a student says: the answer, after its reasoning in tags where that is learnt."""
    if not reasoning or not thought.reasoning:
        return thought.answer
    return f"{OPEN}\n{thought.reasoning}\n{CLOSE}\n\n{thought.answer}"


def after_marker(answer: str) -> str:
    """What follows the last `Answer:` at a line's beginning; all where there is none."""
    markers = list(_MARKER.finditer(answer))
    return answer[markers[-1].end() :].strip() if markers else answer
