"""The store takes back what it gave while a gang trains: the bucket goes, or the keys do.

Containers as processes, a real store. What the operator makes of it is in test_jobs_lost_store.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from devcluster.s3 import S3Access
from devcluster.zygote import Zygote
from kubedistill_api.exit_codes import ExitCode, policy
from kubedistill_api.names import run_uri

from e2e.gang import Result, Trainer, committed, llama, put_inputs
from e2e.team_keys import TeamKeys

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture
def bucket(access: S3Access) -> Iterator[S3Access]:
    """One of a team's own, which nobody makes again when it is gone."""
    own = replace(access, bucket="lost")
    client = access.client()
    client.create_bucket(Bucket=own.bucket)
    put_inputs(own)
    yield own
    if own.bucket in [found["Name"] for found in client.list_buckets()["Buckets"]]:
        client.delete_bucket(Bucket=own.bucket)


def struck(trainer: Trainer, access: S3Access, name: str, strike: Callable[[], object]) -> Result:
    """A gang of two that would train for hours, struck once something is committed."""
    spec = trainer.spec(
        fineTune={},
        student={"config": llama(48, 2)},
        training={"maxSteps": 100_000, "epochs": 1000},
        checkpoint={"interval": 5},
        storage={"secretRef": {"name": "team-keys"}},
    )
    run = run_uri(spec.storage.uri, "test", name, f"uid-{name}")

    def after_a_commit(pids: list[int]) -> None:
        committed(access, run, 2)
        strike()

    return trainer.run("student", spec, name=name, strike=after_a_commit)


def check(result: Result, *words: str) -> None:
    """All ranks end as for a store that may come back, and say what was borne before."""
    assert set(result.codes) == {ExitCode.STORAGE_UNAVAILABLE}, result.log
    rule = policy(ExitCode.STORAGE_UNAVAILABLE)
    assert (rule.retry, rule.charged) == (True, True)
    for outcome in result.outcomes:
        assert outcome.reason == "StorageUnavailable"
        assert [word for word in words if word not in outcome.message] == [], outcome.message
    progress = result.outcomes[0].progress
    assert progress is not None
    assert progress.checkpoint is not None, "the commits before are still told of"
    assert words[0] in progress.save_problem, "a first failed save is borne, and told"
    assert progress.step > progress.checkpoint.step, "training went on meanwhile"


def test_a_bucket_that_vanishes(bucket: S3Access, tmp_path: Path, warm: Zygote) -> None:
    client = bucket.client()
    trainer = Trainer(tmp_path, bucket, warm)
    result = struck(
        trainer, bucket, "no-bucket", lambda: client.delete_bucket(Bucket=bucket.bucket)
    )
    check(result, "bucket 'lost' does not exist", bucket.endpoint, "create it", "storage.uri")


def test_keys_that_are_revoked(bucket: S3Access, tmp_path: Path, warm: Zygote) -> None:
    keys = TeamKeys(bucket, "revoked")
    team = keys.access()
    result = struck(Trainer(tmp_path, team, warm), team, "no-keys", keys.revoke)
    check(result, "refuses these credentials", bucket.endpoint, "Secret 'team-keys'", "may ")
    said = [outcome.model_dump_json() for outcome in result.outcomes]
    for secret in (team.access_key, team.secret_key):
        assert not [text for text in (*said, result.log) if secret in text]
