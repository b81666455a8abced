"""Which names the node's pods resolve, against the rules of a cluster's DNS."""

from __future__ import annotations

from typing import Any

import pytest
from devcluster.node.names import hosts, hosts_file


def pod(name: str, **given: Any) -> dict[str, Any]:
    ready = "True" if given.get("ready", True) else "False"
    meta = {
        "name": name,
        "namespace": given.get("namespace", "team"),
        "labels": given.get("labels", {"app": "g"}),
        "creationTimestamp": given.get("created", "2026-01-01T00:00:00Z"),
    }
    if given.get("deleted"):
        meta["deletionTimestamp"] = "2026-01-01T00:01:00Z"
    return {
        "metadata": meta,
        "spec": {"hostname": given.get("hostname", name), "subdomain": given.get("subdomain", "s")},
        "status": {
            "phase": given.get("phase", "Running"),
            "podIP": given.get("address", "127.64.1.2"),
            "conditions": [{"type": "Ready", "status": ready}],
        },
    }


def service(**given: Any) -> dict[str, Any]:
    spec = {
        "clusterIP": given.get("cluster_ip", "None"),
        "selector": given.get("selector", {"app": "g"}),
        "publishNotReadyAddresses": given.get("publish", False),
    }
    home = given.get("namespace", "team")
    return {"metadata": {"name": given.get("name", "s"), "namespace": home}, "spec": spec}


@pytest.mark.parametrize(
    ("of_pod", "of_service", "resolves"),
    [
        ({}, {}, True),
        ({"ready": False}, {}, False),
        ({"ready": False}, {"publish": True}, True),
        ({"ready": False, "phase": "Pending"}, {"publish": True}, True),
        ({"address": ""}, {"publish": True}, False),
        ({"phase": "Failed"}, {"publish": True}, False),
        ({"phase": "Succeeded"}, {"publish": True}, False),
        ({"deleted": True}, {}, False),
        ({"deleted": True}, {"publish": True}, True),
        ({"subdomain": "other"}, {}, False),
        ({"subdomain": None}, {}, False),
        ({"hostname": None}, {}, False),
        ({"labels": {"app": "x"}}, {}, False),
        ({"labels": {}}, {}, False),
        ({"namespace": "elsewhere"}, {}, False),
        ({}, {"selector": {}}, False),
        ({}, {"selector": {"app": "g", "more": "1"}}, False),
        ({}, {"cluster_ip": "10.96.0.7"}, False),
        ({}, {"name": "t"}, False),
    ],
)
def test_pod_names(of_pod: dict[str, Any], of_service: dict[str, Any], resolves: bool) -> None:
    found = hosts([service(**of_service)], [pod("g-0", **of_pod)], "team")
    assert ("g-0.s" in found) == resolves
    assert ("g-0.s.team.svc.cluster.local" in found) == resolves


def test_short_names_only_from_the_same_namespace() -> None:
    assert set(hosts([service()], [pod("g-0")], "other")) == {
        f"{prefix}s.team{suffix}"
        for prefix in ("", "g-0.")
        for suffix in ("", ".svc", ".svc.cluster.local")
    }


def test_plain_services_resolve_to_a_ready_pod() -> None:
    pods = [pod("a", ready=False, address="127.64.1.2"), pod("b", address="127.64.1.3")]
    assert hosts([service(cluster_ip="10.96.0.7")], pods, "team")["s"] == "127.64.1.3"


def test_a_name_held_twice_goes_to_the_youngest() -> None:
    old = pod("g-0-a", hostname="g-0", address="127.64.1.2", deleted=True)
    new = pod("g-0-b", hostname="g-0", address="127.64.1.3", created="2026-01-01T00:02:00Z")
    for order in ([old, new], [new, old]):
        assert hosts([service(publish=True)], order, "team")["g-0.s"] == "127.64.1.3"


def test_hosts_file() -> None:
    assert hosts_file(pod("g-0"), {"x": "127.64.1.9"}).splitlines() == [
        "127.0.0.1 localhost",
        "::1 localhost",
        "127.64.1.2 g-0.s.team.svc.cluster.local g-0",
        "127.64.1.9 x",
    ]
