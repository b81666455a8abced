"""Tasks whose answers can be checked, from the reasoning-gym library: the same for everybody."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal, NamedTuple

from kubedistill_api.evaluation import DEFAULT_TASKS, SIMPLE_TASKS
from kubedistill_api.runspec import Problem

from kubedistill_trainer.failures import InputsRefused
from kubedistill_trainer.imports import quiet_collector

Group = Literal["simple", "multiStep"]
SEED = 7
"""Of the examples: a part of what a figure means, so no setting."""
SHOTS = 2
"""Solved examples before each one that is asked, where a model is not talked to by a template."""
_EASIER: dict[str, dict[str, Any]] = {
    "basic_arithmetic": {
        "min_terms": 2, "max_terms": 2, "max_digits": 2, "allow_parentheses": False,
        "allow_negation": False, "operators": ["+", "-", "*"],
    },
    "chain_sum": {"min_terms": 2, "max_terms": 3, "max_digits": 2},
}  # fmt: skip
"""Settings of the library's, where its own would make a simple task a long one."""
_UNUSED = {"pycosat": ("zebra_puzzles",), "cellpylib": ("game_of_life", "game_of_life_halting")}
"""Modules that the library imports for these tasks alone, and that are not installed (pyproject)."""
_NOT_OFFERED = frozenset({"composite"}.union(*_UNUSED.values()))
_ALL_OF_IT = 0.999
_NEAR = 3


class Solved(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Task:
    """Examples of one kind: `shots` that are shown solved, and `questions` that are asked."""

    name: str
    group: Group
    shots: tuple[Solved, ...]
    questions: tuple[str, ...]
    _dataset: Any = field(repr=False)
    _entries: tuple[dict[str, Any], ...] = field(repr=False)

    def right(self, index: int, answer: str) -> bool:
        """Whether the library gives `answer` to the `index`-th question its whole score."""
        try:
            score = self._dataset.score_answer(answer, self._entries[index])
        except Exception:  # some of its tasks parse an answer, and fail on what does not parse
            return False
        return float(score) >= _ALL_OF_IT


def load_task(name: str, examples: int) -> Task:
    """`examples` of a task that the library has (see `check_tasks`)."""
    dataset = _library().create_dataset(
        name, seed=SEED, size=examples + SHOTS, **_EASIER.get(name, {})
    )
    entries = [dataset[index] for index in range(examples + SHOTS)]
    return Task(
        name=name,
        group=group_of(name),
        shots=tuple(Solved(e["question"].strip(), str(e["answer"])) for e in entries[:SHOTS]),
        questions=tuple(e["question"].strip() for e in entries[SHOTS:]),
        _dataset=dataset,
        _entries=tuple(entries[SHOTS:]),
    )


def group_of(name: str) -> Group:
    """The group that a task's accuracy counts in."""
    return "simple" if name in SIMPLE_TASKS else "multiStep"


def check_tasks(names: Sequence[str], examples: int, field: str) -> None:
    """InputsRefused for names that the library does not have, with those that are near, and for
    tasks of which it cannot make so many examples."""
    if set(names) <= set(DEFAULT_TASKS):
        return  # known without the seconds that an import takes
    known = known_tasks()
    problems = []
    for index, name in enumerate(names):
        where = f"{field}[{index}]"
        if name not in known:
            problems.append(Problem(field=where, found=repr(name), expected=_instead(name, known)))
        elif (fault := _fault(name, examples)) is not None:
            problems.append(Problem(field=where, found=fault, expected="take another task"))
    if problems:
        raise InputsRefused(problems)


def _fault(name: str, examples: int) -> str | None:
    """Why a task cannot be made, if it cannot."""
    try:
        load_task(name, examples)
    except Exception as error:  # each task of the library fails in its own way
        return f"{name}, which fails with {type(error).__name__}: {error}"
    return None


def known_tasks() -> tuple[str, ...]:
    """Names of all tasks, in order."""
    _library()
    from reasoning_gym.factory import DATASETS

    return tuple(sorted(set(DATASETS) - _NOT_OFFERED))


def _instead(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, _NEAR) or [n for n in known if name in n][:_NEAR]
    if near:
        return f"a task of reasoning-gym, such as {', '.join(near)}"
    return f"a task of reasoning-gym: {', '.join(known)}"


def _library() -> Any:
    for module in _UNUSED:
        if module not in sys.modules and find_spec(module) is None:
            sys.modules[module] = ModuleType(module)
    with quiet_collector():
        import reasoning_gym
    return reasoning_gym
