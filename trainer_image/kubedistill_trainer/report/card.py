"""MODEL_CARD.md of a finished model."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from kubedistill_api.data import DataSource
from kubedistill_api.runspec import RunSpec
from kubedistill_api.status import Metric

from kubedistill_trainer.data.dataset import Dataset
from kubedistill_trainer.report.compare import Comparison
from kubedistill_trainer.report.text import SIGNALS


def card(
    run: RunSpec,
    dataset: Dataset,
    metrics: Sequence[Metric],
    parameters: int,
    compared: Comparison,
) -> str:
    """The model card, with the front matter that Hugging Face reads."""
    figures = "\n".join(f"| {metric.name} | {metric.value:.4g} |" for metric in metrics)
    sources = "\n".join(f"- {_source_text(source)}" for source in run.spec.data.sources)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [kubedistill, {run.spec.method}]
---
# {run.name}

A language model of {parameters:,} parameters, made by kubedistill {version("kubedistill")}.

| | |
|---|---|
| method | {_method_text(run)} |
| teacher | {_teacher_text(run)} |
| student began as | {student_text(run)} |
| steps | {dataset.total_steps} of {run.spec.training.global_batch_size} sequences |

## Figures
| figure | value |
|---|---|
{figures}

Measured on {len(dataset.split.heldout)} sequences that training never saw{_asked(compared)}; more in
`report.html`.

## Data
{sources}

SHA-256 of the data: `{dataset.digest}`. Digest of the tokenizer: `{dataset.tokenizer.digest}`.

## Limits
The model knows what its teacher and its data hold, and repeats their errors and leanings.
"""


def _asked(compared: Comparison) -> str:
    """What the model was asked beside."""
    parts = [f"{task.examples} examples of `{task.name}`" for task in compared.student.tasks]
    if compared.student.questions is not None:
        parts.append(f"{compared.student.questions.asked} questions with known answers")
    return f", and on {', '.join(parts)}" if parts else ""


def _source_text(source: DataSource) -> str:
    text = f"`{source.uri}`"
    if source.origin == "Teacher":
        text += ", answered by the teacher"
    return text if source.weight == 1 else f"{text}, weight {source.weight:g}"


def _method_text(run: RunSpec) -> str:
    if run.spec.prune is not None:
        return f"pruning, {run.spec.prune.summary}"
    if run.spec.quantize is not None:
        return f"quantisation, {run.spec.quantize.scheme} by {run.spec.quantize.algorithm}"
    if run.spec.evaluate is not None:
        return "evaluation; the model is as it was"
    if run.spec.distill is None:
        return "fine-tuning on labels"
    if run.spec.distill.signal in SIGNALS:
        return f"distillation, {SIGNALS[run.spec.distill.signal]}"
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
    endpoint = run.spec.teacher.endpoint if run.spec.teacher else None
    if endpoint is not None:
        return f"`{endpoint.model}` at {endpoint.url}"
    if run.teacher_model is None:
        return "none"
    made_by = f", made by `{run.teacher_model.job}`" if run.teacher_model.job else ""
    return f"`{run.teacher_model.uri}`{made_by}"


def student_text(run: RunSpec) -> str:
    """What the student began as."""
    student = run.spec.student
    if student.from_teacher is not None:
        return f"the teacher made smaller: {student.from_teacher.summary}"
    if student.config is not None:
        return f"random weights ({student.config.get('model_type')})"
    return run.student_model.uri if run.student_model else "unknown"
