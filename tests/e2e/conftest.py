"""One cluster and one operator for all tests with real training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from devcluster.fixtures import (  # noqa: F401
    cluster,
    devcluster,
    namespace,
    temporary_namespace,
)
from devcluster.handle import Handle
from devcluster.s3 import S3Access
from devcluster.zygote import Zygote
from operator_kit import Operator, install_role
from s3_fixture import running_server

from e2e.gang import put_inputs
from e2e.kit import Team, start_operator


@pytest.fixture(scope="package")
def account(cluster: Handle, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The kubeconfig of the operator's account; the CRDs are established, the text is in S3."""
    put_inputs(cluster.s3)
    return install_role(cluster, tmp_path_factory.mktemp("account"))


@pytest.fixture(scope="package")
def operator(account: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """The operator."""
    running = start_operator(account, tmp_path_factory.mktemp("operator") / "log")
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="package")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """What containers without a cluster are forked from."""
    with Zygote("trainer", tmp_path_factory.mktemp("warm") / "log") as zygote:
        yield zygote


@pytest.fixture(scope="module")
def team(
    cluster: Handle,  # noqa: F811
    operator: Operator,
    request: pytest.FixtureRequest,
) -> Iterator[Team]:
    """A namespace for a module's jobs."""
    name = str(request.module.__name__).rsplit(".", 1)[-1].replace("_", "-")
    with temporary_namespace(cluster, name) as space:
        yield Team(cluster, space)


@pytest.fixture(scope="module")
def access() -> S3Access:
    """A store with the inputs in it, for containers without a cluster."""
    server = running_server()
    found = S3Access(server.endpoint, server.access_key, server.secret_key, server.bucket)
    put_inputs(found)
    return found
