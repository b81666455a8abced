"""What a server says, and how sure its model was of it."""

from __future__ import annotations

import math
from codecs import getincrementaldecoder
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from kubedistill_trainer.evaluation.questions import Answered
from kubedistill_trainer.evaluation.speak import likelihood
from kubedistill_trainer.teacher.endpoint_answer import read_answer
from kubedistill_trainer.teacher.endpoint_reply import Again, Reply, check_model, tokens_of
from kubedistill_trainer.teacher.text import TextAnswer
from kubedistill_trainer.teacher.thought import tagged, untagged

Token = tuple[bytes, float]
"""What a token says, and its log-probability."""
_ROUNDING = 1e-3
"""By which a server's log-probability may be above 0."""


@dataclass(frozen=True)
class Weighed(TextAnswer):
    """An answer. `confidence`: as of `Answered`, of what follows the reasoning."""

    confidence: float | None = None


def answered(answer: TextAnswer) -> Answered:
    """What counts of an answer: nothing of one that was refused, or is still reasoning."""
    said = _spoken(answer.text)
    if not said:
        return Answered("", 0.0)
    return Answered(said, answer.confidence if isinstance(answer, Weighed) else None)


def read_chat(reply: Reply, model: str, url: str) -> Weighed:
    """Of chat-completions; raises as `read_answer` does."""
    answer = read_answer(reply, model, url)
    told = reply.json()["choices"][0].get("logprobs")
    tokens = _tokens(told.get("content") if isinstance(told, dict) else None)
    return Weighed(**vars(answer), confidence=confidence_of(tokens, _spoken(answer.text)))


def read_completion(reply: Reply, model: str, url: str) -> Weighed:
    """Of completions. Again for another shape, InputsRefused for another model's."""
    content = reply.json()
    choices = content.get("choices") if isinstance(content, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    text = choice.get("text") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(text, str):
        raise Again("unreadable", "JSON without a choice that has a text")
    check_model(content, model, url)
    prompt_tokens, answer_tokens = tokens_of(content)
    told = choice.get("logprobs")
    tokens, said = _pairs(told if isinstance(told, dict) else {}), _spoken(text)
    confidence = confidence_of(tokens, said)
    if confidence is None and said and not tagged(text):
        # Parts of characters are not written here, and what ends the line may be.
        line = list(takewhile(lambda token: b"\n" not in token[0], tokens))
        confidence = likelihood([value for _, value in line]) if line else None
    return Weighed(
        text=text,
        finished=choice.get("finish_reason") == "stop",
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        confidence=confidence,
    )


def confidence_of(tokens: Sequence[Token], said: str) -> float | None:
    """Of the tokens that say `said`, where it is last said; None where they do not say it."""
    text, ends = _text(tokens)
    begin = text.rfind(said) if said else -1
    if begin < 0:
        return None
    end, before, values = begin + len(said), 0, []
    for (_, value), after in zip(tokens, ends, strict=True):
        # A part of a character says it with those that follow.
        if before < end and max(after, before + 1) > begin:
            values.append(value)
        before = after
    return likelihood(values)


def _text(tokens: Sequence[Token]) -> tuple[str, list[int]]:
    """What all of them say, and how long it is after each; what is no UTF-8 as U+FFFD."""
    decoder = getincrementaldecoder("utf-8")("replace")
    text, ends = "", []
    for word, _ in tokens:
        text += decoder.decode(word)
        ends.append(len(text))
    return text + decoder.decode(b"", final=True), ends


def _spoken(text: str) -> str:
    return untagged(text).answer if tagged(text) else text.strip()


def _tokens(found: Any) -> list[Token]:
    """Of `logprobs.content`; none where it has another shape, or numbers that are none."""
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        return []
    return _sound([(_bytes(entry), entry.get("logprob")) for entry in found])


def _bytes(entry: dict[str, Any]) -> Any:
    """A token may be a part of a character only, which `token` cannot say."""
    given, text = entry.get("bytes"), entry.get("token")
    if isinstance(given, list) and all(isinstance(b, int) and 0 <= b < 256 for b in given):
        return bytes(given)
    return text.encode() if isinstance(text, str) else None


def _pairs(told: dict[str, Any]) -> list[Token]:
    """Of the `logprobs` of completions."""
    words, values = told.get("tokens"), told.get("token_logprobs")
    if not isinstance(words, list) or not isinstance(values, list) or len(words) != len(values):
        return []
    encoded = [word.encode() if isinstance(word, str) else None for word in words]
    return _sound(list(zip(encoded, values, strict=True)))


def _sound(tokens: Sequence[tuple[Any, Any]]) -> list[Token]:
    for word, value in tokens:
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if word is None or not known or math.isnan(value) or value > _ROUNDING:
            return []
    return [(word, float(value)) for word, value in tokens]
