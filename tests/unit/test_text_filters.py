"""Which answers are learnt, and why others are not."""

from __future__ import annotations

from typing import Any

import pytest
from kubedistill_api.generation import ChainOfThought
from kubedistill_trainer.data.conversation import Message, Prompt
from kubedistill_trainer.teacher.filters import Learnt, majority, responses, thoughts
from kubedistill_trainer.teacher.text import TextAnswer

ASKED = Message("user", "6 · 7?")


def prompt(answer: str | None = None, source: int = 0) -> Prompt:
    return Prompt(source, 1, (ASKED,), answer)


def worked(answer: str, reasoning: str = "so it is") -> TextAnswer:
    return TextAnswer(f"<think>{reasoning}</think>{answer}")


CUT = TextAnswer("<think>so it</think>4", finished=False)
REFUSED = TextAnswer("", refusal="a filter")


def of_one(*said: TextAnswer, answer: str | None = "42", **settings: Any) -> Learnt:
    chosen = ChainOfThought.model_validate(settings)
    return thoughts(
        [prompt(answer)], dict(enumerate(said)), len(said), chosen, lambda t: len(t.split())
    )


def words(learnt: Learnt) -> list[str]:
    return [talk.messages[-1].content for _, talk in learnt.conversations]


@pytest.mark.parametrize(
    ("said", "settings", "dropped"),
    [
        (worked("42"), {}, ""),
        (worked("42.0"), {}, ""),
        (worked("41"), {}, "wrong"),
        (worked("41"), {"checkAnswer": False}, ""),
        (worked(""), {}, "empty"),
        (TextAnswer("<think>for ever"), {}, "empty"),
        (CUT, {}, "unfinished"),
        (REFUSED, {}, "refused"),
        (worked("42", "one two"), {"minReasoningTokens": 3}, "tooShort"),
        (worked("42", "one two three"), {"minReasoningTokens": 3}, ""),
        (worked("42", "one two three"), {"maxReasoningTokens": 2}, "tooLong"),
        (worked("42", "one two"), {"maxReasoningTokens": 2}, ""),
        (TextAnswer("42"), {"minReasoningTokens": 1}, "tooShort"),
        (TextAnswer("42"), {}, ""),
    ],
)  # fmt: skip
def test_one_sample(said: TextAnswer, settings: dict[str, Any], dropped: str) -> None:
    learnt = of_one(said, **settings)
    assert dict(learnt.dropped) == ({dropped: 1} if dropped else {})
    assert len(learnt.conversations) == (not dropped)


def test_a_record_without_an_answer_is_not_checked() -> None:
    assert len(of_one(worked("41"), answer=None).conversations) == 1


@pytest.mark.parametrize(
    ("said", "share", "kept", "dropped"),
    [
        (["42", "42.0", "41"], 0.6, 2, {"disagreeing": 1}),
        (["42", "41", "40"], 0.6, 0, {"disagreeing": 3}),
        (["42", "42", "41", "41"], 0.5, 0, {"disagreeing": 4}),  # a tie
        (["42", "42", "41"], 0.7, 0, {"disagreeing": 3}),
        (["42", "42", "42"], 1.0, 3, {}),
        (["42", "41"], 0.0, 2, {}),
        (["42", CUT, "42"], 0.6, 2, {"unfinished": 1}),
        (["42", CUT, CUT], 0.6, 0, {"disagreeing": 1, "unfinished": 2}),
        ([REFUSED, REFUSED], 0.5, 0, {"refused": 2}),
    ],
)
def test_samples_agree(
    said: list[str | TextAnswer], share: float, kept: int, dropped: dict[str, int]
) -> None:
    answers = [worked(one) if isinstance(one, str) else one for one in said]
    learnt = of_one(*answers, answer=None, minAgreement=share)
    assert (len(learnt.conversations), dict(learnt.dropped)) == (kept, dropped)


@pytest.mark.parametrize(
    ("said", "answer", "kept", "dropped"),
    [
        (["42", "42 apples", "42 kg"], None, 3, {}),
        (["42", "She has 42 of them.", "x = 42"], "42", 3, {}),
        (["42", "It is 42.", "41"], "42", 2, {"wrong": 1}),
        (["(A)", "A", "B"], "A", 2, {"wrong": 1}),
    ],
)
def test_samples_agree_as_the_check_compares(
    said: list[str], answer: str | None, kept: int, dropped: dict[str, int]
) -> None:
    learnt = of_one(*map(worked, said), answer=answer, minAgreement=0.6)
    assert (len(learnt.conversations), dict(learnt.dropped)) == (kept, dropped)


def test_a_majority_for_the_wrong_answer_teaches_nothing() -> None:
    learnt = of_one(worked("41"), worked("41"), worked("42"), minAgreement=0.6)
    assert dict(learnt.dropped) == {"wrong": 2, "disagreeing": 1}


@pytest.mark.parametrize(
    ("votes", "samples", "share", "winner"),
    [
        ([], 3, 0.5, None), (["a"], 1, 1.0, "a"), (["a", "a", "b"], 3, 2 / 3, "a"),
        (["a", "a", "a"], 5, 0.6, "a"), (["a", "a", "a"], 5, 0.61, None),
        (["a", "b"], 2, 0.1, None), (["b", "a", "b"], 3, 0.1, "b"),
    ],
)  # fmt: skip
def test_the_majority(votes: list[str], samples: int, share: float, winner: Any) -> None:
    assert majority(votes, samples, share) == winner


def test_what_is_learnt_follows_the_prompt() -> None:
    with_reasoning = of_one(worked("42", "6 · 7"))
    assert words(with_reasoning) == ["<think>\n6 · 7\n</think>\n\n42"]
    [(source, talk)] = with_reasoning.conversations
    assert (source, talk.messages[0]) == (0, ASKED)
    assert words(of_one(worked("42", "6 · 7"), trainOnReasoning=False)) == ["42"]


def test_answers_without_reasoning_are_counted_apart() -> None:
    learnt = of_one(TextAnswer("42"), worked("42"))
    assert (len(learnt.conversations), learnt.unreasoned) == (2, 1)


def test_responses_are_learnt_as_they_were_said() -> None:
    prompts = [prompt(source=0), prompt("42", source=3)]
    answers = {3: TextAnswer("no"), 0: TextAnswer(" yes \n"), 1: CUT, 2: TextAnswer(" \n")}
    learnt = responses(prompts, answers, 2)
    assert [source for source, _ in learnt.conversations] == [0, 3]
    assert words(learnt) == ["yes", "no"]
    assert dict(learnt.dropped) == {"unfinished": 1, "empty": 1}


def test_the_counts_in_a_sentence() -> None:
    dropped = {"unfinished": 68, "wrong": 1120}
    assert Learnt((), 2000, dropped).sentence() == (
        "kept 0 of 2,000 answers: 68 unfinished, 1,120 wrong"
    )
    assert Learnt((), 0, {}).sentence() == "kept 0 of 0 answers"
