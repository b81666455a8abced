"""One JSON line → a text, a conversation or a prompt; or what is wrong with it."""

from __future__ import annotations

import json
from typing import Any, get_args

from kubedistill_api.data import DataSource

from kubedistill_trainer.data.conversation import Conversation, Message, Prompt, Role
from kubedistill_trainer.failures import unreadable

_LONGEST_FRAGMENT = 60
_SHOWN_FIELDS = 8


class BadRecord(ValueError):
    """A line that is no record, and why."""


class BadRecords:
    """How many records may be malformed, over all files, and how many were."""

    def __init__(self, allowed: int) -> None:
        self._allowed = allowed
        self.count = 0

    def add(self, field: str, found: str, expected: str) -> None:
        """Count one. InputsRefused (UNREADABLE_INPUT) once there are more than allowed."""
        self.count += 1
        if self.count > self._allowed:
            expected += ", or allow bad lines with spec.data.maxBadRecords"
            raise unreadable(field, found, expected)


def is_conversation(source: DataSource) -> bool:
    """Whether the file holds turns, not plain text."""
    return source.messages_field is not None or source.prompt_field is not None


def text_of(line: str, source: DataSource) -> str:
    """The text of a line of plain text. Raises BadRecord."""
    value = _field(record_of(line), source.text_field)
    if not isinstance(value, str):
        raise BadRecord(f"field {source.text_field!r} is a {type(value).__name__}, not a string")
    return _whole(value, f"field {source.text_field!r}")


def conversation_of(line: str, source: DataSource) -> Conversation:
    """The turns of a line, the assistant's last. Raises BadRecord."""
    record = record_of(line)
    if source.messages_field is None:
        prompt = _words(record, source.prompt_field)
        if source.response_field not in record:
            raise BadRecord(
                f"no response field {source.response_field!r}, only {_fields(record)}"
                if source.response_field
                else f"a prompt and no response: the fields are {_fields(record)}"
            )
        response = _words(record, source.response_field)
        return Conversation((Message("user", prompt), Message("assistant", response)))
    messages = _messages(record, source.messages_field)
    if messages[-1].role != "assistant":
        raise BadRecord(
            f"no response: the last message of {source.messages_field!r} is the "
            f"{messages[-1].role}'s, not the assistant's"
        )
    return Conversation(messages)


def prompt_of(line: str, source: DataSource, index: int, number: int) -> Prompt:
    """What a line asks the teacher: turns up to and without a last assistant's. Raises BadRecord.

    `index`: place of the file in `spec.data.sources`; `number` of the line, from 1.
    """
    record = record_of(line)
    if source.messages_field is None:
        messages: tuple[Message, ...] = (Message("user", _words(record, source.prompt_field)),)
    else:
        messages = _messages(record, source.messages_field)
        while messages and messages[-1].role == "assistant":
            messages = messages[:-1]
        if not any(message.role != "system" for message in messages):
            raise BadRecord(f"{source.messages_field!r} asks nothing: it has no message of a user")
    return Prompt(index, number, messages, _answer(record, source.answer_field))


def record_of(line: str) -> dict[str, Any]:
    """The object of a line. Raises BadRecord."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        shown = line[:_LONGEST_FRAGMENT]
        raise BadRecord(f"not JSON ({error.msg} at column {error.colno}): {shown!r}") from error
    except (RecursionError, ValueError) as error:
        # What Python cannot hold: brackets by the thousand, a number of thousands of digits.
        raise BadRecord(
            f"JSON that is too deep or too large ({str(error)[:_LONGEST_FRAGMENT]})"
        ) from error
    if not isinstance(record, dict):
        raise BadRecord(f"a JSON {type(record).__name__}, not an object")
    return record


def _fields(record: dict[str, Any]) -> list[str]:
    return sorted(record)[:_SHOWN_FIELDS]


def _field(record: dict[str, Any], name: str | None) -> Any:
    if name not in record:
        raise BadRecord(f"no field {name!r}, only {_fields(record)}")
    return record[name]


def _words(record: dict[str, Any], name: str | None) -> str:
    return _said(_field(record, name), f"field {name!r}")


def _said(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"{what} is a {type(value).__name__}, not a string")
    if not value.strip():
        raise BadRecord(f"{what} is empty")
    return _whole(value, what)


def _whole(value: str, what: str) -> str:
    """A text of whole characters. JSON may name half of one (`\\ud83d` without what follows it), which
    no tokenizer takes and no request can be sent with."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise BadRecord(
            f"{what} holds half a character, {half} (a lone surrogate), at place {error.start + 1}"
        ) from error
    return value


def _messages(record: dict[str, Any], name: str) -> tuple[Message, ...]:
    turns = _field(record, name)
    if not isinstance(turns, list):
        raise BadRecord(f"field {name!r} is a {type(turns).__name__}, not a list of messages")
    if not turns:
        raise BadRecord(f"field {name!r} is an empty list")
    messages = tuple(_message(turn, f"message {i} of {name!r}") for i, turn in enumerate(turns, 1))
    spoken = [message.role for message in messages if message.role != "system"]
    if spoken and spoken[0] == "assistant":
        raise BadRecord(f"{name!r} begins with the assistant, who has been asked nothing")
    return messages


def _message(turn: Any, what: str) -> Message:
    if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
        shown = _fields(turn) if isinstance(turn, dict) else type(turn).__name__
        raise BadRecord(f"{what} is no {{role, content}}: {shown}")
    role: Role = turn["role"]
    if role not in get_args(Role):
        shown = json.dumps(role)[:_LONGEST_FRAGMENT]
        raise BadRecord(f"{what} has the role {shown}, not one of {', '.join(get_args(Role))}")
    return Message(role, _said(turn["content"], f"the content of {what}"))


def _answer(record: dict[str, Any], name: str | None) -> str | None:
    """The right answer where the record has it; a number as it is written."""
    value = record.get(name) if name else None
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return json.dumps(value)
    return _said(value, f"field {name!r}")
