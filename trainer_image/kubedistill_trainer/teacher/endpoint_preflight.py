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
from kubedistill_trainer.teacher.endpoint_reply import FIELD, Again, Reply, same_model
from kubedistill_trainer.teacher.request import score_width
from kubedistill_trainer.teacher.text import TextRequest

_RETRIES = 3
"""At most: who waits for the preflight wants to know soon, and the operator tries it again."""
_LONGEST_ASKED = 30.0
"""Seconds that a server may ask to wait, for the same reason."""
_PROBE = TextRequest(prompt=0, sample=0, messages=(Message("user", "Hello"),), seed=0)
_SHOWN = 10


def check_endpoint(
    spec: DistillationJobSpec,
    tokenizer: TextTokenizer,
    longest_text: int = 0,
    patience: Patience | None = None,
) -> None:
    """Nothing where the teacher has no endpoint, or all is well.

    `longest_text`: tokens of the longest that is scored, for `signal: Logits`. Costs a token of an
    answer, or what scoring such a text costs. InputsRefused, or RunFailure where the endpoint
    cannot be reached.
    """
    if spec.teacher is None or spec.teacher.endpoint is None or spec.distill is None:
        return
    found = spec.teacher.endpoint
    endpoint = found.model_copy(update={"max_retries": min(found.max_retries, _RETRIES)})
    patience = replace(patience or Patience(), longest_asked=_LONGEST_ASKED)
    client = Client(endpoint, patience)
    try:
        _check_listed(client)
        if spec.distill.signal == "Logits":
            find_way(client, score_width(spec.teacher, tokenizer), tokenizer, longest_text)
            return
    finally:
        client.close()
    _check_answer(endpoint, spec.distill.generation or Generation(), patience)


def _check_listed(client: Client) -> None:
    """Not every server lists its models; one that does says what may be asked for."""
    names = client.ask(Ask("models", _listed, accepts=frozenset({400, 403, 404, 405, 501})))
    if names and not any(same_model(client.model, name) for name in names):
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise refuse(
            f"{FIELD}.model", f"{client.model}, which {client.url} does not serve",
            f"write one of: {', '.join(sorted(names)[:_SHOWN])}{more}",
        )  # fmt: skip


def _listed(reply: Reply) -> list[str]:
    """Names of the models; none where the server does not list them."""
    if reply.status != 200:
        return []
    content = reply.json()
    entries = content.get("data") if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise Again("unreadable", "a list of models of another shape")
    names = (entry.get("id") for entry in entries if isinstance(entry, dict))
    return [name for name in names if isinstance(name, str)]


def _check_answer(endpoint: Endpoint, generation: Generation, patience: Patience) -> None:
    """One question with the run's settings and an answer of one token."""
    answerer = EndpointAnswerer(endpoint, generation.model_copy(update={"max_tokens": 1}), patience)
    try:
        [(_, answer)] = answerer.answers([_PROBE])
    finally:
        answerer.close()
    if answer.refusal:
        raise refuse(
            f"{FIELD}.url", f"{endpoint.url} refuses to answer “Hello” ({answer.refusal})",
            "mend the server, or see whether it knows the settings of spec.distill.generation",
        )  # fmt: skip
