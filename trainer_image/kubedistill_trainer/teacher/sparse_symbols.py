"""Sets of token ids and their levels in few bytes, decoded by whole arrays without a loop.

A sample's N sets of K ids are written the other way round: for each id that occurs, at which
positions. The distinct ids and how often each occurs come first. From then on it is known which
symbol belongs to which id, so nothing that follows depends on what was decoded before it. Numbers
(distances between ids, counts, distances between an id's positions) are split into a class (power
of two and one more bit) and low bits that are kept raw. Classes and levels are grouped by how often
their id occurs; a group is a zstd block, with Huffman codes of its own.

Layout: header; one zstd frame of symbols; raw bits.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import zstandard
from numpy.typing import NDArray

MAX_VOCABULARY = 1 << 18
_HEADER = struct.Struct("<II")  # distinct ids, bytes of the frame
_MAX_RAW_BITS = 24  # with the 7 bits before a value's first they stay within a window of 32
_ZSTD_LEVEL = 3

I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]
Levels = NDArray[np.unsignedinteger]


def encode_symbols(ids: I64, levels: I64, vocab_size: int, level_count: int) -> bytes:
    """Bytes of ids [N, K], strictly rising along K within 0 … V − 1, and levels [N, K].

    Levels lie within 0 … level_count − 1; with more than 256 they take two bytes.
    """
    flat = ids.reshape(-1)
    order = np.argsort(flat, kind="stable")
    positions = order // max(ids.shape[1], 1)
    counts = np.bincount(flat, minlength=vocab_size)
    distinct = np.flatnonzero(counts)
    counts = counts[distinct]
    firsts = np.cumsum(counts) - counts
    distances = np.diff(positions, prepend=-1)
    distances[firsts] = positions[firsts] + 1
    group = _group(counts)
    by_group = np.argsort(np.repeat(group, counts), kind="stable")
    bounds = _bounds(group, counts)
    numbers = (np.diff(distinct, prepend=-1), counts, distances[by_group])
    classes, low, bits = zip(*map(_split, numbers), strict=True)
    blocks = [
        *classes[:2],
        *np.split(classes[2], bounds),
    ]
    grouped = levels.reshape(-1)[order][by_group]
    for plane in range(_planes(level_count)):
        blocks += np.split((grouped >> (8 * plane)).astype(np.uint8), bounds)
    frame = _compressed(blocks)
    raw = _packed(np.concatenate(low), np.concatenate(bits))
    return _HEADER.pack(len(distinct), len(frame)) + frame + raw


def decode_symbols(
    data: bytes, positions: int, k: int, vocab_size: int, level_count: int
) -> tuple[I64, Levels]:
    """Ids int64 [N, K] and levels [N, K]. ValueError when `data` is not what was encoded."""
    try:
        return _decoded(data, positions, k, vocab_size, level_count)
    except (IndexError, struct.error, zstandard.ZstdError) as error:
        raise ValueError(f"coded ids cannot be read: {error}") from error


def _decoded(
    data: bytes, positions: int, k: int, vocab_size: int, level_count: int
) -> tuple[I64, Levels]:
    size, frame_bytes = _HEADER.unpack_from(data)
    entries, planes = positions * k, _planes(level_count)
    if not size <= vocab_size <= MAX_VOCABULARY or size > entries:
        raise ValueError(f"{size} different ids in {entries} of a vocabulary of {vocab_size}")
    body = _HEADER.size + frame_bytes
    frame = data[_HEADER.size : body]
    wanted, there = 2 * size + (1 + planes) * entries, zstandard.frame_content_size(frame)
    if there != wanted:  # before anything is allocated for a damaged count
        raise ValueError(f"{there} symbols instead of {wanted}")
    found = np.frombuffer(zstandard.ZstdDecompressor().decompress(frame), np.uint8)
    numbers = _joined(found[: 2 * size + entries], data[body:])
    distinct, counts = np.cumsum(numbers[:size]) - 1, numbers[size : 2 * size]
    if counts.sum() != entries or (size and distinct[-1] >= vocab_size):
        raise ValueError(f"ids do not add up to {entries} of a vocabulary of {vocab_size}")
    # Keys of 8 and 16 bits are sorted by radix, far faster than wider ones.
    by_group = np.argsort(np.repeat(_group(counts), counts), kind="stable")
    distances = np.empty(entries, np.int64)
    distances[by_group] = numbers[2 * size :]
    levels: Levels = np.empty(entries, np.uint8 if planes == 1 else np.uint16)
    low, *high = found[2 * size + entries :].reshape(planes, entries)
    levels[by_group] = low if not high else low | (high[0].astype(np.uint16) << 8)
    if levels.max(initial=0) >= level_count:
        raise ValueError(f"level {levels.max()} of {level_count}")
    order = _by_position(distances, counts, positions, k)
    shape = positions, k
    return np.repeat(distinct, counts)[order].reshape(shape), levels[order].reshape(shape)


def _by_position(distances: I64, counts: I64, positions: int, k: int) -> I64:
    """Order that brings entries sorted by id to their positions, K each, sorted by id there."""
    ends = np.cumsum(distances)
    firsts = np.cumsum(counts) - counts
    before = ends[firsts] - distances[firsts]
    where = ends - np.repeat(before, counts) - 1
    if (
        where.max(initial=-1) >= positions
        or not (np.bincount(where, minlength=positions) == k).all()
    ):
        raise ValueError(f"ids do not fall into {positions} positions of {k}")
    narrow = np.uint16 if positions <= 1 << 16 else np.uint32
    return np.argsort(where.astype(narrow), kind="stable")


def _planes(level_count: int) -> int:
    """Bytes of a level."""
    return 1 if level_count <= 1 << 8 else 2


def _group(counts: I64) -> U8:
    """Group of each id by how often it occurs: powers of two."""
    return np.frexp(counts.astype(np.float64))[1].astype(np.uint8)


def _bounds(group: U8, counts: I64) -> I64:
    """Where each group ends among the entries sorted by group, but for the last."""
    return np.cumsum(np.bincount(group, counts).astype(np.int64))[:-1]


def _split(numbers: I64) -> tuple[U8, I64, I64]:
    """Class, low bits and their number of whole numbers ≥ 1.

    With e the number's top bit, the class is 2e − 1 plus the bit below it, and e − 1 bits follow.
    """
    exponent = np.frexp(numbers.astype(np.float64))[1].astype(np.int64) - 1
    bits = np.maximum(exponent - 1, 0)
    classes = np.where(exponent == 0, 0, 2 * exponent - 1 + ((numbers >> bits) & 1))
    return classes.astype(np.uint8), numbers & ((1 << bits) - 1), bits


def _joined(classes: U8, raw: bytes) -> I64:
    """Inverse of `_split` and `_packed`."""
    number = np.arange(2 * _MAX_RAW_BITS + 2)
    exponent = (number + 1) // 2
    bits_of = np.maximum(exponent - 1, 0)
    base_of = np.where(number == 0, 1, (1 << exponent) + (((number + 1) % 2) << bits_of))
    bits = bits_of[classes]
    ends = np.cumsum(bits)
    total = int(ends[-1]) if len(ends) else 0
    if len(raw) != -(-total // 8):
        raise ValueError(f"{len(raw)} bytes of raw bits instead of {-(-total // 8)}")
    padded = np.frombuffer(raw + bytes(4), np.uint8).astype(np.int64)
    windows = padded[:-3] << 24
    for place in (1, 2, 3):
        windows |= padded[place : place + len(windows)] << (24 - 8 * place)
    starts = ends - bits
    low: I64 = windows[starts >> 3] >> (32 - bits - (starts & 7))
    low &= (1 << bits) - 1
    low += base_of[classes]
    return low


def _packed(values: I64, bits: I64) -> bytes:
    """Each value's `bits` low bits, one after the other, high bits first."""
    ends = np.cumsum(bits)
    owner = np.repeat(np.arange(len(values)), bits)
    shift = ends[owner] - 1 - np.arange(len(owner))
    return np.packbits(((values[owner] >> shift) & 1).astype(np.uint8)).tobytes()


def _compressed(blocks: Sequence[U8]) -> bytes:
    """One frame with a block or more for each part, so that each has its own codes."""
    size = sum(block.size for block in blocks)
    frame = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compressobj(size=size)
    parts = []
    for block in blocks:
        if block.size:
            parts.append(frame.compress(block.tobytes()))
            parts.append(frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    return b"".join((*parts, frame.flush()))
