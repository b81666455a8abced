"""When a server's answer comes, piece by piece: server-sent events of OpenAI's API.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html; the pieces are JSON after
`data:`, and `[DONE]` ends them.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
import httpx

from kubedistill_trainer.teacher.endpoint_reply import (
    Again,
    PromptRefused,
    Reply,
    check_model,
    complaint_of,
    count_of,
    tokens_of,
)

_DATA, _DONE = b"data:", b"[DONE]"
_LINE_ENDS = re.compile(rb"\r\n|\r|\n")
"""Not what Python takes for one: a text may hold U+2028 and others as they are."""
_REST_SECONDS = 1.0
"""For which the end of what follows `[DONE]` is waited for: else its connection is lost."""
_REASONING = ("reasoning_content", "reasoning")
_TEXTS = ("content", "text", *_REASONING)
Piece = dict[str, Any]


@dataclass(frozen=True)
class Timing:
    """Of one answer. `times`: when each piece with text came, in seconds since it was asked for.

    `prompt_tokens`, `answer_tokens`: as the server counted them; where it does not, 0 and a token a
    piece. `said_tokens`: of the answer, without those of reasoning that is kept to the server.
    """

    times: tuple[float, ...]
    prompt_tokens: int
    answer_tokens: int
    said_tokens: int


async def timed(answer: httpx.Response, began: float, read: Callable[[bytes], Piece]) -> Timing:
    """Read a whole answer. `began`: by time.perf_counter(); `read`: see `piece_of`.

    Again for one that is not whole, PromptRefused for a whole one without pieces of text.
    """
    if answer.headers.get("content-type", "").startswith("application/json"):
        raise _without_pieces(*tokens_of(read(await answer.aread())))
    times: list[float] = []
    counted, hidden, thought, ended = (0, 0), 0, False, False
    pieces = _pieces(answer)
    async for data in pieces:
        if data == _DONE:
            ended = True
            await _rest(pieces)
            break
        piece = read(data)
        choice = _choice(piece)
        if _says(choice, _TEXTS):
            times.append(time.perf_counter() - began)
        thought = thought or _says(choice, _REASONING)
        ended = ended or bool(choice.get("finish_reason"))
        if any(counts := tokens_of(piece)):
            counted, hidden = counts, _hidden_tokens(piece)
    if not times:
        if ended:
            raise _without_pieces(*counted)
        raise Again("unreadable", "an answer that ended before it had said anything")
    prompt_tokens, answer_tokens = counted[0], counted[1] or len(times)
    said_tokens = answer_tokens if thought else max(len(times), answer_tokens - hidden)
    return Timing(tuple(times), prompt_tokens, answer_tokens, said_tokens)


def piece_of(body: bytes, model: str, url: str) -> Piece:
    """The JSON of a piece. Again for none and for an error, InputsRefused for another model's."""
    found = Reply(200, {}, body).json()
    if not isinstance(found, dict):
        return {}
    if found.get("error") or found.get("object") == "error":
        said = complaint_of(body).message
        raise Again("failing", f"an error in place of the rest of an answer ({said})")
    check_model(found, model, url)
    return found


async def _pieces(answer: httpx.Response) -> AsyncIterator[bytes]:
    """The data of each event."""
    rest = b""
    async for part in answer.aiter_bytes():
        *lines, rest = _LINE_ENDS.split(rest + part)
        for line in lines:
            if line.startswith(_DATA):
                yield line.removeprefix(_DATA).strip()
    if rest.startswith(_DATA):
        yield rest.removeprefix(_DATA).strip()


async def _rest(pieces: AsyncIterator[bytes]) -> None:
    with contextlib.suppress(httpx.HTTPError), anyio.move_on_after(_REST_SECONDS):
        async for _ in pieces:
            pass


def _without_pieces(prompt_tokens: int, answer_tokens: int) -> PromptRefused:
    found = "an answer without pieces of text, though `stream` was asked for"
    return PromptRefused(found, prompt_tokens, answer_tokens)


def _choice(piece: Piece) -> Piece:
    choices = piece.get("choices")
    found = choices[0] if isinstance(choices, list) and choices else None
    return found if isinstance(found, dict) else {}


def _says(choice: Piece, names: Sequence[str]) -> bool:
    """Whether there is text in it, reasoning included: that is what a model was busy with."""
    delta = choice.get("delta")
    found = delta if isinstance(delta, dict) else choice
    return any(found.get(name) for name in names)


def _hidden_tokens(piece: Piece) -> int:
    details = piece["usage"].get("completion_tokens_details")
    return count_of(details.get("reasoning_tokens")) if isinstance(details, dict) else 0
