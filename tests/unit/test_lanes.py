"""Which tests stay in one process when pytest-xdist shares them out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from devcluster.fixtures import OWN_CLUSTER
from lanes import lane

TESTS = Path(__file__).resolve().parents[1]
FILES = sorted(f"tests/{path.relative_to(TESTS)}" for path in TESTS.glob("*/test_*.py"))


def text_of(file: str) -> str:
    return (TESTS.parent / file).read_text()


@pytest.fixture(autouse=True)
def no_cluster_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OWN_CLUSTER, raising=False)


@pytest.mark.parametrize("folder", ["controlplane", "e2e"])
def test_all_that_use_a_folders_cluster_are_in_one_lane(folder: str) -> None:
    fixtures = re.compile(r"\b(team|bench|kit): (Team|Bench|Kit)\b")
    found = [f for f in FILES if f"/{folder}/" in f and fixtures.search(text_of(f))]
    # A Bench of a file's own is no cluster's.
    found = [f for f in found if "class Bench" not in text_of(f)]
    assert len(found) >= 3
    apart = "tests/controlplane/test_hands.py"
    assert {lane(file) for file in found if file != apart} == {folder}
    assert lane(apart) == apart, "it takes as long as the others together"


def test_others_are_lanes_of_their_own() -> None:
    alone = [f for f in FILES if f.startswith(("tests/unit/", "tests/store/"))]
    assert [lane(file) for file in alone] == alone
    assert lane("tests/e2e/test_gang.py") == "tests/e2e/test_gang.py"


def test_one_cluster_for_both_folders_is_one_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OWN_CLUSTER, "/home/me/.kube/config")
    lanes = {"controlplane/test_node.py", "controlplane/test_hands.py", "e2e/test_jobs.py"}
    assert len({lane(f"tests/{file}") for file in lanes}) == 1
