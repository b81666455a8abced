"""A control plane with the operator's role and the CRDs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from devcluster.fixtures import (  # noqa: F401
    cluster,
    devcluster,
    namespace,
    temporary_namespace,
)
from operator_kit import Bench, Operator, install_role


@pytest.fixture(scope="package")
def account(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The kubeconfig of the operator's account; the CRDs are established."""
    return install_role(cluster, tmp_path_factory.mktemp("account"))


@pytest.fixture
def bench(cluster: Any, namespace: str, account: Path) -> Bench:  # noqa: F811
    return Bench(cluster, namespace)


Beside = Callable[[Callable[[Bench, Any], None], Sequence[Any]], None]


@pytest.fixture
def beside(cluster: Any, account: Path) -> Beside:  # noqa: F811
    """Runs a test's cases beside each other, each in a namespace of its own: most of it is waiting."""

    def run(test: Callable[[Bench, Any], None], cases: Sequence[Any]) -> None:
        def one(case: Any) -> None:
            with temporary_namespace(cluster, "test") as name:
                test(Bench(cluster, name), case)

        with ThreadPoolExecutor(len(cases)) as pool:
            for case, future in [(case, pool.submit(one, case)) for case in cases]:
                try:
                    future.result()
                except BaseException as error:
                    error.add_note(f"case: {case}")
                    raise

    return run


@pytest.fixture(scope="module")
def operator(account: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """One operator for a file's tests."""
    running = Operator(
        account, tmp_path_factory.mktemp("operator") / "log", elastic_wait_seconds="4"
    )
    yield running
    assert running.stop() == 0


@pytest.fixture
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on the node that stands for S3: it outlives pods."""
    folder = tmp_path_factory.mktemp("book")
    folder.chmod(0o777)
    for parent in (folder.parent, folder.parent.parent):
        parent.chmod(0o755)
    return folder
