"""What of our children is as we made it: their run specs, their owners, their names."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from kubedistill_api import names
from kubedistill_operator.plan.actions import Inputs
from kubedistill_operator.resources import run_specs
from kubedistill_operator.resources.owner import owners_with
from test_operator_resources import OWNER, gang, parsed


def test_pods_are_told_which_run_spec_they_are_made_for() -> None:
    """Also where a template has the variable: it cannot make a pod trust another one."""
    base = run_specs.base_run_spec(OWNER, parsed(), Inputs("abc"), "student")
    inputs = run_specs.config_map(OWNER, "small-a2", base)
    mine = {"name": names.RUN_SPEC_DIGEST, "value": "0" * 64}
    sidecar = {"name": "sidecar", "image": "x"}
    template = {"spec": {"containers": [sidecar, {"name": "trainer", "env": [mine]}]}}
    job = run_specs.pinned(gang(workers={"template": template}), inputs)
    digest = hashlib.sha256(inputs["data"]["run.json"].encode()).hexdigest()
    trainer, other = job["spec"]["template"]["spec"]["containers"]
    assert [e["value"] for e in trainer["env"] if e["name"] == names.RUN_SPEC_DIGEST] == [digest]
    assert other == sidecar
    assert run_specs.pin_of(job) == digest
    assert run_specs.pin_of(gang()) == ""


@pytest.mark.parametrize(
    ("job", "data", "wrong"),
    [
        ("", "ours", False),
        ("", "theirs", True),
        ("ours", "ours", False),
        ("ours", "theirs", True),
        # Another version of the operator made both, and writes it otherwise.
        ("theirs", "theirs", False),
        ("theirs", "ours", True),
        # An operator of before the variable made the Job: its pods are left alone.
        ("unpinned", "theirs", False),
        ("unpinned", "ours", False),
    ],
)
def test_which_run_spec_is_not_the_one_of_its_pods(job: str, data: str, wrong: bool) -> None:
    def config_map(text: str) -> dict[str, Any]:
        return {"data": {"run.json": text}}

    jobs = {"": None, "unpinned": gang()}
    body = jobs[job] if job in jobs else run_specs.pinned(gang(), config_map(job))
    assert run_specs.replaced(config_map(data), config_map("ours"), body) == wrong


OURS = OWNER.metadata("x", {})["ownerReferences"][0]
THEIRS = {"apiVersion": "v1", "kind": "ConfigMap", "name": "y", "uid": "y"}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([], [OURS]),
        (None, [OURS]),
        ([OURS], None),
        ([THEIRS], [THEIRS, OURS]),
        ([THEIRS, OURS | {"controller": False}], None),
        # There is one controller at most: the API server refuses a second.
        (
            [THEIRS | {"controller": True}],
            [THEIRS | {"controller": True}, OURS | {"controller": False}],
        ),
    ],
)
def test_an_owner_is_put_back_beside_those_that_are_there(found: Any, expected: Any) -> None:
    metadata = {"name": "x"} | ({"ownerReferences": found} if found is not None else {})
    assert owners_with(metadata, OURS) == expected


@pytest.mark.parametrize(
    ("name", "role", "attempt", "ours"),
    [
        ("small-a2", "student", 2, True),
        ("small-a2", "student", 3, False),
        ("small-teacher", "teacher", 0, True),
        ("small-report", "report", 0, True),
        ("small-p012345", "preflight", 1, True),
        # Somebody's copy of one, labels included.
        ("small-a2-copy", "student", 2, False),
        ("debug", "preflight", 1, False),
        ("debug", "", 0, False),
    ],
)
def test_which_jobs_have_a_name_that_we_give(
    name: str, role: str, attempt: int, ours: bool
) -> None:
    assert OWNER.made({"name": name, "labels": OWNER.labels(role, attempt)}) == ours
    assert not OWNER.made({"name": name})
