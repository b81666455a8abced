"""Tasks of reasoning-gym: the same in every process, checked by the library, refused by name."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest
from kubedistill_api.evaluation import DEFAULT_TASKS
from kubedistill_trainer.evaluation import gym
from kubedistill_trainer.evaluation.gym import (
    SHOTS,
    check_tasks,
    group_of,
    known_tasks,
    load_task,
)
from kubedistill_trainer.failures import InputsRefused


@pytest.mark.parametrize("name", DEFAULT_TASKS)
def test_only_the_right_answer_is_right(name: str) -> None:
    task = load_task(name, 6)
    assert (task.name, len(task.questions), len(task.shots)) == (name, 6, SHOTS)
    answers = [entry["answer"] for entry in task._entries]
    for index, answer in enumerate(answers):
        assert task.right(index, answer)
        assert not task.right(index, "")
        assert not task.right(index, f"{answer}7")
        others = {other for other in answers if other != answer}
        assert not any(task.right(index, other) for other in others)
    assert not {shot.question for shot in task.shots} & set(task.questions)


def test_a_part_of_the_score_is_no_right_answer() -> None:
    task = load_task("basic_arithmetic", 1)
    answer = task._entries[0]["answer"]
    said = f"perhaps {answer}"
    assert 0 < task._dataset.score_answer(said, task._entries[0]) < 1
    assert not task.right(0, said)


def test_an_answer_that_the_library_cannot_parse_is_wrong() -> None:
    task = load_task("simple_equations", 1)

    class Strict:
        def score_answer(self, answer: str, entry: object) -> float:
            return float(answer)

    object.__setattr__(task, "_dataset", Strict())
    assert task.right(0, "1") and not task.right(0, "one")


def test_examples_are_the_same_in_every_process() -> None:
    """The teacher's pod and the student's make them apart."""
    script = (
        "import hashlib, json\n"
        "from kubedistill_api.evaluation import DEFAULT_TASKS\n"
        "from kubedistill_trainer.evaluation.gym import load_task\n"
        "made = [[t.questions, t.shots] for t in (load_task(n, 5) for n in DEFAULT_TASKS)]\n"
        "print(hashlib.sha256(json.dumps(made).encode()).hexdigest())\n"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    made = [[t.questions, t.shots] for t in (load_task(name, 5) for name in DEFAULT_TASKS)]
    assert found == {hashlib.sha256(json.dumps(made).encode()).hexdigest()}


def test_fewer_examples_are_the_first_of_more() -> None:
    assert load_task("chain_sum", 9).questions[:4] == load_task("chain_sum", 4).questions


@pytest.mark.parametrize(
    ("name", "group"),
    [("chain_sum", "simple"), ("gsm_symbolic", "multiStep"), ("sudoku", "multiStep")],
)
def test_groups(name: str, group: str) -> None:
    assert group_of(name) == group


def test_an_unknown_task_is_refused_with_what_is_near() -> None:
    with pytest.raises(InputsRefused) as refused:
        check_tasks(["chain_sum", "gsm_symbolik", "zzzz"], 4, "spec.evaluation.tasks")
    near, nothing_near = refused.value.problems
    assert (near.field, near.found) == ("spec.evaluation.tasks[1]", "'gsm_symbolik'")
    assert "such as gsm_symbolic" in near.expected
    assert nothing_near.field == "spec.evaluation.tasks[2]" and "sudoku" in nothing_near.expected


@pytest.mark.parametrize("name", ["composite", "zebra_puzzles", "game_of_life"])
def test_what_the_image_cannot_make_is_not_offered(name: str) -> None:
    assert name not in known_tasks()
    with pytest.raises(InputsRefused):
        check_tasks([name], 4, "spec.evaluation.tasks")


def test_a_task_that_the_library_fails_to_make_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str, examples: int) -> None:
        raise RuntimeError(f"no {examples}")

    monkeypatch.setattr(gym, "load_task", fails)
    with pytest.raises(InputsRefused, match=r"tasks\[0\]: found gcd, which .* RuntimeError: no 4"):
        check_tasks(["gcd"], 4, "spec.evaluation.tasks")


def test_tasks_that_the_library_has_pass() -> None:
    check_tasks(["spell_backward", "sudoku", *DEFAULT_TASKS], 4, "spec.evaluation.tasks")
    assert len(load_task("sudoku", 1).questions) == 1
