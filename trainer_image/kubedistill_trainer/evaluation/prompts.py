"""From a question to what a model reads, and from what it says to its answer."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kubedistill_trainer.data.conversation import Message
from kubedistill_trainer.data.template import ChatTemplate
from kubedistill_trainer.data.tokenizer import TextTokenizer
from kubedistill_trainer.evaluation.gym import Solved
from kubedistill_trainer.failures import InputsRefused

_log = logging.getLogger(__name__)
TO_SOLVE = "End with a line that holds the final answer alone, in the form `Answer: …`."
TO_RECALL = "Answer with a name, a word or a number, and nothing else."
_MARK = re.compile(r"(?:final )?answer(?: is)?\s*[:=]|(?:final )?answer is\b", re.IGNORECASE)
_BOX = re.compile(r"\\boxed\{([^{}]*)\}")
_AROUND = " \t*`\"'_"


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
    def prompting(self) -> Literal["ChatTemplate", "Examples"]:
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
        return str(self.tokenizer.tokenizer.decode(list(ids), skip_special_tokens=True))


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
    what follows the last sign, and of `\\boxed{71}` what is in it. Empty where nothing is said.
    """
    lines = [line.strip(_AROUND) for line in said.splitlines() if line.strip(_AROUND)]
    if not lines:
        return ()
    last = next((rest for line in reversed(lines) if (rest := _marked(line))), _bare(lines[-1]))
    found = [last, *(_bare(box) for box in _BOX.findall(said)[-1:])]
    if "=" in last:
        found.append(_bare(last.rpartition("=")[2]))
    return tuple(dict.fromkeys(answer for answer in found if answer))


def _marked(line: str) -> str:
    """What follows a line's last `Answer:`; empty where there is none."""
    marks = list(_MARK.finditer(line))
    return _bare(line[marks[-1].end() :]) if marks else ""


def _bare(text: str) -> str:
    """Without emphasis, and without the full stop that ends a sentence."""
    text = text.strip(_AROUND)
    return text[:-1].rstrip(_AROUND) if text.endswith(".") else text
