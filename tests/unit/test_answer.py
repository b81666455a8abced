"""An own model that answers: by its own template, ended where it ends, alike in any batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import data_kit
import pytest
import torch
from endpoint_kit import Mind
from kubedistill_trainer.data.conversation import Message
from kubedistill_trainer.data.template import EXAMPLE, ChatTemplate
from kubedistill_trainer.methods.answer import OwnTeacher, end_ids, end_of_turn
from kubedistill_trainer.models.generation import generate
from kubedistill_trainer.teacher.text import TextAnswer, TextRequest
from kubedistill_trainer.teacher.text_manifest import TextIdentity

IDENTITY = TextIdentity(
    teacher="t", prompts_digest="p", samples=1, max_tokens=12, temperature=1.0, top_p=1.0,
    reasoning=False,
)  # fmt: skip
REQUESTS = [
    TextRequest(n, 0, (Message("user", "the question " * n + "?"),), seed=n) for n in range(1, 8)
]


def teacher(mind: Mind, template: str = data_kit.TURNS, **changes: Any) -> OwnTeacher:
    generated = changes.pop("generate", generate)
    chat = ChatTemplate(mind.tokenizer, template, "spec.teacher")
    identity = IDENTITY.model_copy(update=changes)
    return OwnTeacher(mind.model, mind.tokenizer, chat, identity, generated)


def said(answerer: OwnTeacher, requests: list[TextRequest] = REQUESTS) -> dict[int, TextAnswer]:
    return {request.prompt: answer for request, answer in answerer.answers(iter(requests))}


def test_an_answer_is_what_the_model_says_after_its_template(mind: Mind) -> None:
    answers = said(teacher(mind, temperature=0))
    for request in REQUESTS:
        text = f"<|im_start|>user\n{request.messages[0].content}<|im_end|>\n<|im_start|>assistant\n"
        ids = mind.ids(text)
        ends = end_ids(mind.model, mind.tokenizer, ChatTemplate(mind.tokenizer, data_kit.TURNS, ""))
        [wanted] = generate(mind.model, [ids], max_tokens=12, end_ids=ends)
        answer = answers[request.prompt]
        assert answer.text == mind.tokenizer.tokenizer.decode(wanted)
        finished = len(wanted) < 12
        assert (answer.finished, answer.prompt_tokens) == (finished, len(ids))
        assert answer.answer_tokens == len(wanted) + finished
        assert not answer.refusal


def test_a_draw_does_not_depend_on_what_is_asked_beside_it(mind: Mind) -> None:
    together = said(teacher(mind))
    assert said(teacher(mind), REQUESTS[3:]) == {n: together[n] for n in range(4, 8)}
    assert said(teacher(mind), REQUESTS[::-1]) == together
    other = [replace(request, seed=request.seed + 100) for request in REQUESTS]
    assert said(teacher(mind), other) != together


def test_requests_are_taken_no_further_ahead_than_a_batch(mind: Mind) -> None:
    taken: list[int] = []

    def many() -> Any:
        for n in range(100):
            taken.append(n)
            yield replace(REQUESTS[0], prompt=n, seed=n)

    answers = teacher(mind, max_tokens=1).answers(many())
    next(answers)
    assert len(taken) == 32


def test_what_cannot_be_asked_is_refused_and_the_others_are_answered(mind: Mind) -> None:
    long = replace(REQUESTS[0], prompt=50, messages=(Message("user", "x" * 600),))
    answers = said(teacher(mind), [REQUESTS[0], long, REQUESTS[1]])
    assert "the teacher's 512 positions have room for 500" in answers[50].refusal
    assert not answers[1].refusal and not answers[2].refusal
    strange = replace(REQUESTS[0], prompt=51, messages=(Message("user", "a"), Message("user", "b")))
    strict = said(teacher(mind, data_kit.STRICT), [strange, REQUESTS[0]])
    assert "roles must alternate" in strict[51].refusal
    assert not strict[1].refusal


def test_less_memory_takes_smaller_batches_and_says_the_same(mind: Mind) -> None:
    sizes: list[int] = []

    def short(model: Any, prompts: Any, **settings: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError
        return generate(model, prompts, **settings)

    assert said(teacher(mind, generate=short)) == said(teacher(mind))
    assert max(sizes[-4:]) == 2
    assert sum(size for size in sizes if size <= 2) == len(REQUESTS)


@pytest.mark.parametrize(
    ("template", "marker"),
    [
        (data_kit.TURNS, "<|im_end|>"),
        (data_kit.STRICT, data_kit.END),
        (EXAMPLE, data_kit.END),
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}", None),
    ],
)
def test_the_marker_that_ends_a_turn(template: str, marker: str | None) -> None:
    own = data_kit.tokenizer()
    found = end_of_turn(own, ChatTemplate(own, template, "spec.teacher"))
    assert found == (None if marker is None else own.tokenizer.token_to_id(marker))


def test_all_that_ends_an_answer(mind: Mind) -> None:
    chat = ChatTemplate(mind.tokenizer, data_kit.TURNS, "spec.teacher")
    marker = mind.tokenizer.tokenizer.token_to_id("<|im_end|>")
    assert end_ids(mind.model, mind.tokenizer, chat) == {mind.tokenizer.end_of_text, marker}


def test_special_tokens_are_not_said_but_for_those_around_reasoning(mind: Mind) -> None:
    own = data_kit.tokenizer()
    own.tokenizer.add_special_tokens(["<think>", "</think>"])
    script = own.tokenizer.encode(
        "<|im_start|><think>it is so</think>2<|im_start|>", add_special_tokens=False
    ).ids

    def scripted(model: Any, prompts: Any, **settings: Any) -> Any:
        return [script for _ in prompts]

    chat = ChatTemplate(own, data_kit.TURNS, "spec.teacher")
    identity = IDENTITY.model_copy(update={"max_tokens": 99})
    answerer = OwnTeacher(mind.model, own, chat, identity, scripted)
    [answer] = said(answerer, REQUESTS[:1]).values()
    assert answer.text == "<think>it is so</think>2"
    assert answer.answer_tokens == len(script) + 1
