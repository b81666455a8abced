"""Which names resolve to which pods: what a cluster's DNS would answer. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Object = Mapping[str, Any]


def is_ready(pod: Object) -> bool:
    """Whether the condition Ready holds."""
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def _selected(service: Object, pod: Object) -> bool:
    selector = service["spec"].get("selector") or {}
    labels = pod["metadata"].get("labels") or {}
    return bool(selector) and all(labels.get(key) == value for key, value in selector.items())


def _has_address(pod: Object) -> bool:
    status = pod.get("status") or {}
    return bool(status.get("podIP")) and status.get("phase") in ("Pending", "Running")


def _published(service: Object, pod: Object) -> bool:
    """As the EndpointSlice controller: a pod that ends is not ready, unless all are published."""
    if service["spec"].get("publishNotReadyAddresses"):
        return True
    return is_ready(pod) and not pod["metadata"].get("deletionTimestamp")


def hosts(services: Iterable[Object], pods: Iterable[Object], namespace: str) -> dict[str, str]:
    """Name → address, as seen from a pod of `namespace`.

    A pod has a name of its own under a headless Service that selects it and that its `subdomain`
    names. A name that several pods hold goes to the youngest: /etc/hosts knows one address a name.
    """
    by_age = sorted(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp")))
    found: dict[str, str] = {}
    for service in services:
        name, home = service["metadata"]["name"], service["metadata"]["namespace"]
        headless = service["spec"].get("clusterIP") == "None"
        for pod in by_age:
            if pod["metadata"]["namespace"] != home or not _selected(service, pod):
                continue
            if not _has_address(pod) or not _published(service, pod):
                continue
            address, host = pod["status"]["podIP"], pod["spec"].get("hostname")
            for suffix in _suffixes(name, home, namespace):
                found[suffix] = address
                if headless and host and pod["spec"].get("subdomain") == name:
                    found[f"{host}.{suffix}"] = address
    return found


def _suffixes(service: str, home: str, namespace: str) -> list[str]:
    names = [f"{service}.{home}.svc.cluster.local", f"{service}.{home}.svc", f"{service}.{home}"]
    return [*names, service] if home == namespace else names


def hosts_file(own: Object, entries: Mapping[str, str]) -> str:
    """The text of a pod's /etc/hosts."""
    spec = own["spec"]
    own_name = spec.get("hostname") or own["metadata"]["name"]
    own_names = own_name
    if spec.get("subdomain"):
        home = own["metadata"]["namespace"]
        own_names = f"{own_name}.{spec['subdomain']}.{home}.svc.cluster.local {own_name}"
    lines = ["127.0.0.1 localhost", "::1 localhost", f"{own['status']['podIP']} {own_names}"]
    lines += [f"{address} {name}" for name, address in sorted(entries.items())]
    return "\n".join(lines) + "\n"
