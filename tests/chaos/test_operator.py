"""A small part of the operator families, with seeds of its own; all of them run in `make chaos`."""

from __future__ import annotations

import re

import pytest

from chaos.api_proxy import Event, Seen
from chaos.figures import Run, run_case
from chaos.fuzz import fuzz_family
from chaos.operator_bench import OperatorBench, scenario
from chaos.operator_families import operator_families

pytestmark = pytest.mark.controlplane
SEED = 5


def case(bench: OperatorBench, name: str, index: int) -> Run:
    """One case of a family."""
    [family] = [family for family in operator_families(bench) if family.name == name]
    run = run_case(family, index, SEED)
    assert run.bad == [], run.bad
    return run


def test_killed_after_each_of_its_writes(operator_bench: OperatorBench) -> None:
    """Each operator makes one change and dies; the sum of them does what one does."""
    run = case(operator_bench, "operator-kill", 0)
    assert run.lives >= 20
    assert run.faults


def test_lies_of_watches_change_nothing(operator_bench: OperatorBench) -> None:
    assert case(operator_bench, "operator-watch", 3).faults


def test_a_preflight_runs_once_although_all_news_of_its_pod_are_lost(
    operator_bench: OperatorBench,
) -> None:
    """It decided by the pods that it had seen, and asked again after a quarter of a minute."""

    def lose(seen: Seen) -> Event:
        lost = seen.path.endswith("/pods") and re.match("one-p[0-9a-f]{6}-", seen.name)
        return Event.DROP if lost else Event.PASS

    with operator_bench.world("unseen", watch=lose) as world:
        # A new listing brings it too, so none comes.
        world.start(resync_seconds="600", watch_inactivity_seconds="600")
        world.apply(scenario(world.book)[0])
        world.until(lambda: world.reasons() == {"one": "Completed"})
        assert any(fate == Event.DROP for _, fate in operator_bench.proxy.events)
        assert world.watched.broken == []


def test_every_object_gets_a_verdict(operator_bench: OperatorBench) -> None:
    run = run_case(fuzz_family(operator_bench, 24), 0, SEED)
    assert run.bad == [], run.bad
    assert run.told["accepted"] >= 3, run.told
    assert run.told["refused"] >= 3, run.told
