"""Where the watches connect to, what they wake, and what a chain sees of the cache."""

from __future__ import annotations

from typing import Any

import pytest
from kubedistill_api import names
from kubedistill_operator.cache import Cache, Raw
from kubedistill_operator.observe import observe_chain
from kubedistill_operator.queue import Key, WorkQueue
from kubedistill_operator.resources.owner import Owner
from kubedistill_operator.watch import Watcher, server_of
from test_plan_kit import NOW, spec


@pytest.mark.parametrize(
    ("environment", "server"),
    [
        ({}, None),
        ({"KUBERNETES_SERVICE_HOST": ""}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.96.0.1"}, "https://10.96.0.1:443"),
        (
            {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": "36443"},
            "https://127.0.0.1:36443",
        ),
        (
            {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"},
            "https://[fd00::1]:443",
        ),
    ],
)
def test_the_api_server_is_the_one_that_the_kubelet_names(
    environment: dict[str, str], server: str | None
) -> None:
    assert server_of(environment) == server


def stage_job(name: str, uid: str, *, owner: str = "chain-uid", **labels: str) -> Raw:
    reference = {"kind": "DistillationChain", "name": "c", "uid": owner}
    metadata: dict[str, Any] = {
        "namespace": "ml", "name": name, "uid": uid, "labels": labels, "resourceVersion": "1",
        "ownerReferences": [reference] if owner else [],
    }  # fmt: skip
    return {"metadata": metadata, "spec": spec()}


def report_of(job: str, uid: str) -> Raw:
    owner = Owner("ml", job, uid, chain="c", stage="m")
    name = names.report_name(job)
    metadata = owner.metadata(name, owner.labels(names.ROLE_REPORT))
    metadata |= {"uid": f"{name}-uid", "resourceVersion": "1"}
    done = {"conditions": [{"type": "Complete", "status": "True"}]}
    return {"metadata": metadata, "spec": {}, "status": done}


async def test_a_report_wakes_its_chain() -> None:
    queue = WorkQueue()
    Watcher(Cache(), queue).batch_job(report_of("c-m-t2", "u"))
    assert [await queue.get(), await queue.get()] == [
        Key("job", "ml", "c-m-t2"),
        Key("chain", "ml", "c"),
    ]


@pytest.mark.parametrize("changed", [{}, {names.LABEL_JOB: "other"}])
async def test_a_job_whose_label_is_taken_off_wakes_its_owner(changed: dict[str, str]) -> None:
    queue, cache = WorkQueue(), Cache()
    before = report_of("c-m-t2", "u")
    cache.batch_jobs.put(before)
    metadata = before["metadata"] | {"labels": changed, "resourceVersion": "2"}
    Watcher(cache, queue).batch_job(before | {"metadata": metadata})
    woken = [await queue.get() for _ in range(len(queue))]
    assert Key("job", "ml", "c-m-t2") in woken


def test_a_chain_sees_its_jobs_and_those_that_have_their_names() -> None:
    cache = Cache()
    ours = {names.LABEL_CHAIN: "c"}
    cache.put_job(stage_job("c-m-t2", "u2", **ours))
    cache.put_job(stage_job("c-m-t0-5", "u05", owner="", team="x"))
    cache.put_job(stage_job("c-old", "u3", **ours))
    cache.put_job(stage_job("c-guest", "u4", owner="", **ours))
    cache.batch_jobs.put(report_of("c-m-t2", "u2"))
    cache.batch_jobs.put(report_of("c-old", "of-a-namesake"))
    chain = {
        "metadata": {"namespace": "ml", "name": "c", "uid": "chain-uid", "generation": 1},
        "spec": {"stages": [{"name": "m", "sweep": {"temperature": [2, 0.5]}}]},
    }
    jobs = observe_chain(cache, chain, NOW).jobs
    assert {name: job.ours for name, job in jobs.items()} == {
        "c-m-t2": True, "c-old": True, "c-m-t0-5": False,
    }  # fmt: skip
    assert jobs["c-m-t2"].report is not None and jobs["c-m-t2"].report.complete
    assert jobs["c-old"].report is None
