"""Top-k log-probabilities in few bytes: sorted ids as gaps, quantised values, both entropy-coded.

A position's ids are sorted and stored as gaps. A gap is a class (its power of two and one more
bit), entropy-coded in the context of where in the vocabulary it starts, and raw low bits: ids of
real tokenizers crowd at the low end, and the context learns how much. A log-probability is
log p = top − range · (level / (levels − 2))²: the square puts the fine steps where the mass is,
and the last level means −inf. Levels are entropy-coded in the context of their token's id.
Normalisers are 16-bit fixed point between their exact bounds, 0 and (1 − 1/T) · log V, which is
30 times finer than fp16 at the same size.

Layout: header; tops u16 [N]; ranges fp16 [N]; log Z u16 [N, G without T = 1]; the two tables; the
lanes' final states; the words.
"""

from __future__ import annotations

import math
import struct

import numpy as np
import torch
from numpy.typing import NDArray

from kubedistill_trainer.teacher.payload import Sparse, SparseSpec
from kubedistill_trainer.teacher.rans import MAX_RAW_BITS, Decoder, Encoder, Model

_HEADER = struct.Struct("<IIIIIII")  # N, K, V, gap table, value table, lanes, words
_ROWS_A_LANE = 4
_U16 = 65535
_MAX_VOCABULARY = 1 << MAX_RAW_BITS

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]


