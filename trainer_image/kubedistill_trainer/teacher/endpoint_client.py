"""A server of OpenAI's API, asked many things at once: retries, its wishes, its key."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

import anyio
import httpx
from anyio.from_thread import start_blocking_portal
from kubedistill_api.exit_codes import ExitCode
from kubedistill_api.names import API_KEY
from kubedistill_api.teacher import Endpoint
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt
from tenacity.wait import wait_exponential_jitter

from kubedistill_trainer.failures import RunFailure, refuse
from kubedistill_trainer.teacher.endpoint_pace import Pace, asked_wait
from kubedistill_trainer.teacher.endpoint_reply import (
    FIELD,
    SEED,
    Again,
    PromptRefused,
    Reply,
    SettingRefused,
    check_status,
)
from kubedistill_trainer.teacher.endpoint_stream import Timing, piece_of, timed
from kubedistill_trainer.teacher.metrics import ENDPOINT_REQUESTS, ENDPOINT_TOKENS

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Patience:
    """Times that the spec does not set, in seconds."""

    first_wait: float = 1.0
    """Before the first further try; twice as long before each next one."""
    longest_wait: float = 60.0
    jitter: float = 1.0
    """Added to each wait, 0 … this, so that requests that failed together come back apart."""
    whole_answer: float = 10.0
    """Times `timeoutSeconds` within which an answer has to be whole, however it drips."""
    longest_asked: float = 600.0
    """What a server may ask to wait; one that asks for more is left to a later pod."""
    in_all: float = math.inf
    """Since the client was made; what is not answered by then has failed."""


@dataclass(frozen=True)
class Ask(Generic[T]):
    """One request. `read` makes a value of an accepted reply; it may raise what `check_status` does.

    `body`: JSON, made anew for each try; None for a GET. `accepts`: statuses that are no errors.
    `adapt`: whether the next `body` does without a setting that the server refused.
    """

    path: str
    read: Callable[[Reply], T]
    body: Callable[[], dict[str, Any]] | None = None
    accepts: frozenset[int] = frozenset()
    adapt: Callable[[SettingRefused], bool] = lambda refused: False


class _Adapted(Exception):
    """The next body does without a setting, which the text names."""


class Client:
    """Requests to one endpoint; `concurrency` of them are open at once. Safe for threads.

    The requests live in an event loop of its own thread, so that they go on, and no time limit runs
    out, while the caller is busy with an answer.
    """

    def __init__(self, endpoint: Endpoint, patience: Patience | None = None) -> None:
        """The key comes from the environment. InputsRefused for one that no header can carry."""
        self.url = endpoint.url.rstrip("/")
        self.model = endpoint.model
        self._endpoint = endpoint
        self._patience = patience or Patience()
        self._key = _key()
        self._pace = Pace()
        self._failure: RunFailure | None = None
        self._until = time.monotonic() + self._patience.in_all
        self._backoff = wait_exponential_jitter(
            multiplier=self._patience.first_wait,
            max=self._patience.longest_wait,
            jitter=self._patience.jitter,
        )
        self._http = httpx.AsyncClient(
            base_url=f"{self.url}/",
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx.Timeout(float(endpoint.timeout_seconds), pool=None),
            limits=httpx.Limits(max_connections=endpoint.concurrency),
        )
        self._slots = anyio.CapacityLimiter(endpoint.concurrency)
        self._stack = ExitStack()
        self._portal = self._stack.enter_context(start_blocking_portal(name="endpoint"))

    def start(self, ask: Ask[T]) -> Future[T]:
        """Begin to ask; the future ends with the value, PromptRefused or RunFailure."""
        return self._portal.start_task_soon(self._asked, ask)

    def ask(self, ask: Ask[T]) -> T:
        """Ask and wait."""
        return self.start(ask).result()

    def start_timed(self, path: str, body: dict[str, Any]) -> Future[Timing]:
        """Begin to ask once, and note when the pieces of the answer come. The future ends with that,
        or with what `ask` ends with; with Again where `ask` would try again."""
        return self._portal.start_task_soon(self._timed, path, body)

    def close(self) -> None:
        """Give up what is open. Harmless when repeated."""
        with self._stack:
            if not self._http.is_closed:
                self._portal.call(self._http.aclose)
                # Else the thread is waited for, and it for a server that may say nothing for hours.
                self._portal.call(self._portal.stop, True)

    async def _asked(self, ask: Ask[T]) -> T:
        tries = AsyncRetrying(
            retry=retry_if_exception_type(Again),
            stop=stop_after_attempt(self._endpoint.max_retries + 1),
            wait=self._wait,
            before_sleep=self._say,
            reraise=True,
        )
        try:
            with anyio.fail_after(self._left()):
                return await tries(self._once, ask)
        except TimeoutError as error:
            raise self._ended(self._late()) from error
        except PromptRefused:
            ENDPOINT_REQUESTS.labels("refused").inc()
            raise
        except Again as error:
            raise self._ended(self._unavailable(error)) from error
        except RunFailure as failure:
            raise self._ended(failure) from failure.__cause__

    async def _timed(self, path: str, body: dict[str, Any]) -> Timing:
        try:
            with anyio.fail_after(self._left()):
                timing = await self._timed_whole(path, body)
        except TimeoutError as error:
            raise self._ended(self._late()) from error
        ENDPOINT_REQUESTS.labels("answered").inc()
        ENDPOINT_TOKENS.labels("prompt").inc(timing.prompt_tokens)
        ENDPOINT_TOKENS.labels("answer").inc(timing.answer_tokens)
        return timing

    async def _timed_whole(self, path: str, body: dict[str, Any]) -> Timing:
        limit = self._endpoint.timeout_seconds * self._patience.whole_answer
        async with self._slots:
            await self._pace.ready()
            try:
                with anyio.fail_after(limit):
                    return await self._pieces(path, body)
            except TimeoutError as error:
                raise Again("slow", f"no whole answer within {limit:g} s") from error
            except httpx.HTTPError as error:
                text = str(error) or type(error).__name__
                raise Again("unreachable", f"no whole answer ({text})") from error

    async def _pieces(self, path: str, body: dict[str, Any]) -> Timing:
        def read(data: bytes) -> dict[str, Any]:
            return piece_of(self._without_key(data), self.model, self.url)

        began = time.perf_counter()
        async with self._http.stream("POST", path, json=body) as answer:
            wait = self._heed(answer.status_code, answer.headers)
            if answer.status_code != 200:
                content = self._without_key(await answer.aread())
                reply = Reply(answer.status_code, answer.headers, content)
                check_status(reply, self.url, self.model, wait)
            return await timed(answer, began, read)

    async def _once(self, ask: Ask[T]) -> T:
        while True:
            try:
                return await self._tried(ask)
            except _Adapted as adapted:
                # Not a try: there are as many of these as settings that one can do without.
                _log.info("the teacher's server is asked without %s", adapted)

    async def _tried(self, ask: Ask[T]) -> T:
        async with self._slots:
            await self._pace.ready()
            if self._failure is not None:
                # Another request found that there is no going on.
                raise self._failure
            reply = await self._reply(ask)
        wait = self._heed(reply.status, reply.headers)
        if reply.status not in ask.accepts:
            self._check(ask, reply, wait)
        if wait and wait > self._patience.longest_asked and self._failure is None:
            # This one is answered; the next is not asked.
            self._failure = self._asked_long(wait, "beside its answer")
        value = ask.read(reply)
        ENDPOINT_REQUESTS.labels("answered").inc()
        return value

    def _heed(self, status: int, headers: Mapping[str, str]) -> float | None:
        """What the server asks to wait; all do, unless it is too long."""
        wait = asked_wait(status, headers, datetime.now(UTC))
        if wait and wait <= self._patience.longest_asked:
            self._pace.hold(wait)
        return wait

    def _check(self, ask: Ask[Any], reply: Reply, wait: float | None) -> None:
        try:
            check_status(reply, self.url, self.model, wait)
        except SettingRefused as refused:
            if ask.adapt(refused):
                raise _Adapted(refused.setting) from refused
            if refused.setting == SEED:
                raise PromptRefused(refused.said) from refused
            raise
        except Again as error:
            if wait is not None and wait > self._patience.longest_asked:
                raise self._asked_long(wait, error.found) from error
            raise

    async def _reply(self, ask: Ask[Any]) -> Reply:
        limit = self._endpoint.timeout_seconds * self._patience.whole_answer
        method, body = ("GET", None) if ask.body is None else ("POST", ask.body())
        try:
            with anyio.fail_after(limit):
                got = await self._http.request(method, ask.path, json=body)
        except TimeoutError as error:
            raise Again("slow", f"no whole answer within {limit:g} s") from error
        except httpx.TimeoutException as error:
            silence = f"{self._endpoint.timeout_seconds:g} s without a byte"
            raise Again("silent", f"{silence} ({type(error).__name__})") from error
        except httpx.UnsupportedProtocol as error:
            raise refuse(f"{FIELD}.url", self.url, "write an http:// or https:// URL") from error
        except httpx.TransportError as error:
            text = str(error) or type(error).__name__
            raise Again("unreachable", f"no answer ({text})") from error
        except httpx.DecodingError as error:
            raise Again("unreadable", f"a body that does not decode ({error})") from error
        return Reply(got.status_code, got.headers, self._without_key(got.content))

    def _without_key(self, body: bytes) -> bytes:
        """Some servers print the key that they refuse; nothing of ours repeats it."""
        return body.replace(self._key.encode(), b"***") if self._key else body

    def _wait(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        backoff = self._backoff(state)
        if not isinstance(error, Again):
            return backoff
        if error.everybody and error.wait_seconds is None:
            self._pace.hold(backoff)
        return max(backoff, error.wait_seconds or 0.0)

    def _say(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        ENDPOINT_REQUESTS.labels("retried").inc()
        wait = round(state.upcoming_sleep, 2)
        extra = {"found": str(error), "tries": state.attempt_number, "wait_seconds": wait}
        _log.info("the teacher's server is asked again", extra=extra)

    def _ended(self, failure: RunFailure) -> RunFailure:
        ENDPOINT_REQUESTS.labels("failed").inc()
        if self._failure is None:
            self._failure = failure
        return failure

    def _asked_long(self, wait: float, found: str) -> RunFailure:
        return RunFailure(
            ExitCode.ENDPOINT_UNAVAILABLE,
            f"{FIELD}.url: {self.url} asks not to be asked for {wait:,.0f} s ({found}), and at most "
            f"{self._patience.longest_asked:g} s are waited; see its rates and what is left of them",
        )

    def _left(self) -> float:
        return max(0.0, self._until - time.monotonic())

    def _late(self) -> RunFailure:
        return RunFailure(
            ExitCode.ENDPOINT_UNAVAILABLE,
            f"{FIELD}.url: {self.url} did not answer all of it within {self._patience.in_all:g} s",
        )

    def _unavailable(self, error: Again) -> RunFailure:
        tries = self._endpoint.max_retries + 1
        return RunFailure(
            ExitCode.ENDPOINT_UNAVAILABLE,
            f"{FIELD}.url: {self.url} gave {error.found}, and {tries} tries in a row failed; see "
            f"that the server is up and answers within {FIELD}.timeoutSeconds, or lower "
            f"{FIELD}.concurrency",
        )


def _key() -> str:
    """The key, without the newline that files end with; empty where there is none."""
    key = os.environ.get(API_KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise refuse(
            f"{FIELD}.secretRef", f"a value of {API_KEY} that is not printable ASCII",
            "write the key itself into the Secret",
        )  # fmt: skip
    return key
