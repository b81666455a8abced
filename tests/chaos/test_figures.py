"""The suite's own figures: a family that hits nothing is not green."""

from __future__ import annotations

from chaos import figures
from chaos.figures import Family, Run


def test_a_family_that_hit_too_little_is_told() -> None:
    family = Family("store-kill", 3, lambda run, draw: None, least_met=0.6, least_absorbed=0.3)
    runs = [Run("store-kill", index, "0/store-kill/0") for index in range(3)]
    runs[0].faults = ["a kill"]
    assert figures.shortfalls([family], runs[:2]) == []
    short = figures.shortfalls([family], runs)
    assert short == [
        "store-kill: 1 of 3 cases met a fault, and 2 should have",
        "store-kill: 0 of 3 cases absorbed it, and 1 should have",
    ]
    told = figures.table(runs, short)
    assert all(sentence in told for sentence in short)
    assert told.endswith("violations: 2")
    runs[1].faults, runs[1].told["absorbed"] = ["a kill"], True
    assert figures.shortfalls([family], runs) == []


def test_the_last_row_is_the_sum_of_all() -> None:
    runs = [
        Run("store-kill", 0, "0", faults=["a", "b"], commits=3, seconds=1.5, lost=["x"]),
        Run("store-fault", 0, "0", told={"absorbed": True}, wrong=["y"], violations=["z"]),
    ]
    total = figures.total(figures.totals(runs))
    assert total == {
        "family": "total", "runs": 2, "lives": 0, "faults": 2, "not met": 1, "absorbed": 1,
        "commits": 3, "lost": 1, "wrong": 1, "violations": 1, "seconds": 1.5,
    }  # fmt: skip
    assert "total" in figures.table(runs)
