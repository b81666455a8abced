"""What a teacher is asked, and by what the stream of its answers is addressed."""

from __future__ import annotations

from typing import Any

import pytest
from data_kit import STRICT, TURNS, Bucket, job, tokenizer
from kubedistill_api.runspec import RunSpec
from kubedistill_trainer.data.conversation import Message, Prompt
from kubedistill_trainer.data.template import ChatTemplate, Unrenderable
from kubedistill_trainer.failures import InputsRefused
from kubedistill_trainer.teacher.text_manifest import TextIdentity, TextManifest, runs
from kubedistill_trainer.teacher.text_request import (
    REASON_FIRST,
    instructed,
    question,
    request_of,
    shows,
    teacher_template,
    text_identity,
)

USER, SYSTEM = Message("user", "Hi"), Message("system", "Be brief")
ASSISTANT = Message("assistant", "Yes")
PROMPTS = [Prompt(0, 1, (USER,)), Prompt(0, 2, (SYSTEM, USER))]
ENDPOINT = {"url": "http://vllm:8000/v1", "model": "big"}


class _Etags:
    def list(self, prefix: str) -> list[Any]:
        return []


def asked(signal: str = "Responses", endpoint: Any = ENDPOINT, **parts: Any) -> RunSpec:
    source = {"uri": "s3://data/q.jsonl", "promptField": "q", "origin": "Teacher"}
    teacher = {"endpoint": endpoint} if endpoint else {"model": {"uri": "s3://data/teacher"}}
    model = None if endpoint else "s3://data/teacher"
    distill = {"signal": signal, **parts.pop("distill", {})}
    return job(
        source, fineTune=None, distill=distill, teacher=teacher, teacher_model=model, **parts
    )


def identity(run: RunSpec, prompts: list[Prompt] = PROMPTS) -> TextIdentity:
    return text_identity(run, prompts, lambda uri: _Etags())  # type: ignore[arg-type,return-value]


