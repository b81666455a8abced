"""Conversations → text → tokens, by a chat template; which of the tokens are learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from kubedistill_trainer.data.conversation import Conversation, Message
from kubedistill_trainer.data.tokenizer import TextTokenizer
from kubedistill_trainer.failures import InputsRefused, unreadable

EXAMPLE = (
    "{% for m in messages %}{{ m.role + '\\n' + m.content + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}"
)
"""A small template that works with any tokenizer."""
_IN_SPEC = f"conversations need one: write it as spec.data.chatTemplate, such as: {EXAMPLE}"
_TODAY = datetime(2024, 7, 26)
"""What a template is told when it asks for the date: every process has to render alike."""

Ids = npt.NDArray[np.int64]


class Unrenderable(ValueError):
    """The template refuses a conversation, and why."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text; `learnt`: [start, end) of each turn of the assistant, in characters."""

    text: str
    learnt: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Encoded:
    """Tokens [n] of a conversation; `learnt` [n]: those that the assistant says."""

    tokens: Ids
    learnt: npt.NDArray[np.bool_]


class ChatTemplate:
    """A tokenizer's chat template, or the one of `data.chatTemplate`."""

    def __init__(self, tokenizer: TextTokenizer, text: str, field: str) -> None:
        """`field` of the spec that the template comes from. InputsRefused when it does not parse."""
        # Here, not at the top: only jobs with conversations wait for this import.
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        self.text = text
        self.field = field
        self._tokenizer = tokenizer.tokenizer
        self._named_tokens = tokenizer.named_tokens
        self._markers = tuple(
            token.content for token in tokenizer.tokenizer.get_added_tokens_decoder().values()
        )
        self._render = render_jinja_template
        try:
            self._render([], chat_template=text)
        except TemplateError as error:
            raise unreadable(
                field,
                f"a chat template that does not parse: {error}",
                f"write one such as: {EXAMPLE}",
            ) from error

    def render(self, messages: Sequence[Message], ask: bool = False) -> str:
        """The text of some turns; `ask`: with what comes before the assistant's answer.

        Raises Unrenderable when the template refuses them.
        """
        turns: list[dict[str, Any]] = [{"role": m.role, "content": m.content} for m in messages]
        try:
            [text], _ = self._render(
                [turns],
                chat_template=self.text,
                add_generation_prompt=ask,
                strftime_now=_TODAY.strftime,
                **self._named_tokens,
            )
        except Exception as error:  # a template can fail in every way that a program can
            raise Unrenderable(f"the chat template refuses it: {error}") from error
        return str(text)

    def rendered(self, conversation: Conversation) -> Rendered:
        """The whole text, and the parts of it that the assistant says, with its end-of-turn markers.

        Raises Unrenderable as `render` does, and InputsRefused when the text of the first turns is
        not how the text of all turns begins: then nobody can say what the assistant says.
        """
        messages = conversation.messages
        whole = self.render(messages)
        learnt: list[tuple[int, int]] = []
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = self.render(messages[:index], ask=True)
            last = index + 1 == len(messages)
            after = whole if last else self.render(messages[: index + 1])
            if not (after.startswith(before) and whole.startswith(after)):
                raise self._mismatch(index, before, after, whole)
            learnt.append((len(before), self._end(before, after, message)))
        return Rendered(whole, tuple(learnt))

    def _end(self, before: str, after: str, message: Message) -> int:
        """Where a turn ends: with its marker, where it has one; what follows is no answer."""
        said = after[len(before) :]
        if said.endswith((message.content, message.content.strip())):
            raise unreadable(
                self.field,
                "a chat template that puts nothing after what the assistant says",
                "end each of its turns with a marker, such as eos_token, or the student never "
                "learns to stop",
            )
        trimmed = after.rstrip()
        return len(trimmed) if trimmed.endswith(self._markers) else len(after)

    def _mismatch(self, index: int, before: str, after: str, whole: str) -> InputsRefused:
        first, second = (before, after) if not after.startswith(before) else (after, whole)
        place = next(
            (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
            min(len(first), len(second)),
        )
        return unreadable(
            self.field,
            f"a chat template that renders the turns before message {index + 1} differently once "
            f"it is there: {first[place : place + 40]!r}, then {second[place : place + 40]!r}",
            "give spec.data.chatTemplate one that only ever adds text at the end, so that what the "
            "assistant says can be told apart",
        )

    def encode(self, texts: Sequence[Rendered]) -> list[Encoded]:
        """Tokens as of tokenising each whole text; one that reaches into an answer is learnt."""
        encodings = self._tokenizer.encode_batch([t.text for t in texts], add_special_tokens=False)
        return [
            Encoded(np.asarray(e.ids, dtype=np.int64), _learnt(e.offsets, text.learnt))
            for e, text in zip(encodings, texts, strict=True)
        ]


def chat_template(tokenizer: TextTokenizer, field: str, given: str | None) -> ChatTemplate:
    """`given` by spec.data.chatTemplate, or the tokenizer's, which lies in the folder of `field`.

    InputsRefused where there is neither.
    """
    if given is not None:
        return ChatTemplate(tokenizer, given, "spec.data.chatTemplate")
    if (text := tokenizer.chat_template) is None:
        raise unreadable(field, "a tokenizer without chat template", _IN_SPEC)
    return ChatTemplate(tokenizer, text, field)


def _learnt(
    offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> npt.NDArray[np.bool_]:
    """Whether tokens with these places [n, 2] in a text overlap one of the spans."""
    places = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    ends = places[:, 1]
    # Some tokenizers leave blanks out of a token's place: one of nothing else is where it ends.
    starts = np.minimum(places[:, 0], ends - 1)
    result = np.zeros(len(places), dtype=np.bool_)
    for start, end in spans:
        result |= (ends > start) & (starts < end)
    return result
