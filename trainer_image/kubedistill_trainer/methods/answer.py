"""A model of one's own that answers in text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from kubedistill_trainer.data.conversation import Message
from kubedistill_trainer.data.template import ChatTemplate, Unrenderable
from kubedistill_trainer.data.tokenizer import TextTokenizer
from kubedistill_trainer.models.generation import generate
from kubedistill_trainer.teacher.text import TextAnswer, TextRequest
from kubedistill_trainer.teacher.text_manifest import TextIdentity
from kubedistill_trainer.teacher.text_request import positions_of, question
from kubedistill_trainer.teacher.thought import unsaid_ids

_log = logging.getLogger(__name__)
_ROWS = 32
"""Answers at once, while memory allows."""
Generate = Callable[..., list[list[int]]]
"""`models.generation.generate`, or the same in several processes at once."""


class OwnTeacher:
    """Answers by a model in this process, rendered by its own tokenizer and chat template.

    An answer depends on its request's seed, not on what else is in its batch: a writer that resumes
    says, but for rounding, what it would have said.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: TextTokenizer,
        template: ChatTemplate,
        identity: TextIdentity,
        generate: Generate = generate,
    ) -> None:
        self._model = model
        self._generate = generate
        self._tokenizer = tokenizer
        self._template = template
        self._identity = identity
        self._ends = end_ids(model, tokenizer, template)
        self._positions = positions_of(model.config.to_dict())
        self._unsaid = unsaid_ids(tokenizer)
        self._rows = _ROWS

    def answers(self, requests: Iterable[TextRequest]) -> Iterator[tuple[TextRequest, TextAnswer]]:
        """As `Answerer`; requests of like length should follow each other."""
        waiting = iter(requests)
        while batch := list(islice(waiting, self._rows)):
            asked: list[tuple[TextRequest, list[int]]] = []
            for request in batch:
                prompt = self._prompt(request)
                if isinstance(prompt, TextAnswer):
                    yield request, prompt
                else:
                    asked.append((request, prompt))
            for (request, prompt), said in zip(asked, self._said(asked), strict=True):
                yield request, self._answer(prompt, said)

    def close(self) -> None:
        """Nothing is open."""

    def _prompt(self, request: TextRequest) -> list[int] | TextAnswer:
        """The prompt's tokens, or why there is no answer to it."""
        try:
            text = question(self._template, request.messages)
        except Unrenderable as problem:
            return TextAnswer("", refusal=str(problem))
        ids: list[int] = self._tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
        room = self._positions - self._identity.max_tokens
        if len(ids) > room:
            return TextAnswer(
                "",
                refusal=f"a prompt of {len(ids)} tokens: with {self._identity.max_tokens} for the "
                f"answer the teacher's {self._positions} positions have room for {room}",
                prompt_tokens=len(ids),
            )
        return ids

    def _said(self, asked: Sequence[tuple[TextRequest, list[int]]]) -> list[list[int]]:
        """Tokens of the answers; in smaller batches once memory was too short for a whole one."""
        said: list[list[int]] = []
        while len(said) < len(asked):
            part = asked[len(said) : len(said) + self._rows]
            try:
                said += self._generated(part)
            except torch.OutOfMemoryError:
                if self._rows == 1:
                    raise
                self._rows //= 2
                _log.warning("memory is short: smaller batches", extra={"rows": self._rows})
        return said

    def _generated(self, part: Sequence[tuple[TextRequest, list[int]]]) -> list[list[int]]:
        return self._generate(
            self._model,
            prompts=[prompt for _, prompt in part],
            max_tokens=self._identity.max_tokens,
            end_ids=self._ends,
            temperature=self._identity.temperature,
            top_p=self._identity.top_p,
            seeds=[request.seed for request, _ in part],
        )

    def _answer(self, prompt: Sequence[int], said: list[int]) -> TextAnswer:
        # One that ends has room left for its end: `generate` gives answers without it.
        finished = len(said) < self._identity.max_tokens
        words = [token for token in said if token not in self._unsaid]
        return TextAnswer(
            text=self._tokenizer.tokenizer.decode(words, skip_special_tokens=False),
            finished=finished,
            prompt_tokens=len(prompt),
            answer_tokens=len(said) + finished,
        )


def end_ids(model: Any, tokenizer: TextTokenizer, template: ChatTemplate) -> frozenset[int]:
    """Tokens that end an answer: the model's, the tokenizer's, and the template's end of a turn."""
    found = {tokenizer.end_of_text}
    for config in (model.config, model.generation_config):
        given = getattr(config, "eos_token_id", None)
        found.update([given] if isinstance(given, int) else given or [])
    marker = end_of_turn(tokenizer, template)
    return frozenset(found if marker is None else {*found, marker})


def end_of_turn(tokenizer: TextTokenizer, template: ChatTemplate) -> int | None:
    """The token of its own that the template puts right after what the assistant says, if any."""
    said = "kubedistill"
    try:
        text = template.render((Message("user", "?"), Message("assistant", said)))
    except Unrenderable:
        return None
    after = text[text.rindex(said) + len(said) :].strip() if said in text else ""
    ids: list[int] = tokenizer.tokenizer.encode(after, add_special_tokens=False).ids
    own = tokenizer.tokenizer.get_added_tokens_decoder()
    return ids[0] if ids and ids[0] in own else None
