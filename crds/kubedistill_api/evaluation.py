"""How a finished student is measured, beside the held-out figures that every job has."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from kubedistill_api.base import ApiModel
from kubedistill_api.data import FieldName
from kubedistill_api.references import S3Uri

TaskName = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9_.:-]+$", max_length=128),
    Field(description="Name of a task."),
]
DEFAULT_TASKS = ["basic_arithmetic", "chain_sum", "gsm_symbolic", "simple_equations"]
SIMPLE_TASKS = frozenset(
    {
        "basic_arithmetic", "chain_sum", "count_bits", "decimal_chain_sum", "letter_counting",
        "number_format", "products", "spell_backward",
    }
)  # fmt: skip
"""One step to the answer. All others take several, and count in the multi-step figures."""


class Questions(ApiModel):
    """A file of questions with known answers, in place of those that come with kubedistill."""

    uri: S3Uri = Field(description="A .jsonl file, one question a line.")
    prompt_field: FieldName = Field("question", description="Field that holds the question.")
    answer_field: FieldName = Field(
        "answer",
        description="Field that holds the right answer, or a list of answers that are all right.",
    )


class Evaluation(ApiModel):
    """What student and teacher are asked once training is over. It only reads the model."""

    tasks: list[TaskName] = Field(
        DEFAULT_TASKS,
        max_length=32,
        description="Tasks of the reasoning-gym library; its answers can be checked.",
    )
    examples: int = Field(
        32,
        ge=0,
        le=10_000,
        description="Examples of each task, and questions, at most; 0 asks nothing.",
    )
    max_answer_tokens: int = Field(
        64, ge=1, le=32_768, description="Tokens of an answer, after which it is cut."
    )
    questions: Questions | None = Field(
        None, description="Questions with known answers; without it those of kubedistill."
    )
    latency: bool = Field(
        True, description="Whether the time to first token, speed and memory are measured."
    )
    lm_eval: list[TaskName] = Field(
        [],
        max_length=32,
        description="Tasks of lm-eval, of the student; the trainer's image needs the extra lm-eval.",
    )
