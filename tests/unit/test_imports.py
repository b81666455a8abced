"""Imports that leave out what takes long and is not used, or come early where they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kubedistill_trainer.imports import import_as_told, uncompiled

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


def test_what_a_rank_imported_late_is_imported_by_its_launcher(tmp_path: Path) -> None:
    told = tmp_path / "imported-0"
    name = "transformers.models.gpt_neox.modeling_gpt_neox"
    code = (
        "import importlib, sys\n"
        "from pathlib import Path\n"
        "from kubedistill_trainer.imports import import_as_told, tell_late_imports\n"
        f"told, name = Path({str(told)!r}), {name!r}\n"
    )
    rank = "importlib.import_module(name)\ntell_late_imports(told)\n"
    subprocess.run([sys.executable, "-c", code + rank], check=True)
    assert name in told.read_text().split()
    launcher = "assert import_as_told(told)\nprint(name in sys.modules)\n"
    out = subprocess.run([sys.executable, "-c", code + launcher], check=True, capture_output=True)
    assert out.stdout.split() == [b"True"]


def test_only_the_librarys_modules_are_imported_on_a_ranks_word(tmp_path: Path) -> None:
    assert not import_as_told(tmp_path / "imported-0")
    told = tmp_path / "imported-1"
    told.write_text("antigravity\ntransformers.no_such_module\n")
    assert import_as_told(told)
    assert "antigravity" not in sys.modules
