"""Containers of the trainer without an operator, for what an operator never lets happen."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from devcluster.s3 import S3Server
from devcluster.zygote import Zygote
from kubedistill_api.exit_codes import ExitCode

from e2e.gang import Trainer, llama, put_inputs

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory, warm: Zygote) -> Iterator[Trainer]:
    folder = tmp_path_factory.mktemp("gang")
    server = S3Server(folder / "s3")
    server.start()
    try:
        put_inputs(server.access)
        yield Trainer(folder, server.access, warm)
    finally:
        server.stop()


def test_a_newer_attempt_fences_an_older_one(trainer: Trainer) -> None:
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
