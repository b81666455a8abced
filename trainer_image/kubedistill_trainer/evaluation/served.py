"""A model behind a server of OpenAI's API, asked tasks and questions: the likeliest answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kubedistill_api.exit_codes import ExitCode
from kubedistill_api.generation import Generation
from kubedistill_api.teacher import Endpoint

from kubedistill_trainer.data.conversation import Message
from kubedistill_trainer.evaluation.gym import Solved
from kubedistill_trainer.evaluation.prompts import plain
from kubedistill_trainer.evaluation.questions import Answered
from kubedistill_trainer.evaluation.results import Performance, Prompting
from kubedistill_trainer.evaluation.served_answer import answered, read_chat, read_completion
from kubedistill_trainer.evaluation.served_speed import PROMPT, measure_served
from kubedistill_trainer.evaluation.speak import Tick
from kubedistill_trainer.evaluation.voice import NotAsked, spent, uncounted
from kubedistill_trainer.failures import RunFailure
from kubedistill_trainer.teacher.endpoint import EndpointAnswerer, Manner
from kubedistill_trainer.teacher.endpoint_client import Patience
from kubedistill_trainer.teacher.endpoint_reply import LOGPROBS, SEED
from kubedistill_trainer.teacher.endpoint_scores import COMPLETIONS
from kubedistill_trainer.teacher.tab import Tab
from kubedistill_trainer.teacher.text import TextAnswer, TextRequest

_SPARE = frozenset({SEED, LOGPROBS, "temperature", "top_p"})
"""Reasoning models draw at one temperature only, and many servers do not say how sure they are."""
_LONGEST_SECONDS = 1800.0
"""After which the job goes on without what is not there: the next one asks for it."""
_CHAT = Manner(read=read_chat, more={LOGPROBS: True}, spare=_SPARE)


def _text(request: TextRequest) -> dict[str, Any]:
    return {"prompt": request.messages[0].content}


_EXAMPLES = Manner(
    path=COMPLETIONS,
    said=_text,
    read=read_completion,
    more={LOGPROBS: 1, "stop": ["\n"]},
    spare=_SPARE,
)


class ServedVoice:
    """A `Voice`. With `Examples` the server goes on with a text; else it is talked to."""

    def __init__(
        self,
        endpoint: Endpoint,
        prompting: Prompting,
        max_tokens: int,
        tab: Tab,
        tick: Tick,
        patience: Patience | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._prompting: Prompting = prompting
        self._tab = tab
        self._tick = tick
        greedy = Generation(max_tokens=max_tokens, temperature=0.0)
        self._manner = _CHAT if prompting == "ChatTemplate" else _EXAMPLES
        patience = patience or Patience(in_all=_LONGEST_SECONDS)
        self._answerer = EndpointAnswerer(endpoint, greedy, patience, manner=self._manner)

    @property
    def prompting(self) -> Prompting:
        return self._prompting

    def ask(self, texts: Sequence[str], shots: Sequence[Solved], request: str) -> list[Answered]:
        def written(text: str) -> str:
            talks = self._prompting == "ChatTemplate"
            return f"{text}\n\n{request}" if talks else plain(text, shots)

        answers = self._answers(
            [
                TextRequest(number, 0, (Message("user", written(text)),), seed=0)
                for number, text in enumerate(texts)
            ]
        )
        refusals = [answer.refusal for answer in answers if answer.refusal]
        if answers and len(refusals) == len(answers):
            raise NotAsked(f"the server refuses all of it: {refusals[0]}", again=True)
        return [answered(answer) for answer in answers]

    def speed(self) -> Performance:
        said = self._manner.said(TextRequest(0, 0, (Message("user", PROMPT),), seed=0))
        client, most = self._answerer.client, self._endpoint.concurrency
        try:
            return measure_served(client, self._manner.path, said, most, self._tab, self._tick)
        finally:
            self._tab.commit()

    def close(self) -> None:
        """Give up what is open."""
        self._answerer.close()

    def _answers(self, requests: Sequence[TextRequest]) -> list[TextAnswer]:
        """In order. NotAsked where the server does not go on, or may not be paid for more."""
        said: dict[int, TextAnswer] = {}

        def affordable() -> Iterator[TextRequest]:
            for request in requests:
                if self._tab.full:
                    return
                yield request

        try:
            for request, answer in self._answerer.answers(affordable()):
                said[request.prompt] = answer
                self._tab.add(answer.prompt_tokens, answer.answer_tokens)
                if self._tab.limited and not (answer.refusal or answer.prompt_tokens):
                    raise uncounted()
                self._tick()
        except RunFailure as failure:
            if failure.code == ExitCode.INTERRUPTED:
                raise
            raise NotAsked(failure.message, again=True) from failure
        finally:
            self._tab.commit()
        if len(said) < len(requests):
            raise spent()
        return [said[request.prompt] for request in requests]
