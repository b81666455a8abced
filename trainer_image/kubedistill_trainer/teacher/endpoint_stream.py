"""When a server's answer comes, piece by piece: server-sent events of OpenAI's API.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html; the pieces are JSON after
`data:`, and `[DONE]` ends them.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx

from kubedistill_trainer.teacher.endpoint_reply import Again, tokens_of

_DATA, _DONE = "data:", "[DONE]"


@dataclass(frozen=True)
class Timing:
    """Of one answer. `times`: when each piece with text came, in seconds since it was asked for.

    `prompt_tokens`, `answer_tokens`: as the server counted them; where it does not, 0 and a token a
    piece.
    """

    times: tuple[float, ...]
    prompt_tokens: int
    answer_tokens: int


async def timed(answer: httpx.Response, began: float) -> Timing:
    """Read a whole answer. `began`: by time.perf_counter(). Again for one that is not in pieces."""
    times: list[float] = []
    counted = 0, 0
    async for piece in _pieces(answer):
        if _says(piece):
            times.append(time.perf_counter() - began)
        counts = tokens_of(piece)
        counted = counts if any(counts) else counted
    if not times:
        raise Again("unreadable", "an answer without pieces of text, though `stream` was asked for")
    prompt_tokens, answer_tokens = counted
    return Timing(tuple(times), prompt_tokens, answer_tokens or len(times))


async def _pieces(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in answer.aiter_lines():
        if not line.startswith(_DATA):
            continue
        data = line.removeprefix(_DATA).strip()
        if data == _DONE:
            return
        try:
            piece = json.loads(data)
        except ValueError as error:
            raise Again("unreadable", "a piece of an answer that is not JSON") from error
        if isinstance(piece, dict):
            yield piece


def _says(piece: dict[str, Any]) -> bool:
    """Whether there is text in it, reasoning included: that is what a model was busy with."""
    choices = piece.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return False
    delta = choices[0].get("delta")
    found = delta if isinstance(delta, dict) else choices[0]
    return any(found.get(name) for name in ("content", "text", "reasoning_content", "reasoning"))
