"""Sets of token ids and their levels in few bytes, coded and decoded a column of rows at a time.

Ids that occur often in a sample occur in most of its positions, so a sample's ids are renumbered
by how often they occur (a dictionary of the sample, sent first) where that pays. The places so
found are sorted within a position and stored as gaps: the class of a gap (its power of two and one
more bit) is entropy-coded in the context of the place where the gap starts, low bits are raw.
A level is entropy-coded in the context of its place.

Layout: header; the four tables; the lanes' final states; the words.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np

from kubedistill_trainer.teacher.rans import (
    I64,
    MAX_RAW_BITS,
    PROB_BITS,
    Decoder,
    Encoder,
    Model,
)

MAX_VOCABULARY = 1 << MAX_RAW_BITS
_HEADER = struct.Struct("<IIIIIII")  # dictionary size or 0, four table sizes, lanes, words
_MOST_ROWS_A_LANE = 4
_LEAST_LANES = 128
"""A lane's final state costs 8 bytes, a step of few lanes costs as much time as one of many."""
_COUNT_CLASSES = 32  # powers of two of how often an id occurs


@dataclass(frozen=True)
class _Coded:
    """Symbols of one kind, ready for the encoder: table indices, raw values and their bits."""

    model: Model
    index: I64
    raw: I64
    bits: I64

    @property
    def cost_bits(self) -> float:
        """Size once coded, without the table."""
        slots = self.model.frequency[self.index]
        return float(PROB_BITS * slots.size - np.log2(slots).sum() + self.bits.sum())

    def step(self, encoder: Encoder, at: tuple[slice, int] | slice) -> None:
        index = self.index[at]
        encoder.step(
            self.model.frequency[index], self.model.start[index], self.raw[at], self.bits[at]
        )


@dataclass(frozen=True)
class _Plan:
    """One way to write a sample: with a dictionary (its gaps and counts), or without (size 0)."""

    dictionary_size: int
    entries: tuple[_Coded, _Coded]
    gaps: _Coded
    levels: _Coded

    @property
    def cost_bits(self) -> float:
        coded = (self.gaps, self.levels, *(self.entries if self.dictionary_size else ()))
        return math.fsum(part.cost_bits for part in coded)


