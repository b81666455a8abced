"""Conversations: what is said, and by whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Message:
    """One turn. Only what the assistant says is learnt."""

    role: Role
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns in order; the last one is the assistant's."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Prompt:
    """Turns that wait for an answer.

    `source`: place of its file in `spec.data.sources`; `line`: its line there, counted from 1;
    `answer`: the right one, where the record has it.
    """

    source: int
    line: int
    messages: tuple[Message, ...]
    answer: str | None = None
