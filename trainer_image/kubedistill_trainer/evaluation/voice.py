"""Who is asked: a model in this process, or one behind a server (`served.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

from kubedistill_trainer.evaluation.gym import Solved
from kubedistill_trainer.evaluation.prompts import Asking
from kubedistill_trainer.evaluation.questions import Answered
from kubedistill_trainer.evaluation.results import Performance, Prompting
from kubedistill_trainer.evaluation.speak import Tick, end_ids, speak
from kubedistill_trainer.evaluation.speed import measure_speed


class NotAsked(Exception):
    """A part cannot be asked for; the text says why. `again`: whether that may pass."""

    def __init__(self, why: str, *, again: bool) -> None:
        super().__init__(why)
        self.again = again


def spent() -> NotAsked:
    """Of a server that may not be paid for more."""
    why = "spec.teacher.endpoint.maxCost is spent; raise it to have the teacher asked"
    return NotAsked(why, again=True)


def uncounted() -> NotAsked:
    """Of a server that may be paid so much and no more: a limit on what nobody counts is none."""
    why = "under spec.teacher.endpoint.maxCost, and its answers do not say what they took (`usage`)"
    return NotAsked(why, again=False)


class Voice(Protocol):
    """A model that answers."""

    @property
    def prompting(self) -> Prompting: ...

    def ask(self, texts: Sequence[str], shots: Sequence[Solved], request: str) -> list[Answered]:
        """The answers to some questions, in order.

        `shots`: solved examples, shown to a model that is not talked to; `request`: what is asked
        for beside the question, of one that is. Raises NoRoom or NotAsked where a part has no
        answers, RunFailure where the pod has to end.
        """

    def speed(self) -> Performance:
        """How fast it is. Raises the same."""


class ModelVoice:
    """A model that is on its device and in evaluation mode."""

    def __init__(self, model: Any, asking: Asking, max_tokens: int, tick: Tick) -> None:
        self._model = model
        self._asking = asking
        self._max_tokens = max_tokens
        self._tick = tick
        self._ends = end_ids(model, asking.tokenizer.end_of_text)
        self._breaks = cache(lambda token: "\n" in asking.decode([token]))

    @property
    def prompting(self) -> Prompting:
        return self._asking.prompting

    def ask(self, texts: Sequence[str], shots: Sequence[Solved], request: str) -> list[Answered]:
        prompts = [self._asking.encode(text, shots, request) for text in texts]
        answers = speak(
            self._model,
            prompts,
            max_tokens=self._max_tokens,
            end_ids=self._ends,
            breaks=self._breaks if self._asking.one_line else None,
            tick=self._tick,
        )
        kept = [self._asking.answer(p, said) for p, said in zip(prompts, answers, strict=True)]
        return [Answered(self._asking.decode(said.ids), said.confidence) for said in kept]

    def speed(self) -> Performance:
        return measure_speed(self._model, self._tick)
