"""The contract: generated files do not drift, every reason is documented, messages fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from kubedistill_api import crd, names, reasons, reference
from kubedistill_api.chain import DistillationChainSpec
from kubedistill_api.exit_codes import POLICIES, ExitCode, policy
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.metrics import METRICS
from kubedistill_api.runspec import (
    TERMINATION_MESSAGE_BYTES,
    Outcome,
    Problem,
    ProgressReport,
)
from kubedistill_api.schema import partial_job_spec, structural
from kubedistill_api.status import (
    CheckpointStatus,
    DistillationJobStatus,
    Metric,
    ModelStatus,
    PayloadProbe,
    TeacherStreamStatus,
)

ROOT = Path(__file__).resolve().parents[2]


def minimal_spec() -> dict[str, object]:
    return {
        "distill": {},
        "teacher": {"model": {"uri": "s3://models/large"}},
        "student": {"fromTeacher": {"layers": 2}},
        "data": {"sources": [{"uri": "s3://data/text.jsonl"}]},
        "storage": {"uri": "s3://runs/x"},
    }


@pytest.mark.parametrize("name", crd.rendered())
def test_crds_do_not_drift(name: str) -> None:
    assert (ROOT / "crds" / name).read_text() == crd.rendered()[name], "run `make crds`"


def test_the_page_of_reasons_does_not_drift() -> None:
    assert (ROOT / "docs" / "reasons.md").read_text() == reference.reasons_page()


def test_every_reason_says_what_to_do() -> None:
    values = {
        value
        for key, value in vars(reasons).items()
        if key.isupper() and isinstance(value, str) and not key.startswith("_")
    }
    conditions = set(reasons.CONDITION_TYPES)
    assert values - conditions - {reasons.IS_SUSPENDED} <= set(reasons.WHAT_TO_DO)


def test_every_exit_code_has_a_policy_with_a_documented_reason() -> None:
    assert set(POLICIES) == set(ExitCode)
    assert {p.reason for p in POLICIES.values()} <= set(reasons.WHAT_TO_DO)


@pytest.mark.parametrize("code", [None, 2, 137, 143, 255])
def test_foreign_exit_codes_are_charged(code: int | None) -> None:
    assert policy(code) == POLICIES[ExitCode.UNKNOWN]


def _nodes(schema: dict, path: str = "$") -> list[tuple[str, dict]]:  # type: ignore[type-arg]
    found = [(path, schema)]
    for name, child in (schema.get("properties") or {}).items():
        found += _nodes(child, f"{path}.{name}")
    if "items" in schema:
        found += _nodes(schema["items"], f"{path}[]")
    return found


@pytest.mark.parametrize("model", [DistillationJobSpec, DistillationChainSpec])
def test_the_schema_is_structural_and_bounded(model: type) -> None:
    for path, node in _nodes(structural(model)):
        marks = ("type", "x-kubernetes-preserve-unknown-fields", "x-kubernetes-int-or-string")
        assert any(node.get(mark) for mark in marks), path
        assert "$ref" not in node and "anyOf" not in node, path
        if node.get("type") == "array":
            assert "maxItems" in node, path
        if node.get("type") == "string" and "enum" not in node:
            assert "maxLength" in node, path
        if path != "$":
            assert node.get("description"), f"{path} is not described"


def test_a_part_of_a_spec_requires_and_defaults_nothing() -> None:
    for path, node in _nodes(partial_job_spec()):
        assert not {"required", "default", "x-kubernetes-validations"} & set(node), path


def test_a_stage_takes_any_part_of_a_job_but_suspend() -> None:
    stage = structural(DistillationChainSpec)["properties"]["stages"]["items"]
    assert set(DistillationJobSpec(**minimal_spec()).to_wire()) - {"suspend"} <= set(
        stage["properties"]
    )
    assert "suspend" not in stage["properties"]


def test_the_smallest_job_is_complete() -> None:
    spec = DistillationJobSpec.model_validate(minimal_spec())
    assert spec.distill is not None
    assert spec.distill.objective.temperature == 1
    assert spec.training.deep_speed.zero_stage == 1


def test_a_long_outcome_fits_the_termination_message() -> None:
    problem = Problem(field="spec.data" * 200, found="ü" * 3000, expected="x" * 3000)
    text = Outcome(
        reason="InvalidSpec", message="m" * 9000, problems=[problem] * 9
    ).to_termination_message()
    assert len(text.encode()) <= TERMINATION_MESSAGE_BYTES
    back = Outcome.model_validate_json(text)
    assert back.problems and back.problems[0].field.startswith("spec.data")


def test_a_long_table_of_payloads_keeps_the_rows_that_decide() -> None:
    rows = [
        PayloadProbe(payload=f"Sparse, K={k}", temperature=t, bytes_per_token=123.456789,
                     kept_mass=0.987654321, gradient_error=t / 123, angle_degrees=1.23456789)
        for k in (32, 64, 100, 256) for t in range(1, 17)
    ]  # fmt: skip
    stream = TeacherStreamStatus(uri="s3://runs/x" * 20, digest="d" * 64, probe=rows)
    progress = ProgressReport(teacher_stream=stream)
    text = Outcome(reason="Completed", progress=progress).to_termination_message()
    assert len(text.encode()) <= TERMINATION_MESSAGE_BYTES
    back = Outcome.model_validate_json(text)
    assert back.progress is not None and back.progress.teacher_stream is not None
    assert [row.temperature for row in back.progress.teacher_stream.probe] == [16] * 4


def test_derived_names_stay_host_names() -> None:
    longest = "a" * names.MAX_JOB_NAME_LENGTH
    attempt = names.attempt_name(longest, 9999)
    assert len(f"{attempt}-1023") <= 63
    assert len(names.preflight_name(longest, "f" * 64)) <= 63
    assert len(names.teacher_name(longest) + "-255") <= 63
    assert len(names.report_name(longest)) <= 63


@pytest.mark.parametrize(
    ("temperature", "name"),
    [(2, "c-m-t2"), (2.0, "c-m-t2"), (0.5, "c-m-t0-5"), (1e-5, "c-m-t1e-05"), (100, "c-m-t100")],
)
def test_trials_are_named_after_their_temperature(temperature: float, name: str) -> None:
    assert names.trial_job_name("c", "m", temperature) == name


def test_attempts_meet_at_different_ports() -> None:
    ports = {names.rendezvous_port("uid", attempt) for attempt in range(1, 50)}
    assert len(ports) > 40 and all(1024 < port < 32768 for port in ports)


def test_all_figures_fit_the_status_and_the_termination_message() -> None:
    metrics = [Metric(name=name, value=-12345.678901) for name in METRICS]
    limit = structural(DistillationJobStatus)["properties"]["metrics"]["maxItems"]
    assert len(metrics) <= limit
    outcome = Outcome(
        reason="Completed",
        message="model exported",
        progress=ProgressReport(
            phase="Done",
            step=9_999_999,
            checkpoint=CheckpointStatus(uri="s3://b/" + "c" * 200, digest="d" * 64),
            teacher_stream=TeacherStreamStatus(uri="s3://b/" + "t" * 200, digest="e" * 64),
        ),
        model=ModelStatus(uri="s3://b/" + "m" * 300, digest="f" * 64, parameters=10**11),
        metrics=metrics,
    )
    text = outcome.to_termination_message()
    assert len(text.encode()) <= TERMINATION_MESSAGE_BYTES
    assert Outcome.model_validate_json(text) == outcome
