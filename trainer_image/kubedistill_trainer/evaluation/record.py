"""A teacher's abilities as an object in the store, written once for all jobs that ask the same.

```
<storage.uri>/evaluations/<digest of what was asked>.json
<storage.uri>/evaluations/<digest of what was asked>.begun   a teacher's pod is measuring
```
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from datetime import UTC, datetime

from kubedistill_api.evaluation import Evaluation
from pydantic import BaseModel, ConfigDict, ValidationError

from kubedistill_trainer.data.tokenizer import TextTokenizer
from kubedistill_trainer.evaluation.measure import Plan
from kubedistill_trainer.evaluation.results import Abilities
from kubedistill_trainer.evaluation.speak import Tick
from kubedistill_trainer.store import Store
from kubedistill_trainer.store.errors import NotFound, PreconditionFailed, StoreError

_log = logging.getLogger(__name__)
_FORMAT = 2
"""Rises when the same request would be answered by other examples or other rules."""
_WAIT_SECONDS = 60.0
_POLL_SECONDS = 1.0
_RENEW_SECONDS = 60.0
_OLD_SECONDS = 900.0
"""A measurement of which nothing was heard for longer was given up."""


class Request(BaseModel):
    """Everything that a teacher's figures depend on, but for the machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = _FORMAT
    teacher_digest: str
    tokenizer_digest: str
    chat_template: str
    precision: str
    tasks: tuple[str, ...]
    examples: int
    questions_digest: str
    max_answer_tokens: int
    latency: bool

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @property
    def key(self) -> str:
        """Where the answer lies below the storage URI."""
        return f"evaluations/{self.digest}.json"

    @property
    def mark(self) -> str:
        """Where a teacher's pod says that it has begun."""
        return f"evaluations/{self.digest}.begun"


def request_of(
    settings: Evaluation,
    plan: Plan,
    tokenizer: TextTokenizer | None,
    teacher_digest: str,
    precision: str,
) -> Request:
    """The same in the teacher's and in the student's pod. Without `tokenizer`: a server's."""
    template = (tokenizer.chat_template if tokenizer else None) or ""
    return Request(
        teacher_digest=teacher_digest,
        tokenizer_digest=tokenizer.digest if tokenizer else "",
        chat_template=hashlib.sha256(template.encode()).hexdigest(),
        precision=precision,
        tasks=tuple(task.name for task in plan.tasks),
        examples=settings.examples,
        questions_digest=(
            json.dumps([plan.questions.source, plan.questions.digest]) if plan.questions else ""
        ),
        max_answer_tokens=plan.max_answer_tokens,
        latency=plan.latency,
    )


def read(store: Store, request: Request) -> Abilities | None:
    """What was found; None when nobody has measured. `store` is rooted at the storage URI."""
    try:
        body = store.get(request.key)
    except NotFound:
        return None
    try:
        return Abilities.model_validate_json(body)
    except ValidationError:
        _log.exception("a teacher's figures do not parse", extra={"uri": store.uri_of(request.key)})
        return None


class _Mark(BaseModel):
    """`times`: how often measuring was begun; `by`: who is at it."""

    times: int = 0
    by: str = ""


class Claim:
    """The right to measure, which lapses where it is not renewed."""

    def __init__(self, store: Store, request: Request, mark: _Mark) -> None:
        self._store = store
        self._request = request
        self._mark = mark
        self._renewed = time.monotonic()

    @property
    def times(self) -> int:
        """How often measuring was begun, this time included."""
        return self._mark.times

    def renew(self) -> None:
        """Say again that it goes on; to be called often. A store that is away costs no figures."""
        if time.monotonic() - self._renewed > _RENEW_SECONDS:
            self._renewed = time.monotonic()
            with contextlib.suppress(StoreError):
                self.write()

    def give_back(self) -> None:
        """This time does not count: it was ended from outside."""
        self._mark = self._mark.model_copy(update={"times": self.times - 1})
        self.write()

    def end(self) -> None:
        """The figures are there: who asks for more later is counted anew."""
        self._store.delete([self._request.mark])

    def write(self, *, first: bool = False) -> None:
        """Say who is at it, and how often it was begun. PreconditionFailed where one is to be the
        `first`, and another was."""
        body = self._mark.model_dump_json().encode()
        self._store.put(self._request.mark, body, only_if_absent=first)


def claim(store: Store, request: Request, by: str) -> Claim | None:
    """Say that the figures are about to come; None where another than `by` is at it.

    Two who take over a claim that lapsed in the same moment both measure: figures are written once
    all the same.
    """
    mark = _mark(store, request)
    if mark is not None and mark.by != by and is_coming(store, request):
        return None
    known = mark or _Mark()
    mine = Claim(store, request, _Mark(times=known.times + 1, by=by))
    try:
        mine.write(first=mark is None)
    except PreconditionFailed:
        # The taker may be this one, whose first try landed though its answer was lost.
        now = _mark(store, request)
        return mine if now is not None and now.by == by else None
    return mine


def _mark(store: Store, request: Request) -> _Mark | None:
    try:
        return _Mark.model_validate_json(store.get(request.mark))
    except NotFound:
        return None
    except ValidationError:
        return _Mark()


def publish(store: Store, request: Request, found: Abilities) -> None:
    """Write them, unless somebody has; in place of those that lack what could not be had then."""
    body = found.model_dump_json().encode()
    try:
        store.put(request.key, body, only_if_absent=True)
    except PreconditionFailed:
        known = read(store, request)
        if known is not None and not known.again:
            _log.info("another pod has measured the teacher")
            return
        store.put(request.key, body)


def awaited(store: Store, request: Request, tick: Tick) -> Abilities | None:
    """What was found; where a teacher's pod is at it, after a short wait."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while True:
        found = read(store, request)
        whole = found is not None and not found.again
        if whole or time.monotonic() > deadline or not is_coming(store, request):
            return found
        tick()
        time.sleep(_POLL_SECONDS)


def is_coming(store: Store, request: Request) -> bool:
    """Whether a teacher's pod has begun to measure, and may be at it still."""
    begun = store.head(request.mark)
    return begun is not None and _age(begun.last_modified) <= _OLD_SECONDS


def _age(since: datetime) -> float:
    return (datetime.now(UTC) - since).total_seconds()
