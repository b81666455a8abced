"""All that is learnt → parts of packed sequences, each with one weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kubedistill_api.data import Data

from kubedistill_trainer.data.packing import (
    CONVERSATIONS_VERSION,
    Fit,
    Packed,
    encode,
    pack,
    pack_conversations,
)
from kubedistill_trainer.data.records import BadRecords
from kubedistill_trainer.data.sources import Corpus, Record, field_of
from kubedistill_trainer.data.template import ChatTemplate, Rendered, Unrenderable
from kubedistill_trainer.data.tokenizer import TextTokenizer
from kubedistill_trainer.failures import InputsRefused, unreadable


@dataclass(frozen=True)
class PackedPart:
    """Sequences that have one weight."""

    packed: Packed
    weight: float
    fit: Fit = field(default_factory=Fit)


def text_rows(data: Data, sources: Sequence[int]) -> list[list[int]]:
    """The files of plain text that are packed together, given each document's file.

    Those with weight 1 are one row of text; every other one is a row of its own, for a sequence
    that held text of two weights would have none.
    """
    present = sorted(set(sources))
    together = [index for index in present if data.sources[index].weight == 1]
    alone = [[index] for index in present if data.sources[index].weight != 1]
    return ([together] if together else []) + alone


def text_parts(data: Data, corpus: Corpus, tokenizer: TextTokenizer) -> list[PackedPart]:
    """The plain texts. InputsRefused for a row that fills no sequence."""
    parts: list[PackedPart] = []
    for row in text_rows(data, corpus.sources):
        mine = [i for i, source in enumerate(corpus.sources) if source in row]
        texts = [corpus.documents[i] for i in mine]
        documents = encode(texts, tokenizer.tokenizer, tokenizer.end_of_text)
        if (total := sum(map(len, documents))) < data.sequence_length:
            names = ", ".join(data.sources[index].uri for index in row)
            raise too_little(f"{total} tokens of text in {names}", data.sequence_length)
        packed = pack(documents, data.sequence_length, [corpus.sources[i] for i in mine])
        parts.append(PackedPart(packed, data.sources[row[0]].weight))
    return parts


def too_little(found: str, sequence_length: int) -> InputsRefused:
    """Data that fills no two sequences: one to learn from, one to hold out."""
    return unreadable(
        "spec.data.sources",
        found,
        f"give at least {2 * sequence_length} tokens (two sequences), or lower "
        "spec.data.sequenceLength",
    )


def conversation_parts(
    data: Data,
    records: Sequence[Record],
    template: ChatTemplate,
    end_of_text: int,
    bad: BadRecords,
) -> list[PackedPart]:
    """A part for each file of conversations; `bad` counts those that the template refuses.

    InputsRefused when nothing of a file can be learnt.
    """
    parts: list[PackedPart] = []
    for index in sorted({record.source for record in records}):
        source = data.sources[index]
        mine = [record for record in records if record.source == index]
        encoded = template.encode(_rendered(data, mine, template, bad))
        packed, fit = pack_conversations(encoded, data.sequence_length, index, end_of_text)
        if not len(packed):
            raise unreadable(
                field_of(index),
                f"none of {len(mine)} conversations of {source.uri} has a response within "
                f"{data.sequence_length} tokens",
                "raise spec.data.sequenceLength, or give shorter prompts",
            )
        parts.append(PackedPart(packed, source.weight, fit))
    return parts


def _rendered(
    data: Data, records: Sequence[Record], template: ChatTemplate, bad: BadRecords
) -> list[Rendered]:
    result: list[Rendered] = []
    for record in records:
        try:
            result.append(template.rendered(record.conversation))
        except Unrenderable as problem:
            uri = data.sources[record.source].uri
            place = f"{uri} line {record.line}" if record.line else f"an answer to {uri}"
            bad.add(
                field_of(record.source),
                f"{place}: {problem}",
                "correct the conversation, or give another template as spec.data.chatTemplate",
            )
    return result


def layout(data: Data, corpus: Corpus, template: ChatTemplate | None) -> list[object]:
    """What decides the sequences beside tokenizer and length; nothing for one row of plain text."""
    rows = text_rows(data, corpus.sources)
    if template is None and len(rows) <= 1:
        return []
    return [rows, CONVERSATIONS_VERSION, template.text if template else None]
