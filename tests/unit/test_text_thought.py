"""Reasoning apart from the answer, however a teacher marks it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kubedistill_trainer.teacher.text import TextAnswer
from kubedistill_trainer.teacher.thought import Thought, tagged, thought_of, written


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("<think>\n1+1\n</think>\n\n2", "1+1", "2"),
        ("<think>1+1</think>2", "1+1", "2"),
        ("1+1\n</think>\n2", "1+1", "2"),  # the template opened it
        ("<think></think>2", "", "2"),
        ("<think>1+1", "1+1", ""),
        ("<think>1+1</think>", "1+1", ""),
        ("<think>a</think>b</think>c", "a\n\nb", "c"),
        ("Well. <think>a</think> 2", "a", "Well.\n\n2"),
        ("<think>a</think>b<think>c</think>d", "a\n\nc", "b\n\nd"),
        ("<think>a <think>b</think> 2", "a\n\nb", "2"),
        ("<think>a<think>b</think>c</think>2", "a\n\nb\n\nc", "2"),
        ("Well. <think>a", "Well.\n\na", ""),
        ("<think>a</think>2<think>b", "2\n\na\n\nb", ""),
        ("<THINK>a</Think>2", "a", "2"),
        ("<thinking>a</thinking>2", "a", "2"),
        ("<reasoning>\na\n</reasoning>\n2", "a", "2"),
        ("The <thinker> 2", "", "The <thinker> 2"),
        ("<think></think>1+1 is two.\nAnswer: 2", "", "1+1 is two.\nAnswer: 2"),
        ("a\n\n\n  # Answer:\n\n2", "a", "2"),
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


@pytest.mark.parametrize(
    ("apart", "text", "reasoning", "answer"),
    [
        (" 1+1 ", "2", "1+1", "2"),
        ("1+1", "<think></think>\n2", "1+1", "2"),
        ("1+1", "<think>\n\n</think>\n\n2", "1+1", "2"),
        ("1+1", "<think>is two</think>2", "1+1\n\nis two", "2"),
        ("1+1", "is two</think>2", "1+1\n\nis two", "2"),
        ("<think>1+1</think>", "2", "1+1", "2"),
        ("1+1", "It is:\nAnswer: 2", "1+1", "It is:\nAnswer: 2"),
    ],
)
def test_what_a_server_kept_apart_is_reasoning_too(
    apart: str, text: str, reasoning: str, answer: str
) -> None:
    assert thought_of(TextAnswer(text, reasoning=apart)) == Thought(reasoning, answer)


@given(
    st.lists(
        st.sampled_from(
            ["<think>", "</think>", "<Thinking>", "</reasoning>", "a", "Answer: 2", "\n"]
        ),
        max_size=12,
    )
)
def test_no_tag_is_left(parts: list[str]) -> None:
    found = thought_of(TextAnswer("".join(parts)))
    assert not tagged(found.reasoning) and not tagged(found.answer)


@pytest.mark.parametrize("filling", ["\n", "> ", "*", "<think>", "answer ", "answer\n"])
def test_a_long_text_is_read_in_one_go(filling: str) -> None:
    """With a regular expression that runs over lines this does not end within an hour."""
    text = "a" + filling * (200_000 // len(filling)) + "x"
    found = thought_of(TextAnswer(text))
    assert found.answer.endswith("x") or found.reasoning.endswith("x")


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
