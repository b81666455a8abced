"""One model, asked everything that the spec asks for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from kubedistill_api.evaluation import Evaluation

from kubedistill_trainer.data.sources import OpenStore
from kubedistill_trainer.evaluation import questions
from kubedistill_trainer.evaluation.gym import Task, load_task
from kubedistill_trainer.evaluation.prompts import TO_RECALL, TO_SOLVE, Asking, final_answers
from kubedistill_trainer.evaluation.questions import QuestionSet, read_questions
from kubedistill_trainer.evaluation.results import Abilities, TaskScore
from kubedistill_trainer.evaluation.speak import NoRoom, Tick
from kubedistill_trainer.evaluation.voice import ModelVoice, NotAsked, Voice
from kubedistill_trainer.failures import RunFailure

_log = logging.getLogger(__name__)
_LONGEST_PROBLEM = 300
PERFORMANCE, QUESTIONS = "performance", "questions"
"""Names of what is no task."""
Keep = Callable[[Abilities], None]


@dataclass(frozen=True)
class Plan:
    """What is asked: the same of student and teacher. `problems`: what cannot be, and why."""

    tasks: tuple[Task, ...]
    questions: QuestionSet | None
    max_answer_tokens: int
    latency: bool
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all that is asked, as in `Abilities.problems`."""
        tasks = (task.name for task in self.tasks)
        return (
            *([PERFORMANCE] if self.latency else []),
            *tasks,
            *([QUESTIONS] if self.questions else []),
        )

    @property
    def is_empty(self) -> bool:
        """Whether nothing is asked."""
        return not self.names

    def without(self, known: Abilities) -> Plan:
        """What is left to be asked."""
        done = {task.name for task in known.tasks}
        return replace(
            self,
            tasks=tuple(task for task in self.tasks if task.name not in done),
            questions=self.questions if known.questions is None else None,
            latency=self.latency and known.performance is None,
        )


def plan_of(settings: Evaluation, open_store: OpenStore) -> Plan:
    """Make the examples, read the questions.

    The preflight has refused what cannot be made or read. What has gone since is a problem of the
    plan: it must not cost a finished training. StoreError where the store does not answer.
    """
    problems: dict[str, str] = {}
    asked, tasks = None, []
    for name in dict.fromkeys(settings.tasks) if settings.examples else ():
        try:
            tasks.append(load_task(name, settings.examples))
        except Exception as error:  # each task of the library fails in its own way
            problems[name] = _told(error)
    if settings.examples:
        try:
            asked = read_questions(settings.questions, open_store, settings.examples)
        except RunFailure as error:
            problems["questions"] = _told(error)
    return Plan(tuple(tasks), asked, settings.max_answer_tokens, settings.latency, problems)


def _told(error: Exception) -> str:
    if isinstance(error, RunFailure):
        return error.message[:_LONGEST_PROBLEM]
    if isinstance(error, NoRoom | NotAsked):
        return str(error)[:_LONGEST_PROBLEM]
    return f"{type(error).__name__}: {error}"[:_LONGEST_PROBLEM]


def measure(model: Any, asking: Asking, plan: Plan, tick: Tick) -> Abilities:
    """Ask `model`, which is on its device and in evaluation mode; see `measure_voice`."""
    return measure_voice(ModelVoice(model, asking, plan.max_answer_tokens, tick), plan)


def measure_voice(voice: Voice, plan: Plan, keep: Keep = lambda found: None) -> Abilities:
    """Ask everything; `keep` is called with what is there after each part.

    A part that fails is left out, with the reason in `problems`: by now the model is trained, and
    what it took is worth more than a figure.
    """
    nothing = Abilities(prompting=voice.prompting)
    found = nothing.model_copy(update={"problems": dict(plan.problems)})
    for name, part in _parts(voice, plan):
        found = found.with_more(nothing.model_copy(update=_attempt(name, part)))
        keep(found)
    return found


def _parts(voice: Voice, plan: Plan) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Each with its name, and what asks for it and says what of `Abilities` that is."""
    # First: on the CPU memory is how much the process grows, and later it has room already.
    if plan.latency:
        yield PERFORMANCE, lambda: {"performance": voice.speed()}
    for task in plan.tasks:
        yield task.name, partial(_solve, voice, task)
    if plan.questions is not None:
        yield QUESTIONS, partial(_recall, voice, plan.questions)


def _attempt(name: str, part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return part()
    except RunFailure:
        raise
    except (NoRoom, NotAsked) as error:
        _log.warning("%s: not measured: %s", name, error)
        again = isinstance(error, NotAsked) and error.again
        return {"problems": {name: _told(error)}, "again": again}
    except Exception as error:
        _log.exception("%s: not measured", name)
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        return {"problems": {name: _told(error)}}


def _solve(voice: Voice, task: Task) -> dict[str, Any]:
    answers = voice.ask(task.questions, task.shots, TO_SOLVE)
    right = sum(
        any(task.right(index, answer) for answer in final_answers(answered.said))
        for index, answered in enumerate(answers)
    )
    score = TaskScore(name=task.name, group=task.group, examples=len(answers), right=right)
    return {"tasks": (score,)}


def _recall(voice: Voice, asked: QuestionSet) -> dict[str, Any]:
    texts = [one.question for one in asked.questions]
    answers = voice.ask(texts, questions.SHOTS, TO_RECALL)
    return {"questions": questions.score(asked.questions, answers)}
