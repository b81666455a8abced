"""The benches: one of each a process, started when it is first asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from chaos.gang_bench import GangBench
from chaos.operator_bench import OperatorBench
from chaos.store_bench import StoreBench


@pytest.fixture(scope="module")
def store_bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreBench]:
    with StoreBench(tmp_path_factory.mktemp("store")) as bench:
        yield bench


@pytest.fixture(scope="module")
def gang_bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GangBench]:
    folder = tmp_path_factory.mktemp("gang")
    tmp_path_factory.getbasetemp().chmod(0o755)
    with GangBench(folder, nodes=1) as bench:
        yield bench


@pytest.fixture(scope="module")
def operator_bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorBench]:
    # Pods run as another user, and have the book below it.
    folder = tmp_path_factory.mktemp("operator")
    tmp_path_factory.getbasetemp().chmod(0o755)
    with OperatorBench(folder) as bench:
        yield bench
