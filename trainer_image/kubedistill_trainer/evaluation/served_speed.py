"""How fast a server's model answers, as its user sees it: network and queue included."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from concurrent.futures import Future, wait
from typing import Any

from kubedistill_api.exit_codes import ExitCode

from kubedistill_trainer.evaluation.results import Pace, Performance
from kubedistill_trainer.evaluation.speak import Tick
from kubedistill_trainer.evaluation.speed import ANSWER_TOKENS, BATCHES, ROUNDS
from kubedistill_trainer.evaluation.voice import NotAsked, spent, uncounted
from kubedistill_trainer.failures import RunFailure
from kubedistill_trainer.teacher.endpoint_client import Client
from kubedistill_trainer.teacher.endpoint_reply import Again, PromptRefused, SettingRefused
from kubedistill_trainer.teacher.endpoint_stream import Timing
from kubedistill_trainer.teacher.tab import Tab

PROMPT = (
    "Write the numbers from one to one hundred in words, one after the other, with a comma and a "
    "blank between them, and nothing else. Begin with one, do not leave any of them out, do not "
    "write digits, and do not stop before you have come to one hundred, however long it takes."
)
"""About as long as the prompts of a model in this process, with an answer that is longer."""
_COUNTED = {"stream_options": {"include_usage": True}}
_MOST_TOKENS_PER_SECOND = 10_000.0
"""Of one answer. No model is so fast: its pieces were kept on their way, and came together."""


def measure_served(
    client: Client, path: str, said: dict[str, Any], concurrency: int, tab: Tab, tick: Tick
) -> Performance:
    """Medians of `ROUNDS` rounds after one to warm up, of batches that `concurrency` allows.

    `said`: the request's own part of the body. NotAsked where the server gives no answer in
    pieces, fails, or may not be paid for more.
    """
    run = _Run(client, path, said, tab, tick)
    paces, counted = [], [run.once(1)]
    for batch in BATCHES:
        if batch > concurrency:
            continue
        if batch > 1:
            run.once(batch)
        rounds = [run.once(batch) for _ in range(ROUNDS)]
        paces.append(_pace(batch, rounds))
        counted += rounds
    answers = [timing for timings in counted for timing in timings]
    return Performance(
        device=f"the server of {client.model}",
        prompt_tokens=max(timing.prompt_tokens for timing in answers),
        answer_tokens=max(timing.said_tokens for timing in answers),
        rounds=ROUNDS,
        paces=tuple(paces),
    )


def _pace(batch: int, rounds: Sequence[Sequence[Timing]]) -> Pace:
    """The tokens a second from the first token of all to the last; NotAsked of answers of one
    piece, between which no time passes."""
    told = [timings for timings in rounds if any(map(_in_pieces, timings))]
    if not told:
        raise NotAsked("the server gives its answers in one piece each", again=False)
    return Pace(
        batch=batch,
        first_token_seconds=statistics.median(max(t.times[0] for t in ts) for ts in told),
        tokens_per_second=statistics.median(map(_speed, told)),
    )


def _in_pieces(timing: Timing) -> bool:
    seconds = timing.times[-1] - timing.times[0]
    return 1 < timing.said_tokens < 1 + seconds * _MOST_TOKENS_PER_SECOND


def _speed(timings: Sequence[Timing]) -> float:
    first = min(timing.times[0] for timing in timings)
    tokens = sum(timing.said_tokens - 1 for timing in timings)
    return tokens / (max(timing.times[-1] for timing in timings) - first)


class _Run:
    """Rounds of requests that are open at once."""

    def __init__(
        self, client: Client, path: str, said: dict[str, Any], tab: Tab, tick: Tick
    ) -> None:
        self._client = client
        self._path = path
        self._body = {"model": client.model, **said, "max_tokens": ANSWER_TOKENS, "stream": True}
        self._body |= _COUNTED
        self._tab = tab
        self._tick = tick

    def once(self, batch: int) -> list[Timing]:
        """`batch` answers. NotAsked where one of them fails."""
        if self._tab.full:
            raise spent()
        try:
            return self._answers(batch)
        except (SettingRefused, PromptRefused) as refused:
            words = refused.said if isinstance(refused, SettingRefused) else str(refused)
            if self._adapt(words):
                return self.once(batch)
            raise NotAsked(f"the server gives no timed answer: {words}", again=False) from refused
        except Again as trouble:
            raise NotAsked(f"the server gave {trouble.found}", again=True) from trouble
        except RunFailure as failure:
            if failure.code == ExitCode.INTERRUPTED:
                raise
            raise NotAsked(failure.message, again=True) from failure

    def _answers(self, batch: int) -> list[Timing]:
        begun = [self._client.start_timed(self._path, self._body) for _ in range(batch)]
        try:
            # For all, also where one has failed: the others are paid for.
            wait(begun)
        finally:
            for answer in begun:
                answer.cancel()
                self._count(answer)
        timings = [answer.result() for answer in begun]
        if self._tab.limited and not all(timing.prompt_tokens for timing in timings):
            raise uncounted()
        self._tick()
        return timings

    def _count(self, answer: Future[Timing]) -> None:
        if answer.cancelled():
            return
        error = answer.exception()
        if error is None:
            timing = answer.result()
            self._tab.add(timing.prompt_tokens, timing.answer_tokens)
        elif isinstance(error, PromptRefused):
            self._tab.add(error.prompt_tokens, error.answer_tokens)

    def _adapt(self, words: str) -> bool:
        """As for answers that are read whole: some servers know a setting by another name, or not."""
        for setting, instead in (("stream_options", ""), ("max_tokens", "max_completion_tokens")):
            if setting in self._body and (instead or setting) in words:
                value = self._body.pop(setting)
                self._body |= {instead: value} if instead else {}
                return True
        return False
