"""Held-out figures of the student, and against its teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kubedistill_trainer.data.dataset import Dataset
from kubedistill_trainer.data.packing import IGNORED
from kubedistill_trainer.evaluation.speak import Tick
from kubedistill_trainer.losses import TeacherHidden, TeacherSparse
from kubedistill_trainer.methods.signal import NoTeacher, Signal
from kubedistill_trainer.models.decoder import softcapped
from kubedistill_trainer.report.figures import Evaluation, Sums

_CHUNK_TOKENS = 256


def evaluate(
    engine: Any,
    teacher: Signal,
    dataset: Dataset,
    rank: int,
    world_size: int,
    group: Any,
    tick: Tick = lambda: None,
) -> Evaluation:
    """Figures at T = 1 over all held-out sequences, divided between the ranks of `group`."""
    sums = measure(engine, teacher, dataset, rank, world_size, tick)
    return sums.reduce(group).evaluation(dataset.sources)


def heldout_perplexity(
    engine: Any,
    dataset: Dataset,
    rank: int,
    world_size: int,
    group: Any,
    tick: Tick = lambda: None,
) -> float:
    """Held-out perplexity of the student as it is now, without its teacher. A collective."""
    found = evaluate(engine, NoTeacher(), dataset, rank, world_size, group, tick)
    return found.figures["perplexity"]


@torch.no_grad()
def measure(
    engine: Any,
    teacher: Signal,
    dataset: Dataset,
    rank: int,
    world_size: int,
    tick: Tick = lambda: None,
) -> Sums:
    """This rank's part of the sums.

    Under ZeRO-3 a forward pass is a collective: every rank makes the same number of them, and
    counts only the sequences that are its own. Before each of them `tick` is called, which may so be
    a collective too; what it raises, it has to raise on all ranks at the same call.
    """
    engine.eval()
    heldout = dataset.split.heldout
    rounds = math.ceil(len(heldout) / world_size)
    mine = [int(heldout[min(i * world_size + rank, len(heldout) - 1)]) for i in range(rounds)]
    teacher.expect(np.asarray([sample]) for sample in mine)
    sums = Sums(len(dataset.sources), engine.device)
    uncounted = Sums(len(dataset.sources), engine.device)
    for index, sample in enumerate(mine):
        tick()
        counted = index * world_size + rank < len(heldout)
        _add(engine, teacher, dataset, sample, sums if counted else uncounted)
    return sums


@dataclass(frozen=True)
class _Chunk:
    """Some valid tokens [N] of a sequence; `student`: log-probabilities [N, V]."""

    index: Tensor
    sources: Tensor
    labels: Tensor
    student: Tensor


def _add(engine: Any, teacher: Signal, dataset: Dataset, sample: int, sums: Sums) -> None:
    samples = np.asarray([sample])
    sequence = dataset.packed.take(samples)
    tokens, positions, labels, sources = (
        torch.from_numpy(values).to(engine.device)
        for values in (sequence.tokens, sequence.positions, sequence.labels, sequence.sources)
    )
    batch = teacher.batch(samples, tokens, positions)
    logits = engine(tokens, positions)
    labels, sources = labels.flatten(), sources.flatten().long()
    for index in torch.split((labels != IGNORED).nonzero().flatten(), _CHUNK_TOKENS):
        student = torch.log_softmax(logits[index].float(), dim=-1)
        chunk = _Chunk(index, sources[index], labels[index], student)
        _add_student(chunk, sums)
        if isinstance(batch, TeacherHidden):
            _add_hidden(batch, chunk, sums)
        elif isinstance(batch, TeacherSparse):
            _add_sparse(batch, chunk, sums)


def _add_student(chunk: _Chunk, sums: Sums) -> None:
    best, guess = chunk.student.max(-1)
    hits = guess == chunk.labels
    sums.add(
        chunk.sources,
        tokens=torch.ones_like(best),
        nll=-chunk.student.gather(-1, chunk.labels[:, None])[:, 0],
        hits=hits,
    )
    sums.add_confidence("student", best.exp(), hits)


def _add_hidden(batch: TeacherHidden, chunk: _Chunk, sums: Sums) -> None:
    scores = (batch.hidden_NH[chunk.index].to(batch.head_VH.dtype) @ batch.head_VH.T).float()
    scores = softcapped(scores, batch.softcap)
    teacher = torch.log_softmax(scores[:, : chunk.student.shape[-1]], dim=-1)
    best, guess = teacher.max(-1)
    sums.add(
        chunk.sources,
        teacherTokens=torch.ones_like(best),
        exactTokens=torch.ones_like(best),
        teacherNll=-teacher.gather(-1, chunk.labels[:, None])[:, 0],
        agreements=chunk.student.argmax(-1) == guess,
        divergence=(teacher.exp() * (teacher - chunk.student)).sum(-1),
    )
    sums.add_confidence("teacher", best.exp(), guess == chunk.labels)


def _add_sparse(batch: TeacherSparse, chunk: _Chunk, sums: Sums) -> None:
    likeliest = batch.logprobs_NK[chunk.index].argmax(-1, keepdim=True)
    guess = batch.ids_NK[chunk.index].gather(-1, likeliest)[:, 0]
    agreements = chunk.student.argmax(-1) == guess
    sums.add(chunk.sources, teacherTokens=torch.ones_like(agreements), agreements=agreements)
