"""Is the endpoint there, does it take the key, and is it the model that was asked for?"""

from __future__ import annotations

from dataclasses import replace

from kubedistill_api.generation import Generation
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.teacher import Endpoint

from kubedistill_trainer.data.conversation import Message
from kubedistill_trainer.data.tokenizer import TextTokenizer
from kubedistill_trainer.failures import refuse
from kubedistill_trainer.teacher.endpoint import EndpointAnswerer
from kubedistill_trainer.teacher.endpoint_client import Ask, Client, Patience
from kubedistill_trainer.teacher.endpoint_probe import find_way
from kubedistill_trainer.teacher.endpoint_reply import (
    FIELD,
    MAX_TOKENS,
    TOO_LONG,
    Again,
    Reply,
    count_of,
    same_model,
)
from kubedistill_trainer.teacher.request import score_width
from kubedistill_trainer.teacher.text import TextRequest

_RETRIES = 3
"""At most: who waits for the preflight wants to know soon, and the operator tries it again."""
_LONGEST_ASKED = 30.0
"""Seconds that a server may ask to wait, for the same reason."""
_ASKED = "Hello"
_PROBE = TextRequest(prompt=0, sample=0, messages=(Message("user", _ASKED),), seed=0)
_SHOWN = 10


def check_endpoint(
    spec: DistillationJobSpec,
    tokenizer: TextTokenizer,
    longest_text: int = 0,
    patience: Patience | None = None,
) -> None:
    """Nothing where the teacher has no endpoint, or all is well.

    `longest_text`: tokens of the longest that is scored, for `signal: Logits`. Costs a short
    answer, or what scoring such a text costs. InputsRefused, or RunFailure where the endpoint cannot be
    reached.
    """
    if spec.teacher is None or spec.teacher.endpoint is None or spec.distill is None:
        return
    found = spec.teacher.endpoint
    endpoint = found.model_copy(update={"max_retries": min(found.max_retries, _RETRIES)})
    patience = replace(patience or Patience(), longest_asked=_LONGEST_ASKED)
    client = Client(endpoint, patience)
    try:
        room = _check_listed(client)
        if spec.distill.signal == "Logits":
            find_way(client, score_width(spec.teacher, tokenizer), tokenizer, longest_text)
            return
    finally:
        client.close()
    generation = spec.distill.generation or Generation()
    if room is not None:
        _check_room(endpoint, generation, room)
        generation = generation.model_copy(update={"max_tokens": 1})
    _check_answer(endpoint, generation, patience)


def _check_listed(client: Client) -> int | None:
    """Tokens of the model's context, where the server says so.

    Not every server lists its models; one that does says what may be asked for.
    """
    found = client.ask(Ask("models", _listed, accepts=frozenset({400, 403, 404, 405, 501})))
    ours = [name for name in found if same_model(client.model, name)]
    if found and not ours:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise refuse(
            f"{FIELD}.model", f"{client.model}, which {client.url} does not serve",
            f"write one of: {', '.join(sorted(found)[:_SHOWN])}{more}",
        )  # fmt: skip
    return found.get(client.model, found[ours[0]] if ours else None)


def _listed(reply: Reply) -> dict[str, int | None]:
    """Context in tokens (vLLM says it) by the model's name; none where the server lists no models."""
    if reply.status != 200:
        return {}
    content = reply.json()
    entries = content.get("data") if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise Again("unreadable", "a list of models of another shape")
    known = [entry for entry in entries if isinstance(entry, dict)]
    return {
        entry["id"]: count_of(entry.get("max_model_len")) or None
        for entry in known
        if isinstance(entry.get("id"), str)
    }


def _check_room(endpoint: Endpoint, generation: Generation, room: int) -> None:
    """A prompt has to have room beside the answer."""
    if generation.max_tokens >= room:
        raise refuse(
            MAX_TOKENS, f"{generation.max_tokens}, and {endpoint.url} says of {endpoint.model}: "
            f"max_model_len {room}",
            "write as many as leave room for the prompts, or serve the model with a larger context",
        )  # fmt: skip


def _check_answer(endpoint: Endpoint, generation: Generation, patience: Patience) -> None:
    """One question with the run's settings: what is answered to it is short."""
    answerer = EndpointAnswerer(endpoint, generation, patience)
    try:
        [(_, answer)] = answerer.answers([_PROBE])
    finally:
        answerer.close()
    if not answer.refusal:
        return
    if TOO_LONG.search(answer.refusal):
        raise refuse(
            MAX_TOKENS, f"{generation.max_tokens}, for which {endpoint.url} has no room "
            f"({answer.refusal})",
            "write as many as leave room for the prompts, or serve the model with a larger context",
        )  # fmt: skip
    raise refuse(
        f"{FIELD}.url", f"{endpoint.url} refuses to answer “{_ASKED}” ({answer.refusal})",
        "mend the server, or see whether it knows the settings of spec.distill.generation",
    )  # fmt: skip