def encode_symbols(ids: I64, levels: I64, vocab_size: int, level_count: int) -> bytes:
    """Bytes of ids [N, K], strictly rising along K within 0 … V − 1, and levels [N, K]."""
    plan = min(
        _plan(ids, levels, vocab_size, level_count, dictionary=True),
        _plan(ids, levels, vocab_size, level_count, dictionary=False),
        key=lambda candidate: candidate.cost_bits,
    )
    positions, k = ids.shape
    lanes = max(-(-positions // _MOST_ROWS_A_LANE), min(positions, _LEAST_LANES))
    encoder = Encoder(lanes)
    for first in range(0, plan.dictionary_size, max(lanes, 1)):
        for part in plan.entries:
            part.step(encoder, slice(first, first + lanes))
    for first in range(0, positions, max(lanes, 1)):
        rows = slice(first, first + lanes)
        for column in range(k):
            plan.gaps.step(encoder, (rows, column))
            plan.levels.step(encoder, (rows, column))
    states, words = encoder.finish()
    tables = [part.model.to_bytes() for part in (*plan.entries, plan.gaps, plan.levels)]
    header = _HEADER.pack(plan.dictionary_size, *map(len, tables), lanes, len(words))
    return b"".join(
        (header, *tables, states.astype("<u8").tobytes(), words.astype("<u4").tobytes())
    )


def decode_symbols(
    data: bytes, positions: int, k: int, vocab_size: int, level_count: int
) -> tuple[I64, I64]:
    """Ids int64 [N, K] and levels int64 [N, K]. ValueError when `data` is not what was encoded."""
    try:
        return _decoded(data, positions, k, vocab_size, level_count)
    except (IndexError, struct.error) as error:
        raise ValueError(f"entropy-coded ids cannot be read: {error}") from error


def _decoded(
    data: bytes, positions: int, k: int, vocab_size: int, level_count: int
) -> tuple[I64, I64]:
    dictionary_size, *sizes, lanes, words = _HEADER.unpack_from(data)
    if not dictionary_size <= vocab_size <= MAX_VOCABULARY:
        raise ValueError(f"{dictionary_size} different ids in a vocabulary of {vocab_size}")
    offsets = [_HEADER.size]
    for size in (*sizes, 8 * lanes, 4 * words):
        offsets.append(offsets[-1] + size)
    # Rows are bounded by the lanes, and these by the data: a damaged count allocates nothing.
    if len(data) != offsets[-1] or not lanes <= positions <= lanes * _MOST_ROWS_A_LANE:
        raise ValueError(
            f"entropy-coded ids take {len(data)} bytes in {lanes} lanes, not {offsets[-1]}"
        )
    places = dictionary_size or vocab_size
    shapes = (
        (1, _gap_classes(vocab_size)),
        (1, _COUNT_CLASSES),
        (_gap_classes(places), _gap_classes(places)),
        (_level_contexts(places), level_count),
    )
    models = [
        Model.from_bytes(data[offsets[part] : offsets[part + 1]], *shape)
        for part, shape in enumerate(shapes)
    ]
    decoder = Decoder(
        np.frombuffer(data, "<u8", lanes, offsets[4]), np.frombuffer(data, "<u4", words, offsets[5])
    )
    id_of = _read_dictionary(decoder, models[0], models[1], dictionary_size, lanes)
    found, levels = _read_rows(decoder, models[2], models[3], places, (positions, k), lanes)
    if not dictionary_size:
        return found, levels
    return _sorted_pairs(id_of[found], levels, level_count)


def _read_dictionary(
    decoder: Decoder, gap_model: Model, count_model: Model, size: int, lanes: int
) -> I64:
    """Id of each place, int64 [size]."""
    gaps = np.empty(size, np.int64)
    counts = np.empty(size, np.int64)
    bases, bits = _gap_bases(gap_model.symbols), _gap_bits(gap_model.symbols)
    for first in range(0, size, max(lanes, 1)):
        rows = slice(first, min(first + lanes, size))
        context = np.zeros(rows.stop - first, np.int64)
        index, raw = decoder.step_with_bits(gap_model, bits, context)
        gaps[rows] = bases[index] + raw
        counts[rows] = decoder.step(count_model, context)
    return _by_count(np.cumsum(gaps) - 1, counts)


def _read_rows(
    decoder: Decoder,
    gap_model: Model,
    level_model: Model,
    places: int,
    shape: tuple[int, int],
    lanes: int,
) -> tuple[I64, I64]:
    """Places int64 [N, K] and levels int64 [N, K]."""
    positions, k = shape
    found = np.empty((k, positions), np.int64)
    levels = np.empty((k, positions), np.int64)
    gap_context, level_context = _gap_context(places), _level_context(places)
    bases = np.tile(_gap_bases(gap_model.symbols), gap_model.contexts)
    bits = np.tile(_gap_bits(gap_model.symbols), gap_model.contexts)
    for first in range(0, positions, max(lanes, 1)):
        rows = slice(first, min(first + lanes, positions))
        place = np.zeros(rows.stop - first, np.int64)
        for column in range(k):
            index, raw = decoder.step_with_bits(gap_model, bits, gap_context[place])
            raw += bases[index]
            place += raw
            found[column, rows] = place
            levels[column, rows] = decoder.step(level_model, level_context[place])
    found -= 1
    levels %= level_model.symbols
    return np.ascontiguousarray(found.T), np.ascontiguousarray(levels.T)


def _plan(ids: I64, levels: I64, vocab_size: int, level_count: int, *, dictionary: bool) -> _Plan:
    counts = np.bincount(ids.reshape(-1), minlength=vocab_size)
    distinct = np.flatnonzero(counts)
    classes = np.frexp(counts[distinct].astype(np.float64))[1].astype(np.int64)
    entry_gaps = _coded_gaps(np.diff(distinct, prepend=-1), np.zeros_like(distinct), 1, vocab_size)
    entry_counts = _coded(np.zeros_like(classes), classes, 1, _COUNT_CLASSES)
    places, size = ids, vocab_size
    if dictionary and len(distinct):
        size = len(distinct)
        place_of = np.empty(vocab_size, np.int64)
        place_of[_by_count(distinct, classes)] = np.arange(size)
        places, levels = _sorted_pairs(place_of[ids], levels, level_count)
    gaps = np.diff(places, axis=1, prepend=-1)
    starts = places + 1 - gaps
    return _Plan(
        size if dictionary else 0,
        (entry_gaps, entry_counts),
        _coded_gaps(gaps, _gap_context(size)[starts], _gap_classes(size), size),
        _coded(_level_context(size)[places + 1], levels, _level_contexts(size), level_count),
    )


def _sorted_pairs(keys: I64, levels: I64, level_count: int) -> tuple[I64, I64]:
    """Rows of `keys` [N, K] sorted, their levels along; one sort of whole numbers beats argsort."""
    pairs = keys * level_count + levels
    pairs.sort(axis=1)
    keys = pairs // level_count
    return keys, pairs - keys * level_count


def _by_count(ids: I64, classes: I64) -> I64:
    """`ids` with the frequent ones first; equal classes by id, so that a reader can repeat it."""
    order: I64 = np.lexsort((ids, -classes))
    return ids[order]


def _coded(context: I64, symbols: I64, contexts: int, symbol_count: int) -> _Coded:
    index = context * symbol_count + symbols
    counts = np.bincount(index.reshape(-1), minlength=contexts * symbol_count).astype(np.int64)
    model = Model.of_counts(counts.reshape(contexts, symbol_count))
    nothing = np.zeros_like(index)
    return _Coded(model, index, nothing, nothing)


def _coded_gaps(gaps: I64, context: I64, contexts: int, size: int) -> _Coded:
    classes, bits = _gap_class(gaps)
    coded = _coded(context, classes, contexts, _gap_classes(size))
    return _Coded(coded.model, coded.index, gaps - _gap_bases(_gap_classes(size))[classes], bits)


def _gap_class(gaps: I64) -> tuple[I64, I64]:
    """Class and number of raw bits of gaps ≥ 1.

    With e the gap's top bit, the class is 2e − 1 plus the bit below it, and e − 1 bits follow.
    """
    exponent = np.frexp(gaps.astype(np.float64))[1].astype(np.int64) - 1
    below = np.maximum(exponent - 1, 0)
    classes = np.where(exponent == 0, 0, 2 * exponent - 1 + ((gaps >> below) & 1))
    return classes, below


def _gap_classes(places: int) -> int:
    """Classes that gaps among `places` places can have; also the number of gap contexts."""
    return 2 * (places + 1).bit_length() + 1


def _gap_bases(classes: int) -> I64:
    """Smallest gap of each class."""
    number = np.arange(classes)
    exponent, below = (number + 1) // 2, np.maximum((number + 1) // 2 - 1, 0)
    return np.where(number == 0, 1, (1 << exponent) + (((number + 1) % 2) << below))


def _gap_bits(classes: int) -> I64:
    """Raw bits after each class."""
    return np.maximum((np.arange(classes) + 1) // 2 - 1, 0)


def _gap_context(places: int) -> I64:
    """Context of a gap by the place it starts at: 0 … places."""
    return _gap_class(np.arange(1, places + 2))[0]


def _level_contexts(places: int) -> int:
    return (places + 1).bit_length() + 1


def _level_context(places: int) -> I64:
    """Context of a level by 1 + its place: 0 … places."""
    return np.frexp(np.arange(places + 1).astype(np.float64))[1].astype(np.int64)
