"""What the endpoint of `endpoint_kit` says of its answers: how sure it is, and piece by piece."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from aiohttp import web

if TYPE_CHECKING:
    from endpoint_kit import Mind

_PIECE_SECONDS = 0.002
# As GPT-2's byte-level BPE writes bytes: those that print as they are, the others from U+0100 on.
_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]
_BYTES = {chr(byte): byte for byte in _PRINTED} | {chr(256 + n): b for n, b in enumerate(_OTHERS)}


def weighed(mind: Mind, prompt: list[int], answer: list[int]) -> list[dict[str, Any]]:
    """`logprobs.content` of chat-completions."""
    if not answer:
        return []
    rows = mind.log_probs([*prompt, *answer])[len(prompt) - 1 : -1]
    return [
        {
            "token": mind.text([token]),
            "logprob": float(row[token]),
            "bytes": _bytes(mind, token),
            "top_logprobs": [],
        }
        for row, token in zip(rows, answer, strict=True)
    ]


def _bytes(mind: Mind, token: int) -> list[int]:
    """Of a byte-level tokenizer's token, which may be a part of a character."""
    written = mind.tokenizer.tokenizer.id_to_token(token) or ""
    if any(character not in _BYTES for character in written):
        return list(mind.text([token]).encode())
    return [_BYTES[character] for character in written]


def continued(
    mind: Mind,
    prompt: list[int],
    answer: list[int],
    ended: bool,
    stop: Sequence[str] | None,
    tells: bool,
) -> dict[str, Any]:
    """A choice of completions: `answer` up to the first of `stop`."""
    text, kept = mind.text(answer), list(answer)
    for word in stop or ():
        if word in text:
            text, ended = text[: text.index(word)], True
            while kept and len(mind.text(kept[:-1])) >= len(text):
                kept.pop()
    choice: dict[str, Any] = {"index": 0, "text": text}
    choice["finish_reason"] = "stop" if ended else "length"
    if tells:
        found = weighed(mind, prompt, kept)
        choice["logprobs"] = {
            "tokens": [entry["token"] for entry in found],
            "token_logprobs": [entry["logprob"] for entry in found],
        }
    return choice


async def streamed(request: web.Request, content: dict[str, Any], mind: Mind) -> web.StreamResponse:
    """The same answer in server-sent events, a token each, as real servers do."""
    [choice] = content["choices"]
    chat = "message" in choice
    text = choice["message"]["content"] if chat else choice["text"]
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)

    async def send(piece: dict[str, Any]) -> None:
        await response.write(f"data: {json.dumps(piece)}\n\n".encode())

    if chat:
        await send({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    for token in mind.ids(text):
        await asyncio.sleep(_PIECE_SECONDS)
        said = mind.text([token])
        part = {"delta": {"content": said}} if chat else {"text": said}
        await send({"choices": [{"index": 0, **part}]})
    if (await request.json()).get("stream_options", {}).get("include_usage"):
        await send({"choices": [], "usage": content["usage"]})
    await response.write(b"data: [DONE]\n\n")
    return response


async def sent(request: web.Request, parts: Sequence[bytes], pause: float) -> web.StreamResponse:
    """Whatever a server may send for events."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for part in parts:
        await response.write(part)
        await asyncio.sleep(pause)
    return response
