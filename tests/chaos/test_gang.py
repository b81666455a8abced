"""A small part of the family of real gangs; all of it runs in `make chaos`."""

from __future__ import annotations

import pytest

from chaos.figures import run_case
from chaos.gang_bench import GangBench
from chaos.gang_node import CASES, gang_families

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]
SEED = 5


def test_a_gang_that_is_asked_to_stop_twice_loses_nothing(gang_bench: GangBench) -> None:
    [family] = gang_families(gang_bench)
    [index] = [n for n, case in enumerate(CASES) if case.fault == "SIGTERM twice"]
    run = run_case(family, index, SEED)
    assert run.bad == [], run.bad
    assert run.commits > 2
    assert len(run.told["attempts"]) == 2
