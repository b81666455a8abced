"""A run that goes on with fewer or more pods than it began with: the same samples, each once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from devcluster.s3 import S3Access
from kubedistill_api.exit_codes import ExitCode
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.names import run_uri
from s3_fixture import running_server
from safetensors.torch import load

from e2e.gang import Result, Trainer, llama, put_inputs

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def access() -> S3Access:
    server = running_server()
    found = S3Access(server.endpoint, server.access_key, server.secret_key, server.bucket)
    put_inputs(found)
    return found


def weights(access: S3Access, result: Result) -> dict[str, torch.Tensor]:
    """What a finished run exported."""
    model = result.outcomes[0].model
    assert model is not None, result.log
    bucket, _, prefix = model.uri.removeprefix("s3://").partition("/")
    body = access.client().get_object(Bucket=bucket, Key=f"{prefix}/model.safetensors")["Body"]
    return load(body.read())


def when_committed(access: S3Access, spec: DistillationJobSpec, name: str) -> Callable[[int], None]:
    """SIGTERM for the first pod once the log holds a commit."""
    uri = run_uri(spec.storage.uri, "test", name, f"uid-{name}")
    prefix = uri.removeprefix(f"s3://{access.bucket}/")
    client = access.client()

    def strike(pid: int) -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            listed: Any = client.list_objects_v2(Bucket=access.bucket, Prefix=f"{prefix}/log/")
            if listed["KeyCount"] > 1:  # FENCE, COMMIT
                break
            time.sleep(0.05)
        os.kill(pid, signal.SIGTERM)

    return strike


@pytest.mark.parametrize(("stage", "before", "after"), [(1, 2, 1), (3, 1, 2)])
def test_another_number_of_pods_goes_on_where_the_first_stopped(
    access: S3Access, tmp_path: Path, stage: int, before: int, after: int
) -> None:
    trainer = Trainer(tmp_path, access)
    parts: dict[str, Any] = {
        "fineTune": {},
        "student": {"config": llama(48, 2)},
        # Long enough to be struck on the way.
        "training": {"maxSteps": 400, "deepSpeed": {"zeroStage": stage}},
        "checkpoint": {"interval": 5},
    }
    spec = trainer.spec(**parts)
    name = f"elastic-{stage}"
    first = trainer.run(
        "student", spec, name=name, nodes=before, strike=when_committed(access, spec, name)
    )
    assert set(first.codes) == {ExitCode.GRACEFUL_CHECKPOINT}, first.log
    second = trainer.run("student", spec, name=name, attempt=2, nodes=after)
    assert set(second.codes) == {0}, second.log
    progress = second.outcomes[0].progress
    assert progress is not None
    assert (progress.resumed_from_step or 0) >= 5
    calm = trainer.run("student", spec, name=f"{name}-calm", nodes=before)
    assert set(calm.codes) == {0}, calm.log
    theirs = weights(access, calm)
    for key, tensor in weights(access, second).items():
        # Sums over other numbers of ranks round otherwise; a sample missed or taken twice shows.
        torch.testing.assert_close(tensor, theirs[key], rtol=0, atol=2e-3, msg=key)
