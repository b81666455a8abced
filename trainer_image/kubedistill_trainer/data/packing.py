"""Texts and conversations → sequences of exactly L tokens, without attention or labels across them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from kubedistill_trainer.data.template import Encoded

PACKING_VERSION = 1
CONVERSATIONS_VERSION = 1
IGNORED = -100
"""Label of a position that has nothing to predict."""
_OPEN_SEQUENCES = 64
"""How many unfilled sequences are tried for a conversation."""

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Packed:
    """N sequences of L tokens.

    tokens, labels, positions: int64 [N, L]. `labels` is already shifted: position i predicts
    `labels[i]`, which is IGNORED where the next token belongs to another document, is not there, or
    is not said by the assistant of a conversation.
    `positions` restart at 0 with each document, which is how attention is kept apart; what pads a
    sequence is a document of its own.
    sources: uint8 [N, L], the file that a token comes from, by its place in `spec.data.sources`.
    """

    tokens: Ids
    labels: Ids
    positions: Ids
    sources: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def sequence_length(self) -> int:
        return int(self.tokens.shape[1])

    def take(self, samples: Sequence[int] | Ids) -> Packed:
        """The sequences with these ids, in this order."""
        index = np.asarray(samples, dtype=np.int64)
        return Packed(
            self.tokens[index], self.labels[index], self.positions[index], self.sources[index]
        )

    @property
    def valid_tokens(self) -> int:
        """Positions that have a label."""
        return int((self.labels != IGNORED).sum())


def encode(documents: Iterable[str], tokenizer: Tokenizer, end_of_text: int) -> list[Ids]:
    """Token ids of each document, `end_of_text` last."""
    encodings = tokenizer.encode_batch(list(documents), add_special_tokens=False)
    return [np.asarray([*encoding.ids, end_of_text], dtype=np.int64) for encoding in encodings]


@dataclass(frozen=True)
class Fit:
    """How conversations came into sequences: how many whole, cut at the end, or not at all because
    the prompt alone fills a sequence; and the tokens that pad the sequences."""

    whole: int = 0
    cut: int = 0
    dropped: int = 0
    padding: int = 0

    def __add__(self, other: Fit) -> Fit:
        return Fit(
            self.whole + other.whole,
            self.cut + other.cut,
            self.dropped + other.dropped,
            self.padding + other.padding,
        )


def pack(
    documents: Sequence[Ids], sequence_length: int, sources: Sequence[int] | None = None
) -> Packed:
    """Concatenate and cut every L tokens; the incomplete last sequence is dropped.

    `sources`: the file (0…255) of each document; without it all come from file 0.
    """
    lengths = np.asarray([len(document) for document in documents], dtype=np.int64)
    count = int(lengths.sum()) // sequence_length
    kept = count * sequence_length
    tokens = np.concatenate(documents)[:kept].reshape(count, sequence_length)
    document = np.repeat(np.arange(len(lengths)), lengths)[:kept].reshape(count, sequence_length)
    within = np.concatenate([np.arange(n) for n in lengths])[:kept].reshape(count, sequence_length)
    # A document that goes on in the next sequence starts its positions anew there.
    start = np.where(document == document[:, :1], within[:, :1], 0)
    labels = np.full_like(tokens, IGNORED)
    same = document[:, 1:] == document[:, :-1]
    labels[:, :-1] = np.where(same, tokens[:, 1:], IGNORED)
    files = np.zeros(len(documents)) if sources is None else np.asarray(sources)
    return Packed(tokens, labels, within - start, files.astype(np.uint8)[document])


def pack_conversations(
    conversations: Sequence[Encoded], sequence_length: int, source: int, padding: int
) -> tuple[Packed, Fit]:
    """Put each conversation whole into the first sequence with room; fill up with `padding`.

    One longer than L is cut at the end, or dropped when nothing that is learnt would be left.
    """
    kept: list[tuple[Ids, Ids]] = []
    cut = 0
    for one in conversations:
        tokens, labels = one.tokens[:sequence_length], _labels(one)[:sequence_length]
        labels[-1:] = IGNORED
        if (labels != IGNORED).any():
            kept.append((tokens, labels))
            cut += len(one.tokens) > sequence_length
    places, filled = _first_fit([len(tokens) for tokens, _ in kept], sequence_length)
    shape = (len(filled), sequence_length)
    packed = Packed(
        np.full(shape, padding, dtype=np.int64),
        np.full(shape, IGNORED, dtype=np.int64),
        # Of the padding; a conversation's are written over it.
        np.maximum(np.arange(sequence_length) - np.asarray(filled, dtype=np.int64)[:, None], 0),
        np.full(shape, source, dtype=np.uint8),
    )
    for (row, start), (tokens, labels) in zip(places, kept, strict=True):
        end = start + len(tokens)
        packed.tokens[row, start:end] = tokens
        packed.labels[row, start:end] = labels
        packed.positions[row, start:end] = np.arange(len(tokens))
    fit = Fit(
        whole=len(kept) - cut,
        cut=cut,
        dropped=len(conversations) - len(kept),
        padding=packed.tokens.size - sum(filled),
    )
    return packed, fit


def _labels(one: Encoded) -> Ids:
    labels = np.full_like(one.tokens, IGNORED)
    labels[:-1] = np.where(one.learnt[1:], one.tokens[1:], IGNORED)
    return labels


def _first_fit(lengths: Sequence[int], room: int) -> tuple[list[tuple[int, int]], list[int]]:
    """(sequence, place in it) of each item, and how far each sequence is filled."""
    places: list[tuple[int, int]] = []
    filled: list[int] = []
    unfilled: list[int] = []
    for length in lengths:
        row = next((row for row in unfilled if filled[row] + length <= room), len(filled))
        if row == len(filled):
            filled.append(0)
            # One with room for the least of things is as good as full after so many others.
            unfilled = [*unfilled[-_OPEN_SEQUENCES + 1 :], row]
        places.append((row, filled[row]))
        filled[row] += length
        if filled[row] == room:
            unfilled.remove(row)
    return places, filled


def joined(parts: Sequence[Packed]) -> Packed:
    """The sequences of all parts, one after the other."""
    if len(parts) == 1:
        return parts[0]
    return Packed(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.positions for part in parts]),
        np.concatenate([part.sources for part in parts]),
    )


def packing_digest(
    tokenizer_digest: str, sequence_length: int, end_of_text: int, more: Sequence[object] = ()
) -> str:
    """SHA-256 (hex) of what decides how documents become sequences.

    `more`: what does so beside the tokenizer, where not all is plain text in one row; JSON.
    """
    facts = [PACKING_VERSION, tokenizer_digest, sequence_length, end_of_text, *more]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
