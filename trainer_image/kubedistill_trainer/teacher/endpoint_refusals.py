"""Refusals of single prompts, and the point from which they are the server's refusal of all."""

from __future__ import annotations

import re

from kubedistill_trainer.failures import InputsRefused, refuse
from kubedistill_trainer.teacher.endpoint_reply import FIELD, MAX_TOKENS, TOO_LONG
from kubedistill_trainer.teacher.text import TextAnswer, TextRequest

MOST_ALIKE = 8
"""Prompts in a row that are refused in the same words, after which no more are asked."""
_VARYING = re.compile(r"\S*\d\S*")
_OF_A_PROMPT = re.compile(rf"{TOO_LONG.pattern}|filter|moderation|content.?policy", re.I)
"""What the prompt itself is to blame for, at a server that answers others."""
Given = tuple[TextRequest, TextAnswer]


def likeness(refusal: str) -> str:
    """A refusal without what differs from one to the next: counts, times, names of requests."""
    return _VARYING.sub("#", refusal)


class Refusals:
    """Answers on their way out; refusals are kept back until something shows that they are single.

    `answered`: whether the server is known to answer prompts of these.
    """

    def __init__(self, url: str, answered: bool) -> None:
        self._url = url
        self._answered = answered
        self._held: list[tuple[int, Given]] = []

    def take(self, begun: int, request: TextRequest, answer: TextAnswer) -> list[Given]:
        """What may be given out now. InputsRefused where the server refuses everything.

        `begun`: when it was asked, in the order of asking: an answer to what was asked before a
        refusal, and took longer, does not show that the server still answers.
        """
        given = (request, answer)
        if not answer.refusal:
            self._answered = True
            ready = [held for at, held in self._held if at < begun]
            self._held = [(at, held) for at, held in self._held if at > begun]
            return [*ready, given]
        if self._answered and _OF_A_PROMPT.search(answer.refusal):
            return [given]
        others = [] if self._alike(answer) else self.rest()
        self._held.append((begun, given))
        # Samples of one prompt say one thing.
        if len({held.prompt for _, (held, _) in self._held}) >= MOST_ALIKE:
            raise self._all_refused(answer.refusal)
        return others

    def rest(self) -> list[Given]:
        """What is kept back, at the end."""
        held, self._held = self._held, []
        return [given for _, given in held]

    def _alike(self, answer: TextAnswer) -> bool:
        if not self._held:
            return True
        _, (_, first) = self._held[0]
        return likeness(first.refusal) == likeness(answer.refusal)

    def _all_refused(self, words: str) -> InputsRefused:
        found = f"{self._url} refused {MOST_ALIKE} prompts in a row alike ({words})"
        if TOO_LONG.search(words):
            return refuse(
                MAX_TOKENS, found,
                "write fewer tokens, give shorter prompts, or serve a larger context",
            )  # fmt: skip
        return refuse(
            f"{FIELD}.url", found,
            "mend what it says; if these prompts are to blame, take them out of the data",
        )  # fmt: skip
