"""What the tests of a teacher behind a server share: what is asked, and what comes of it."""

from __future__ import annotations

from typing import Any

from endpoint_kit import Server
from kubedistill_api.generation import Generation
from kubedistill_api.teacher import Endpoint
from kubedistill_trainer.data.conversation import Message
from kubedistill_trainer.teacher.endpoint import EndpointAnswerer
from kubedistill_trainer.teacher.endpoint_client import Patience
from kubedistill_trainer.teacher.text import TextAnswer, TextRequest

KEY = "sk-very-secret-0123456789"
QUICK = Patience(first_wait=0.01, longest_wait=0.05, jitter=0.01)
GENERATION = Generation(max_tokens=6, temperature=0.0)
PROMPTS = 10


def endpoint(server: Server, **changes: Any) -> Endpoint:
    fields = {"url": server.url, "model": "tiny", "concurrency": 3, "maxRetries": 4, **changes}
    return Endpoint.model_validate(fields)


def requests(count: int = PROMPTS, samples: int = 1) -> list[TextRequest]:
    return [
        TextRequest(p, s, (Message("user", f"question {p}"),), seed=100 * p + s)
        for p in range(count)
        for s in range(samples)
    ]


def asked(
    found: Endpoint,
    generation: Generation = GENERATION,
    wanted: list[TextRequest] | None = None,
    patience: Patience = QUICK,
) -> dict[tuple[int, int], TextAnswer]:
    """All answers; that each request has one is part of it."""
    answerer = EndpointAnswerer(found, generation, patience)
    wanted = requests() if wanted is None else wanted
    try:
        pairs = list(answerer.answers(iter(wanted)))
    finally:
        answerer.close()
    answers = {(request.prompt, request.sample): answer for request, answer in pairs}
    assert len(answers) == len(pairs) == len(wanted)
    return answers
