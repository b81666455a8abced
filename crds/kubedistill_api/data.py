"""What a job learns from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from kubedistill_api.base import ApiModel, cel, rules
from kubedistill_api.references import ModelSource, S3Uri

FieldName = Annotated[str, StringConstraints(min_length=1, max_length=128)]


class DataSource(ApiModel):
    """One file of text, of prompts with responses, or of prompts for the teacher."""

    model_config = rules(
        [
            cel(
                "!(has(self.messagesField) && (has(self.promptField) || has(self.responseField)))",
                "give either `messagesField`, or `promptField` and `responseField`",
            ),
            cel(
                "!has(self.responseField) || has(self.promptField)",
                "`responseField` needs a `promptField`",
            ),
            cel(
                "!has(self.origin) || self.origin == 'Human' || "
                "has(self.promptField) || has(self.messagesField)",
                "the teacher answers prompts: give `promptField` or `messagesField`",
            ),
        ]
    )
    uri: S3Uri = Field(description="A .jsonl file (one object a line) or a .txt file.")
    text_field: str = Field(
        "text",
        min_length=1,
        max_length=128,
        description="Field of a JSON line that holds the text, where it is not a conversation.",
    )
    origin: Literal["Human", "Teacher"] = Field(
        "Human",
        description="Whose responses are learnt: those in the file, or the teacher's to its prompts.",
    )
    prompt_field: FieldName | None = Field(None, description="Field that holds a prompt.")
    response_field: FieldName | None = Field(
        None,
        description="Field that holds the response to it; only that is learnt. Not read with "
        "`origin: Teacher`.",
    )
    messages_field: FieldName | None = Field(
        None,
        description="Field that holds a conversation, a list of {role, content}; only what the "
        "assistant says is learnt. With `origin: Teacher` its turns are the prompt, and what the "
        "assistant says after the last other turn is left out.",
    )
    answer_field: FieldName | None = Field(
        None, description="Field that holds the right answer, which ChainOfThought checks."
    )
    weight: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="How often an epoch holds each sequence of this file: 2 twice, 0.5 every "
        "second one.",
    )


class Data(ApiModel):
    """What is learnt from, and what is held out."""

    sources: list[DataSource] = Field(min_length=1, max_length=64, description="Files of text.")
    tokenizer: ModelSource | None = Field(
        None,
        description="Folder with tokenizer.json; by default the teacher's, or else the student's. "
        "For signals of text: the student's, or else the teacher's.",
    )
    chat_template: str | None = Field(
        None,
        max_length=65_536,
        description="Jinja template of conversations; by default the tokenizer's.",
    )
    sequence_length: int = Field(1024, ge=8, le=131072, description="Tokens of a packed sequence.")
    holdout: float = Field(
        0.02, gt=0, lt=1, description="Share of the packed sequences kept for evaluation."
    )
    max_bad_records: int = Field(
        0, ge=0, le=1_000_000, description="Malformed lines that are skipped before the job fails."
    )
