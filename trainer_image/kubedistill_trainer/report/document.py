"""report.json of a finished model: figures, and the inputs that they belong to (docs/report.md)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from kubedistill_api.data import DataSource
from kubedistill_api.runspec import RunSpec
from kubedistill_api.status import Metric

from kubedistill_trainer.compress.sparsity import Zeros
from kubedistill_trainer.data.dataset import Dataset, learns_text
from kubedistill_trainer.data.order import Ids
from kubedistill_trainer.data.packing import IGNORED
from kubedistill_trainer.methods.history import Point
from kubedistill_trainer.methods.overfitting import Overfitting, overfitting
from kubedistill_trainer.report import abilities, gates
from kubedistill_trainer.report.card import card, student_text
from kubedistill_trainer.report.compare import Comparison
from kubedistill_trainer.report.figures import BINS, Calibration, Evaluation, Slice
from kubedistill_trainer.report.page import page
from kubedistill_trainer.report.teacher_text import taught_text
from kubedistill_trainer.report.work import Work

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Finished:
    """A run that was evaluated. `metrics`: those of the status, in order."""

    run: RunSpec
    dataset: Dataset
    parameters: int
    metrics: Sequence[Metric]
    evaluation: Evaluation
    work: Work
    compared: Comparison
    zeros: Zeros | None = None


def files(finished: Finished, content: dict[str, Any]) -> dict[str, str]:
    """What is laid beside the model; `content` as of `document`."""
    model_card = card(
        finished.run, finished.dataset, finished.metrics, finished.parameters, finished.compared
    )
    return {
        "MODEL_CARD.md": model_card,
        "report.json": json.dumps(content, indent=2) + "\n",
        "report.html": page(content),
    }


def document(finished: Finished) -> dict[str, Any]:
    """The content of report.json.

    Nothing in it depends on time or machine but `performance`, which is measured on one.
    """
    run, dataset, found = finished.run, finished.dataset, finished.evaluation
    return {
        "schemaVersion": SCHEMA_VERSION,
        "job": _job(run),
        "student": {"parameters": finished.parameters, "start": student_text(run)},
        "teacher": _teacher(run),
        "teacherText": taught_text(run.spec, finished.work.taught),
        "objective": run.spec.distill.objective.to_wire() if run.spec.distill else None,
        "sparsity": asdict(finished.zeros) if finished.zeros else None,
        "pruning": finished.work.cut.to_dict() if finished.work.cut else None,
        "data": {
            "sources": list(dataset.sources),
            "sequenceLength": dataset.packed.sequence_length,
            "files": _files(run.spec.data.sources, dataset),
            "conversations": asdict(dataset.fit) if dataset.fit else None,
            "training": _amount(dataset, dataset.split.training),
            "heldOut": _amount(dataset, dataset.split.heldout),
        },
        "training": {
            "steps": dataset.total_steps,
            "tokens": dataset.total_steps
            * run.spec.training.global_batch_size
            * dataset.packed.sequence_length,
            **run.spec.training.to_wire(),
        },
        "metrics": {metric.name: metric.value for metric in finished.metrics},
        "gates": gates.results(run.spec.gates, finished.metrics),
        "calibration": {
            "student": _calibration(found.student),
            "teacher": _calibration(found.teacher) if found.teacher else None,
        },
        "slices": [_slice(part) for part in found.slices],
        "weakest": {
            name: {"source": part.name, "tokens": part.tokens}
            for name, part in found.weakest().items()
        }
        | _weakest_task(finished.compared),
        **abilities.parts(finished.compared),
        "history": [_point(point) for point in finished.work.history],
        "earlyStopping": _early_stopping(finished),
        # Of a trial it is filled in when all trials have ended.
        "sweep": None,
        "inputs": {
            "inputsDigest": run.inputs_digest,
            "dataDigest": dataset.digest,
            "tokenizerDigest": dataset.tokenizer.digest,
            "version": version("kubedistill"),
        },
    }


def _weakest_task(compared: Comparison) -> dict[str, Any]:
    worst = abilities.weakest_task(compared)
    return {"task": worst} if worst else {}


def _job(run: RunSpec) -> dict[str, Any]:
    return {
        "name": run.name,
        "namespace": run.namespace,
        "chain": run.chain,
        "stage": run.stage,
        "method": run.spec.method,
    }


def _teacher(run: RunSpec) -> dict[str, Any] | None:
    teacher = run.spec.teacher
    if teacher is None:
        return None
    kind = "Text" if learns_text(run.spec) else teacher.payload
    payload = {"payload": kind} if teacher.delivery == "Stream" else {}
    if teacher.endpoint is not None:
        who = {"uri": teacher.endpoint.url, "model": teacher.endpoint.model}
    elif run.teacher_model is not None:
        who = run.teacher_model.to_wire()
    else:
        return None
    return {**who, "delivery": teacher.delivery, **payload}


def _amount(dataset: Dataset, samples: Ids) -> dict[str, int]:
    return {"sequences": len(samples), "tokens": dataset.packed.take(samples).valid_tokens}


def _files(sources: Sequence[DataSource], dataset: Dataset) -> list[dict[str, Any]]:
    """Of each file: whose text it is, its weight, and what of it is learnt from."""
    learnt = dataset.packed.take(dataset.split.training)
    tokens = np.bincount(learnt.sources[learnt.labels != IGNORED], minlength=len(sources))
    return [
        {
            "source": name,
            "origin": source.origin,
            "weight": source.weight,
            "sequences": int((learnt.sources == index).any(axis=1).sum()),
            "tokens": int(tokens[index]),
        }
        for index, (name, source) in enumerate(zip(dataset.sources, sources, strict=True))
    ]


def _calibration(found: Calibration) -> dict[str, Any]:
    bins: list[dict[str, Any]] = []
    for index, part in enumerate(found.bins):
        entry: dict[str, Any] = {
            "from": round(index / BINS, 6),
            "to": round((index + 1) / BINS, 6),
            "tokens": int(part.tokens),
        }
        if part.tokens:
            entry["confidence"] = round(part.confidence / part.tokens, 6)
            entry["accuracy"] = round(part.hits / part.tokens, 6)
        bins.append(entry)
    return {
        "ece": round(found.ece, 6),
        "accuracy": round(found.accuracy, 6),
        "confidence": round(found.confidence, 6),
        "bins": bins,
    }


def _slice(part: Slice) -> dict[str, Any]:
    return {"source": part.name, "tokens": part.tokens, **part.figures}


def _point(point: Point) -> dict[str, Any]:
    return {
        "step": point.step,
        "soft": point.soft,
        "hard": point.hard,
        "total": point.total,
        "learningRate": point.learning_rate,
    }


def _early_stopping(finished: Finished) -> dict[str, Any] | None:
    """The looks at the held-out loss that were finite; None where there was none."""
    watch = finished.work.watch
    found = overfitting(watch.looks, finished.work.history, watch.min_delta)
    looks = [
        {"step": look.step, "loss": look.loss, "perplexity": math.exp(look.loss)}
        for look in watch.looks
        if math.isfinite(look.loss)
    ]
    if not looks:
        return None
    return {
        "looks": looks,
        "bestStep": watch.best_step,
        "exportedStep": finished.work.exported_step,
        "stopped": watch.stopped,
        "overfitting": _overfitting(found) if found else None,
    }


def _overfitting(found: Overfitting) -> dict[str, Any]:
    return {
        "sinceStep": found.since_step,
        "heldOutRise": found.held_out_rise,
        "trainingFall": found.training_fall,
        "sentence": found.sentence(),
    }
