"""What was found of a model; of a teacher it is stored as JSON, too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict

from kubedistill_trainer.evaluation.gym import Group

Prompting = Literal["ChatTemplate", "Examples"]
GROUPS: tuple[Group, ...] = ("simple", "multiStep")
_METRIC = {"simple": "simpleAccuracy", "multiStep": "multiStepAccuracy"}


class _Found(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskScore(_Found):
    """Of one task: how many of its examples were asked, and how many were right."""

    name: str
    group: Group
    examples: int
    right: int

    @property
    def accuracy(self) -> float:
        return self.right / max(1, self.examples)


class Slip(_Found):
    """A question that was answered wrongly and with confidence."""

    question: str
    expected: str
    said: str
    confidence: float


class QuestionScore(_Found):
    """Of questions with known answers. `hallucinated`: wrong and confident (see `questions.py`);
    `confidence`: the mean; both None where the model's server does not say how sure it is;
    `slips`: some of the hallucinated ones."""

    asked: int
    right: int
    hallucinated: int | None
    confidence: float | None
    slips: tuple[Slip, ...] = ()

    @property
    def accuracy(self) -> float:
        return self.right / max(1, self.asked)

    @property
    def hallucination_rate(self) -> float | None:
        return None if self.hallucinated is None else self.hallucinated / max(1, self.asked)


class Pace(_Found):
    """Medians of a batch of prompts: seconds until each has its first token, and the tokens a
    second of all of them from there on."""

    batch: int
    first_token_seconds: float
    tokens_per_second: float


class Performance(_Found):
    """Time and memory, as measured on one machine.

    `working_bytes`: greatest use beside the weights while the largest batch was answered, by
    `memory`: what CUDA allocated, or by how much the process grew. Of a model that is split over
    devices: of all of them, each taken to need what the first one does. Nobody knows the memory of
    a model behind a server.
    """

    device: str
    prompt_tokens: int
    answer_tokens: int
    rounds: int
    paces: tuple[Pace, ...]
    weights_bytes: int | None = None
    working_bytes: int | None = None
    memory: Literal["CUDA allocations", "growth of the process", "unknown"] = "unknown"

    @property
    def memory_bytes(self) -> int | None:
        if self.weights_bytes is None or self.working_bytes is None:
            return None
        return self.weights_bytes + self.working_bytes


class Abilities(_Found):
    """All of one model. None: not asked for, or `problems` say by name why it is not there.

    `again`: whether a problem may pass (a server that is down, a limit that is reached), so that
    the next job asks again.
    """

    prompting: Prompting
    tasks: tuple[TaskScore, ...] = ()
    questions: QuestionScore | None = None
    performance: Performance | None = None
    problems: dict[str, str] = {}
    again: bool = False

    @classmethod
    def none(
        cls, prompting: Prompting, why: str, problems: Mapping[str, str] | None = None
    ) -> Abilities:
        """Of a model that could not be asked for anything."""
        parts = dict.fromkeys(("tasks", "questions", "performance"), why)
        return cls(prompting=prompting, problems={**(problems or {}), **parts})

    def with_more(self, found: Abilities) -> Abilities:
        """With what was found of other parts."""
        return self.model_copy(
            update={
                "tasks": (*self.tasks, *found.tasks),
                "questions": found.questions or self.questions,
                "performance": found.performance or self.performance,
                "problems": {**self.problems, **found.problems},
                "again": self.again or found.again,
            }
        )

    def without_problems(self) -> Abilities:
        """What is there, whatever is asked for next."""
        return self.model_copy(update={"problems": {}, "again": False})

    def figures(self, beside: Abilities | None = None) -> dict[str, float]:
        """By the names of `status.metrics`: of groups of tasks, and of the questions. `beside`: a
        student, with which nothing is compared that was not asked of both."""
        tasks = self.tasks if beside is None else beside.tasks
        found = {
            _METRIC[group]: accuracy
            for group in GROUPS
            if (accuracy := taught_accuracy_of(tasks, self.tasks, group)) is not None
        }
        if self.questions is not None:
            found["questionAccuracy"] = self.questions.accuracy
            if (rate := self.questions.hallucination_rate) is not None:
                found["hallucinationRate"] = rate
        return {name: round(value, 6) for name, value in found.items()}


def accuracy_of(tasks: Iterable[TaskScore], group: Group) -> float | None:
    """Share of right examples of a group's tasks; None where there are none."""
    mine = [task for task in tasks if task.group == group]
    examples = sum(task.examples for task in mine)
    return sum(task.right for task in mine) / examples if examples else None


def taught_accuracy_of(
    tasks: Iterable[TaskScore], teachers: Iterable[TaskScore], group: Group
) -> float | None:
    """The teacher's, beside the student's `tasks`; None where it was not asked all of the same."""
    names = {task.name for task in tasks if task.group == group}
    same = [task for task in teachers if task.name in names]
    return accuracy_of(same, group) if len(same) == len(names) else None
