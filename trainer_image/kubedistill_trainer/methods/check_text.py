"""The preflight's part for a teacher that is learnt by its text: prompts, templates, the stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kubedistill_api.generation import ChainOfThought
from kubedistill_api.runspec import RunSpec

from kubedistill_trainer.context import Context
from kubedistill_trainer.data.conversation import Conversation, Message, Prompt
from kubedistill_trainer.data.dataset import (
    Dataset,
    load_dataset,
    load_run_tokenizer,
    tokenizer_source,
)
from kubedistill_trainer.data.mixing import conversation_parts, text_parts
from kubedistill_trainer.data.records import BadRecords
from kubedistill_trainer.data.sources import Corpus, field_of, fields_of, read_corpus, read_file
from kubedistill_trainer.data.template import ChatTemplate, Unrenderable, chat_template
from kubedistill_trainer.data.tokenizer import TextTokenizer, load_tokenizer
from kubedistill_trainer.failures import refuse, unreadable
from kubedistill_trainer.models.weights import vocabulary_rows
from kubedistill_trainer.teacher.errors import StreamDamaged
from kubedistill_trainer.teacher.learn import learn
from kubedistill_trainer.teacher.text_manifest import TextIdentity
from kubedistill_trainer.teacher.text_reader import read_text
from kubedistill_trainer.teacher.text_request import (
    USER,
    generation_of,
    instructed,
    positions_of,
    question,
    reasons,
    shows,
    teacher_template,
    text_identity,
)
from kubedistill_trainer.teacher.text_view import open_view
from kubedistill_trainer.teacher.thought import Thought, written

_PROBE = Thought("what was thought", "what was said")
_SHOWN_FIELDS = 8


@dataclass(frozen=True)
class TextChecked:
    """What was found out. `template`: the student's; `dataset`: all that will be learnt, where the
    answers are there already."""

    tokenizer: TextTokenizer
    template: ChatTemplate
    data_digest: str
    stream_uri: str
    message: str
    dataset: Dataset | None = None


def check_text(context: Context, teacher_config: dict[str, Any] | None) -> TextChecked:
    """Check prompts and templates, and look whether the answers are there. `teacher_config` is None
    for a teacher behind an endpoint. InputsRefused for what a person has to mend."""
    run = context.run
    bad = BadRecords(run.spec.data.max_bad_records)
    corpus = read_corpus(run.spec.data, context.open_store, bad)
    prompts = corpus.prompts
    if not prompts:
        asked = [source.uri for source in run.spec.data.sources if source.origin == "Teacher"]
        raise unreadable(
            "spec.data.sources", f"no prompt in {', '.join(asked)}", "give files with prompts"
        )
    _check_answers(context, prompts)
    tokenizer = load_run_tokenizer(run, context.open_store)
    template = _check_student(run, prompts, tokenizer, bad)
    _check_given(run, corpus, tokenizer, template, bad)
    identity = text_identity(run, prompts, context.open_store)
    too_long = 0
    if teacher_config is not None and run.teacher_model is not None:
        too_long = _check_teacher(context, prompts, identity, teacher_config)
    uri = context.storage.child(identity.address).uri
    taught = _taught(context, identity, prompts, tokenizer)
    if taught is not None:
        dataset, message = taught
        return TextChecked(tokenizer, template, dataset.digest, uri, message, dataset)
    message = (
        f"{len(prompts) * identity.samples:,} answers to {len(prompts):,} prompts are asked for"
    )
    if too_long:
        message += f"; prompts that are too long for the teacher: {too_long:,}"
    return TextChecked(tokenizer, template, corpus.digest, uri, message)


def _check_answers(context: Context, prompts: Sequence[Prompt]) -> None:
    """A file that is said to hold right answers holds one, or the name of their field is wrong."""
    spec = context.run.spec
    thought = (spec.distill.chain_of_thought if spec.distill else None) or ChainOfThought()
    if not reasons(spec) or not thought.check_answer:
        return
    answered = {prompt.source for prompt in prompts if prompt.answer is not None}
    for index in sorted({prompt.source for prompt in prompts} - answered):
        source = spec.data.sources[index]
        if source.answer_field is None:
            continue
        fields = fields_of(read_file(source.uri, field_of(index), context.open_store))
        raise unreadable(
            f"spec.data.sources[{index}].answerField",
            f"{source.answer_field}, which no record of {source.uri} has",
            f"write one of the fields that there are: {', '.join(fields[:_SHOWN_FIELDS])}; or leave "
            "it out, and answers are not checked",
        )


def _check_student(
    run: RunSpec, prompts: Sequence[Prompt], tokenizer: TextTokenizer, bad: BadRecords
) -> ChatTemplate:
    """The student's template, which writes every prompt with an answer, and its reasoning if it is
    learnt; some prompt of each file leaves room for an answer.

    A prompt that the template refuses is as bad as all of its answers will be.
    """
    field, _ = tokenizer_source(run)
    template = chat_template(tokenizer, field, run.spec.data.chat_template)
    _check_turns(
        template,
        "give spec.data.chatTemplate one that keeps it: a student that does not see what it is asked "
        "cannot learn to answer",
    )
    settings = run.spec.distill.chain_of_thought if run.spec.distill else None
    reasoning = reasons(run.spec) and (settings is None or settings.train_on_reasoning)
    answer = Message("assistant", written(_PROBE, reasoning=reasoning))
    questions: dict[int, list[str]] = {}
    for prompt in prompts:
        try:
            rendered = template.rendered(Conversation((*prompt.messages, answer)))
        except Unrenderable as problem:
            for _ in range(generation_of(run.spec).samples):
                bad.add(
                    field_of(prompt.source),
                    f"{_place(run, prompt)}: {problem}",
                    "correct the prompt, or give the student another template as "
                    "spec.data.chatTemplate",
                )
            continue
        if reasoning and _PROBE.reasoning not in rendered.text:
            raise unreadable(
                template.field,
                "a chat template that leaves the reasoning before an answer out",
                "give spec.data.chatTemplate one that keeps it, or write "
                "spec.distill.chainOfThought.trainOnReasoning: false",
            )
        start, _ = rendered.learnt[-1]
        questions.setdefault(prompt.source, []).append(rendered.text[:start])
    for source, texts in sorted(questions.items()):
        _check_room(run, source, texts, tokenizer)
    return template


def _check_given(
    run: RunSpec,
    corpus: Corpus,
    tokenizer: TextTokenizer,
    template: ChatTemplate,
    bad: BadRecords,
) -> None:
    """Text and conversations beside the prompts are packed as they will be: what of them cannot be
    learnt is said before an answer is paid for."""
    data = run.spec.data
    text_parts(data, corpus, tokenizer)
    conversation_parts(data, corpus.conversations, template, tokenizer.end_of_text, bad)


def _check_turns(template: ChatTemplate, expected: str) -> None:
    """A template that shows what the user says. One that does not take the probe says so of each
    prompt."""
    try:
        shown = shows(template, [USER])
    except Unrenderable:
        return
    if not shown:
        raise unreadable(
            template.field, "a chat template that leaves the user's turn out", expected
        )


def _check_room(run: RunSpec, source: int, texts: Sequence[str], tokenizer: TextTokenizer) -> None:
    """A token of an answer is learnt where it lies within the sequence, as in `pack_conversations`."""
    shortest = min(map(len, _encoded(tokenizer, texts)))
    length = run.spec.data.sequence_length
    if shortest >= length:
        raise refuse(
            "spec.data.sequenceLength", str(length),
            f"the shortest prompt of {run.spec.data.sources[source].uri} has {shortest} tokens by the "
            "student's chat template, and an answer follows it: write more, or give shorter prompts",
        )  # fmt: skip


def _encoded(tokenizer: TextTokenizer, texts: Sequence[str]) -> list[list[int]]:
    encodings = tokenizer.tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def _check_teacher(
    context: Context,
    prompts: Sequence[Prompt],
    identity: TextIdentity,
    teacher_config: dict[str, Any],
) -> int:
    """The teacher's own template writes every prompt; how many are too long for it."""
    run, source = context.run, context.run.teacher_model
    assert source is not None
    positions = positions_of(teacher_config)
    longest = positions - identity.max_tokens
    if longest <= 0:
        raise refuse(
            "spec.distill.generation.maxTokens", str(generation_of(run.spec).max_tokens),
            f"the teacher has {positions} positions for prompt and answer together: write less",
        )  # fmt: skip
    tokenizer = load_tokenizer(context.open_store(source.uri), "spec.teacher")
    template = teacher_template(tokenizer, source.uri)
    _check_turns(
        template,
        "give a teacher whose template shows it: nothing of a prompt would reach the model",
    )
    texts = [_question(run, template, prompt, identity) for prompt in prompts]
    encoded = _encoded(tokenizer, texts)
    rows, greatest = vocabulary_rows(teacher_config), max(max(ids, default=0) for ids in encoded)
    if rows is not None and greatest >= rows:
        raise unreadable(
            "spec.teacher",
            f"an embedding of {rows} rows (vocab_size) in {source.uri}",
            f"its own tokenizer writes {tokenizer.tokenizer.id_to_token(greatest)!r}, id {greatest}, "
            "into prompts: give the model's own tokenizer, or resize the embedding",
        )
    lengths = [len(ids) for ids in encoded]
    if min(lengths) > longest:
        raise refuse(
            "spec.distill.generation.maxTokens", str(identity.max_tokens),
            f"the shortest prompt has {min(lengths)} tokens, and the teacher {positions} positions "
            "for prompt and answer together: write less, or give shorter prompts",
        )  # fmt: skip
    return sum(length > longest for length in lengths)


