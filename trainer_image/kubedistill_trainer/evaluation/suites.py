"""Tasks of lm-eval by name, where the extra `lm-eval` is installed."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kubedistill_api.runspec import Problem

from kubedistill_trainer.failures import InputsRefused, refuse

FIELD = "spec.evaluation.lmEval"
OWN_TASKS = "KUBEDISTILL_LM_EVAL_TASKS"
"""Environment variable with a folder of task files of one's own."""
_BATCH = 8


def check_suites(names: Sequence[str]) -> None:
    """InputsRefused where lm-eval is not installed, and for tasks that it does not have."""
    if not names:
        return
    if find_spec("lm_eval") is None:
        raise refuse(
            FIELD,
            f"{', '.join(names)}, and no lm-eval in the trainer's image",
            "build it with `--build-arg TRAINER_EXTRAS=lm-eval` (kubedistill[lm-eval]), or leave "
            "lmEval out",
        )
    known = _manager().all_tasks
    problems = [
        Problem(field=f"{FIELD}[{index}]", found=repr(name), expected=_instead(name, known))
        for index, name in enumerate(names)
        if name not in known
    ]
    if problems:
        raise InputsRefused(problems)


def run_suites(names: Sequence[str], folder: Path, device: str) -> dict[str, dict[str, float]]:
    """The metrics of each task, of the model in a local Hugging Face folder."""
    import lm_eval

    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "trust_remote_code": False},
        tasks=list(names),
        device=device,
        batch_size=_BATCH,
        log_samples=False,
        bootstrap_iters=0,
        task_manager=_manager(),
    )
    return {
        task: {
            # `acc,none`: a metric and the filter that the answers went through.
            key.removesuffix(",none"): round(float(value), 6)
            for key, value in values.items()
            if isinstance(value, int | float)
            and math.isfinite(value)
            and "_stderr" not in key
            and "," in key
        }
        for task, values in found["results"].items()
    }


def _instead(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, 3)
    return f"a task of lm-eval, such as {', '.join(near)}" if near else "a task of lm-eval"


def _manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=os.environ.get(OWN_TASKS))
