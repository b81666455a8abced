"""When a gang counts as stalled: not by what another operator saw, and not for its node's sake."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from kubedistill_api import reasons
from kubedistill_operator.plan.draft import Contact, Observed, Unanswered
from kubedistill_operator.plan.job import plan_job
from test_plan_gang import report
from test_plan_kit import NOW, TIMING, after, running, settled, spec, started

ONLINE = {"model": {"uri": "s3://models/big"}, "delivery": "Online"}
AWAY = 1000.0


def trained(limit: int = 900, **changes: Any) -> Observed:
    """A gang that had made steps before the operator was away for `AWAY` seconds."""
    whole = spec(teacher=ONLINE, stallTimeoutSeconds=limit)
    return started(spec=whole, **{"pods": (running("p"),), "rank0": report(), **changes})


def end_of(seen: Observed) -> str:
    return plan_job(seen, TIMING).status.attempts[0].reason


def first_answer(seen: Observed, asked_for: float) -> Observed:
    """What a new leader has heard `asked_for` seconds after its first question: nothing moved."""
    later = after(seen, seconds=AWAY)
    since = later.now - timedelta(seconds=asked_for)
    return replace(later, rank0=Contact(report().report, later.now, since, moved=False))


@pytest.mark.parametrize(
    ("limit", "asked_for", "ends"),
    [(900, 0, ""), (900, 29, ""), (900, 31, reasons.STALLED), (12, 11, ""), (12, 13, reasons.STALLED)],
)  # fmt: skip
def test_a_new_leader_sees_for_itself_that_nothing_moves(
    limit: int, asked_for: float, ends: str
) -> None:
    """A gang that waits for its last upload ticks every 2 s, which no status says."""
    assert end_of(first_answer(trained(limit), asked_for)) == ends


def test_a_gang_that_ticks_goes_on_under_a_new_leader() -> None:
    seen = first_answer(trained(), 5)
    assert seen.rank0 is not None
    assert settled(replace(seen, rank0=replace(seen.rank0, moved=True))).actions == ()


@pytest.mark.parametrize(("asked_for", "ends"), [(0, ""), (29, ""), (31, reasons.STALLED)])
def test_a_new_leader_has_asked_before_it_says_that_nobody_answers(
    asked_for: float, ends: str
) -> None:
    seen = after(trained(), seconds=AWAY, rank0=None)
    asked = Unanswered("p", seen.now - timedelta(seconds=asked_for))
    assert end_of(replace(seen, unanswered=asked)) == ends


def test_nobody_is_said_not_to_answer_who_was_not_asked() -> None:
    assert end_of(after(trained(), seconds=AWAY, rank0=None, unanswered=None)) == ""


@pytest.mark.parametrize("struck", [0, 1])
def test_a_gang_whose_node_is_silent_is_disrupted_and_not_stalled(struck: int) -> None:
    """Kubernetes gives up the node's pods minutes later than a short stall timeout is over."""
    pods = [running("p"), running("q", index=1)]
    pods[struck] = replace(pods[struck], unreachable=True)
    heard = Contact(report().report, NOW + timedelta(seconds=3), NOW + timedelta(seconds=3), True)
    seen = after(trained(limit=60, pods=tuple(pods)), seconds=70, rank0=heard)
    attempt = settled(seen).status.attempts[0]
    assert (attempt.reason, attempt.charged) == (reasons.DISRUPTED, False)
    assert f"the node of pod {pods[struck].name} is not ready" in attempt.message


def test_a_silent_node_alone_ends_nothing() -> None:
    pods = (running("p", unreachable=True),)
    assert settled(after(trained(pods=pods), seconds=5)).actions == ()
