"""Held-out figures of the student, and against its teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from kubedistill_api.status import Metric

from kubedistill_trainer.data.dataset import Dataset
from kubedistill_trainer.data.packing import IGNORED
from kubedistill_trainer.losses import TeacherHidden, TeacherSparse
from kubedistill_trainer.methods.signal import NoTeacher, Signal, softcapped

_CHUNK_TOKENS = 256


@dataclass
class Sums:
    """Sums over held-out tokens, added up over ranks; see `metrics` for what comes of them."""

    tokens: float = 0.0
    student_nll: float = 0.0
    student_hits: float = 0.0
    teacher_tokens: float = 0.0
    teacher_nll: float = 0.0
    agreements: float = 0.0
    divergence: float = 0.0

    def reduce(self, group: Any) -> Sums:
        """The same sums over all ranks of `group`."""
        values = torch.tensor(list(vars(self).values()), dtype=torch.float64)
        dist.all_reduce(values, group=group)
        return Sums(*values.tolist())

    def metrics(self, *, exact_teacher: bool) -> list[Metric]:
        """perplexity, accuracy; with a teacher agreement and KL; with its exact distribution
        (Hidden or Online) its perplexity and the ratio too."""
        count = max(1.0, self.tokens)
        values = {
            "perplexity": math.exp(min(50.0, self.student_nll / count)),
            "accuracy": self.student_hits / count,
        }
        if self.teacher_tokens:
            values["teacherAgreement"] = self.agreements / self.teacher_tokens
        if self.teacher_tokens and exact_teacher:
            values["teacherKL"] = self.divergence / self.teacher_tokens
            values["teacherPerplexity"] = math.exp(min(50.0, self.teacher_nll / count))
            values["perplexityRatio"] = values["perplexity"] / values["teacherPerplexity"]
        return [Metric(name=name, value=round(value, 6)) for name, value in values.items()]


@torch.no_grad()
def evaluate(
    engine: Any, teacher: Signal, dataset: Dataset, rank: int, world_size: int, group: Any
) -> list[Metric]:
    """Figures at T = 1 over all held-out sequences, divided between the ranks.

    Under ZeRO-3 a forward pass is a collective: every rank makes the same number of them, and
    counts only the sequences that are its own.
    """
    engine.eval()
    heldout = dataset.split.heldout
    rounds = math.ceil(len(heldout) / world_size)
    mine = [int(heldout[min(i * world_size + rank, len(heldout) - 1)]) for i in range(rounds)]
    teacher.expect(np.asarray([sample]) for sample in mine)
    sums = Sums()
    exact = True
    for index, sample in enumerate(mine):
        counted = index * world_size + rank < len(heldout)
        exact &= _add(engine, teacher, dataset, sample, sums if counted else Sums())
    return sums.reduce(group).metrics(exact_teacher=exact)


def initial_perplexity(
    engine: Any, dataset: Dataset, rank: int, world_size: int, group: Any
) -> float:
    """Held-out perplexity of the student as it is now, without its teacher."""
    metrics = evaluate(engine, NoTeacher(), dataset, rank, world_size, group)
    return next(metric.value for metric in metrics if metric.name == "perplexity")


def _add(engine: Any, teacher: Signal, dataset: Dataset, sample: int, sums: Sums) -> bool:
    """Add one sequence; whether the teacher's whole distribution was known."""
    samples = np.asarray([sample])
    sequence = dataset.packed.take(samples)
    device = engine.device
    tokens = torch.from_numpy(sequence.tokens).to(device)
    positions = torch.from_numpy(sequence.positions).to(device)
    labels = torch.from_numpy(sequence.labels).to(device).flatten()
    batch = teacher.batch(samples, tokens, positions)
    logits = engine(tokens, positions)
    valid = labels != IGNORED
    for chunk in torch.split(valid.nonzero().flatten(), _CHUNK_TOKENS):
        student = torch.log_softmax(logits[chunk].float(), dim=-1)
        target = labels[chunk, None]
        sums.tokens += len(chunk)
        sums.student_nll -= float(student.gather(-1, target).sum())
        sums.student_hits += float((student.argmax(-1) == labels[chunk]).sum())
        if isinstance(batch, TeacherHidden):
            _add_hidden(batch, chunk, student, target, sums)
        elif isinstance(batch, TeacherSparse):
            top = batch.ids_NK[chunk].gather(-1, batch.logprobs_NK[chunk].argmax(-1, keepdim=True))
            sums.teacher_tokens += len(chunk)
            sums.agreements += float((student.argmax(-1, keepdim=True) == top).sum())
    return not isinstance(batch, TeacherSparse)


def _add_hidden(batch: TeacherHidden, chunk: Any, student: Any, target: Any, sums: Sums) -> None:
    scores = (batch.hidden_NH[chunk].to(batch.head_VH.dtype) @ batch.head_VH.T).float()
    scores = softcapped(scores, batch.softcap)
    teacher = torch.log_softmax(scores[:, : student.shape[-1]], dim=-1)
    sums.teacher_tokens += len(chunk)
    sums.teacher_nll -= float(teacher.gather(-1, target).sum())
    sums.agreements += float((student.argmax(-1) == teacher.argmax(-1)).sum())
    sums.divergence += float((teacher.exp() * (teacher - student)).sum())
