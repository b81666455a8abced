"""Run specs and the ConfigMaps that carry them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Literal

from kubedistill_api import names
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.quantity import to_bytes
from kubedistill_api.runspec import Rendezvous, RunSpec
from kubedistill_api.status import Attempt, DistillationJobStatus
from kubedistill_api.sweep import SweepTable

from kubedistill_operator.plan.actions import Inputs
from kubedistill_operator.plan.restart import failures_seen, mean_seconds_between_failures
from kubedistill_operator.plan.shape import nodes_of, ranks_per_node
from kubedistill_operator.resources.owner import Owner
from kubedistill_operator.resources.pods import memory_limit

Role = Literal["preflight", "teacher", "student", "report"]


def base_run_spec(owner: Owner, spec: DistillationJobSpec, inputs: Inputs, role: Role) -> RunSpec:
    """The run spec of a container that belongs to no attempt."""
    return RunSpec(
        namespace=owner.namespace,
        name=owner.name,
        uid=owner.uid,
        chain=owner.chain,
        stage=owner.stage,
        role=role,
        spec=spec,
        inputs_digest=inputs.digest,
        teacher_model=inputs.teacher,
        student_model=inputs.student,
        memory_limit_bytes=to_bytes(memory_limit(spec.workers.template)),
    )


def inputs_of(run: RunSpec) -> Inputs:
    """The inputs that a run spec pinned."""
    return Inputs(run.inputs_digest, run.teacher_model, run.student_model)


def student_run_spec(
    base: RunSpec, attempt: Attempt, grace_seconds: int, status: DistillationJobStatus
) -> RunSpec:
    """The run spec of one attempt of the gang, with what the status knows of those before it."""
    number = attempt.number
    return base.model_copy(
        update={
            "role": "student",
            "attempt": number,
            "fence": attempt.fence,
            "rendezvous": Rendezvous(
                host=names.pod_host(names.attempt_name(base.name, number), 0, base.name),
                port=names.rendezvous_port(base.uid, number),
                nodes=nodes_of(base.spec, attempt),
                ranks_per_node=ranks_per_node(base.spec),
            ),
            "termination_grace_seconds": grace_seconds,
            "micro_batch_size": attempt.micro_batch_size or None,
            "mean_seconds_between_failures": mean_seconds_between_failures(status.attempts),
            "failures_seen": failures_seen(status.attempts) or None,
            "save_seconds": status.save_seconds,
            "committed_step": status.furthest_commit or None,
        }
    )


def report_run_spec(owner: Owner, spec: DistillationJobSpec, sweep: SweepTable) -> RunSpec:
    """The run spec of the container that writes a finished sweep into its trials' reports."""
    base = base_run_spec(owner, spec, Inputs(digest=""), "report")
    return base.model_copy(update={"sweep": sweep})


def config_map(owner: Owner, name: str, run: RunSpec) -> dict[str, Any]:
    """The immutable ConfigMap with a run spec."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": owner.metadata(name, owner.labels(run.role, run.attempt)),
        "immutable": True,
        "data": {
            names.RUN_SPEC_FILE: run.model_dump_json(by_alias=True, exclude_none=True, indent=1)
        },
    }


def pinned(job: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """A Job whose pods take no other run spec than that of the ConfigMap `inputs`.

    It is said in their template, which nobody can change, beside a ConfigMap that can be replaced.
    """
    pin = {"name": names.RUN_SPEC_DIGEST, "value": _digest(inputs)}
    template = job["spec"]["template"]
    containers = [
        {**c, "env": [*(e for e in c.get("env", []) if e["name"] != pin["name"]), pin]}
        if c["name"] == names.CONTAINER
        else c
        for c in template["spec"]["containers"]
    ]
    template = {**template, "spec": {**template["spec"], "containers": containers}}
    return {**job, "spec": {**job["spec"], "template": template}}


def pin_of(job: Mapping[str, Any]) -> str:
    """The digest of the run spec that a Job's pods take; empty where they take any."""
    for container in job["spec"]["template"]["spec"]["containers"]:
        for entry in container.get("env") or []:
            if (container["name"], entry["name"]) == (names.CONTAINER, names.RUN_SPEC_DIGEST):
                return str(entry.get("value", ""))
    return ""


def replaced(
    found: Mapping[str, Any], wanted: Mapping[str, Any], job: Mapping[str, Any] | None
) -> bool:
    """Whether the ConfigMap that is there is not the one that the pods of its Job are made for.

    Without a Job it is to be the `wanted` one. A Job that is there says itself which one it was made
    with: an operator of another version may have written the same in other words. The pods of a Job
    that does not say it are left alone.
    """
    if job is None:
        return bool(found.get("data") != wanted["data"])
    return not fits(found, job)


def fits(config_map: Mapping[str, Any], job: Mapping[str, Any]) -> bool:
    """Whether a Job's pods take the run spec in this ConfigMap."""
    return pin_of(job) in ("", _digest(config_map))


def _digest(config_map: Mapping[str, Any]) -> str:
    text = (config_map.get("data") or {}).get(names.RUN_SPEC_FILE, "")
    return hashlib.sha256(text.encode()).hexdigest()


def read_config_map(raw: dict[str, Any]) -> RunSpec:
    """The inverse of `config_map`."""
    return RunSpec.model_validate_json(raw["data"][names.RUN_SPEC_FILE])
