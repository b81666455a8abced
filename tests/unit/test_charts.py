"""The charts: what Helm renders from values, and which values it refuses."""

from __future__ import annotations

import functools
import json
import re
import runpy
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from devcluster import tools
from kubedistill_api import names
from kubedistill_api.chain import DistillationChainSpec
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.schema import structural
from kubedistill_operator import rbac
from kubedistill_operator.plan.compose import compose
from kubedistill_operator.plan.inputs import parse_spec
from kubedistill_operator.settings import Settings

PROJECT = Path(__file__).resolve().parents[2]
CHARTS = PROJECT / "charts"
OPERATOR = CHARTS / "kubedistill"
CHAIN = CHARTS / "distillation-chain"

Object = dict[str, Any]


class GoLoader(yaml.SafeLoader):
    """Reads `1e-05` as a number, as the YAML of Helm, kubectl and the API server does."""


GoLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)

MINIMAL: Object = {
    "initialTeacher": {"model": {"uri": "s3://models/large"}},
    "data": {"sources": [{"uri": "s3://data/chats.jsonl"}]},
    "storage": {"uri": "s3://runs/support"},
    "stages": [{"name": "medium", "student": {"fromTeacher": {"layers": 4}}}],
}
FULL: Object = MINIMAL | {
    "name": "support",
    "labels": {"team": "research"},
    "annotations": {"note": "weekly"},
    "data": {
        "sources": [{"uri": "s3://data/chats.jsonl", "textField": "body"}],
        "tokenizer": {"uri": "s3://models/large"},
        "sequenceLength": 128,
        "holdout": 0.1,
        "maxBadRecords": 3,
    },
    "training": {
        "maxSteps": 1_000_000,
        "globalBatchSize": 16,
        "microBatchSize": 2,
        "learningRate": 1e-7,
        "precision": "FP32",
        "deepSpeed": {"zeroStage": 3},
    },
    "workers": {
        "nodes": 2,
        "gpusPerNode": 8,
        "template": {"spec": {"nodeSelector": {"gpu": "h100"}}},
    },
    "teacher": {"delivery": "Stream", "payload": "Sparse", "topK": 8, "workers": {"replicas": 2}},
    "distill": {"objective": {"temperature": 4, "softWeight": 0.9}},
    "checkpoint": {"intervalSteps": 10, "keepLast": 2},
    "backoffLimit": 0,
    "activeDeadlineSeconds": 3600,
    "stallTimeoutSeconds": 60,
    "storage": {
        "uri": "s3://runs/support/",
        "endpoint": "http://s3.example.com:9000",
        "region": "eu-central-1",
        "secretName": "s3",
    },
    "stages": [
        {"name": "medium", "student": {"fromTeacher": {"layers": 4}}},
        {
            "name": "small",
            "student": {"config": {"model_type": "llama", "hidden_size": 64}},
            "workers": {"gpusPerNode": 0},
            "training": {"learningRate": 5.0e-4},
        },
    ],
    "suspend": False,
    "control": {"enabled": True},
}


