"""The operator's chart: what Helm renders from values, and which values it refuses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from charts_kit import (
    FULL,
    OPERATOR,
    PROJECT,
    Chart,
    Object,
    of_kind,
    only,
)
from kubedistill_api import names
from kubedistill_operator import rbac
from kubedistill_operator.settings import Settings

OPERATOR_VALUES: dict[str, Object] = {
    "defaults": {},
    "namespaces": {"watchNamespaces": ["one", "two"]},
    "monitored": {
        "metrics": {
            "service": {"enabled": True, "annotations": {"a": "b"}},
            "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        },
        "watchNamespaces": ["one"],
    },
    "replicated": {
        "operator": {"replicas": 3, "podLabels": {"a": "b"}, "podAnnotations": {"c": "d"}},
        "podDisruptionBudget": {"maxUnavailable": "50%"},
        "priorityClassName": "system-cluster-critical",
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "tolerations": [{"operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "topologySpreadConstraints": [{"maxSkew": 1}],
        "imagePullSecrets": [{"name": "pull"}],
    },
    "configured": {
        "image": {"repository": "example/operator", "digest": "sha256:" + "a" * 64},
        "trainerImage": {"repository": "example/trainer", "tag": "1.2", "pullPolicy": "Always"},
        "trainerEnv": {"OMP_NUM_THREADS": 4, "QUOTED": 'a "b" $c'},
        "watchNamespaces": ["one", "two"],
        "operator": {
            "bindToPodIP": True,
            "healthPort": 9000,
            "logLevel": "DEBUG",
            "leaderElection": False,
            "settings": {"workers": 16, "progressPollSeconds": 2.5, "identity": "it"},
        },
        "networkPolicy": {"enabled": True, "metricsFrom": [{"namespaceSelector": {}}]},
        "serviceAccount": {"create": False, "name": "mine"},
        "rbac": {"create": False},
        "crds": {"install": False},
    },
}


@pytest.fixture(params=OPERATOR_VALUES)
def operator_objects(request: pytest.FixtureRequest, operator: Chart) -> list[Object]:
    return operator.objects(OPERATOR_VALUES[request.param])


def expanded(rules: list[Object]) -> set[tuple[str, str, str]]:
    """Each (group, resource, verb)."""
    return {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def test_operator_chart_lints(operator: Chart) -> None:
    operator.lint({})
    operator.lint(OPERATOR_VALUES["configured"])


def rules_of(objects: list[Object]) -> set[tuple[str, str, str]]:
    roles = of_kind(objects, "Role") + of_kind(objects, "ClusterRole")
    return {rule for role in roles for rule in expanded(role["rules"])}


def test_operator_may_do_what_it_does_and_no_more(operator: Chart) -> None:
    objects = operator.objects()
    assert expanded(only(objects, "ClusterRole")["rules"]) == expanded(rbac.RULES)
    lease = only(objects, "Role")
    assert lease["metadata"]["namespace"] == "lab"
    assert expanded(lease["rules"]) == expanded(rbac.LEASE_RULES)


def test_watched_namespaces_make_roles_of_the_cluster_role(operator: Chart) -> None:
    objects = operator.objects({"watchNamespaces": ["one", "two"]})
    assert not of_kind(objects, "ClusterRole") + of_kind(objects, "ClusterRoleBinding")
    assert rules_of(objects) == expanded(rbac.RULES + rbac.LEASE_RULES)
    roles = {(r["metadata"]["namespace"], r["metadata"]["name"]) for r in of_kind(objects, "Role")}
    assert roles == {
        ("one", "demo-kubedistill"),
        ("two", "demo-kubedistill"),
        ("lab", "demo-kubedistill-leader-election"),
    }


def test_bindings_bind_the_operators_account(operator_objects: list[Object]) -> None:
    account = only(operator_objects, "Deployment")["spec"]["template"]["spec"]["serviceAccountName"]
    names_of_roles = {
        (r["kind"], r["metadata"].get("namespace"), r["metadata"]["name"])
        for r in of_kind(operator_objects, "Role") + of_kind(operator_objects, "ClusterRole")
    }
    bindings = of_kind(operator_objects, "RoleBinding") + of_kind(
        operator_objects, "ClusterRoleBinding"
    )
    bound = set()
    for binding in bindings:
        assert binding["subjects"] == [
            {"kind": "ServiceAccount", "name": account, "namespace": "lab"}
        ]
        reference = binding["roleRef"]
        bound.add((reference["kind"], binding["metadata"].get("namespace"), reference["name"]))
    assert bound == names_of_roles


def test_no_secrets_and_no_wildcards(operator_objects: list[Object]) -> None:
    for rule in rules_of(operator_objects):
        assert "secrets" not in rule
        assert "namespaces" not in rule
        assert not any("*" in part for part in rule)


def test_crds_stay_when_the_release_goes(operator: Chart) -> None:
    crds = of_kind(operator.objects(), "CustomResourceDefinition")
    sources = [yaml.safe_load(path.read_text()) for path in (PROJECT / "crds").glob("*.yaml")]
    assert len(crds) == 2
    for crd in crds:
        assert crd["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
        [source] = [s for s in sources if s["metadata"]["name"] == crd["metadata"]["name"]]
        assert crd["spec"] == source["spec"], "the definition passes through Helm unchanged"
    assert not of_kind(operator.objects({"crds": {"install": False}}), "CustomResourceDefinition")


def containers(objects: list[Object]) -> Iterator[tuple[Object, Object]]:
    pod = only(objects, "Deployment")["spec"]["template"]["spec"]
    for container in pod["containers"]:
        yield pod, container


def test_pods_are_restricted(operator_objects: list[Object]) -> None:
    for pod, container in containers(operator_objects):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 65532
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["volumeMounts"] == [{"name": "tmp", "mountPath": "/tmp"}]
        assert pod["volumes"] == [{"name": "tmp", "emptyDir": {}}]
        assert not pod.get("hostNetwork")


def test_nothing_is_called_latest(operator: Chart, chain: Chart) -> None:
    assert ":latest" not in operator.text(OPERATOR_VALUES["configured"])
    assert ":latest" not in operator.text()
    assert "latest" not in chain.text(FULL)
    version = yaml.safe_load((OPERATOR / "Chart.yaml").read_text())["appVersion"]
    [(_, container)] = containers(operator.objects())
    assert container["image"] == f"kubedistill/operator:{version}"


def environment(objects: list[Object]) -> dict[str, Any]:
    [(_, container)] = containers(objects)
    found = [entry["name"] for entry in container["env"]]
    assert len(found) == len(set(found)), "no variable is given twice"
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}


def test_variables_are_settings_of_the_operator(operator_objects: list[Object]) -> None:
    prefix = "KUBEDISTILL_"
    for name in environment(operator_objects):
        if name.startswith(prefix):
            assert name.removeprefix(prefix).lower() in Settings.model_fields, name


def test_the_operator_reads_its_settings(operator: Chart, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = environment(operator.objects(OPERATOR_VALUES["configured"]))
    assert variables.pop("KUBEDISTILL_BIND_ADDRESS") == {"fieldRef": {"fieldPath": "status.podIP"}}
    assert variables.pop("POD_NAME") == {"fieldRef": {"fieldPath": "metadata.name"}}
    namespace = variables.pop("KUBEDISTILL_NAMESPACE")
    assert namespace == {"fieldRef": {"fieldPath": "metadata.namespace"}}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.trainer_image == "example/trainer:1.2"
    assert settings.trainer_image_pull_policy == "Always"
    assert settings.trainer_env == {"OMP_NUM_THREADS": "4", "QUOTED": 'a "b" $c'}
    assert settings.watch_namespaces == ["one", "two"]
    assert settings.health_port == 9000
    assert settings.log_level == "DEBUG"
    assert settings.leader_election is False
    assert settings.lease_name == "demo-kubedistill"
    assert settings.workers == 16
    assert settings.progress_poll_seconds == 2.5
    assert settings.identity == "it"


def test_defaults_are_the_operators_own(operator: Chart, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(operator.objects()).items():
        if isinstance(value, str):
            monkeypatch.setenv(name, value)
    settings, fresh = Settings(), Settings.model_fields
    for name in ("leader_election", "health_port", "log_level", "watch_namespaces", "trainer_env"):
        assert getattr(settings, name) == fresh[name].default, name


def test_probes_and_port(operator_objects: list[Object]) -> None:
    port = environment(operator_objects)["KUBEDISTILL_HEALTH_PORT"]
    for _, container in containers(operator_objects):
        assert container["ports"] == [
            {"name": "http", "containerPort": int(port), "protocol": "TCP"}
        ]
        assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "http"}
        assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}


def test_extras_are_off_by_default(operator: Chart) -> None:
    assert {found["kind"] for found in operator.objects()} == {
        "CustomResourceDefinition", "ServiceAccount", "Role", "RoleBinding", "ClusterRole",
        "ClusterRoleBinding", "Deployment",
    }  # fmt: skip


def test_budget_needs_a_second_replica(operator: Chart) -> None:
    budget = only(operator.objects(OPERATOR_VALUES["replicated"]), "PodDisruptionBudget")
    assert budget["spec"]["maxUnavailable"] == "50%"


def test_selectors_find_the_operator(operator: Chart) -> None:
    values = OPERATOR_VALUES["monitored"] | {
        "networkPolicy": {"enabled": True},
        "operator": {"replicas": 2},
    }
    objects = operator.objects(values)
    deployment = only(objects, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    service = only(objects, "Service")
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        only(objects, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        only(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
    ]
    for selector in selectors:
        assert selector.items() <= labels
    monitor = only(objects, "ServiceMonitor")
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    assert wanted <= service["metadata"]["labels"].items()
    assert monitor["spec"]["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
    assert monitor["metadata"]["labels"]["release"] == "prometheus"


def test_pod_monitor_finds_and_labels_the_trainers(operator: Chart) -> None:
    spec = only(operator.objects(OPERATOR_VALUES["monitored"]), "PodMonitor")["spec"]
    assert spec["selector"]["matchLabels"] == {names.LABEL_MANAGED_BY: names.MANAGER}
    expressions = {e["key"]: e.get("values") for e in spec["selector"]["matchExpressions"]}
    assert expressions == {
        names.LABEL_JOB: None,
        names.LABEL_ROLE: [names.ROLE_STUDENT, names.ROLE_TEACHER],
    }
    assert spec["namespaceSelector"] == {"matchNames": ["one"]}
    [keep, *labelled] = spec["podMetricsEndpoints"][0]["relabelings"]
    assert keep["action"] == "keep"
    ports = [port for port in range(1, 65536) if re.fullmatch(keep["regex"], str(port))]
    assert ports == [names.EXPORTER_PORT + rank for rank in range(16)]
    sources = {rule["targetLabel"]: rule["sourceLabels"] for rule in labelled}
    assert "job" not in sources

    def pod_label(label: str) -> list[str]:
        return ["__meta_kubernetes_pod_label_" + re.sub(r"[^a-zA-Z0-9_]", "_", label)]

    assert sources == {
        "namespace": ["__meta_kubernetes_namespace"],
        "pod": ["__meta_kubernetes_pod_name"],
        "distillation_job": pod_label(names.LABEL_JOB),
        "chain": pod_label(names.LABEL_CHAIN),
        "stage": pod_label(names.LABEL_STAGE),
        "role": pod_label(names.LABEL_ROLE),
    }


def test_network_policy_lets_progress_be_read(operator: Chart) -> None:
    policy = only(operator.objects({"networkPolicy": {"enabled": True}}), "NetworkPolicy")
    ports = {p["port"] for rule in policy["spec"]["egress"] for p in rule["ports"]}
    assert ports == {53, 443, 6443, names.EXPORTER_PORT}


def test_bad_values_of_the_operator_are_refused(operator: Chart) -> None:
    refusal = operator.refusal(
        {
            "imagee": {},
            "image": {"repository": "example/operator", "digest": "sha256:short"},
            "operator": {"replica": 2, "replicas": "two", "logLevel": "LOUD"},
            "trainerEnv": {"A": {}},
            "watchNamespaces": ["Not_A_Name"],
        }
    )
    for message in (
        "additional properties 'imagee' not allowed",
        "at '/image/digest'",
        "additional properties 'replica' not allowed",
        "at '/operator/replicas': got string, want integer",
        "at '/operator/logLevel': value must be one of",
        "at '/trainerEnv/A': got object, want",
        "at '/watchNamespaces/0'",
    ):
        assert message in refusal


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"operator": {"settings": {"logLevel": "DEBUG"}}},
            "operator.settings.logLevel: set operator.logLevel instead",
        ),
        (
            {"serviceAccount": {"create": False}},
            "serviceAccount.name is needed when serviceAccount.create is false",
        ),
    ],
)
def test_contradictions_in_the_operators_values_are_refused(
    operator: Chart, values: Object, message: str
) -> None:
    assert message in operator.refusal(values)


def test_operator_notes_say_what_next(operator: Chart) -> None:
    notes = operator.notes({"watchNamespaces": ["one", "two"]})
    assert "one, two" in notes
    assert "rollout status deployment/demo-kubedistill" in notes
    assert "kubectl get distill" in notes
