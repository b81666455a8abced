"""What happens to a finished training when its student cannot be asked."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import data_kit
import pytest
import torch
from kubedistill_trainer.evaluation.measure import Plan
from kubedistill_trainer.report import compare


class TooLarge:
    """A model that no device has room for."""

    def to(self, device: str) -> TooLarge:
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_student_that_does_not_fit_beside_its_training_state_costs_no_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compare, "load_model", lambda *arguments: TooLarge())
    dataset = SimpleNamespace(tokenizer=data_kit.tokenizer())
    plan = Plan((), None, 16, latency=True, problems={"gcd": "it is gone"})
    found = compare._student(
        dataset,
        Path(),
        torch.float32,
        plan,
        "cuda",
        lambda: None,  # type: ignore[arg-type]
    )
    assert found.figures() == {}
    assert found.problems["gcd"] == "it is gone"
    assert {"tasks", "questions", "performance"} < set(found.problems)
