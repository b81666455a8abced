"""Entropy coding of many rows at once: interleaved rANS with static tables, in numpy.

Rows are dealt to `lanes`; every Python step codes one symbol of every lane, so the interpreter's
cost is paid once a step and not once a token. All lanes share one word stream (a lane that runs
low takes the next word, in lane order), so only the final states cost space. A step may carry
`bits` raw bits beside its symbol.

Reference: J. Duda, "Asymmetric numeral systems", 2013; F. Giesen, "Interleaved entropy coders",
2014.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import zstandard
from numpy.typing import NDArray

PROB_BITS = 12
PROB_TOTAL = 1 << PROB_BITS
MAX_RAW_BITS = 18  # PROB_BITS + raw bits must stay within the 30 bits below the lower bound

_I64 = np.int64
_LOW = _I64(1 << 30)
_WORD = _I64(32)
_WORD_MASK = _I64(0xFFFFFFFF)
_P = _I64(PROB_BITS)
_P_MASK = _I64(PROB_TOTAL - 1)

I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Model:
    """Frequencies of `symbols` symbols in each of `contexts` contexts, scaled to 2^12.

    `frequency` and `start` are int64 [contexts · symbols], `lookup` is int64
    [contexts · 2^12] and gives the flat index context · symbols + symbol of a slot.
    """

    contexts: int
    symbols: int
    frequency: I64
    start: I64
    lookup: I64

    @staticmethod
    def of_counts(counts: I64) -> Model:
        """Scale `counts` [contexts, symbols]; every symbol that occurs keeps at least one slot."""
        return Model.of_frequencies(_scaled(counts))

    @staticmethod
    def of_frequencies(frequency: I64) -> Model:
        """Tables of a scaled [contexts, symbols]. ValueError where a row does not sum to 2^12."""
        contexts, symbols = frequency.shape
        if (frequency < 0).any() or (frequency.sum(1) != PROB_TOTAL).any():
            raise ValueError(f"frequencies of an entropy table do not sum to {PROB_TOTAL}")
        start = np.cumsum(frequency, axis=1) - frequency
        flat = frequency.reshape(-1)
        lookup = np.repeat(np.arange(flat.size, dtype=np.int64), flat)
        return Model(contexts, symbols, flat.astype(_I64), start.reshape(-1).astype(_I64), lookup)

    def to_bytes(self) -> bytes:
        """The table, compressed; its shape is not in it."""
        return zstandard.compress(self.frequency.astype("<u2").tobytes(), 9)

    @staticmethod
    def from_bytes(data: bytes, contexts: int, symbols: int) -> Model:
        """Inverse of `to_bytes`. ValueError when the table has another shape."""
        size = contexts * symbols * 2
        try:
            raw = zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
        except zstandard.ZstdError as error:
            raise ValueError(f"entropy table cannot be read: {error}") from error
        if len(raw) != size:
            raise ValueError(f"entropy table has {len(raw)} bytes instead of {size}")
        return Model.of_frequencies(
            np.frombuffer(raw, "<u2").astype(np.int64).reshape(contexts, symbols)
        )


def _scaled(counts: I64) -> I64:
    """`counts` [contexts, symbols] scaled so that each row sums to 2^12."""
    counts = counts.copy()
    counts[counts.sum(1) == 0, 0] = 1  # a context never met still needs a valid table
    scaled: I64 = counts * PROB_TOTAL // counts.sum(1, keepdims=True)
    scaled[(counts > 0) & (scaled == 0)] = 1
    excess = scaled.sum(1) - PROB_TOTAL
    for row in np.flatnonzero(excess):
        _spend(scaled[row], int(excess[row]))
    return scaled


def _spend(row: I64, excess: int) -> None:
    """Take `excess` slots (or give, when negative) from the largest entries of `row`, in place."""
    while excess > 0:
        largest = int(row.argmax())
        taken = min(excess, max(1, int(row[largest]) // 8))
        row[largest] -= taken
        excess -= taken
    row[int(row.argmax())] -= excess


class Encoder:
    """Collects steps in decoding order; `finish` codes them backwards, as rANS must."""

    def __init__(self, lanes: int) -> None:
        self._lanes = lanes
        self._steps: list[tuple[I64, I64, I64, I64]] = []

    def step(self, frequency: I64, start: I64, raw: I64, bits: I64) -> None:
        """One symbol for each of the first `len(frequency)` lanes; all arguments int64 [n]."""
        self._steps.append((frequency, start, raw, bits))

    def finish(self) -> tuple[I64, NDArray[np.uint32]]:
        """Final states int64 [lanes] and the words uint32 [any] in reading order."""
        state = np.full(self._lanes, _LOW, dtype=_I64)
        emitted: list[NDArray[np.uint32]] = []
        top = _I64(62 - PROB_BITS)
        for frequency, start, raw, bits in reversed(self._steps):
            x = state[: len(frequency)]
            full = np.flatnonzero(x >= frequency << (top - bits))
            emitted.append((x[full] & _WORD_MASK).astype(np.uint32))
            x[full] >>= _WORD
            quotient = x // frequency
            x[:] = (((quotient << bits) | raw) << _P) + (x - quotient * frequency) + start
        emitted.reverse()
        return state, np.concatenate(emitted) if emitted else np.empty(0, np.uint32)


class Decoder:
    """Takes symbols back in the order in which `Encoder.step` was called."""

    def __init__(self, states: I64, words: NDArray[np.uint32]) -> None:
        self._state = states.astype(_I64)
        self._words = words.astype(_I64)
        self._read = 0

    def step(self, model: Model, context: I64) -> I64:
        """Flat table indices int64 [n] of the next symbol of the first n = len(context) lanes.

        ValueError when the words run out.
        """
        x = self._state[: len(context)]
        slot = x & _P_MASK
        index: I64 = model.lookup[(context << _P) + slot]
        x >>= _P
        x *= model.frequency[index]
        x += slot - model.start[index]
        self._refill(x)
        return index

    def step_with_bits(self, model: Model, bits_of: I64, context: I64) -> tuple[I64, I64]:
        """As `step`, for symbols with raw bits: also their values int64 [n].

        `bits_of` int64 [contexts · symbols] gives the number of raw bits of each symbol.
        """
        x = self._state[: len(context)]
        slot = x & _P_MASK
        index: I64 = model.lookup[(context << _P) + slot]
        bits = bits_of[index]
        x >>= _P
        high = x >> bits
        raw: I64 = x - (high << bits)
        high *= model.frequency[index]
        x[:] = high + (slot - model.start[index])
        self._refill(x)
        return index, raw

    def _refill(self, x: I64) -> None:
        (low,) = (x < _LOW).nonzero()
        end = self._read + len(low)
        if end > len(self._words):
            raise ValueError("entropy-coded data ends before its last symbol")
        x[low] = (x[low] << _WORD) | self._words[self._read : end]
        self._read = end
