"""MODEL_CARD.md and report.json of a finished model."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

from kubedistill_api.runspec import RunSpec
from kubedistill_api.status import Metric

from kubedistill_trainer.data.dataset import Dataset


def report(run: RunSpec, dataset: Dataset, metrics: list[Metric], parameters: int) -> str:
    """report.json: figures, and the inputs that they belong to."""
    content: dict[str, Any] = {
        "name": run.name,
        "namespace": run.namespace,
        "method": _method(run),
        "parameters": parameters,
        "metrics": {metric.name: metric.value for metric in metrics},
        "heldOut": {
            "sequences": len(dataset.split.heldout),
            "tokens": dataset.packed.take(dataset.split.heldout).valid_tokens,
        },
        "training": {
            "steps": dataset.total_steps,
            "sequences": len(dataset.split.training),
            "tokensPerEpoch": dataset.packed.take(dataset.split.training).valid_tokens,
            **run.spec.training.to_wire(),
        },
        "teacher": run.teacher_model.to_wire() if run.teacher_model else None,
        "dataDigest": dataset.digest,
        "tokenizerDigest": dataset.tokenizer.digest,
        "inputsDigest": run.inputs_digest,
        "version": version("kubedistill"),
    }
    return json.dumps(content, indent=2) + "\n"


def card(run: RunSpec, dataset: Dataset, metrics: list[Metric], parameters: int) -> str:
    """The model card, with the front matter that Hugging Face reads."""
    figures = "\n".join(f"| {metric.name} | {metric.value:.4g} |" for metric in metrics)
    sources = "\n".join(f"- `{source.uri}`" for source in run.spec.data.sources)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [kubedistill, {_method(run)}]
---
# {run.name}

A language model of {parameters:,} parameters, made by kubedistill {version("kubedistill")}.

| | |
|---|---|
| method | {_method_text(run)} |
| teacher | {_teacher_text(run)} |
| student began as | {_student_text(run)} |
| steps | {dataset.total_steps} of {run.spec.training.global_batch_size} sequences |

## Held-out figures
| figure | value |
|---|---|
{figures}

Measured on {len(dataset.split.heldout)} sequences that training never saw.

## Data
{sources}

SHA-256 of the data: `{dataset.digest}`. Digest of the tokenizer: `{dataset.tokenizer.digest}`.

## Limits
The model knows what its teacher and its data hold, and repeats their errors and leanings.
"""


def _method(run: RunSpec) -> str:
    return "distill" if run.spec.distill is not None else "fineTune"


def _method_text(run: RunSpec) -> str:
    if run.spec.distill is None:
        return "fine-tuning on labels"
    objective = run.spec.distill.objective
    loss: str = objective.loss
    if loss == "JSD":
        loss += f"(β = {objective.beta:g})"
    if objective.mix is not None:
        weights = objective.mix.to_wire()
        loss = " + ".join(f"{weight:g} {name}" for name, weight in weights.items() if weight)
    features = f", {len(objective.features)} feature terms" if objective.features else ""
    return (
        f"distillation, {loss} at T = {objective.temperature:g}, "
        f"soft weight {objective.soft_weight:g}{features}"
    )


def _teacher_text(run: RunSpec) -> str:
    if run.teacher_model is None:
        return "none"
    made_by = f", made by `{run.teacher_model.job}`" if run.teacher_model.job else ""
    return f"`{run.teacher_model.uri}`{made_by}"


def _student_text(run: RunSpec) -> str:
    student = run.spec.student
    if student.from_teacher is not None:
        return f"{student.from_teacher.layers} layers of the teacher"
    if student.config is not None:
        return f"random weights ({student.config.get('model_type')})"
    return f"`{run.student_model.uri}`" if run.student_model else "unknown"
