"""A gang for which there is no room goes on with fewer pods, where it may."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from kubedistill_api import names, reasons
from kubedistill_operator.plan.actions import CreateGang, DeleteBatchJob
from kubedistill_operator.plan.draft import Observed
from kubedistill_operator.plan.job import plan_job
from kubedistill_operator.plan.views import PodView
from test_plan_gang import FAILED, report
from test_plan_kit import (
    NOW,
    TIMING,
    after,
    ended,
    gang_job,
    message,
    observed,
    running,
    settled,
    spec,
    started,
    state,
)

WAIT = TIMING.elastic_wait


def pod(index: int, placed: bool, attempt: int = 1, seconds: float = 0) -> PodView:
    return PodView(
        f"p{index}",
        names.ROLE_STUDENT,
        attempt,
        index,
        phase="Running" if placed else "Pending",
        placed=placed,
        placed_at=NOW + timedelta(seconds=seconds),
        unschedulable="" if placed else "0/3 nodes are available: 3 Insufficient nvidia.com/gpu",
    )


def short(placed: int = 3, batch: int = 48, least: int | None = 2, **changes: Any) -> Observed:
    workers: dict[str, Any] = {"nodes": 4, "gpusPerNode": 2}
    if least:
        workers["minNodes"] = least
    online = {"model": {"uri": "s3://models/big"}, "delivery": "Online"}
    whole = spec(teacher=online, workers=workers, training={"globalBatchSize": batch})
    pods = tuple(pod(index, index < placed) for index in range(4))
    return started(spec=whole, pods=pods, **changes)


def at(seen: Observed, seconds: float) -> Observed:
    return replace(seen, now=NOW + timedelta(seconds=seconds))


def test_it_waits_before_it_takes_fewer() -> None:
    plan = settled(at(short(), WAIT - 1))
    assert state(plan) == ("Unknown", reasons.UNSCHEDULABLE)
    assert "Insufficient nvidia.com/gpu; it goes on with fewer pods after 2m" in message(plan)
    assert plan.actions == ()
    assert plan.requeue_after == 1
    assert plan.status.gpus == 8


@pytest.mark.parametrize(("placed", "nodes", "gpus"), [(3, 3, 6), (2, 2, 4), (0, 2, 4)])
def test_the_next_attempt_has_as_many_as_found_a_place(placed: int, nodes: int, gpus: int) -> None:
    late = at(short(placed), WAIT)
    plan = settled(late)
    assert plan.actions == (DeleteBatchJob("small-a1"),)
    assert plan.status.attempts[0].reason == reasons.UNSCHEDULABLE
    gone = after(late, batch_jobs={}, pods=(), deleted_batch_jobs=frozenset({"small-a1"}))
    plan = settled(gone)
    first, second = plan.status.attempts
    assert (first.charged, first.placed_nodes, second.nodes) == (False, placed, nodes)
    assert f"{placed} of 4 pods found a place within 2m: the next attempt has {nodes}" in (
        first.message
    )
    assert plan.actions == (CreateGang(2, 2),)
    assert (plan.status.failures, plan.status.gpus) == (0, gpus)


@pytest.mark.parametrize(("least", "nodes"), [(None, 0), (2, 3)])
def test_pods_that_waited_in_vain_for_others_are_no_failure(least: int | None, nodes: int) -> None:
    """Their launchers give up after a while: a job that only waits for room must not run out."""
    seen = short(3, least=least)
    gave_up = tuple(
        ended(f"p{index}", 17, index=index, placed=True, placed_at=NOW) for index in range(3)
    )
    gone = replace(pod(3, False), gone=True)
    plan = settled(replace(seen, batch_jobs=gang_job(**FAILED), pods=(*gave_up, gone)))
    first, second = plan.status.attempts
    assert (first.reason, first.charged, first.placed_nodes) == ("Unschedulable", False, 3)
    assert "pod p3 found no place while the others waited: 0/3 nodes" in first.message
    assert (plan.status.failures, second.nodes) == (0, nodes)


@pytest.mark.parametrize(("least", "nodes"), [(None, 0), (2, 3)])
def test_pods_that_waited_for_what_a_quota_forbids_are_no_failure(
    least: int | None, nodes: int
) -> None:
    """Three of four pods, again and again: a full cluster would be waited for just so."""
    seen = short(3, least=least)
    gave_up = tuple(
        ended(f"p{index}", 17, index=index, placed=True, placed_at=NOW) for index in range(3)
    )
    plan = settled(replace(seen, batch_jobs=gang_job(**FAILED), pods=gave_up))
    first, second = plan.status.attempts
    assert (first.reason, first.charged, first.placed_nodes) == ("Unschedulable", False, 3)
    assert "3 of 4 pods were made, and waited for the others in vain" in first.message
    assert "kubectl describe job small-a1" in first.message
    assert (plan.status.failures, second.nodes) == (0, nodes)


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        # It fails while its Job still makes pods: for a large gang that takes a while.
        (1, {}),
        # It had been whole: the pod that is missing was deleted while nobody looked.
        (17, {"last_step": 7}),
        (17, {"resumed_from_step": 0}),
    ],
)
def test_a_gang_that_is_not_whole_may_have_failed_all_the_same(
    code: int, changes: dict[str, Any]
) -> None:
    seen = short(3, least=None)
    attempts = [seen.status.attempts[0].model_copy(update=changes)]
    status = seen.status.model_copy(update={"attempts": attempts})
    pods = tuple(ended(f"p{index}", code, index=index, placed=True) for index in range(3))
    plan = settled(replace(seen, status=status, batch_jobs=gang_job(**FAILED), pods=pods))
    assert (plan.status.attempts[0].charged, plan.status.failures) == (True, 1)


def test_pods_that_a_quota_forbids_have_no_place_either() -> None:
    seen = short(3, batch_jobs=gang_job(created_at=NOW, active=3))
    seen = replace(seen, pods=seen.pods[:3])
    plan = settled(at(seen, 60))
    assert state(plan) == ("Unknown", reasons.POD_NOT_STARTING)
    assert "has made 3 of 4 pods" in message(plan)
    plan = settled(at(seen, WAIT))
    assert plan.actions == (DeleteBatchJob("small-a1"),)
    assert plan.status.attempts[0].placed_nodes == 3


def test_the_micro_batch_divides_the_larger_share() -> None:
    """40 sequences over 2 pods of 2 ranks are 10 a rank: 4 at once do not divide it, 2 do."""
    late = at(short(2, batch=40), WAIT)
    gone = after(late, batch_jobs={}, pods=(), deleted_batch_jobs=frozenset({"small-a1"}))
    second = settled(gone).status.attempts[-1]
    assert (second.nodes, second.micro_batch_size) == (2, 2)


def test_a_place_found_meanwhile_starts_the_wait_anew() -> None:
    seen = short(2)
    pods = (*seen.pods[:2], pod(2, True, seconds=100), seen.pods[3])
    plan = settled(at(replace(seen, pods=pods), WAIT + 1))
    assert plan.actions == ()
    assert plan.requeue_after == 99


def test_an_edit_of_its_own_gang_is_no_shortage() -> None:
    """A smaller gang whose Job has as many pods as it asked for is left alone."""
    seen = short(2)
    attempts = [seen.status.attempts[0].model_copy(update={"nodes": 2})]
    status = seen.status.model_copy(update={"attempts": attempts})
    jobs = gang_job(parallelism=2, completions=2)
    plan = settled(replace(seen, status=status, batch_jobs=jobs, pods=(running("p"),)))
    assert plan.actions == ()
    assert plan.status.gpus == 4


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (short(least=None), ""),
        (short(batch=64, least=3), "globalBatchSize 64 is no multiple of the ranks of 3 pods (2 a"),
    ],
)
def test_where_nothing_fits_it_waits_and_says_why(seen: Observed, words: str) -> None:
    plan = settled(at(seen, 10 * WAIT))
    assert plan.actions == ()
    assert state(plan) == ("Unknown", reasons.UNSCHEDULABLE)
    assert words in message(plan)


def test_the_least_waits_as_long_as_it_takes() -> None:
    seen = short(least=4)
    plan = settled(at(seen, 10 * WAIT))
    assert plan.actions == ()
    assert "4 pods are the fewest that workers.minNodes allows" in message(plan)


def test_a_smaller_gang_asks_for_all_again_only_after_a_while() -> None:
    late = at(short(), WAIT)
    gone = after(late, batch_jobs={}, pods=(), deleted_batch_jobs=frozenset({"small-a1"}))
    second = after(gone, batch_jobs=gang_job(2), pods=(running("p", attempt=2),))
    failed = after(
        second, batch_jobs=gang_job(2, **FAILED), pods=(ended("p", 1, attempt=2),)
    )  # fmt: skip
    soon = plan_job(after(failed, seconds=60), TIMING).status.attempts[-1]
    assert (soon.number, soon.nodes) == (3, 3)
    later = plan_job(after(failed, seconds=10 * WAIT), TIMING).status.attempts[-1]
    assert (later.number, later.nodes) == (3, 0)


def test_a_smaller_gang_says_how_many_of_its_pods_there_are() -> None:
    late = at(short(), WAIT)
    gone = after(late, batch_jobs={}, pods=(), deleted_batch_jobs=frozenset({"small-a1"}))
    pods = tuple(running(f"p{index}", index=index, attempt=2) for index in range(3))
    plan = settled(after(gone, batch_jobs=gang_job(2), pods=pods, rank0=report(attempt=2)))
    assert state(plan) == ("Unknown", reasons.TRAINING)
    assert message(plan) == "attempt 2 with 3 of 4 pods (workers.minNodes)"


def test_min_nodes_above_nodes_is_refused_with_its_path() -> None:
    plan = settled(observed(spec=spec(workers={"nodes": 2, "minNodes": 3})))
    assert state(plan) == ("False", reasons.INVALID_SPEC)
    assert message(plan) == "spec.workers.minNodes: found 3; at most workers.nodes, 2"


def test_a_running_gang_is_not_short_of_anything() -> None:
    seen = replace(short(), pods=(running("p0"), running("p1", index=1)), rank0=report())
    assert state(settled(at(seen, 30))) == ("Unknown", reasons.TRAINING)
