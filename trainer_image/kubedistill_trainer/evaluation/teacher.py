"""The teacher's side, in the pod that writes its stream."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from kubedistill_api.exit_codes import ExitCode

from kubedistill_trainer.context import Context
from kubedistill_trainer.data.dataset import learns_text
from kubedistill_trainer.data.tokenizer import TextTokenizer, load_tokenizer
from kubedistill_trainer.evaluation import record
from kubedistill_trainer.evaluation.measure import Plan, measure, plan_of
from kubedistill_trainer.evaluation.prompts import asking
from kubedistill_trainer.evaluation.results import Abilities
from kubedistill_trainer.evaluation.speak import Tick
from kubedistill_trainer.failures import RunFailure
from kubedistill_trainer.teacher.digest import teacher_digest

_log = logging.getLogger(__name__)
_TRIES = 3


def measure_teacher(
    context: Context, model: Callable[[], Any], tokenizer: TextTokenizer, tick: Tick
) -> None:
    """Measure the teacher for all jobs that ask the same, unless that was done.

    `model` gives it, and is called where it is needed. In the pod of the first partition only, once
    its part of the stream is written: no student of logits waits for this.

    RunFailure where memory runs out in a split teacher, whose processes then are out of step; that
    is written down, and not tried again. What ends attempts in another way than SIGTERM, and
    leaves nobody to write it down, is given up after `_TRIES`: the stream is there, and is worth
    more than this.
    """
    if context.partition != 0 or context.run.teacher_model is None:
        return
    plan = plan_of(context.run.spec.evaluation, context.open_store)
    request = request_of_teacher(context, plan, tokenizer)
    if record.read(context.storage, request) is not None:
        return
    way = asking(tokenizer, "spec.teacher")
    times = record.begin(context.storage, request)
    if times > _TRIES:
        why = f"{_TRIES} attempts to ask it ended in the middle"
        _log.warning("the teacher is not measured: %s", why)
        record.publish(context.storage, request, Abilities.none(way.prompting, why, plan.problems))
        return
    _log.info("measuring the teacher")
    try:
        found = measure(model(), way, plan, tick)
    except RunFailure as error:
        if error.code == ExitCode.OUT_OF_MEMORY:
            failed = Abilities.none(way.prompting, error.message, plan.problems)
            record.publish(context.storage, request, failed)
        elif error.code == ExitCode.INTERRUPTED:
            record.count(context.storage, request, times - 1)
        raise
    record.publish(context.storage, request, found)


def request_of_teacher(context: Context, plan: Plan, tokenizer: TextTokenizer) -> record.Request:
    """What a job asks its teacher, a model in a store; by the teacher's own tokenizer where it is
    learnt by its text."""
    spec, source = context.run.spec, context.run.teacher_model
    assert source is not None
    store = context.open_store(source.uri)
    digest = teacher_digest(source, store)
    return record.request_of(spec.evaluation, plan, tokenizer, digest, spec.training.precision)


def is_to_be_measured(context: Context, tokenizer: TextTokenizer) -> bool:
    """Whether the teacher's pods have something to measure, also where its stream is complete."""
    spec = context.run.spec
    teacher = spec.teacher
    if teacher is None or context.run.teacher_model is None:
        return False
    plan = plan_of(spec.evaluation, context.open_store)
    if not (plan.tasks or plan.questions or plan.latency):
        return False
    if learns_text(spec):
        uri = context.run.teacher_model.uri
        tokenizer = load_tokenizer(context.open_store(uri), "spec.teacher")
    store, request = context.storage, request_of_teacher(context, plan, tokenizer)
    return record.read(store, request) is None and not record.is_coming(store, request)
