"""The work queue and the cache."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import aiohttp
import pytest
from kubedistill_api.names import LABEL_JOB
from kubedistill_operator.cache import Cache, Kind
from kubedistill_operator.cluster import ApiError, NotLeading, log_failure
from kubedistill_operator.logs import JsonFormatter
from kubedistill_operator.queue import Failures, Key, WorkQueue, work

_OURS = "kubedistill_operator.cluster."
A, B = Key("job", "ml", "a"), Key("job", "ml", "b")


async def test_a_key_waits_once() -> None:
    queue = WorkQueue()
    for key in (A, A, B, A):
        queue.add(key)
    assert len(queue) == 2
    assert [await queue.get(), await queue.get()] == [A, B]


async def test_a_key_added_while_worked_on_comes_again() -> None:
    queue = WorkQueue()
    queue.add(A)
    key = await queue.get()
    queue.add(A)
    assert len(queue) == 0
    queue.done(key)
    assert len(queue) == 1


async def test_the_earliest_request_wins() -> None:
    queue = WorkQueue()
    queue.add_later(A, 60)
    queue.add_later(A, 0.01)
    queue.add_later(A, 60)
    assert await asyncio.wait_for(queue.get(), 1) == A


async def test_workers_share_keys_and_survive_errors() -> None:
    queue = WorkQueue()
    queue.failures = Failures(base_seconds=0.01)
    passes: list[Key] = []
    at_once: set[Key] = set()

    async def reconcile(key: Key) -> float | None:
        assert key not in at_once
        at_once.add(key)
        await asyncio.sleep(0.01)
        at_once.discard(key)
        passes.append(key)
        if len(passes) < 3:
            raise RuntimeError("try again")
        return None

    workers = [asyncio.create_task(work(queue, reconcile)) for _ in range(3)]
    queue.add(A)
    for _ in range(100):
        await asyncio.sleep(0.02)
        if len(passes) >= 3:
            break
    for worker in workers:
        worker.cancel()
    assert passes == [A, A, A]
    assert queue.failures.counts == {}


@pytest.mark.parametrize(
    ("error", "told", "traceback"),
    [
        (
            ApiError(503, "ServiceUnavailable", "away"),
            _OURS + "ApiError: 503 ServiceUnavailable: away",
            False,
        ),
        (
            aiohttp.ServerDisconnectedError(),
            "aiohttp.client_exceptions.ServerDisconnectedError: Server disconnected",
            False,
        ),
        (TimeoutError(), "TimeoutError", False),
        (NotLeading("the Lease is not held"), _OURS + "NotLeading: the Lease is not held", False),
        (KeyError("x"), "Traceback", True),
        (ApiError(422, "Invalid", "spec.x: Required value"), "Traceback", True),
    ],
)
def test_an_api_server_that_is_away_is_no_traceback(
    error: Exception, told: str, traceback: bool, caplog: pytest.LogCaptureFixture
) -> None:
    try:
        raise error
    except Exception as caught:
        log_failure(logging.getLogger("here"), "reconcile failed", caught, key="job/a/b")
    line = json.loads(JsonFormatter().format(caplog.records[0]))
    assert line["error"].startswith(told)
    assert ("Traceback" in line["error"]) == traceback
    assert (line["level"], line["key"]) == ("ERROR" if traceback else "WARNING", "job/a/b")


def test_waits_grow_to_a_cap() -> None:
    failures = Failures(base_seconds=1, cap_seconds=8)
    waits = [failures.next_wait(A) for _ in range(8)]
    assert waits[0] <= 1.2
    assert 6.4 <= waits[-1] <= 9.6


def raw(name: str, version: int, uid: str = "u1", **labels: str) -> dict[str, Any]:
    metadata = {"namespace": "ml", "name": name, "uid": uid, "resourceVersion": str(version)}
    return {"metadata": metadata | {"labels": labels}}


def test_an_older_version_never_replaces_a_newer_one() -> None:
    kind = Kind()
    assert kind.put(raw("a", 5))
    assert not kind.put(raw("a", 4))
    assert not kind.put(raw("a", 5))
    assert kind.put(raw("a", 6))


def test_what_was_deleted_does_not_come_back() -> None:
    kind = Kind(LABEL_JOB)
    old = raw("p", 5, **{LABEL_JOB: "j"})
    kind.put(old)
    assert kind.remove(raw("p", 9, **{LABEL_JOB: "j"}))
    assert not kind.put(old)
    assert list(kind.group("ml", "j")) == []
    assert [r["metadata"]["resourceVersion"] for r in kind.gone("ml", "j")] == ["9"]
    assert kind.put(raw("p", 3, uid="u2", **{LABEL_JOB: "j"}))


def test_a_late_deletion_of_a_namesake_is_not_the_new_ones() -> None:
    kind = Kind()
    kind.put(raw("a", 7, uid="new"))
    assert not kind.remove(raw("a", 5, uid="old"))
    assert kind.get("ml", "a") is not None


def test_the_memory_of_deleted_objects_ends() -> None:
    now = [0.0]
    kind = Kind(LABEL_JOB, clock=lambda: now[0])
    kind.remove(raw("p", 1, **{LABEL_JOB: "j"}))
    assert list(kind.gone("ml", "j"))
    now[0] = 10_000.0
    assert not list(kind.gone("ml", "j"))


def test_dependents_follow_the_spec() -> None:
    cache = Cache()
    job = raw("b", 1) | {"spec": {"teacher": {"fromJob": {"name": "a"}}}}
    cache.put_job(job)
    assert cache.dependents("ml", "a") == ["b"]
    cache.put_job(raw("b", 2) | {"spec": {"teacher": {"model": {"uri": "s3://x"}}}})
    assert cache.dependents("ml", "a") == []