def _question(run: RunSpec, template: ChatTemplate, prompt: Prompt, identity: TextIdentity) -> str:
    try:
        return question(template, instructed(prompt.messages, identity.system_prompt))
    except Unrenderable as problem:
        raise unreadable(
            field_of(prompt.source),
            f"{_place(run, prompt)}: for the teacher, {problem}",
            "correct the prompt, or give a teacher whose template takes it",
        ) from problem


def _place(run: RunSpec, prompt: Prompt) -> str:
    return f"{run.spec.data.sources[prompt.source].uri} line {prompt.line}"


def _taught(
    context: Context, identity: TextIdentity, prompts: Sequence[Prompt], tokenizer: TextTokenizer
) -> tuple[Dataset, str] | None:
    """What will be learnt, and how much the filters keep; None while answers are missing.

    Shards that are missing or damaged are asked for again.
    """
    view = open_view(context.storage, identity)
    if view is None:
        return None
    view.ask_for_missing()
    if not view.ended or view.damaged:
        return None
    try:
        answers = read_text(view)
    except StreamDamaged:
        return None
    learnt = learn(context.run.spec, prompts, answers, tokenizer)
    dataset = load_dataset(context.run, context.open_store, learnt.conversations)
    return dataset, f"all inputs fit; {learnt.sentence()}"
