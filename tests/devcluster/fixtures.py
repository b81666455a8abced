"""Pytest fixtures: `from devcluster.fixtures import *` in a folder's conftest.py."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from devcluster.cluster import DevCluster
from devcluster.handle import Handle
from devcluster.node.api import ApiError

__all__ = ["cluster", "devcluster", "namespace"]


OWN_CLUSTER = "KUBECONFIG_E2E"
"""Names a kubeconfig: tests then use that cluster. It must reach the pods' addresses from here."""


# Not of the session: a cluster that is done with would take its share of the machine to the end.
@pytest.fixture(scope="package")
def devcluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevCluster]:
    """One cluster for a folder's tests, started when first asked for. Has the parts to break."""
    if os.environ.get(OWN_CLUSTER):
        pytest.skip(f"breaks parts of a cluster, so not on the one that {OWN_CLUSTER} names")
    cluster = DevCluster(tmp_path_factory.mktemp("cluster"), warm=True)
    with cluster:
        yield cluster


@pytest.fixture(scope="package")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Handle:
    """To use it: kubectl, helm, API, S3, faults, logs."""
    own = os.environ.get(OWN_CLUSTER)
    if own:
        return Handle.own(Path(own), os.environ, tmp_path_factory.mktemp("own"))
    started: DevCluster = request.getfixturevalue("devcluster")
    return started.handle


@pytest.fixture
def namespace(cluster: Handle) -> Iterator[str]:
    """The name of a fresh namespace that pods can be made in; removed afterwards, not awaited."""
    with temporary_namespace(cluster, "test") as name:
        yield name
        if cluster.has_node:
            cluster.faults.come_back()


@contextlib.contextmanager
def temporary_namespace(cluster: Handle, prefix: str) -> Iterator[str]:
    """A name that no earlier run has left behind, on a cluster of one's own too."""
    name = f"{prefix}-{secrets.token_hex(3)}"
    meta = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
    cluster.api.post("/api/v1/namespaces", meta)
    cluster.wait("the default service account", lambda: _has_account(cluster, name))
    try:
        yield name
    finally:
        with contextlib.suppress(ApiError):
            cluster.api.delete(f"/api/v1/namespaces/{name}", {})


def _has_account(cluster: Handle, namespace: str) -> bool:
    """Without it, the API server refuses pods; the root certificate comes a moment later."""
    base = f"/api/v1/namespaces/{namespace}"
    try:
        cluster.api.get(f"{base}/serviceaccounts/default")
        cluster.api.get(f"{base}/configmaps/kube-root-ca.crt")
    except ApiError:
        return False
    return True
