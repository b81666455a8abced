"""How a server scores prompts, whether it gives as much as is asked for, and by which tokenizer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kubedistill_trainer.data.tokenizer import TextTokenizer
from kubedistill_trainer.failures import InputsRefused, refuse, unreadable
from kubedistill_trainer.teacher.endpoint_client import Ask, Client
from kubedistill_trainer.teacher.endpoint_reply import (
    TOO_LONG,
    Complaint,
    Reply,
    check_model,
    check_status,
    complaint_of,
)
from kubedistill_trainer.teacher.endpoint_scores import (
    COMPLETIONS,
    ID_PREFIX,
    NoScores,
    Way,
    body_of,
    rows_of,
    scores_of,
)

PROBE = "The 7 wise men of Gotham went to sea in a bowl; what became of them, nobody has told."
_WAYS: tuple[Way, ...] = ("prompt_logprobs", "echo")
_LIMIT = re.compile(r"(?:max(?:imum)? allowed:?|more than|at most|up to|<=|≤)\s*(\d+)", re.I)
_DECLINED = frozenset({400, 404, 405, 422, 501})
_ANY_ERROR = frozenset(range(400, 600))


class _Declined(NoScores):
    """The server takes no such request; `said` may say why."""

    def __init__(self, said: Complaint) -> None:
        super().__init__(said.message)
        self.said = said


@dataclass(frozen=True)
class _Answer:
    """What a server says of a probe."""

    content: dict[str, Any]
    rows: Sequence[dict[int, float]]


def find_way(client: Client, k: int, tokenizer: TextTokenizer, length: int) -> Way:
    """The way in which the server gives the `k` likeliest tokens for texts of `length` tokens.

    InputsRefused where there is none, it gives fewer, has too small a context, or its ids are not
    those of `tokenizer`; RunFailure where it cannot be reached.
    """
    ids = tokenizer.tokenizer.encode(PROBE, add_special_tokens=False).ids
    whole = (ids * (length // len(ids) + 1))[: max(length, len(ids))]
    found: list[str] = []
    for way in _WAYS:
        try:
            answer = _ask(client, whole, k, way)
        except _Declined as declined:
            _check_limits(client, declined.said, k, length)
            found.append(f"{way}: {declined}")
        except NoScores as nothing:
            found.append(str(nothing))
        else:
            scores_of(answer.rows, k, tokenizer.vocab_size)
            _check_tokenizer(client, tokenizer, ids, answer, way)
            return way
    raise refuse(
        "spec.teacher.endpoint", f"{client.url} scores no prompts ({'; '.join(found)})",
        "name a server with prompt_logprobs on /completions, such as vLLM; or write "
        "`distill.signal: Responses`",
    )  # fmt: skip


def _ask(client: Client, prompt: Sequence[int] | str, k: int, way: Way) -> _Answer:
    length = 1 if isinstance(prompt, str) else len(prompt)

    def read(reply: Reply) -> _Answer:
        if reply.status in _DECLINED:
            said = complaint_of(reply.body)
            if reply.status == 404 and "model" in said.message.lower():
                check_status(reply, client.url, client.model, None)
            raise _Declined(said)
        content = reply.json()
        rows = rows_of(content, length, way)
        check_model(content, client.model, client.url)
        return _Answer(content, rows)

    body = body_of(client.model, prompt, k, way)
    return client.ask(Ask(COMPLETIONS, read, lambda: body, accepts=_DECLINED))


def _check_limits(client: Client, said: Complaint, k: int, length: int) -> None:
    if TOO_LONG.search(said.message):
        raise refuse(
            "spec.data.sequenceLength", f"texts of {length} tokens, which {client.url} does not "
            f"take ({said.message})",
            "write fewer than the server's context has room for, or serve it with a larger one",
        )  # fmt: skip
    if "logprob" not in f"{said.setting} {said.message}".lower():
        return
    limit = _LIMIT.search(said.message)
    if limit is not None and int(limit[1]) < k:
        raise refuse(
            "spec.teacher.topK", f"{k}, and {client.url} gives {limit[1]} at most ({said.message})",
            f"write {limit[1]}, or serve the model with more (vLLM: --max-logprobs {k})",
        )  # fmt: skip


def _check_tokenizer(
    client: Client, tokenizer: TextTokenizer, ids: list[int], answer: _Answer, way: Way
) -> None:
    """Refuse a server whose model reads other ids than the data has."""
    theirs = _tokenized(client)
    if theirs is None and way == "echo":
        theirs = _echoed(client, len(ids))
    if theirs is None:
        _check_texts(client, tokenizer, ids, answer)
    elif theirs != ids and theirs[1:] != ids:
        raise _other_tokenizer(client, f"{theirs[:8]}… and not {ids[:8]}… for “{PROBE[:20]}…”")


def _tokenized(client: Client) -> list[int] | None:
    """The server's ids of the probe by vLLM's /tokenize, beside the API; None where there is none."""

    def read(reply: Reply) -> list[int] | None:
        try:
            tokens = reply.json().get("tokens") if reply.status == 200 else None
        except AttributeError:
            return None
        return tokens if isinstance(tokens, list) and tokens else None

    body = {"model": client.model, "prompt": PROBE, "add_special_tokens": False}
    root = client.url.rsplit("/v1", 1)[0]
    return client.ask(Ask(f"{root}/tokenize", read, lambda: body, accepts=_ANY_ERROR))


def _echoed(client: Client, length: int) -> list[int] | None:
    """The server's ids of the probe's text as it is echoed, perhaps after one that begins texts."""
    try:
        answer = _ask(client, PROBE, 1, "echo")
        names = answer.content["choices"][0]["logprobs"]["tokens"]
        found = [int(name.removeprefix(ID_PREFIX)) for name in names]
    except (NoScores, AttributeError, KeyError, TypeError, ValueError):
        return None
    # The answer's own token is the last, where there is one.
    return next((found[:n] for n in (length, length + 1) if len(found) in (n, n + 1)), found)


def _check_texts(client: Client, tokenizer: TextTokenizer, ids: list[int], answer: _Answer) -> None:
    """By the texts that vLLM puts beside the ids that it was given."""
    rows = answer.content["choices"][0].get("prompt_logprobs") or []
    compared = 0
    for token, row in zip(ids[1:], rows[1:], strict=False):
        entry = row.get(str(token)) or {}
        theirs, ours = entry.get("decoded_token"), tokenizer.tokenizer.decode([token])
        if isinstance(theirs, str) and theirs.strip() and ours.strip().isascii():
            compared += 1
            if theirs.strip() != ours.strip():
                raise _other_tokenizer(client, f"“{theirs}” and not “{ours}” for id {token}")
    if not compared:
        raise _other_tokenizer(client, "neither /tokenize nor the texts of tokens, to compare with")


def _other_tokenizer(client: Client, found: str) -> InputsRefused:
    return unreadable(
        "spec.data.tokenizer", f"another tokenizer than that of {client.model}: {client.url} has {found}",
        "give the folder with the tokenizer of the endpoint's model",
    )  # fmt: skip
