"""A teacher's abilities as an object in the store, written once for all jobs that ask the same.

```
<storage.uri>/evaluations/<digest of what was asked>.json
<storage.uri>/evaluations/<digest of what was asked>.begun   a teacher's pod is measuring
```
"""

from __future__ import annotations

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
from kubedistill_trainer.store.errors import NotFound, PreconditionFailed

_log = logging.getLogger(__name__)
_FORMAT = 2
"""Rises when the same request would be answered by other examples or other rules."""
_WAIT_SECONDS = 60.0
_POLL_SECONDS = 1.0
_OLD_SECONDS = 900.0
"""A measurement that began longer ago was given up."""


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
    settings: Evaluation, plan: Plan, tokenizer: TextTokenizer, teacher_digest: str, precision: str
) -> Request:
    """The same in the teacher's and in the student's pod."""
    return Request(
        teacher_digest=teacher_digest,
        tokenizer_digest=tokenizer.digest,
        chat_template=hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest(),
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


def begin(store: Store, request: Request) -> int:
    """Say that the figures are about to come; how many times that was said, this one included."""
    try:
        said = store.get(request.mark)
    except NotFound:
        said = b""
    times = int(said) + 1 if said.isdigit() else 1
    count(store, request, times)
    return times


def count(store: Store, request: Request, times: int) -> None:
    """Say how many times it was begun."""
    store.put(request.mark, str(times).encode())


def publish(store: Store, request: Request, found: Abilities) -> None:
    """Write them, unless somebody has."""
    try:
        store.put(request.key, found.model_dump_json().encode(), only_if_absent=True)
    except PreconditionFailed:
        _log.info("another pod has measured the teacher")


def awaited(store: Store, request: Request, tick: Tick) -> Abilities | None:
    """What was found; where a teacher's pod is at it, after a short wait."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while (found := read(store, request)) is None:
        if time.monotonic() > deadline or not is_coming(store, request):
            return None
        tick()
        time.sleep(_POLL_SECONDS)
    return found


def is_coming(store: Store, request: Request) -> bool:
    """Whether a teacher's pod has begun to measure, and may be at it still."""
    begun = store.head(request.mark)
    return begun is not None and _age(begun.last_modified) <= _OLD_SECONDS


def _age(since: datetime) -> float:
    return (datetime.now(UTC) - since).total_seconds()
