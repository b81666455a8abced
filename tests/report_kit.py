"""A finished run to report on: distilled, with a teacher, from three files."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from kubedistill_api.evaluation import DEFAULT_TASKS
from kubedistill_api.evaluation import Evaluation as Settings
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.runspec import ResolvedModel, RunSpec
from kubedistill_api.status import Metric
from kubedistill_trainer.data.packing import pack
from kubedistill_trainer.evaluation.gym import group_of
from kubedistill_trainer.evaluation.measure import Plan
from kubedistill_trainer.evaluation.questions import read_questions
from kubedistill_trainer.evaluation.results import (
    Abilities,
    Pace,
    Performance,
    QuestionScore,
    Slip,
    TaskScore,
)
from kubedistill_trainer.methods.history import History
from kubedistill_trainer.methods.watch import Look, Watch
from kubedistill_trainer.report.compare import Comparison
from kubedistill_trainer.report.document import Finished
from kubedistill_trainer.report.figures import Evaluation, Sums
from kubedistill_trainer.report.work import Work

SOURCES = (
    "s3://kubedistill/data/encyclopedia.jsonl",
    "s3://kubedistill/data/questions-and-answers-with-multi-step-arithmetic.jsonl",
    "s3://kubedistill/data/manual.txt",
)
_LOSSES = ((3.1, 2.4), (4.0, 3.6), (2.2, 1.8))
"""Of each source: cross-entropy a token, the student's and the teacher's."""
STEPS = 2400


def finished(*, teacher: bool = True, steps: int = STEPS) -> Finished:
    found = evaluation(teacher=teacher)
    points = history(steps, 0.5 if teacher else 0.0)
    compared = comparison(teacher=teacher)
    start = Metric(name="initialPerplexity", value=88.412345)
    metrics = [*found.metrics, *compared.metrics, start]
    watch = Watch(None, tuple(Look(step=n, loss=3 + abs(n - 20) / 50) for n in (10, 20, 30)))
    work = Work(88.412345, points, watch, watch.best_step)
    return Finished(_run(teacher), _dataset(steps), 134_515_008, metrics, found, work, compared)


def comparison(*, teacher: bool = True) -> Comparison:
    """A student that solves fewer tasks than its teacher, in half the time."""
    settings = Settings()
    plan = Plan((), read_questions(None, no_store, settings.examples), 64, True)
    problems = {} if teacher else {"student.performance": "OutOfMemoryError: <out of memory>"}
    return Comparison(
        plan=plan,
        student=_abilities((27, 20, 3, 9), 11, 6, 0.5, measured=teacher),
        teacher=_abilities((32, 28, 14, 21), 24, 2, 1.0) if teacher else None,
        disk_bytes=(269_060_552, 538_090_408 if teacher else None),
        suites={"arc_easy": {"acc": 0.41, "acc_norm": 0.388}} if teacher else {},
        problems=problems,
    )


def no_store(uri: str) -> Any:
    raise AssertionError(f"{uri} is not read")


def _abilities(
    right: tuple[int, ...], known: int, hallucinated: int, slow: float, measured: bool = True
) -> Abilities:
    tasks = tuple(
        TaskScore(name=name, group=group_of(name), examples=32, right=count)
        for name, count in zip(DEFAULT_TASKS, right, strict=True)
    )
    slips = (
        Slip(question="What is the capital of Australia?", expected="Canberra", said="Sydney",
             confidence=0.912),
        Slip(question="Who wrote <Don Quixote>?", expected="Cervantes", confidence=0.671,
             said="It was written by Lope de Vega in the year 1605, as far as anybody knows today"),
    )  # fmt: skip
    performance = Performance(
        device="NVIDIA H100 80GB HBM3", prompt_tokens=64, answer_tokens=32, rounds=3,
        paces=(
            Pace(batch=1, first_token_seconds=0.0123 * slow, tokens_per_second=81.4 / slow),
            Pace(batch=8, first_token_seconds=0.0181 * slow, tokens_per_second=602.7 / slow),
        ),
        weights_bytes=int(538_060_800 * slow), working_bytes=int(91_234_304 * slow),
        memory="CUDA allocations",
    )  # fmt: skip
    return Abilities(
        prompting="ChatTemplate",
        tasks=tasks,
        questions=QuestionScore(
            asked=32, right=known, hallucinated=hallucinated, confidence=0.4412, slips=slips
        ),
        performance=performance if measured else None,
    )


def evaluation(*, teacher: bool = True) -> Evaluation:
    random = torch.Generator().manual_seed(0)
    sums = Sums(len(SOURCES))
    models: list[Any] = ["student", "teacher"] if teacher else ["student"]
    for index, (student, taught) in enumerate(_LOSSES):
        count = 4000 * (index + 1)
        sources, ones = torch.full((count,), index), torch.ones(count)
        for model, skill in zip(models, (0.8, 0.95), strict=False):
            confidence = torch.rand(count, generator=random) ** 1.6 * 0.97 + 0.02
            hits = torch.rand(count, generator=random) < confidence * skill
            sums.add_confidence(model, confidence, hits)
            if model == "student":
                sums.add(sources, tokens=ones, nll=ones * student, hits=hits)
        if teacher:
            agreements = torch.rand(count, generator=random) < 0.71
            sums.add(
                sources, teacherTokens=ones, exactTokens=ones, teacherNll=ones * taught,
                agreements=agreements, divergence=ones * (student - taught) * 0.8,
            )  # fmt: skip
    return sums.evaluation(SOURCES)


def history(steps: int, soft_weight: float) -> Any:
    random = np.random.default_rng(0)
    kept = History()
    for step in range(1, steps + 1):
        noise = random.normal(0, 0.05, 2)
        soft = 1.1 + 2.5 * math.exp(-step / 350) + noise[0]
        hard = 2.8 + 1.9 * math.exp(-step / 450) + noise[1]
        warm = min(1.0, step / (0.05 * steps))
        rate = 2e-5 * warm * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        total = soft_weight * soft + (1 - soft_weight) * hard
        kept.record(step, soft if soft_weight else math.nan, hard, total, rate)
    return kept.points


def _run(teacher: bool) -> RunSpec:
    model = {"uri": "s3://kubedistill/runs/team/large/model/0a1b2c3d"}
    fields: dict[str, Any] = {
        "data": {"sources": [{"uri": uri} for uri in SOURCES]},
        "student": {"fromTeacher": {"layers": 6}} if teacher else {"model": model},
        "storage": {"uri": "s3://kubedistill/runs", "secretRef": {"name": "s3"}},
    }
    if teacher:
        fields |= {"distill": {}, "teacher": {"model": model}}
    else:
        fields |= {"fineTune": {}}
    resolved = ResolvedModel(uri=model["uri"], digest="9" * 64, job="large")
    return RunSpec(
        namespace="team", name="small-chain-medium", uid="u", chain="small-chain", stage="medium",
        role="student", spec=DistillationJobSpec.model_validate(fields), inputs_digest="a" * 64,
        teacher_model=resolved if teacher else None, student_model=None if teacher else resolved,
    )  # fmt: skip


def _dataset(steps: int) -> Any:
    packed = pack([np.arange(64)] * 600, 256)
    ids = np.arange(len(packed))
    return SimpleNamespace(
        packed=packed, split=SimpleNamespace(training=ids[10:], heldout=ids[:10]), sources=SOURCES,
        fit=None, total_steps=steps, digest="b" * 64, tokenizer=SimpleNamespace(digest="c" * 64),
    )  # fmt: skip
