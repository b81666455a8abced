"""What the store families let pass, and what they do not."""

from __future__ import annotations

import random

import pytest
from kubedistill_api.runspec import Outcome, ProgressReport

from chaos.damage import Commit
from chaos.faults import Call, Kind
from chaos.figures import Run
from chaos.store_bench import sorted_out
from chaos.store_judge import drawn_for, expect_declared, expect_rejected
from chaos.store_run import Ended

OWN = "runs/a/chaos/job-uid"
COMMIT = Commit(f"{OWN}/log/00000000000000000003.json", 6, [f"{OWN}/data/e1/s6/x/a"])


def ended(*codes: int, rejected: tuple[str, ...] = ()) -> Ended:
    report = ProgressReport(attempt=2, rejected_checkpoints=list(rejected))
    outcomes: list[Outcome | None] = [Outcome(reason="Completed", message="", progress=report)]
    return Ended(list(codes), outcomes, ["" for _ in codes], 1.0)


def test_only_what_is_left_over_waits_for_one_more_attempt() -> None:
    left = "data/e1/s6/x is left with 7 bytes that no commit needs"
    upload = "data/e1/s6/x/a is left as an unfinished multipart upload"
    missing = "slot 3 is live and data/e1/s6/x/a is missing"
    assert sorted_out([missing, left, upload]) == ([left, upload], [missing])


@pytest.mark.parametrize(
    ("told", "unreadable", "good"),
    [
        ((f"step 6, s3://b/{COMMIT.slot}: missing",), False, True),
        ((f"unreadable record, s3://b/{COMMIT.slot}: not JSON",), True, True),
        ((f"unreadable record, s3://b/{COMMIT.slot}: not JSON",), False, False),
        ((f"step 4, s3://b/{COMMIT.slot}: missing",), False, False),
        ((f"step 6, s3://b/{OWN}/log/00000000000000000002.json: missing",), False, False),
        ((f"step 6, s3://b/{COMMIT.slot}: missing", "step 4, s3://b/c: missing"), False, False),
        ((), False, False),
    ],
)
def test_the_damaged_commit_is_the_one_that_is_told(
    told: tuple[str, ...], unreadable: bool, good: bool
) -> None:
    run = Run("store-damage", 0, "0")
    expect_rejected(run, ended(0, 0, rejected=told), COMMIT, unreadable=unreadable)
    assert (run.bad == []) == good


@pytest.mark.parametrize(("codes", "good"), [((-9, 17), True), ((-9, 12), False), ((-9, 1), False)])
def test_nobody_is_fenced_out_by_a_peers_death(codes: tuple[int, int], good: bool) -> None:
    run = Run("store-kill", 0, "0")
    expect_declared(run, ended(*codes), killed={0})
    assert (run.bad == []) == good


@pytest.mark.parametrize(
    ("call", "never"),
    [
        (
            Call(0, "rank-0", "HEAD", f"/b/{OWN}/data/e1/s2/x/a"),
            {Kind.TRUNCATE, Kind.GARBLE, Kind.TRUNCATE_REQUEST, Kind.GARBLE_REQUEST},
        ),
        (Call(0, "rank-0", "PUT", "/b/k", body_bytes=9), {Kind.TRUNCATE, Kind.GARBLE}),
        (
            Call(0, "rank-0", "GET", f"/b/{OWN}/log/0.json"),
            {Kind.TRUNCATE_REQUEST, Kind.GARBLE_REQUEST},
        ),
        (
            Call(0, "rank-0", "GET", "/b?list-type=2&prefix=x"),
            {Kind.GARBLE, Kind.TRUNCATE_REQUEST, Kind.GARBLE_REQUEST},
        ),
    ],
)
def test_only_faults_that_can_do_something_are_drawn(call: Call, never: set[Kind]) -> None:
    draw = random.Random(0)
    drawn = {drawn_for(call, OWN, draw).kind for _ in range(400)}
    every = {
        Kind.ANSWER, Kind.RESET_BEFORE, Kind.RESET_AFTER, Kind.TRUNCATE, Kind.STALL, Kind.DELAY,
        Kind.SKEW, Kind.TRUNCATE_REQUEST, Kind.GARBLE_REQUEST, Kind.GARBLE,
    }  # fmt: skip
    assert drawn == every - never