@functools.cache
def helm(command: tuple[str, ...], values: str) -> subprocess.CompletedProcess[str]:
    """Run Helm with values on its standard input; the same call is made once."""
    return subprocess.run(
        [str(tools.helm()), *command, "-f", "-"],
        input=values,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@dataclass(frozen=True)
class Chart:
    """One chart, rendered as release `demo` in namespace `lab`."""

    folder: Path

    def _run(self, command: tuple[str, ...], values: Object | str | None, *extra: str) -> Any:
        text = values if isinstance(values, str) else yaml.safe_dump(values or {})
        return helm((*command, str(self.folder), *extra), text)

    def _template(self, values: Object | str | None, *extra: str) -> Any:
        return self._run(("template", "demo", "--namespace", "lab"), values, *extra)

    def text(self, values: Object | str | None = None, *extra: str) -> str:
        result = self._template(values, *extra)
        assert result.returncode == 0, result.stderr
        return str(result.stdout)

    def objects(self, values: Object | str | None = None, *extra: str) -> list[Object]:
        documents = yaml.load_all(self.text(values, *extra), GoLoader)
        return [document for document in documents if document]

    def refusal(self, values: Object | str | None = None, *extra: str) -> str:
        result = self._template(values, *extra)
        assert result.returncode != 0, result.stdout
        return str(result.stderr)

    def notes(self, values: Object) -> str:
        command = ("install", "demo", "--namespace", "lab", "--dry-run=client")
        result = self._run(command, values)
        assert result.returncode == 0, result.stderr
        return str(result.stdout.partition("NOTES:")[2])

    def lint(self, values: Object) -> None:
        result = self._run(("lint", "--strict"), values)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture
def operator() -> Chart:
    return Chart(OPERATOR)


@pytest.fixture
def chain() -> Chart:
    return Chart(CHAIN)


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [found for found in objects if found["kind"] == kind]


def only(objects: list[Object], kind: str) -> Object:
    [found] = of_kind(objects, kind)
    return found


def closed(node: Object) -> Object:
    """A structural schema that refuses unknown fields, as strict field validation does."""
    result = dict(node)
    if "properties" in node:
        result["properties"] = {name: closed(child) for name, child in node["properties"].items()}
        result["additionalProperties"] = False
    if "items" in node:
        result["items"] = closed(node["items"])
    return result


def chain_spec(objects: list[Object]) -> DistillationChainSpec:
    """The spec of the one chain, after everything that the API server would check by schema."""
    raw = only(objects, "DistillationChain")["spec"]
    # A structural schema has the boolean exclusiveMinimum of draft 4.
    jsonschema.Draft4Validator(closed(structural(DistillationChainSpec))).validate(raw)
    return DistillationChainSpec.model_validate(raw)


def job_spec(raw: Object) -> DistillationJobSpec:
    """A job's spec, after the schema and the rules between its fields."""
    jsonschema.Draft4Validator(closed(structural(DistillationJobSpec))).validate(raw)
    spec, problems = parse_spec(raw)
    assert spec is not None, [problem.sentence() for problem in problems]
    return spec


def stage_jobs(spec: DistillationChainSpec) -> list[DistillationJobSpec]:
    """Every stage as the operator composes it."""
    return [job_spec(compose("demo", spec, index)) for index in range(len(spec.stages))]


# What is generated.


def test_generated_files_do_not_drift() -> None:
    """`python charts/render.py` writes them."""
    rendered = runpy.run_path(str(CHARTS / "render.py"))["rendered"]()
    for name, content in rendered.items():
        assert (CHARTS / name).read_text() == content, f"{name}: run python charts/render.py"


def test_crd_copies_are_the_crds() -> None:
    copies = {path.name: path.read_text() for path in (OPERATOR / "files/crds").iterdir()}
    assert copies == {path.name: path.read_text() for path in (PROJECT / "crds").glob("*.yaml")}


@pytest.mark.parametrize("folder", [OPERATOR, CHAIN])
def test_every_value_is_in_the_schema_and_the_readme(folder: Path) -> None:
    schema = json.loads((folder / "values.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    readme = (folder / "README.md").read_text()
    given = yaml.safe_load((folder / "values.yaml").read_text())
    assert given.keys() <= schema["properties"].keys()
    for name in schema["properties"].keys() - {"global"}:
        assert f"`{name}" in readme, f"{name} is not in {folder.name}/README.md"


# The operator's chart.

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


# The chart of a chain.


def test_chain_chart_lints(chain: Chart) -> None:
    chain.lint(MINIMAL)
    chain.lint(FULL)


def test_what_is_not_set_is_not_rendered(chain: Chart) -> None:
    [found] = chain.objects(MINIMAL)
    assert found["metadata"]["name"] == "demo"
    assert found["metadata"]["namespace"] == "lab"
    assert found["spec"] == {
        "initialTeacher": MINIMAL["initialTeacher"],
        "template": {
            "data": MINIMAL["data"],
            "distill": {},
            "storage": MINIMAL["storage"],
        },
        "stages": MINIMAL["stages"],
    }
    [job] = stage_jobs(chain_spec([found]))
    assert job.training == DistillationJobSpec.model_fields["training"].default


def test_every_value_reaches_the_chain(chain: Chart) -> None:
    objects = chain.objects(FULL)
    found = only(objects, "DistillationChain")
    assert found["metadata"]["name"] == "support"
    assert found["metadata"]["labels"]["team"] == "research"
    assert found["metadata"]["annotations"] == {"note": "weekly"}
    template = found["spec"]["template"]
    for name in ("data", "training", "workers", "teacher", "distill", "checkpoint"):
        assert template[name] == FULL[name], name
    for name in ("backoffLimit", "activeDeadlineSeconds", "stallTimeoutSeconds"):
        assert template[name] == FULL[name], name
    assert template["storage"] == {
        "uri": "s3://runs/support/",
        "endpoint": "http://s3.example.com:9000",
        "region": "eu-central-1",
        "secretRef": {"name": "s3"},
    }
    assert found["spec"]["stages"] == FULL["stages"]
    assert found["spec"]["suspend"] is False
    medium, small = stage_jobs(chain_spec(objects))
    assert medium.backoff_limit == 0
    assert medium.workers.gpus_per_node == 8
    assert small.workers.gpus_per_node == 0
    assert small.training.learning_rate == 5e-4


def test_stages_of_both_methods(chain: Chart) -> None:
    """A fine-tuning stage gets no teacher and no objective from what the others share."""
    stages = [
        *MINIMAL["stages"],
        {
            "name": "polished",
            "fineTune": {},
            "data": {"sources": [{"uri": "s3://data/curated.jsonl"}]},
        },
        {
            "name": "small",
            "distill": {"objective": {"softWeight": 0}},
            "student": {"fromTeacher": {"layers": 2}},
            "teacher": {"fromJob": {"name": "demo-polished"}},
        },
    ]
    values = MINIMAL | {
        "stages": stages,
        "distill": {"objective": {"temperature": 2, "softWeight": 0.7}},
        "teacher": {"delivery": "Stream"},
    }
    medium, polished, small = stage_jobs(chain_spec(chain.objects(values)))
    assert medium.distill is not None and medium.distill.objective.soft_weight == 0.7
    assert medium.teacher is not None and medium.teacher.delivery == "Stream"
    assert polished.fine_tune is not None and polished.teacher is None
    assert polished.student.from_job is not None
    assert polished.student.from_job.name == "demo-medium"
    assert small.distill is not None and small.teacher is not None
    assert small.distill.objective.temperature == 2
    assert small.distill.objective.soft_weight == 0, "a zero of a stage wins"
    assert small.teacher.from_job is not None and small.teacher.delivery == "Stream"


def test_control_trains_the_last_student_without_a_teacher(chain: Chart) -> None:
    objects = chain.objects(FULL)
    control = only(objects, "DistillationJob")
    assert control["metadata"]["name"] == "support-control"
    spec = job_spec(control["spec"])
    *_, last = stage_jobs(chain_spec(objects))
    assert spec.fine_tune is not None and spec.teacher is None
    for part in ("student", "data", "training", "workers", "storage", "checkpoint"):
        assert getattr(spec, part) == getattr(last, part), part
    assert not of_kind(chain.objects(MINIMAL), "DistillationJob")


def test_secret_is_made_only_when_asked_for(chain: Chart) -> None:
    assert not of_kind(chain.objects(FULL), "Secret")
    credentials = {"create": True, "accessKeyId": "key", "secretAccessKey": "0123"}
    storage = MINIMAL["storage"] | {"credentials": credentials}
    objects = chain.objects(MINIMAL | {"storage": storage})
    secret = only(objects, "Secret")
    assert secret["metadata"]["name"] == "demo-s3"
    assert secret["stringData"] == dict(zip(names.SECRET_KEYS, ("key", "0123"), strict=True))
    spec = chain_spec(objects)
    assert spec.template["storage"]["secretRef"] == {"name": "demo-s3"}
    assert "credentials" not in spec.template["storage"]
    named = MINIMAL | {"storage": storage | {"secretName": "mine"}}
    assert only(chain.objects(named), "Secret")["metadata"]["name"] == "mine"


def test_numbers_in_a_file_stay_numbers(chain: Chart) -> None:
    written = ["2.0e-5", "1e-5", "0.00001", "1E-05", "1"]
    stages = [
        f"- {{name: stage-{index}, student: {{fromTeacher: {{layers: 2}}}}, "
        f"training: {{learningRate: {number}}}}}"
        for index, number in enumerate(written)
    ]
    shared = {name: value for name, value in MINIMAL.items() if name != "stages"}
    values = yaml.safe_dump(shared) + "\n".join(["stages:", *stages])
    jobs = stage_jobs(chain_spec(chain.objects(values)))
    assert [job.training.learning_rate for job in jobs] == [float(number) for number in written]


def test_kubectl_reads_rendered_numbers_as_numbers(chain: Chart) -> None:
    rendered = chain.text(FULL | {"control": {"enabled": False}})
    result = subprocess.run(
        [str(tools.kubectl()), "annotate", "--local", "-f", "-", "read=yes", "-o", "json"],
        input=rendered, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    training = json.loads(result.stdout)["spec"]["template"]["training"]
    assert training["learningRate"] == 1e-7
    assert training["maxSteps"] == 1_000_000


def test_decimal_numbers_on_the_command_line(chain: Chart) -> None:
    """`--set` makes text of a decimal number, which is refused; `--set-json` keeps it."""
    message = "at '/training/learningRate': got string, want number"
    assert message in chain.refusal(MINIMAL, "--set", "training.learningRate=1e-5")
    assert message in chain.refusal(MINIMAL, "--set", "training.learningRate=0.5")
    objects = chain.objects(
        MINIMAL, "--set-json", "training.learningRate=1e-5", "--set", "training.epochs=2"
    )
    assert chain_spec(objects).template["training"] == {"learningRate": 1e-5, "epochs": 2}


STAGE: Object = MINIMAL["stages"][0]


def test_values_that_are_needed(chain: Chart) -> None:
    refusal = chain.refusal({})
    assert "missing property 'stages'" in refusal
    assert "at '/storage': missing property 'uri'" in refusal


def test_bad_values_of_a_chain_are_refused(chain: Chart) -> None:
    refusal = chain.refusal(
        {
            "storage": {"uri": "/somewhere"},
            "traning": {},
            "training": {"epoch": 1, "learningRate": 0},
            "distill": {"objective": {"softWeight": 1.5}},
            "teacher": {"model": {}},
            "workers": {"nodes": 0},
            "stages": [
                {"student": {}},
                STAGE | {"name": "Bad_Name"},
                STAGE | {"studnt": {}},
                STAGE | {"suspend": True},
            ],
        }
    )
    for message in (
        "at '/storage/uri': '/somewhere' does not match pattern",
        "additional properties 'traning' not allowed",
        "additional properties 'epoch' not allowed",
        "at '/training/learningRate': exclusiveMinimum: got 0, want 0",
        "at '/distill/objective/softWeight': maximum: got 1.5, want 1",
        "additional properties 'model' not allowed",
        "at '/workers/nodes': minimum: got 0, want 1",
        "at '/stages/0': missing property 'name'",
        "at '/stages/1/name': 'Bad_Name' does not match pattern",
        "additional properties 'studnt' not allowed",
        "additional properties 'suspend' not allowed",
    ):
        assert message in refusal
    assert "at '/stages': minItems: got 0, want 1" in chain.refusal(MINIMAL | {"stages": []})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"initialTeacher": {}}, "stage medium has no teacher: set initialTeacher.model.uri"),
        ({"data": {}}, "stage medium has no data: set data.sources"),
        ({"stages": [{"name": "medium"}]}, "stage medium has no student: set student.model.uri"),
        ({"stages": [{"name": "medium", "fineTune": {}}]}, "stage medium has no student"),
        (
            {"stages": [STAGE, {"name": "polished", "fineTune": {}}], "control": {"enabled": True}},
            "the last stage polished has no student of its own",
        ),
        (
            {"stages": [STAGE | {"fineTune": {}, "distill": {}}]},
            "stage medium has two methods: keep one of distill and fineTune",
        ),
        ({"control": {"enabled": True}}, "student of the last stage medium is fromTeacher"),
        (
            {"storage": MINIMAL["storage"] | {"credentials": {"create": True}}},
            "storage.credentials.create needs",
        ),
    ],
)
def test_incomplete_chains_are_refused(chain: Chart, change: Object, message: str) -> None:
    assert message in chain.refusal(MINIMAL | change)


def test_chain_notes_say_where_the_models_will_lie(chain: Chart) -> None:
    notes = chain.notes(FULL)
    assert "kubectl -n lab get distill" in notes
    assert "kubectl -n lab describe dchain support" in notes
    for stage in ("medium", "small"):
        job = names.stage_job_name("support", stage)
        assert f"{names.models_uri('s3://runs/support', 'lab', job)}/" in notes
    assert "support-control" in notes
