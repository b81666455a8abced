"""How many pods an attempt has, and how many sequences its ranks take at once."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kubedistill_api import reasons
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.status import Attempt
from kubedistill_operator.plan import shape
from kubedistill_operator.plan.times import format_time
from test_plan_kit import NOW, spec

WAIT = 120.0


def parsed(
    batch: int = 48, micro: int = 4, nodes: int = 4, gpus: int = 1, least: int | None = 2
) -> DistillationJobSpec:
    workers: dict[str, Any] = {"nodes": nodes, "gpusPerNode": gpus}
    if least is not None:
        workers["minNodes"] = least
    training = {"globalBatchSize": batch, "microBatchSize": micro}
    return DistillationJobSpec.model_validate(spec(workers=workers, training=training))


@pytest.mark.parametrize(
    ("given", "present", "placed", "expected"),
    [
        ({}, 4, 3, 3),
        ({}, 4, 2, 2),
        ({}, 4, 0, 2),  # room for less than the least: the least is asked for
        ({}, 4, 4, 3),  # all had a place a moment ago: still fewer than there are
        ({}, 2, 1, None),  # the least already
        ({"least": None}, 4, 3, None),
        ({"least": 4}, 4, 3, None),
        ({"batch": 64, "least": 3}, 4, 3, None),  # 64 is no multiple of 3
        ({"batch": 64, "least": 2}, 4, 3, 2),
        ({"batch": 64, "nodes": 8, "gpus": 8, "least": 3}, 8, 7, 4),
        ({"batch": 64, "nodes": 8, "gpus": 8, "least": 5}, 8, 7, None),
        ({"batch": 7, "nodes": 7, "least": 1}, 7, 6, 1),
    ],
)
def test_fewer_nodes(
    given: dict[str, Any], present: int, placed: int, expected: int | None
) -> None:
    whole = parsed(**given)
    assert shape.fewer_nodes(whole, present, placed) == expected
    if expected is None:
        why = shape.why_not_fewer(whole, present, placed)
        assert bool(why) == (whole.workers.min_nodes is not None)


@given(
    nodes=st.integers(1, 16), gpus=st.integers(0, 8), factor=st.integers(1, 8),
    least=st.integers(1, 16), placed=st.integers(0, 16), micro=st.integers(1, 16),
)  # fmt: skip
def test_what_is_chosen_divides_the_batch(
    nodes: int, gpus: int, factor: int, least: int, placed: int, micro: int
) -> None:
    batch, least = nodes * max(1, gpus) * factor, min(least, nodes)
    whole = parsed(batch=batch, micro=micro, nodes=nodes, gpus=gpus, least=least)
    fewer = shape.fewer_nodes(whole, nodes, min(placed, nodes))
    chosen = fewer or nodes
    assert least <= chosen <= nodes
    if fewer is not None:
        assert chosen < nodes
        assert chosen <= max(placed, least)
    ranks = chosen * max(1, gpus)
    taken = shape.micro_batch(whole, chosen)
    assert batch % ranks == 0
    assert (batch // ranks) % taken == 0
    assert 1 <= taken <= micro
    smaller = shape.smaller_micro_batch(whole, Attempt(number=1, nodes=fewer or 0), 0)
    if taken == 1:
        assert smaller is None
    else:
        assert smaller is not None
        assert smaller <= taken / 2
        assert (batch // ranks) % smaller == 0


@pytest.mark.parametrize(
    ("batch", "micro", "nodes", "limit", "expected"),
    [
        (64, 4, 4, 0, 4),
        (64, 4, 4, 2, 2),
        (24, 4, 4, 0, 3),  # a share of 6
        (24, 4, 4, 2, 2),
        (20, 4, 4, 2, 1),  # a share of 5
        (64, 100, 4, 0, 16),
    ],
)
def test_micro_batches_divide_the_share(
    batch: int, micro: int, nodes: int, limit: int, expected: int
) -> None:
    assert shape.micro_batch(parsed(batch=batch, micro=micro), nodes, limit) == expected


@pytest.mark.parametrize(
    ("micro", "present", "expected"),
    [(4, 0, 2), (4, 2, 1), (4, 1, None), (1, 0, None), (5, 0, 2), (3, 0, 1), (12, 0, 6)],
)
def test_half_the_micro_batch_or_less(micro: int, present: int, expected: int | None) -> None:
    attempt = Attempt(number=1, micro_batch_size=present)
    assert shape.smaller_micro_batch(parsed(micro=micro), attempt, 0) == expected


def short(number: int, ago: float, nodes: int = 0, placed: int = 3) -> Attempt:
    end = format_time(NOW - timedelta(seconds=ago))
    return Attempt(
        number=number, nodes=nodes, placed_nodes=placed, end_time=end, reason=reasons.UNSCHEDULABLE
    )


def failed(number: int, nodes: int) -> Attempt:
    return Attempt(number=number, nodes=nodes, end_time=format_time(NOW), reason=reasons.ERROR)


@pytest.mark.parametrize(
    ("attempts", "expected"),
    [
        ([], 0),
        ([failed(1, 0)], 0),
        ([short(1, 0)], 3),
        ([short(1, 0, placed=1)], 2),
        ([short(1, 0), short(2, 0, nodes=3, placed=2)], 2),
        # Another end soon after: it does not ask for all again yet.
        ([short(1, WAIT * 10 - 1), failed(2, 3)], 3),
        ([short(1, WAIT * 10), failed(2, 3)], 0),
        ([short(1, 5000), failed(2, 3), short(3, 0)], 3),
        # The shortage is no longer among the last ten.
        ([failed(11, 3)], 0),
    ],
)
def test_how_many_nodes_the_next_attempt_has(attempts: list[Attempt], expected: int) -> None:
    assert shape.next_nodes(parsed(), attempts, NOW, WAIT) == expected
