"""Builders of Kubernetes objects."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kubedistill_api import names
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.quantity import to_bytes
from kubedistill_api.status import Attempt, DistillationJobStatus
from kubedistill_api.sweep import SweepTable, TrialStatus
from kubedistill_operator.plan.actions import Inputs
from kubedistill_operator.resources import batch_jobs, run_specs
from kubedistill_operator.resources.merge import strategic_merge
from kubedistill_operator.resources.owner import Owner
from kubedistill_operator.resources.pods import TrainerImage, memory_limit, preflight_part
from test_plan_kit import UID, spec

OWNER = Owner("ml", "small", UID, chain="c", stage="s")
IMAGE = TrainerImage("image:1", env={"EXTRA": "1", "HOME": "/ignored"})


@pytest.mark.parametrize(
    ("base", "patch", "expected"),
    [
        ({"a": 1}, {"b": 2}, {"a": 1, "b": 2}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": None}}, {"a": {"c": 2}}),
        ({"args": ["x"]}, {"args": ["y"]}, {"args": ["y"]}),
        ({"env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]},
         {"env": [{"name": "B", "value": "3"}, {"name": "C", "value": "4"}]},
         {"env": [{"name": "A", "value": "1"}, {"name": "B", "value": "3"},
                  {"name": "C", "value": "4"}]}),
        ({"env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "x"}}}]},
         {"env": [{"name": "A", "value": "1"}]},
         {"env": [{"name": "A", "value": "1"}]}),
        ({"volumeMounts": [{"mountPath": "/tmp", "name": "tmp"}]},
         {"volumeMounts": [{"mountPath": "/tmp", "name": "mine"}]},
         {"volumeMounts": [{"mountPath": "/tmp", "name": "mine"}]}),
        ({"tolerations": [{"key": "gpu"}]}, {"tolerations": [{"operator": "Exists"}]},
         {"tolerations": [{"key": "gpu"}, {"operator": "Exists"}]}),
    ],
)  # fmt: skip
def test_strategic_merge(base: Any, patch: Any, expected: Any) -> None:
    assert strategic_merge(base, patch) == expected


_leaf = st.one_of(st.integers(0, 3), st.sampled_from(["x", "y"]))
_named = st.lists(
    st.fixed_dictionaries({"name": st.sampled_from("abc"), "value": _leaf}), max_size=4
)
_objects = st.recursive(
    st.dictionaries(st.sampled_from(["p", "q", "r"]), _leaf, max_size=3),
    lambda inner: (
        st.dictionaries(
            st.sampled_from(["p", "q", "env", "containers"]),
            st.one_of(inner, st.lists(_leaf, max_size=2)),
            max_size=3,
        )
        | st.fixed_dictionaries({"env": _named})
    ),
    max_leaves=8,
)


@given(_objects, _objects)
def test_merging_twice_is_merging_once(base: Any, patch: Any) -> None:
    once = strategic_merge(base, patch)
    assert strategic_merge(once, patch) == once


@pytest.mark.parametrize(
    ("text", "size"),
    [("16Gi", 16 * 2**30), ("1500M", 1_500_000_000), ("1.5Ki", 1536), (2048, 2048),
     ("1e3", 1000), (None, None), ("much", None)],
)  # fmt: skip
def test_quantities(text: Any, size: int | None) -> None:
    assert to_bytes(text) == size


def parsed(**changes: Any) -> DistillationJobSpec:
    return DistillationJobSpec.model_validate(spec(**changes))


def gang(**changes: Any) -> dict[str, Any]:
    whole = parsed(**changes)
    template = batch_jobs.gang_template(OWNER, whole, IMAGE, attempt=2, grace_seconds=90)
    return batch_jobs.gang(OWNER, whole.workers.nodes, 2, template)


def test_the_gang_is_all_or_nothing() -> None:
    job = gang(workers={"nodes": 4, "gpusPerNode": 8})
    assert job["metadata"]["name"] == "small-a2"
    reference = job["metadata"]["ownerReferences"][0]
    assert reference["uid"] == UID
    assert reference["controller"]
    assert reference["blockOwnerDeletion"]
    body = job["spec"]
    assert (body["completions"], body["parallelism"], body["backoffLimit"]) == (4, 4, 0)
    assert body["podReplacementPolicy"] == "Failed"
    assert "successPolicy" not in body
    assert [r["action"] for r in body["podFailurePolicy"]["rules"]] == ["FailJob", "FailJob"]
    assert body["podFailurePolicy"]["rules"][0]["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert 0 not in body["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"]


def test_pods_are_restricted() -> None:
    pod = gang(workers={"gpusPerNode": 8})["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False
    assert pod["restartPolicy"] == "Never"
    assert pod["subdomain"] == "small"
    assert pod["terminationGracePeriodSeconds"] == 90
    gpus = {"nvidia.com/gpu": "8"}
    assert container["resources"] == {"requests": gpus, "limits": gpus}
    assert {v["name"]: v.get("emptyDir") for v in pod["volumes"]}["shm"] == {"medium": "Memory"}


@pytest.mark.parametrize("gpus", [0, 1, 8])
def test_every_rank_can_be_scraped(gpus: int) -> None:
    job = gang(workers={"nodes": 2, "gpusPerNode": gpus})
    ports = job["spec"]["template"]["spec"]["containers"][0]["ports"]
    expected = [names.EXPORTER_PORT + rank for rank in range(max(1, gpus))]
    assert [port["containerPort"] for port in ports] == expected
    assert len({port["name"] for port in ports}) == len(ports)
    assert ports[0]["name"] == "metrics"


def test_credentials_come_by_reference_only() -> None:
    storage = {"uri": "s3://runs/x", "secretRef": {"name": "keys"}}
    env = gang(storage=storage)["spec"]["template"]["spec"]["containers"][0]["env"]
    by_name = {entry["name"]: entry for entry in env}
    for key in names.SECRET_KEYS:
        assert by_name[key]["valueFrom"] == {"secretKeyRef": {"name": "keys", "key": key}}
    assert by_name["HOME"]["value"] == "/tmp"
    assert by_name["EXTRA"]["value"] == "1"
    assert len(by_name) == len(env)


def test_the_endpoints_key_reaches_those_who_ask_and_never_the_student() -> None:
    endpoint = {"url": "https://api/v1", "model": "big", "secretRef": {"name": "vendor"}}
    whole = parsed(
        student={"config": {"model_type": "llama"}},
        teacher={"endpoint": endpoint, "workers": {"replicas": 2, "gpusPerReplica": 4}},
        distill={"signal": "Responses"},
        data={
            "tokenizer": {"uri": "s3://models/t"},
            "sources": [{"uri": "s3://data/p.jsonl", "promptField": "q", "origin": "Teacher"}],
        },
    )
    asking = [
        batch_jobs.preflight(OWNER, whole, IMAGE, name="small-p1", tries=1, generation=1),
        batch_jobs.teacher(OWNER, whole, IMAGE),
    ]
    entry = {"secretKeyRef": {"name": "vendor", "key": "API_KEY"}}
    for job in asking:
        [container] = job["spec"]["template"]["spec"]["containers"]
        assert {"name": "API_KEY", "valueFrom": entry} in container["env"]
        assert "resources" not in container
    student = batch_jobs.gang_template(OWNER, whole, IMAGE, attempt=1, grace_seconds=9)
    silent = [student, batch_jobs.report(OWNER, whole, IMAGE)["spec"]["template"]]
    for pod in silent:
        assert "API_KEY" not in {e["name"] for e in pod["spec"]["containers"][0]["env"]}
        assert "vendor" not in str(pod)


def test_an_endpoint_without_a_secret_gets_no_key() -> None:
    whole = parsed(
        student={"config": {"model_type": "llama"}},
        teacher={"endpoint": {"url": "http://vllm/v1", "model": "big"}},
        distill={"signal": "Responses"},
        data={
            "tokenizer": {"uri": "s3://models/t"},
            "sources": [{"uri": "s3://data/p.jsonl", "promptField": "q", "origin": "Teacher"}],
        },
    )
    [container] = batch_jobs.teacher(OWNER, whole, IMAGE)["spec"]["template"]["spec"]["containers"]
    assert "API_KEY" not in {e["name"] for e in container["env"]}


def test_a_template_is_merged_but_cannot_hide_the_pod() -> None:
    template = {
        "metadata": {"labels": {names.LABEL_JOB: "other", "team": "x"}},
        "spec": {
            "nodeSelector": {"gpu": "h100"},
            "containers": [
                {"name": "trainer", "resources": {"limits": {"memory": "2Gi"}}},
                {"name": "sidecar", "image": "s"},
            ],
        },
    }
    pod = gang(workers={"gpusPerNode": 1, "template": template})["spec"]["template"]
    assert pod["metadata"]["labels"][names.LABEL_JOB] == "small"
    assert pod["metadata"]["labels"]["team"] == "x"
    assert pod["spec"]["nodeSelector"] == {"gpu": "h100"}
    trainer, sidecar = pod["spec"]["containers"]
    assert trainer["resources"]["limits"] == {"nvidia.com/gpu": "1", "memory": "2Gi"}
    assert sidecar["name"] == "sidecar"
    assert memory_limit(pod) == "2Gi"


def test_the_preflight_asks_for_no_gpus() -> None:
    template = {
        "spec": {
            "nodeSelector": {"a": "b"},
            "affinity": {},
            "containers": [
                {"name": "trainer", "env": [{"name": "A", "value": "1"}],
                 "resources": {"limits": {"nvidia.com/gpu": "8"}}},
            ],
        }
    }  # fmt: skip
    assert preflight_part(template) == {
        "spec": {
            "nodeSelector": {"a": "b"},
            "containers": [{"name": "trainer", "env": [{"name": "A", "value": "1"}]}],
        }
    }
    whole = parsed(workers={"gpusPerNode": 8, "template": template})
    job = batch_jobs.preflight(OWNER, whole, IMAGE, name="small-p1", tries=1, generation=1)
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert "resources" not in container
    assert container["args"] == ["preflight"]


def test_a_report_asks_for_no_gpus_and_brings_its_table() -> None:
    whole = parsed(workers={"gpusPerNode": 8})
    job = batch_jobs.report(OWNER, whole, IMAGE)
    assert job["metadata"]["labels"][names.LABEL_CHAIN] == "c"
    assert job["spec"]["backoffLimit"] == 3
    [container] = job["spec"]["template"]["spec"]["containers"]
    assert "resources" not in container
    assert container["args"] == ["report"]
    table = SweepTable(stage="s", choice="why", trials=[TrialStatus(temperature=2, job_name="t")])
    run = run_specs.report_run_spec(OWNER, whole, table)
    raw = run_specs.config_map(OWNER, job["metadata"]["name"], run)
    assert run_specs.read_config_map(raw).sweep == table


def test_teacher_partitions_are_retried_one_by_one() -> None:
    teacher = {"model": {"uri": "s3://models/m"}, "workers": {"replicas": 3, "gpusPerReplica": 2}}
    job = batch_jobs.teacher(OWNER, parsed(teacher=teacher), IMAGE)
    assert job["spec"]["completions"] == 3
    # How often is the operator's to say: a Job counts no progress.
    assert job["spec"]["backoffLimitPerIndex"] == 2**31 - 1
    assert "maxFailedIndexes" not in job["spec"]
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "2"}


@pytest.mark.parametrize(("limit", "alive", "started"), [(900, 90, 90), (25, 3, 30), (10, 3, 30)])
def test_a_writer_that_does_not_answer_is_killed(limit: int, alive: int, started: int) -> None:
    """Its progress is its own; the operator ends a stalled gang, and nobody else asks a gang."""
    teacher = {"model": {"uri": "s3://models/m"}}
    whole = parsed(teacher=teacher, stallTimeoutSeconds=limit)
    spec = batch_jobs.teacher(OWNER, whole, IMAGE)["spec"]["template"]["spec"]
    [container] = spec["containers"]
    liveness, startup = container["livenessProbe"], container["startupProbe"]
    assert liveness["httpGet"] == startup["httpGet"] == {"path": "/healthz", "port": "metrics"}
    assert (liveness["periodSeconds"], liveness["failureThreshold"]) == (10, alive)
    assert (startup["periodSeconds"], startup["failureThreshold"]) == (10, started)
    gang = batch_jobs.gang_template(OWNER, whole, IMAGE, attempt=1, grace_seconds=60)
    assert "livenessProbe" not in gang["spec"]["containers"][0]


def test_the_run_spec_survives_its_config_map() -> None:
    limits = {"name": "trainer", "resources": {"limits": {"memory": "1Ki"}}}
    whole = parsed(workers={"template": {"spec": {"containers": [limits]}}})
    base = run_specs.base_run_spec(OWNER, whole, Inputs("abc"), "student")
    attempt = Attempt(number=2, fence=7)
    run = run_specs.student_run_spec(base, attempt, 90, DistillationJobStatus(attempts=[attempt]))
    raw = run_specs.config_map(OWNER, "small-a2", run)
    assert raw["immutable"]
    assert run_specs.read_config_map(raw) == run
    assert run.rendezvous is not None
    assert run.rendezvous.host == "small-a2-0.small"
    assert (run.fence, run.inputs_digest) == (7, "abc")
    assert run.memory_limit_bytes == 1024


def test_the_service_publishes_pods_that_are_not_ready() -> None:
    service = batch_jobs.service(OWNER)
    assert service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["clusterIP"] == "None"
