"""Documents → sequences of exactly L tokens, without attention or labels across documents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from kubedistill_trainer.failures import unreadable

PACKING_VERSION = 1
IGNORED = -100
"""Label of a position that has nothing to predict."""

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Packed:
    """N sequences of L tokens.

    tokens, labels, positions: int64 [N, L]. `labels` is already shifted: position i predicts
    `labels[i]`, which is IGNORED where the next token belongs to another document or is not there.
    `positions` restart at 0 with each document, which is how attention is kept apart.
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


def pack(
    documents: Sequence[Ids], sequence_length: int, sources: Sequence[int] | None = None
) -> Packed:
    """Concatenate and cut every L tokens; the incomplete last sequence is dropped.

    `sources`: the file (0…255) of each document; without it all come from file 0.
    Raises InputsRefused when the text does not fill two sequences: one to learn from, one to hold
    out.
    """
    lengths = np.asarray([len(document) for document in documents], dtype=np.int64)
    total = int(lengths.sum())
    count = total // sequence_length
    if count < 2:
        raise unreadable(
            "spec.data.sources",
            f"{total} tokens of text",
            f"give at least {2 * sequence_length} tokens (two sequences), or lower "
            "spec.data.sequenceLength",
        )
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


def packing_digest(tokenizer_digest: str, sequence_length: int, end_of_text: int) -> str:
    """SHA-256 (hex) of what decides how documents become sequences."""
    facts = [PACKING_VERSION, tokenizer_digest, sequence_length, end_of_text]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
