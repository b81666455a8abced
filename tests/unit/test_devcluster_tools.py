"""kubectl and helm are fetched by whatever installer a person has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from devcluster import tools


def test_uv_run_tells_where_uv_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV", "/somewhere/uv")
    monkeypatch.setenv("PATH", os.devnull)
    assert tools._installer() == ["/somewhere/uv", "pip", "install"]


def test_without_uv_there_is_the_pip_of_the_base_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A virtual environment made by uv, as ours is, has no pip of its own."""
    monkeypatch.delenv("UV", raising=False)
    monkeypatch.setenv("PATH", os.devnull)
    command = tools._installer()
    assert command[0] != sys.executable
    done = subprocess.run(
        [*command, "--help"], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "--target" in done.stdout


def test_uv_of_the_path_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("UV", raising=False)
    program = tmp_path / "uv"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("uv") == str(program)
    assert tools._installer() == [str(program), "pip", "install"]
