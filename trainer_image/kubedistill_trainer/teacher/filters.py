"""Which of a teacher's answers are learnt, and how many are not and why. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kubedistill_api.generation import ChainOfThought

from kubedistill_trainer.data.conversation import Conversation, Message, Prompt
from kubedistill_trainer.teacher.equality import Key, group, same
from kubedistill_trainer.teacher.text import TextAnswer
from kubedistill_trainer.teacher.thought import Thought, thought_of, written

TokenCount = Callable[[str], int]
REASONS = {
    "refused": "refused by the teacher",
    "unfinished": "unfinished",
    "empty": "without an answer",
    "wrong": "wrong",
    "disagreeing": "disagreeing",
    "tooShort": "with too short a reasoning",
    "tooLong": "with too long a reasoning",
}
"""Why an answer is not learnt, in the order in which it is asked: the first counts."""


@dataclass(frozen=True)
class Learnt:
    """`conversations`: place of the prompt's file, and the prompt with the answer; `dropped`: answers
    that are not learnt, by reason; `unreasoned`: of those that are learnt, without any reasoning."""

    conversations: tuple[tuple[int, Conversation], ...]
    asked: int
    dropped: Mapping[str, int]
    unreasoned: int = 0

    def sentence(self) -> str:
        """How many were kept, and what became of the others."""
        parts = [f"{n:,} {REASONS[r]}" for r in REASONS if (n := self.dropped.get(r, 0))]
        text = f"kept {len(self.conversations):,} of {self.asked:,} answers"
        return text + (f": {', '.join(parts)}" if parts else "")


def responses(prompts: Sequence[Prompt], answers: Mapping[int, TextAnswer], samples: int) -> Learnt:
    """The answers of `signal: Responses`, by request (prompt · samples + sample), as they were said."""
    kept: list[tuple[int, Conversation]] = []
    dropped: Counter[str] = Counter()
    for request, said in sorted(answers.items()):
        reason = _unusable(said) or ("" if said.text.strip() else "empty")
        if reason:
            dropped[reason] += 1
        else:
            kept.append(_conversation(prompts[request // samples], said.text.strip()))
    return Learnt(tuple(kept), len(answers), dropped)


def thoughts(
    prompts: Sequence[Prompt],
    answers: Mapping[int, TextAnswer],
    samples: int,
    settings: ChainOfThought,
    tokens: TokenCount,
) -> Learnt:
    """The answers of `signal: ChainOfThought`, by request; `tokens` counts those of a reasoning."""
    kept: list[tuple[int, Conversation]] = []
    dropped: Counter[str] = Counter()
    unreasoned = 0
    for index, prompt in enumerate(prompts):
        said = [answers[index * samples + sample] for sample in range(samples)]
        split = [thought_of(one) for one in said]
        votes = [
            group(thought.answer, prompt.answer)
            for one, thought in zip(said, split, strict=True)
            if not _unusable(one) and thought.answer
        ]
        winner = majority(votes, samples, settings.min_agreement)
        for one, thought in zip(said, split, strict=True):
            reason = _unusable(one) or _unlearnt(thought, prompt, winner, settings, tokens)
            if reason:
                dropped[reason] += 1
                continue
            unreasoned += not thought.reasoning
            text = written(thought, reasoning=settings.train_on_reasoning)
            kept.append(_conversation(prompt, text))
    return Learnt(tuple(kept), len(answers), dropped, unreasoned)


def majority(votes: Sequence[Key], samples: int, share: float) -> Key | None:
    """The answer of more samples than any other, and of at least `share` of all `samples`; None where
    there is no such answer, as with a tie."""
    ranked = Counter(votes).most_common(2)
    if not ranked or (len(ranked) > 1 and ranked[0][1] == ranked[1][1]):
        return None
    # Rounded: 0.6 of 5 samples are 3, whatever floats make of it.
    return ranked[0][0] if ranked[0][1] >= round(share * samples, 9) else None


def _unusable(said: TextAnswer) -> str:
    if said.refusal:
        return "refused"
    return "" if said.finished else "unfinished"


def _unlearnt(
    thought: Thought,
    prompt: Prompt,
    winner: Key | None,
    settings: ChainOfThought,
    tokens: TokenCount,
) -> str:
    if not thought.answer:
        return "empty"
    if settings.check_answer and prompt.answer and not same(thought.answer, prompt.answer):
        return "wrong"
    if settings.min_agreement > 0 and group(thought.answer, prompt.answer) != winner:
        return "disagreeing"
    bounded = settings.min_reasoning_tokens > 0 or settings.max_reasoning_tokens is not None
    length = tokens(thought.reasoning) if bounded else 0
    if length < settings.min_reasoning_tokens:
        return "tooShort"
    if settings.max_reasoning_tokens is not None and length > settings.max_reasoning_tokens:
        return "tooLong"
    return ""


def _conversation(prompt: Prompt, text: str) -> tuple[int, Conversation]:
    return prompt.source, Conversation((*prompt.messages, Message("assistant", text)))
