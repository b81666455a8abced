"""A cluster of the user's own, as the environment describes it."""

from __future__ import annotations

from pathlib import Path

import pytest
from devcluster.handle import Handle

ENVIRONMENT = {
    "AWS_ENDPOINT_URL": "http://s3.example:9000",
    "AWS_ACCESS_KEY_ID": "a",
    "AWS_SECRET_ACCESS_KEY": "b",
    "S3_BUCKET": "bucket",
}


@pytest.fixture
def kubeconfig(tmp_path: Path) -> Path:
    path = tmp_path / "config"
    path.touch()
    return path


def test_the_environment_names_the_store(kubeconfig: Path, tmp_path: Path) -> None:
    handle = Handle.own(kubeconfig, ENVIRONMENT, tmp_path)
    assert handle.kubeconfig == kubeconfig
    assert (handle.s3.endpoint, handle.s3.bucket) == ("http://s3.example:9000", "bucket")
    assert (handle.s3.access_key, handle.s3.secret_key) == ("a", "b")


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_what_is_missing_is_named(kubeconfig: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(RuntimeError, match=f"set {name}, so that"):
        Handle.own(kubeconfig, ENVIRONMENT | {name: ""}, tmp_path)


def test_a_kubeconfig_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no kubeconfig at .*/nowhere"):
        Handle.own(tmp_path / "nowhere", ENVIRONMENT, tmp_path)
