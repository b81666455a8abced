"""The teacher's side, in the pods that write its stream."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import closing
from typing import Any

from kubedistill_api.exit_codes import ExitCode

from kubedistill_trainer.context import Context
from kubedistill_trainer.data.dataset import learns_text
from kubedistill_trainer.data.tokenizer import TextTokenizer, load_tokenizer
from kubedistill_trainer.evaluation import record
from kubedistill_trainer.evaluation.measure import Keep, Plan, measure, measure_voice, plan_of
from kubedistill_trainer.evaluation.prompts import asking
from kubedistill_trainer.evaluation.results import Abilities, Prompting
from kubedistill_trainer.evaluation.served import ServedVoice
from kubedistill_trainer.evaluation.speak import Tick
from kubedistill_trainer.failures import RunFailure
from kubedistill_trainer.store import Store
from kubedistill_trainer.store.errors import StoreError
from kubedistill_trainer.teacher.digest import teacher_digest
from kubedistill_trainer.teacher.endpoint_reply import FIELD
from kubedistill_trainer.teacher.tab import Tab

_log = logging.getLogger(__name__)
_TRIES = 3
Ask = Callable[[Plan, Tick, Keep], Abilities]


def measure_teacher(
    context: Context, model: Callable[[], Any], tokenizer: TextTokenizer, tick: Tick
) -> None:
    """Measure the teacher for all jobs that ask the same, unless that was done or is being done.

    `model` gives it, and is called where it is needed. In the pod of the first partition only, once
    its part of the stream is written: no student of logits waits for this.

    RunFailure where memory runs out in a split teacher, whose processes then are out of step; that
    is written down, and not tried again. What ends attempts in another way than SIGTERM, and
    leaves nobody to write it down, is given up after `_TRIES`: the stream is there, and is worth
    more than this.
    """
    if context.partition != 0 or context.run.teacher_model is None:
        return
    way = asking(tokenizer, "spec.teacher")
    plan = plan_of(context.run.spec.evaluation, context.open_store)
    request = request_of_teacher(context, plan, tokenizer)

    def ask(plan: Plan, tick: Tick, keep: Keep) -> Abilities:
        return measure(model(), way, plan, tick)

    _measure(context, request, plan, way.prompting, ask, tick)


def measure_server(context: Context, tokenizer: TextTokenizer | None, tab: Tab, tick: Tick) -> None:
    """The same of the model behind `spec.teacher.endpoint`, by the pod that calls this.

    `tokenizer`: as for `request_of_teacher`; `tab`: what may be spent. What the server does not
    answer is left out of the figures, and asked by the next job.
    """
    spec = context.run.spec
    endpoint = spec.teacher.endpoint if spec.teacher else None
    if endpoint is None:
        return
    prompting = _served_prompting(tokenizer)

    def ask(plan: Plan, tick: Tick, keep: Keep) -> Abilities:
        with closing(ServedVoice(endpoint, prompting, plan.max_answer_tokens, tab, tick)) as voice:
            return measure_voice(voice, plan, keep)

    plan = plan_of(spec.evaluation, context.open_store)
    request = request_of_teacher(context, plan, tokenizer)
    _measure(context, request, plan, prompting, ask, tick)


def _measure(
    context: Context,
    request: record.Request,
    plan: Plan,
    prompting: Prompting,
    ask: Ask,
    tick: Tick,
) -> None:
    """Once, for all. A store that is away costs the figures, and no job."""
    store = context.storage
    try:
        if plan.is_empty or _is_whole(record.read(store, request)):
            return
        claim = record.claim(store, request, f"{context.run.uid}/{context.partition}")
        if claim is None:
            _log.info("another pod measures the teacher")
            return
        # Again: who was at it may have ended meanwhile.
        known = record.read(store, request)
        if not _is_whole(known):
            sheet = _Sheet(store, request, plan, known or Abilities(prompting=prompting))
            _measure_claimed(claim, sheet, ask, tick)
        claim.end()
    except StoreError:
        _log.exception("the teacher is not measured")


def _measure_claimed(claim: record.Claim, sheet: _Sheet, ask: Ask, tick: Tick) -> None:
    def ticked() -> None:
        claim.renew()
        with contextlib.suppress(StoreError):
            tick()

    if claim.times > _TRIES:
        sheet.give_up(f"{_TRIES} attempts to ask it ended in the middle")
        return
    _log.info("measuring the teacher")
    try:
        found = ask(sheet.left, ticked, sheet.keep)
    except RunFailure as error:
        with contextlib.suppress(StoreError):
            if error.code == ExitCode.OUT_OF_MEMORY:
                sheet.give_up(error.message)
            elif error.code == ExitCode.INTERRUPTED:
                claim.give_back()
        raise
    sheet.publish(found)


class _Sheet:
    """Figures on their way into the store, beside those that are known."""

    def __init__(self, store: Store, request: record.Request, plan: Plan, known: Abilities) -> None:
        self._store = store
        self._request = request
        self._known = known.without_problems()
        self.left = plan.without(known)
        """What is asked."""

    def publish(self, found: Abilities) -> None:
        """Write what was found."""
        record.publish(self._store, self._request, self._known.with_more(found))

    def keep(self, found: Abilities) -> None:
        """The same of a part, so that nobody pays for it again should this end in the middle."""
        with contextlib.suppress(StoreError):
            self.publish(self._lacking(found, "asking for it ended in the middle", again=True))

    def give_up(self, why: str) -> None:
        """Write that what is left is not to be had."""
        _log.warning("the teacher is not measured: %s", why)
        found = Abilities(prompting=self._known.prompting, problems=self.left.problems)
        self.publish(self._lacking(found, why, again=False))

    def _lacking(self, found: Abilities, why: str, *, again: bool) -> Abilities:
        names = self.left.without(found).names
        problems = {**dict.fromkeys(names, why), **found.problems}
        return found.model_copy(update={"problems": problems, "again": found.again or again})


def _is_whole(known: Abilities | None) -> bool:
    return known is not None and not known.again


def request_of_teacher(
    context: Context, plan: Plan, tokenizer: TextTokenizer | None
) -> record.Request:
    """What a job asks its teacher.

    `tokenizer`: by which the teacher is asked: its own where it is learnt by its text, else the
    data's. None for a server whose model is learnt by its text: it has its own.
    """
    spec, source = context.run.spec, context.run.teacher_model
    endpoint = spec.teacher.endpoint if spec.teacher else None
    if endpoint is not None:
        served = [endpoint.url.rstrip("/"), endpoint.model, _served_prompting(tokenizer)]
        digest = hashlib.sha256(json.dumps(served).encode()).hexdigest()
        return record.request_of(spec.evaluation, plan, None, digest, "")
    assert source is not None
    digest = teacher_digest(source, context.open_store(source.uri))
    return record.request_of(spec.evaluation, plan, tokenizer, digest, spec.training.precision)


def tokenizer_of_teacher(context: Context, tokenizer: TextTokenizer) -> TextTokenizer | None:
    """For `request_of_teacher`; `tokenizer` is the data's."""
    if not learns_text(context.run.spec):
        return tokenizer
    source = context.run.teacher_model
    return load_tokenizer(context.open_store(source.uri), "spec.teacher") if source else None


def is_to_be_measured(context: Context, tokenizer: TextTokenizer) -> bool:
    """Whether the teacher's pods have something to measure, also where its stream is complete.
    `tokenizer` is the data's."""
    spec = context.run.spec
    if spec.teacher is None:
        return False
    plan = plan_of(spec.evaluation, context.open_store)
    if plan.is_empty:
        return False
    store = context.storage
    request = request_of_teacher(context, plan, tokenizer_of_teacher(context, tokenizer))
    return not (_is_whole(record.read(store, request)) or record.is_coming(store, request))


def _served_prompting(tokenizer: TextTokenizer | None) -> Prompting:
    """Who answers prompts is talked to; of one that scores the data's tokens the data's tokenizer
    says whether it is."""
    return "ChatTemplate" if tokenizer is None else asking(tokenizer, FIELD).prompting
