"""The CustomResourceDefinitions, generated from the models.

`python -m kubedistill_api.crd DIRECTORY` writes one file a kind; a test fails when they drift.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

from kubedistill_api.base import (
    CHAIN_KIND,
    CHAIN_PLURAL,
    GROUP,
    JOB_KIND,
    JOB_PLURAL,
    VERSION,
    cel,
)
from kubedistill_api.chain import DistillationChainSpec, DistillationChainStatus
from kubedistill_api.job import DistillationJobSpec, immutability_rules
from kubedistill_api.names import MAX_JOB_NAME_LENGTH
from kubedistill_api.schema import structural
from kubedistill_api.status import DistillationJobStatus

_NAME_RULE = "a lower-case letter first, then lower-case letters, digits and '-'"
_STATE = '.status.conditions[?(@.type=="Succeeded")].reason'


def _column(
    name: str, kind: str, path: str, description: str, *, wide: bool = False
) -> dict[str, Any]:
    column: dict[str, Any] = {
        "name": name,
        "type": kind,
        "jsonPath": path,
        "description": description,
    }
    if wide:
        column["priority"] = 1
    return column


_AGE = _column("Age", "date", ".metadata.creationTimestamp", "Time since creation.")

_JOB_COLUMNS = [
    _column("Student", "string", ".status.studentSummary", "The student."),
    _column("State", "string", _STATE, "Reason of the condition Succeeded."),
    _column("Progress", "string", ".status.progress.percentage", "Steps done, in percent."),
    _column("ETA", "string", ".status.progress.estimatedRemaining", "Time left."),
    _column("Loss", "string", ".status.progress.lossText", "Loss of the latest step."),
    _column("GPUs", "integer", ".status.gpus", "GPUs of the gang."),
    _AGE,
    _column("Teacher", "string", ".status.teacherSummary", "The teacher.", wide=True),
    _column("Step", "integer", ".status.progress.step", "Optimizer steps done.", wide=True),
    _column(
        "Tokens/s", "number", ".status.progress.tokensPerSecond", "Tokens a second.", wide=True
    ),
    _column("Restarts", "integer", ".status.restarts", "Attempts after the first.", wide=True),
    _column(
        "Checkpoint", "integer", ".status.checkpoint.step", "Step of the newest commit.", wide=True
    ),
]
_CHAIN_COLUMNS = [
    _column("Stage", "string", ".status.currentStage", "Running stage."),
    _column("State", "string", _STATE, "Reason of the condition Succeeded."),
    _column("Progress", "string", ".status.progress", "Percent of all stages."),
    _column("ETA", "string", ".status.estimatedRemaining", "Time left of the running job."),
    _AGE,
]


def _definition(
    kind: str,
    plural: str,
    short_name: str,
    spec: dict[str, Any],
    status: dict[str, Any],
    root_rules: list[dict[str, Any]],
    columns: list[dict[str, Any]],
    description: str,
) -> dict[str, Any]:
    schema = {
        "type": "object",
        "description": description,
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": status,
        },
        "x-kubernetes-validations": root_rules,
    }
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": columns,
        "schema": {"openAPIV3Schema": schema},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": kind,
                "listKind": f"{kind}List",
                "plural": plural,
                "singular": kind.lower(),
                "shortNames": [short_name],
                "categories": ["distill"],
            },
            "versions": [version],
        },
    }


def job_definition() -> dict[str, Any]:
    """The CRD of DistillationJob."""
    name_rules = [
        cel(
            f"size(self.metadata.name) <= {MAX_JOB_NAME_LENGTH} && "
            "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
            f"metadata.name must be at most {MAX_JOB_NAME_LENGTH} characters: {_NAME_RULE}; "
            "pods and Services are named after it",
        ),
        cel(
            "!has(self.spec.teacher) || !has(self.spec.teacher.fromJob) || "
            "self.spec.teacher.fromJob.name != self.metadata.name",
            "spec.teacher.fromJob.name is this job itself: name another job",
            ".spec.teacher.fromJob.name",
        ),
        cel(
            "!has(self.spec.student.fromJob) || "
            "self.spec.student.fromJob.name != self.metadata.name",
            "spec.student.fromJob.name is this job itself: name another job",
            ".spec.student.fromJob.name",
        ),
    ]
    started = "has(oldSelf.status) && has(oldSelf.status.startTime)"
    return _definition(
        JOB_KIND,
        JOB_PLURAL,
        "dj",
        structural(DistillationJobSpec),
        structural(DistillationJobStatus),
        name_rules + immutability_rules(started),
        _JOB_COLUMNS,
        "Makes one student model by one method.",
    )


def chain_definition() -> dict[str, Any]:
    """The CRD of DistillationChain."""
    name_rules = [
        cel(
            "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
            f"metadata.name must be {_NAME_RULE}",
        ),
        cel(
            "self.spec.stages.all(s, size(self.metadata.name) + 1 + size(s.name) "
            f"<= {MAX_JOB_NAME_LENGTH})",
            "metadata.name and a stage's name together must be at most "
            f"{MAX_JOB_NAME_LENGTH - 1} characters: a stage's job is named <chain>-<stage>",
        ),
    ]
    return _definition(
        CHAIN_KIND,
        CHAIN_PLURAL,
        "dchain",
        structural(DistillationChainSpec),
        structural(DistillationChainStatus),
        name_rules,
        _CHAIN_COLUMNS,
        "Owns a progressive sequence of DistillationJobs.",
    )


_HEADER = "# Generated by `python -m kubedistill_api.crd`. Do not edit.\n"


def rendered() -> dict[str, str]:
    """File name → content, for both CRDs."""
    return {
        f"{GROUP}_{plural}.yaml": _HEADER + yaml.safe_dump(definition, sort_keys=False, width=100)
        for plural, definition in (
            (JOB_PLURAL, job_definition()),
            (CHAIN_PLURAL, chain_definition()),
        )
    }


def main() -> None:
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else "crds")
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in rendered().items():
        (directory / name).write_text(content)
        sys.stdout.write(f"wrote {directory / name}\n")


if __name__ == "__main__":
    main()
