"""A control plane with the operator's role and the CRDs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from devcluster.fixtures import cluster, devcluster, namespace  # noqa: F401
from operator_kit import Bench, install_role


@pytest.fixture(scope="package")
def account(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The kubeconfig of the operator's account; the CRDs are established."""
    return install_role(cluster, tmp_path_factory.mktemp("account"))


@pytest.fixture
def bench(cluster: Any, namespace: str, account: Path) -> Bench:  # noqa: F811
    return Bench(cluster, namespace)
