"""The node's environment, arguments and quantities against the kubelet's rules."""

from __future__ import annotations

from typing import Any

import pytest
from devcluster.node.environment import (
    ConfigError,
    arguments,
    environment,
    expand,
    field_value,
    quantity,
)

POD: dict[str, Any] = {
    "metadata": {
        "name": "p",
        "namespace": "team",
        "labels": {"app": "g", "b": "2"},
        "annotations": {"batch.kubernetes.io/job-completion-index": "3"},
    },
    "spec": {"containers": [{"name": "main"}], "nodeName": "n1"},
    "status": {"podIP": "127.64.1.2"},
}
DATA = {
    ("ConfigMap", "settings"): {"LEVEL": "debug", "NAME": "from-map"},
    ("Secret", "keys"): {"token": "s3cr3t"},
}


def read(kind: str, name: str) -> dict[str, str]:
    if (kind, name) not in DATA:
        raise ConfigError(f'{kind.lower()} "{name}" not found')
    return DATA[kind, name]


def made(*env: dict[str, Any], **container: Any) -> dict[str, str]:
    return environment({"name": "main", "env": list(env), **container}, POD, {"SERVICE": "s"}, read)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("$(A)", "1"),
        ("x$(A)y$(B)z", "x1y2z"),
        ("$$(A)", "$(A)"),
        ("$$$(A)", "$1"),
        ("$(MISSING)", "$(MISSING)"),
        ("$A ${A}", "$A ${A}"),
        ("$(A", "$(A"),
        ("cost: 5$", "cost: 5$"),
        ("$()", "$()"),
    ],
)
def test_expansion(text: str, wanted: str) -> None:
    assert expand(text, {"A": "1", "B": "2"}) == wanted


def test_env_sees_what_stands_before_it() -> None:
    found = made(
        {"name": "A", "value": "1"},
        {"name": "B", "value": "$(A)$(C)"},
        {"name": "C", "value": "$(B)!"},
    )
    assert (found["B"], found["C"]) == ("1$(C)", "1$(C)!")


def test_env_wins_over_env_from_and_may_refer_to_it() -> None:
    found = made(
        {"name": "NAME", "value": "own-$(LEVEL)-$(SERVICE)-$(PATH)"},
        envFrom=[{"configMapRef": {"name": "settings"}}],
    )
    assert found["NAME"] == "own-debug-s-$(PATH)"


def test_env_from_with_prefix_and_optional() -> None:
    sources = [
        {"prefix": "P_", "secretRef": {"name": "keys"}},
        {"configMapRef": {"name": "none", "optional": True}},
    ]
    assert made(envFrom=sources) == {"SERVICE": "s", "P_token": "s3cr3t"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"secretKeyRef": {"name": "x", "key": "k"}}, 'secret "x" not found'),
        ({"configMapKeyRef": {"name": "x", "key": "k"}}, 'configmap "x" not found'),
        (
            {"secretKeyRef": {"name": "keys", "key": "k"}},
            "couldn't find key k in Secret team/keys",
        ),
        (
            {"configMapKeyRef": {"name": "settings", "key": "k"}},
            "couldn't find key k in ConfigMap team/settings",
        ),
    ],
)
def test_missing_sources_in_the_kubelets_words(source: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        made({"name": "A", "valueFrom": source})
    assert str(error.value) == message
    [reference] = source.values()
    optional = {next(iter(source)): {**reference, "optional": True}}
    assert "A" not in made({"name": "A", "valueFrom": optional})


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("metadata.name", "p"),
        ("spec.nodeName", "n1"),
        ("status.podIP", "127.64.1.2"),
        ("status.podIPs", "127.64.1.2"),
        ("metadata.labels['app']", "g"),
        ("metadata.annotations['batch.kubernetes.io/job-completion-index']", "3"),
        ("metadata.labels['none']", ""),
        ("metadata.labels", 'app="g"\nb="2"'),
    ],
)
def test_fields(path: str, wanted: str) -> None:
    assert field_value(POD, path) == wanted


@pytest.mark.parametrize(
    ("resource", "divisor", "wanted"),
    [
        ("limits.memory", "1Mi", "512"),
        ("limits.memory", "0", str(512 * 2**20)),
        ("limits.cpu", "1", "2"),
        ("limits.cpu", "1m", "1500"),
        ("requests.cpu", "1", "0"),
    ],
)
def test_resource_fields(resource: str, divisor: str, wanted: str) -> None:
    source = {"resourceFieldRef": {"resource": resource, "divisor": divisor}}
    limits = {"limits": {"memory": "512Mi", "cpu": "1500m"}}
    assert made({"name": "A", "valueFrom": source}, resources=limits)["A"] == wanted


@pytest.mark.parametrize(
    ("container", "wanted"),
    [
        ({}, ["entry", "cmd"]),
        ({"args": ["a"]}, ["entry", "a"]),
        ({"command": ["c"]}, ["c"]),
        ({"command": ["c"], "args": ["$(A)", "$$(A)"]}, ["c", "1", "$(A)"]),
    ],
)
def test_command_and_args(container: dict[str, Any], wanted: list[str]) -> None:
    assert arguments(container, ("entry",), ("cmd",), {"A": "1"}) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("1", 1), ("500m", 0.5), ("2Gi", 2**31), ("1.5G", 1.5e9), ("1e3", 1000), ("128Ki", 131072)],
)
def test_quantities(text: str, wanted: float) -> None:
    assert quantity(text) == pytest.approx(wanted)


@pytest.mark.parametrize("text", ["", "x", "1 Gi", "1GiB"])
def test_no_quantities(text: str) -> None:
    with pytest.raises(ValueError, match="not a quantity"):
        quantity(text)
