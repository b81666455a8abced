"""What a job asks a teacher that writes text: the same in preflight, writers and students."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from kubedistill_api.generation import Generation
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.runspec import RunSpec

from kubedistill_trainer.data.conversation import Message, Prompt
from kubedistill_trainer.data.template import ChatTemplate, Unrenderable
from kubedistill_trainer.data.tokenizer import TextTokenizer
from kubedistill_trainer.failures import refuse, unreadable
from kubedistill_trainer.store.client import Store
from kubedistill_trainer.teacher.digest import teacher_digest
from kubedistill_trainer.teacher.text import TextRequest
from kubedistill_trainer.teacher.text_manifest import TextIdentity, TextManifest, prompts_digest

REASON_FIRST = (
    "Think before you answer. Write your reasoning between <think> and </think>, and after it the "
    "final answer alone."
)
"""What a teacher is told with `signal: ChainOfThought`, unless generation.systemPrompt is given."""
_SEED_BYTES = 4
_SYSTEM = Message("system", "systemprobe")
USER = Message("user", "userprobe")
"""A turn that a template is tried with."""


def generation_of(spec: DistillationJobSpec) -> Generation:
    """How the teacher answers: as the spec says, or by the defaults."""
    given = spec.distill.generation if spec.distill else None
    return given or Generation()


def reasons(spec: DistillationJobSpec) -> bool:
    """Whether the teacher is asked to reason."""
    return spec.distill is not None and spec.distill.signal == "ChainOfThought"


def text_identity(
    run: RunSpec, prompts: Sequence[Prompt], open_store: Callable[[str], Store]
) -> TextIdentity:
    """The identity of the text that a job asks for."""
    generation, reasoning = generation_of(run.spec), reasons(run.spec)
    teacher, model = _teacher(run, open_store)
    return TextIdentity(
        teacher=teacher,
        model=model,
        prompts_digest=prompts_digest(
            [[(turn.role, turn.content) for turn in prompt.messages] for prompt in prompts]
        ),
        samples=generation.samples,
        max_tokens=generation.max_tokens,
        temperature=generation.temperature,
        top_p=generation.top_p,
        system_prompt=generation.system_prompt or (REASON_FIRST if reasoning else ""),
        reasoning=reasoning,
    )


def _teacher(run: RunSpec, open_store: Callable[[str], Store]) -> tuple[str, str]:
    """(digest or address, name at a server)."""
    teacher = run.spec.teacher
    if teacher is not None and teacher.endpoint is not None:
        return teacher.endpoint.url.rstrip("/"), teacher.endpoint.model
    if run.teacher_model is None:
        raise refuse("spec.teacher", "nothing", "text needs a teacher")
    return teacher_digest(run.teacher_model, open_store(run.teacher_model.uri)), ""


def request_of(manifest: TextManifest, prompts: Sequence[Prompt], number: int) -> TextRequest:
    """Request `number` of the stream, as the teacher sees it."""
    prompt, sample = manifest.place(number)
    identity = manifest.identity
    return TextRequest(
        prompt=prompt,
        sample=sample,
        messages=instructed(prompts[prompt].messages, identity.system_prompt),
        seed=_seed(identity.seed, number),
    )


def instructed(messages: tuple[Message, ...], system_prompt: str) -> tuple[Message, ...]:
    """The turns after `system_prompt`; a system turn that is there already follows in the same one,
    for few templates know two."""
    if not system_prompt:
        return messages
    if messages[0].role == "system":
        first = replace(messages[0], content=f"{system_prompt}\n\n{messages[0].content}")
        return (first, *messages[1:])
    return (Message("system", system_prompt), *messages)


def _seed(seed: int, number: int) -> int:
    """31 bits, by the request alone: servers take no more."""
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    return int.from_bytes(digest[:_SEED_BYTES]) >> 1


def teacher_template(tokenizer: TextTokenizer, uri: str) -> ChatTemplate:
    """The template of the teacher's own folder. InputsRefused where it has none."""
    text = tokenizer.chat_template
    if text is None:
        raise unreadable(
            "spec.teacher",
            f"a tokenizer without chat template in {uri}",
            "put a chat_template.jinja into the teacher's folder: prompts are written as the teacher "
            "was taught them, whatever spec.data.chatTemplate says",
        )
    return ChatTemplate(tokenizer, text, "spec.teacher")


def question(template: ChatTemplate, messages: Sequence[Message]) -> str:
    """The text that asks for an answer. A template that refuses a system turn, or leaves it out
    without a word, is given it as the beginning of the first turn of the user. Raises Unrenderable."""
    if messages[0].role != "system" or len(messages) == 1:
        return template.render(messages, ask=True)
    if _shows_system(template):
        try:
            return template.render(messages, ask=True)
        except Unrenderable:
            pass  # some know a system turn at some places only
    first = Message(messages[1].role, f"{messages[0].content}\n\n{messages[1].content}")
    return template.render((first, *messages[2:]), ask=True)


def shows(template: ChatTemplate, messages: Sequence[Message]) -> bool:
    """Whether a text that asks for an answer holds all of these turns' words. Raises Unrenderable."""
    text = question(template, messages)
    return all(message.content in text for message in messages)


@lru_cache(maxsize=8)
def _shows_system(template: ChatTemplate) -> bool:
    """Asked once a template, of words that no template changes: it may trim those of a prompt."""
    try:
        return _SYSTEM.content in template.render((_SYSTEM, USER), ask=True)
    except Unrenderable:
        return False


def positions_of(config: Mapping[str, Any]) -> int:
    """Positions that a model with this config.json was made for."""
    return int(config.get("max_position_embeddings") or config.get("n_positions") or 1 << 20)
