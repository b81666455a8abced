"""Imports that leave out what takes long and is not used."""

from __future__ import annotations

import os

import pytest
import torch
from kubedistill_trainer.imports import uncompiled

VARIABLE = "TORCHDYNAMO_DISABLE"


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@pytest.mark.parametrize("before", [None, "0"])
def test_functions_stay_as_they_are_inside_the_block_alone(
    monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if before is not None:
        monkeypatch.setenv(VARIABLE, before)
    with uncompiled():
        assert torch.compile(double) is double
    assert torch.compile(double) is not double
    assert os.environ.get(VARIABLE) == before


def test_a_failure_inside_ends_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(ImportError), uncompiled():
        raise ImportError
    assert VARIABLE not in os.environ