OTHERS = {
    "another prompt": (asked(), [*PROMPTS, Prompt(0, 3, (USER,))]),
    "another order": (asked(), PROMPTS[::-1]),
    "another model": (asked(endpoint={**ENDPOINT, "model": "small"}), PROMPTS),
    "another server": (asked(endpoint={**ENDPOINT, "url": "http://other/v1"}), PROMPTS),
    "an own model": (asked(endpoint=None), PROMPTS),
    "reasoning": (asked("ChainOfThought"), PROMPTS),
    "length": (asked(distill={"generation": {"maxTokens": 9}}), PROMPTS),
    "temperature": (asked(distill={"generation": {"temperature": 0}}), PROMPTS),
    "nucleus": (asked(distill={"generation": {"topP": 0.5}}), PROMPTS),
    "samples": (asked(distill={"generation": {"samples": 2, "temperature": 0.7}}), PROMPTS),
    "a system prompt": (asked(distill={"generation": {"systemPrompt": "x"}}), PROMPTS),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_makes_another_stream(name: str) -> None:
    run, prompts = OTHERS[name]
    assert identity(run, prompts).address != identity(asked()).address


def test_what_does_not() -> None:
    here = identity(asked()).address
    moved = [Prompt(4, 77, p.messages, answer="x") for p in PROMPTS]
    assert identity(asked(), moved).address == here
    dear = {**ENDPOINT, "maxCost": 3, "price": {"inputPerMillion": 1}, "concurrency": 99}
    assert identity(asked(endpoint=dear)).address == here
    assert identity(asked(endpoint={**ENDPOINT, "url": "http://vllm:8000/v1/"})).address == here
    assert identity(asked(distill={"generation": {}})).address == here
    assert identity(asked(training={"seed": 5, "globalBatchSize": 4})).address == here
    filters = {"chainOfThought": {"checkAnswer": False}}
    thought = identity(asked("ChainOfThought"))
    assert identity(asked("ChainOfThought", distill=filters)).address == thought.address


def test_a_teacher_is_told_to_reason_unless_it_is_told_something_else() -> None:
    assert identity(asked()).system_prompt == ""
    assert identity(asked("ChainOfThought")).system_prompt == REASON_FIRST
    own = {"generation": {"systemPrompt": "Think!"}}
    assert identity(asked("ChainOfThought", distill=own)).system_prompt == "Think!"


@pytest.mark.parametrize(
    ("messages", "system", "wanted"),
    [
        ((USER,), "", (USER,)),
        ((USER,), "Think!", (Message("system", "Think!"), USER)),
        ((SYSTEM, USER), "Think!", (Message("system", "Think!\n\nBe brief"), USER)),
        ((SYSTEM, USER), "", (SYSTEM, USER)),
    ],
)
def test_one_system_turn(messages: Any, system: str, wanted: Any) -> None:
    assert instructed(messages, system) == wanted


def test_a_request_has_its_own_seed_every_time() -> None:
    many = TextManifest(
        identity=identity(asked(distill={"generation": {"samples": 2, "temperature": 1}})),
        partitions=1, prompts=2,
    )  # fmt: skip
    first, again = ([request_of(many, PROMPTS, n) for n in range(4)] for _ in range(2))
    assert first == again
    assert [(r.prompt, r.sample) for r in first] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len({r.seed for r in first}) == 4
    assert all(0 <= r.seed < 1 << 31 for r in first)


@pytest.mark.parametrize("partitions", [1, 2, 3, 7])
def test_partitions_share_the_prompts(partitions: int) -> None:
    spec = asked(distill={"generation": {"samples": 3, "temperature": 1}})
    manifest = TextManifest(identity=identity(spec), partitions=partitions, prompts=5)
    parts = [list(manifest.requests_of(p)) for p in range(partitions)]
    assert sorted(n for part in parts for n in part) == list(range(15))
    for part in parts:
        assert {n // 3 for n in part} & {
            n // 3 for other in parts if other is not part for n in other
        } == set()


@pytest.mark.parametrize(
    ("numbers", "wanted"),
    [([], []), ([3], [(3, 3)]), ([5, 1, 2, 3, 9], [(1, 3), (5, 5), (9, 9)])],
)
def test_runs(numbers: list[int], wanted: list[tuple[int, int]]) -> None:
    assert list(runs(numbers)) == wanted


def test_a_template_without_system_turns_gets_them_in_the_users() -> None:
    own = tokenizer()
    strict = ChatTemplate(own, STRICT, "spec.teacher")
    assert question(strict, (SYSTEM, USER)) == "[Q]Be brief\n\nHi[/Q]"
    with pytest.raises(Unrenderable):
        question(strict, (USER, USER))
    turns = ChatTemplate(own, TURNS, "spec.teacher")
    assert question(turns, (SYSTEM, USER)).startswith("<|im_start|>system\nBe brief<|im_end|>")
    assert question(turns, (USER,)).endswith("<|im_start|>assistant\n")


IGNORANT = (
    "{% for m in messages %}{% if m.role == 'user' %}[Q]{{ m.content | trim }}[/Q]{% endif %}"
    "{% endfor %}"
)
LAST = (
    "{% for m in messages %}{% if m.role == 'user' %}[Q]"
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}. {% endif %}"
    "{{ m.content }}[/Q]{% endif %}{% endfor %}"
)


def test_a_template_that_drops_system_turns_gets_them_in_the_users() -> None:
    drops = ChatTemplate(tokenizer(), IGNORANT, "spec.teacher")
    assert question(drops, (SYSTEM, USER, ASSISTANT, USER)) == "[Q]Be brief\n\nHi[/Q][Q]Hi[/Q]"
    assert question(drops, (USER,)) == "[Q]Hi[/Q]"
    assert shows(drops, (SYSTEM, USER))
    own = ChatTemplate(tokenizer(), LAST, "spec.teacher")
    assert question(own, (SYSTEM, USER)) == "[Q]Be brief. Hi[/Q]"
    assert not shows(ChatTemplate(tokenizer(), "hello", "spec.teacher"), (USER,))


def test_a_teacher_needs_a_template_of_its_own() -> None:
    with pytest.raises(
        InputsRefused, match=r"spec.teacher: found a tokenizer without chat template"
    ):
        teacher_template(tokenizer(None), "s3://data/teacher")
    assert teacher_template(tokenizer(), "s3://data/teacher").text == TURNS


def test_bucket_is_not_needed_for_an_endpoint() -> None:
    assert text_identity(asked(), PROMPTS, Bucket().open).teacher == "http://vllm:8000/v1"
