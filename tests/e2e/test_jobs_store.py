"""Jobs whose store is taken away and given back: told, charged, tried again, and then gone on with.

What a gang of several ranks says at its end is in test_store_lost.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
from devcluster.s3 import S3Access
from operator_kit import wait_for

from e2e.kit import SLOW_SECONDS, Team
from e2e.team_keys import TeamKeys

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2 * SLOW_SECONDS)]
STEPS = 400
"""Long enough to be struck on the way."""


@dataclass
class Bucket:
    """A bucket that can be taken away and brought back as it was."""

    access: S3Access

    def __post_init__(self) -> None:
        self._content: dict[str, bytes] = {}
        self._client = self.access.client()
        self._client.create_bucket(Bucket=self.access.bucket)

    def take_away(self) -> None:
        """Nobody writes meanwhile: whoever would is frozen."""
        name = self.access.bucket
        for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=name):
            for item in page.get("Contents", []):
                body = self._client.get_object(Bucket=name, Key=item["Key"])["Body"].read()
                self._content[item["Key"]] = body
        self._client.delete_bucket(Bucket=name)

    def bring_back(self) -> None:
        self._client.create_bucket(Bucket=self.access.bucket)
        for key, body in self._content.items():
            self._client.put_object(Bucket=self.access.bucket, Key=key, Body=body)


@pytest.fixture(scope="module")
def bucket(team: Team) -> Bucket:
    return Bucket(replace(team.handle.s3, bucket=f"of-{team.namespace}"))


@pytest.fixture(scope="module")
def keys(team: Team) -> TeamKeys:
    found = TeamKeys(team.handle.s3, f"of-{team.namespace}")
    access = found.access()
    team.secret("own", access.access_key, access.secret_key)
    return found


@pytest.fixture(scope="module")
def told(team: Team, bucket: Bucket, keys: TeamKeys) -> dict[str, dict[str, Any]]:
    """Statuses of two jobs that run beside each other and lose their stores after a commit, as they
    are when each was tried again in vain. The stores are given back then."""
    one = {
        "training": {"maxSteps": STEPS}, "workers": {"nodes": 1}, "checkpoint": {"interval": 5},
        # It is not the limit that is tried here, however slow the machine.
        "backoffLimit": 50,
    }  # fmt: skip
    team.apply(
        team.tuned("no-bucket", storage={"uri": f"s3://{bucket.access.bucket}/runs"}, **one),
        team.tuned("no-keys", storage={"secretRef": {"name": "own"}}, **one),
    )
    team.steps("no-keys", 2)
    keys.revoke()
    team.steps("no-bucket", 2)
    pod = team.pod("no-bucket", 0)
    team.handle.faults.freeze(team.namespace, pod)
    bucket.take_away()
    team.handle.faults.thaw(team.namespace, pod)
    found = {name: tried_in_vain(team, name) for name in ("no-bucket", "no-keys")}
    bucket.bring_back()
    fresh = TeamKeys(team.handle.s3, f"new-{team.namespace}").access()
    team.kubectl("delete", "secret", "own")
    team.secret("own", fresh.access_key, fresh.secret_key)
    return found


def tried_in_vain(team: Team, name: str) -> dict[str, Any]:
    """The status once two attempts have ended."""

    def ended_twice() -> dict[str, Any] | None:
        status = team.status(name)
        ended = [a for a in status.get("attempts") or [] if a.get("endTime")]
        return status if len(ended) >= 2 else None

    return dict(wait_for(ended_twice, f"{name} is not tried again", SLOW_SECONDS))


def check_told(status: dict[str, Any], *words: str) -> None:
    """What is wrong is said by each attempt and in the conditions, and the job goes on trying."""
    for attempt in status["attempts"][:2]:
        assert (attempt["reason"], attempt["charged"]) == ("StorageUnavailable", True)
        assert [word for word in words if word not in attempt["message"]] == [], attempt["message"]
    assert status["failures"] >= 1
    conditions = {condition["type"]: condition for condition in status["conditions"]}
    current, whole = conditions["CheckpointCurrent"], conditions["Succeeded"]
    assert (current["status"], current["reason"]) == ("False", "SaveFailed"), status
    assert words[0] in current["message"]
    assert f"step {status['checkpoint']['step']} is committed" in current["message"]
    assert (whole["status"], whole["reason"]) == ("Unknown", "Restarting"), whole


def check_goes_on(team: Team, name: str, before: dict[str, Any]) -> None:
    status = team.ends(name, "Completed")
    assert status["attempts"][-1]["resumedFromStep"] >= before["checkpoint"]["step"]
    assert team.condition(name, "CheckpointCurrent")["reason"] == "Committed"
    assert status["failures"] == 0


def test_a_bucket_that_was_away(
    team: Team, bucket: Bucket, told: dict[str, dict[str, Any]]
) -> None:
    status = told["no-bucket"]
    check_told(status, f"bucket {bucket.access.bucket!r} does not exist", "create it")
    check_goes_on(team, "no-bucket", status)


def test_keys_that_were_revoked_and_replaced(
    team: Team, keys: TeamKeys, told: dict[str, dict[str, Any]]
) -> None:
    status = told["no-keys"]
    check_told(status, "refuses these credentials", "Secret 'own'", "may ")
    text = json.dumps(status) + team.kubectl("get", "events", "-o", "json")
    access = keys.access()
    assert access.access_key not in text
    assert access.secret_key not in text
    check_goes_on(team, "no-keys", status)
