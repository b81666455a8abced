"""The packed data of a run: the same in the preflight, in every teacher writer and every rank."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from kubedistill_api.data import Data, DataSource
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.runspec import RunSpec

from kubedistill_trainer.data.conversation import Conversation
from kubedistill_trainer.data.mixing import (
    PackedPart,
    conversation_parts,
    layout,
    text_parts,
    too_little,
)
from kubedistill_trainer.data.order import Order, Part, Split, split
from kubedistill_trainer.data.packing import Fit, Packed, joined, packing_digest
from kubedistill_trainer.data.records import BadRecords
from kubedistill_trainer.data.sources import OpenStore, Record, read_corpus
from kubedistill_trainer.data.template import ChatTemplate, chat_template
from kubedistill_trainer.data.tokenizer import TextTokenizer, load_tokenizer
from kubedistill_trainer.failures import refuse, unreadable

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """Packed sequences with split and order, and the digests that pin them.

    `sources`: a name for each of `spec.data.sources`, which `packed.sources` points to.
    `template`, `fit`: of the conversations; None where there are none. `files_digest`: of the
    sources alone, without a teacher's answers.
    """

    packed: Packed
    split: Split
    order: Order
    total_steps: int
    digest: str
    files_digest: str
    packing_digest: str
    tokenizer: TextTokenizer
    sources: tuple[str, ...]
    template: ChatTemplate | None = None
    fit: Fit | None = None


def learns_text(spec: DistillationJobSpec) -> bool:
    """Whether the teacher is learnt by the text that it writes."""
    return spec.distill is not None and spec.distill.signal != "Logits"


def tokenizer_source(run: RunSpec) -> tuple[str, str]:
    """(field, URI) of the folder whose tokenizer is used: data's, the teacher's, the student's.

    A teacher's text can be learnt with another tokenizer: there the student's goes first.
    """
    if run.spec.data.tokenizer is not None:
        return "spec.data.tokenizer.uri", run.spec.data.tokenizer.uri
    models = [("spec.teacher", run.teacher_model), ("spec.student", run.student_model)]
    for field, model in reversed(models) if learns_text(run.spec) else models:
        if model is not None:
            return field, model.uri
    raise ValueError("the schema lets no job through that has no tokenizer")


def load_run_tokenizer(run: RunSpec, open_store: OpenStore) -> TextTokenizer:
    """The run's tokenizer, with `data.chatTemplate` for its template where that is given."""
    field, uri = tokenizer_source(run)
    tokenizer = load_tokenizer(open_store(uri), field)
    given = run.spec.data.chat_template
    return tokenizer if given is None else tokenizer.with_chat_template(given)


def load_dataset(
    run: RunSpec, open_store: OpenStore, answered: Sequence[tuple[int, Conversation]] = ()
) -> Dataset:
    """Read, tokenise, pack, split. InputsRefused for whatever a person has to mend.

    `answered`: the teacher's answers that are learnt, in an order that is the same in every
    process, each with the place of its prompt's file in `spec.data.sources`.
    """
    spec = run.spec
    data, training = spec.data, spec.training
    tokenizer = load_run_tokenizer(run, open_store)
    bad = BadRecords(data.max_bad_records)
    corpus = read_corpus(data, open_store, bad)
    records = [*corpus.conversations, *(Record(source, 0, one) for source, one in answered)]
    if corpus.prompts and not (corpus.documents or records):
        raise unreadable(
            "spec.data.sources",
            f"{len(corpus.prompts)} prompts and no answer that is learnt",
            "loosen the filters of spec.distill, or give other prompts",
        )
    template, talks = None, []
    if records:
        field, _ = tokenizer_source(run)
        template = chat_template(tokenizer, field, data.chat_template)
        talks = conversation_parts(data, records, template, tokenizer.end_of_text, bad)
    parts = text_parts(data, corpus, tokenizer) + talks
    packed = joined([part.packed for part in parts])
    if len(packed) < 2:
        raise too_little(f"one sequence of {data.sequence_length} tokens", data.sequence_length)
    divided = split([len(part.packed) for part in parts], data.holdout, training.seed)
    weighted = _weighted(parts, divided)
    if not answered or not any(part.taken(training.epochs) for part in weighted):
        _check_weights(data, parts, weighted, training.epochs)
    order = Order(weighted, training.global_batch_size, training.seed)
    return Dataset(
        packed=packed,
        split=divided,
        order=order,
        total_steps=order.total_steps(training.epochs, training.max_steps) if spec.trains else 0,
        digest=_digest(corpus.digest, answered),
        files_digest=corpus.digest,
        packing_digest=packing_digest(
            tokenizer.digest,
            data.sequence_length,
            tokenizer.end_of_text,
            layout(data, corpus, template),
        ),
        tokenizer=tokenizer,
        sources=source_names(data.sources),
        template=template,
        fit=_fit(talks),
    )


def _weighted(parts: Sequence[PackedPart], divided: Split) -> list[Part]:
    """The training ids of each part, with its weight."""
    ends = np.cumsum([len(part.packed) for part in parts])
    ids = np.split(divided.training, np.searchsorted(divided.training, ends[:-1]))
    return [Part(mine, part.weight) for mine, part in zip(ids, parts, strict=True)]


def _check_weights(
    data: Data, parts: Sequence[PackedPart], weighted: Sequence[Part], epochs: int
) -> None:
    """InputsRefused for a file of which no epoch holds anything; not where answers are paid for, as
    long as there is something to learn."""
    for part, mine in zip(parts, weighted, strict=True):
        count = len(mine.training)
        if not count or mine.taken(epochs):
            continue
        index = int(part.packed.sources.flat[0])
        least = math.ceil(1000 / (count * epochs)) / 1000
        raise refuse(
            f"spec.data.sources[{index}].weight",
            f"{part.weight:g}, by which {epochs} epochs hold none of the {count} sequences of "
            f"{data.sources[index].uri}",
            f"write at least {least:g}, or leave the file out",
        )


def _fit(talks: Sequence[PackedPart]) -> Fit | None:
    """How all conversations fit their sequences; logged."""
    if not talks:
        return None
    fit = sum((part.fit for part in talks), Fit())
    size = sum(part.packed.tokens.size for part in talks)
    _log.info(
        "conversations packed",
        extra={
            "whole": fit.whole,
            "cut": fit.cut,
            "dropped": fit.dropped,
            "padding": round(fit.padding / size, 4),
        },
    )
    return fit


def _digest(files: str, answered: Sequence[tuple[int, Conversation]]) -> str:
    """SHA-256 (hex) of the files, and of the teacher's answers where there are any."""
    if not answered:
        return files
    digest = hashlib.sha256(files.encode())
    for source, conversation in answered:
        turns = [[message.role, message.content] for message in conversation.messages]
        digest.update(json.dumps([source, turns]).encode() + b"\n")
    return digest.hexdigest()


def source_names(sources: Sequence[DataSource]) -> tuple[str, ...]:
    """Address of each file; with the field where one file is read for several, and with its place
    where that is the same."""
    uris = [source.uri for source in sources]
    names = [s.uri if uris.count(s.uri) == 1 else f"{s.uri}#{_content_field(s)}" for s in sources]
    return tuple(
        name if names.count(name) == 1 else f"{name}[{index}]" for index, name in enumerate(names)
    )


def _content_field(source: DataSource) -> str:
    return source.messages_field or source.prompt_field or source.text_field


def ranks_of(spec: DistillationJobSpec) -> int:
    """Ranks of the gang: one a GPU, or one a pod on the CPU."""
    return spec.workers.nodes * max(1, spec.workers.gpus_per_node)
