"""A small part of the operator families, with seeds of its own; all of them run in `make chaos`."""

from __future__ import annotations

import re

import pytest
from operator_kit import job

from chaos.api_proxy import Event, Seen
from chaos.faults import PASS, Call, Entry, Fault, Kind
from chaos.figures import Run, run_case
from chaos.fuzz import fuzz_family
from chaos.node_strikes import DISRUPTED, STRIKES, STUDENT, Strike
from chaos.operator_bench import OperatorBench, scenario
from chaos.operator_clock import CLOCKS, clock_families
from chaos.operator_families import operator_families
from chaos.operator_node import node_families
from chaos.operator_state import GROUP

pytestmark = pytest.mark.controlplane
SEED = 5


def case(bench: OperatorBench, name: str, index: int) -> Run:
    """One case of a family."""
    families = [*operator_families(bench), *clock_families(bench), *node_families(bench)]
    [family] = [family for family in families if family.name == name]
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


def test_a_pod_that_its_node_presses_out_and_one_of_the_next_attempt(
    operator_bench: OperatorBench,
) -> None:
    """Two attempts, each told to have ended by what ended it."""
    pressed_out = STRIKES.index(Strike("pressed out", STUDENT, DISRUPTED))
    run = case(operator_bench, "operator-node", len(STRIKES) + pressed_out)
    assert len(run.faults) == 2, run.told


def lose_preflights_pod(seen: Seen) -> Event:
    """No news of a preflight's pod come through."""
    lost = seen.path.endswith("/pods") and re.match("one-p[0-9a-f]{6}-", seen.name)
    return Event.DROP if lost else Event.PASS


def test_a_preflight_runs_once_although_all_news_of_its_pod_are_lost(
    operator_bench: OperatorBench,
) -> None:
    """It decided by the pods that it had seen, and asked again after a quarter of a minute."""

    with operator_bench.world("unseen", watch=lose_preflights_pod) as world:
        # A new listing brings it too, so none comes.
        world.start(resync_seconds="600", watch_inactivity_seconds="600")
        world.apply(scenario(world.book)[0])
        world.until(lambda: world.reasons() == {"one": "Completed"})
        assert any(fate == Event.DROP for _, fate in operator_bench.proxy.events)
        assert world.watched.made_too_often(lambda name: 1) == []


def test_a_look_that_failed_is_taken_again_before_it_is_decided_without_it(
    operator_bench: OperatorBench,
) -> None:
    """A finished preflight was run again when the question for its pods had met an error."""

    failed = 0

    def fail(call: Call) -> Fault:
        nonlocal failed
        # Of one Job's pods, by the Job's name.
        if "/pods" in call.path and "job-name" in call.target and failed < 2:
            failed += 1
            return Fault(Kind.ANSWER, 503)
        return PASS

    with operator_bench.world("failed", fail, watch=lose_preflights_pod) as world:
        world.start(resync_seconds="600", watch_inactivity_seconds="600")
        world.apply(scenario(world.book)[0])
        world.until(lambda: world.reasons() == {"one": "Completed"})
        assert failed == 2
        assert world.watched.made_too_often(lambda name: 1) == []


def test_an_object_that_is_deleted_in_the_middle_of_a_pass_is_no_error(
    operator_bench: OperatorBench,
) -> None:
    """It was a traceback in the log: the status is written over what is there no more."""
    met: list[Call] = []

    def hold(call: Call) -> Fault:
        if call.path.endswith("/distillationjobs/one/status") and not met:
            met.append(call)
            return Fault(Kind.DELAY, seconds=1.5)
        return PASS

    with operator_bench.world("deleted", hold) as world:
        world.start()
        world.apply(scenario(world.book)[0])
        world.until(lambda: met)
        operator_bench.handle.api.delete(
            f"{GROUP}/namespaces/{world.namespace}/distillationjobs/one", {}
        )
        # What comes after it is looked at by the same operator.
        world.apply(job("next", suspend=True))
        world.until(lambda: world.reasons() == {"next": "Suspended"})
        world.until(lambda: entry(operator_bench, met[0]).status == 404)
        assert world.troubles() == []


def entry(bench: OperatorBench, call: Call) -> Entry:
    """What became of a call."""
    return next(entry for entry in bench.proxy.log if entry.call == call)


def test_every_object_gets_a_verdict(operator_bench: OperatorBench) -> None:
    run = run_case(fuzz_family(operator_bench, 24), 0, SEED)
    assert run.bad == [], run.bad
    assert run.told["accepted"] >= 3, run.told
    assert run.told["refused"] >= 3, run.told
    assert run.told["edited and repaired"] >= 24 / 3, run.told


def test_answers_at_its_beginning_that_are_of_no_use_do_not_end_the_operator(
    operator_bench: OperatorBench,
) -> None:
    """It ended with what its first listing met, and with what kopf met that asked what there is."""
    faults = [Fault(Kind.ANSWER, 410), Fault(Kind.TRUNCATE), Fault(Kind.ANSWER, 500)]
    left = {"/api": list(faults), "/apis/batch/v1": list(faults), "first listing": list(faults)}

    def once(call: Call) -> Fault:
        # The first listing is in chunks; kopf's are not.
        part = "first listing" if "limit=500" in call.target else call.path
        return left[part].pop() if left.get(part) else PASS

    with operator_bench.world("begins", once) as world:
        world.start()
        world.apply(scenario(world.book)[0])
        world.until(lambda: world.reasons() == {"one": "Completed"})
        assert not any(left.values())
        assert [life.code for life in world.lives] == [None]


def test_deadlines_and_waits_do_not_go_by_the_operators_own_clock(
    operator_bench: OperatorBench,
) -> None:
    """An operator an hour ahead failed a job by its deadline, and had two attempts run at once."""
    run = case(operator_bench, "operator-clock", CLOCKS.index((0.0, 3600.0)))
    assert run.lives == 3
