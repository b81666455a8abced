"""Which names resolve to which pods: what a cluster's DNS would answer. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Object = Mapping[str, Any]


def is_ready(pod: Object) -> bool:
    """Whether the condition Ready holds."""
    conditions = pod.get("status", {}).get("conditions") or []
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def _selected(service: Object, pod: Object) -> bool:
    selector = service["spec"].get("selector") or {}
    labels = pod["metadata"].get("labels") or {}
    return bool(selector) and all(labels.get(key) == value for key, value in selector.items())


def _alive(pod: Object) -> bool:
    return pod.get("status", {}).get("phase") in ("Pending", "Running")


def hosts(services: Iterable[Object], pods: Iterable[Object], namespace: str) -> dict[str, str]:
    """Name → address, as seen from a pod of `namespace`.

    A pod has a name of its own under a headless Service that selects it and that its `subdomain`
    names; it is published when it is ready or when the Service publishes pods that are not.
    """
    pods = [pod for pod in pods if pod.get("status", {}).get("podIP") and _alive(pod)]
    found: dict[str, str] = {}
    for service in services:
        name, home = service["metadata"]["name"], service["metadata"]["namespace"]
        publish_all = bool(service["spec"].get("publishNotReadyAddresses"))
        members = [
            pod
            for pod in pods
            if pod["metadata"]["namespace"] == home
            and _selected(service, pod)
            and (publish_all or is_ready(pod))
        ]
        for pod in members:
            address = pod["status"]["podIP"]
            for suffix in _suffixes(name, home, namespace):
                found.setdefault(suffix, address)
            host = pod["spec"].get("hostname")
            headless = service["spec"].get("clusterIP") == "None"
            if host and headless and pod["spec"].get("subdomain") == name:
                for suffix in _suffixes(name, home, namespace):
                    found[f"{host}.{suffix}"] = address
    return found


def _suffixes(service: str, home: str, namespace: str) -> list[str]:
    names = [f"{service}.{home}.svc.cluster.local", f"{service}.{home}.svc", f"{service}.{home}"]
    return [*names, service] if home == namespace else names


def hosts_file(own: Object, entries: Mapping[str, str]) -> str:
    """The text of a pod's /etc/hosts."""
    lines = ["127.0.0.1 localhost", "::1 localhost"]
    own_name = own["spec"].get("hostname") or own["metadata"]["name"]
    lines.append(f"{own['status']['podIP']} {own_name}")
    lines += [f"{address} {name}" for name, address in sorted(entries.items())]
    return "\n".join(lines) + "\n"
