"""What a reply of chat-completions says: an answer, or why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kubedistill_trainer.teacher.endpoint_reply import (
    Again,
    PromptRefused,
    Reply,
    check_model,
    tokens_of,
)
from kubedistill_trainer.teacher.text import TextAnswer

_FILTERED = "content_filter"
_FULL = ("length", "max_tokens")
_BROKEN = (None, "error")
"""Ends of an answer that is not there, and might have been."""


def read_answer(reply: Reply, model: str, url: str) -> TextAnswer:
    """The answer in a reply of chat-completions.

    Again for another shape, PromptRefused where the server withholds the answer or says nothing,
    InputsRefused for another model's.
    """
    content = reply.json()
    choices = content.get("choices") if isinstance(content, dict) else None
    if not isinstance(choices, list) or not choices:
        raise Again("unreadable", "JSON without choices")
    message = choices[0].get("message") if isinstance(choices[0], dict) else None
    if not isinstance(message, dict):
        raise Again("unreadable", "a choice without a message")
    check_model(content, model, url)
    prompt_tokens, answer_tokens = tokens_of(content)
    end = choices[0].get("finish_reason")
    text, withheld = _text_of(message.get("content"))
    withheld = withheld or str(message.get("refusal") or "")
    if end == _FILTERED or withheld:
        words = withheld or "the server's content filter"
        raise PromptRefused(words, prompt_tokens, answer_tokens)
    reasoning = _reasoning_of(message)
    if text is None and not reasoning and end not in _FULL:
        if end in _BROKEN:
            raise Again("unreadable", "a message without text")
        raise PromptRefused(f"an answer without text ({end})", prompt_tokens, answer_tokens)
    return TextAnswer(
        text=text or "",
        reasoning=reasoning,
        finished=end is None or end == "stop",
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
    )


def _text_of(content: object) -> tuple[str | None, str]:
    """(text, refusal) of a message's content: a text, parts of one, or nothing."""
    if content is None or isinstance(content, str):
        return content, ""
    if not isinstance(content, list):
        raise Again("unreadable", "a message without text")
    texts: list[str] = []
    refusals: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        said = part.get(kind) if kind in ("text", "refusal") else None
        if not isinstance(said, str):
            raise Again("unreadable", f"a message with a part of another shape (type {kind!r})")
        (texts if kind == "text" else refusals).append(said)
    return "".join(texts), "".join(refusals)


def _reasoning_of(message: Mapping[str, Any]) -> str:
    """What the server keeps apart, by either of its names."""
    found = message.get("reasoning_content") or message.get("reasoning") or ""
    if not isinstance(found, str):
        raise Again("unreadable", "reasoning that is no text")
    return found
