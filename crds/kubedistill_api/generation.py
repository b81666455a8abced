"""How a teacher writes text, and which of it is learnt."""

from __future__ import annotations

from pydantic import Field

from kubedistill_api.base import ApiModel, cel, rules

MAX_TOKENS = 512
"""Of an answer, where `generation` says nothing."""


class Generation(ApiModel):
    """How the teacher answers a prompt."""

    model_config = rules(
        [
            cel(
                "!has(self.samples) || self.samples == 1 || "
                "(has(self.temperature) && self.temperature > 0.0)",
                "several samples of a prompt need a `temperature` above 0: without one they are alike",
            )
        ]
    )
    max_tokens: int = Field(
        MAX_TOKENS, ge=1, le=131_072, description="Tokens of an answer at most."
    )
    temperature: float = Field(0.7, ge=0, le=2, description="Of the draw; 0 takes the likeliest.")
    top_p: float = Field(1.0, gt=0, le=1, description="Draw from the likeliest with this mass.")
    samples: int = Field(1, ge=1, le=64, description="Answers a prompt.")
    system_prompt: str = Field(
        "", max_length=16_384, description="Put before each prompt, for the teacher only."
    )


class ChainOfThought(ApiModel):
    """Which of the teacher's reasoning is learnt; what fails a filter is counted, not learnt."""

    model_config = rules(
        [
            cel(
                "!has(self.maxReasoningTokens) || !has(self.minReasoningTokens) || "
                "self.minReasoningTokens <= self.maxReasoningTokens",
                "no reasoning is so long and so short: `minReasoningTokens` is at most "
                "`maxReasoningTokens`",
                ".minReasoningTokens",
            )
        ]
    )

    train_on_reasoning: bool = Field(
        True, description="Whether the student learns the reasoning, or the answer alone."
    )
    check_answer: bool = Field(
        True, description="Keep only answers that equal the record's, where it has one."
    )
    min_agreement: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of a prompt's samples that must give one answer for it to be kept "
        "(self-consistency); only samples with that answer are learnt. 0: no filter.",
    )
    min_reasoning_tokens: int = Field(
        0, ge=0, le=131_072, description="Shorter reasoning is not learnt."
    )
    max_reasoning_tokens: int | None = Field(
        None, ge=1, le=131_072, description="Longer reasoning is not learnt."
    )
