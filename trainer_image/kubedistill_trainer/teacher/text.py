"""What a teacher is asked and what it says; by whom is not known here.

An own model (`methods/`) and a server (`endpoint.py`) both are an `Answerer`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from kubedistill_trainer.data.conversation import Message


@dataclass(frozen=True)
class TextRequest:
    """One question to the teacher.

    `prompt`: its place in the list of all prompts; `sample`: 0 … samples − 1 of the same prompt;
    `messages`: turns as the teacher is to see them; `seed` of the draw.
    """

    prompt: int
    sample: int
    messages: tuple[Message, ...]
    seed: int


@dataclass(frozen=True)
class TextAnswer:
    """What the teacher said.

    `reasoning`: what a server kept apart by itself, else empty; `finished`: False where
    `generation.maxTokens` cut it; `refusal`: why there is no answer and never will be one (too long
    a prompt, a filter), else empty; `answer_tokens` include those of the reasoning.
    """

    text: str
    reasoning: str = ""
    finished: bool = True
    refusal: str = ""
    prompt_tokens: int = 0
    answer_tokens: int = 0


class Answerer(Protocol):
    """A teacher that writes text."""

    def answers(self, requests: Iterable[TextRequest]) -> Iterator[tuple[TextRequest, TextAnswer]]:
        """Every request's answer, as they come, in any order; `requests` is read lazily, no further
        ahead than is asked at once.

        Raises RunFailure when the teacher cannot go on.
        """

    def close(self) -> None: ...
