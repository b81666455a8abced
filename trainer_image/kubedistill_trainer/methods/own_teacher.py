"""The teacher's folder, loaded to answer in text, or to be compared with."""

from __future__ import annotations

import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from kubedistill_api.runspec import Outcome

from kubedistill_trainer import exporter
from kubedistill_trainer.context import Context
from kubedistill_trainer.data.tokenizer import load_tokenizer
from kubedistill_trainer.evaluation.teacher import measure_teacher
from kubedistill_trainer.failures import refuse
from kubedistill_trainer.methods import sharding
from kubedistill_trainer.methods.answer import Generate, OwnTeacher
from kubedistill_trainer.methods.held_out import write_held_out
from kubedistill_trainer.methods.write_text import run_text_teacher
from kubedistill_trainer.models.folder import download
from kubedistill_trainer.models.generation import generate
from kubedistill_trainer.models.load import dtype_of, load_model
from kubedistill_trainer.store import Store
from kubedistill_trainer.teacher.text_manifest import TextManifest
from kubedistill_trainer.teacher.text_request import teacher_template

_LOAD = "load"


def run_own_teacher(context: Context, board: exporter.ProgressBoard, group: Any = None) -> Outcome:
    """Write this pod's partition of the answers, where they are learnt; then what the student is held
    beside.

    With a `group`, the teacher is split over its processes (`sharding.py`).
    """
    model = cache(partial(_model, context, group))
    tokenizer = load_tokenizer(_source(context), "spec.teacher")

    def opened(manifest: TextManifest) -> OwnTeacher:
        template = teacher_template(tokenizer, _source(context).uri)
        together = {} if group is None else {"generate": _together(group)}
        return OwnTeacher(model(), tokenizer, template, manifest.identity, **together)

    if context.run.spec.compares:
        if context.partition > 0:
            return Outcome(reason="Completed", message="the first writer does all of it")
        board.update(phase="Generating", last_step_time=time.time())
        outcome = Outcome(reason="Completed", message="the teacher is there to compare with")
    else:
        outcome = run_text_teacher(context, board, opened)

    @cache
    def asked() -> Any:
        if group is not None:
            sharding.lead(model(), group)
        return model()

    tick = partial(_tick, board)
    write_held_out(context, asked, tick)
    measure_teacher(context, asked, tokenizer, tick)
    return outcome


def _tick(board: exporter.ProgressBoard) -> None:
    board.update(last_step_time=time.time())


def follow_own_teacher(context: Context, group: Any) -> Outcome:
    """Do whatever the first process does with its part of the teacher, until that is done.

    Every process generates the same answers: the layers' results are summed up over all of them, and
    the draws are by each request's seed. What is measured is asked by the first process alone.
    """
    if sharding.receive(group) == _LOAD:
        model = sharding.load_shard(_folder(context), _dtype(context), group).eval()
        sharding.follow(model, group, generate)
    return Outcome(reason="Completed", message="the first process writes the answers")


def _source(context: Context) -> Store:
    source = context.run.teacher_model
    if source is None:
        raise refuse("spec.teacher", "nothing", "a teacher pod needs a teacher")
    return context.open_store(source.uri)


def _model(context: Context, group: Any) -> Any:
    """The teacher, or the first process's part of it."""
    source = context.run.teacher_model
    digest = source.digest if source else ""
    download(_source(context), _folder(context), "spec.teacher", digest)
    if group is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return load_model(_folder(context), "spec.teacher", _dtype(context)).to(device).eval()
    sharding.send(_LOAD, group)
    return sharding.load_shard(_folder(context), _dtype(context), group).eval()


def _together(group: Any) -> Generate:
    """`generate` in all processes of the group at once."""

    def generate_together(model: Any, **batch: Any) -> list[list[int]]:
        with sharding.in_step():
            sharding.send(batch, group)
            return generate(model, **batch)

    return generate_together


def _folder(context: Context) -> Path:
    return context.scratch / "teacher"


def _dtype(context: Context) -> torch.dtype:
    return dtype_of(context.run.spec.training.precision)
