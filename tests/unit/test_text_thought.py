"""Reasoning apart from the answer, however a teacher marks it."""

from __future__ import annotations

import pytest
from kubedistill_trainer.teacher.text import TextAnswer
from kubedistill_trainer.teacher.thought import Thought, thought_of, written


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("<think>\n1+1\n</think>\n\n2", "1+1", "2"),
        ("<think>1+1</think>2", "1+1", "2"),
        ("1+1\n</think>\n2", "1+1", "2"),  # the template opened it
        ("<think></think>2", "", "2"),
        ("<think>1+1", "1+1", ""),
        ("<think>1+1</think>", "1+1", ""),
        ("<think>a</think>b</think>c", "a", "b</think>c"),
        ("1+1 is two.\nAnswer: 2", "1+1 is two.", "2"),
        ("1+1 is two.\n**Final Answer:** 2", "1+1 is two.", "2"),
        ("1+1 is two.\nThe answer is: 2", "1+1 is two.", "2"),
        ("Answer: 3? No.\nAnswer: 2", "Answer: 3? No.", "2"),
        ("Answer: 2", "", "Answer: 2"),  # there is nothing before it
        ("The Answer Company: Ltd", "", "The Answer Company: Ltd"),
        ("2", "", "2"),
        ("", "", ""),
    ],
)
def test_what_a_model_wrote(text: str, reasoning: str, answer: str) -> None:
    assert thought_of(TextAnswer(text)) == Thought(reasoning, answer)


def test_what_a_server_kept_apart_goes_first() -> None:
    apart = TextAnswer("x</think>2", reasoning=" 1+1 ")
    assert thought_of(apart) == Thought("1+1", "x</think>2")
    assert thought_of(TextAnswer("<think></think>\n2", reasoning="1+1")) == Thought("1+1", "2")


@pytest.mark.parametrize(
    ("thought", "reasoning", "text"),
    [
        (Thought("1+1", "2"), True, "<think>\n1+1\n</think>\n\n2"),
        (Thought("1+1", "2"), False, "2"),
        (Thought("", "2"), True, "2"),
    ],
)
def test_what_the_student_says(thought: Thought, reasoning: bool, text: str) -> None:
    assert written(thought, reasoning=reasoning) == text
    if reasoning:
        assert thought_of(TextAnswer(text)) == thought
