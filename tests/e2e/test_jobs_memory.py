"""Real ranks that meet their container's memory limit: the kernel ends them in the first micro-batch."""

from __future__ import annotations

import json
from typing import Any

import pytest

from e2e.gang import llama
from e2e.kit import SLOW_SECONDS, Team

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2 * SLOW_SECONDS)]
BATCH, FITS = 707, 101
"""Seven times as much at once takes 2.3 GiB, this 1.0: most of it torch itself. 101 is a prime, so
that less than 707 is 101."""


def hungry(team: Team, name: str, policy: str) -> dict[str, Any]:
    limit = {"name": "trainer", "resources": {"limits": {"memory": "1536Mi"}}}
    return team.tuned(
        name,
        student={"config": llama(32, 12)},
        training={
            "maxSteps": 1,
            "globalBatchSize": BATCH,
            "microBatchSize": BATCH,
            "onOutOfMemory": policy,
        },
        workers={"nodes": 1, "template": {"spec": {"containers": [limit]}}},
        backoffLimit=0,
    )


@pytest.fixture(scope="module")
def applied(team: Team) -> None:
    team.apply(hungry(team, "shrinks", "Shrink"), hungry(team, "retries", "Retry"))


def test_a_smaller_micro_batch_is_tried_once_for_free(team: Team, applied: None) -> None:
    status = team.ends("shrinks", "Completed")
    first, second = status["attempts"]
    assert (first["reason"], first["charged"]) == ("OutOfMemory", False)
    assert "was killed: out of memory" in first["message"]
    assert f"take {FITS} in place of {BATCH} sequences at once" in first["message"]
    assert (second["reason"], second["microBatchSize"]) == ("Completed", FITS)
    assert (status["microBatchLimit"], status["failures"]) == (FITS, 0)
    run = json.loads(team.get("configmap", "shrinks-a2")["data"]["run.json"])
    assert run["microBatchSize"] == FITS
    assert run["spec"]["training"]["globalBatchSize"] == BATCH
    assert status["progress"]["step"] == 1


def test_without_that_it_is_charged_and_told(team: Team, applied: None) -> None:
    status = team.ends("retries", "BackoffLimitExceeded")
    [attempt] = status["attempts"]
    assert (attempt["reason"], attempt["charged"]) == ("OutOfMemory", True)
    message = team.condition("retries")["message"]
    assert "OutOfMemory" in message
    assert "was killed: out of memory" in message
