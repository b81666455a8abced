"""Jobs whose teacher writes text, and a teacher whose every answer is known and counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.runspec import ResolvedModel, RunSpec
from kubedistill_trainer.context import Context
from kubedistill_trainer.data.sources import read_prompts
from kubedistill_trainer.store import Store
from kubedistill_trainer.teacher.text import TextAnswer, TextRequest
from kubedistill_trainer.teacher.text_manifest import TextIdentity, TextManifest
from kubedistill_trainer.teacher.text_request import text_identity
from kubedistill_trainer.teacher.text_view import StreamView, open_view


class Clerk:
    """An Answerer that says back what it is asked; `asked` are (prompt, sample) in order.

    `before` is called before each answer, and may wait or raise.
    """

    def __init__(
        self,
        before: Callable[[TextRequest], object] = lambda request: None,
        *,
        counts: bool = True,
    ) -> None:
        self.asked: list[tuple[int, int]] = []
        self._before = before
        self._counts = counts

    def open(self, manifest: TextManifest) -> Clerk:
        return self

    def answers(self, requests: Iterable[TextRequest]) -> Iterator[tuple[TextRequest, TextAnswer]]:
        for request in requests:
            self.asked.append((request.prompt, request.sample))
            self._before(request)
            said = answer_to(request)
            yield request, said if self._counts else TextAnswer(said.text)

    def close(self) -> None:
        """Nothing is open."""


def answer_to(request: TextRequest) -> TextAnswer:
    """With what would break lines that are not JSON."""
    said = f"{request.messages[-1].content}\u2028{request.sample}\n"
    return TextAnswer(said, prompt_tokens=10, answer_tokens=5)


def put_prompts(store: Store, count: int) -> str:
    """A file of prompts under the store; its address."""
    lines = "".join(json.dumps({"q": f"question {n}", "a": n}) + "\n" for n in range(count))
    store.put("data/q.jsonl", lines.encode())
    return store.uri_of("data/q.jsonl")


def text_job(store: Store, prompts: str, *, samples: int = 1, **parts: Any) -> RunSpec:
    """A job that has the prompts at an address answered; its storage is at `store`."""
    generation = {"samples": samples, "temperature": 1.0, "maxTokens": 16}
    fields = {
        "distill": {"signal": "Responses", "generation": generation},
        "teacher": {"model": {"uri": "s3://nowhere/teacher"}},
        "student": {"config": {"model_type": "llama"}},
        "data": {
            "sources": [{"uri": prompts, "origin": "Teacher", "promptField": "q", "answerField": "a"}],
            "tokenizer": {"uri": "s3://nowhere/tokenizer"},
        },
        "storage": {"uri": store.uri, "endpoint": store.endpoint},
        "evaluation": {"examples": 0, "latency": False},
        **parts,
    }  # fmt: skip
    spec = DistillationJobSpec.model_validate(fields)
    own = spec.teacher is not None and spec.teacher.model is not None
    return RunSpec(
        namespace="n", name="j", uid="u", role="teacher", inputs_digest="d" * 64, spec=spec,
        teacher_model=ResolvedModel(uri="s3://nowhere/teacher", digest="t" * 64) if own else None,
    )  # fmt: skip


def context_of(run: RunSpec, store: Store, scratch: Path, partition: int = 0) -> Context:
    """The run's context with `store` for its storage: one that can be made to fail."""
    return Context(run, scratch, partition=partition, _stores={run.spec.storage.uri: store})


def identity_of(run: RunSpec, store: Store) -> TextIdentity:
    context = context_of(run, store, Path())
    return text_identity(run, read_prompts(run.spec.data, context.open_store), context.open_store)


def view_of(run: RunSpec, store: Store) -> StreamView | None:
    """What is committed now; None before the first writer came."""
    return open_view(store, identity_of(run, store))
