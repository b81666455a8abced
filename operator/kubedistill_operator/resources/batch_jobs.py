"""The Jobs of a DistillationJob: preflight, teacher writers, one attempt of the gang, a report."""

from __future__ import annotations

from typing import Any

from kubedistill_api import names
from kubedistill_api.exit_codes import ExitCode
from kubedistill_api.job import DistillationJobSpec

from kubedistill_operator.plan.views import GENERATION_ANNOTATION, TRY_ANNOTATION
from kubedistill_operator.resources.owner import Owner
from kubedistill_operator.resources.pods import (
    PodShape,
    TrainerImage,
    pod_template,
    preflight_part,
)

_WITHOUT_END = 2_147_483_647
_REPORT_TRIES = 4
_WRITER_GRACE_SECONDS = 30
_HOPELESS = sorted(
    {
        int(ExitCode.BAD_CONFIGURATION),
        int(ExitCode.UNREADABLE_INPUT),
        int(ExitCode.COST_LIMIT),
    }
)
_OURS = sorted(int(code) for code in ExitCode if code not in (ExitCode.SUCCESS, ExitCode.UNKNOWN))


def preflight(
    owner: Owner,
    spec: DistillationJobSpec,
    trainer: TrainerImage,
    *,
    name: str,
    tries: int,
    generation: int,
) -> dict[str, Any]:
    """One pod without GPUs that checks the inputs. `tries` counts from 1."""
    labels = owner.labels(names.ROLE_PREFLIGHT, tries)
    shape = PodShape(
        role=names.ROLE_PREFLIGHT,
        labels=labels,
        config_map=name,
        api_key_secret=_api_key_secret(spec),
        template=preflight_part(spec.workers.template),
    )
    annotations = {GENERATION_ANNOTATION: str(generation), TRY_ANNOTATION: str(tries)}
    return _job(
        owner.metadata(name, labels, **annotations),
        {
            "completions": 1,
            "parallelism": 1,
            "backoffLimit": 0,
            "template": pod_template(shape, spec.storage, trainer),
        },
    )


def report(owner: Owner, spec: DistillationJobSpec, trainer: TrainerImage) -> dict[str, Any]:
    """One pod without GPUs that writes a finished sweep into its trials' reports."""
    labels, name = owner.labels(names.ROLE_REPORT), names.report_name(owner.name)
    shape = PodShape(
        role=names.ROLE_REPORT,
        labels=labels,
        config_map=name,
        template=preflight_part(spec.workers.template),
    )
    return _job(
        owner.metadata(name, labels),
        {
            "completions": 1,
            "parallelism": 1,
            "backoffLimit": _REPORT_TRIES - 1,
            "template": pod_template(shape, spec.storage, trainer),
        },
    )


def teacher(
    owner: Owner, spec: DistillationJobSpec, trainer: TrainerImage, *, tries: int = 0
) -> dict[str, Any]:
    """Independent writers: an index is a part of the data, retried by itself.

    Without end: when it is enough is the operator's to say (plan/writers.py), as the Job counts no
    progress.
    """
    if spec.teacher is None:
        raise ValueError(f"{owner.namespace}/{owner.name} has no teacher")
    workers, name = spec.teacher.workers, names.teacher_name(owner.name)
    labels = owner.labels(names.ROLE_TEACHER)
    shape = PodShape(
        role=names.ROLE_TEACHER,
        labels=labels,
        config_map=name,
        grace_seconds=_WRITER_GRACE_SECONDS,
        gpus=0 if spec.teacher.endpoint else workers.gpus_per_replica,
        gpu_resource_name=spec.workers.gpu_resource_name,
        api_key_secret=_api_key_secret(spec),
        silence_seconds=spec.stall_timeout_seconds,
        template=workers.template,
    )
    return _job(
        owner.metadata(name, labels, **{TRY_ANNOTATION: str(tries)}),
        {
            "completionMode": "Indexed",
            "completions": workers.replicas,
            "parallelism": workers.replicas,
            "backoffLimitPerIndex": _WITHOUT_END,
            "backoffLimit": _WITHOUT_END,
            "suspend": spec.suspend,
            "podFailurePolicy": {
                "rules": [
                    {"action": "Ignore", "onPodConditions": [_DISRUPTED]},
                    {"action": "Ignore", "onExitCodes": _exit_codes([int(ExitCode.INTERRUPTED)])},
                    {"action": "FailJob", "onExitCodes": _exit_codes(_HOPELESS)},
                ]
            },
            "template": pod_template(shape, spec.storage, trainer),
        },
    )


def _api_key_secret(spec: DistillationJobSpec) -> str:
    """The Secret with the key of the teacher's endpoint, if it has one. Never the student's."""
    endpoint = spec.teacher.endpoint if spec.teacher else None
    return endpoint.secret_ref.name if endpoint and endpoint.secret_ref else ""


def gang_template(
    owner: Owner,
    spec: DistillationJobSpec,
    trainer: TrainerImage,
    *,
    attempt: int,
    grace_seconds: int,
) -> dict[str, Any]:
    """The pod template of the gang."""
    shape = PodShape(
        role=names.ROLE_STUDENT,
        labels=owner.labels(names.ROLE_STUDENT, attempt),
        config_map=names.attempt_name(owner.name, attempt),
        grace_seconds=grace_seconds,
        gpus=spec.workers.gpus_per_node,
        gpu_resource_name=spec.workers.gpu_resource_name,
        subdomain=owner.name,
        template=spec.workers.template,
    )
    return pod_template(shape, spec.storage, trainer)


def gang(owner: Owner, nodes: int, attempt: int, template: dict[str, Any]) -> dict[str, Any]:
    """One attempt: all pods or none; any failure ends it."""
    name = names.attempt_name(owner.name, attempt)
    return _job(
        owner.metadata(name, owner.labels(names.ROLE_STUDENT, attempt)),
        {
            "completionMode": "Indexed",
            "completions": nodes,
            "parallelism": nodes,
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {
                "rules": [
                    {"action": "FailJob", "onPodConditions": [_DISRUPTED]},
                    {"action": "FailJob", "onExitCodes": _exit_codes(_OURS)},
                ]
            },
            "template": template,
        },
    )


def service(owner: Owner) -> dict[str, Any]:
    """The headless Service under which the gang's pods find each other, ready or not."""
    labels = owner.labels(names.ROLE_STUDENT)
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": owner.metadata(owner.name, labels),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {
                names.LABEL_JOB: owner.name,
                names.LABEL_ROLE: names.ROLE_STUDENT,
            },
            "ports": [{"name": "metrics", "port": names.EXPORTER_PORT}],
        },
    }


_DISRUPTED = {"type": "DisruptionTarget", "status": "True"}


def _exit_codes(codes: list[int]) -> dict[str, Any]:
    return {"containerName": names.CONTAINER, "operator": "In", "values": codes}


def _job(metadata: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}
