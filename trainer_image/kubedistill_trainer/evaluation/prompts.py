"""From a question to what a model reads, and from what it says to its answer."""

from __future__ import annotations

import logging
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from kubedistill_trainer.data.conversation import Message
from kubedistill_trainer.data.template import ChatTemplate
from kubedistill_trainer.data.tokenizer import TextTokenizer
from kubedistill_trainer.evaluation.gym import Solved
from kubedistill_trainer.evaluation.results import Prompting
from kubedistill_trainer.evaluation.speak import Said
from kubedistill_trainer.failures import InputsRefused
from kubedistill_trainer.teacher.thought import (
    closings,
    left_open,
    tagged,
    unsaid_ids,
    untagged,
)

_log = logging.getLogger(__name__)
TO_SOLVE = "End with a line that holds the final answer alone, in the form `Answer: …`."
TO_RECALL = "Answer with a name, a word or a number, and nothing else."
_MARK = re.compile(r"(?:final )?answer(?: is)?\s*[:=]|(?:final )?answer is\b", re.IGNORECASE)
_BOX = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_FORMULA = re.compile(r"\$+([^$]+)\$+|\\[(\[](.+?)\\[)\]]")
_UPRIGHT = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}")
_POLITE = (
    r"(?:let me know|(?:i )?hope (?:this|that|it)|feel free|if you|please|thank|is there|"
    r"do you|would you|good luck|i(?: a|')m happy|happy to)\b"
)
_POLITE_LINE = re.compile(_POLITE, re.IGNORECASE)
_POLITE_SENTENCE = re.compile(rf"(?<=[.!?])\s+(?={_POLITE})", re.IGNORECASE)
"""What a model says to its reader once it has answered."""
_AROUND = " \t*`\"'_"
_TAG_TOKENS = 16
"""More than any tag has, with the blanks after it."""


@dataclass(frozen=True)
class Asking:
    """How a model is asked. `template`: of a model that is talked to; None for one that goes on
    with a text, which is shown solved examples and answers on one line."""

    tokenizer: TextTokenizer
    template: ChatTemplate | None

    @property
    def one_line(self) -> bool:
        return self.template is None

    @property
    def prompting(self) -> Prompting:
        return "Examples" if self.one_line else "ChatTemplate"

    def encode(self, question: str, shots: Sequence[Solved], request: str) -> list[int]:
        """Token ids of a prompt. `request`: what is asked for beside the question, of a chat model.

        Raises Unrenderable when the template refuses a question.
        """
        if self.template is None:
            text = plain(question, shots)
        else:
            message = Message("user", f"{question}\n\n{request}")
            text = self.template.render([message], ask=True)
        return list(self.tokenizer.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Without special tokens, but for those that mark reasoning."""
        said = [token for token in ids if token not in self._unsaid]
        return str(self.tokenizer.tokenizer.decode(said, skip_special_tokens=False))

    def answer(self, prompt: Sequence[int], said: Said) -> Said:
        """What of `said` follows its reasoning; nothing of one that is still reasoning.

        A template may have opened the reasoning in the prompt.
        """
        text = self.decode(said.ids)
        end = self.decode(prompt[-_TAG_TOKENS:]).rstrip()
        begun = end.endswith(">") and left_open(end[end.rfind("<") :])
        if left_open(text) or (begun and not closings(text)):
            return Said()
        if not tagged(text):
            return said
        start = bisect_left(
            range(len(said.ids)), closings(text), key=lambda n: closings(self.decode(said.ids[:n]))
        )
        while start < len(said.ids) and not self.decode(said.ids[start : start + 1]).strip():
            start += 1
        return Said(said.ids[start:], said.probabilities[start:])

    @cached_property
    def _unsaid(self) -> frozenset[int]:
        return unsaid_ids(self.tokenizer)


def asking(tokenizer: TextTokenizer, field: str) -> Asking:
    """By the tokenizer's chat template where it has one that parses; `field` it comes from.

    Training on plain text never looked at the template: one that does not parse costs no training.
    """
    text = tokenizer.chat_template
    if text is None:
        return Asking(tokenizer, None)
    try:
        return Asking(tokenizer, ChatTemplate(tokenizer, text, field))
    except InputsRefused as refused:
        _log.warning("asked by examples, not by the chat template: %s", refused.message)
        return Asking(tokenizer, None)


def plain(question: str, shots: Sequence[Solved]) -> str:
    """A text whose next line's rest is the answer."""
    solved = "".join(f"Question: {s.question}\nAnswer: {s.answer}\n\n" for s in shots)
    return f"{solved}Question: {question}\nAnswer:"


def final_answers(said: str) -> tuple[str, ...]:
    """What may be meant as the answer of a text, in order.

    That is what its last `Answer:` is followed by, or else its last line; of `44 + 27 = 71` also
    what follows the last sign, and of `\\boxed{71}` and `$71$` what is in it. Reasoning in tags and
    polite words at the end do not count. Empty where nothing is said.
    """
    if tagged(said):
        said = untagged(said).answer
    lines = [line.strip(_AROUND) for line in said.splitlines() if line.strip(_AROUND)]
    while len(lines) > 1 and _POLITE_LINE.match(lines[-1]):
        lines.pop()
    if not lines:
        return ()
    last = next((rest for line in reversed(lines) if (rest := _marked(line))), _bare(lines[-1]))
    found = [last, *(_bare(box) for box in _BOX.findall(said)[-1:])]
    formula = _FORMULA.fullmatch(last)
    if formula is not None:
        last = formula[1] or formula[2]
        found.append(_bare(last))
    if "\\" in last:
        found.append(_bare(_UPRIGHT.sub(r"\1", last)))
    found.append(last.rstrip("!"))
    if "=" in last:
        found.append(_bare(last.rpartition("=")[2]))
    return tuple(dict.fromkeys(answer for answer in found if answer))


def _marked(line: str) -> str:
    """What follows a line's last `Answer:`; empty where there is none."""
    marks = list(_MARK.finditer(line))
    return _bare(line[marks[-1].end() :]) if marks else ""


def _bare(text: str) -> str:
    """Without emphasis, and without the full stop that ends a sentence."""
    text = _POLITE_SENTENCE.split(text.strip(_AROUND), maxsplit=1)[0].strip(_AROUND)
    return text[:-1].rstrip(_AROUND) if text.endswith(".") else text
