"""Reasoning kept apart from the answer that follows it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kubedistill_trainer.data.tokenizer import TextTokenizer
from kubedistill_trainer.teacher.text import TextAnswer

OPEN, CLOSE = "<think>", "</think>"
_TAG = re.compile(r"<(/?)(?:think|thinking|reasoning)>", re.IGNORECASE)
_MARKER = re.compile(
    r"^[ \t*_#>-]*(?:the[ \t]+)?(?:final[ \t]+)?answer(?:[ \t]+is)?[ \t*_]*:[*_]*",
    re.IGNORECASE | re.MULTILINE,
)
"""Where a line begins with `Answer:`, `**Final answer:**` and the like. Within one line only: what
may run over lines is tried at each of them, and takes forever in a text of many blank ones."""


@dataclass(frozen=True)
class Thought:
    """`reasoning` is empty where there is none; `answer` too, where the teacher never came to it."""

    reasoning: str
    answer: str


def thought_of(said: TextAnswer) -> Thought:
    """What the teacher thought, and what it answered.

    What a server kept apart and what stands in tags (see `untagged`) is reasoning; where there is
    neither, what comes before the last line that begins with `Answer:`.
    """
    text, apart = said.text.strip(), said.reasoning.strip()
    if apart or tagged(text):
        inner, kept = untagged(text), untagged(apart)
        return Thought(_together([kept.reasoning, kept.answer, inner.reasoning]), inner.answer)
    markers = list(_MARKER.finditer(text))
    if markers and text[: markers[-1].start()].strip():
        last = markers[-1]
        return Thought(text[: last.start()].strip(), text[last.end() :].strip())
    return Thought("", text)


def tagged(text: str) -> bool:
    """Whether a tag of reasoning is in it."""
    return _TAG.search(text) is not None


def left_open(text: str) -> bool:
    """Whether its last tag of reasoning is an opening one."""
    tags = _TAG.findall(text)
    return bool(tags) and not tags[-1]


def closings(text: str) -> int:
    """How many closing tags of reasoning are in it."""
    return sum(match[1] == "/" for match in _TAG.finditer(text))


def untagged(text: str) -> Thought:
    """What stands in <think>, <thinking> and <reasoning>, and what stands around them.

    A closing tag without an opening one ends what is before it: a template may have opened it in
    the prompt. Without a closing one all is reasoning, and there is no answer.
    """
    inside: list[str] = []
    outside: list[str] = []
    within, at = False, 0
    for match in _TAG.finditer(text):
        part, at = text[at : match.start()], match.end()
        if not match[1]:
            (inside if within else outside).append(part)
            within = True
        else:
            if not within:
                inside, outside = [*inside, *outside], []
            inside.append(part)
            within = False
    (inside if within else outside).append(text[at:])
    if within:
        inside, outside = [*outside, *inside], []
    return Thought(_together(inside), _together(outside))


def written(thought: Thought, *, reasoning: bool) -> str:
    """What a student says: the answer, after its reasoning in tags where that is learnt."""
    if not reasoning or not thought.reasoning:
        return thought.answer
    return f"{OPEN}\n{thought.reasoning}\n{CLOSE}\n\n{thought.answer}"


def after_marker(answer: str) -> str:
    """What follows the last `Answer:` at a line's beginning; all where there is none."""
    markers = list(_MARKER.finditer(answer))
    return answer[markers[-1].end() :].strip() if markers else answer


def _together(parts: list[str]) -> str:
    return "\n\n".join(bare for part in parts if (bare := part.strip()))


def unsaid_ids(tokenizer: TextTokenizer) -> frozenset[int]:
    """Special tokens, which are no part of what is said; those that mark reasoning are."""
    added = tokenizer.tokenizer.get_added_tokens_decoder().items()
    return frozenset(i for i, t in added if t.special and t.content not in (OPEN, CLOSE))
