"""The student's side of a teacher's text: read it whole, keep what the filters keep."""

from __future__ import annotations

import logging

from kubedistill_api.status import TeacherStreamStatus

from kubedistill_trainer.context import Context
from kubedistill_trainer.data.dataset import (
    Dataset,
    learns_text,
    load_dataset,
    load_run_tokenizer,
)
from kubedistill_trainer.data.sources import read_prompts
from kubedistill_trainer.failures import InputsRefused
from kubedistill_trainer.methods.signal import NoTeacher
from kubedistill_trainer.teacher.errors import StreamDamaged
from kubedistill_trainer.teacher.learn import TaughtText, learn, status_of
from kubedistill_trainer.teacher.text_reader import read_text, wait_for_text
from kubedistill_trainer.teacher.text_request import text_identity
from kubedistill_trainer.teacher.text_view import open_view

_log = logging.getLogger(__name__)


class TextTeacher(NoTeacher):
    """A teacher whose text is in the data: the loss is cross-entropy alone."""

    def __init__(self, taught: TaughtText) -> None:
        self._status = taught.status

    def status(self) -> TeacherStreamStatus:
        return self._status


def text_there(context: Context) -> Dataset | None:
    """All that the job will learn, where all answers are there, whole, and pass its filters."""
    run = context.run
    prompts = read_prompts(run.spec.data, context.open_store)
    identity = text_identity(run, prompts, context.open_store)
    view = open_view(context.storage, identity)
    if view is None:
        return None
    if not view.ended or view.damaged:
        return None
    try:
        tokenizer = load_run_tokenizer(run, context.open_store)
        learnt = learn(run.spec, prompts, read_text(view), tokenizer)
        return load_dataset(run, context.open_store, learnt.conversations)
    except (StreamDamaged, InputsRefused) as error:
        # The student's pods say so where somebody looks for it.
        _log.info("the text cannot be learnt: %s", error)
        return None


def read_taught(context: Context) -> TaughtText | None:
    """What this job learns of its teacher's text, alike in every rank; None for other jobs.

    Waits until the stream is complete. Raises StreamStalled, StreamDamaged, or InputsRefused when
    nothing passes the filters.
    """
    run = context.run
    if not learns_text(run.spec):
        return None
    prompts = read_prompts(run.spec.data, context.open_store)
    identity = text_identity(run, prompts, context.open_store)
    stall_seconds = float(run.spec.stall_timeout_seconds)
    view = wait_for_text(context.storage, identity, stall_seconds=stall_seconds)
    tokenizer = load_run_tokenizer(run, context.open_store)
    learnt = learn(run.spec, prompts, read_text(view), tokenizer)
    _log.info("teacher's text read: %s", learnt.sentence())
    status = status_of(view, run.spec, complete=True, learnt=learnt.sentence())
    return TaughtText(learnt, status)
