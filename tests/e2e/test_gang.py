"""Real gangs: two pods' worth of ranks, DeepSpeed, a teacher stream, commits, an exported model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from devcluster.s3 import S3Server
from kubedistill_api.exit_codes import ExitCode
from kubedistill_api.runspec import ResolvedModel

from e2e.gang import Trainer, figures, llama, model_of, put_inputs

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    folder = tmp_path_factory.mktemp("gang")
    server = S3Server(folder / "s3")
    server.start()
    try:
        put_inputs(server.access)
        yield Trainer(folder, server.access)
    finally:
        server.stop()


@pytest.fixture(scope="module")
def teacher(trainer: Trainer) -> ResolvedModel:
    """A model that a fineTune job on two nodes made."""
    spec = trainer.spec(fineTune={}, student={"config": llama(48, 2)})
    result = trainer.run("student", spec, name="teacher")
    assert result.codes == [0, 0], result.log
    assert figures(result)["perplexity"] > 1
    return model_of(result, "teacher")


def test_a_student_learns_from_a_stream_under_zero_3(
    trainer: Trainer, teacher: ResolvedModel
) -> None:
    spec = trainer.spec(
        distill={"objective": {"temperature": 2}},
        teacher={"fromJob": {"name": "teacher"}, "workers": {"gpusPerReplica": 0}},
        student={"config": llama(32, 1)},
        training={"deepSpeed": {"zeroStage": 3}},
    )
    checked = trainer.run("preflight", spec, name="streamed", teacher=teacher)
    assert checked.codes == [0], checked.log
    assert checked.outcomes[0].resolved is not None
    assert not checked.outcomes[0].resolved.stream_complete
    written = trainer.run("teacher", spec, name="streamed", teacher=teacher)
    assert written.codes == [0], written.log
    result = trainer.run("student", spec, name="streamed", teacher=teacher)
    assert result.codes == [0, 0], result.log
    found = figures(result)
    assert 0 <= found["teacherAgreement"] <= 1
    assert found["perplexityRatio"] == pytest.approx(
        found["perplexity"] / found["teacherPerplexity"], rel=1e-3
    )
    again = trainer.run("preflight", spec, name="streamed", attempt=2, teacher=teacher)
    assert again.outcomes[0].resolved is not None
    assert again.outcomes[0].resolved.stream_complete


def test_a_newer_attempt_fences_an_older_one(trainer: Trainer, teacher: ResolvedModel) -> None:
    spec = trainer.spec(
        fineTune={},
        student={"config": llama(16, 1)},
        training={"maxSteps": 2},
        workers={"nodes": 1},
    )
    newer = trainer.run("student", spec, name="fenced", attempt=2)
    assert newer.codes == [0], newer.log
    older = trainer.run("student", spec, name="fenced", attempt=1)
    assert older.codes == [int(ExitCode.FENCED)], older.log
    assert older.outcomes[0].reason == "Fenced"
