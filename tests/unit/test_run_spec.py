"""The run spec that a container reads is the one that its pod was made for."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kubedistill_api import names
from kubedistill_api.exit_codes import ExitCode
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.runspec import Outcome, RunSpec
from kubedistill_trainer import outcome
from kubedistill_trainer.context import read_run_spec
from kubedistill_trainer.failures import RunFailure
from test_plan_kit import UID, spec

RUN = RunSpec(
    namespace="ml",
    name="small",
    uid=UID,
    role="student",
    spec=DistillationJobSpec.model_validate(spec()),
    inputs_digest="abc",
)


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    content = RUN.model_dump_json(by_alias=True, exclude_none=True, indent=1)
    (tmp_path / "run.json").write_text(content)
    monkeypatch.setenv("KUBEDISTILL_RUN_SPEC", str(tmp_path / "run.json"))
    monkeypatch.delenv(names.RUN_SPEC_DIGEST, raising=False)
    return content


def test_a_pod_without_the_variable_reads_what_is_there(text: str) -> None:
    """An operator of before made it, or nobody did."""
    assert read_run_spec() == RUN


def test_the_right_one_is_read(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(names.RUN_SPEC_DIGEST, hashlib.sha256(text.encode()).hexdigest())
    assert read_run_spec() == RUN


def test_another_one_is_refused_before_it_is_looked_at(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(names.RUN_SPEC_DIGEST, hashlib.sha256(text.encode()).hexdigest())
    for other in (text.replace("abc", "abd"), text + "\n", "{}"):
        (tmp_path / "run.json").write_text(other)
        with pytest.raises(
            RunFailure, match=r"not the run\.json that this pod was made for"
        ) as caught:
            read_run_spec()
        code, said = outcome.of_exception(caught.value)
        assert code == ExitCode.UNKNOWN
        assert "its ConfigMap was replaced" in said.message


@pytest.mark.parametrize("role", ["preflight", "teacher", "student", "report"])
def test_a_container_that_finds_another_one_says_so(text: str, tmp_path: Path, role: str) -> None:
    told = tmp_path / "termination-log"
    environment = os.environ | {
        names.RUN_SPEC_DIGEST: "0" * 64, "KUBEDISTILL_TERMINATION_MESSAGE": str(told),
    }  # fmt: skip
    command = [sys.executable, "-m", "kubedistill_trainer.launch", role]
    ended = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert ended.returncode == ExitCode.UNKNOWN
    said = Outcome.model_validate_json(told.read_text())
    assert (said.reason, said.message[:38]) == ("Error", "this is not the run.json that this pod")
