"""The shape of every pod: Pod Security "restricted", GPUs, scratch, credentials by reference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kubedistill_api import names
from kubedistill_api.job import Storage

from kubedistill_operator.resources.merge import strategic_merge

_USER = 65532
_RUN_SPEC_VOLUME = "run-spec"
_PROBE_SECONDS = 10
_PROBES = 3
"""One answer that is late proves nothing."""
_PREFLIGHT_PARTS = ("volumes", "nodeSelector", "tolerations", "imagePullSecrets", "hostAliases")
_PREFLIGHT_CONTAINER_PARTS = (
    "name", "command", "env", "envFrom", "volumeMounts", "image", "imagePullPolicy",
)  # fmt: skip


@dataclass(frozen=True)
class TrainerImage:
    """What the operator's settings say of trainer containers."""

    image: str
    pull_policy: str = ""
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PodShape:
    """What differs between roles."""

    role: str
    labels: Mapping[str, str]
    config_map: str
    grace_seconds: int = 30
    gpus: int = 0
    gpu_resource_name: str = "nvidia.com/gpu"
    subdomain: str = ""
    api_key_secret: str = ""
    """Secret with the key of the teacher's endpoint, for those who ask it."""
    silence_seconds: int = 0
    """A container that does not answer for so long is killed; 0: nobody asks."""
    template: Mapping[str, Any] = field(default_factory=dict)


def pod_template(shape: PodShape, storage: Storage, trainer: TrainerImage) -> dict[str, Any]:
    """A pod template for a Job, with the user's template merged over it."""
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": shape.grace_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(shape, storage, trainer)],
        "volumes": [
            {"name": _RUN_SPEC_VOLUME, "configMap": {"name": shape.config_map}},
            {"name": "scratch", "emptyDir": {}},
            {"name": "tmp", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
    if shape.subdomain:
        spec["subdomain"] = shape.subdomain
    ours = {"metadata": {"labels": dict(shape.labels)}, "spec": spec}
    merged: dict[str, Any] = strategic_merge(ours, shape.template)
    # A template cannot take a pod out of the operator's sight.
    merged["metadata"]["labels"] = {**merged["metadata"].get("labels", {}), **shape.labels}
    return merged


def _ports(shape: PodShape) -> list[dict[str, Any]]:
    """One for each rank of the pod: Prometheus scrapes only what is declared."""
    ranks = shape.gpus if shape.role == names.ROLE_STUDENT else 1
    others = range(1, ranks)
    return [
        {"name": "metrics", "containerPort": names.EXPORTER_PORT},
        *({"name": f"metrics-{r}", "containerPort": names.EXPORTER_PORT + r} for r in others),
    ]


def _probes(shape: PodShape) -> dict[str, Any]:
    """For pods whose progress the operator does not judge: a frozen one would keep its GPUs."""
    if not shape.silence_seconds:
        return {}
    ask = {
        "httpGet": {"path": "/healthz", "port": "metrics"},
        "timeoutSeconds": _PROBE_SECONDS // 2,
        "periodSeconds": _PROBE_SECONDS,
    }
    probes = {
        # Until it answers for the first time it has to import some gigabytes.
        "startupProbe": max(names.START_SECONDS, shape.silence_seconds),
        "livenessProbe": shape.silence_seconds,
    }
    return {
        kind: {**ask, "failureThreshold": max(_PROBES, math.ceil(seconds / _PROBE_SECONDS))}
        for kind, seconds in probes.items()
    }


def _container(shape: PodShape, storage: Storage, trainer: TrainerImage) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": names.CONTAINER,
        "image": trainer.image,
        "args": [shape.role],
        "env": environment(storage, trainer.env, shape.api_key_secret),
        "ports": _ports(shape),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {
                "name": _RUN_SPEC_VOLUME,
                "mountPath": names.RUN_SPEC_DIRECTORY,
                "readOnly": True,
            },
            {"name": "scratch", "mountPath": names.SCRATCH_DIRECTORY},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - inside the container
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108
        ],
    }
    container |= _probes(shape)
    if trainer.pull_policy:
        container["imagePullPolicy"] = trainer.pull_policy
    if shape.gpus:
        count = {shape.gpu_resource_name: str(shape.gpus)}
        container["resources"] = {"requests": dict(count), "limits": dict(count)}
    return container


def environment(
    storage: Storage, extra: Mapping[str, str], api_key_secret: str = ""
) -> list[dict[str, Any]]:
    """Variables of a trainer's container; credentials only by reference."""
    env: list[dict[str, Any]] = [
        {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}
        for name, path in (
            ("POD_IP", "status.podIP"),
            ("POD_NAME", "metadata.name"),
            ("POD_NAMESPACE", "metadata.namespace"),
        )
    ]
    env.append({"name": "HOME", "value": "/tmp"})  # noqa: S108
    env.append({"name": "AWS_REGION", "value": storage.region})
    if storage.secret_ref is not None:
        env += [_of_secret(storage.secret_ref.name, key) for key in names.SECRET_KEYS]
    if api_key_secret:
        env.append(_of_secret(api_key_secret, names.API_KEY))
    known = {entry["name"] for entry in env}
    env += [{"name": k, "value": v} for k, v in sorted(extra.items()) if k not in known]
    return env


def _of_secret(secret: str, key: str) -> dict[str, Any]:
    return {"name": key, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}


def preflight_part(template: Mapping[str, Any]) -> dict[str, Any]:
    """What of the gang's template the preflight takes: where it runs and what it sees, no GPUs."""
    spec = template.get("spec") or {}
    part = {key: spec[key] for key in _PREFLIGHT_PARTS if key in spec}
    containers = [
        {key: container[key] for key in _PREFLIGHT_CONTAINER_PARTS if key in container}
        for container in spec.get("containers") or []
        if container.get("name") == names.CONTAINER
    ]
    if containers:
        part["containers"] = containers
    return {"spec": part} if part else {}


def memory_limit(template: Mapping[str, Any]) -> str | None:
    """The memory limit of the trainer's container in a pod template, as a person wrote it."""
    for container in (template.get("spec") or {}).get("containers") or []:
        if container.get("name") == names.CONTAINER:
            limit = ((container.get("resources") or {}).get("limits") or {}).get("memory")
            return None if limit is None else str(limit)
    return None
