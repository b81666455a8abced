"""The teacher's side, in the pod that writes its stream."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from kubedistill_trainer.context import Context
from kubedistill_trainer.data.tokenizer import TextTokenizer
from kubedistill_trainer.evaluation import record
from kubedistill_trainer.evaluation.measure import measure, plan_of
from kubedistill_trainer.evaluation.prompts import asking
from kubedistill_trainer.evaluation.speak import Tick
from kubedistill_trainer.teacher.digest import teacher_digest

_log = logging.getLogger(__name__)


def measure_teacher(
    context: Context,
    model: Callable[[], Any],
    tokenizer: TextTokenizer,
    tick: Tick,
    *,
    split: bool,
) -> None:
    """Measure the teacher for all jobs that ask the same, unless that was done.

    `model` gives it, and is called where it is needed. In the pod of the first partition only, once
    its part of the stream is written: no student of logits waits for this. A teacher that is `split`
    over devices repeats calls of its decoder, whose cache would have to travel with them: it is not
    measured.
    """
    spec, source = context.run.spec, context.run.teacher_model
    if context.partition != 0 or source is None or split:
        return
    plan = plan_of(spec.evaluation, context.open_store)
    digest = teacher_digest(source, context.open_store(source.uri))
    request = record.request_of(spec.evaluation, plan, tokenizer, digest, spec.training.precision)
    if record.read(context.storage, request) is not None:
        return
    record.begin(context.storage, request)
    _log.info("measuring the teacher")
    found = measure(model(), asking(tokenizer, "spec.teacher"), plan, tick)
    record.publish(context.storage, request, found)