def encode_sparse(payload: Sparse, spec: SparseSpec, vocab_size: int) -> bytes:
    """Bytes of one sample. ValueError when `payload` does not fit `spec` or `vocab_size`."""
    ids, log_probs, log_z = _checked(payload, spec, vocab_size)
    tops, ranges, levels = _quantised(log_probs, spec.levels, vocab_size)
    gaps = np.diff(ids, axis=1, prepend=-1)
    classes, bits = _gap_class(gaps)
    places = ids + 1 - gaps
    gap_context = _gap_contexts(vocab_size)[places]
    value_context = _value_contexts(vocab_size)[ids]
    gap_model = _fitted(gap_context, classes, _gap_shape(vocab_size))
    value_model = _fitted(value_context, levels, _value_shape(vocab_size, spec.levels))

    positions, k = ids.shape
    lanes = -(-positions // _ROWS_A_LANE)
    encoder = Encoder(lanes)
    gap_index = gap_context * gap_model.symbols + classes
    value_index = value_context * value_model.symbols + levels
    raw = (gaps - _gap_bases(vocab_size)[classes]).astype(np.uint64)
    none = np.zeros(lanes, np.uint64)
    for first in range(0, positions, max(lanes, 1)):
        rows = slice(first, first + lanes)
        for column in range(k):
            index = gap_index[rows, column]
            encoder.step(
                gap_model.frequency[index],
                gap_model.start[index],
                raw[rows, column],
                bits[rows, column],
            )
            index = value_index[rows, column]
            nothing = none[: len(index)]
            encoder.step(value_model.frequency[index], value_model.start[index], nothing, nothing)
    states, words = encoder.finish()
    gap_table, value_table = gap_model.to_bytes(), value_model.to_bytes()
    header = _HEADER.pack(
        positions, k, vocab_size, len(gap_table), len(value_table), lanes, len(words)
    )
    planes = _fixed_log_z(log_z, spec.temperatures, vocab_size)
    return b"".join(
        (
            header,
            tops.astype("<u2").tobytes(),
            ranges.astype("<f2").tobytes(),
            planes.astype("<u2").tobytes(),
            gap_table,
            value_table,
            states.astype("<u8").tobytes(),
            words.astype("<u4").tobytes(),
        )
    )


def decode_sparse(data: bytes, spec: SparseSpec) -> Sparse:
    """Inverse of `encode_sparse` up to quantisation. ValueError when `data` is not such a record.

    The kept mass never exceeds 1 at any T, whatever rounding did, so a tail is never negative.
    """
    try:
        return _decoded(data, spec)
    except (IndexError, struct.error) as error:
        raise ValueError(f"sparse record cannot be read: {error}") from error


def _decoded(data: bytes, spec: SparseSpec) -> Sparse:
    positions, k, vocab_size, gap_size, value_size, lanes, words = _HEADER.unpack_from(data)
    stored = sum(temperature != 1.0 for temperature in spec.temperatures)
    sizes = (
        2 * positions,
        2 * positions,
        2 * positions * stored,
        gap_size,
        value_size,
        8 * lanes,
        4 * words,
    )
    if k != spec.k or len(data) != _HEADER.size + sum(sizes):
        raise ValueError(
            f"sparse record has K = {k} and {len(data)} bytes; "
            f"K = {spec.k} and {_HEADER.size + sum(sizes)} were expected"
        )
    parts, offset = [], _HEADER.size
    for size in sizes:
        parts.append(data[offset : offset + size])
        offset += size
    gap_model = Model.from_bytes(parts[3], *_gap_shape(vocab_size))
    value_model = Model.from_bytes(parts[4], *_value_shape(vocab_size, spec.levels))
    decoder = Decoder(np.frombuffer(parts[5], "<u8"), np.frombuffer(parts[6], "<u4"))
    ids, levels = _symbols(decoder, gap_model, value_model, positions, k, vocab_size)
    tops = np.frombuffer(parts[0], "<u2")
    ranges = np.frombuffer(parts[1], "<f2")
    planes = np.frombuffer(parts[2], "<u2").reshape(positions, stored)
    log_probs = _restored(tops, ranges, levels, spec.levels, vocab_size)
    log_z = _float_log_z(planes, spec.temperatures, vocab_size)
    return _consistent(ids, log_probs, log_z, spec.temperatures)


def _symbols(
    decoder: Decoder, gap_model: Model, value_model: Model, positions: int, k: int, vocab_size: int
) -> tuple[I64, I64]:
    """Ids int64 [N, K] and levels int64 [N, K]."""
    lanes = -(-positions // _ROWS_A_LANE)
    ids = np.empty((k, positions), np.int64)
    levels = np.empty((k, positions), np.int64)
    gap_context, value_context = _gap_contexts(vocab_size), _value_contexts(vocab_size)
    bases = np.tile(_gap_bases(vocab_size), gap_model.contexts)
    bits = np.tile(_gap_bits(vocab_size), gap_model.contexts)
    no_bits = np.zeros(value_model.contexts * value_model.symbols, np.uint64)
    for first in range(0, positions, max(lanes, 1)):
        rows = slice(first, min(first + lanes, positions))
        place = np.zeros(rows.stop - first, np.int64)
        for column in range(k):
            index, raw = decoder.step(gap_model, bits, gap_context[place])
            place += bases[index] + raw.astype(np.int64)
            ids[column, rows] = place - 1
            index, _ = decoder.step(value_model, no_bits, value_context[place - 1])
            levels[column, rows] = index
    levels %= value_model.symbols
    return ids.T, levels.T


def _checked(payload: Sparse, spec: SparseSpec, vocab_size: int) -> tuple[I64, F64, F64]:
    """The arrays of `payload`, or ValueError that names what is wrong with them."""
    ids = payload.token_ids.detach().cpu().numpy().astype(np.int64)
    log_probs = payload.log_probs.detach().double().cpu().numpy()
    log_z = payload.log_z.detach().double().cpu().numpy()
    if vocab_size > _MAX_VOCABULARY:
        raise ValueError(f"a vocabulary of {vocab_size} exceeds {_MAX_VOCABULARY}")
    if payload.temperatures != spec.temperatures:
        raise ValueError(
            f"payload has temperatures {payload.temperatures}, not {spec.temperatures}"
        )
    n = len(ids)
    if ids.shape != (n, spec.k) or log_probs.shape != ids.shape:
        raise ValueError(f"ids {ids.shape} and values {log_probs.shape} are not [N, {spec.k}]")
    if log_z.shape != (n, len(spec.temperatures)) or not np.isfinite(log_z).all():
        raise ValueError(f"log Z {log_z.shape} is not finite [{n}, {len(spec.temperatures)}]")
    if (np.diff(ids, axis=1) <= 0).any() or (ids < 0).any() or (ids >= vocab_size).any():
        raise ValueError(f"token ids must rise strictly within 0…{vocab_size - 1}")
    if np.isnan(log_probs).any() or (log_probs > 1e-3).any() or np.isinf(log_probs).all(1).any():
        raise ValueError("log-probabilities hold NaN, a positive value, or a row of only −inf")
    return ids, log_probs, log_z


def _quantised(
    log_probs: F64, levels: int, vocab_size: int
) -> tuple[I64, NDArray[np.float16], I64]:
    """Tops as u16 [N], ranges fp16 [N] and levels [N, K]; see the module's docstring."""
    floor = math.log(max(vocab_size, 2))
    tops = np.rint(_U16 * np.sqrt(np.clip(-log_probs.max(1, initial=-np.inf), 0, floor) / floor))
    top = _top(tops, vocab_size)
    depth = top[:, None] - log_probs
    # beyond what fp16 holds, a probability is zero in every float format
    lost = depth > float(np.finfo(np.float16).max) / 2
    depth[lost] = 0.0
    ranges = np.nextafter(
        np.clip(depth, 0, None).max(1, initial=0.0).astype(np.float16), np.float16(np.inf)
    )
    code = np.rint((levels - 2) * np.sqrt(np.clip(depth / ranges[:, None].astype(float), 0, 1)))
    code[lost] = levels - 1
    return tops.astype(np.int64), ranges, code.astype(np.int64)


def _top(tops: NDArray[np.generic], vocab_size: int) -> F64:
    """The largest log-probability [N]: a square law, finest where the teacher is sure."""
    scaled: F64 = tops.astype(np.float64) / _U16
    return -math.log(max(vocab_size, 2)) * scaled * scaled


def _restored(
    tops: NDArray[np.uint16], ranges: NDArray[np.float16], codes: I64, levels: int, vocab_size: int
) -> F32:
    """log p float32 [N, K] at T = 1."""
    curve = (np.arange(levels) / (levels - 2)).astype(np.float32) ** 2
    curve[-1] = np.inf
    scaled: F32 = curve[codes] * ranges.astype(np.float32)[:, None]
    return _top(tops, vocab_size).astype(np.float32)[:, None] - scaled


def _consistent(ids: I64, log_probs: F32, log_z: F32, grid: tuple[float, ...]) -> Sparse:
    """The payload, with values and normalisers nudged so that no kept mass exceeds 1."""
    values = torch.from_numpy(np.ascontiguousarray(log_probs))
    normalisers = torch.from_numpy(log_z)
    values -= torch.logsumexp(values, dim=-1, keepdim=True).clamp_min(0.0)
    for column, temperature in enumerate(grid):
        if temperature != 1.0:
            kept = torch.logsumexp(values / temperature, dim=-1)
            normalisers[:, column] = torch.maximum(normalisers[:, column], kept)
    return Sparse(torch.from_numpy(np.ascontiguousarray(ids)), values, normalisers, grid)


def _log_z_bound(temperature: float, vocab_size: int) -> float:
    """log Z_T lies between 0 and this: 0 for a sure teacher, this for a uniform one."""
    return (1.0 - 1.0 / temperature) * math.log(max(vocab_size, 2))


def _fixed_log_z(log_z: F64, grid: tuple[float, ...], vocab_size: int) -> I64:
    """Fixed point [N, G without T = 1] of log Z [N, G]."""
    columns = [
        np.rint(np.clip(log_z[:, i] / _log_z_bound(t, vocab_size), 0, 1) * _U16)
        for i, t in enumerate(grid)
        if t != 1.0
    ]
    return np.stack(columns, 1).astype(np.int64) if columns else np.empty((len(log_z), 0), np.int64)


def _float_log_z(planes: NDArray[np.uint16], grid: tuple[float, ...], vocab_size: int) -> F32:
    """log Z float32 [N, G] of fixed point [N, G without T = 1]."""
    log_z = np.zeros((len(planes), len(grid)), np.float32)
    others = [i for i, t in enumerate(grid) if t != 1.0]
    for source, column in enumerate(others):
        log_z[:, column] = planes[:, source] * (_log_z_bound(grid[column], vocab_size) / _U16)
    return log_z


def _fitted(context: I64, symbols: I64, shape: tuple[int, int]) -> Model:
    counts = np.bincount((context * shape[1] + symbols).reshape(-1), minlength=shape[0] * shape[1])
    return Model.of_counts(counts.astype(np.int64).reshape(shape))


def _gap_class(gaps: I64) -> tuple[I64, U64]:
    """Class and number of raw bits of gaps ≥ 1.

    With e the gap's top bit, the class is 2e − 1 plus the bit below it, and e − 1 bits follow.
    """
    exponent = np.frexp(gaps.astype(np.float64))[1].astype(np.int64) - 1
    second = (gaps >> np.maximum(exponent - 1, 0)) & 1
    classes = np.where(exponent == 0, 0, 2 * exponent - 1 + second)
    return classes, np.maximum(exponent - 1, 0).astype(np.uint64)


def _gap_shape(vocab_size: int) -> tuple[int, int]:
    """Contexts and classes of the gap table."""
    classes = 2 * vocab_size.bit_length() + 1
    return classes, classes


def _gap_bases(vocab_size: int) -> I64:
    """Smallest gap of each class."""
    classes = np.arange(_gap_shape(vocab_size)[1])
    exponent = (classes + 1) // 2
    second = (classes + 1) % 2
    return np.where(classes == 0, 1, (1 << exponent) + (second << np.maximum(exponent - 1, 0)))


def _gap_bits(vocab_size: int) -> U64:
    """Raw bits after each class."""
    classes = np.arange(_gap_shape(vocab_size)[1])
    return np.maximum((classes + 1) // 2 - 1, 0).astype(np.uint64)


def _gap_contexts(vocab_size: int) -> I64:
    """Context of a gap by the place it starts at: 0 … V."""
    return _gap_class(np.arange(1, vocab_size + 2))[0]


def _value_shape(vocab_size: int, levels: int) -> tuple[int, int]:
    return vocab_size.bit_length() + 1, levels


def _value_contexts(vocab_size: int) -> I64:
    """Context of a level by its token's id: 0 … V − 1."""
    return np.frexp(np.arange(1, vocab_size + 1).astype(np.float64))[1].astype(np.int64)
