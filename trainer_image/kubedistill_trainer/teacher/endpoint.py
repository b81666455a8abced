"""A teacher behind a server of OpenAI's chat-completions API."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from kubedistill_api.generation import Generation
from kubedistill_api.teacher import Endpoint

from kubedistill_trainer.failures import RunFailure
from kubedistill_trainer.teacher.endpoint_answer import read_answer
from kubedistill_trainer.teacher.endpoint_client import Ask, Client, Patience
from kubedistill_trainer.teacher.endpoint_refusals import Refusals
from kubedistill_trainer.teacher.endpoint_reply import (
    SEED,
    PromptRefused,
    Reply,
    SettingRefused,
)
from kubedistill_trainer.teacher.metrics import ENDPOINT_TOKENS
from kubedistill_trainer.teacher.text import TextAnswer, TextRequest

_log = logging.getLogger(__name__)
CHAT = "chat/completions"


def turns(request: TextRequest) -> dict[str, Any]:
    """A conversation, as chat-completions has it."""
    return {"messages": [{"role": m.role, "content": m.content} for m in request.messages]}


@dataclass(frozen=True)
class Manner:
    """How a server is asked. `said`: the request's own part of the body; `read`: from a reply, the
    model's name and the URL to the answer (see `read_answer`); `more`: further settings; `spare`:
    settings that one does without where the server does not take them."""

    path: str = CHAT
    said: Callable[[TextRequest], dict[str, Any]] = turns
    read: Callable[[Reply, str, str], TextAnswer] = read_answer
    more: Mapping[str, Any] = field(default_factory=dict)
    spare: frozenset[str] = frozenset({SEED})


class EndpointAnswerer:
    """An `Answerer`: `endpoint.concurrency` questions are open at once."""

    def __init__(
        self,
        endpoint: Endpoint,
        generation: Generation,
        patience: Patience | None = None,
        *,
        answered: bool = False,
        manner: Manner | None = None,
    ) -> None:
        """`answered`: whether the server is known to have answered some of these prompts."""
        self._generation = generation
        self._manner = manner or Manner()
        self.client = Client(endpoint, patience)
        """By which it asks; closed with it."""
        self._open = endpoint.concurrency
        self._length = "max_tokens"
        self._left_out: set[str] = set()
        self._refusals = Refusals(self.client.url, answered)

    def answers(self, requests: Iterable[TextRequest]) -> Iterator[tuple[TextRequest, TextAnswer]]:
        """See `Answerer`. Answers from before a failure are given out before it is raised; refusals
        that may be part of it are not, and are asked again."""
        waiting = enumerate(requests)
        running: dict[Future[TextAnswer], tuple[int, TextRequest]] = {}
        failure: RunFailure | None = None
        try:
            while True:
                if failure is None:
                    for begun, request in islice(waiting, self._open - len(running)):
                        running[self.client.start(self._ask(request))] = begun, request
                if not running:
                    break
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                ended = next(iter(done))
                at = running.pop(ended)
                try:
                    ready = self._refusals.take(*at, _answer_of(ended))
                except RunFailure as error:
                    failure = failure or error
                    self._refusals.rest()
                else:
                    yield from (one for one in ready if failure is None or not one[1].refusal)
        finally:
            for future in running:
                future.cancel()
        if failure is not None:
            raise failure
        yield from self._refusals.rest()

    def close(self) -> None:
        """Give up what is open."""
        self.client.close()

    def _ask(self, request: TextRequest) -> Ask[TextAnswer]:
        sent: dict[str, Any] = {}

        def body() -> dict[str, Any]:
            sent.clear()
            sent.update(self._body(request))
            return sent

        return Ask(
            self._manner.path, self._read, body, adapt=lambda refused: self._adapt(refused, sent)
        )

    def _body(self, request: TextRequest) -> dict[str, Any]:
        settings = {
            self._length: self._generation.max_tokens,
            "temperature": self._generation.temperature,
            "top_p": self._generation.top_p,
            SEED: request.seed,
            **self._manner.more,
        }
        kept = {name: value for name, value in settings.items() if name not in self._left_out}
        return {"model": self.client.model, **self._manner.said(request), **kept}

    def _adapt(self, refused: SettingRefused, sent: dict[str, Any]) -> bool:
        """OpenAI's newer models know `max_tokens` by another name only, and say so; some servers
        know no seed."""
        setting = refused.setting
        if setting not in sent:
            return False
        if setting in self._manner.spare:
            self._left_out.add(setting)
            return True
        if setting == "max_tokens" and "max_completion_tokens" in refused.said:
            self._length = "max_completion_tokens"
            return True
        return False

    def _read(self, reply: Reply) -> TextAnswer:
        try:
            answer = self._manner.read(reply, self.client.model, self.client.url)
        except PromptRefused as refusal:
            _count(refusal)
            raise
        _count(answer)
        return answer


def _count(paid: TextAnswer | PromptRefused) -> None:
    ENDPOINT_TOKENS.labels("prompt").inc(paid.prompt_tokens)
    ENDPOINT_TOKENS.labels("answer").inc(paid.answer_tokens)


def _answer_of(ended: Future[TextAnswer]) -> TextAnswer:
    try:
        return ended.result()
    except PromptRefused as refusal:
        return TextAnswer(
            text="",
            refusal=str(refusal),
            prompt_tokens=refusal.prompt_tokens,
            answer_tokens=refusal.answer_tokens,
        )
