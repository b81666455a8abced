"""The teacher's folder, loaded to answer in text."""

from __future__ import annotations

from functools import partial

import torch
from kubedistill_api.runspec import Outcome

from kubedistill_trainer import exporter
from kubedistill_trainer.context import Context
from kubedistill_trainer.data.tokenizer import load_tokenizer
from kubedistill_trainer.failures import refuse
from kubedistill_trainer.methods.answer import OwnTeacher
from kubedistill_trainer.methods.write_text import run_text_teacher
from kubedistill_trainer.models.folder import download
from kubedistill_trainer.models.load import dtype_of, load_model
from kubedistill_trainer.teacher.text_manifest import TextManifest
from kubedistill_trainer.teacher.text_request import teacher_template


def run_own_teacher(context: Context, board: exporter.ProgressBoard) -> Outcome:
    """Write this pod's partition of the answers."""
    return run_text_teacher(context, board, partial(_open, context))


def _open(context: Context, manifest: TextManifest) -> OwnTeacher:
    source = context.run.teacher_model
    if source is None:
        raise refuse("spec.teacher", "nothing", "a teacher pod needs a teacher")
    store = context.open_store(source.uri)
    tokenizer = load_tokenizer(store, "spec.teacher")
    template = teacher_template(tokenizer, source.uri)
    folder = context.scratch / "teacher"
    download(store, folder, "spec.teacher", source.digest)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype_of(context.run.spec.training.precision)
    model = load_model(folder, "spec.teacher", dtype).to(device).eval()
    return OwnTeacher(model, tokenizer, template, manifest.identity)
