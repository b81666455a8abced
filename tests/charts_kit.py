"""Renders the charts with Helm, and reads what came out as a cluster would."""

from __future__ import annotations

import functools
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from devcluster import tools
from kubedistill_api.chain import DistillationChainSpec
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.schema import structural
from kubedistill_operator.plan.compose import compose
from kubedistill_operator.plan.inputs import parse_spec

PROJECT = Path(__file__).resolve().parents[1]
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
    "checkpoint": {"interval": 10, "keepLast": 2},
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
